"""An update of some rows of a matrix, as an update of the whole of it.

A fused projection can be tuned by its rows (q, v) and as a whole at once. What is added to its rows
then stands among what is added to all of it, so that one product serves both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .term import Term


class Within(Term):
    """``Delta = 0`` but for its rows `a` to `b`, which are `term`'s; it owns no tensor itself."""

    def __init__(self, term: Term, rows: tuple[int, int], out: int):
        super().__init__()
        self.__dict__["term"] = term                 # it belongs to the module's slot
        self.rows, self.out = slice(*rows), out
        self.tokenwise, self.tiled = term.tokenwise, term.tiled
        self.cheap_tile = term.cheap_tile

    def theta(self) -> tuple[Tensor, ...]:
        return self.term.theta()

    def entries(self) -> tuple[Tensor, Tensor] | None:
        if (found := self.term.entries()) is None:
            return None
        index, values = found                        # rows above are rows before
        return index + self.rows.start * self.term.inp, values

    @property
    def keeps_input(self) -> bool:
        return self.term.keeps_input

    def reads(self, need_x: bool) -> tuple[Tensor, ...]:
        return self.term.reads(need_x)

    def undropped(self) -> None:
        self.term.undropped()

    def _padded(self, part: Tensor, dim: int) -> Tensor:
        shape = list(part.shape)
        shape[dim] = self.out
        whole = part.new_zeros(shape)
        whole.narrow(dim, self.rows.start, self.rows.stop - self.rows.start).copy_(part)
        return whole

    def dense(self) -> Tensor:
        return self._padded(self.term.dense(), -2)

    def plain(self, x: Tensor) -> Tensor:
        return self._padded(self.term.plain(x), -1)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        return self.term.forward_(x_NI, y_NO[:, self.rows], scale)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        return self.term.backward_(g_NO[:, self.rows], x_NI, kept, dx_NI, scale)

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[Any, ...], scale: float
              ) -> Tensor | None:
        part = self.term.gain_(g_NO[:, self.rows], x_NI, kept, scale)
        return None if part is None else self._padded(part, -1)

    def prepare(self) -> Any:
        return self.term.prepare()

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        return self._padded(self.term.tile(i0, i1, state), -2)

    def pull_straight(self, g_NO: Tensor, x_NI: Tensor, scale: float,
                      grads: list[Tensor | None]) -> bool:
        return self.term.pull_straight(g_NO[:, self.rows], x_NI, scale, grads)

    def pull(self, i0: int, i1: int, G: Tensor, state: Any, grads: list[Tensor | None]) -> Tensor:
        return self._padded(self.term.pull(i0, i1, G[..., self.rows, :], state, grads), -2)
