"""Every Python block of README, CONTRIBUTING and the guide runs, page by page, as written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[int, str]]:
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem == "fit")) for p in PAGES])
def test_a_page_runs(page, tmp_path, monkeypatch, stand_ins):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": f"page_{page.stem}", **stand_ins(tmp_path)}
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), space)


def test_relative_links_lead_somewhere():
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
    broken = [f"{p.relative_to(ROOT)}: {target}" for p in [*PAGES, *(ROOT / "docs").rglob("*.md")]
              if p.name not in ("catalogue.md", "board.md", "task-table.md")
              and p.parent.name != "methods"
              for target in link.findall(p.read_text()) if not (p.parent / target).exists()
              and (p.parent / target).resolve() != ROOT / "docs" / "board.md"]    # make docs
    assert not broken


# -- pages made from the classes -------------------------------------------------------------------
@pytest.fixture(scope="module")
def made():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import catalogue

        return catalogue
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_every_method_has_a_page_that_says_all_that_help_says(made):
    from burnish.core import registry

    pages = made.pages()
    for entry in registry.catalogue():
        if not entry.cls.__module__.startswith("burnish."):
            continue                                         # another test's own
        page, told = pages[f"methods/{entry.name}.md"], made.facts(entry)
        assert page.startswith(f"# `{entry.name}`\n") and f"({entry.name}.md)" not in page
        assert f"[`{entry.name}`](methods/{entry.name}.md)" in pages["catalogue.md"]
        assert all(f"| `{s['name']}` |" in page for s in told["settings"])
        assert page.count("```") % 2 == 0
        for word in re.findall(r"[A-Za-z]{4,}", told["doc"]):
            assert word in page or word in ("func", "meth", "class", "attr"), (entry.name, word)


def test_every_task_has_a_row_that_is_true(made):
    """Its figure is the class's own; the example and the tests are there, and are of it."""
    from burnish.fit.kinds import KINDS
    from burnish.fit.tasks import TASKS

    page = made.pages()["task-table.md"]
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(KINDS) == set(TASKS)
    for name, kind in KINDS.items():
        assert made.prose(kind.rows) in rows[name]
        assert f"| {made.prose(TASKS[name].metric)}, the " in rows[name]
        for test in kind.tests:
            text = (ROOT / test).read_text()
            assert name in text or TASKS[name].__name__ in text or "TASKS" in text, (name, test)
        text = (ROOT / "examples" / kind.example).read_text()
        assert "burnish" in text and f"`examples/{kind.example}`" in rows[name]
    guide = (ROOT / "docs/guide/tasks.md").read_text()
    assert "\n".join(["", *made.layouts(), ""]) in guide      # the same, as it is made
    assert set(re.findall(r"examples/\w+\.py", guide)) >= {f"examples/{k.example}"
                                                          for k in KINDS.values()}


def test_words_are_taken_as_they_are_written(made):
    assert made.prose("``|x|`` of *a_b* <c> [d](e)") == \
        "`\\|x\\|` of \\*a\\_b\\* \\<c\\> \\[d\\](e)"
    assert made.prose("see :func:`~burnish.core.recipe.parse`") == "see `burnish.core.recipe.parse`"
    assert made.told("A: b.\n\nof::\n\n    y = x\n\n      z\n\nand so on") == [
        "**A: b.**", "", "of:", "", "```text", "y = x", "", "  z", "```", "", "and so on"]


def test_what_the_guide_says_of_the_planner_is_what_was_measured():
    page = (ROOT / "docs/guide/plan.md").read_text()
    file = sorted((ROOT / "benchmarks/results").glob("frontier-*.jsonl"))[-1]
    rows = [r for r in map(json.loads, file.read_text().splitlines()) if "chosen" in r]
    assert len(rows) == 5
    for r in rows:
        assert r["peak"] == r["promised"] <= r["budget"]
        assert re.search(rf"\| {r['budget'] / 1e6:.2f} MB \| `{re.escape(r['chosen'])}`[^|]*"
                         rf"\| {r['peak'] / 1e6:.2f} MB \| {100 * r['accuracy']:.1f} % "
                         rf"\| `{re.escape(r['best'])}` \| {100 * r['best_accuracy']:.1f} % \|",
                         page), r
