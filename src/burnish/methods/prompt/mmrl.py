from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.state.generators import Aligned, Space
from ...blocks.state.prompts import Tokens
from ...blocks.state.readings import Normed, Readings, Second, Slots
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import refuse, towers
from ._stacks import states_as_they_were

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Mmrl(Method):
    """MMRL and MMRL++: a space of both modalities feeds the last blocks of both towers, and
    pictures are read twice.

    R (length, code) gives block j of the last `layers` its rows ``R_j = R F_j^T + b_j``, behind
    the first token of a picture and of a text (which is as many tokens longer there, and not
    before or behind); each block has fresh ones, ``slot <- beta R_j + (1 - beta) slot``. F_j (d,
    code), or with rank > 0 ``F_j = F + A_j B_j``, F shared by a tower's blocks. Of a picture
    ``f_c = P_v n(cls)`` and ``f_r = P_r mean n(slots)``, P_r a copy of P_v that trains
    (``proj_rank=0``, held as P_r - P_v) or ``P_v + (A B)^T``; t a text:

        L = a H(s cos(f_c, t)) + (1 - a) H(s cos(f_r, t))
            + weight (1 - cos(f_c, f_c^0)) + weight (1 - cos(t, t^0)),      ^0 the base's

    The model's logits are ``a s cos(f_c, t) + (1 - a) s cos(f_r, t)``, and the task's loss, a mean
    of cross-entropies of them, is made L beside it (blocks/state/readings.py). Pictures of classes
    that training has not seen are read by f_c alone: say so, ``unseen=1`` in the batch or in
    ``tuned.given``. The texts given are the hand-made template too.

    MMRL++ is the preset mmrl_pp: rank 4, proj_rank 64, beta 0.9.

    Start: R N(0, 0.02^2), F as linears start, B and P_r - P_v 0: never the pre-trained function.
    Trains length code + layers ((code + 1) (d_v + d_t)) + d_v p, p where both meet: 4,992,256 on
    CLIP ViT-B/16, 813,312 with mmrl_pp. Kept for backward: what the last `layers` blocks keep;
    those below have no graph. A step runs the base once more, without one (not with weight=0). A
    finished file holds rows and P_r - P_v alone. Not mergeable.

    The authors: AdamW at 1e-3, batches of 4, weight 0.01 to 7 by data. Departure: weight decay
    pulls P_r to P_v.
    """

    paper: ClassVar[str] = ("MMRL: Multi-Modal Representation Learning for Vision-Language Models "
                            "(2025), arXiv:2503.08497; MMRL++: Parameter-Efficient and "
                            "Interaction-Aware Representation Learning for Vision-Language Models "
                            "(2025), arXiv:2505.10088")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    context: ClassVar[Mapping[str, Key]] = {"unseen": Key(
        "1 for an image of classes that training has not seen, else 0", optional=True)}
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    sees_run: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"layers": 2, "code": 8, "rank": 0}

    length: int = setting(5, "rows of R", alias=("n_rep_tokens",))
    code: int = setting(512, "width of the rows of R", alias=("rep_dim",))
    layers: int = setting(7, "how many of the last blocks have rows", other=(1,))
    rank: int = setting(0, "of a block's own share of F; 0: each block has its own F",
                        alias=("res_lora_dim",), other=(2,))
    proj_rank: int = setting(0, "of P_r - P_v; 0: all of it", alias=("proj_lora_dim",), other=(2,))
    beta: float = setting(1.0, "of a block's rows over what the block before left of its own")
    alpha: float = setting(0.7, "a, of the reading by the class token")
    weight: float = setting(1.0, "of what holds features near the base's", alias=("reg_weight",))
    coupled: bool = setting(True, "rows are made of one space; False: they train themselves",
                            beside={"code": 512})

    def __post_init__(self) -> None:
        if min(self.length, self.code, self.layers) < 1 or min(self.rank, self.proj_rank) < 0:
            raise RecipeError(f"mmrl(length={self.length}, code={self.code}, layers="
                              f"{self.layers}, rank={self.rank}, proj_rank={self.proj_rank}): "
                              "expected a row, a width, a block and ranks of 0 or more")
        if not (0 <= self.alpha <= 1 and 0 <= self.beta <= 1 and self.weight >= 0):
            raise RecipeError(f"mmrl(alpha={self.alpha}, beta={self.beta}, weight={self.weight}): "
                              "expected shares from 0 to 1 and a weight of 0 or more")
        if not self.coupled and (self.rank or self.code != Mmrl.code):
            raise RecipeError("mmrl: rank and code are of a space, and with coupled=False rows "
                              "are made of none: leave them out")

    def repeats(self) -> int | None:
        return None

    def prompt(self, anatomy: Anatomy) -> Mmrl:
        if self.targets is not None:
            raise RecipeError("mmrl takes no targets: it stands in the last blocks; say how many "
                              "with layers")
        two = towers(anatomy)
        if two is None:
            refuse(self, anatomy)
        if self.layers > (most := min(len(two.text), len(two.vision))):
            raise RecipeError(f"mmrl(layers={self.layers}): the towers have {len(two.text)} and "
                              f"{len(two.vision)} blocks; at most {most}")
        if two.scale is None or two.vision[0].stack not in anatomy.final_norms:
            raise RecipeError("mmrl needs a tower of pictures that ends in a norm and a model with "
                              f"logit_scale; {type(anatomy.model).__name__} has not both")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        two, state, name = towers(attacher.anatomy), attacher.state, attacher.adapter.name
        outs = (attacher.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size)
        space = Space(self.length, self.code, outs, self.rank) if self.coupled else None
        for side, blocks in enumerate((two.text, two.vision)):
            for i, block in enumerate(last := blocks[-self.layers:]):
                maker = space and Aligned(space, side, outs[side], self.rank, not (side or i))
                rows = None if space else torch.randn(self.length, outs[side]) * 0.02
                tokens = Tokens(state, name, self.length, rows, after=1, enter=not i, maker=maker,
                                leave=not side and i + 1 == len(last), beta=self.beta)
                tokens.to(attacher.device(block.path)).listen(attacher.slot(block.path), part.name)
            states_as_they_were(attacher, part, blocks[0].stack, self.length, 1)
        stack, second = two.vision[0].stack, Second(state, name, outs[1], two.joint, self.proj_rank)
        for path, one, key in (
                (stack.rpartition(".")[0], Slots(state, name, self.length, 1), "slots"),
                (attacher.anatomy.final_norms[stack], Normed(state, name), "norm"),
                (two.image, second.to(attacher.device(two.image)), "second"),
                ("", Readings(state, name, self.alpha, two.scale), "readings")):
            one.listen(attacher.slot(path), f"{part.name}_{key}")

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        for one in tuned.model.modules():
            if isinstance(one, Readings) and one.adapter == tuned.training \
                    and (gap := one.take()) is not None:
                yield gap
        if self.weight:
            base = run.reference()
            for key in ("image_embeds", "text_embeds"):
                mine, theirs = run.outputs[key], base[key].to(run.outputs[key].device)
                yield self.weight * (1 - F.cosine_similarity(mine, theirs)).mean()

    def finished(self) -> Mmrl:
        return replace(self, coupled=False, rank=0, code=Mmrl.code, proj_rank=0)

    def count(self, d: int, out: int, p: int) -> int:
        """Trainable parameters at text width d, pictures of width `out`, both meeting in p."""
        w, r, q = self.code, self.rank, self.proj_rank
        second = q * (out + p) if q else out * p
        if not self.coupled:
            return self.layers * self.length * (d + out) + second
        each = sum(r * (w + n) + n if r else (w + 1) * n for n in (d, out))
        return self.length * w + (w * (d + out) if r else 0) + self.layers * each + second
