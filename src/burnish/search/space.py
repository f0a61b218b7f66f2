"""Recipes with choices: ``lora(rank=4|8|16, targets='q,v'|'linear') + checkpoint(every=0|1)``.

A setting's values stand with bars between them. 0 among them means "without this part", so that a
width of nothing is nothing at all (0.0 is a value: ``dropout=0.0|0.1``). A part without choices is
in every recipe.

With ``layers=n`` each of the model's n blocks is a choice besides, on or off for all parts that
change weights or states: their targets are those of the blocks that are on (AutoPEFT's bits).
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import BurnishError, RecipeError
from ..core.recipe import parse
from ..core.registry import find, names, presets

#: what separates the settings of a part in a name: "1.lora.rank"
Values = Mapping[str, Any]
#: targets of a part that names none
DEFAULT = "linear"


@dataclass(frozen=True)
class Part:
    """name: of the method.  fixed: settings that are the same everywhere.  choices: setting ->
    its values."""

    name: str
    fixed: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]]

    @property
    def of_layers(self) -> bool:
        """Does it stand in blocks, so that it may be left out of some?"""
        return bool({"delta", "branch", "select"} & set(find(self.name).axes()))

    def text(self, values: Mapping[str, Any], on: Sequence[int] | None = None) -> str:
        """on: the blocks it stands in; None: as its targets say."""
        given = {**self.fixed, **values}
        if on is not None and self.of_layers:
            own = find(self.name).__dataclass_fields__["targets"].default
            words = given.get("targets") or own or DEFAULT
            given["targets"] = ",".join(f"{w.strip()}@{i}" for w in words.split(",") for i in on)
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given \
            else self.name


@dataclass(frozen=True)
class Space:
    """parts: of every recipe.  layers: blocks that are a choice each; 0: none is."""

    parts: tuple[Part, ...]
    layers: int = 0

    @classmethod
    def of(cls, text: str, layers: int = 0) -> Space:
        """Raises RecipeError for what cannot be read, for values that no method takes, and for
        parts that no layer can be left out of where `layers` are chosen."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise RecipeError(f"cannot read {text!r}; a space is a recipe with choices: "
                              "'lora(rank=4|8|16) + lean'") from None
        made = cls(tuple(_part(node, text) for node in _joined(tree, text)), layers)
        if layers:
            made._by_layers()
        if not made.choices:
            raise RecipeError(f"{text!r} leaves nothing to choose; write values with bars: "
                              "lora(rank=4|8|16)")
        for i, part in enumerate(made.parts):
            first = {k: next((v for v in values if _there(v)), None)
                     for k, values in part.choices.items()}
            for key, values in part.choices.items():
                for v in values:
                    if _there(v):
                        parse(part.text({**first, key: v}))
                if all(not _there(v) for v in values):
                    raise RecipeError(f"{part.name}({key}=0): part {i + 1} is in no recipe; leave "
                                      "it out")
        return made

    def _by_layers(self) -> None:
        """Raises RecipeError where layers cannot be chosen."""
        if self.layers < 2:
            raise RecipeError(f"layers={self.layers}: expected the blocks of the model, 2 or more")
        if not any(p.of_layers for p in self.parts):
            raise RecipeError("no part stands in a layer: lora(rank=4|8) does")
        for p in self.parts:
            if not p.of_layers and {"prompt", "side"} & set(find(p.name).axes()):
                raise RecipeError(f"{p.name} stands in the model as a whole, and no layer can be "
                                  "left out of it; search it without layers")
            if p.of_layers and "delta" not in find(p.name).axes() \
                    and not {"targets"} & {*p.fixed, *p.choices}:
                raise RecipeError(f"{p.name} has places of its own where no targets are named, and "
                                  f"layers are chosen of those that are: {p.name}(targets="
                                  "'linear')")
            for said in (p.fixed.get("targets"), *p.choices.get("targets", ())):
                if said is not None and (not isinstance(said, str) or p.of_layers
                                         and re.search(r"[@*:]|(^|,)\s*-", said)):
                    raise RecipeError(f"{p.name}(targets={said!r}): where layers are chosen, "
                                      "targets are plain words (q,v  linear) of every layer")

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Name of a choice (``"1.lora.rank"``, ``"layer.0"``) -> its values."""
        return {**{f"{i + 1}.{p.name}.{k}": v for i, p in enumerate(self.parts)
                   for k, v in p.choices.items()},
                **{f"layer.{i}": (True, False) for i in range(self.layers)}}

    @property
    def size(self) -> int:
        """How many ways there are to choose, those that come to the same recipe counted apart."""
        return math.prod(len(v) for v in self.choices.values())

    def recipe(self, values: Values) -> str | None:
        """The recipe of some values; None where no part is left, or no layer for those that stand
        in layers."""
        on = [i for i in range(self.layers) if values[f"layer.{i}"]]
        where = None if len(on) == self.layers else on
        out = []
        for i, part in enumerate(self.parts):
            own = {k: values[f"{i + 1}.{part.name}.{k}"] for k in part.choices}
            if all(map(_there, own.values())) and (where != [] or not part.of_layers):
                out.append(part.text(own, where))
        return " + ".join(out) or None

    def all(self) -> Iterator[dict[str, Any]]:
        """Every way to choose."""
        keys = list(self.choices)
        for some in itertools.product(*self.choices.values()):
            yield dict(zip(keys, some, strict=True))

    def buildable(self, values: Values) -> str | None:
        """Why these values make no recipe, or None."""
        text = self.recipe(values)
        if text is None:
            return "no part is left"
        try:
            parse(text)
        except BurnishError as e:
            return str(e)
        return None


def _there(value: Any) -> bool:
    """Is a value one of a part that stands? 0 takes it out; False and 0.0 are values."""
    return isinstance(value, bool) or not isinstance(value, int) or value != 0


def _joined(node: ast.expr, text: str) -> list[ast.expr]:
    out: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        out.append(node.right)
        node = node.left
    out.append(node)
    return out[::-1]


def _part(node: ast.expr, text: str) -> Part:
    if isinstance(node, ast.Name):
        return _known(Part(node.id, {}, {}))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args
            and all(k.arg for k in node.keywords)):
        raise RecipeError(f"cannot read {ast.unparse(node)!r} in {text!r}; expected "
                          "'method(setting=value|value)'")
    fixed: dict[str, Any] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    for k in node.keywords:
        key = str(k.arg)
        if key in fixed or key in choices:
            raise RecipeError(f"{node.func.id} is given {key} twice in {text!r}")
        values = tuple(_value(v, node.func.id, key) for v in _bars(k.value))
        if len(values) == 1:
            fixed[key] = values[0]
        elif len({repr(v) for v in values}) < len(values):
            raise RecipeError(f"{node.func.id}({key}=...): a value stands there twice")
        else:
            choices[key] = values
    return _known(Part(node.func.id, fixed, choices))


def _known(part: Part) -> Part:
    if part.name in presets() and part.name not in names():
        raise RecipeError(f"{part.name} is a preset and takes no settings; write "
                          f"{presets()[part.name]!r} with the choices")
    if not part.choices:
        parse(part.text({}))
    return part


def _bars(node: ast.expr) -> list[ast.expr]:
    out: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        out.append(node.right)
        node = node.left
    out.append(node)
    return out[::-1]


def _value(node: ast.expr, name: str, key: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise RecipeError(f"{name}({key}=...): expected numbers, texts, True, False or None with "
                          f"bars between them, got {ast.unparse(node)!r}") from None
