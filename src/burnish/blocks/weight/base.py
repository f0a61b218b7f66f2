"""The frozen weight that a forward reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..gpu.coded import Coded

if TYPE_CHECKING:
    from .provided import Weighted


class Base:
    """The frozen weight of one forward on x, brought (and decoded) when it is first asked for."""

    def __init__(self, op: Weighted, weight: Tensor | None, x: Tensor):
        self.op, self.given, self.x = op, weight, x
        self._value: Tensor | Coded | None = None

    @property
    def stored(self) -> Tensor | Coded:
        if self.given is None:
            self.given = self.op.frozen(self.x)
        return self.given

    @property
    def value(self) -> Tensor | Coded:
        """In the precision of the tokens."""
        if self._value is None:
            stored, dtype = self.stored, self.x.dtype
            self._value = stored if stored.dtype == dtype else stored.to(dtype)
        return self._value
