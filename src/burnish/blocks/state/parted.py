"""A stack of blocks in three parts: those in the middle are elsewhere, or are left out.

    head | body | tail        states cross two borders forward, their gradients two borders back

`Border` is the identity, but for what a `send` does to what crosses; its traffic is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tape.functions import once_differentiable

Send = Callable[[Tensor], Tensor]


@dataclass
class Traffic:
    """Bytes that have crossed: to the body and back from it, states and gradients."""

    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        return self.sent + self.received


class Border(torch.autograd.Function):
    """What arrives is what was sent, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, traffic: Traffic, out: bool, send: Send) -> Tensor:
        ctx.traffic, ctx.out, ctx.send = traffic, out, send
        return _cross(x, traffic, out, send)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _cross(g, ctx.traffic, not ctx.out, ctx.send), None, None, None


@torch.no_grad()
def _cross(x: Tensor, traffic: Traffic, out: bool, send: Send) -> Tensor:
    if out:
        traffic.sent += x.nbytes
    else:
        traffic.received += x.nbytes
    return send(x.clone())


def _changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


@contextmanager
def crossing(last_of_head: nn.Module, last_of_body: nn.Module, send: Send) -> Iterator[Traffic]:
    """Inside, states behind these two blocks cross a border; gives the traffic."""
    traffic = Traffic()
    with ExitStack() as stack:
        for block, out in ((last_of_head, True), (last_of_body, False)):
            hook = block.register_forward_hook(
                lambda m, a, y, out=out: _changed(
                    y, lambda t: Border.apply(t, traffic, out, send)))
            stack.callback(hook.remove)
        yield traffic


@contextmanager
def left_out(last_of_head: nn.Module, body: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the blocks of the body do not run: they answer with the state they are given, in the
    form in which the block before them answered."""
    form: list[Any] = []

    def passed(*args: Any, **kw: Any) -> Any:
        x = args[0] if args else next(iter(kw.values()))
        return (x, *form[-1][1:]) if isinstance(form[-1], tuple) else x

    def heard(module: nn.Module, args: Any, out: Any) -> None:
        form[:] = [(None, *out[1:]) if isinstance(out, tuple) else None]

    hook = last_of_head.register_forward_hook(heard)
    own = [vars(block).get("forward") for block in body]     # of other libraries, round the class's
    try:
        for block in body:
            block.__dict__["forward"] = passed       # before the class's own
        yield
    finally:
        hook.remove()
        for block, forward in zip(body, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """``||softmax(f(x)) - y||_2`` of each sample, (B,)."""
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return (p - nn.functional.one_hot(labels, p.shape[-1])).norm(dim=-1)


def averaged(states: Sequence[dict[str, Tensor]], samples: Sequence[int]) -> dict[str, Tensor]:
    """FedAvg: ``sum_k n_k / n state_k``, name by name, in double precision until the end."""
    n = sum(samples)
    return {name: sum((s[name].double() * (k / n) for s, k in zip(states, samples, strict=True)),
                      start=torch.zeros_like(like, dtype=torch.float64)).to(like.dtype)
            for name, like in states[0].items()}
