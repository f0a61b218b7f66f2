"""A page a letter: what stands there is what the rows make, and no method is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks.letters import letter as letters
finally:
    sys.path.remove(str(ROOT))

NAMES = letters.names()


def test_there_are_letters_and_no_page_without_one():
    assert "merging" in NAMES
    assert sorted(p.stem for p in letters.PAGES.glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_what_its_rows_make(name):
    facts, rows = letters.read(name)
    assert facts["letter"] == name and rows
    assert facts["processor_s"] <= letters.MOST
    made = letters.page(letters.letter(name), facts, rows)
    assert (letters.PAGES / f"{name}.md").read_text("utf-8") == made


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_a_letter_has_a_row_or_a_reason(name):
    one = letters.letter(name)
    mine, shown = letters.methods(one), letters.shown(letters.read(name)[1])
    assert bool(mine) is (one.belongs is not None)
    assert mine - shown == set(one.left), "without a row and a reason, or with both"


def test_a_method_without_a_row_is_noticed():
    """The same question of a letter whose rows have lost one."""
    one, rows = letters.letter("merging"), letters.read("merging")[1]
    fewer = [r for r in rows if "pcb" not in r["how"]]
    assert letters.methods(one) - letters.shown(fewer) == {"pcb"}


def test_a_claim_follows_the_rows():
    """A finding is computed: other rows say otherwise."""
    one, (facts, rows) = letters.letter("merging"), letters.read("merging")
    claim = next(c for c in one.claims if "cross terms" in c.says)
    assert claim.found(rows)[0]
    worse = [{**r, "mean": 1.0} if r["how"].startswith("linear") else r for r in rows]
    assert not claim.found(worse)[0]
    assert letters.page(one, facts, rows) != letters.page(one, facts, worse)
