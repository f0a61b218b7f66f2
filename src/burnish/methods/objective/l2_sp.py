from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ...blocks.update.objective import OnWeights
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

    Trains nothing of its own; reads w0 from where the originals wait. Its gradient joins a tensor's
    own when that is complete, at the scale of the loss, so it does the same in anybody's loop,
    under accumulation and inside a step in backward; zeroth-order steps add its value.
    """

    paper: ClassVar[str] = "Explicit Inductive Bias for Transfer Learning (2018), arXiv:1802.01483"
    tier: ClassVar[str] = "checked against an independent equation"

    alpha: float = setting(0.1, "strength on weights the base had, and on updates", least=0.0)
    beta: float = setting(0.01, "strength on the head")

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        for name, p in tuned.named_parameters():
            if ".burnish." in f".{name}":              # the root's own stand in front
                continue
            if any(name == h or name.startswith(f"{h}.") for h in tuned.anatomy.head):
                yield pull(p, None, self.beta)
            else:
                yield pull(p, tuned.originals.get(*_split(name)), self.alpha)
        for _, term in tuned.terms(Term):
            trained = tuple(t for t in term.theta() if t.requires_grad)
            if trained and not isinstance(term, Wrap):
                yield OnWeights(trained, lambda term=term: self.alpha / 2 * update_norm(term))


def pull(p: nn.Parameter, w0: Tensor | None, a: float) -> OnWeights:
    """``a / 2 ||w - w0||^2`` and its gradient ``a (w - w0)``; w0 = 0 if None. w0 may wait on the
    host (mapped from a file): it comes over when it is needed and is not kept."""
    def away() -> Tensor:
        return p if w0 is None else p - w0.to(p.device)

    return OnWeights((p,), lambda: a / 2 * away().square().sum(), lambda: [away() * a])


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf
