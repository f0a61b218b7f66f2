"""What files look like: short, free of unfinished marks and of anybody's own paths."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("src", "tests", "docs", "examples", "benchmarks", "scripts")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg"}


def files(*folders: str, suffixes=frozenset({".py"})) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*")
                  if p.suffix in suffixes and p.is_file() and "__pycache__" not in p.parts)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_source_file_is_long():
    long = {name(p): n for p in files("src")
            if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_nothing_is_left_for_later():
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    here = Path(__file__)
    left = [f"{name(p)}: {line.strip()}" for p in files(*KEPT) if p != here
            for line in p.read_text().splitlines() if mark.search(line)]
    assert not left


def test_no_path_of_one_machine():
    """Absolute paths below somebody's home or scratch folder work on that machine only."""
    path = re.compile(r"(?<![\w./:-])/(?:home|root|Users|work|tmp|mnt|opt)/\w")
    top = [p for p in ROOT.iterdir() if p.suffix in TEXT or p.name in ("Makefile",)]
    found = [f"{name(p)}: {line.strip()[:90]}"
             for p in [*files(*KEPT, suffixes=TEXT), *top] if p != Path(__file__)
             for line in p.read_text(errors="replace").splitlines() if path.search(line)]
    assert not found


def read_with_the_file(tree: ast.Module) -> list[ast.AST]:
    """What runs when a test file is read: its statements and its tests' decorators."""
    return [n for top in tree.body
            for part in (top.decorator_list if hasattr(top, "decorator_list") else [top])
            for n in ast.walk(part)]


def test_tests_of_every_method_are_made_over_the_catalogue_alone():
    """`burnish.methods()` has what another test file has registered, where that is read first."""
    wide = [f"{name(p)}:{n.lineno}" for p in files("tests")
            for n in read_with_the_file(ast.parse(p.read_text()))
            if isinstance(n, ast.Call) and ast.unparse(n) == "burnish.methods()"]
    assert not wide, "take registry.names(extra=False)"


def test_no_test_is_skipped():
    """A check that cannot run everywhere is no check; there is a GPU-free form of each."""
    word = re.compile(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)\b|unittest\.skip")
    found = [f"{name(p)}: {line.strip()}" for p in files("tests", "src")
             for line in p.read_text().splitlines() if word.search(line)]
    assert not found


def test_nothing_is_pickled():
    """torch.load without weights_only, pickle and joblib run code from the file they read.

    The public suite is left out: it checks that tuned models survive a pickle in memory.
    """
    word = re.compile(r"^\s*(import pickle|from pickle|import joblib)"
                      r"|torch\.load\((?!.*weights_only=True)")
    found = [f"{name(p)}: {line.strip()}" for p in files("src")
             if "testing" not in p.parts
             for line in p.read_text().splitlines() if word.search(line)]
    assert not found


def test_what_scripts_import_is_there():
    """Imports inside a function of a benchmark run only where somebody runs it."""
    wanted = {(node.module, alias.name)
              for p in files("benchmarks", "examples", "scripts", "docs")
              for node in ast.walk(ast.parse(p.read_text()))
              if isinstance(node, ast.ImportFrom) and node.module and not node.level
              and node.module.split(".")[0] == "burnish" for alias in node.names}
    assert len(wanted) > 10

    def found(module: str, attribute: str) -> bool:
        try:
            if hasattr(importlib.import_module(module), attribute):
                return True
            importlib.import_module(f"{module}.{attribute}")
        except ModuleNotFoundError:
            return False
        return True
    assert not {what for what in wanted if not found(*what)}


@pytest.mark.parametrize("file", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
                                  "Makefile", ".ci/run", "constraints.txt"])
def test_what_a_newcomer_looks_for_is_there(file):
    assert (ROOT / file).stat().st_size > 100
