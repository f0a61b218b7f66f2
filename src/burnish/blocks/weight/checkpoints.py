"""Whole checkpoints, read and mixed one tensor at a time.

A checkpoint is any mapping name -> tensor: a state dict, or a memory-mapped file that reads a
tensor when asked. What is made of several is a stream of (name, tensor), so that no more than one
tensor of the result is in memory; sums are taken in fp64, piece by piece, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError

Checkpoint = Mapping[str, Tensor]
#: a name -> the weight of each checkpoint there, (k,)
Weights = Callable[[str], Sequence[float]]

#: entries handled at once (8 MiB in fp64)
PIECE = 1 << 20
#: statistics of the data, which a merge does not average: they are measured again
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def facts(model: Checkpoint, name: str) -> Tensor:
    """A tensor whose shape, dtype and layout count; of a file that can tell, none of its values."""
    told = getattr(model, "meta", None)
    return model[name] if told is None else told(name)


def blended(tensors: Sequence[Tensor], rule: Callable[[Tensor, int], Tensor],
            piece: int = PIECE) -> Tensor:
    """A tensor like the first of several of one shape: rule((k, n) fp64 piece, first entry)."""
    first = tensors[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    flat = out.view(-1)
    for i in range(0, flat.numel(), piece):
        rows = torch.stack([t.reshape(-1)[i : i + piece].to(first.device, torch.float64)
                            for t in tensors])
        flat[i : i + piece] = rule(rows, i).to(first.dtype)
    return out


def mixed(models: Sequence[Checkpoint], weights: Weights, piece: int = PIECE
          ) -> Iterator[tuple[str, Tensor]]:
    """``sum_i alpha_i theta_i`` tensor by tensor, in the dtypes of the first, whose whole numbers
    and statistics of data stay. Raises ConfigError for models of different architectures."""
    same_architecture(models)
    for name in models[0]:
        kept = name.rpartition(".")[2] in STATISTICS
        if kept or not facts(models[0], name).is_floating_point():
            yield name, models[0][name]
            continue
        alpha = torch.tensor([float(w) for w in weights(name)], dtype=torch.float64)
        yield name, blended([m[name] for m in models],
                            lambda rows, _, a=alpha: a.to(rows.device) @ rows, piece)


def same_architecture(models: Sequence[Checkpoint]) -> None:
    """Raises ConfigError at the first name or shape that is not in all."""
    for m in models[1:]:
        if odd := sorted(m.keys() ^ models[0].keys()):
            raise ConfigError(f"a soup needs checkpoints of one architecture; {odd[0]} is not in "
                              "all")
        for n in models[0]:
            one, two = facts(models[0], n).shape, facts(m, n).shape
            if one != two:
                raise ConfigError(f"a soup needs checkpoints of one architecture; {n} is "
                                  f"{list(two)} beside {list(one)}")


def weight_gradients(model: nn.Module, models: Sequence[Checkpoint], weights: Weights,
                     inputs: Any, value: Callable[[Any], Tensor],
                     layer: Callable[[str], str] = lambda name: "") -> dict[str, Tensor]:
    """dL/dalpha per layer, (k,), for ``L = value(f(inputs; sum_i alpha_i theta_i))``; whatever else
    `value` depends on gets its gradient as in any backward.

    ``dL/dalpha_i = <dL/dtheta, theta_i>``, tensor by tensor, so that one model and one gradient are
    in memory. inputs: a mapping of keywords, or the one argument.
    """
    theta = dict(mixed(models, weights))
    names = [n for n, _ in model.named_parameters() if n in theta and theta[n].is_floating_point()]
    leaves = {n: theta[n].requires_grad_(True) for n in names}
    args, kw = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    value(torch.func.functional_call(model, theta, args, kw)).backward()
    out = {layer(n): torch.zeros(len(models)) for n, t in theta.items() if t.is_floating_point()}
    for n in names:
        g, leaves[n].grad = leaves[n].grad, None
        if g is not None:
            flat = g.flatten().to(torch.promote_types(g.dtype, torch.float32))
            out[layer(n)] += torch.stack([flat @ m[n].flatten().to(flat) for m in models]).cpu()
    return out
