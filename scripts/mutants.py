"""Small mutations of a method's source, and which of them its tests let live.

    python scripts/mutants.py lora dora            (make mutants NAME="lora dora")

One change at a time (a constant, a sign, an operator, a comparison, a dropped term, a dropped
keyword, a condition turned, a function that returns nothing) is applied to a copy of the package;
the method's own test file and its conformance cells must fail. Survivors are printed and the exit
code is 1 when there are any. Mutants that change nothing stand in mutants.toml with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
_SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
         ast.MatMult: None}
_FLIP = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
#: calls and statements whose words are for people
_TALK = {"RecipeError", "TargetError", "ConfigError", "CheckError"}


class Mutant:
    """One change: where it is, what it reads like, and the source with it."""

    def __init__(self, line: int, before: str, after: str, source: str):
        self.line, self.before, self.after, self.source = line, before, after, source

    @property
    def name(self) -> str:
        return f"{self.before}  ->  {self.after}"


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source, in the order of its lines."""
    tree = ast.parse(source)
    sites = [(parent, field, index, node) for parent, field, index, node in _walk(tree)]
    seen = set()
    for k, (_, _, _, node) in enumerate(sites):
        for new in _changes(node):
            twin = copy.deepcopy(tree)
            parent, field, index, old = list(_walk(twin))[k]
            if index is None:
                setattr(parent, field, new)
            else:
                getattr(parent, field)[index] = new
            text = ast.unparse(ast.fix_missing_locations(twin))
            if text in seen:
                continue
            seen.add(text)
            yield Mutant(getattr(node, "lineno", 0), _short(old), _short(new), text)


def _short(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def _walk(node: ast.AST, quiet: bool = False) -> Iterator[tuple]:
    """(parent, field, index, child) of everything that runs: docstrings, annotations, help texts
    and the words of errors are left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _talks(child):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue                                    # a docstring
            if isinstance(child, ast.Import | ast.ImportFrom) or _is_fact(child):
                continue
            if isinstance(node, ast.Call) and _called(node) == "setting" and \
                    (field == "keywords" or index):
                continue                                    # help and aliases; the default stays
            yield node, field, index, child
            yield from _walk(child)


def _called(node: ast.AST) -> str:
    func = getattr(node, "func", None)
    return getattr(func, "id", getattr(func, "attr", ""))


def _talks(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) \
        and _called(node.exc) in _TALK


def _is_fact(node: ast.AST) -> bool:
    """`paper` and what only type checkers read."""
    target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
    if isinstance(node, ast.If) and _short(node.test) == "TYPE_CHECKING":
        return True
    return getattr(target, "id", "") == "paper"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant):
        v = node.value
        if isinstance(v, bool):
            yield ast.Constant(not v)
        elif isinstance(v, int):
            yield ast.Constant(v + 1)
            if v > 1:
                yield ast.Constant(v - 1)
        elif isinstance(v, float):
            yield ast.Constant(v * 2 if v else 0.5)
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Add | ast.Sub):
            yield node.left                                 # a term dropped
        if (other := _SWAP.get(type(node.op))) is not None:
            yield ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _FLIP:
        yield ast.Compare(node.left, [_FLIP[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) \
            and node.attr in ("mul_", "add_"):
        yield ast.Attribute(node.value, {"mul_": "div_", "add_": "sub_"}[node.attr], node.ctx)
    elif isinstance(node, ast.Call):
        for k in range(len(node.keywords)):
            if node.keywords[k].arg and _called(node) not in ("setting", "dataclass"):
                yield ast.Call(node.func, node.args,
                               [w for i, w in enumerate(node.keywords) if i != k])
    elif isinstance(node, ast.Return) and node.value is not None \
            and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr) and not _is_fact(node):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield):
            return
        if isinstance(node, ast.Expr) or any(isinstance(t, ast.Attribute | ast.Subscript) for t in
                                             getattr(node, "targets", [node.target] if
                                                     isinstance(node, ast.AugAssign) else [])):
            yield ast.Pass()                                # a statement dropped


# -- running --------------------------------------------------------------------------------------
def file_of(name: str) -> Path:
    found = [p for p in (ROOT / "src/burnish/methods").rglob(f"{name}.py")]
    if len(found) != 1:
        sys.exit(f"no method file {name}.py below src/burnish/methods")
    return found[0]


def equivalent() -> dict[str, dict[str, str]]:
    """method -> mutant -> why it is no other program."""
    return tomllib.loads((ROOT / "scripts/mutants.toml").read_text("utf-8"))


def tests_of(name: str) -> list[str]:
    """The method's own test files (any that name it in their own name or say so in the list)."""
    own = ROOT / "tests/methods" / f"test_{name}.py"
    told = equivalent().get(name, {}).get("tests", "").split()
    return [str(p) for p in ([own] if own.exists() else [])] + [str(ROOT / t) for t in told]


def killed(package: Path, name: str, seconds: int) -> bool:
    """The tests fail (or hang) with the package as it stands."""
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1"}
    runs = []
    if own := tests_of(name):
        runs.append(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *own])
    runs.append(["-c", "import sys\nfrom burnish.testing import conformance as c\n"
                       f"r = c.run({name!r}, c.choose.models_for({name!r})[-1:])\n"
                       "print(r)\nsys.exit(bool(r.failures))"])
    for command in runs:
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, timeout=seconds,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return True
        if done.returncode:
            return True
    return False


def survivors(name: str, seconds: int, lines: range | None = None) -> list[Mutant]:
    """Mutants of one method that live, known equivalents left out; prints each as it goes."""
    file = file_of(name)
    known = equivalent().get(name, {})
    left, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(ROOT / "src", package, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
        if killed(package, name, seconds):
            sys.exit(f"{name}: the tests fail without any mutation")
        place = package / file.relative_to(ROOT / "src")
        for mutant in mutants(file.read_text("utf-8")):
            if mutant.name in known or lines is not None and mutant.line not in lines:
                continue
            count += 1
            place.write_text(mutant.source, "utf-8")
            if not killed(package, name, seconds):
                left.append(mutant)
                print(f"{name}:{mutant.line}: lives: {mutant.name}", flush=True)
    print(f"{name}: {count} mutants, {len(left)} live, {len(known)} known to be no others",
          flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="METHOD")
    parser.add_argument("--seconds", type=int, default=300, help="limit of one test run")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    given = parser.parse_args()
    if given.list:
        for name in given.names:
            for m in mutants(file_of(name).read_text("utf-8")):
                print(f"{name}:{m.line}: {m.name}")
        return 0
    return int(any([survivors(n, given.seconds) for n in given.names]))


if __name__ == "__main__":
    sys.exit(main())
