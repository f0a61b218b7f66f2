from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...blocks.weight.factor import Chain
from ...blocks.weight.provided import Term, Wrap
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


def update_norm(term: Term) -> Tensor:
    """``||Delta||_F^2``; for a chain through rank x rank Gram matrices, else from its dense form.

    ``||s B A||_F^2 = s^2 tr((A A^T)(B^T B))``.
    """
    if type(term) is Chain and term.A.dim() == 2:
        return term.scale**2 * ((term.A @ term.A.t()) * (term.B.t() @ term.B)).sum()
    return term.dense().square().sum()


@dataclass(frozen=True, kw_only=True)
class L2Sp(Method):
    """L2-SP: pull what trains towards the starting point.

    ``loss + alpha / 2 ||w - w0||^2`` over weights the base had, ``+ beta / 2 ||w_new||^2`` over the
    head. On a delta the pull acts on the update: ``||s B A||_F^2 = s^2 tr((A A^T)(B^T B))``, which
    costs rank x rank; other terms are formed one matrix at a time. Functions of W (DoRA's lengths)
    are left free.

    Trains nothing of its own; reads w0 from where the originals wait. Its gradient is added once
    per update, before the rule sees the gradients, so it does the same in anybody's loop.
    """

    paper: ClassVar[str] = "Explicit Inductive Bias for Transfer Learning (2018), arXiv:1802.01483"

    alpha: float = setting(0.1, "strength on weights the base had, and on updates")
    beta: float = setting(0.01, "strength on the head")

    def objective(self, tuned: Tuned) -> Iterator[Tensor]:
        for name, p in tuned.named_parameters():
            if ".burnish." in name:
                continue
            if any(name == h or name.startswith(f"{h}.") for h in tuned.anatomy.head):
                yield self.beta / 2 * p.square().sum()
            else:
                w0 = tuned.originals.get(*_split(name)).to(p.device)
                yield self.alpha / 2 * (p - w0).square().sum()
        for _, term in tuned.terms(Term):
            if not isinstance(term, Wrap) and any(t.requires_grad for t in term.theta()):
                yield self.alpha / 2 * update_norm(term)


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
