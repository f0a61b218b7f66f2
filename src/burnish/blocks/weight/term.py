"""What a method writes: where a frozen weight comes from, what is added to it, what is made of it.

Letters: N tokens, O out, I in. :mod:`~burnish.blocks.weight.provided` evaluates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from .persample import term_norms

if TYPE_CHECKING:
    from ...core.site import Place
    from ..gpu.coded import Coded
    from .integer import Grid
    from .panels import Panels
    from .provided import Weighted


#: (expert, first row, end of its rows): whose tokens lie where
Run = tuple[int, int, int]

#: what a term may drop in training: see dropped.py, and rotation.py for the last
DROPS = ("dropout", "drop_path", "rank_dropout", "module_dropout", "block_dropout")


def asks_to_drop(term: Any) -> bool:
    """Is a probability of dropping set on a term, or on a part of a recipe?"""
    return any(getattr(term, word, 0) for word in DROPS)


class Provider(nn.Module):
    """Holds a frozen weight in some form; its tensors are buffers.

    One that chose by data what it holds says so in its extra state (one tensor), which files have.
    """

    def weight(self) -> Tensor:
        """The weight as stored by the module, possibly a temporary; asked again in backward."""
        raise NotImplementedError

    def coded(self, like: Tensor) -> Coded | None:
        """The weight in the form that it is held in, where products with tokens like these decode
        it themselves; None where they take :meth:`weight`."""
        return None

    def road(self) -> str | None:
        """Why products with it run by torch's operators, "" where by Triton's kernels; None where
        there are none (see blocks/gpu/road.py)."""
        return None

    def remade(self, weight: Tensor, state: Tensor) -> None:
        """Hold the weight, as it was, by the choice that an extra state says."""
        raise NotImplementedError

    def matrix(self, expert: int) -> Tensor:
        """Of a stack (experts, a, b) the matrix of one expert, (a, b), possibly a temporary. One
        that makes it without the others overrides this."""
        return self.weight()[expert]

    @property
    def grid(self) -> Grid | None:
        """The one 8-bit grid on which its layer reads all of its input, where there is one."""
        return None

    @property
    def at_ends(self) -> bool:
        """Does its layer read, or pass on, other numbers than it is given and makes, so that
        :meth:`given` and :meth:`gives` are to be asked?"""
        return self.grid is not None

    def given(self, x: Tensor) -> Tensor:
        """What the layer reads of its input."""
        return x

    def gives(self, y: Tensor) -> Tensor:
        """What is passed on of the layer's result."""
        return y

    @property
    def nbytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers())


class Term(nn.Module):
    """What is added to one (out, in) matrix. Its parameters are its tensors.

    Subclasses give :meth:`dense` (obvious and differentiable: the reference, the merge, the
    fallback) and, where there is something cheaper, one of two faster forms:

    tokenwise: :meth:`forward_` and :meth:`backward_` work on activations, never on the weight.
    tiled: :meth:`tile` and :meth:`pull` generate the update panel by panel.
    """

    tokenwise: ClassVar[bool] = False
    tiled: ClassVar[bool] = False
    #: has it a form beside a convolution, on what that reads (``beside(conv, x)``)?
    alongside: ClassVar[bool] = False
    #: may a tokenwise update be asked for panel by panel (:meth:`tile` never makes all of it)?
    cheap_tile: ClassVar[bool] = False

    #: is it the same update once more, for another module that reads a tied tensor?
    mirrors: ClassVar[bool] = False

    def mirrored(self, end: Place) -> Term:
        """The same update of a tied tensor at another module that reads it: a table, or a linear
        whose matrix is the transpose. It owns nothing."""
        raise NotImplementedError

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """Parameters this term reads and others own (what its recipe shares among places)."""
        return ()

    def theta(self) -> tuple[Tensor, ...]:
        """The tensors gradients are wanted for, in a fixed order."""
        if self._modules:
            return (*self.parameters(), *self.borrowed)
        own = [p for p in self._parameters.values() if p is not None]   # asked at every forward
        return (*dict.fromkeys(own), *self.borrowed)

    def dense(self) -> Tensor:
        """The update as an (out, in) tensor, (experts, out, in) for expert places."""
        raise NotImplementedError

    def reads_on(self, grid: Grid | None) -> None:
        """Told before each plan: the 8-bit grid on which its layer reads its input, None where it
        reads it as it is; for what keeps input for backward."""

    def final(self) -> Tensor:
        """What a merged weight takes of it: the update, unless what answers after training is
        another than what trains."""
        return self.dense()

    def panel(self, i0: int, i1: int) -> Tensor:
        """Columns i0:i1 of it, differentiable; an update that need not make the rest for them
        overrides this (and says `cheap_tile` or `tiled`)."""
        return self.dense()[..., i0:i1]

    def road(self) -> str | None:
        """Why it runs by torch's operators, "" where by Triton's kernels; None where there are none
        (see blocks/gpu/road.py)."""
        return None

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) of shapes (r, in) and (out, r) where the update is ``B A`` with a small r, scale
        and all, made of this term's own tensors and numbers; None where it is anything else."""
        return None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) of shapes (r, in) and (out, r), r of any size, with ``B A`` all that this term
        adds to the weight as the model had it, whatever a storage has absorbed since; None where no
        such pair is known."""
        return self.pair()

    def entries(self) -> tuple[Tensor, Tensor] | None:
        """(positions, values) where the update is k entries of the matrix read row by row, in
        ascending order and each once; None where it is anything else."""
        return None

    @property
    def keeps_input(self) -> bool:
        """Does backward need the layer's input?"""
        return any(t.requires_grad for t in self.theta())

    def reads(self, need_x: bool) -> tuple[Tensor, ...]:
        """Tensors that backward reads again (they must not change before it); need_x: for the
        gradient of x too. Whoever makes panels again reads everything."""
        shared = self.__dict__.get("shared")          # frozen tensors the root owns
        return (*self.theta(), *self.buffers(), *(shared.buffers() if shared is not None else ()))

    def plain(self, x: Tensor) -> Tensor:
        """``x Delta^T`` by differentiable torch functions alone."""
        self.undropped()
        return F.linear(x, self.dense().to(x.dtype))

    def undropped(self) -> None:
        """RecipeError where dropout would act: an update as a matrix has no place for it."""
        if self.training and asks_to_drop(self):
            raise RecipeError(f"{type(self).__name__} with dropout has no form that torch.func or "
                              "forward-mode differentiation can transform here; set dropout=0 or "
                              "call eval()")

    # -- token side -------------------------------------------------------------------------
    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[Any, ...]:
        """Add ``scale * x Delta^T`` into `y_NO` in place; return what backward needs besides x.
        In half precision `y_NO` is fp32 where a function of W comes behind: cast what is added."""
        raise NotImplementedError

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[Any, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        """Add this term's part into `dx_NI` in place; return one gradient per ``theta()``."""
        raise NotImplementedError

    def by_strips(self, kept: tuple[Any, ...]) -> bool:
        """Does :meth:`backward_` take its x as :class:`~burnish.blocks.tape.activations.Strips`
        too? kept: what :meth:`forward_` gave."""
        return not self.keeps_input

    def gain_(self, g_NO: Tensor, x_NI: Tensor, kept: tuple[Any, ...], scale: float
              ) -> Tensor | None:
        """``sum_n g_no (scale Delta x)_no`` per output, the term's part in the gradient of a gain
        on the result; None where Delta itself tells it (no dropout in between)."""
        return None

    # -- experts ----------------------------------------------------------------------------
    @property
    def by_expert(self) -> bool:
        """Has an update of a stack (experts, out, in) a form for rows that are sorted by expert
        (:meth:`forward_each`, :meth:`backward_each`)?"""
        return False

    def forward_each(self, x_SI: Tensor, y_SO: Tensor, runs: Sequence[Run], scale: float
                     ) -> tuple[Any, ...]:
        """As :meth:`forward_`, each run of rows through its expert's update."""
        raise NotImplementedError

    def backward_each(self, g_SO: Tensor, x_SI: Tensor | None, kept: tuple[Any, ...],
                      dx_SI: Tensor | None, runs: Sequence[Run], scale: float
                      ) -> list[Tensor | None]:
        """As :meth:`backward_`; gradients of experts without rows are zero."""
        raise NotImplementedError

    # -- panels -----------------------------------------------------------------------------
    def prepare(self) -> Any:
        """What a panel needs to know of the whole matrix (a threshold). Small: it is kept."""
        return None

    def let_go(self, state: Any) -> None:
        """Forward makes no panel: drop what waits for that in the state."""

    def tile(self, i0: int, i1: int, state: Any) -> Tensor:
        """Columns i0:i1 of the update, (out, i1-i0); a fresh tensor the caller may write to."""
        d = self.dense()[..., i0:i1]
        return d if i1 - i0 < d.shape[-1] else d.clone()

    def upon(self, base: Tensor, i0: int, i1: int, state: Any, scale: float) -> Tensor:
        """``base + scale`` times the same, a fresh panel in the base's precision, fp32 or more;
        what makes both in one pass overrides this."""
        tile = self.tile(i0, i1, state)
        tile = tile if scale == 1 else tile.mul_(scale)
        if tile.element_size() <= base.element_size():
            return tile.to(base.dtype).add_(base)
        return tile.add_(base).to(base.dtype)

    def pull(self, i0: int, i1: int, G: Tensor, state: Any, grads: list[Tensor | None]) -> Tensor:
        """Accumulate into `grads` from the gradient of a panel; return the panel again."""
        theta = self.theta()
        wanted = [t for t in theta if t.requires_grad]
        if not wanted:                           # frozen as a whole: nothing but the panel
            return self.tile(i0, i1, state)
        with torch.enable_grad():
            d = self.panel(i0, i1)
            got = iter(torch.autograd.grad(d, wanted, G.to(d.dtype), allow_unused=True))
        for k, t in enumerate(theta):
            if t.requires_grad and (part := next(got)) is not None:
                grads[k] = part if grads[k] is None else grads[k].add_(part)
        return d.detach()

    def pull_straight(self, g_NO: Tensor, x_NI: Tensor, scale: float,
                      grads: list[Tensor | None]) -> bool:
        """The same from tokens, where they tell more cheaply than a panel's gradient; False where
        they do not, and nothing is done."""
        return False

    # -- each sample's own gradient ---------------------------------------------------------
    def sample_norms(self, x_BTI: Tensor, g_BTO: Tensor) -> list[Tensor | None]:
        """Squared norm of each sample's gradient, (B,) per tensor of ``theta()`` (None where no
        gradient is wanted): x the layer's input, g the gradient of its output."""
        return term_norms(self, x_BTI, g_BTO)

    # -- rows of an embedding ---------------------------------------------------------------
    def take(self, index: Tensor, padding: int | None = None) -> Tensor:
        """Columns `index` of the update as rows: (*index.shape, out). Differentiable; the column
        of `padding` gets no gradient, as in ``nn.Embedding(padding_idx=...)``."""
        return F.embedding(index, self.dense().transpose(-1, -2), padding)


class Wrap(Term):
    """A function of W: ``W' = f(V)`` with V the base and all added terms.

    `gains` gives the per-output factor f of ``W' = diag(f) V`` (DoRA and its relatives); a
    general function of V overrides :meth:`of` only and takes the effective-weight path.
    """

    diagonal: ClassVar[bool] = False
    #: is W' the same whatever V is? Then nothing may stand beside it
    deaf: ClassVar[bool] = False

    def of(self, V: Tensor) -> Tensor:
        """W' as a differentiable function of V and of this term's parameters."""
        raise NotImplementedError

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor | None:
        """``y = x W'^T + b`` without W', where the function of W has such a form (see turn.py)."""
        return None

    @property
    def whole(self) -> bool:
        """Does it take V as a matrix, so that no term under it can drop its input?"""
        return not self.diagonal and type(self).linear is Wrap.linear

    def low_rank_of(self, V: Tensor) -> tuple[Tensor, Tensor] | None:
        """(A, B) as :meth:`low_rank` has them, with ``W' = V + B A``; None where no such pair of
        few components is known."""
        return None

    def restart(self, V: Tensor) -> None:
        """Start again from V (the base has got another form since)."""

    def gains(self, V: Panels) -> tuple[Tensor, Any]:
        """(f of shape (out,), what backward needs) from the panels of V."""
        raise NotImplementedError

    def gained(self, kept: Any) -> Tensor:
        """f of what :meth:`gains` kept, differentiable in this term's parameters."""
        raise NotImplementedError

    def pull_gains(self, df: Tensor, kept: Any) -> list[Tensor | None]:
        """Gradients of theta from df = d loss / d f."""
        raise NotImplementedError
