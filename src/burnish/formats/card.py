"""The model card of an adapter folder: a header hubs understand, and how to use the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> str:
    """README.md for an adapter, from its configuration and, where there was one, its run."""
    base = (config.get("base") or {}).get("name") or ""
    recipe = str(config.get("recipe", ""))
    header = ["---", "library_name: burnish"]
    if base:
        header += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    header += ["tags:", "- burnish", "- adapter", "---"]
    text = [
        "# Adapter" + (f" for {base}" if base else ""),
        "",
        f"Trained with burnish, recipe `{recipe}`.",
        "",
        "```python",
        "import burnish",
        "",
        f"model = ...  # {base or 'the base it was trained on'}, built as usual",
        'tuned = burnish.load(model, "path/to/this/folder")',
        "```",
    ]
    rows = _rows(run or {})
    if rows:
        text += ["", "| | |", "|---|---|", *[f"| {k} | {v} |" for k, v in rows]]
    return "\n".join([*header, "", *text]) + "\n"


def _rows(run: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Plain values of a run, nested ones by dotted name; lists stay in run.json."""
    rows: list[tuple[str, Any]] = []
    for key, value in run.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str) and "|" not in str(value):
            rows.append((prefix + str(key),
                         f"{value:.6g}" if isinstance(value, float) else value))
    return rows[:40]
