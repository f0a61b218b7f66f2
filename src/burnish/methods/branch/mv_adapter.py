from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.again import Copied, Ended, Told, Views
from ...blocks.state.attending import open_attentions
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ._sites import attention_ends, found, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.protocols import Attacher
    from ...core.site import Place


@dataclass(frozen=True, kw_only=True)
class MvAdapter(Method):
    """MV-Adapter: beside each frozen self-attention, one across views and one to a reference.

        f <- f + SA(f) + MVA(f) + ICA(f, r)

    A group of consecutive samples is a `reference` picture (its states are r) and `views` (n) views
    of one object. MVA and ICA are SA with copies of its q, k and v that train and a last linear of
    their own, so with its positions, norms and scales: in MVA a token of a view sees the tokens of
    all n views (``attend="full"``), or those of its own row of each (``"rows"``: n s keys of square
    pictures of s^2 tokens, in place of n s^2), in ICA those of r. The reference is given
    nothing: its states and its answer are the frozen model's, of whatever noise and time step it is
    given (the paper's: none, 0). ``camera=C``: a map of each view (rays, positions, normals; C
    channels, numbers from 0 to 1) under the key `camera` of the batch passes two convolutions to
    `hidden` channels and a linear, and is added to what the first block is given.

    Start: last linears 0: the pre-trained function exactly. Trains per attention what its q, k, v
    and last linear hold, twice (MVA, ICA), biases too; for maps C h 9 + h^2 9 + 2 h + h d + d, h =
    `hidden`. Kept for backward: what SA keeps, three times. Not mergeable.

    Departures: the reference stands in the batch, its features are made again at each step, not
    cached; maps are told to the first block alone (in a U-Net of convolutions); copies of norms of
    queries and keys are the frozen ones. Masks: a key is masked as within its own view. For U-Nets,
    whose attentions over a picture differ in width and side, and stacks of one width (DiT, ViT).
    """

    paper: ClassVar[str] = ("MV-Adapter: Multi-view Consistent Image Generation Made Easy (2024), "
                            "arXiv:2412.03632")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"whole attention", "open attention"})
    merges: ClassVar[bool] = False
    context: ClassVar[Mapping[str, Key]] = {"camera": Key(
        "a map of each view, (channels, height, width)", shape=(3, 4, 4), real=True)}
    small: ClassVar[dict[str, Any]] = {"views": 1, "hidden": 4}

    views: int = setting(6, "n, views of an object", unseen=
                         "batches of the suite are two samples: tests/methods/test_mv_adapter.py")
    reference: bool = setting(True, "the first sample of a group is a reference picture")
    attend: Literal["full", "rows"] = setting("full", "which tokens of other views a token sees")
    camera: int = setting(0, "channels of a map for each view; 0: there are none", other=(3,))
    hidden: int = setting(64, "channels inside the encoder of maps", beside={"camera": 3})

    def __post_init__(self) -> None:
        if min(self.views, self.hidden) < 1 or self.camera < 0:
            raise RecipeError(f"{self}: expected views and hidden of 1 or more, camera of at least "
                              "0")

    def together(self) -> int:
        return self.views + self.reference

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.camera else {}

    def forbids(self) -> dict[str, str]:
        return {"how attention is computed": "mv_adapter attends across views in its place"}

    def repeats(self) -> int | None:
        return None if self.camera else 1

    def branch(self, anatomy: Anatomy) -> Iterable[Beside | Maps]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        paths = open_attentions(anatomy, self.name)
        ends = [s for s in attention_ends(anatomy)
                if s.block.attn in paths and s.path != s.block.cross_out]
        if self.camera:
            yield Maps(self, anatomy.blocks[0])
        for s in found(anatomy, ends, self, "attention"):
            yield Beside(self, s.block, s.path, _linears(anatomy, s.block, s.path))

    def count(self, numbers: int) -> int:
        """Trainable parameters of one attention whose linears hold so many."""
        return numbers * (1 + self.reference)


def _linears(anatomy: Anatomy, block: Block, end: str) -> list[Place]:
    """Those that make q, k and v, and the last."""
    mine = [p for p in anatomy.places if f"{p.path}.".startswith(f"{block.attn}.")
            and p.kind in ("linear", "conv1d") and p.role in ("q", "k", "v", "qkv", "kv")]
    last = [p for p in anatomy.places if p.path == end and p.kind in ("linear", "conv1d")]
    if not mine or len(last) != 1:
        raise RecipeError(f"mv_adapter: the linears of {block.attn} cannot be told")
    return [*mine, *last]


@dataclass(frozen=True)
class Beside:
    """The runs beside one attention."""

    method: MvAdapter
    block: Block
    end: str
    linears: list[Place]

    def install(self, attacher: Attacher, part: Method) -> None:
        m, state, owner = self.method, attacher.state, (attacher.adapter.name, part.name)
        names = ["views", "reference"] if m.reference else ["views"]
        for p in self.linears:
            module = attacher.model.get_submodule(p.path)
            W, bias = p.view(p.stored(module)), module.bias
            Copied(state, owner, names, W, bias, zero=p.path == self.end).to(  # type: ignore
                attacher.device(p.path)).listen(attacher.slot(p.path), part.name)
        Ended(state, owner).listen(attacher.slot(self.end), part.name)
        attn = self.block.attn or ""
        Views(state, owner, m.views, m.reference, m.attend).listen(attacher.slot(attn), part.name)


@dataclass(frozen=True)
class Maps:
    """The encoder of maps before the first block."""

    method: MvAdapter
    block: Block

    def install(self, attacher: Attacher, part: Method) -> None:
        m, b = self.method, self.block
        convs = [p.inp // p.kernel * p.groups for p in attacher.anatomy.places
                 if p.kind == "conv" and f"{p.path}.".startswith(f"{b.path}.")]
        d = b.hidden_size or next(iter(convs), None)
        if d is None:
            raise RecipeError(f"mv_adapter: the width of {b.path} cannot be told from its weights")
        Told(attacher.state, attacher.adapter.name, "camera", m.camera, m.hidden, d,
             m.together() if m.reference else 0).to(attacher.device(b.path)).listen(
            attacher.slot(b.path), part.name)
