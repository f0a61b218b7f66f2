"""Write docs/catalogue.md: every method, from the classes themselves. Run by `make docs`."""

from __future__ import annotations

from pathlib import Path

from burnish.cli.catalogue import facts
from burnish.core import registry
from burnish.core.axes import AXES
from burnish.core.method import TIERS
from burnish.core.vocabulary import VOCABULARY

PAGE = Path(__file__).with_name("catalogue.md")


def write() -> str:
    """The page as text; one section per axis, one entry per method."""
    entries = registry.catalogue()
    out = ["# Catalogue", "", f"{len(entries)} methods, by the question they answer. A method "
           "that answers several questions stands with the first. How each was held against its "
           "source stands with it: " + ", ".join(f"{n} {t}" for t, n in tiers(entries)) + ".", ""]
    for name, axis in AXES.items():
        own = [e for e in entries if e.axes[:1] == (name,)]
        if own:
            out += [f"## {name}: {axis.question}", ""]
        for entry in own:
            out += section(facts(entry))
    out += ["## Words that several methods share", "", "| setting | meaning |", "|---|---|"]
    out += [f"| `{name}` | {meaning} |" for name, meaning in sorted(VOCABULARY.items())]
    out += ["", "## Presets", "", "Named combinations of the literature: one line each.", ""]
    out += [f"- `{n}` = `{recipe}`" for n, recipe in sorted(registry.presets().items())]
    return "\n".join(out) + "\n"


def tiers(entries: list) -> list[tuple[str, int]]:
    """How many methods were held against their source in which way."""
    return [(t, n) for t in TIERS if (n := sum(e.cls.tier == t for e in entries))]


def section(d: dict) -> list[str]:
    """One method: its docstring as written, settings and facts."""
    out = [f"### `{d['name']}`", "", "```text", d["doc"], "```", ""]
    out += ["| setting | default | meaning |", "|---|---|---|"]
    for s in d["settings"]:
        default = "required" if s["required"] else f"`{s['default']!r}`"
        out.append(f"| `{s['name']}` | {default} | {s['help'].replace('|', chr(92) + '|')} |")
    yes = {True: "yes", False: "no"}
    return [*out, "", f"Axes: {', '.join(d['axes'])}. Step 0 is the base model: "
            f"{yes[d['identity']]}. Merges into plain weights: {yes[d['merges']]}. "
            f"Source: {d['paper'] or '-'}; {d['tier']}.", ""]


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
