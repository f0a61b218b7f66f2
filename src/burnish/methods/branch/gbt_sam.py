from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.again import Ended, Slices
from ...blocks.state.bottleneck import Bottleneck
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.site import Branch
from ._sites import Site, attention_ends, found, mlp_ends, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Installs


@dataclass(frozen=True, kw_only=True)
class GbtSam(Method):
    """GBT-SAM's depth-aware module: the frozen attention of a block along the slices of a scan too.

    `scan` (D) consecutive samples of a batch are one scan, in order. An attention that answers
    ``O ctx`` to LN1 x answers

        y + S(y) + A(y_depth),   y = O ctx

    y_depth what the same frozen attention makes of each location's D tokens, one of each slice: of
    a model that is given grids (SAM, whole or in windows) as a grid dh x dw, dh the largest factor
    of D not above its root, to which it resizes its relative positions. The MLP adds
    ``0.5 M(LN2 x)``. S, A, M: ``W_up gelu(W_down . + b) + b'``, d to d / `reduction` to d.

    Start: W_up and biases 0: the pre-trained function exactly; ``init="linear"``: as torch draws
    linears, the paper's, not that function. Trains 2 d r + r + d per bottleneck (295,872 at d =
    768), three a block, A alone with ``spatial=False, mlp=False`` (3,550,464 in twelve blocks).
    Kept for backward: what the attention keeps, twice, and d + r numbers per token and bottleneck.
    Not mergeable. Prime D makes a grid 1 x D. Padding at a location is read like any other token.

    Refused: attentions whose positions are made for their tokens and given to them, or are a table
    of one size. Unconfirmed: which light layers go with the depth module in the released
    configuration; `spatial` and `mlp` leave them out.
    """

    paper: ClassVar[str] = ("GBT-SAM: A Parameter-Efficient Depth-Aware Model for Generalizable "
                            "Brain Tumour Segmentation on mp-MRI (2025), arXiv:2503.04325")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "open attention", "mlp"})
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"scan": 2}

    scan: int = setting(16, "D, consecutive samples that are one scan", other=(1,))
    reduction: int = setting(4, "d over r, the width of a bottleneck", other=(2,))
    spatial: bool = setting(True, "S behind attention")
    mlp: bool = setting(True, "M beside the MLP")
    init: Literal["zero", "linear"] = setting("zero", "start of the bottlenecks")

    def __post_init__(self) -> None:
        if min(self.scan, self.reduction) < 1:
            raise RecipeError(f"{self}: expected scan and reduction of 1 or more")

    def together(self) -> int:
        return self.scan

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | Installs]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        attends = [s for s in attention_ends(anatomy) if s.block.attn]
        mlps = list(mlp_ends(anatomy)) if self.mlp else []
        for s in found(anatomy, [*attends, *mlps], self, "attention or MLP"):
            if s in attends:
                _sized(anatomy, s)
                yield Deep(self, s)
            else:
                read = s.block.mlp or s.block.mlp_in[0]
                yield Branch(s.block.mlp or s.path, self.made(s, scale=0.5), read=(read, "input"))

    def made(self, s: Site, scale: float = 1.0) -> Bottleneck:
        if s.width % self.reduction:
            raise RecipeError(f"gbt_sam(reduction={self.reduction}) does not divide the width "
                              f"{s.width} of {s.path}")
        return Bottleneck(s.width, s.width // self.reduction, act="gelu", scale=scale,
                          init=self.init)

    def count(self, d: int) -> int:
        """Trainable parameters of one bottleneck on states of width d."""
        return Bottleneck.count(d, d // self.reduction)


def _sized(anatomy: Anatomy, s: Site) -> None:
    """RecipeError for a block with a table of relative positions of one size."""
    for name, _ in anatomy.model.get_submodule(s.block.path).named_parameters():
        if "relative" in name:
            raise RecipeError(f"gbt_sam: {s.block.path}.{name} is a table of positions of one "
                              "size, and slices are others; expected an attention without, or "
                              "one that resizes it (SAM's)")


@dataclass(frozen=True)
class Deep:
    """The depth path of one attention."""

    method: GbtSam
    site: Site

    def install(self, attacher: Attacher, part: Method) -> None:
        m, s, owner = self.method, self.site, (attacher.adapter.name, part.name)
        attn = s.block.attn or ""
        Slices(attacher.state, owner, m.scan, m.made(s)).to(attacher.device(attn)
                                                              ).listen(attacher.slot(attn),
                                                                       part.name)
        Ended(attacher.state, owner, m.made(s) if m.spatial else None).to(
            attacher.device(s.path)).listen(attacher.slot(s.path), part.name)
