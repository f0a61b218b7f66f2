"""The target language: which weights a part of a recipe applies to.

::

    targets  = item ("," item)*            the union of the items; a list of strings is one too
    item     = ["-"] word ["@" range]      "-" takes away; only "-" items start from the default
    word     = role                        q  v  qkv  o  cross_q  fc1  gate  down  router  ...
             | group                       attention cross mlp mixer linear conv embedding
                                           experts head all
             | module name or its ending   q_proj   attention.query   lm_head
             | glob over module names      encoder.layer.*.attention.*
             | "re:" regex                 re:.*\\.(q|v)_proj        (the whole name must match)
    range    = index | start ":" stop      blocks of each stack, counted as in Python: @-1  @0:6

``None`` is the default: every linear of the blocks (see :func:`match`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from . import families
from .errors import ConfigError, TargetError, nearest
from .patterns import Pattern
from .reading import shown
from .site import Place

if TYPE_CHECKING:
    from .anatomy import Anatomy, Block

#: longest text of targets, and most items of it (every weight of a large model, one by one)
LENGTH, ITEMS = 1_000_000, 20_000

_LINEAR = ("linear", "conv1d", "mha", "experts")
_RANGE = re.compile(r"-?\d{1,9}|-?\d{0,9}:-?\d{0,9}(:-?\d{1,9})?", re.ASCII)


def _body_linear(a: Anatomy, p: Place) -> bool:
    return p.kind in _LINEAR and not a.in_head(p) and p.role not in ("router", "patch")


GROUPS: dict[str, tuple[str, Callable[[Anatomy, Place], bool]]] = {
    "attention": ("every projection of self- and cross-attention",
                  lambda a, p: p.role in families.ATTENTION or p.role in families.CROSS),
    "cross": ("the projections of cross-attention", lambda a, p: p.role in families.CROSS),
    "mlp": ("the matrices of MLPs and experts", lambda a, p: p.role in families.MLP),
    "mixer": ("the projections of state-space mixers",
              lambda a, p: p.role in families.MIXER),
    "linear": ("every linear outside the head, routers left out", _body_linear),
    "all-linear": ("the same as linear", _body_linear),
    "conv": ("convolutions, patch embeddings too", lambda a, p: p.kind == "conv"),
    "embedding": ("embedding tables: tokens, positions, types",
                  lambda a, p: p.kind == "embedding"),
    "experts": ("matrices of experts",
                lambda a, p: p.kind == "experts" or "experts" in p.path.split(".")),
    "head": ("the task head", lambda a, p: a.in_head(p)),
    "all": ("every weight matrix", lambda a, p: True),
}


def match(anatomy: Anatomy, targets: str | Iterable[str] | None = None) -> list[Place]:
    """The places `targets` names, in model order.

    None: linears, Conv1Ds, attention projections and experts inside the blocks; without blocks
    every such weight outside the head; in a network without any, its convolutions. Routers,
    embeddings and the head are never among them.

    A role names the whole weights of that role and, in a fused weight, its rows (`q` of a
    ``qkv``); groups and module names mean fused weights whole. Raises TargetError for an item
    that matches nothing and for a weight asked both whole and in part.
    """
    items = _items(targets)
    take = [i for i in items if not i.startswith("-")]
    drop = [i[1:].strip() for i in items if i.startswith("-")]
    if take:
        asked = {item: _resolve(anatomy, item) for item in take}
        chosen = {p: item for item, places in asked.items() for p in places}
        _whole_or_part(chosen)
    else:
        chosen = dict.fromkeys(_default(anatomy), "the default")
    for item in drop:
        chosen = _without(anatomy, chosen, _resolve(anatomy, item))
    if not chosen:
        raise TargetError(f"targets {targets!r} leave nothing of {_called(anatomy)}: what is "
                          "named is taken away again")
    order = {p: i for i, p in enumerate(anatomy.places)}
    return sorted(chosen, key=lambda p: (order[_home(anatomy, p)], p.rows or (0, 0)))


def tensors(anatomy: Anatomy, targets: str | Iterable[str], among: Iterable[str], *,
            siblings: bool) -> list[str]:
    """Those parameters of `among` (dotted names) that `targets` name, in the order of `among`.

    An item names the weights of its places, with `siblings` their biases too; a module's or a
    parameter's name, its ending, a glob or a regex names parameters themselves, where no place
    answers to it or with `siblings` besides. Raises TargetError for an item that names nothing in
    the model and for rows of a fused weight, which no parameter is.
    """
    among = list(among)
    items = _items(targets)
    take = [i for i in items if not i.startswith("-")]
    kept = set(among) if not take else set()
    for item in take:
        kept |= _tensors(anatomy, item, siblings)
    for item in items:
        if item.startswith("-"):
            kept -= _tensors(anatomy, item[1:].strip(), siblings)
    return [n for n in among if n in kept]


def _tensors(a: Anatomy, item: str, siblings: bool) -> set[str]:
    word, blocks = _parted(item)
    known = [n for n, _ in a.model.named_parameters() if ".burnish." not in f".{n}"]
    named = [n for n in known if _answers(n, word)]
    try:
        places = _resolve(a, item)
    except TargetError:
        if blocks:
            named = [n for n in named if _block_of(a, n) in _numbers(a, blocks)]
        if not named:
            raise
        return set(named)
    out: set[str] = set()
    for place in places:
        weight = f"{place.path}.{place.param}" if place.path else place.param
        if place.rows:
            raise TargetError(f"target {item!r} names {place.name}, a run of rows of one "
                              "parameter, which trains whole or not at all: target the fused "
                              "weight, or give these rows a delta")
        out.add(weight)
        if siblings:
            out.add(f"{weight.removesuffix('weight')}bias")
    if siblings and word not in GROUPS and word not in families.ROLES:
        inside = _numbers(a, blocks) if blocks else None
        out |= {n for n in named if inside is None or _block_of(a, n) in inside}
    return out


def _answers(name: str, word: str) -> bool:
    """Does a parameter answer to a word: by its own name or that of a module it stands in?"""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    if word.startswith("re:"):
        return any(_pattern(word).fullmatch(n) for n in above[-2:])
    if re.search(r"[*?\[]", word):
        return any(fnmatch.fnmatchcase(n, q) for n in above[-2:] for q in (word, f"*.{word}"))
    return any(n == word or n.endswith(f".{word}") for n in above)


def _block_of(a: Anatomy, name: str) -> int | None:
    return next((i for i, b in enumerate(a.blocks) if name.startswith(f"{b.path}.")), None)


def explain(anatomy: Anatomy) -> dict[str, list[str]]:
    """What can be said about this model: its roles, groups and module names."""
    whole = dict.fromkeys(p.role for p in anatomy.places if p.role)
    parts = dict.fromkeys(s.role for p in anatomy.places for s in anatomy.slices(p))
    return {"roles": [*whole, *(r for r in parts if r not in whole)],
            "groups": [g for g, (_, test) in GROUPS.items()
                       if any(test(anatomy, p) for p in anatomy.places)],
            "names": list(dict.fromkeys(_names(p)[0].rpartition(".")[2]
                                        for p in anatomy.places))}


# -- reading ------------------------------------------------------------------------------------
def _items(targets: str | Iterable[str] | None) -> list[str]:
    if targets is None:
        return []
    if not isinstance(targets, str):
        pieces = list(targets)
        if wrong := [t for t in pieces if not isinstance(t, str)]:
            raise TargetError(f"targets are text or a list of texts, not {wrong[0]!r}")
        items = [i for t in pieces for i in _split(t)]
    else:
        items = _split(targets)
    if len(items) > ITEMS:
        raise TargetError(f"targets of {len(items)} items are too many (at most {ITEMS}); write "
                          "a glob such as 'layers.*.q_proj', or 're:' with a pattern")
    if not items:
        raise TargetError("targets are empty; leave them out for the default, or write for "
                          "example 'q,v'")
    return items


def _split(text: str) -> list[str]:
    """At commas that stand outside brackets (a regex or a range of counts may hold some)."""
    if len(text) > LENGTH:
        raise TargetError(f"targets of {len(text)} characters are too long (at most {LENGTH})")
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth <= 0:
            out.append(text[start:i])
            start = i + 1
    return [i.strip() for i in (*out, text[start:]) if i.strip()]


def _resolve(a: Anatomy, item: str) -> list[Place]:
    word, blocks = _parted(item)
    found = _word(a, word)
    if not found:
        raise TargetError(_nothing(a, word))
    if blocks:
        return _in_range(a, found, item, blocks)
    return found


def _parted(item: str) -> tuple[str, str]:
    """(word, range) of an item; the range is empty where there is none."""
    word, at, blocks = item.rpartition("@")
    if not at or not word or not _RANGE.fullmatch(blocks.strip()):
        return item.strip(), ""
    return word.strip(), blocks.strip()


def _pattern(word: str) -> Pattern:
    try:
        return Pattern(word[3:])
    except ConfigError as error:
        raise TargetError(f"target {shown(word, 60)}: {error}") from None


def _word(a: Anatomy, word: str) -> list[Place]:
    if word.startswith("re:"):
        pattern = _pattern(word)
        return [p for p in a.places if any(pattern.fullmatch(n) for n in _names(p))]
    if word in GROUPS:
        return [p for p in a.places if GROUPS[word][1](a, p)]
    if word in families.ROLES and (found := _of_role(a, word)):
        return found
    if exact := [s for p in a.places for s in (p, *a.slices(p)) if s.name == word]:
        return exact
    if re.search(r"[*?\[]", word):
        return [p for p in a.places
                if any(fnmatch.fnmatchcase(n, q) for n in _names(p) for q in (word, f"*.{word}"))]
    return [p for p in a.places
            if any(n == word or n.endswith(f".{word}") for n in _names(p))]


def _of_role(a: Anatomy, role: str) -> list[Place]:
    return [s for p in a.places for s in (p, *a.slices(p)) if s.role == role]


def _names(p: Place) -> list[str]:
    """What a place answers to: the name of the module that holds the weight, then others."""
    full = f"{p.path}.{p.param}" if p.path else p.param
    module = full.removesuffix(".weight") if full != "weight" else ""
    return list(dict.fromkeys((module, full, p.path)))


def _in_range(a: Anatomy, places: list[Place], item: str, text: str) -> list[Place]:
    stacks = {name: len(blocks) for name, blocks in a.stacks().items()}
    if not stacks:
        raise TargetError(f"target {item!r} counts blocks, but {_called(a)} has no repeated "
                          f"blocks; write {item.rpartition('@')[0]!r}")
    inside = _numbers(a, text)
    found = [p for p in places if p.block in inside]
    if not found:
        sizes = ", ".join(f"{n} in {s}" for s, n in stacks.items())
        where = sorted({a.blocks[p.block].index for p in places if p.block is not None})
        have = f"{item.rpartition('@')[0]!r} is in blocks {_spans(where)}" if where else \
            f"{item.rpartition('@')[0]!r} is outside the blocks"
        raise TargetError(f"target {item!r} matches no block of {_called(a)}: there are {sizes}, "
                          f"counted from 0; {have}")
    return found


def _numbers(a: Anatomy, text: str) -> set[int | None]:
    """Positions in ``anatomy.blocks`` that a range names, counted in each stack."""
    stacks = {name: len(blocks) for name, blocks in a.stacks().items()}
    bounds = [int(n) if n else None for n in text.split(":")]
    if bounds[2:] == [0]:
        raise TargetError(f"{text!r} counts blocks in steps of 0; leave the step out")

    def inside(b: Block) -> bool:
        count = stacks[b.stack]
        if len(bounds) == 1:
            assert bounds[0] is not None
            return b.index == (bounds[0] + count if bounds[0] < 0 else bounds[0])
        return b.index in range(count)[slice(*bounds)]

    return {i for i, b in enumerate(a.blocks) if inside(b)}


def _spans(numbers: list[int]) -> str:
    return f"{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


# -- putting together ---------------------------------------------------------------------------
def _default(a: Anatomy) -> list[Place]:
    linear = [p for p in a.places if _body_linear(a, p)]
    body = [p for p in linear if p.block is not None] or \
        [p for p in linear if p.role not in ("reduction", "pooler")] or linear
    body = body or [p for p in a.places if p.kind == "conv" and not a.in_head(p)]
    if not body:
        has = ", ".join(explain(a)["groups"]) or "no weight matrices at all"
        rnn = next((n for n, m in a.model.named_modules() if isinstance(m, nn.RNNBase)), None)
        more = "" if rnn is None else f", or train {rnn} whole with full(targets={rnn!r})"
        raise TargetError(f"{_called(a)} has no linear or convolution outside its head to tune "
                          f"by default; it has {has}: name targets{more}")
    return body


def _home(a: Anatomy, p: Place) -> Place:
    """The whole place a slice was cut from."""
    return next(w for w in a.places if w.path == p.path and w.param == p.param) if p.rows else p


def _whole_or_part(chosen: dict[Place, str]) -> None:
    whole = {(p.path, p.param): p for p in chosen if not p.rows}
    for p in chosen:
        if p.rows and (both := whole.get((p.path, p.param))):
            raise TargetError(
                f"targets {chosen[both]!r} and {chosen[p]!r} name {both.name} whole and its rows "
                f"{p.role}: ask for one of them")


def _without(a: Anatomy, chosen: dict[Place, str], taken: list[Place]) -> dict[Place, str]:
    """What is left; rows taken from a fused weight leave its other rows."""
    out: dict[Place, str] = {}
    gone = set(taken)
    for p, item in chosen.items():
        if p in gone or (p.rows and _home(a, p) in gone):
            continue
        parts = [] if p.rows else a.slices(p)
        if any(s in gone for s in parts):
            out |= {s: item for s in parts if s not in gone}
        else:
            out[p] = item
    return out


# -- saying what would work -----------------------------------------------------------------------
def _called(a: Anatomy) -> str:
    return type(a.model).__name__


def _nothing(a: Anatomy, word: str) -> str:
    known = explain(a)
    text = f"target {word!r} matches nothing in {_called(a)}"
    if hint := _hint(a, word):
        return f"{text}: {hint}"
    paths = {n for p in a.places for n in _names(p) if n}
    words = [*known["roles"], *known["groups"], *known["names"]]
    close = nearest(word, words) or nearest(word, paths)
    return (f"{text}{close} (roles: {', '.join(known['roles']) or 'none'}; groups: "
            f"{', '.join(known['groups'])}; names: {', '.join(known['names'][:12])})")


def _hint(a: Anatomy, word: str) -> str:
    """Why nothing matched, where that can be told."""
    for full, alias in a.aliases.items():
        if word in (full, full.removesuffix(".weight")) or \
                full.removesuffix(".weight").endswith(f".{word}"):
            return f"{full} is tied to {alias}; target {alias.removesuffix('.weight')!r}"
    if word == "head" and not a.head:
        return "it has no task head"
    if word == "head":
        tied = [n for n in a.aliases if any(n.startswith(f"{h}.") for h in a.head)]
        if tied:
            return f"its head {tied[0]} is tied to {a.aliases[tied[0]]}, which is an embedding"
    for p in a.places:
        fused = p.role.removeprefix("cross_")
        if word.removeprefix("cross_") in families.FUSED.get(fused, ()) and not a.slices(p):
            why = "interleaves its parts" if a.interleaved(p) else "has no clear split"
            return f"{p.name} {why}, so they are no runs of rows; target {p.role!r}"
    roles = {p.role for p in a.places}
    if word in families.MLP and roles & set(families.MLP):
        return f"its MLP is made of {', '.join(r for r in families.MLP if r in roles)}"
    if word in families.CROSS or word == "cross":
        return "it has no cross-attention"
    inside = [n for n, _ in a.model.named_modules() if n == word or n.endswith(f".{word}")]
    if inside and not re.search(r"[*?\[]", word):
        for note in a.notes:                         # why it is no place, if that was told
            if note.startswith(f"{inside[0]} "):
                return note
        below = any(p.path.startswith(f"{inside[0]}.") for p in a.places)
        return f"it is a module that holds others; write '{word}.*'" if below else \
            f"{inside[0]} ({type(a.model.get_submodule(inside[0])).__name__}) has no weight matrix"
    return ""
