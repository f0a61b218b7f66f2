from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.views import Answers, Heads, Small, Viewed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import head_linear, refuse, unmet
from ..branch._sites import samples_first
from ._beside import frozen, narrowed, still, width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Levi(Method):
    """LEVI: heads over the layers of a pre-trained model, each beside a small model of the task.

    ``y = mean_j head_j([P_j z_j ; u])``, j over the blocks that are read: z_j (D) the mean of block
    j's states over a sample's tokens, padding left out; P_j (p, D) with a bias; head_j
    (classes, p + S) with a bias, in place of the model's own. u (S) is of a small
    transformer, S = D / reduction, trained from scratch on what goes into the first block: a
    projection to S, `layers` pre-norm blocks, a norm, the mean over tokens. With ``weighed=True``
    the mean is by shares that train. The loss is the task's, of y.

    Ours, the text leaves them open (a best reading): the mean as what is pooled, the small model's
    form, that it reads the large one's embeddings, one loss of the mean.

    Start: drawn as linears are; another function. Trains D S + S + layers (12 S^2 + 13 S) + 2 S for
    the small model, D p + p for each projection and classes (p + S + 1) for each head, p =
    `bottleneck`. Kept for backward: what the small model keeps, and of the large one the states
    that go in and D numbers a sample and block. Not mergeable: two models run.

    frozen=True: the large model runs in evaluation mode without a graph, and nothing may train in
    it. False: it is tuned beside (``lora + levi(frozen=False)``). Needs one stack that reads its
    input whole, and a task head of one linear.
    """

    paper: ClassVar[str] = ("LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different "
                            "Views, ICML 2024, arXiv:2402.04644")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "linear head"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    takes_head: ClassVar[bool] = False

    bottleneck: int = setting(128, "p, width of what a head reads of a block")
    reduction: int = setting(4, "D / S, the large model's width over the small one's")
    layers: int = setting(2, "blocks of the small model")
    reads: tuple[int, ...] | None = setting(None, "blocks that have a head, from 0; None: all",
                                            other=((1,),))
    weighed: bool = setting(False, "heads are weighed by shares that train")
    frozen: bool = setting(True, "the large model runs without a graph",
                           unseen="alone nothing trains in it: tests/methods/test_levi.py")

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.reduction, self.layers) < 1:
            raise RecipeError(f"{self}: expected bottleneck, reduction and layers of at least 1")
        if self.reads is not None and (not self.reads or len(set(self.reads)) < len(self.reads)
                                       or min(self.reads) < 0):
            raise RecipeError(f"levi(reads={self.reads}): expected numbers of blocks, each once")

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def repeats(self) -> int | None:
        return 1 if self.reads is None else None

    def side(self, anatomy: Anatomy) -> Levi:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        (blocks,) = anatomy.stacks().values()
        read = range(len(blocks)) if self.reads is None else self.reads
        if max(read) >= len(blocks):
            raise RecipeError(f"levi(reads={self.reads}): the model has blocks 0 to "
                              f"{len(blocks) - 1}")
        place: Any = head_linear(anatomy)
        slot = attacher.slot(place.path)
        mine = any(p.adapter == name for p in slot.parts)
        if mine or any(n.startswith(f"{place.path}.") for n in attacher.adapter.selected):
            raise RecipeError(f"levi has heads of its own in the place of {place.path}, so nothing "
                              "else can train there: head=False, and leave it out of targets")
        if self.frozen:
            frozen(attacher, part, ())
            still(attacher, part, [blocks])
        d = width(anatomy, part, [blocks])
        s = narrowed(self, d)
        heads = next((h for h in (4, 2) if s % h == 0), 1)
        like = next(p for p in attacher.model.get_submodule(blocks[0].path).parameters()
                    if p.is_floating_point())
        for i, block in enumerate(blocks):
            small = Small(d, s, self.layers, heads) if not i else None
            Viewed(state, name, small, i in read, self.frozen).to(
                device=like.device, dtype=like.dtype).listen(attacher.slot(block.path), part.name)
        Answers(state, name, Heads(len(read), d, self.bottleneck, s, place.out, self.weighed)).to(
            device=like.device, dtype=like.dtype).listen(slot, f"{part.name}_heads")

    def count(self, blocks: int, d: int, classes: int) -> int:
        """Trainable parameters where so many blocks of width d are read."""
        s, p = d // self.reduction, self.bottleneck
        return Small.count(d, s, self.layers) + blocks * (d * p + p + classes * (p + s + 1)) \
            + blocks * self.weighed
