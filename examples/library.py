"""Python's own library as data that every machine has: functions with their docstrings."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "unittest", "urllib", "xml")

DOES = {"raises": ast.Raise, "returns": ast.Return, "loops": (ast.For, ast.While),
        "branches": ast.If, "yields": (ast.Yield, ast.YieldFrom)}


@dataclass(frozen=True)
class Function:
    """module: dotted. doc: the docstring in one line. takes: its parameters as they are written.
    does: which of DOES stand in its body. lines: how many it has.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    doc: str
    takes: str
    does: tuple[str, ...]
    lines: int


@functools.cache
def functions(seed: int = 0) -> tuple[Function, ...]:
    """In a drawn order, each docstring once."""
    root, seen, found = Path(sysconfig.get_paths()["stdlib"]), set(), []
    for path in sorted(p for d in PACKAGES for p in (root / d).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            doc = " ".join((ast.get_docstring(node) or "").split())
            if len(doc) < 20 or doc in seen:
                continue
            seen.add(doc)
            names = tuple(a.arg for a in [*node.args.args, *node.args.kwonlyargs]
                          if a.arg not in ("self", "cls"))
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            kinds = [type(n) for n in ast.walk(node)]
            does = tuple(w for w, of in DOES.items() if any(issubclass(k, of) for k in kinds))
            found.append(Function(module, node.name, names, doc, ast.unparse(node.args), does,
                                  (node.end_lineno or node.lineno) - node.lineno + 1))
    random.Random(seed).shuffle(found)
    return tuple(found)
