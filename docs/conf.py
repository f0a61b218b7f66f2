"""Sphinx: MyST pages, the catalogue written from the registry, the API from docstrings."""

from importlib.metadata import version

project = "burnish"
author = "the burnish developers"
copyright = author
release = version("burnish")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build", "decisions/_*"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"burnish {release}"
