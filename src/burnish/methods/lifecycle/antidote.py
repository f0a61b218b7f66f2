from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.choose.above import threshold
from ...blocks.choose.moments import SecondMoments, read
from ...blocks.weight.factor import Chain
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.targets import match


@dataclass(frozen=True, kw_only=True)
class Antidote(Method):
    """Antidote: after tuning, the weights that harmful prompts use most are set to zero.

        S_ij = |W_ij| sqrt(mean over tokens of x_j^2)       x on harmful data (Wanda's score)

    and the largest S go. ranking="row", as released: in every row of n entries the
    ``ceil(n ratio)`` largest (of a factor B of rank 8 one, which is 12.5 %, not 10);
    "global", as the paper says it: the share `ratio` of all entries together, by one threshold
    (of scores equal to it none)::

        told = burnish.parse("antidote")[0].lifecycle(tuned, harmful)        # batches

    W are the factors A (rank, in) and B (out, rank) of `lora` (and `dora`) where a recipe has some,
    B's input being A x; else q, k and v of the model (`targets` names others), which under a recipe
    have to be what it trains (``full``). Inputs are seen by
    the whole model with nothing masked, then all is masked at once. Padding (`attention_mask`) has
    no part. ``harmful=None`` ranks by |W| alone.

    Trains nothing, needs a forward over the data and one vector as long as a row per matrix.
    Merging comes after. Large weights serve the task too: score both. Published: 2,000 harmful
    samples, LoRA of rank 256 (unconfirmed) after 20 epochs of data with 10 to 20 % harmful; up to
    17.8 % less harm at a small loss (unconfirmed). When not: updates that are no product of two
    factors (lokr), which are refused, as are weights of a base that a run only stands on.
    """

    paper: ClassVar[str] = ("Antidote: Post-fine-tuning Safety Alignment for Large Language Models "
                            "against Harmful Fine-tuning, ICML 2025, arXiv:2408.09600")
    tier: ClassVar[str] = "checked against an independent equation"

    ratio: float = setting(0.1, "share of the entries that goes", alias=("dense_ratio",))
    ranking: Literal["row", "global"] = setting("row", "scores against a row's, or against all")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"antidote: ratio is a share above 0 and up to 1, got {self.ratio:g}")
        if self.ranking not in ("row", "global"):
            raise ConfigError(f"antidote: ranking={self.ranking!r}: expected row or global")

    @torch.no_grad()
    def lifecycle(self, tuned: Any, harmful: Iterable[Mapping[str, Any]] | None
                  ) -> dict[str, float]:
        """Masks what there is, in place. The share of each matrix that has become zero."""
        model: nn.Module = tuned if isinstance(tuned, nn.Module) else tuned.model
        terms = [] if isinstance(tuned, nn.Module) else list(tuned.terms(Chain))
        found = self._factors(tuned, terms) if terms else self._whole(tuned, model)
        if harmful is not None:
            seen: dict[str, list[SecondMoments]] = {}
            for m in found:
                seen.setdefault(m.path, []).append(m.seen)
            read(model, seen, harmful, "antidote")
        else:
            for m in found:
                m.seen = None

        def scores() -> Iterator[Tensor]:
            return (self._score(m) for m in found)

        cut = None
        if self.ranking == "global":
            every = math.floor(self._share * sum(m.weight.numel() for m in found))
            if not every:
                raise ConfigError(f"antidote: ratio={self.ratio:g} is less than one entry of these "
                                  f"{len(found)} matrices")
            cut = threshold(scores, every)
        told = {}
        for m, score in zip(found, scores(), strict=True):
            gone = self._row(score) if cut is None else score > cut
            m.weight.masked_fill_(gone, 0)
            told[m.name] = float(gone.float().mean())
        return told

    @property
    def _share(self) -> Fraction:
        """The ratio as it is written: 0.29 of 100 are 29."""
        return Fraction(str(self.ratio))

    def _row(self, score: Tensor) -> Tensor:
        at = score.topk(math.ceil(self._share * score.shape[1])).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, at, True)

    def _score(self, m: _Matrix) -> Tensor:
        size = m.weight.abs().to(torch.promote_types(m.weight.dtype, torch.float32))
        return size if m.seen is None else size * m.seen.value.to(size).sqrt()

    def _factors(self, tuned: Any, terms: list[tuple[str, Chain]]) -> list[_Matrix]:
        """A and B of these products of factors, which have to be plain ones."""
        if self.targets is not None:
            raise ConfigError("antidote: targets are of whole weights; of a recipe's factors all "
                              "are ranked")
        places = {q.name: q for p in tuned.anatomy.places for q in (p, *tuned.anatomy.slices(p))}
        out = []
        for name, term in terms:
            place = places[name]
            if type(term).dense is not Chain.dense or place.kind not in LINEAR:
                raise ConfigError(f"antidote: {name} ({place.kind}) has an update that is no plain "
                                  "product of two factors behind a linear; merge it first")
            out += [_Matrix(f"{name}.A", place.path, term.A.data, SecondMoments()),
                    _Matrix(f"{name}.B", place.path, term.B.data, SecondMoments(term.A.data))]
        return out

    def _whole(self, tuned: Any, model: nn.Module) -> list[_Matrix]:
        anatomy = Anatomy.of(tuned) if isinstance(tuned, nn.Module) else tuned.anatomy
        places = match(anatomy, "q,k,v" if self.targets is None else self.targets)
        if odd := [p for p in places if p.kind not in LINEAR]:
            raise ConfigError(f"antidote ranks what linears read, and {odd[0].name} is of another "
                              f"kind ({odd[0].kind})")
        changed = {} if isinstance(tuned, nn.Module) else dict(tuned.terms(nn.Module))
        held = None if isinstance(tuned, nn.Module) else {
            t.data_ptr() for t in tuned.tensors().values()}
        out = []
        for p in places:
            if any(name.partition("[")[0] == p.name.partition("[")[0] for name in changed):
                raise ConfigError(f"antidote: {p.name} stands with an update that is no product of "
                                  "factors; merge it first, so that the whole weight is ranked")
            w = p.stored(model.get_submodule(p.path))
            if held is not None and w.data_ptr() not in held:
                raise ConfigError(f"antidote: {p.name} is the base's own, which no adapter holds: "
                                  "name by targets what this recipe has tuned as a whole, or merge "
                                  "it first")
            if not w.is_floating_point():
                raise ConfigError(f"antidote: {p.name} is held as codes, which cannot be masked")
            out.append(_Matrix(p.name, p.path, p.view(w.data), SecondMoments()))
        return out


LINEAR = ("linear", "conv1d")


@dataclass
class _Matrix:
    """A matrix (out, in), a view of what is stored, and what it reads (None: unknown)."""

    name: str
    path: str
    weight: Tensor
    seen: SecondMoments | None
