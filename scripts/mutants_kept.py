"""What became of every file's mutants, kept in mutants.json, so that a night's work can be done in
many sittings. A record is of the code it was made of: comments and docstrings may change, any other
change makes the file one of those that are left."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any


class Kept:
    """The records, by a file's name as `scripts/mutants.py` is given it."""

    def __init__(self, file: Path):
        self.file = file
        self.records: dict[str, dict[str, Any]] = (
            json.loads(file.read_text("utf-8")) if file.exists() else {})

    def left(self, files: dict[str, Path]) -> list[str]:
        """Names of files without a record of their code, then those whose record has a survivor."""
        stale = [n for n, p in files.items() if self.records.get(n, {}).get("code") != code(p)]
        return stale + [n for n in files if n not in stale and self.records[n]["live"]]

    def survivors(self, name: str, made_of: str, every: list[Any]) -> list[Any]:
        """Of a file's mutants those that its record lets live; all where its code has none."""
        known = self.records.get(name, {})
        return [m for m in every if m.name in known["live"]] if known.get("code") == made_of \
            else every

    def keep(self, name: str, made_of: str, killed: int, equivalent: int, live: list[str],
             more: bool = False) -> None:
        """Write a record of what :func:`code` said when the mutants were made; another process may
        have written others meanwhile. more: these are the survivors of the record that is there."""
        self.records = type(self)(self.file).records
        known = self.records.get(name, {})
        if more and known.get("code") == made_of:
            killed, equivalent = killed + known["killed"], equivalent + known["equivalent"]
        self.records[name] = {"code": made_of, "killed": killed, "equivalent": equivalent,
                              "live": sorted(live)}
        lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(self.records[n])}"
                           for n in sorted(self.records))
        new = self.file.with_suffix(".new")
        new.write_text(f"{{\n{lines}\n}}\n", "utf-8")
        new.replace(self.file)

    def told(self, files: dict[str, Path]) -> str:
        """How far it is."""
        left = set(self.left(files))
        done = [self.records[n] for n in files if n not in left]
        mutants = sum(r["killed"] + r["equivalent"] for r in done)
        live = sum(len(self.records.get(n, {"live": []})["live"]) for n in files)
        return (f"kept: {len(done)} of {len(files)} files without a survivor, {mutants} mutants; "
                f"{live} live in others")


def code(path: Path) -> str:
    """A hash of what a file does: its tree without docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) \
                and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
