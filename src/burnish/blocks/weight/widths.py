"""One weight in several widths at once, of which one answers: whole numbers of b bits for each b,
and beside each its own low-rank update.

    y = x Q_b(W)^T + s (x A_b^T) B_b^T          b: the width that is chosen

Nothing is shared between widths, so what one learns changes no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, nearest
from ...core.site import Place
from .factor import Chain
from .grids import WholeProvider
from .quantise import Quantiser
from .term import Provider, Term


class Grids(Provider):
    """Holds a weight once for each of several quantisers, by their bits; `chosen` answers.

    only: hold that width alone. Files say which is chosen and which there are.
    """

    def __init__(self, weight: Tensor, place: Place, quantisers: Mapping[int, Quantiser],
                 only: int | None = None):
        super().__init__()
        self.__dict__["quantisers"] = dict(quantisers)
        self.place = place
        for bits in quantisers if only is None else (only,):
            self.hold(bits, weight)
        self.chosen = max(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that are held, ascending."""
        return tuple(sorted(int(name[1:]) for name in self._modules))

    def at(self, bits: int) -> WholeProvider:
        found: Any = self._modules[f"q{bits}"]
        return found

    def hold(self, bits: int, weight: Tensor) -> None:
        self.add_module(f"q{bits}", WholeProvider(weight, self.place, self.quantisers[bits]))

    def choose(self, bits: int) -> None:
        """Answer in that width. ConfigError where it is not held."""
        if bits not in self.widths:
            raise ConfigError(f"{self.place.name} is held in {_listed(self.widths)} bits, not in "
                              f"{bits}")
        self.chosen = bits

    def keep(self) -> None:
        """Hold no other width than the chosen one."""
        for bits in self.widths:
            if bits != self.chosen:
                del self._modules[f"q{bits}"]

    def weight(self) -> Tensor:
        return self.at(self.chosen).weight()

    def matrix(self, expert: int) -> Tensor:
        return self.at(self.chosen).matrix(expert)

    @property
    def dtype(self) -> torch.dtype:
        return self.at(self.chosen).dtype

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.chosen, *self.widths])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: in a state dict of torch's the codes come beside it."""

    def remade(self, weight: Tensor, state: Tensor) -> None:
        chosen, *widths = state.tolist()
        for bits in widths:
            if bits not in self.widths:
                self.hold(bits, weight)
        for bits in self.widths:
            if bits not in widths:
                del self._modules[f"q{bits}"]
        self.chosen = chosen


class Chains(Chain):
    """``Delta = s B_b A_b``: a pair A_b (rank, in), B_b (out, rank) for each width b, each starting
    as a :class:`~burnish.blocks.weight.factor.Chain`; `chosen` answers, and is all that backward
    knows of. only: the others have rank 0."""

    def __init__(self, place: Place, widths: Sequence[int], rank: int, scale: float,
                 dropout: float = 0.0, only: int | None = None):
        Term.__init__(self)
        self.widths, self.scale, self.dropout = tuple(widths), scale, dropout
        self.size = place.numel
        for b in self.widths:
            one = Chain(place, rank if only in (None, b) else 0)
            self.register_parameter(f"A{b}", one.A)
            self.register_parameter(f"B{b}", one.B)
        self.ranked = {f"{name}{b}": d for b in self.widths       # type: ignore[misc]
                       for d, name in enumerate("AB")}
        self.chosen = max(self.widths) if only is None else only

    def factors_of(self, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
        """(A, B) of a width."""
        A, B = (self._parameters[f"{name}{bits}"] for name in "AB")
        assert A is not None and B is not None
        return A, B

    @property
    def A(self) -> nn.Parameter:                                  # type: ignore[override]
        return self.factors_of(self.chosen)[0]

    @property
    def B(self) -> nn.Parameter:                                  # type: ignore[override]
        return self.factors_of(self.chosen)[1]

    def theta(self) -> tuple[Tensor, ...]:
        return self.factors_of(self.chosen)

    def choose(self, bits: int) -> None:
        """Answer with the pair of that width. ConfigError where there is none."""
        if bits not in self.widths or not len(self.factors_of(bits)[0]):
            there = [b for b in self.widths if len(self.factors_of(b)[0])]
            raise ConfigError(f"there are factors for {_listed(there)} bits, not for {bits}")
        self.chosen = bits

    def settled(self) -> dict[str, int]:
        """bits: the one width that is left, 0 where several are."""
        left = [b for b in self.widths if len(self.factors_of(b)[0])]
        return {"bits": left[0] if len(left) == 1 < len(self.widths) else 0}

    # which answers is part of the adapter
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.chosen])

    def set_extra_state(self, state: Tensor) -> None:
        self.chosen = int(state[0])


def choose(layers: Mapping[str, tuple[Grids, Chains]], configuration: Mapping[str, int]) -> None:
    """Let layers answer in these widths; the others stay as they are. ConfigError for a layer or a
    width that is not there; nothing is changed then."""
    was = {n: q.chosen for n, (q, _) in layers.items()}
    try:
        for name, bits in configuration.items():
            if name not in layers:
                raise ConfigError(f"there is no layer {name!r} held in several widths"
                                  f"{nearest(name, layers)}")
            for part in layers[name]:
                part.choose(bits)
    except ConfigError:
        for name, bits in was.items():
            for part in layers[name]:
                part.chosen = bits
        raise


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
