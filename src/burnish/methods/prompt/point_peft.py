from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.clouds import Noted
from ...blocks.state.coordinator import Heard
from ...blocks.state.recalled import (
    INNER,
    Bank,
    Geometry,
    Near,
    Placed,
    Prompted,
    Recalled,
    Within,
    enough,
    said,
)
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import point_groups, refuse, unmet
from ...core.protocols import Attacher
from ...core.site import Branch
from ..branch._sites import found, mlp_ends, samples_first
from ..delta.lowrank.lora import check_dropout
from .vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class PointPeft(Method):
    """Point-PEFT: prompts that a bank of the training set's features recalls, and an adapter that
    goes by where tokens stand.

    q (d) is what the frozen network says of a cloud, M (d, N) what it said of those it was shown
    (`calibration`: training data alone), w = softmax of the K = `recalled` largest cosines:

        C = [q; sum_k w_k M_k; M_k1 .. M_kK]      P = drop(E) + C + f_8(C)       (K + 2, d)

    P stands behind the special tokens of each of the first `layers` blocks and leaves behind it.
    In every block the MLP's answer f becomes f + scale A_1(f); tokens of points further apart than
    `sight` do not attend to each other. Behind it, on tokens of points and prompts, which stand at
    the groups' centres and at places that train: of M centres and their `neighbours`, n <- n +
    attention(norm(n)), 18 wide and one for all blocks, v_j = gelu(BN(max n)) + 0.3 x_j,

        x_i <- x_i + 0.3 sum_j w_ij v_j,  w_ij ~ 1 / (|p_i - p_j|^2 + 1e-8),   x <- x + A_2(x)

    Start: bottlenecks (quick_gelu) Xavier, biases N(0, 1e-6), E normal of 0.02 cut at two
    deviations: not the pre-trained function. Trains 2 (2 d b + b + d) + 4 d per block, (K + 2) d
    + 2 d p + p + d per block with prompts, 72 d + 3 (K + 2) once: b = `bottleneck`, p =
    `prompt_bottleneck`. Kept for backward: as of a frozen block, and the neighbourhoods, M k d a
    few times. Not mergeable; the bank, samples d numbers in half precision, is part of the file.
    One more forward without a graph for q.

    Best readings: q is the class token plus the largest of the tokens behind the last norm; the
    places start uniform in the cube, and centres are half the tokens that are there.
    """

    paper: ClassVar[str] = ("Point-PEFT: Parameter-Efficient Fine-Tuning for 3D Pre-trained Models "
                            "(2024), arXiv:2310.03059")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"groups of points", "mlp behind mixing",
                                                 "open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"samples": 4, "recalled": 2, "prompt_bottleneck": 3,
                                      "neighbours": 2}

    bottleneck: int = setting(16, "b, width of the adapters", alias=("adapter_dim",))
    prompt_bottleneck: int = setting(8, "p, width of what adapts recalled features")
    recalled: int = setting(8, "K, features of the bank that prompts are made of", other=(1,))
    samples: int = setting(2048, "clouds that the bank holds at most", other=(3,))
    layers: int = setting(6, "blocks with prompts, from the first", least=1)
    neighbours: int = setting(8, "k, tokens gathered at a centre", other=(3,))
    centres: int | None = setting(None, "M; None: half the tokens", other=(3,))
    sight: float | None = setting(1.28, "how far apart points may attend to each other; None: "
                                         "however far", other=(0.5,))
    scale: float = setting(0.7, "how much A_1 counts")
    dropout: float = setting(0.1, "dropout on E")

    def __post_init__(self) -> None:
        check_dropout("point_peft", self.dropout)
        sizes = (self.bottleneck, self.prompt_bottleneck, self.recalled, self.neighbours,
                 1 if self.centres is None else self.centres)
        if min(sizes) < 1 or self.layers < 0 or self.samples < self.recalled:
            raise RecipeError(f"{self}: expected sizes of at least 1, layers of 0 or more and "
                              "samples of at least `recalled`")
        if self.sight is not None and self.sight <= 0:
            raise RecipeError(f"point_peft(sight={self.sight}): expected a positive distance, or "
                              "None")

    def repeats(self) -> int | None:
        return None

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | PointPeft]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        if self.layers > len(anatomy.blocks):
            raise RecipeError(f"point_peft(layers={self.layers}): this model has "
                              f"{len(anatomy.blocks)} blocks")
        yield self
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = Bottleneck(s.width, self.bottleneck, act="quick_gelu", scale=self.scale,
                              init="xavier")
            path = s.block.mlp or s.path
            yield Branch(path, made, read=(path, "output"))

    def install(self, attacher: Attacher, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        blocks, length = anatomy.blocks, self.recalled + 2
        d = blocks[0].hidden_size or 0
        after = special_tokens(attacher.model, blocks[0].stack)
        end = anatomy.final_norms.get(blocks[0].stack) or blocks[-1].path
        Noted(state, name, ("centres", name), _as_they_are, self.name
              ).listen(attacher.slot(point_groups(anatomy) or ""), part.name)
        bank = Bank(self.samples, d).to(attacher.device(""))
        if self.layers:
            self._fill(attacher, part, bank, end, after)
            Heard(state, name).listen(attacher.slot(end), f"{part.name}_end")
            Recalled(state, name, bank, self.recalled, after).listen(attacher.slot(""), part.name)
        shared = Within(d, length)
        for i, block in enumerate(blocks):
            prompts = Prompted(length, d, self.prompt_bottleneck, self.dropout) \
                if i < self.layers else None
            geometry = Geometry(shared, i == 0, d, self.bottleneck, self.neighbours, self.centres)
            Placed(state, name, after, prompts, geometry).to(attacher.device(block.path)).listen(
                attacher.slot(block.path), part.name)
            if self.sight is not None:
                Near(state, name, self.sight).listen(attacher.slot(block.attn or ""),
                                                      f"{part.name}_near")

    def _fill(self, attacher: Attacher, part: Method, bank: Bank, end: str, after: int) -> None:
        def hear(module: Any, args: Any, out: Any) -> None:
            bank.take(said(out[0] if isinstance(out, tuple) else out, after))

        handle = attacher.model.get_submodule(end).register_forward_hook(hear)
        try:
            ran = attacher.rehearse(part, lambda: bank.full)
        finally:
            handle.remove()
        if ran:
            enough(bank, self.recalled)

    def count(self, d: int, blocks: int) -> int:
        """Trainable parameters in so many blocks of width d."""
        length = self.recalled + 2
        each = 2 * Bottleneck.count(d, self.bottleneck) + 4 * d
        prompted = length * d + Bottleneck.count(d, self.prompt_bottleneck)
        return blocks * each + self.layers * prompted + 4 * INNER * d + 3 * length


def _as_they_are(centres: Any) -> Any:
    return centres
