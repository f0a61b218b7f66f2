"""An adapter that begins where an earlier one has ended (methods/lifecycle/pvp.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..core.errors import FormatError, RecipeError
from ..core.recipe import parse
from ..engine.tuned import DEFAULT, Tuned
from ..methods.lifecycle.pvp import Pvp, head_of
from . import folder
from .written import base_lines


def begin(tuned: Tuned, path: str | Path | None, say: Callable[[str], None]) -> None:
    """:func:`begin_from`, where a folder is named, with a word about it."""
    if path is not None:
        left = ", ".join(begin_from(tuned, path))
        say(f"begins where {path} has ended{f', without {left}' * bool(left)}")


def begin_from(tuned: Tuned, path: str | Path) -> list[str]:
    """Give the adapter that trains the values of one saved in a folder, all but the head's, whose
    names are returned. Nothing is changed where FormatError (no such folder, another base: the
    first difference is named) or RecipeError (another recipe, settings or shapes; another seed,
    where a part draws tensors from it) is raised."""
    config, tensors = folder.read_adapter(path)
    adapters = config.get("adapters") or {DEFAULT: config}
    name = config.get("training") or next(iter(adapters))
    if len(adapters) > 1:
        tensors = {n: t for n, t in tensors.items()
                   if ".burnish." not in f".{n}" or f".burnish.{name}." in f".{n}"}
    _check_base((config["base"].get("fingerprint") or {}).get("tensors", {}), tuned, path)
    try:
        return Pvp().lifecycle(tuned, tensors, parse(adapters[name]["recipe"]), name,
                               adapters[name].get("seed", 0))
    except RecipeError as e:
        raise RecipeError(f"{path}: {e}") from e


def _check_base(recorded: Mapping[str, str], tuned: Tuned, path: str | Path) -> None:
    """The same base but for the head: names and shapes, and values where both have read them."""
    inside = head_of(tuned.anatomy)
    here = {n: t for n, t in base_lines(tuned).items() if not inside(n)}
    there = {n: t for n, t in recorded.items() if not inside(n)}
    for n in sorted({*here, *there}) if there else ():
        a, b = there.get(n, "missing"), here.get(n, "missing")
        shapes = [t.partition(" ")[0] for t in (a, b)]
        if shapes[0] != shapes[1] or " " in a and " " in b and a != b:
            what = f"{n} is {shapes[0]} there and {shapes[1]} here" if shapes[0] != shapes[1] \
                else f"{n} has other values"
            raise FormatError(f"{path} was trained on another base: {what}")
