"""Which cells of methods x models x pairs a run looks at, so that its time follows the catalogue.

Everything is chosen by a digest of names, the same on every machine. A new method moves no other's
models; of the pairs it takes the place of a partner where its digest is the lower one, and moves no
other. ``BURNISH_ALL=1`` takes the whole product instead, and ``SHARD=3/8`` the third of eight parts
of it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..core import registry
from ..core.anatomy import Anatomy
from ..core.axes import AXES
from ..core.errors import BurnishError, ConfigError
from ..core.needs import lacks
from ..core.recipe import parse
from .models import NAMES, tiny

#: one model of each is taken: pictures, text, plain torch modules
GROUPS: tuple[tuple[str, ...], ...] = (
    ("vit", "deit", "swin", "convnext", "clip", "timm_qkv"),
    ("bert", "roberta", "gpt2", "llama", "mixtral", "qwen_moe", "t5", "mamba", "whisper"),
    ("encoder", "mha", "cnn", "mlp"),
)
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


def applies(method: str, model: str) -> bool:
    """By what the method's file says of itself."""
    return lacks(registry.find(method), anatomy(model)) is None


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


# -- pairs ----------------------------------------------------------------------------------------
def joinable(recipe: str) -> bool:
    """The parts may stand in one recipe (a model may still refuse it)."""
    try:
        parse(recipe)
    except BurnishError:
        return False
    return True


def pairs(names: Sequence[str], all: bool | None = None) -> list[tuple[str, str]]:
    """Ordered pairs to look at: every method with one partner from every axis, in the order and
    with the partner that the digest says; or every pair in both orders."""
    if everything() if all is None else all:
        return list(itertools.permutations(names, 2))
    by_axis = {a: [n for n in names if registry.find(n).axes()[0] == a] for a in AXES}
    out: dict[tuple[str, str], None] = {}
    for name in names:
        for there in by_axis.values():
            others = sorted((o for o in there if o != name), key=lambda o: rank(name, o))
            for other in others[:1]:
                a, b = sorted((name, other), key=lambda n: rank(n, name, other))
                if (b, a) not in out:
                    out[a, b] = None
    return list(out)


def covering(wanted: Iterable[tuple[str, str]], text: dict[str, str], size: int = 4
             ) -> list[tuple[str, ...]]:
    """Rows of up to `size` parts such that every wanted pair stands in one of them, in its order.

    Parts that cannot stand together make a row of two. text: name -> how it is written.
    """
    left = dict.fromkeys(wanted)
    after: dict[str, list[str]] = {}
    for a, b in left:
        after.setdefault(a, []).append(b)
    rows = []
    while left:
        a, b = next(iter(left))
        row = [a, b]
        if joinable(" + ".join(text[n] for n in row)):
            while len(row) < size:
                gain = {c: sum((x, c) in left for x in row)
                        for x in row for c in after.get(x, ()) if c not in row}
                for c in sorted(gain, key=lambda c: (-gain[c], rank(*row, c))):
                    if gain[c] and joinable(" + ".join(text[n] for n in (*row, c))):
                        row.append(c)
                        break
                else:
                    break
        for x, y in itertools.combinations(row, 2):
            left.pop((x, y), None)
        rows.append(tuple(row))
    return rows
