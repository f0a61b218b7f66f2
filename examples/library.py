"""Python's own library as data that every machine has: functions with their docstrings."""

from __future__ import annotations

import ast
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "unittest", "urllib", "xml")


@dataclass(frozen=True)
class Function:
    """module: dotted. doc: the docstring in one line."""

    module: str
    name: str
    parameters: tuple[str, ...]
    doc: str


def functions(seed: int = 0) -> list[Function]:
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
            found.append(Function(module, node.name, names, doc))
    random.Random(seed).shuffle(found)
    return found
