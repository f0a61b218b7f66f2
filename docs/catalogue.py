"""Write docs/catalogue.md, a page per method, docs/methods/*.md, and docs/task-table.md from the
classes themselves. Run by `make docs`."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import board
from burnish.board import Records
from burnish.board.page import table
from burnish.cli.catalogue import facts
from burnish.core import registry
from burnish.core.axes import AXES
from burnish.core.errors import RecipeError
from burnish.core.method import TIERS
from burnish.core.needs import NEEDS
from burnish.core.recipe import parse
from burnish.core.vocabulary import VOCABULARY
from burnish.fit.kinds import KINDS
from burnish.fit.tasks import TASKS

HERE = Path(__file__).resolve().parent
YES = {True: "yes", False: "no"}


def pages() -> dict[str, str]:
    """File below docs -> its text: the catalogue, and a page per method."""
    entries, measured = registry.catalogue(), board.read()
    presets = registry.presets()
    made = {f"methods/{e.name}.md": page(e, measured, presets) for e in entries}
    return {"catalogue.md": index(entries, presets), "task-table.md": tasks(), **made}


def tasks() -> str:
    """Every task of `fit`: its rows, what best-checkpoint goes by, an example, tests."""
    out = ["# Tasks of fit", "", f"{len(KINDS)} tasks. What each reads and answers is in the "
           "[guide](guide/tasks.md). Columns are by the names that are read unasked; others are "
           "named with `--text`, `--label` and their kin.", "",
           "| task | rows | models | best by | example | tests |", "|---|---|---|---|---|---|"]
    for name, kind in KINDS.items():
        task = TASKS[name]
        best = f"{task.metric}, the {'most' if task.greater_is_better else 'least'}"
        tests = ", ".join(f"`{t}`" for t in (*kind.tests, "tests/fit/test_every_task.py"))
        out.append(f"| `{name}` | {prose(kind.rows)} | `{kind.auto}` | {prose(best)} | "
                   f"`examples/{kind.example}` | {tests} |")
    return "\n".join([*out, ""])


def layouts() -> list[str]:
    """Every task in a line for the guide: its rows, its figure, its example."""
    out = ["| task | rows | best by | example |", "|---|---|---|---|"]
    return out + [f"| `{name}` | {prose(kind.rows)} | {prose(TASKS[name].metric)} | "
                  f"`examples/{kind.example}` |" for name, kind in KINDS.items()]


def index(entries: list[Any], presets: dict[str, str]) -> str:
    """Every method in a line, by the question it answers."""
    out = ["# Catalogue", "", f"{len(entries)} methods, by the question they answer. A method "
           "that answers several questions stands with the first. How each was held against its "
           "source stands with it: " + ", ".join(f"{n} {t}" for t, n in tiers(entries)) + ".", ""]
    for name, axis in AXES.items():
        own = [e for e in entries if e.axes[:1] == (name,)]
        if own:
            out += [f"## {name}: {axis.question}", "",
                    "| method | | step 0 is the base | merges |", "|---|---|---|---|"]
        out += [f"| [`{e.name}`](methods/{e.name}.md) | {prose(e.summary)} | "
                f"{YES[e.cls.identity]} | {YES[e.cls.merges]} |" for e in own]
        out += [""] if own else []
    out += ["## Words that several methods share", "", "| setting | meaning |", "|---|---|"]
    out += [f"| `{name}` | {prose(meaning)} |" for name, meaning in sorted(VOCABULARY.items())]
    out += ["", "## Presets", "", "Named combinations of the literature: one line each.", ""]
    out += [f"- `{n}` = `{recipe}`" for n, recipe in sorted(presets.items())]
    return "\n".join([*out, "", "```{toctree}", ":hidden:", ":glob:", "", "methods/*", "```", ""])


def tiers(entries: list[Any]) -> list[tuple[str, int]]:
    """How many methods were held against their source in which way."""
    return [(t, n) for t in TIERS if (n := sum(e.cls.tier == t for e in entries))]


def page(entry: Any, measured: Records, presets: dict[str, str]) -> str:
    """One method: what its docstring says, its settings, its facts, what was measured."""
    d, cls = facts(entry), entry.cls
    out = [f"# `{d['name']}`", "", *told(d["doc"]), "", "## Settings", ""]
    if d["settings"]:
        out += ["| setting | default | meaning |", "|---|---|---|"]
    for s in d["settings"]:
        default = "required" if s["required"] else f"`{s['default']!r}`".replace("|", "\\|")
        out.append(f"| `{s['name']}` | {default} | {prose(s['help'])} |")
    known = {"answers": "; ".join(f"*{a}*, {AXES[a].question}" for a in d["axes"]),
             "step 0 is the base model": YES[d["identity"]],
             "merges into plain weights": YES[d["merges"]],
             "gradients are those of the loss": YES[cls.exact]}
    if {"delta", "storage"} & set(d["axes"]):
        known["acts on"] = ", ".join(d["kinds"])
    if cls.needs:
        known["needs"] = ", ".join(NEEDS[n][0] for n in sorted(cls.needs))
    if cls.context:
        known["reads of the batch"] = "; ".join(f"`{k}`, {prose(v.meaning)}"
                                                for k, v in cls.context.items())
    if own := [n for n, r in sorted(presets.items()) if entry.name in _names(r)]:
        known["is part of"] = ", ".join(f"`{n}` = `{presets[n]}`" for n in own)
    known |= {"source": prose(d["paper"]) or "-", "held against it": d["tier"]}
    out += ["", "## Facts", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in known.items())]
    rows = [r for r in measured if r.budget == "as_is" and r.scores
            and entry.name in _names(r.recipe)]
    if rows:
        out += ["", "## Measured", "", "Right answers in per cent on small transfers "
                "([the board](../board.md)).", "",
                *table(rows, [r for r in measured if r.budget == "as_is"])]
    return "\n".join([*out, ""])


@functools.cache
def _names(recipe: str) -> frozenset[str]:
    """Methods of a recipe."""
    try:
        return frozenset(m.name for m in parse(recipe))
    except RecipeError:                              # a row of another version
        return frozenset()


# -- a docstring as Markdown -----------------------------------------------------------------------
def told(doc: str) -> list[str]:
    """Paragraphs as prose, indented blocks as they stand, a first line in bold."""
    first, _, rest = doc.partition("\n")
    out, lines = [f"**{prose(first)}**"], rest.split("\n")
    i = 0
    while i < len(lines):
        end = i + 1
        if lines[i].startswith("    ") and (not out[-1] or out[-1] == "```"):
            while end < len(lines) and (not lines[end] or lines[end].startswith("    ")):
                end += 1
            block = [line[4:] for line in lines[i:end]]
            while not block[-1]:
                block.pop()
            out += ["```text", *block, "```", ""]
        elif lines[i]:
            while end < len(lines) and lines[end]:
                end += 1
            text = "\n".join(lines[i:end])
            out += [*prose(re.sub(r"::$", ":", text)).split("\n"), ""]
        elif out[-1]:
            out.append("")
        i = end
    while not out[-1]:
        out.pop()
    return out


def prose(text: str) -> str:
    """Words for Markdown: spans of code kept, everything else taken as it is written."""
    text = re.sub(r":(?:\w+:)?\w+:`~?(?:[^`<]*<)?([^`>]+)>?`", r"``\1``", text)
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.S)
    for i in range(0, len(parts), 2):                # between the spans
        plain = re.sub(r"([\\*_<>\[\]{}$~|`])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?m)^(\s*)([-+#=]|\d+\.)(?=\s|$)", r"\1\\\2", plain) if i or \
            not plain.startswith("- ") else plain
    for i in range(1, len(parts), 2):
        parts[i] = "`" + parts[i].strip("`").replace("\n", " ").replace("|", "\\|") + "`"
    return "".join(parts)


if __name__ == "__main__":
    (HERE / "methods").mkdir(exist_ok=True)
    wanted = pages()
    for old in (HERE / "methods").glob("*.md"):
        if f"methods/{old.name}" not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (HERE / name).write_text(text, encoding="utf-8")
