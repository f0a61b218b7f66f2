"""Which cells of methods x checks x models a run looks at, so that its time follows the catalogue
by a small share only.

A run has a seed (testing/changed.py). Of each method it looks at every check once, each on another
small model: check k on model k + seed + a digest of the method's name, counted round. So one run
shows a method on nearly every model by some check, as many seeds as there are models show it on
each by all, and over the catalogue every check meets every structure (:data:`STRUCTURES`) each
time. Methods that have changed share `CHANGED` further cells: a few are shown whole. A new method
moves no other's cells. Long tests of anything else have their turn one run in :data:`TURNS`.
``BURNISH_ALL=1`` takes the whole product instead, ``SHARD=3/8`` the third of eight parts of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from ..core import registry
from ..core.anatomy import Anatomy
from ..core.errors import ConfigError
from ..core.needs import lacks
from . import changed
from .models import NAMES, tiny

#: one model of each is taken: pictures, text, plain torch modules
GROUPS: tuple[tuple[str, ...], ...] = (
    ("vit", "deit", "swin", "convnext", "clip", "timm_qkv"),
    ("bert", "roberta", "gpt2", "llama", "mixtral", "qwen_moe", "t5", "mamba", "whisper"),
    ("encoder", "mha", "cnn", "mlp", "points", "graphs"),
)
#: what tells models apart where methods are concerned: the structure and the models that have it
STRUCTURES: dict[str, tuple[str, ...]] = {
    "one weight for q, k and v": ("timm_qkv", "gpt2", "encoder", "mha", "points"),
    "weights stored (in, out)": ("gpt2",),
    "a tied head": ("gpt2", "t5", "whisper"),
    "convolutions": ("cnn", "convnext"),
    "encoder and decoder": ("t5", "whisper"),
    "experts": ("mixtral", "qwen_moe"),
    "fewer heads for k and v": ("llama", "mixtral", "qwen_moe"),
    "a scan": ("mamba",),
    "windows": ("swin",),
    "two towers": ("clip",),
    "plain blocks": ("vit", "deit", "bert", "roberta"),
    "groups of points": ("points",),
    "nodes and their neighbours": ("graphs",),
    "no blocks": ("mlp", "cnn", "mha"),
}
#: the models, neighbours unlike each other: checks that follow each other look at other structures
ROUND: tuple[str, ...] = (
    "vit", "gpt2", "mixtral", "cnn", "t5", "timm_qkv", "mamba", "bert", "clip", "encoder", "llama",
    "swin", "mlp", "whisper", "deit", "convnext", "qwen_moe", "points", "mha", "roberta", "graphs")
#: (kind of place, model, targets): what the default targets of most models leave out
PLACES: tuple[tuple[str, str, str], ...] = (
    ("linear", "mlp", "layers.0"), ("conv1d", "gpt2", "c_proj"), ("conv", "cnn", "conv"),
    ("embedding", "roberta", "embed"), ("mha", "mha", "attn"), ("experts", "mixtral", "experts"),
)
#: cell -> another of its kind, for methods that a size there does not fit (27 inputs in blocks)
OTHERWISE = {"cnn/conv": "cnn/features.4"}
#: cell -> another of its kind, for methods that need more of a model than one layer
IN_BLOCKS = {"mlp/layers.0": "vit/fc1"}
#: (kind of place, model, targets): runs of rows of a fused weight
ROWS: tuple[tuple[str, str, str], ...] = (
    ("linear", "timm_qkv", "q,v"), ("conv1d", "gpt2", "q,v"), ("mha", "encoder", "q,v"),
)
#: settings of a method that one run shows to act
SETTINGS = 2
#: further cells that the changed methods of a run share: three of them whole, more of them in part
CHANGED = 1200
#: methods at which suites that go through the catalogue look in one run, besides changed ones
WINDOW = 32
#: methods whose own tests a run of all tests goes through, beside as many that have changed
TESTS = 96
#: runs in which every long test has its turn, that of a changed file besides
TURNS = 4


def everything() -> bool:
    """``BURNISH_ALL=1``: the whole product."""
    return os.environ.get("BURNISH_ALL", "") not in ("", "0")


def rank(*words: str) -> int:
    """A number that depends on the words alone."""
    return int.from_bytes(hashlib.blake2b(":".join(words).encode(), digest_size=8).digest(), "big")


def shard(text: str | None) -> tuple[int, int]:
    """``"3/8"`` -> (3, 8); nothing -> (1, 1). Raises ConfigError."""
    if not text:
        return 1, 1
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"SHARD={text!r}: expected part/parts, e.g. 3/8")
    return int(first), int(last)


# -- models ---------------------------------------------------------------------------------------
@lru_cache(maxsize=len(NAMES))
def anatomy(model: str) -> Anatomy:
    """The anatomy of a small model (on meta: it has no values)."""
    return Anatomy.of(tiny(model, meta=True)[0])


@cache
def _applies(cls: type, model: str) -> bool:
    return lacks(cls, anatomy(model)) is None


def applies(method: str, model: str) -> bool:
    """By what the method's file says of itself."""
    return _applies(registry.find(method), model)


def models_for(method: str, all: bool | None = None) -> tuple[str, ...]:
    """Three small models the method applies to, of three groups where it can; or all of them."""
    fit = [m for m in NAMES if applies(method, m)]
    if everything() if all is None else all:
        return tuple(fit)
    order = sorted(fit, key=lambda m: rank(method, m))
    first = [next((m for m in order if m in group), None) for group in GROUPS]
    chosen = [m for m in first if m is not None]
    chosen += [m for m in order if m not in chosen][:3 - len(chosen)]
    return tuple(chosen)


def kinds_on(model: str) -> set[str]:
    """Kinds of place among a model's default targets; ``fused`` where rows of one weight are."""
    from ..core.targets import match

    a = anatomy(model)
    places = match(a, None)
    return {p.kind for p in places} | ({"fused"} if any(a.slices(p) for p in places) else set())


# -- cells ----------------------------------------------------------------------------------------
@dataclass(frozen=True, order=True)
class Cell:
    """One check of one method on one small model, by their names."""

    method: str
    check: str
    model: str


def diagonal(method: str, live: Sequence[str], seed: int, breadth: int = 1) -> list[Cell]:
    """Every check that has something to look at (`live`, by name), on `breadth` models each that
    the method applies to: neighbours on the :data:`ROUND`, from a place that the seed moves."""
    fit = [m for m in ROUND if applies(method, m)]
    start = seed + rank(method)
    return [Cell(method, check, fit[(start + k + step) % len(fit)])
            for k, check in enumerate(live) for step in range(min(breadth, len(fit)))]


def gaps(cells: Iterable[Cell], live: dict[str, Sequence[str]], seed: int) -> list[Cell]:
    """A cell for every (check, structure) that these show nowhere, though a method could."""
    shown = {(c.check, c.model) for c in cells}
    checks = dict.fromkeys(check for some in live.values() for check in some)
    out = []
    for check in checks:
        for structure, models in STRUCTURES.items():
            if any((check, m) in shown for m in models):
                continue
            could = [(n, m) for n in live if check in live[n] for m in models if applies(n, m)]
            if could:
                name, model = min(could, key=lambda c: rank(str(seed), check, structure, *c))
                out.append(Cell(name, check, model))
                shown.add((check, model))
    return out


def cells(live: dict[str, Sequence[str]], seed: int | None = None,
          new: Collection[str] | None = None) -> list[Cell]:
    """What one run looks at. live: method -> names of the checks that look at it; new: the methods
    that have changed, which share :data:`CHANGED` further cells."""
    seed = changed.seed() if seed is None else seed
    new = {n for n in (changed.methods() if new is None else new) if n in live}
    deep = breadth(live, new)
    out = [c for n, checks in live.items()
           for c in diagonal(n, checks, seed, deep if n in new else 1)]
    return sorted({*out, *gaps(out, live, seed)})


def breadth(live: dict[str, Sequence[str]], new: Collection[str]) -> int:
    """Models on which each check of a changed method is shown."""
    per = sum(len(live[n]) for n in new)
    return 1 + CHANGED // per if per else 1


def visited(names: Sequence[str], seed: int | None = None, new: Collection[str] | None = None,
            window: int = WINDOW) -> list[str]:
    """The methods at which a suite that goes through the catalogue looks in one run: all that have
    changed, as many as there is room for, and `window` others, which the seed moves on."""
    if everything() or len(names) <= window:
        return list(names)
    seed = changed.seed() if seed is None else seed
    order = sorted(names, key=rank)
    start = seed * window % len(order)
    turn = (order[start:] + order[:start])[:window]
    first = [n for n in sorted(names, key=lambda n: rank(str(seed), n))
             if n in (changed.methods() if new is None else new)][:window]
    return [n for n in names if n in {*turn, *first}]


def long_tests(ids: Sequence[str], seed: int | None = None,
               new: Collection[str] | None = None) -> set[str]:
    """The long tests of one run: every :data:`TURNS`-th of all, from a place that the seed moves,
    and of those in files that have changed (`new`, by path) as many again."""
    if everything():
        return set(ids)
    seed = changed.seed() if seed is None else seed
    new = changed.files() if new is None else new
    turn = sorted(ids, key=rank)[seed % TURNS::TURNS]
    first = [i for i in sorted(ids, key=lambda i: rank(str(seed), i))
             if i.partition("::")[0] in new and i not in turn][:len(ids) // TURNS]
    return {*turn, *first}


def some(method: str, things: Sequence[str], count: int, seed: int | None = None) -> list[str]:
    """So many of a method's things (its settings): all of a changed one's or of a whole product,
    the others' in turn."""
    if everything() or method in changed.methods() or len(things) <= count:
        return list(things)
    start = (changed.seed() if seed is None else seed) * count + rank(method)
    return [things[(start + i) % len(things)] for i in range(count)]
