from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.ternary import TernaryExperts
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import mlp_modules, refuse, unmet
from ...core.site import Branch
from ..branch._sites import Site, found

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Mote(Method):
    """MoTE: a frozen MLP as everybody's expert, and ternary copies of it of which tokens take one.

    ``F(x) <- F(x) + sum_{e in top-k} p_e FFN_e(x)``, ``p = softmax(W_r x)`` in fp32. Every linear
    of FFN_e computes ``y = (x~ W~^T) g m / 127 + b``: ``W~ = clip(round(W / (g + eps)), -1, 1)``
    with g = mean |W|, ``x~ = clip(round(127 x / m), -128, 127)`` with m = max |x| of the token;
    gradients pass straight through both. Beside the task ``balance E sum_e f_e P_e``, f the share
    of (token, slot) pairs, P the mean probability, padding left out (see `mola`).

    Start: FFN_e copies of the MLP, W_r uniform within 1 / sqrt(d): a term is added, so not the
    pre-trained function. Trains E (the MLP's numbers) + E d per MLP; the MLP itself is frozen. Kept
    for backward: a byte for every number that an expert's linear reads, and what is between them.
    A finished file (``tuned.save``) holds two bits a weight and g per matrix, and answers; a
    checkpoint holds what trains. Not mergeable: the token decides.

    `targets` narrows it to MLPs that hold these weights. Which MLPs have experts, `balance` and
    `every` are unconfirmed.
    """

    paper: ClassVar[str] = ("MoTE: Mixture of Ternary Experts for Memory-efficient Large "
                            "Multimodal Models (2025), arXiv:2506.14435")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp modules"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    #: all of them: in half precision a token near a tie goes elsewhere, in so small a model too far
    small: ClassVar[dict[str, Any]] = {"experts": 2, "k": 2}

    experts: int = setting(4, "ternary copies of an MLP")
    k: int = setting(1, "experts of a token", other=(1,))
    every: int = setting(2, "every n-th block has them, from the second of two on", other=(2,))
    balance: float = setting(0.01, "weight of the balance loss")
    stored: bool = setting(False, "two bits a weight, as a file that answers holds it",
                           unseen="these come from a file, and do not train: "
                                  "tests/methods/test_mote.py")

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.experts or self.every < 1 or self.balance < 0:
            raise RecipeError(f"{self}: expected an expert or more, k from 1 to as many, every of "
                              "at least 1 and a balance of at least 0")

    def finished(self) -> Mote:
        return replace(self, stored=True)

    def repeats(self) -> int | None:
        return 1 if self.every == 1 else None

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        mlps = {b.path: places for b, places in mlp_modules(anatomy)}
        sites = [Site(b, b.mlp, mlps[b.path][0].inp)
                 for n, b in enumerate(anatomy.blocks) if b.path in mlps
                 and n % self.every == self.every - 1 and b.mlp]
        for s in found(anatomy, sites, self, "MLP in such a block"):
            module, places = anatomy.model.get_submodule(s.path), mlps[s.block.path]
            if any(n.endswith(".burnish") for n, _ in module.named_modules()):
                raise RecipeError(f"mote copies {s.path} as it is, and something has been added "
                                  "inside it: merge that first, or leave it out")
            yield Branch(s.path, TernaryExperts(
                module, places, s.path, s.width, self.experts, self.k, self.balance,
                self.stored), read=(s.path, "input"))

    def count(self, numbers: int, d: int) -> int:
        """Trainable parameters of an MLP of so many numbers on states of width d."""
        return self.experts * (numbers + d)
