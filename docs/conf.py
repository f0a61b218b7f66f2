"""Sphinx: MyST pages, the catalogue written from the registry, the API from docstrings."""

from importlib import metadata

project = "burnish"
author = "the burnish developers"
copyright = author
version = release = metadata.version("burnish")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build", "decisions/_*"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"burnish {release}"


def as_fields(app, what, name, obj, options, lines):
    """Docstrings name arguments as ``name: meaning`` lines; here they become a field list."""
    import re

    start = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (\S.*)")
    made: list[str] = []
    for line in lines:
        before = made[-1] if made else ""
        inside = before.startswith((":", " "))
        match = start.fullmatch(line)
        if match and (not before or inside):
            made.append(f":{match[1]}: {match[2]}")
            continue
        if line and not line.startswith(" ") and inside:     # the text goes on behind the fields
            made.append("")
        made.append(line)
    lines[:] = made


def setup(app):
    app.connect("autodoc-process-docstring", as_fields, priority=300)
