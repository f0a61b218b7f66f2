from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...blocks.state.another import beside
from ...blocks.state.sources import Scaled, wide
from ...core.errors import RecipeError
from ...core.method import setting
from ...core.site import Branch
from ..branch._sites import found, mlp_ends
from ..delta.lowrank.lora import check_dropout
from ._sources import FromSources

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class ScaLearn(FromSources):
    """ScaLearn: a new task's adapter is a sum of other tasks' adapters, by scales that it learns.

    ``F <- F + sum_s w_s * o_s`` on an MLP's result F, ``o_s = U_s act(D_s F + b_s) + c_s`` source
    s's `pfeiffer` adapter, which stays as it is (without the residual, which stands once). No
    softmax, and nothing that the scales should add up to. scales="vector": w_s (d) in every block;
    "number": one in every block (ScaLearnUniform). share=True: one set for all blocks (ScaLearn++,
    ScaLearnUniform++).

    A run over `sources` + 1 tasks (``burnish.fit``, ``tuned.run``) trains an adapter on each of the
    first, then the scales (and a head of its own) on the last; :meth:`lifecycle` combines adapters
    that are there already, whose number is `sources`. Until either the sources are random.

    Start: w is N(2 / sources, 0.001), not the pre-trained function. Trains per block sources d or
    sources, with `share` once. The sources are one bottleneck of their widths together; kept for
    backward are its numbers per token alone. Not mergeable into W; :meth:`lifecycle` makes
    that bottleneck, exactly. No weight decay. (Start and dropout are unconfirmed.)
    """

    paper: ClassVar[str] = ("ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by "
                            "Learning to Scale (2023), arXiv:2310.01217")
    tier: ClassVar[str] = "checked against an independent equation"

    scales: Literal["vector", "number"] = setting("vector", "of a source: one a channel, or one")
    share: bool = setting(False, "one set of scales for all blocks (ScaLearn++)")
    dropout: float = setting(0.3, "dropout on the scales")
    stored: bool = setting(False, "one bottleneck, as :meth:`lifecycle` makes it")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout("scalearn", self.dropout)

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        sites = found(anatomy, mlp_ends(anatomy), self, "MLP")
        widths = sorted({s.width for s in sites})
        vector = self.scales == "vector"
        if self.share and vector and len(widths) > 1:
            raise RecipeError(f"scalearn(share=True) has scales of one width, and this model sites "
                              f"of {', '.join(map(str, widths))}: share=False, or scales='number'")
        shared: nn.Parameter | None = None
        for s in sites:
            if self.stored:
                yield Branch(s.path, wide(s.width, self.sources * self.width(s.width), self.act))
                continue
            made = Scaled(self.sources, s.width, self.width(s.width), self.act, vector=vector,
                          dropout=self.dropout, shared=shared)
            if self.share:
                shared = made.scales             # type: ignore[assignment]
            yield Branch(s.path, made)

    def lifecycle(self, tuned: Any, name: str, sources: Sequence[str] | None = None) -> None:
        """Add an adapter `name`, and use it: with `sources`, adapters of `pfeiffer` or of its form,
        this part, which combines them (they need not stay); without, the one bottleneck that this
        part of the adapter in use is. Raises RecipeError for adapters that are no such sources."""
        if sources is not None:
            self.combine(tuned, name, sources)
            return
        made = {path: m.plain().state_dict() for path, m in tuned.branches(Scaled)}
        beside(tuned, self, name, [(replace(self, stored=True), made)])

    def count(self, d: int, blocks: int = 1) -> int:
        """Trainable parameters of a model of so many blocks of width d."""
        return self.sources * (d if self.scales == "vector" else 1) * (1 if self.share else blocks)
