"""What a network makes of samples and of copies in another style, and how far apart they are.

Behind each stage of a convolutional network stands a map of elementwise layers
(:func:`elementwise`), and once, behind the first stage or the second, a copy of every sample in a
style between its own and another's (:func:`mixed`): one forward of 2 B rows, the copies last.

    L = mean f_w(z' - z)^2        z, z' (B, D): what the head reads of samples and copies
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import CheckError, ConfigError
from ..update.rules import accumulator

_EPS = 1e-6

Turn = tuple[Callable[[], Tensor], Tensor]


def elementwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``v <- relu(w_i v + b_i)`` for each i, the last without relu; weight, bias (depth, ...)."""
    for w, b in zip(weight[:-1], bias[:-1], strict=True):
        x = F.relu(w * x + b)
    return weight[-1] * x + bias[-1]


def mixed(x: Tensor, share: Tensor, other: Sequence[int]) -> Tensor:
    """x (B, C, H, W), each channel of a sample normalised over its places and given ``share`` (B,)
    of its own mean and deviation, and the rest of those of the sample `other`. No gradient goes
    through these."""
    with torch.no_grad():
        var, mean = torch.var_mean(x, (2, 3), keepdim=True)
        std = (var + _EPS).sqrt()
        own = share.to(x).view(-1, 1, 1, 1)
        to_mean = own * mean + (1 - own) * mean[other]
        to_std = own * std + (1 - own) * std[other]
    return (x - mean) / std * to_std + to_mean


def misaligned(aux: Sequence[Tensor], main: Sequence[Tensor]) -> Tensor:
    """``mean (a - m)^2`` of two gradients, all their numbers in a row, less their mean and over
    their deviation; the main one is constant."""
    def even(grads: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([g.flatten() for g in grads])
        return (flat - flat.mean()) / flat.std()

    return (even(aux) - even(main).detach()).square().mean()


class Styled:
    """The hooks: at the stages and at what the head reads. draw: makes one forward's style, before
    it; maps: weight and bias for each stage."""

    def __init__(self, who: str, stages: Sequence[nn.Module], head: nn.Module, alpha: float,
                 maps: Sequence[tuple[Tensor, Tensor]] = ()):
        self.who, self.stages, self.head, self.alpha, self.maps = who, stages, head, alpha, maps
        self.rng: random.Random | None = None       # None: samples alone
        self.shapes: dict[int, torch.Size] = {}
        self.kind: dict[str, Any] = {}
        self.lowest = 0.0
        self._read: Tensor | None = None

    def hooks(self) -> list[Any]:
        return [m.register_forward_hook(self._stage(i)) for i, m in enumerate(self.stages)] + [
            self.head.register_forward_pre_hook(self._reads)]

    def first(self) -> list[Tensor]:
        """f_w at its start, [weight, bias], once a forward has told the widths."""
        if self.lowest < 0:
            raise ConfigError(f"{self.who}: a map behind a stage is the identity of what is not "
                              f"negative, and this model's stages reach {self.lowest:g}")
        if len(self.shapes) < len(self.stages):
            raise ConfigError(f"{self.who}: not every stage of this model ran")
        z = self.seen()
        like: dict[str, Any] = {"dtype": accumulator(z.dtype), "device": z.device}
        return [torch.ones(10, z.shape[1], **like).requires_grad_(),
                torch.zeros(10, z.shape[1], **like).requires_grad_()]

    def start(self, channels: bool) -> dict[str, nn.Parameter]:
        """Maps that are the identity, for the shapes that were seen; they stand from now on."""
        z, out = self.kind, {}
        for i, shape in sorted(self.shapes.items()):
            size = (5, shape[0], 1, 1) if channels else (5, *shape)
            out[f"{i}.weight"] = nn.Parameter(torch.ones(size, **z))
            out[f"{i}.bias"] = nn.Parameter(torch.zeros(size, **z))
        self.maps = [(out[f"{i}.weight"], out[f"{i}.bias"]) for i in sorted(self.shapes)]
        return out

    def seen(self) -> Tensor:
        """What the head read last, still there."""
        if self._read is None or self._read.dim() != 2 or len(self._read) % 2:
            raise ConfigError(f"{self.who}: the head of this model does not read a row for each "
                              "sample")
        return self._read

    def taken(self) -> tuple[Tensor, Tensor]:
        """(z, z') of the last forward."""
        a, b = self.seen().chunk(2)
        self._read = None
        return a, b

    def _reads(self, module: Any, args: tuple) -> None:
        self._read = args[0] if args and isinstance(args[0], Tensor) else None

    def _stage(self, i: int) -> Any:
        def behind(module: Any, args: tuple, out: Any) -> Any:
            if not isinstance(out, Tensor) or out.dim() != 4:
                raise ConfigError(f"{self.who}: stage {i + 1} of this model is no map of channels "
                                  "and two sides")
            self.shapes[i] = out.shape[1:]
            self.kind = {"dtype": accumulator(out.dtype), "device": out.device}
            self.lowest = min(self.lowest, float(out.detach().min())) if not self.maps else 0.0
            if self.rng is not None and torch.is_grad_enabled():
                out = self._copied(i, out)
            if self.maps:
                weight, bias = self.maps[i]
                if weight.dim() == 4 and weight.shape[1:] != out.shape[1:] and \
                        weight.shape[2:] != (1, 1):
                    raise ConfigError(f"{self.who}: stage {i + 1} has a map of "
                                      f"{list(weight.shape[1:])} and this batch makes "
                                      f"{list(out.shape[1:])}: samples as large as the source's, "
                                      "or channels=True")
                out = elementwise(out.to(weight.dtype), weight, bias).to(out.dtype)
            return out
        return behind

    def _copied(self, i: int, out: Tensor) -> Tensor:
        if i == 0:
            if len(out) < 2:
                raise ConfigError(f"{self.who}: styles are mixed between samples: two at once are "
                                  "needed")
            self._first = self.rng.random() > 0.5
            return torch.cat([out, self._style(out) if self._first else out])
        if i == 1 and not self._first:
            a, b = out.chunk(2)
            return torch.cat([a, self._style(b)])
        return out

    def _style(self, x: Tensor) -> Tensor:
        assert self.rng is not None
        share = [self.rng.betavariate(self.alpha, self.alpha) for _ in x]
        return mixed(x, torch.tensor(share, dtype=torch.float64),
                     self.rng.sample(range(len(x)), len(x)))


class Swapped:
    """A part of an ``Adapting``: other values of the model's tensors, there while a batch runs, and
    tensors that its loss reads."""

    def __init__(self, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor],
                 read: Mapping[str, Tensor]):
        self.params, self.values, self.read = params, dict(values), dict(read)

    def begin(self) -> None:
        """The values stay as they are learnt."""

    def state(self) -> dict[str, Tensor]:
        return {f"theta.{k}": v.clone() for k, v in self.values.items()} | {
            k: v.detach().clone() for k, v in self.read.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for k, v in self.values.items():
                v.copy_(state[f"theta.{k}"])
            for k, v in self.read.items():
                v.copy_(state[k])

    @contextmanager
    def asked(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for n, p in self.params.items():
            p.data, self.values[n] = self.values[n], p.data


def learnt(styled: Styled, theta: Mapping[str, nn.Parameter], turns: Iterable[Turn], rate: float
           ) -> tuple[Tensor, Tensor] | None:
    """f_w's weight and bias, (10, D), and `theta` moved; None where there was no batch.

    turns: for every batch what runs it and gives the logits of all 2 B rows, and the labels. Each
    is run twice: Adam on theta goes down ``CE(z) + CE(z') + L``, then with a tenth of the `rate`
    Adam on f_w goes down 0.1 :func:`disagreement` of L and the rest.
    """
    params, f_w = list(theta.values()), None
    of_head = {id(p) for p in styled.head.parameters()}
    backbone = [p for p in params if id(p) not in of_head]
    whole = torch.optim.Adam(params, rate)
    for run, y in turns:
        logits = run()
        if f_w is None:
            f_w = styled.first()
            small = torch.optim.Adam(f_w, 0.1 * rate)
        main, aux = halves(logits, y), apart(styled, f_w)
        if not bool((main + aux).isfinite()):
            raise CheckError(f"{styled.who}: the loss of a source batch is not finite")
        step(whole, params, main + aux)
        main, aux = halves(run(), y), apart(styled, f_w)
        step(small, f_w, 0.1 * disagreement(aux, main, backbone))
    return None if f_w is None else (f_w[0].detach(), f_w[1].detach())


def apart(styled: Styled, f_w: Sequence[Tensor]) -> Tensor:
    """L of the last forward."""
    z, other = styled.taken()
    return elementwise((other - z).to(f_w[0].dtype), f_w[0], f_w[1]).square().mean()


def halves(logits: Tensor, y: Tensor) -> Tensor:
    """CE(z) + CE(z')."""
    return sum((F.cross_entropy(h, y.to(h.device)) for h in logits.chunk(2)), logits.new_zeros(()))


def disagreement(aux: Tensor, main: Tensor, backbone: Sequence[Tensor]) -> Tensor:
    """Between the gradients of both losses, as a function of what the auxiliary one has."""
    g = torch.autograd.grad(aux, backbone, create_graph=True, allow_unused=True)
    m = torch.autograd.grad(main, backbone, allow_unused=True)
    both = [(a, b) for a, b in zip(g, m, strict=True) if a is not None and b is not None]
    return misaligned([a for a, _ in both], [b for _, b in both])


def step(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], loss: Tensor) -> None:
    """Of these alone, by their own gradients; no other ``.grad`` is touched, nor these after it."""
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    was = [p.grad for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    for p, g in zip(params, was, strict=True):
        p.grad = g
