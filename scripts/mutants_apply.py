"""The mutants of a module's source: one small change of the syntax tree each."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
_FLIP = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
#: calls and statements whose words are for people
_TALK = {"RecipeError", "TargetError", "ConfigError", "CheckError"}
#: methods of tensors exchanged for one another, and those whose call is dropped
_EXCHANGE = {"mul_": "div_", "add_": "sub_", "sub_": "add_", "sum": "mean", "mean": "sum",
             "argmax": "argmin", "amax": "amin", "zeros_like": "ones_like"}
_DROP = {"abs", "sqrt", "square", "exp", "log", "t", "neg", "clamp", "clamp_min", "clamp_"}


@dataclass(frozen=True)
class Mutant:
    """One change: its line, what it reads like (with the function it stands in), and the source."""

    line: int
    name: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source, in the order of the tree; names are unique."""
    tree = ast.parse(source)
    seen, names = set(), Counter()
    for parent, field, index, old, scope in list(_walk(tree)):
        for new in _changes(old):
            shown = parent if isinstance(parent, ast.expr) else old
            before = _short(shown)
            _put(parent, field, index, new)
            after, text = _short(shown if shown is parent else new), ast.unparse(tree)
            _put(parent, field, index, old)
            if text in seen:
                continue
            seen.add(text)
            name = f"{scope}: {before} -> {after}"
            names[name] += 1
            again = f" ({names[name]})" if names[name] > 1 else ""
            yield Mutant(getattr(old, "lineno", 0), name + again, text)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST | None) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _short(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:100]


def _walk(node: ast.AST, scope: str = "") -> Iterator[tuple]:
    """(parent, field, index, child, scope) of everything that runs: docstrings, annotations, help
    texts and the words of errors are left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for index, child in list(enumerate(value)) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _talks(child) or _is_fact(child):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue                                    # a docstring
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue                                    # of zip: against what cannot be
            if isinstance(child, ast.Import | ast.ImportFrom) \
                    or isinstance(node, ast.Module) and _shows(child, node):
                continue
            if isinstance(node, ast.Call) and _called(node) == "setting" and \
                    (field == "keywords" or index):
                continue                                    # help and aliases; the default stays
            yield node, field, index, child, scope
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{scope}.{child.name}" if scope else child.name
            yield from _walk(child, inner)


def _called(node: ast.AST) -> str:
    func = getattr(node, "func", None)
    return getattr(func, "id", getattr(func, "attr", ""))


def _talks(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) \
        and _called(node.exc) in _TALK


def _is_fact(node: ast.AST) -> bool:
    """The source, the sizes that the suite takes, and what only type checkers read."""
    target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
    if isinstance(node, ast.If) and _short(node.test) == "TYPE_CHECKING":
        return True
    return getattr(target, "id", "") in {"paper", "small"}


def _shows(node: ast.AST, module: ast.Module) -> bool:
    """A constant that stands beside a setting, for the suite to show it with."""
    beside = {_short(k.value) for n in ast.walk(module) if _called(n) == "setting"
              for k in n.keywords}
    return isinstance(node, ast.Assign) and any(getattr(t, "id", "") in beside
                                                for t in node.targets)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
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
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) \
            and node.attr in _EXCHANGE:
        yield ast.Attribute(node.value, _EXCHANGE[node.attr], node.ctx)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Return) and node.value is not None \
            and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr):
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Yield) or _moves(node.value)):
            return
        targets = [node.target] if isinstance(node, ast.AugAssign) else getattr(node, "targets", [])
        if isinstance(node, ast.Expr | ast.AugAssign) \
                or any(isinstance(t, ast.Attribute | ast.Subscript) for t in targets):
            yield ast.Pass()                                # a statement dropped


def _moves(node: ast.AST) -> bool:
    """``x.to(y.device)``: tests run on one device."""
    return _called(node) == "to" and isinstance(node, ast.Call) and not node.keywords \
        and [getattr(a, "attr", "") for a in node.args] == ["device"]


def _other_constants(v: object) -> Iterator[ast.Constant]:
    if isinstance(v, bool):
        yield ast.Constant(not v)
    elif isinstance(v, int):
        yield ast.Constant(v + 1)
        if v > 1:
            yield ast.Constant(v - 1)
    elif isinstance(v, float):
        yield ast.Constant(v * 2 if v else 0.5)


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    if isinstance(node.func, ast.Attribute) and node.func.attr in _DROP \
            and getattr(node.func.value, "id", "") not in ("torch", "math", "F"):
        yield node.func.value
    for k in range(len(node.keywords)):             # tests run on one device
        if node.keywords[k].arg not in (None, "strict", "device") \
                and _called(node) not in ("setting", "dataclass"):
            yield ast.Call(node.func, node.args, [w for i, w in enumerate(node.keywords) if i != k])
