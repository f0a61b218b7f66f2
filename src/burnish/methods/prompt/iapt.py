from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.attending import open_attentions
from ...blocks.state.instructed import Instructed, Instruction, Normed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.stage import Stage
from ._stacks import key_value_linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Iapt(Method):
    """IAPT: every layer makes a few rows of the instruction it reads, and attends to them too.

        U = H W_d^T,   Z = softmax_tokens(U W_s^T)^T U,   P = R(Z) W_u^T + b

    H (n, d) the layer's input states of the instruction, W_d (bottleneck, d), W_s (length,
    bottleneck), W_u (d, bottleneck); P (length, d) stands before the layer's tokens, which attend
    to it, and is gone behind the layer: keys and values alone, through the layer's own norm and
    projections. ``R(z) = sum_{i<=6} a_i z^i / (1 + |sum_{1<=j<=4} b_j z^j|)``, a and b of each
    layer train, computed in fp32 at least.

    The instruction are the real tokens before the first that has a label, so that no answer has a
    say in its own rows; a text without labels (as ``generate`` gives) is all instruction. The rows
    are made once: the key-value cache carries them, and a token that is written costs `length` keys
    more.

    With ``search > 0`` updates alternate, the generator's and R's (a and b), as in DARTS; in a run
    (``fit``, ``tuned.run``) for this share of it, then R stays and the generator begins again.

    Start: R the GELU to 1e-4 on [-3, 3], W_d and W_s as linears start, W_u N(0, 0.02^2), b 0:
    never the pre-trained function. Trains per layer bottleneck (2 d + length) + d + 11: 67.3M on
    LLaMA-7B. Kept for backward: what frozen blocks keep, and bottleneck numbers a token and layer.
    Not mergeable.

    Best readings: the order pooling, R, W_u; halves that alternate update by update. Rows stand at
    no rotary position, and tokens where they were. Attention by ``F.scaled_dot_product_attention``
    in blocks that begin with a norm.
    """

    paper: ClassVar[str] = ("IAPT: Instruction-Aware Prompt Tuning for Large Language Models "
                            "(2024), arXiv:2405.18203")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"writes on", "open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    excused: ClassVar[dict[str, str]] = {
        "every_tensor_has_a_gradient": "its batches are answer from the second token on, and an "
                                       "instruction of one token leaves pooling no choice: "
                                       "tests/methods/test_iapt.py takes longer ones"}

    length: int = setting(4, "rows of a layer")
    bottleneck: int = setting(256, "width in which an instruction is pooled")
    search: float = setting(0.0, "share of a run in which R is looked for; 0: it trains beside")

    def __post_init__(self) -> None:
        if min(self.length, self.bottleneck) < 1 or not 0 <= self.search < 1:
            raise RecipeError(f"iapt(length={self.length}, bottleneck={self.bottleneck}, search="
                              f"{self.search}): expected a row, a width and a share from 0 to "
                              "below 1")

    @property
    def relies_on(self) -> tuple[str, ...]:          # type: ignore[override]
        return ("gradients",) if self.search else ()

    def forbids(self) -> dict[str, str]:
        return {"how attention is computed": "iapt adds rows to the exact attention"}

    def prompt(self, anatomy: Anatomy) -> Iapt:
        if self.targets is not None:
            raise RecipeError("iapt takes no targets: it stands in every attention")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        open_attentions(anatomy, self.name)
        for block in anatomy.blocks:
            if any(n.startswith(f"{block.attn}.") for n in block.norms):
                raise RecipeError(f"iapt: {block.attn} norms its queries and keys, and rows would "
                                  "come without: not served")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        for i, block in enumerate(anatomy.blocks):
            if (attn := block.attn) is None:
                continue
            places = key_value_linears(anatomy, i, attn, self.name)
            sources = [(p.path.removeprefix(f"{attn}."), p.rows) for p in places]
            for norm in block.norms:
                Normed(state, name).listen(attacher.slot(norm), f"{part.name}_norm")
            Instructed(state, name, self.length, places[0].inp, self.bottleneck, sources, attn).to(
                attacher.device(attn)).listen(attacher.slot(attn), part.name)
        Instruction(state, name).listen(attacher.slot(""), f"{part.name}_ids")

    def controller(self, tuned: Tuned) -> Any:
        return Turns(self._makers(tuned)) if self.search else None

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        if self.search:
            yield Stage(tuned.training, until=self.search, then=self.again)
            yield Stage(tuned.training)

    def again(self, tuned: Any) -> None:
        """The generators begin again; R stays from now on."""
        for one in self._makers(tuned):
            one.begin()
            one.settled = True

    def _makers(self, tuned: Any) -> list[Any]:
        return [m.maker for m in tuned.model.modules()
                if isinstance(m, Instructed) and m.adapter == tuned.training]

    def count(self, d: int, blocks: int) -> int:
        """Trainable parameters at width d."""
        return blocks * (self.bottleneck * (2 * d + self.length) + d + 11)


class Turns:
    """Updates alternate, all but R and then R, until R is settled."""

    def __init__(self, makers: list[Any]):
        self.makers = makers

    def before_update(self, step: int) -> None:
        for maker in self.makers:
            for name, p in maker.named_parameters():
                if name.startswith("rational.") != bool(step % 2 and not maker.settled):
                    p.grad = None
