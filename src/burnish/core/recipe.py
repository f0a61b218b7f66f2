"""The recipe expression: ``nf4 + snella(rank=8) + checkpoint``.

    recipe   = part ("+" part)*
    part     = name | name "(" setting "=" value ("," ...)* ")"

Values are Python literals. A preset expands in place. What cannot live together is refused
here, with the names of both parts, the law and the nearest recipe that works.
"""

from __future__ import annotations

import ast
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields
from functools import cache
from typing import Any

from . import registry, words
from .errors import RecipeError, nearest
from .method import Method
from .reading import reading, shown
from .vocabulary import DECAYS, SIGNED


class Recipe(tuple[Method, ...]):
    """The parts in written order; ``str()`` gives back an expression that parses to the same."""

    __slots__ = ()

    def __str__(self) -> str:
        return " + ".join(str(m) for m in self)

    def named(self, name: str) -> Method | None:
        return next((m for m in self if m.name == name), None)


def parse(recipe: str | Method | Iterable[str | Method]) -> Recipe:
    """An expression, a method object or a list of either, as a checked :class:`Recipe`.

    Raises RecipeError for syntax, unknown methods or settings, wrong values, and for parts that
    cannot be joined.
    """
    parts: list[Method] = []
    if not isinstance(recipe, Iterable | Method):
        raise RecipeError(f"a recipe is text or methods, not {type(recipe).__name__}")
    for piece in [recipe] if isinstance(recipe, str | Method) else recipe:
        if isinstance(piece, Method):
            if not piece.name:
                registry.register(type(piece))
            _possible(piece.name, piece)
            parts.append(piece)
        elif isinstance(piece, str):
            parts += _expression(piece)
        else:
            raise RecipeError(f"a recipe is text or methods, not {type(piece).__name__}")
    if not parts:
        raise RecipeError("the recipe is empty; try 'lora(rank=8)'")
    check(parts)
    return Recipe(parts)


#: longest recipe, and most parts of one
LENGTH, PARTS = 100_000, 200


def _expression(text: str, depth: int = 0) -> list[Method]:
    if len(text) > LENGTH:
        raise RecipeError(f"a recipe of {len(text)} characters is too long (at most {LENGTH})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # an odd escape in a pattern
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        at = f" at character {e.offset}" if isinstance(e, SyntaxError) and e.offset else ""
        raise RecipeError(f"cannot read recipe {_shown(text)}{at}; "
                          "expected 'method(setting=value) + method'") from None
    out: list[Method] = []
    for node in _terms(tree, text):
        name, args = _call(node, text)
        if name not in registry.names() and name in registry.presets() and depth < 8:
            if args:
                raise RecipeError(f"preset {name!r} takes no settings; it stands for "
                                  f"{registry.presets()[name]!r}: write that and change it")
            out += _expression(registry.presets()[name], depth + 1)
        else:
            out.append(make(name, args))
    return out


def _terms(node: ast.expr, text: str) -> list[ast.expr]:
    """The parts in written order, without a call per part."""
    waiting: list[ast.expr] = [node]
    out: list[ast.expr] = []
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.BinOp):
            out.append(node)
        elif isinstance(node.op, ast.Add):
            waiting += [node.right, node.left]
        else:
            raise RecipeError(f"parts of a recipe are joined by '+': {_shown(text)}")
        if len(out) > PARTS:
            raise RecipeError(f"the recipe {_shown(text)} has more than {PARTS} parts")
    return out


def _call(node: ast.expr, text: str) -> tuple[str, dict[str, object]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if node.args or any(k.arg is None for k in node.keywords):
            raise RecipeError(f"settings of {name!r} are written by name, e.g. {name}(rank=8)")
        args: dict[str, object] = {}
        for k in node.keywords:
            if str(k.arg) in args:
                raise RecipeError(f"{name} is given {k.arg} twice in {_shown(text)}")
            try:
                args[str(k.arg)] = ast.literal_eval(k.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                raise RecipeError(f"{name}({k.arg}=...): expected a number, text, True, False or "
                                  f"None, got {_unparsed(k.value)}") from None
        return name, args
    raise RecipeError(f"cannot read {_unparsed(node)} in recipe {_shown(text)}; expected "
                      "'method' or 'method(setting=value)'")


def _shown(value: object) -> str:
    return shown(value, 120)


def _unparsed(node: ast.expr) -> str:
    try:
        return _shown(ast.unparse(node))
    except RecursionError:
        return "something nested very deeply"


def make(name: str, args: dict[str, object]) -> Method:
    """One method from its name and settings; errors name the nearest setting and the type."""
    return built(registry.find(name), name, args)


def read_call(text: str) -> tuple[str, dict[str, object]]:
    """``name`` or ``name(setting=value)``, of whatever is called so: its name and settings."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecipeError(f"cannot read {_shown(text)}; expected 'name(setting=value)'") from None
    return _call(tree, text)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Read once: each hint is text that python compiles."""
    return typing.get_type_hints(cls)


def built(cls: Any, name: str, args: dict[str, object]) -> Any:
    """A dataclass of settings from those given; errors name the nearest setting and the type."""
    known = {f.name: f for f in fields(cls)}
    alias = {a: f.name for f in fields(cls) for a in f.metadata.get("alias", ())}
    hints = _hints(cls)
    given: dict[str, Any] = {}
    for key, value in args.items():
        key = alias.get(key, key)
        if key not in known:
            raise RecipeError(f"{name} has no setting {key!r}{nearest(key, known)}"
                              f" (it has {', '.join(known)})")
        if key in given:
            raise RecipeError(f"{name} is given {key} twice, under two of its names")
        given[key] = _typed(name, key, value, hints[key])
    with reading(f"{name}({', '.join(given)})", RecipeError):
        made = cls(**given)
    _possible(name, made)
    return made


def least(f: Field[Any]) -> float | None:
    """The least that a setting can be; None: any number."""
    said = f.metadata.get("least")
    known = (f.default, *f.metadata.get("other", ()))
    if said is None and (f.name in SIGNED or f.metadata.get("signed") or
                         any(type(v) in (int, float) and v < 0 for v in known)):
        return None
    return float(said or 0)


def _possible(name: str, made: Any) -> None:
    """Refuse what no setting of that kind can mean, where the method has not done so itself: less
    than there can be of it (of a setting whose default or `other` value is negative there can), and
    a decay of moments that is no share."""
    for f in fields(made):
        value, low, above = getattr(made, f.name), least(f), f.metadata.get("above")
        decays = f.name in DECAYS
        for v in value if decays and isinstance(value, tuple) else (value,):
            if type(v) not in (int, float):
                continue
            words = "from 0 to below 1" if decays and not 0 <= v < 1 else \
                f"more than {above:g}" if above is not None and v <= above else \
                f"{low:g} or more" if low is not None and v < low else ""
            if words:
                raise RecipeError(f"{name}({f.name}={value}): expected {words}")


def _typed(name: str, key: str, value: object, hint: object) -> object:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if not any(type(c) is type(value) and c == value for c in choices):
            near = nearest(_shown(value), map(str, choices))
            raise RecipeError(f"{name}({key}={_shown(value)}): expected one of "
                              f"{', '.join(map(repr, choices))}{near}")
        return value
    options = _options(hint)
    types_ = [typing.get_origin(o) or o for o in options]
    for v in _leaves(value):
        if isinstance(v, int | float) and not abs(v) < 2**63:          # NaN among them
            raise RecipeError(f"{name}({key}={_shown(value)}): expected a finite number of "
                              "moderate size")
        if isinstance(v, str) and not _writable(v):
            raise RecipeError(f"{name}({key}={_shown(value)}): text with characters no file can "
                              "hold")
    if float in types_ and isinstance(value, int) and not isinstance(value, bool):
        return value if int in types_ else float(value)
    if not any(_is(value, o) for o in options):
        kinds = " or ".join("nothing" if o is type(None) else str(o) if typing.get_args(o)
                            else getattr(o, "__name__", str(o)) for o in options)
        got = type(value).__name__
        if isinstance(value, tuple | list):
            got += f"[{', '.join(type(v).__name__ for v in value[:9])}]"
        raise RecipeError(f"{name}({key}={_shown(value)}): expected {kinds}, got {got}")
    return value


def _options(hint: object) -> tuple[Any, ...]:
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if several else (hint,)


def _leaves(value: object) -> Iterator[object]:
    """A value, or what stands in it, however deep."""
    if isinstance(value, tuple | list):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def _is(value: object, hint: Any) -> bool:
    """Is it of this type, and all that stands in it? A whole number is a number too."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(value, bool) and kind is not bool:
        return kind is Any
    if inner and isinstance(value, tuple | list):
        many = kind is list or inner[-1] is Ellipsis
        each = [inner[0]] * len(value) if many else inner
        return isinstance(value, kind) and len(each) == len(value) and all(
            any(_is(v, o) or o is float and _is(v, int) for o in _options(h))
            for v, h in zip(value, each, strict=True))
    return kind is Any or isinstance(kind, type) and isinstance(value, kind)


def _writable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def check(parts: Sequence[Method]) -> None:
    """Refuse what cannot be joined: two parts that claim one resource for themselves alone, and
    beside parts of a model what acts on models, where nothing would call it."""
    apart = [p for p in parts if p.apart()]
    if apart and len(apart) < len(parts):
        works = Recipe(p for p in parts if not p.apart())
        raise RecipeError(f"{_apart(apart[0])}; nearest recipe that works: {works}")
    owner: dict[str, Method] = {}
    for part in parts:
        own = ("the stages of the run",) if part.divides() else ()
        for resource in (*part.claims(), *own):
            if resource in owner:
                first, rest = owner[resource], [p for p in parts if p is not part]
                raise RecipeError(
                    f"{first.name} and {part.name} cannot be joined: both take {resource}, "
                    f"which only one part may; nearest recipe that works: {Recipe(rest)}"
                )
            owner[resource] = part
    for part in parts:
        for resource, reason in part.forbids().items():
            if resource in owner and owner[resource] is not part:
                rest = [p for p in parts if p is not part]
                raise RecipeError(f"{part.name} and {owner[resource].name} cannot be joined: "
                                  f"{reason}; nearest recipe that works: {Recipe(rest)}")
    words.check(parts)


def joins(recipe: Recipe) -> None:
    """Refuse a recipe for a model that holds nothing of one."""
    if all(p.apart() for p in recipe):
        raise RecipeError(f"{_apart(recipe[0])}; a recipe is for example 'lora(rank=8)'")


def _apart(part: Method) -> str:
    return (f"{part.name} is no part of a model: it acts on models, before or after they are "
            f"trained, and would do nothing in a recipe; `burnish methods {part.name}` tells how "
            "it is used")


def key_of(recipe: Recipe, part: Method) -> str:
    """The part's name, numbered where the recipe has several of that name."""
    same = [m for m in recipe if m.name == part.name]
    n = next(i for i, m in enumerate(same) if m is part)
    return f"{part.name}_{n + 1}" if n else part.name
