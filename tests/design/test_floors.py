"""Who may import whom when a module is loaded, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "burnish"

#: floor -> floors it may import at module level, besides itself
BELOW = {
    "core": set(),
    "blocks": {"core"},
    "engine": {"core", "blocks"},
    "methods": {"core", "blocks"},
    "memory": {"core", "blocks", "engine"},
    "formats": {"core", "blocks", "engine", "memory", "methods"},
    "fit": {"core", "blocks", "engine", "memory", "formats", "methods"},
    "testing": {"core", "blocks", "engine", "methods", "memory", "formats", "fit"},
    "federated": {"core", "blocks", "engine", "methods", "memory", "formats", "fit"},
    "reproductions": {"core", "memory"},
    "continual": {"core", "blocks", "engine", "methods", "memory", "formats", "fit"},
    "board": {"core", "blocks", "engine", "methods", "memory", "formats", "fit", "continual"},
    "search": {"core", "blocks", "engine", "methods", "memory", "formats", "fit"},
    "ui": {"core", "blocks", "engine", "methods", "memory", "formats", "fit"},
    "cli": {"core", "blocks", "engine", "methods", "memory", "formats", "fit", "federated",
            "reproductions", "continual", "search", "board", "ui"},
}


def loaded(tree: ast.Module):
    """Import statements that run when the module is loaded, type-checking blocks left out."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef | ast.ExceptHandler):
            todo += [n for n in ast.iter_child_nodes(node)
                     if isinstance(n, ast.stmt | ast.ExceptHandler)]


def floors_of(path: Path) -> set[str]:
    """The floors of burnish a file imports at module level."""
    package = ("burnish", *path.relative_to(SRC).parts[:-1])
    found = set()
    for node in loaded(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("burnish.")}
    return found & set(BELOW)


@pytest.mark.parametrize("floor", BELOW)
def test_a_floor_imports_only_what_is_below(floor):
    wrong = {str(path.relative_to(SRC)): sorted(up)
             for path in sorted((SRC / floor).rglob("*.py"))
             if (up := floors_of(path) - BELOW[floor] - {floor})}
    assert not wrong


def test_every_package_is_a_floor():
    packages = {p.parent.name for p in SRC.glob("*/__init__.py")}
    assert packages == set(BELOW)


HEAVY = ("transformers", "matplotlib", "datasets", "accelerate", "typer", "rich", "peft",
         "torchmetrics", "sklearn", "scipy", "pandas", "pyarrow", "huggingface_hub", "yaml")


@pytest.mark.parametrize("statement", [
    "import burnish",
    "import burnish; burnish.tune, burnish.simulate, burnish.plan, burnish.methods",
    "import burnish; burnish.methods()",
])
def test_the_library_loads_nothing_heavy(statement):
    code = f"{statement}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
