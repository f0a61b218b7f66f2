from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.memory import MemoryRead, Stretched
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import Site, attention_ends, found

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Apt(Method):
    """APT: what prompts would add to an attention, read by every token through a ReLU.

    Attention over ``[tokens; prompts]`` is attention over the tokens and a part of the prompts, by
    a share l. Here that part is made outside, behind the last projection of every self- and
    cross-attention, so that nothing attends to more tokens:

        a = relu(x (T + M(T))^T),   M(T) = T A B,   o <- exp(c) (o + (a T) max_k a)

    x (N, d) what the attention reads, o what it returns, T (length, d), A (d, rank), B (rank, d).
    The maximum over the rows passes no gradient. c stays 0 (as in the published code, whose filter
    of what trains does not name it) unless ``stretch=True``.

    Start: T N(0, 0.02^2), A normal, B = 0: close to the pre-trained function, not equal to it;
    T = 0 would be equal. Trains length d + 2 d rank per attention, and one number more with
    `stretch`: 159,744 at d = 768. Work grows with N length, not with a square. Kept for backward: x
    alone. Not mergeable. Scores are made in fp32.

    Use it where prompts in every layer cost too much; where keys and values can take rows, `prefix`
    has the softmax itself. `targets` choose the attentions, by the projections in them.
    """

    paper: ClassVar[str] = ("Approximated Prompt Tuning for Vision-Language Pre-trained Models "
                            "(2023), arXiv:2306.15706")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    #: of a few rows a relu lets few through, and other ones in bf16
    small: ClassVar[Mapping[str, Any]] = {"length": 24}

    length: int = setting(200, "rows per attention", alias=("num_tokens",))
    rank: int = setting(4, "rank of M")
    stretch: bool = setting(False, "c trains too")

    def __post_init__(self) -> None:
        if self.length < 1 or self.rank < 1:
            raise RecipeError(f"apt(length={self.length}, rank={self.rank}): expected at least one "
                              "row, and a rank of 1 or more")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        sites = [s for s in attention_ends(anatomy) if s.block.attn or s.path == s.block.cross_out]
        for s in found(anatomy, sites, self, "attention"):
            reads = self._reads(s)
            inside = [p.inp for p in anatomy.places if p.path.startswith(f"{reads}.")
                      and p.role.removeprefix("cross_") in ("q", "qkv")]
            if inside and inside[0] != s.width:
                raise RecipeError(f"apt: {reads} reads {inside[0]} channels and returns {s.width}; "
                                  "its rows are keys of the one and values of the other")
            yield Branch(s.path, MemoryRead(s.width, self.length, self.rank), read=(reads, "input"))
            if self.stretch:
                yield Branch(s.path, Stretched(), compose="replace")

    def _reads(self, site: Site) -> str:
        """The attention that a site is the end of."""
        block = site.block
        return str(block.cross if site.path == block.cross_out else block.attn)

    def count(self, d: int) -> int:
        """Trainable parameters of one attention of width d."""
        return self.length * d + 2 * d * self.rank + self.stretch
