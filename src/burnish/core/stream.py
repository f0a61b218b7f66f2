"""The residual stream of a model: who writes to it, who reads it, what normalises it.

A channel of the stream is a column of the tables that start it, a row of every matrix that ends a
sub-layer, an entry of every norm, a column of every matrix that reads. A stream whose norms divide
by a root mean square and subtract nothing can lose channels that are zero: they add nothing to the
mean square but their number (engine/narrow.py). A norm that subtracts a mean moves channels of
zero too, and they count in the mean of the others: there what is left out would have been heard,
but for a stream that is turned into another basis after its mean was taken off where it is written
(blocks/state/shortcut.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .anatomy import Anatomy, Block
from .site import Place

_WRITERS = ("o", "fc2", "down")
_READERS = ("q", "k", "v", "qkv", "kv", "fc1", "gate", "up", "gate_up", "head")
_TABLES = ("embed", "position", "type")


@dataclass(frozen=True)
class Stream:
    """width: its channels.  tables: embeddings that start it.  writers: matrices whose rows it is.
    readers: whose columns it is.  norms: paths.  final: of those, the last, before a head.
    tied: a table is also the matrix of the head.
    """

    width: int
    tables: tuple[Place, ...]
    writers: tuple[Place, ...]
    readers: tuple[Place, ...]
    norms: tuple[str, ...]
    final: tuple[str, ...]
    tied: bool


def stream(anatomy: Anatomy, means: bool = False) -> Stream | str:
    """The stream of a model whose channels can be taken out, or why there is none.

    means: norms that subtract a mean and add a shift (LayerNorm) are ones of it too.
    """
    d = anatomy.hidden_size
    if not anatomy.blocks or d is None:
        return "it has no blocks of a known width"
    if len(anatomy.stacks()) > 1:
        return "it has several stacks of blocks"
    try:
        norms = tuple(_norms(anatomy, d, means))
        sides: dict[str, list[Place]] = {"table": [], "writer": [], "reader": []}
        for place in anatomy.places:
            if (side := _side(place, d)):
                sides[side].append(place)
        _others(anatomy, norms, d)
        tied = _tied(anatomy, sides["table"])
    except _Strange as why:
        return str(why)
    return Stream(d, tuple(sides["table"]), tuple(sides["writer"]), tuple(sides["reader"]), norms,
                  tuple(anatomy.final_norms.values()), tied)


class _Strange(Exception):
    """A part of the model that the rules here do not cover."""


def _side(place: Place, d: int) -> str | None:
    """Which way a matrix meets the stream; None where it does not."""
    role = place.role.removeprefix("cross_")
    if place.kind == "embedding":
        if place.block is not None and place.out != d:
            return None                              # a table of positions inside attention
        if place.block is None and place.out == d and role in _TABLES:
            return "table"
    elif place.kind in ("linear", "conv1d") and place.param == "weight":
        if role in _WRITERS and place.out == d:
            return "writer"
        if role in _READERS and place.inp == d:
            return "reader"
    raise _Strange(f"{place.name} ({place.out} x {place.inp}, {place.kind}) is in no known way "
                   f"part of a stream of {d} channels")


def _norms(anatomy: Anatomy, d: int, means: bool) -> Iterator[str]:
    for block in anatomy.blocks:
        inside = tuple(f"{m}." for m in (block.attn, block.cross, block.mlp) if m)
        mine = [n for n in block.norms if not n.startswith(inside)]
        if len(mine) != sum(map(bool, (block.attn, block.cross, block.mlp or block.mlp_out))) \
                or any(families.BEHIND.search(n.rpartition(".")[2]) for n in mine) \
                or block.stack not in anatomy.final_norms:
            raise _Strange(f"{block.path} does not have one norm before each of its sub-layers and "
                           "none behind")
        yield from (_plain(anatomy, n, d, means) for n in mine)
    yield from (_plain(anatomy, n, d, means) for n in anatomy.final_norms.values())


def _plain(anatomy: Anatomy, path: str, d: int, means: bool) -> str:
    """The path of a norm that is gamma x over the root mean square, and nothing more; with `means`
    of x less its mean, and a shift behind."""
    norm = anatomy.model.get_submodule(path)
    if means and isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (d,) \
            and norm.weight is not None:
        return path
    names = [n for n, _ in norm.named_parameters(recurse=False)]
    subtracts = isinstance(norm, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    if subtracts or names != ["weight"] or norm.weight.shape != (d,) or not _scales(norm):
        raise _Strange(f"{path} ({type(norm).__name__}) subtracts a mean or adds a shift, so a "
                       "channel of zeros is heard in the others: only of norms that divide by a "
                       "root mean square (RMSNorm) can channels be taken out and nothing change")
    return path


def _scales(norm: nn.Module) -> bool:
    """Does it answer equal inputs? One that subtracts their mean answers none."""
    weight = norm.get_parameter("weight")
    if type(weight.data) is not Tensor or weight.is_meta:
        return True                                  # no values: its class has to do
    with torch.no_grad():
        return bool(base_forward(norm, torch.ones_like(weight)).any())


def base_forward(norm: nn.Module, x: Tensor) -> Tensor:
    """What the norm itself makes of one token, past anything that was added to it."""
    base = getattr(type(norm), "_burnish_base", type(norm))
    return base.forward(norm, x.view(1, 1, -1)).view(-1)


def _others(anatomy: Anatomy, norms: tuple[str, ...], d: int) -> None:
    """Nothing else may have a side of the stream's width."""
    known = {f"{p.path}.{p.param}" for p in anatomy.places} | {f"{n}.weight" for n in norms}
    for name, _ in anatomy.model.named_parameters():
        if ".burnish." in f".{name}" or name in known or name.endswith("bias"):
            continue
        if not any(name.startswith(f"{m}.") for b in anatomy.blocks for m in _inner(b)):
            raise _Strange(f"{name} is in no known way part of a stream of {d} channels")


def _inner(block: Block) -> tuple[str, ...]:
    return tuple(m for m in (block.attn, block.cross, block.mlp) if m)


def _tied(anatomy: Anatomy, tables: list[Place]) -> bool:
    tied = [a for t in tables for a in anatomy.tied(t)]
    for name in tied:
        path = name.rpartition(".")[0]
        if path not in anatomy.head or not isinstance(anatomy.model.get_submodule(path), nn.Linear):
            raise _Strange(f"{name} is one with {tables[0].name}, and no head: what is put behind "
                           "one of them would not stand behind the other")
    return bool(tied)


# -- a config of another width ------------------------------------------------------------------
def say_width(config: Any, anatomy: Anatomy, width: int) -> None:
    """Let a config name another hidden size; heads keep the width they have."""
    if getattr(config, "head_dim", None) is None and (made := _head_width(anatomy)) is not None:
        config.head_dim = made
    for name in families.WIDTH:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, width)
            return


def _head_width(anatomy: Anatomy) -> int | None:
    block = anatomy.blocks[0]
    q = next((p for p in anatomy.places if p.block == 0 and p.role == "q"), None)
    return None if q is None or not block.heads else q.out // block.heads


def taken(anatomy: Anatomy, width: int) -> int:
    """The largest hidden size up to `width` that the model's config takes (of Llama's a multiple of
    the number of heads); `width` where no config says anything, 0 where none is taken."""
    config: Any = getattr(anatomy.model, "config", None)
    if not hasattr(config, "validate"):
        return width
    for k in range(width, 0, -1):
        new = copy.deepcopy(config)
        say_width(new, anatomy, k)
        try:
            new.validate()
        except Exception:                            # a foreign config may say anything
            continue
        return k
    return 0
