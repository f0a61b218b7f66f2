"""No file imports in a circle when it runs, and what the pages name is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "burnish"


def name_of(path: Path) -> str:
    parts = ("burnish", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(p): p for p in sorted(SRC.rglob("*.py"))}


def imports(nodes: list[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that runs, at whatever depth; those for the type checker do not."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(node.orelse)
        else:
            yield from imports(list(ast.iter_child_nodes(node)))


def needs(name: str, source: str, package: bool, known: set[str]) -> set[str]:
    """The files among `known` that a file imports by the time it has run."""
    above = name.split(".") if package else name.split(".")[:-1]
    found = set()
    for node in imports(list(ast.parse(source).body)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
            continue
        base = above[: len(above) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        found |= {f"{stem}.{a.name}" if f"{stem}.{a.name}" in known else stem for a in node.names}
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when everything that needs nothing (more) is taken away, again and again."""
    left = {n: set(d) for n, d in graph.items()}
    while free := [n for n, d in left.items() if not d & left.keys()]:
        for n in free:
            del left[n]
    while free := [n for n in left if not any(n in d for d in left.values())]:
        for n in free:                               # needs a circle, but is in none
            del left[n]
    return [[n, *sorted(d & left.keys())] for n, d in sorted(left.items())]


def test_no_file_imports_in_a_circle():
    graph = {n: needs(n, p.read_text(), p.name == "__init__.py", set(FILES))
             for n, p in FILES.items()}
    assert sum(map(len, graph.values())) > 200
    assert circles(graph) == []


@pytest.mark.parametrize("sources, found", [
    ({"p.a": "from .b import x", "p.b": "y = 1"}, False),
    ({"p.a": "from .b import x", "p.b": "def f():\n    from .a import z"}, True),
    ({"p.a": "from . import b", "p.b": "import p.a"}, True),
    ({"p.a": "from .b import x",
      "p.b": "if TYPE_CHECKING:\n    from .a import z"}, False),
])
def test_circles_are_found(sources, found):
    graph = {n: needs(n, s, False, set(sources)) for n, s in sources.items()}
    assert bool(circles(graph)) == found


FLOORS = "core|blocks|engine|methods|memory|formats|fit|federated|cli|testing"
PLACE = re.compile(rf"(?<![\w/.-])(?:src/burnish/)?((?:{FLOORS})/[\w/]+\.py)\b")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
         *sorted(SRC.rglob("*.py"))]


def test_files_that_pages_and_docstrings_name_are_there():
    gone = [f"{p.relative_to(ROOT)}: {named}" for p in PAGES
            for named in PLACE.findall(p.read_text()) if not (SRC / named).exists()]
    assert not gone


def test_types_come_from_files_that_are_there():
    """An import for the type checker alone is never run, so nothing else notices a wrong one."""
    wrong = []
    for name, path in FILES.items():
        above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                stem = ".".join([*above[: len(above) - node.level + 1],
                                 *([node.module] if node.module else [])])
                if stem not in FILES:
                    wrong.append(f"{name}: {stem}")
    assert not wrong
