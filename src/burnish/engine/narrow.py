"""Taking channels out of the residual stream: a model of a smaller hidden size.

What is taken out is zero wherever it is written. With k of d channels left, and c = sqrt(k / d),

    tables and rows of writers  x c     the stream is c x
    gamma                       / c     gamma c x / sqrt(c^2 sum x^2 / k + eps): the same as before
    columns of readers          as they are

so that eps stays what it is: ``eps d / k`` would say the same, but a config has one eps for all
norms, also for those that see no stream (of queries and keys). A head that is tied to the table
reads ``c E``, which its own norm makes up for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.state.gates import norm_offset
from ..core import families
from ..core.stream import Stream

if TYPE_CHECKING:
    from ..core.anatomy import Anatomy

Put = Callable[[Any, str, Any], None]


def cut(module: nn.Module, side: int, gone: Tensor, put: Put) -> None:
    """Take rows (side 0) or columns (side 1) out of a matrix, and what the module says of them.

    gone: their positions.
    """
    weight: Any = module.weight
    turned = hasattr(module, "nf")                   # the Conv1D of GPT-2 stores (in, out)
    dim = 1 - side if turned else side
    keep = torch.ones(weight.shape[dim], dtype=torch.bool, device=weight.device)
    keep[gone.to(weight.device)] = False
    index = keep.nonzero().squeeze(1)
    _become(module, "weight", weight.detach().index_select(dim, index), put)
    if side == 0 and getattr(module, "bias", None) is not None:
        _become(module, "bias", module.bias.detach()[index], put)
    name = "embedding_dim" if isinstance(module, nn.Embedding) else \
        (("nf", "nx") if turned else ("out_features", "in_features"))[side]
    put(module, name, len(index))


def _become(module: nn.Module, name: str, value: Tensor, put: Put) -> None:
    put(module, name, nn.Parameter(value.contiguous(), requires_grad=False))


def narrow(anatomy: Anatomy, stream: Stream, alive: Tensor, put: Put) -> None:
    """Take the channels that are not alive out of every matrix, table and norm.

    put: sets an attribute or a parameter of a module and remembers what was there.
    """
    model, gone = anatomy.model, (~alive).nonzero().squeeze(1)
    c = math.sqrt((stream.width - len(gone)) / stream.width)
    for place in stream.readers:
        cut(model.get_submodule(place.path), 1, gone, put)
    for place in stream.writers:
        module = model.get_submodule(place.path)
        cut(module, 0, gone, put)
        for name in ("weight", "bias"):
            if (p := getattr(module, name, None)) is not None:
                _become(module, name, _times(p, c), put)
    table = c
    for place in stream.tables:
        module = model.get_submodule(place.path)
        cut(module, 1, gone, put)
        if hasattr(module, "embed_scale"):           # sqrt(width) of the width it will have
            put(module, "embed_scale", module.embed_scale * c)
            put(module, "scalar_embed_scale", module.scalar_embed_scale * c)
            table = 1.0
        else:
            _become(module, "weight", _times(module.weight, c), put)
        for name in anatomy.tied(place):
            head = model.get_submodule(name.rpartition(".")[0])
            put(head, "weight", module.weight)
            put(head, "in_features", len(alive) - len(gone))
    index = alive.nonzero().squeeze(1)
    for path in stream.norms:
        norm = model.get_submodule(path)
        read = table if stream.tied and path in stream.final else 1.0
        offset = norm_offset(norm, norm.weight)
        small = norm.weight.detach()[index.to(norm.weight.device)]
        _become(norm, "weight", _times(small + offset, 1 / (c * read)) - offset, put)
        if hasattr(norm, "normalized_shape"):
            put(norm, "normalized_shape", (len(index),))
    for module in model.modules():
        for name in families.WIDTH:
            if vars(module).get(name) == stream.width:
                put(module, name, len(index))


def _times(p: Tensor, factor: float) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return (p.detach().to(wide) * factor).to(p.dtype)
