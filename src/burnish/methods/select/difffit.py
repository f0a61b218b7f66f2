from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.gates import Affine
from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: tables of classes: DiT's y_embedder, diffusers' class_embedding and class_embedder
_CLASSES = re.compile(r"(^|\.)(y_embedder|class_embed(der|ding)?|label_emb(ed(der|ding)?)?)\.")


@dataclass(frozen=True, kw_only=True)
class Difffit(Method):
    """DiffFit: biases, norms, the table of classes, and a scale on what each sub-layer adds.

    ``h <- h + gate * (gamma_1 * Attn(h))`` and ``h <- h + gate * (gamma_2 * MLP(h))``: gamma (d,)
    on the result of the last linear of attention and MLP, before the gate and the residual; one
    number with ``gain="scalar"``. The first ``depth`` of the blocks have them.

    Start: gamma = 1, the pre-trained function exactly. Trains every bias and norm parameter outside
    the head, tables of classes whole (with the row of no class), and 2 d per block:
    DiT-XL/2 483,840 + 64,512 in its blocks. No weight decay. Kept for backward: what gamma scales,
    no input of a linear. Merges exactly: ``W <- diag(gamma) W``, ``b <- gamma * b``; with the gate
    it commutes. A projection that its module reads past (``nn.MultiheadAttention``) has no gamma.
    `targets` narrows it to some tensors and to the gamma of some linears.

    No complete code was published: that gamma is a vector, and which blocks have it (the paper's
    are said to be a part of them; here all), is our reading; so is the table, with which DiT-XL/2
    trains more than the 0.12 % that the paper reports. Position tables are the loader's.
    """

    paper: ClassVar[str] = "DiffFit: Unlocking Transferability of Large Diffusion Models (2023)"
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[Mapping[str, str]] = {
        "bf16_is_near_fp32 on graphs": "another node is the largest there: with a mean in the place"
                                       " of the maximum it is near"}

    gain: Literal["vector", "scalar"] = setting("vector", "a number per channel, or one")
    depth: float = setting(1.0, "share of the blocks, from the first, that have gamma")

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 1:
            raise RecipeError(f"difffit: depth={self.depth}: expected a share in [0, 1]")

    def repeats(self) -> int | None:
        return 1 if self.depth in (0, 1) else None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for name in self._asked(anatomy)[0]:
            yield Selection(name, decay=False)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for path, width in self._asked(anatomy)[1].items():
            yield Branch(path, Affine(width if self.gain == "vector" else 1), compose="replace")

    def _asked(self, anatomy: Anatomy) -> tuple[list[str], dict[str, int]]:
        """(tensors that train, widths of the linears that are scaled) of what targets name."""
        names, sites = list(self._names(anatomy)), dict(self._sites(anatomy))
        if not names and not sites:
            raise RecipeError("difffit: this model has neither biases nor norms to train, nor a "
                              "linear at the end of attention or MLP to scale")
        marks = {f"{path}.weight": path for path in sites}
        kept = chosen(anatomy, self, [*names, *marks], siblings=True)
        return [n for n in kept if n not in marks], {p: sites[p] for n, p in marks.items()
                                                     if n in kept}

    @staticmethod
    def _names(anatomy: Anatomy) -> Iterator[str]:
        for name, p in anatomy.model.named_parameters():
            head, _, leaf = name.rpartition(".")
            if p.is_floating_point() and ".burnish." not in f".{name}" \
                    and not any(f"{name}.".startswith(f"{h}.") for h in anatomy.head) and (
                        leaf.endswith("bias") and p.dim() == 1 or head in anatomy.norms
                        or _CLASSES.search(name)):
                yield name

    def _sites(self, anatomy: Anatomy) -> Iterator[tuple[str, int]]:
        wide = {p.path: p.out for p in anatomy.places
                if p.kind in ("linear", "conv1d")}
        for block in anatomy.blocks[: round(self.depth * len(anatomy.blocks))]:
            for path in (block.attn_out, block.cross_out, block.mlp_out):
                if path in wide:
                    yield path, wide[path]
