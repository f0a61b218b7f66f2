"""A residual stream of which every sub-layer has a basis of its own: blocks between two bases.

RMSNorm commutes with rotations, ``norm(x Q) = norm(x) Q``, so a sub-layer may read ``x Q`` and
write in another basis Q' if what passes it by is turned from one into the other:

    h' = h S + f(norm(h)),    S = Q^T Q'

and of every basis only the leading k directions need stay. With d channels of which k are left,
``c = sqrt(k / d)``, M = I - 1 1^T / d where norms subtract a mean, g and b a norm's scale and
shift:

    tables          E <- c E M Q
    writers         W <- c Q^T M W,  bias <- c Q^T M bias
    readers         W <- W diag(g) Q,  bias <- bias + W b
    norms           a root mean square, scale 1 / c: what they divide by is what it was
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ...core import families
from ...core.anatomy import Anatomy, Block
from ...core.site import Place
from ...core.stream import Stream
from .gates import norm_offset


class Shortcuts(nn.Module):
    """The two S (k, k) of a block: around its attention and around its MLP.

    What a block passes by is turned before it begins; its first norm reads what came. What it gives
    is put right by ``h (S - I)``, h what its second norm has read. The block's own forward is what
    it was, within one that does this: dropout stays where it is.
    """

    def __init__(self, first: Tensor, second: Tensor, trains: bool):
        super().__init__()
        self.first = nn.Parameter(first, trains)
        self.second = nn.Parameter(second, trains)
        self.held: dict[tuple[int, str], Tensor] = {}          # by thread, while the block runs

    def join(self, block: nn.Module, norms: Sequence[nn.Module]) -> None:
        """Stand around a block that has these two norms, from now on."""
        block.add_module("shortcuts", self)
        block.__class__ = _turning(type(block))
        norms[0].register_forward_pre_hook(self.reads)
        norms[1].register_forward_pre_hook(self.between)

    def run(self, forward: Callable[..., Any], args: tuple, kw: dict[str, Any]) -> Any:
        """What the block gives, `forward` its own run."""
        name = None if args else next(iter(kw))
        h = args[0] if name is None else kw[name]
        turned, me = h @ self.first.to(h.dtype), get_ident()
        self.held[me, "before"] = h
        try:
            out = forward(turned, *args[1:], **kw) if name is None else \
                forward(**{**kw, name: turned})
            h = self.held[me, "between"]
        finally:                                     # a run that is broken off too
            for at in ("before", "between"):
                self.held.pop((me, at), None)
        state = out[0] if isinstance(out, tuple) else out
        made = state + (h @ self.second.to(h.dtype) - h).view_as(state)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    def reads(self, norm: nn.Module, args: tuple) -> tuple:
        h = self.held[get_ident(), "before"]
        return h.view_as(args[0]), *args[1:]

    def between(self, norm: nn.Module, args: tuple) -> None:
        self.held[get_ident(), "between"] = args[0]


@cache
def _turning(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of blocks whose run is within their shortcuts'."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kw: Any) -> Any:
        return self.shortcuts.run(partial(cls.forward, self), args, kw)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__,
                                       "__doc__": cls.__doc__})


def subtract(anatomy: Anatomy, stream: Stream) -> bool | None:
    """Do the norms of a stream subtract a mean? None where some do and some do not."""
    kinds = {isinstance(anatomy.model.get_submodule(n), nn.LayerNorm) for n in stream.norms}
    return kinds.pop() if len(kinds) == 1 else None


def interface(anatomy: Anatomy, place: Place, writes: bool) -> int:
    """The basis a matrix reads, or writes in: 0, 1 around the first block's attention and behind
    it, ..., 2 L before the head."""
    if place.block is None:
        return 0 if place.kind == "embedding" else 2 * len(anatomy.blocks)
    inner = place.role.removeprefix("cross_") in families.MLP
    return 2 * place.block + inner + writes


@torch.no_grad()
def sliced(anatomy: Anatomy, stream: Stream, keep: int, bases: Sequence[Tensor] | None) -> None:
    """Put a model of a stream into bases of its own, in place.

    bases: 2 L + 1 of (width, keep), by interface. None: the first channels as they are, to make
    the same shapes for values that a file brings.
    """
    model, mean = anatomy.model, bool(subtract(anatomy, stream))
    c = math.sqrt(keep / stream.width)

    def basis(i: int, like: Tensor) -> Tensor:
        wide = torch.promote_types(like.dtype, torch.float32)
        if bases is None:
            return torch.eye(stream.width, keep, dtype=wide, device=like.device)
        return bases[i].to(like.device, wide)

    for place, module, W in _read(anatomy, stream):
        i = interface(anatomy, place, writes=False)
        norm = model.get_submodule(stream.norms[i])
        Q, W = basis(i, W), place.view(W.detach())
        wide = W.to(Q.dtype)
        gain = norm.weight.to(Q) + _offset(norm)
        _put(module, "weight", _stored(place, (wide * gain @ Q).to(W.dtype)))
        if (shift := getattr(norm, "bias", None)) is not None:
            own: Any = module.bias
            bias = wide @ shift.to(Q)
            _put(module, "bias", (bias if own is None else bias + own.to(Q)).to(W.dtype))
        setattr(module, "nx" if hasattr(module, "nf") else "in_features", keep)
    for place in stream.writers:
        module = model.get_submodule(place.path)
        Q = c * basis(interface(anatomy, place, writes=True), module.weight)
        for name in ("weight", "bias"):
            if (p := getattr(module, name, None)) is not None:
                V = (place.view(p.detach()) if name == "weight" else p.detach()).to(Q.dtype)
                V = Q.t() @ (V - V.mean(0) if mean else V)
                _put(module, name, (_stored(place, V) if name == "weight" else V).to(p.dtype))
        setattr(module, "nf" if hasattr(module, "nf") else "out_features", keep)
    for place in stream.tables:
        module = model.get_submodule(place.path)
        E = module.weight.detach()
        Q = c * basis(0, E)
        V = E.to(Q.dtype)
        _put(module, "weight", ((V - V.mean(1, keepdim=True) if mean else V) @ Q).to(E.dtype))
        module.embedding_dim = keep
    norms = [_norm(model, path, keep, c) for path in stream.norms]
    for n, block in enumerate(anatomy.blocks):
        like = norms[2 * n].weight
        Q, R, S = (basis(2 * n + i, like) for i in range(3))
        Shortcuts(*((A.t() @ B).to(like.dtype) for A, B in ((Q, R), (R, S))),
                  like.requires_grad).join(model.get_submodule(block.path),
                                           norms[2 * n : 2 * n + 2])
    if stream.tied and hasattr(model, "config"):
        model.config.tie_word_embeddings = False


def _read(anatomy: Anatomy, stream: Stream) -> Iterator[tuple[Place, Any, Tensor]]:
    """(place, module, what it stores) of all that read; a head that is tied to the table has it
    for itself from now on."""
    for place in stream.readers:
        module = anatomy.model.get_submodule(place.path)
        yield place, module, module.weight
    for table in stream.tables:
        weight = anatomy.model.get_submodule(table.path).weight
        for place in anatomy.ends(table):
            yield place, anatomy.model.get_submodule(place.path), weight


def _stored(place: Place, W: Tensor) -> Tensor:
    return (W.t() if place.transposed else W).contiguous()


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters.get(name)
    trains = module.weight.requires_grad if old is None else old.requires_grad
    module._parameters[name] = nn.Parameter(value.contiguous(), bool(trains))


def _norm(model: nn.Module, path: str, keep: int, c: float) -> nn.Module:
    """The norm at a path on fewer channels: a root mean square, all scales 1 / c."""
    norm: Any = model.get_submodule(path)
    scale = norm.weight.new_full((keep,), 1 / c - _offset(norm))
    if isinstance(norm, nn.LayerNorm):
        small = nn.RMSNorm(keep, norm.eps, device="meta").train(norm.training)
        small.weight = nn.Parameter(scale, norm.weight.requires_grad)
        model.set_submodule(path, small)
        return small
    _put(norm, "weight", scale)
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (keep,)
    return norm


def _offset(norm: Any) -> float:
    """1 for norms that multiply by 1 + weight; without values it does not matter."""
    return 0.0 if norm.weight.is_meta else norm_offset(norm, norm.weight)


def norms_of(stream: Stream, block: int) -> tuple[str, str]:
    """Paths of the two norms of a block."""
    return stream.norms[2 * block], stream.norms[2 * block + 1]


def parts_of(anatomy: Anatomy, stream: Stream, block: Block, inner: bool
             ) -> tuple[list[Place], Place]:
    """(what reads, what writes) of a block's attention, or of its MLP."""
    n = anatomy.blocks.index(block)
    at = 2 * n + inner
    reads = [p for p in stream.readers
             if p.block == n and interface(anatomy, p, writes=False) == at]
    writes = [p for p in stream.writers
              if p.block == n and interface(anatomy, p, writes=True) == at + 1]
    return reads, writes[0]
