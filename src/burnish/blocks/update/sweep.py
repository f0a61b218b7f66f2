"""One pass over a strip: a slice of one large tensor, or many small tensors one behind another.

    load states (codec) and weights (rounding) -> move (rule) -> save both

What is worked on is flat and stays in the last cache, so a strip takes as many kernels as one
tensor does and as many trips to memory as the arithmetic needs. Its temporaries are flat tensors of
at most :func:`strip` elements of four bytes, whatever the sizes and the number of the tensors: none
for fp32 AdamW and SGD, one for `lion`, at most four with weights of half precision, ten with coded
states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codecs import Codec, Parts
from .noise import CounterNoise
from .numerics import Numerics, widened
from .rules import Rule, Whole, move

State = dict[str, Any]


def strip(device: torch.device) -> int:
    """Elements worked on at a time: buffers of 1 MiB on a CPU, which its last cache holds, and of
    32 MiB elsewhere."""
    return 1 << (18 if device.type == "cpu" else 23)


@dataclass
class Bunch:
    """Slices of tensors that take the same step: their names and states, and of each the span
    ``[lo, hi)``, in memory order, of the flat weight and of its gradient."""

    names: list[str]
    states: list[State]
    spans: list[tuple[int, int]]
    ws: list[Tensor]
    gs: list[Tensor]


def sweep(rule: Rule, codec: Codec, numerics: Numerics, bunch: Bunch, t: int,
          group: Mapping[str, Any], seed: int) -> None:
    """Step number `t` of the slices of a bunch."""
    b = bunch
    xs, flat = numerics.load(b.ws, b.states, b.spans)
    moved(rule, codec, b, xs, widened(b.gs, b.spans)[0], t, group, seed, group["lr"],
          group["weight_decay"])
    numerics.save(b.ws, b.states, b.spans, xs, flat,
                  lambda: [CounterNoise(seed, f"{n}/round") for n in b.names], t)


def sweep_whole(rule: Whole, numerics: Numerics, bunch: Bunch, forms: list[tuple[int, ...]],
                t: int, group: Mapping[str, Any], seed: int) -> None:
    """The same for a rule of whole tensors that can step several, in these shapes, together."""
    b = bunch
    xs, flat = numerics.load(b.ws, b.states, b.spans)
    us = rule.together([g.view(f) for g, f in zip(b.gs, forms, strict=True)],
                       [x.view(f) for x, f in zip(xs, forms, strict=True)], b.states, t, group)
    if group["weight_decay"]:
        torch._foreach_mul_(xs, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(xs, [u.view(-1) for u in us], alpha=-group["lr"])
    numerics.save(b.ws, b.states, b.spans, xs, flat,
                  lambda: [CounterNoise(seed, f"{n}/round") for n in b.names], t)


def moved(rule: Rule, codec: Codec, b: Bunch, xs: list[Tensor], gs: list[Tensor], t: int,
          group: Mapping[str, Any], seed: int, lr: float, decay: float) -> None:
    """Move `xs` along what the rule makes of `gs`; states go out of and back into their codec."""
    parts = {s: [state_parts(state, s) for state in b.states] for s in rule.states}
    held = {s: codec.load(parts[s], b.spans) for s in parts}
    move(rule, xs, gs, {s: values for s, (values, _) in held.items()}, t, group, lr, decay)
    if codec.view:                                   # changed in place
        return
    while held:
        s, (values, flat) = held.popitem()
        codec.save(parts[s], b.spans, values, flat,
                   [CounterNoise(seed, f"{n}/{s}") for n in b.names], t)
        del values, flat


def state_parts(state: State, name: str) -> Parts:
    """The tensors of one state: {"": tensor}, or {"codes": ..., "absmax": ...}."""
    if name in state:
        return {"": state[name]}
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}


def cut(sizes: list[int], most: int, block: int) -> Iterator[tuple[int, int]]:
    """Runs of tensors, as ranges, of at most `most` elements together; a tensor whose end is not
    the end of a block ends its run."""
    first = held = 0
    for i, n in enumerate(sizes):
        if i > first and held + n > most:
            yield first, i
            first, held = i, 0
        held += n
        if n % block:
            yield first, i + 1
            first, held = i + 1, 0
    if first < len(sizes):
        yield first, len(sizes)
