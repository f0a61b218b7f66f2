"""What a backdoor looks like from outside: a class that answers drift to, a trigger that leads
there, and the neurons that tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]


def universal(logits: Logits, x: Tensor, radius: float, steps: int, rate: float) -> Tensor:
    """One change (channels, h, w) of all pictures, no number above `radius`, that leads most away
    from what is answered without it: steps of sign ascent on that cross-entropy."""
    with torch.no_grad():
        said = logits(x).argmax(1)
    d = torch.zeros_like(x[0], requires_grad=True)
    for _ in range(steps):
        with torch.enable_grad():
            g, = torch.autograd.grad(F.cross_entropy(logits(x + d), said), d)
        d = (d + rate * g.sign()).detach().clamp(-radius, radius).requires_grad_()
    return d.detach()


def risen(logits: Logits, x: Tensor, change: Tensor) -> Tensor:
    """(classes,) by how many shares of the pictures each answer is more frequent with a change."""
    with torch.no_grad():
        shares = [F.one_hot(z.argmax(1), z.shape[1]).double().mean(0)
                  for z in (logits(x + change), logits(x))]
    return shares[0] - shares[1]


def stamped(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``(1 - m) x + m p``; mask (1, h, w), pattern (channels, h, w)."""
    return (1 - mask) * x + mask * pattern


def inverted(logits: Logits, x: Tensor, target: int, size: float, steps: int, rate: float
             ) -> tuple[Tensor, Tensor]:
    """(mask, pattern) of a small trigger that has `target` answered: Adam on
    ``CE + size mean(mask)``, mask = sigmoid(a), pattern within what pictures hold."""
    low, high = x.amin(), x.amax()
    a = torch.full_like(x[0, :1], -2.0).requires_grad_()
    b = torch.zeros_like(x[0]).requires_grad_()
    y = torch.full((len(x),), target, device=x.device)
    adam = torch.optim.Adam([a, b], rate)
    for _ in range(steps):
        with torch.enable_grad():
            mask, pattern = a.sigmoid(), low + (high - low) * b.sigmoid()
            loss = F.cross_entropy(logits(stamped(x, mask, pattern)), y) + size * mask.mean()
            a.grad, b.grad = torch.autograd.grad(loss, [a, b])
        adam.step()
    return a.detach().sigmoid(), low + (high - low) * b.detach().sigmoid()


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """name -> (rows, neurons) of the last forward: a map's channels are averaged over places."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            def hook(m: nn.Module, args: object, y: Tensor, name: str = name) -> None:
                seen[name] = y.flatten(2).mean(2) if y.dim() > 2 else y
            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


def two_clusters(values: Tensor, rounds: int = 50) -> Tensor:
    """Which of the numbers are of the upper of two means (Lloyd's, from the ends); none where all
    are the same."""
    v = values.double()
    low, high = v.min(), v.max()
    upper = torch.zeros_like(v, dtype=torch.bool)
    if low == high:
        return upper
    for _ in range(rounds):
        now = (v - high).abs() < (v - low).abs()
        if torch.equal(now, upper):
            break
        upper, low, high = now, v[~now].mean(), v[now].mean()
    return upper
