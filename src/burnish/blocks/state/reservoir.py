"""A memory of samples that have passed: so many of them, each as likely to be there as another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, DataError


class Reservoir:
    """At most `size` samples of all that were shown, every one with the same chance (Vitter's
    algorithm R). Batches are mappings of tensors with samples along the first axis, the same keys
    and shapes each time; other entries are no part of a sample and are left out.

    What is drawn comes from `seed`, and ``state_dict`` holds where that stands.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ConfigError(f"a memory of {size} samples: expected at least 1")
        self.size, self.seen = size, 0
        self._held: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.size, self.seen)

    @torch.no_grad()
    def show(self, batch: Mapping[str, Any]) -> None:
        """Every sample of a batch, one after the other."""
        samples = _samples(batch)
        n = len(next(iter(samples.values())))
        if self._held and {k: v.shape[1:] for k, v in samples.items()} != \
                {k: v.shape[1:] for k, v in self._held.items()}:
            raise DataError("a memory holds samples of one form: those shown first had "
                            f"{_form(self._held)}, these have {_form(samples)}")
        for k, v in samples.items():
            if k not in self._held:
                self._held[k] = torch.zeros(self.size, *v.shape[1:], dtype=v.dtype)
        for i in range(n):
            place = self.seen if self.seen < self.size else \
                int(torch.randint(self.seen + 1, (), generator=self._random))
            self.seen += 1
            if place < self.size:
                for k, v in samples.items():
                    self._held[k][place] = v[i]

    def draw(self, n: int) -> dict[str, Tensor]:
        """n samples, none twice; all there are where there are fewer."""
        chosen = torch.randperm(len(self), generator=self._random)[:n]
        return {k: v[chosen] for k, v in self._held.items()}

    def beside(self, batch: Mapping[str, Any], n: int, key: str = "replay") -> dict[str, Any]:
        """A batch with n samples of the memory behind its own, and `key`: 1 for those, else 0."""
        own = _samples(batch)
        mine = len(next(iter(own.values())))
        drawn = self.draw(n)
        more = len(next(iter(drawn.values()))) if drawn else 0
        out = dict(batch)
        for k, v in own.items() if more else ():
            if k not in drawn:
                raise DataError(f"the memory's samples have no {k!r}: {_form(self._held)}")
            out[k] = torch.cat([v, drawn[k].to(v.device)])
        out[key] = torch.tensor([0] * mine + [1] * more)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "held": dict(self._held), "random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
        self._held = {k: v.clone() for k, v in state["held"].items()}
        self._random.set_state(state["random"])


def _samples(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    if len({len(v) for v in tensors.values()}) != 1:
        raise DataError("a batch is a mapping of tensors with as many samples each, not "
                        f"{ {k: tuple(v.shape) for k, v in tensors.items()} }")
    return tensors


def _form(samples: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape[1:])}" for k, v in samples.items())
