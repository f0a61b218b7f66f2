"""Adapters beside one module that come one after the other, each with what it knows of its inputs.

    f_e(x) = U relu(D x + b) + c            g = softmax_e(w_e . x- + a_e)           sum_e g_e f_e(x)
    AE_e(x-) = V (E x- + p) + q             rho_e = mean (AE_e(x-) - x-)^2

x- is a sample's mean over tokens, padding left out. z_e = |rho_e - mu_e| / s_e, mean and unbiased
deviation of the last errors that were recorded while AE_e trained: large where a sample is unlike
what adapter e has learnt from. Adapters of several recipes on a model weigh against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ...core.followed import compiling
from ..tape.cast import uncast
from ..update.objective import Riding
from .bottleneck import Bottleneck

#: errors from which on a deviation is told; before, nothing is unlike
FEWEST = 3


def token_means(h: Tensor) -> Tensor:
    """(samples, D): each sample's mean over its tokens that are no padding, of what a module of the
    call is given, (samples or a multiple, ..., D)."""
    call = context()
    n = call.samples[0] if call.samples else len(h)
    if h.dim() < 2 or len(h) % n:
        raise RecipeError(f"a module is given {tuple(h.shape)} for {n} samples: expected the rows "
                          "of each together, samples first")
    x = h.reshape(n, -1, h.shape[-1])
    if (valid := call.valid) is None or valid.shape != x.shape[:2]:
        return x.mean(1)
    m = valid.to(x).unsqueeze(-1)
    return (x * m).sum(1) / m.sum(1).clamp_min(1)


class Descriptor(nn.Module):
    """An autoencoder D -> `width` -> D, both linear, and its last `buffer` errors, oldest first; -1
    where there is none yet."""

    record: Tensor

    def __init__(self, d: int, width: int, buffer: int, rate: float = 1.0):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d, width), nn.Linear(width, d)
        for linear in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(linear.weight, a=5 ** 0.5)
            nn.init.zeros_(linear.bias)
        for p in self.parameters():
            p.burnish_lr = rate                          # type: ignore[attr-defined]
        self.register_buffer("record", torch.full((buffer,), -1.0))

    def errors(self, x: Tensor) -> Tensor:
        """rho (n,) of means x (n, D), in the tensors' own precision."""
        with uncast(x):
            x = x.to(self.encoder.weight.dtype)
            return (self.decoder(self.encoder(x)) - x).square().mean(1)

    @torch.no_grad()
    def remember(self, errors: Tensor) -> None:
        """These are the latest."""
        both = torch.cat([self.record, errors.to(self.record)])
        self.record.copy_(both[len(errors):])

    @torch.no_grad()
    def unlike(self, x: Tensor) -> Tensor:
        """z (n,) of means x (n, D)."""
        rho, there = self.errors(x), self.record >= 0
        r, n = self.record.to(rho), there.sum()
        mean = (r * there).sum() / n.clamp_min(1)
        s = (((r - mean).square() * there).sum() / (n - 1).clamp_min(1)).sqrt()
        z = (rho - mean).abs() / s.clamp_min(torch.finfo(s.dtype).tiny)
        return torch.where(n >= FEWEST, z, torch.zeros_like(z))


class Modular(nn.Module):
    """One adapter at a site that may grow: ``g_e f_e(x)``, beside as many others as are active.

    number: of the block.  path: of the module it writes to.  first: nothing stands beside it while
    it trains, so its router has no gradient and stays as it is drawn.
    """

    def __init__(self, number: int, path: str, d: int, width: int, descriptor: Descriptor,
                 first: bool):
        super().__init__()
        self.number, self.path = number, path
        self.functional, self.descriptor = Bottleneck(d, width), descriptor
        self.router = nn.Linear(d, 1).requires_grad_(not first)
        self.riding = Riding()                           # alone; attached, the model's
        self.heard: list[Tensor] | None = None           # means of what passes, while one listens
        self.__dict__["slot"] = None                     # it holds this module: no child of it

    def attached(self, attacher: Any) -> None:
        """Share the scale of the loss with the model, and find the others here."""
        self.riding = attacher.state.riding
        self.__dict__["slot"] = attacher.slot(self.path)

    def active(self) -> list[Modular]:
        """Those that answer in this call, in the order in which they came."""
        slot: Any = self.slot
        if slot is None:
            return [self]
        names = slot.state.active if compiling() else context().active
        weights = dict(names)
        found = [slot.module_of(p) for p in slot.parts if weights.get(p.adapter)]
        return [m for m in found if isinstance(m, Modular)] or [self]

    def weights(self, x: Tensor) -> tuple[list[Modular], Tensor]:
        """(the adapters, g (n, adapters)) of means x (n, D)."""
        all_ = self.active()
        with uncast(x):
            z = [m.router(x.to(m.router.weight.dtype)) for m in all_]
            return all_, torch.cat(z, 1).softmax(1)

    def forward(self, h: Tensor) -> Tensor:
        x = token_means(h)
        if self.heard is not None:
            self.heard.append(x.detach())
        all_, g = self.weights(x)
        y = self.functional(h)
        if len(all_) > 1:
            own = g[:, next(i for i, m in enumerate(all_) if m is self)]
            own = own.repeat_interleave(len(h) // len(own))
            y = y * own.view(-1, *(1,) * (h.dim() - 1)).to(y.dtype)
        elif self.training and torch.is_grad_enabled() and self.router.weight.requires_grad:
            raise RecipeError(f"an adapter that was added to {self.path} is weighed against those "
                              "that were there, and none is in use: use them together, "
                              "tuned.use({...}, train=...)")
        return self._described(x.detach(), y)

    def _described(self, x: Tensor, y: Tensor) -> Tensor:
        """y, on whose way back the descriptor learns what has passed."""
        wanted = self.riding.collected is not None or torch.is_grad_enabled()
        if not (wanted and self.descriptor.encoder.weight.requires_grad):
            return y
        errors = self.descriptor.errors(x)
        noted, key = context().noted, ("described", id(self))
        if self.training and key not in noted:           # once, though backward runs it again
            noted[key] = True
            self.descriptor.remember(errors)
        return self.riding.on(y, errors.mean(), 1.0)


@contextmanager
def listening(modules: Iterable[Modular]) -> Iterator[None]:
    """Inside, the first adapter that answers at each site hears what passes (`heard`)."""
    heard = list(modules)
    for m in heard:
        m.heard = []
    try:
        yield
    finally:
        for m in heard:
            m.heard = None


@torch.no_grad()
def shifted(sites: Sequence[Sequence[Modular]], run: Any, batches: Iterable[Any],
            threshold: float) -> int | None:
    """The number of the first block, in the first of the batches in which there is any, where what
    passes is unlike what every adapter there has learnt from: ``min_e mean z_e > threshold``.
    None: nowhere in any.

    sites: the adapters of each block, in the order of the blocks.  run: a forward of a batch.
    """
    for batch in batches:
        with listening(s[0] for s in sites):
            run(batch)
            for site in sites:
                if not site[0].heard:
                    raise RecipeError(f"{site[0].path} did not run: a scan goes through the whole "
                                      "model")
                x = torch.cat(site[0].heard)
                if min(float(m.descriptor.unlike(x).mean()) for m in site) > threshold:
                    return site[0].number
    return None
