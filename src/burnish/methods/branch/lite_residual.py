from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.coarse import Coarse, Grid
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import patches, refuse, unmet
from ...core.site import Branch
from ._sites import Site, found, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class LiteResidual(Method):
    """Lite residual: beside every block a bottleneck that sees the picture at a lower resolution.

    Of the patches x (gh gw, d) that a block is given, in means over k x k, k = `downsample`,

        block(x) <- block(x) + s U (act(M x W_d + b_d) W_u + b_u)

    M (m, gh gw) those means, m = ceil(gh / k) ceil(gw / k), U bilinear back to the
    grid; W_d (d, r), W_u (r, d), r = `bottleneck`. Class, register and prompt tokens, which stand
    before the patches, are not read and get the mean over the m.

    Start: W_u and biases 0: the pre-trained function exactly. Trains 2 d r + r + d per block. Kept
    for backward: d + r numbers for each of m tokens, 1 / k^2 of what a branch at the full
    resolution keeps. Not mergeable.

    The side module of `s2a` (beside biases and prompts). Unconfirmed: its shape there; this is the
    best reading, with TinyTL's pooling by two and up again, a bottleneck in place of its
    convolution in groups, and the mean for the class token, which is all that many heads read.
    """

    paper: ClassVar[str] = ("S2A: A Unified Framework for Parameter and Memory Efficient Transfer "
                            "Learning (2025); TinyTL (2020), arXiv:2007.11622")
    needs: ClassVar[frozenset[str]] = frozenset({"pictures"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(24, "r, width of the bottleneck")
    downsample: int = setting(2, "patches in a row and in a column that have one mean", other=(3,))
    scale: float = setting(1.0, "s, what the branch is multiplied by")
    act: str = setting("gelu", "activation inside", other=("relu",))

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.downsample) < 1:
            raise RecipeError(f"lite_residual(bottleneck={self.bottleneck}, downsample="
                              f"{self.downsample}): expected a width and a window of 1 or more")

    def forbids(self) -> dict[str, str]:
        return {"where prompts stand among patches": "lite_residual finds the patches behind all "
                                                     "other tokens; leave out where prompts stand"}

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | NotesGrid]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        d: Any = anatomy.hidden_size
        for s in found(anatomy, [Site(b, b.path, d) for b in anatomy.blocks], self, "block"):
            inner = Bottleneck(d, self.bottleneck, act=self.act, scale=self.scale)
            yield Branch(s.path, Coarse(inner, self.downsample), read=(s.path, "input"))
        yield NotesGrid(patches(anatomy)[0].path)

    def count(self, d: int, blocks: int = 1) -> int:
        """Trainable parameters beside so many blocks of width d."""
        return blocks * Bottleneck.count(d, self.bottleneck)


@dataclass(frozen=True)
class NotesGrid:
    """Where the patches are cut."""

    path: str

    def install(self, attacher: Any, part: Method) -> None:
        Grid(attacher.state, attacher.adapter.name).listen(attacher.slot(self.path),
                                                          f"{part.name}_grid")
