"""Scale and shift of a hidden state that follow the sample: a number of the batch says which.

    y = gamma_c * h + beta_c        c = the sample's entry of a key

Kept for backward: h, and one row of gamma per entry of the key, however many tokens a sample has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.call import context
from ..tape.cast import uncast


class Modulated(nn.Module):
    """``y = gamma_c * h + beta_c`` on one axis of the hidden state.

    key: of the batch. axis: -1 for tokens, 1 for maps (batch, channel, ...). Subclasses give
    :meth:`rows`.
    """

    def __init__(self, key: str, axis: int):
        super().__init__()
        self.key, self.axis = key, axis

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor | None]:
        """(gamma, beta or None), (n, channels) each, of n entries of the key."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        entries, x = context().by_entry(self.key, h)
        trailing = 0 if self.axis == -1 else h.dim() - 1 - self.axis
        before = x.dim() - 2 - trailing
        gain, shift = (None if t is None else
                       t.to(h.dtype).view(len(t), *(1,) * before, -1, *(1,) * trailing)
                       for t in self.rows(entries))
        y = x * gain if shift is None else torch.addcmul(shift, x, gain)
        return y.flatten(0, 1)

    @torch.no_grad()
    def plain(self, entry: int) -> dict[str, Tensor]:
        """gain and shift of one entry, as tensors of an :class:`~.gates.Affine`."""
        own = next(self.parameters())
        gain, shift = self.rows(torch.tensor([entry], device=own.device))
        return {"gain": gain[0], **({} if shift is None else {"shift": shift[0]})}


class Bank(Modulated):
    """One gain and shift for each entry from 1 on; entry 0 leaves h as it is, bit by bit.

    gain (sets, channels), ones; shift (sets, channels), zeros, or None.
    """

    def __init__(self, key: str, sets: int, channels: int, *, shift: bool, axis: int):
        super().__init__(key, axis)
        self.gain = nn.Parameter(torch.ones(sets, channels))
        self.shift = nn.Parameter(torch.zeros(sets, channels)) if shift else None
        for p in self.parameters():
            p.burnish_decay = False                  # it would pull gains to zero

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor | None]:
        def of(sets: Tensor, rest: float) -> Tensor:
            return torch.cat([torch.full_like(sets[:1], rest), sets])[entries]
        return of(self.gain, 1.0), None if self.shift is None else of(self.shift, 0.0)


class Conditioned(Modulated):
    """``gamma_c = 1 + W_g z_c + b_g``, ``beta_c = W_b z_c + b_b``: FiLM of an embedding z_c.

    z: a table (conditions, E) for all places; who holds it for others `owns` it, the others borrow
    it. gain.weight (channels, E), gain.bias, shift.weight, shift.bias: all zero at the start.
    """

    z: nn.Embedding

    def __init__(self, key: str, z: nn.Embedding, channels: int, *, shift: bool, axis: int,
                 owns: bool = False):
        super().__init__(key, axis)
        if owns:
            self.z = z
        else:
            self.__dict__["z"] = z
        self.gain = nn.Linear(z.embedding_dim, channels)
        self.shift = nn.Linear(z.embedding_dim, channels) if shift else None
        for linear in filter(None, (self.gain, self.shift)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return () if "z" in self._modules else (self.z.weight,)

    def rows(self, entries: Tensor) -> tuple[Tensor, Tensor | None]:
        z = self.z(entries)
        return 1 + _at(self.gain, z), None if self.shift is None else _at(self.shift, z)


def _at(linear: nn.Linear, z: Tensor) -> Tensor:
    """A generator's answer in its own precision, whatever the hidden states have."""
    with uncast(z):
        return linear(z)
