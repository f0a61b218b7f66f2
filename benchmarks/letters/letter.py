"""What a letter is: methods of one kind, the rows that a run gives of them, the page made of these.

A letter is a module of this folder with a ``LETTER``. Its methods are found by what they answer
(``belongs``), so a new one that has no row and no reason in ``left`` is noticed by a test. A page
is made of the rows alone: what papers say stands beside what was found, by a function of the rows.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
PAGES = HERE.parents[1] / "docs" / "letters"
#: seconds of a processor that a run may take
MOST = 300

Row = dict[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Claim:
    """says: what a source promises.  found(rows): (does it hold here, the figures); a row that is
    missing says so itself (:func:`one`)."""

    says: str
    found: Callable[[Rows], tuple[bool, str]]


@dataclass(frozen=True)
class Letter:
    """title, words: of the page, paragraphs.  belongs(cls): is it a method of this letter?
    (None: it is of a command, and no method is.)  left: methods without a row -> why.  rows(): runs
    everything; each row names its ``table`` and its ``how``, a recipe or a baseline's name.
    columns: head -> what a row shows there, "" where it has nothing."""

    title: str
    words: str
    belongs: Callable[[type], bool] | None
    rows: Callable[[], Iterator[Row]]
    columns: Mapping[str, Callable[[Row], str]]
    claims: Sequence[Claim] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    after: str = ""


def names() -> list[str]:
    """Every letter there is."""
    return sorted(p.stem for p in HERE.glob("*.py") if "\nLETTER = " in p.read_text("utf-8"))


def letter(name: str) -> Letter:
    return importlib.import_module(f"{__package__}.{name}").LETTER


def one(rows: Rows, how: str, **where: Any) -> Row:
    """The row of a recipe."""
    found = [r for r in rows if r["how"] == how and all(r.get(k) == v for k, v in where.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows of {how} with {where}")
    return found[0]


def methods(letter: Letter) -> set[str]:
    """The methods of the catalogue that are of this letter."""
    from burnish.core import registry

    if letter.belongs is None:
        return set()
    return {e.name for e in registry.catalogue() if letter.belongs(e.cls)
            and e.cls.__module__.startswith("burnish.")}


def shown(rows: Rows) -> set[str]:
    """Words of all recipes that have a row."""
    return {word for r in rows for word in re.findall(r"[a-z_]\w*", r["how"])}


# -- files ----------------------------------------------------------------------------------------
def run(name: str) -> Path:
    """Run a letter to its end; the file of its rows, which replaces one of the same day."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    rows = []
    for row in letter(name).rows():
        rows.append(row)
        print(json.dumps(row), flush=True)
    facts = {"letter": name, "date": date.today().isoformat(), "torch": torch.__version__,
             "machine": platform.machine(), "cores": os.cpu_count(),
             "processor_s": round(time.process_time() - began)}
    file = RESULTS / f"letter-{name}-{facts['date']}.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in (facts, *rows)), "utf-8")
    return file


def read(name: str) -> tuple[Row, list[Row]]:
    """(facts of the run, its rows) of the newest file."""
    file = max(RESULTS.glob(f"letter-{name}-*.jsonl"))
    facts, *rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return facts, rows


# -- the page -------------------------------------------------------------------------------------
def page(letter: Letter, facts: Row, rows: Rows) -> str:
    name = facts["letter"]
    out = [f"# {letter.title}", "", letter.words.strip(), "",
           f"`python -m benchmarks.letters {name}` wrote this page on {facts['date']} (torch "
           f"{facts['torch']}, one thread of a shared {facts['machine']} machine, "
           f"{facts['processor_s']} s of a processor{facts.get('made_of', '')}). Settings are the "
           "methods' defaults where "
           "nothing else stands; nothing was chosen on the rows that are scored.", ""]
    for table in dict.fromkeys(r["table"] for r in rows):
        own = [r for r in rows if r["table"] == table]
        heads = [h for h, show in letter.columns.items() if any(show(r) for r in own)]
        out += [f"## {table}", "", f"| {' | '.join(['', *heads])} |",
                "|---" * (len(heads) + 1) + "|"]
        out += [f"| {' | '.join([said(r['how']), *(letter.columns[h](r) for h in heads)])} |"
                for r in own]
        out += [f"\n{r['how']} is refused: {r['refused']}" for r in own if r.get("refused")]
        out.append("")
    if letter.claims:
        out += ["## What sources say, and what is seen here", "",
                "| said | holds here | figures |", "|---|---|---|"]
        for c in letter.claims:
            holds, figures = c.found(rows)
            out.append(f"| {c.says} | {'yes' if holds else '**no**'} | {figures} |")
        out.append("")
    if letter.after:
        out += [letter.after.strip(), ""]
    if letter.left:
        out += ["Without a row: " + "; ".join(f"`{n}`, {why}" for n, why in
                                             sorted(letter.left.items())) + ".", ""]
    return "\n".join(out)


def said(how: str) -> str:
    return how if how.startswith("*") else f"`{how}`"


def percent(key: str) -> Callable[[Row], str]:
    """A column of shares, in per cent."""
    return lambda row: f"{100 * row[key]:.1f}" if row.get(key) is not None else ""


def number(key: str, form: str = "{:,}") -> Callable[[Row], str]:
    return lambda row: form.format(row[key]) if row.get(key) is not None else ""
