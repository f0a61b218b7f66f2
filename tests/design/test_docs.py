"""Every Python block of README, CONTRIBUTING and the guide runs, page by page, as written."""

from __future__ import annotations

import re
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
              if p.name not in ("catalogue.md", "accuracy.md") and p.parent.name != "methods"
              for target in link.findall(p.read_text()) if not (p.parent / target).exists()]
    assert not broken
