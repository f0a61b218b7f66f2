"""The model card of an adapter folder: a header hubs understand, and how to use the adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.reading import plain


def model_card(config: Mapping[str, Any], run: Mapping[str, Any] | None = None,
               merged: bool = False) -> str:
    """README.md for an adapter, from its configuration and, where there was one, its run.
    merged: of the base with the adapter in its weights."""
    base = (config.get("base") or {}).get("name") or ""
    recipe = str(config.get("recipe", ""))
    header = ["---", *heading(base, merged), "---"]
    text = [
        ("# Tuned from " if merged else "# Adapter for ") + words(base) if base else
        ("# Tuned" if merged else "# Adapter"),
        "",
        f"Trained with burnish, recipe {code(recipe)}"
        + (", and merged into plain weights." if merged else "."),
    ]
    text += [] if merged else [
        "",
        "```python",
        "import burnish",
        "",
        f"model = ...  # {one_line(base) or 'the base it was trained on'}, built as usual",
        'tuned = burnish.load(model, "path/to/this/folder")',
        "```",
    ]
    rows = _rows(run or {})
    if rows:
        text += ["", "| | |", "|---|---|", *[f"| {words(k)} | {words(v)} |" for k, v in rows]]
    return "\n".join([*header, "", *text]) + "\n"


def heading(base: str, merged: bool, pipeline: str = "", tags: Iterable[str] = ()) -> list[str]:
    """The header by which hubs show what this is of; a base that is a folder has no name there."""
    kind, library = ("finetune", "transformers") if merged else ("adapter", "burnish")
    rows = [f"library_name: {library}"]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists():
        rows += [f"base_model: {quoted(base)}", f"base_model_relation: {kind}"]
    if pipeline:
        rows.append(f"pipeline_tag: {pipeline}")
    return [*rows, "tags:", "- burnish", *([] if merged else ["- adapter"]),
            *(f"- {name}" for name in tags)]


def one_line(text: Any) -> str:
    return plain(text, 500)


def words(text: Any) -> str:
    """Text for Markdown that stays text: no markup, no table cell, no HTML, no second line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>&$])", r"\\\1", one_line(text))


def code(text: Any) -> str:
    """A code span that its own text cannot end."""
    line = one_line(text)
    fence = "`" * (1 + max((len(t) for t in re.findall("`+", line)), default=0))
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def quoted(text: Any) -> str:
    """Text in YAML: JSON's quotes, which YAML reads alike."""
    return json.dumps(str(text))


def _rows(run: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Plain values of a run, nested ones by dotted name; lists stay in run.json."""
    rows: list[tuple[str, Any]] = []
    for key, value in run.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            rows.append((prefix + str(key),
                         f"{value:.6g}" if isinstance(value, float) else value))
    return rows[:40]
