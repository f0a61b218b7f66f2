"""Methods that are wrong in one way each: the suite names that way, and nothing else.

Two sound ones pass everything; each dud differs from one of them in a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.blocks.weight import dropped
from burnish.blocks.weight.provided import Term
from burnish.core.errors import RecipeError
from burnish.core.method import Method, setting
from burnish.core.registry import register
from burnish.testing import conformance

MODEL = "mlp"


class Thin(Term):
    """``Delta = s B A`` on the token side, dropout on its input by a stateless mask."""

    tokenwise: ClassVar[bool] = True

    def __init__(self, place, rank, scale):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, place.inp) / place.inp ** 0.5)
        self.B = nn.Parameter(torch.zeros(place.out, rank))
        self.scale = scale

    def dense(self) -> Tensor:
        return self.scale * self.B @ self.A

    def forward_(self, x, y, scale):
        h = x @ self.A.t().to(x.dtype)
        y.addmm_(h, self.B.t().to(x.dtype), alpha=self.scale * scale)
        return (h,)

    def backward_(self, g, x, kept, dx, scale):
        h, s = kept[0], self.scale * scale
        back = (g @ self.B.to(g.dtype)).mul_(s)
        if dx is not None:
            dx.addmm_(back, self.A.to(g.dtype))
        return [(back.t() @ x).to(self.A.dtype), (g.t() @ h).mul_(s).to(self.A.dtype)]


@dataclass(frozen=True, kw_only=True)
class Sound(Method):
    """A sound low-rank update: what every dud here would be, were it not for one line."""

    paper: ClassVar[str] = "the tests of the suite"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    term: ClassVar[type[Thin]] = Thin

    rank: int = setting(4, "rank")
    scale: float = setting(2.0, "scale")

    def delta(self, site):
        return self.term(site.place, self.rank, self.scale)

    def count(self, place):
        return self.rank * (place.out + place.inp)

    def per_token(self, place):
        return self.rank


def dud(name: str, term: type[Thin] | None = None, **changed) -> str:
    """A registered method that differs from Sound in what is given."""
    given = {"__doc__": f"{name}: a dud.", "__module__": __name__, **changed}
    if term is not None:
        given["term"] = term
        given.setdefault("__annotations__", {})
    cls = dataclass(frozen=True, kw_only=True)(type(name, (Sound,), given))
    register(cls, name)
    return name


register(Sound, "sound")


class Nothing(Thin):
    """The update is zero, forward and backward."""

    def dense(self):
        return 0.0 * (self.B @ self.A)

    def forward_(self, x, y, scale):
        return (x @ self.A.t().to(x.dtype),)

    def backward_(self, g, x, kept, dx, scale):
        return [torch.zeros_like(self.A), torch.zeros_like(self.B)]


class NoGradient(Thin):
    """Forward is right; every gradient is zero."""

    def backward_(self, g, x, kept, dx, scale):
        dA, dB = super().backward_(g, x, kept, dx, scale)
        return [torch.zeros_like(dA), torch.zeros_like(dB)]


class Stuck(Thin):
    """A third tensor is declared, enters as times zero, and never moves."""

    def __init__(self, place, rank, scale):
        super().__init__(place, rank, scale)
        self.C = nn.Parameter(torch.zeros(place.out))

    def dense(self):
        return super().dense() + 0.0 * self.C.unsqueeze(-1)

    def backward_(self, g, x, kept, dx, scale):
        return [*super().backward_(g, x, kept, dx, scale), torch.zeros_like(self.C)]


class ScaleIgnored(Thin):
    """The setting `scale` is taken and not used."""

    def __init__(self, place, rank, scale):
        super().__init__(place, rank, 1.0)


class WrongScale(Thin):
    """Forward uses twice the scale that the dense form has."""

    def forward_(self, x, y, scale):
        return super().forward_(x, y, 2 * scale)


class ForwardAndBackwardDisagree(Thin):
    """One gradient lacks the scale."""

    def backward_(self, g, x, kept, dx, scale):
        dA, dB = super().backward_(g, x, kept, dx, scale)
        return [dA, dB / self.scale]


class SavesTwice(Thin):
    """A copy of the input waits for backward beside the input."""

    def forward_(self, x, y, scale):
        return (*super().forward_(x, y, scale), x.clone())


class Forgets:
    """A schedule on gradients that is part of no state."""

    def __init__(self, tuned):
        self.tuned, self.k, self.total = tuned, 0, None

    def start(self, total):
        self.total = total

    def before_update(self, step):
        self.k += 1
        for i, p in enumerate(self.tuned.parameters()):
            p.grad.mul_(1 + self.k * (i + 1) / (self.total or 50))


class FoldsHalf(Thin):
    """What is merged is half of what runs."""

    def dense(self):
        return super().dense() if torch.is_grad_enabled() else 0.5 * super().dense()


class Bumped(Thin):
    """It does not start as the pre-trained function."""

    def __init__(self, place, rank, scale):
        super().__init__(place, rank, scale)
        nn.init.normal_(self.B, std=0.1)


class Dropping(Thin):
    """Dropout on the input of A, from a mask of its own that evaluation does not have."""

    acts = True

    def __init__(self, place, rank, scale, dropout=0.0):
        super().__init__(place, rank, scale)
        self.dropout = dropout

    def _mask(self, x):
        if not (self.training and self.dropout):
            return None
        return F.dropout(torch.ones_like(x), self.dropout)

    def forward_(self, x, y, scale):
        mask = self._mask(x)
        (h,) = super().forward_(x if mask is None else x * mask, y, scale)
        return (h, mask)

    def backward_(self, g, x, kept, dx, scale):
        h, mask = kept
        if mask is None:
            return super().backward_(g, x, (h,), dx, scale)
        here = None if dx is None else torch.zeros_like(dx)
        grads = super().backward_(g, x * mask, (h,), here, scale)
        if dx is not None:
            dx.add_(here * mask)
        return grads


class DropsNothing(Dropping):
    """The probability is stored and never used."""

    def _mask(self, x):
        return None


class DropsForwardOnly(Dropping):
    """Backward does not know the mask."""

    def backward_(self, g, x, kept, dx, scale):
        return Thin.backward_(self, g, x, (kept[0],), dx, scale)


class DropsInEvaluation(Dropping):
    """The mask is drawn in evaluation too."""

    def _mask(self, x):
        return F.dropout(torch.ones_like(x), self.dropout) if self.dropout else None


class DropsTwice(Dropping, dropped.Dropping):
    """What stands around it drops already."""


@dataclass(frozen=True, kw_only=True)
class Dropper(Sound):
    """Sound, with dropout."""

    term: ClassVar[type[Thin]] = Dropping

    dropout: float = setting(0.0, "dropout on the input of A")

    def delta(self, site):
        return self.term(site.place, self.rank, self.scale, self.dropout)


register(Dropper, "dropper")


def dropping_dud(name: str, term: type[Dropping]) -> str:
    cls = dataclass(frozen=True, kw_only=True)(
        type(name, (Dropper,), {"__doc__": name, "__module__": __name__, "term": term}))
    register(cls, name)
    return name


def two_at_least(self):
    if self.rank < 2:
        raise RecipeError(f"d_says_another_bound: rank={self.rank}: expected at least 1")


def everywhere(self):
    return (f"the function of W on {self.targets and 'the default targets'}",)


REFERENCE = {"equals_the_untouched_model", "equals_the_untouched_model_under_dropout"}
DUDS = {
    dud("d_nothing", Nothing): {"it_acts", "every_tensor_has_a_gradient",
                                "exactly_what_trains_moves", "loss_falls",
                                "every_setting_acts"},
    dud("d_no_gradient", NoGradient): {"every_tensor_has_a_gradient", *REFERENCE,
                                       "exactly_what_trains_moves", "loss_falls",
                                       "every_setting_acts"},
    dud("d_stuck", Stuck, count=lambda self, p: 4 * (p.out + p.inp) + p.out):
        {"every_tensor_has_a_gradient", "exactly_what_trains_moves"},
    dud("d_scale_ignored", ScaleIgnored): {"every_setting_acts"},
    dud("d_wrong_scale", WrongScale): {*REFERENCE, "merges_and_unmerges"},
    dud("d_disagrees", ForwardAndBackwardDisagree): REFERENCE,
    dud("d_saves_twice", SavesTwice): {"keeps_what_it_says"},
    dud("d_says_one_number_more", per_token=lambda self, p: self.rank + 1): {"keeps_what_it_says"},
    dud("d_counts_wrong", count=lambda self, p: 4 * (p.out + p.inp) + 1): {"declared_count"},
    dud("d_decays", __doc__="d_decays: a dud. No weight decay."): {"is_left_alone_by_decay"},
    dud("d_says_another_bound", __post_init__=two_at_least):
        {"every_bound_is_the_one_that_is_said"},
    dud("d_claims_elsewhere", claims=everywhere): {"what_it_claims_is_of_its_targets"},
    dud("d_folds_half", FoldsHalf): {"merges_and_unmerges"},
    dud("d_bumped", Bumped): {"identity_at_the_start"},
    dropping_dud("d_drops_nothing", DropsNothing): {"its_dropout_acts", "every_setting_acts"},
    dropping_dud("d_drops_forward_only", DropsForwardOnly): {"its_dropout_is_differentiated"},
    dropping_dud("d_drops_in_evaluation", DropsInEvaluation): {"its_dropout_acts"},
    dropping_dud("d_drops_twice", DropsTwice): {"its_dropout_acts"},
    dud("d_not_resumable", controller=lambda self, tuned: Forgets(tuned)):
        {"resumes_where_it_stopped"},
}
#: checks that look at many models or at the whole step; the duds' one model says enough
WITHOUT = {"every_kind_of_place", "simulated_is_measured"}


def failures(name: str) -> set[str]:
    wanted = [c for c in (*conformance.CHECKS, *conformance.ONCE) if c.__name__ not in WITHOUT]
    return {r.check for r in conformance.run(name, [MODEL], only=wanted).failures}


@pytest.mark.parametrize("name", ["sound", "dropper"])
def test_the_sound_ones_pass(name):
    assert failures(name) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", DUDS)
def test_each_dud_fails_the_checks_that_are_meant_for_it(name):
    assert failures(name) == DUDS[name]
