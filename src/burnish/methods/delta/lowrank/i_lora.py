from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ....blocks.weight.interpolated import Interpolated
from ....core.batches import inputs
from ....core.errors import ConfigError, RecipeError
from ....core.keys import Key
from ....core.method import Method, setting
from ....core.site import Place, Site
from ....core.stage import Stage
from ...objective.direction_match import mask_key
from ...objective.distill import counted, logits_of
from ...objective.feature_distill import state
from .lora import check_dropout

if TYPE_CHECKING:
    from ....core.anatomy import Anatomy
    from ....engine.tuned import Tuned


@dataclass(frozen=True)
class Following:
    """The long-term factors follow the working ones after every update."""

    terms: Sequence[Interpolated]
    ema: float

    def after_update(self, step: int) -> None:
        for term in self.terms:
            term.follow(self.ema)


@dataclass(frozen=True, kw_only=True)
class ILora(Method):
    """I-LoRA: a LoRA that trains, and its running mean that answers and that it stays near.

        W' = W + s B A,   s = alpha / rank                        while a graph is wanted
        A_slow <- ema A_slow + (1 - ema) A,  B_slow alike         after each update
        W' = W + s B_slow A_slow                                  in evaluation without one
        loss + weight mean (z - t)^2,   t = z_slow                over samples of the memory

    A (rank, in), B (out, rank), z the logits of the working set, z_slow those of the long-term one
    on the same samples, in evaluation mode and without gradients. With compare="hidden" they are
    the states after each block instead, all of them, tokens that the attention mask leaves out
    aside; with target="max" ``t = max(z, z_slow)``: only what has fallen below the long-term set is
    pulled up. (The authors' code has both of these, and ema=0.25.) ``replay`` in the batch says
    which samples are from the memory (``blocks.state.reservoir.Reservoir`` holds one and mixes
    batches); without any the term is zero. With labels per token, rows that answer none do not
    count. Several data sets are tasks, one after the other in the same adapter.

    Start: B = 0, both sets the same: the pre-trained function exactly. Trains rank (in + out) per
    matrix; as many numbers beside them in memory and in the file. Kept for backward as LoRA; costs
    a forward on the samples of the memory. Merges exactly, and leaves as a plain LoRA: the
    long-term set. No weight decay. The paper averages factors, not updates (``E[B] E[A]`` is not
    ``E[B A]``). The text leaves open what is compared: logits as a mean over entries are
    our reading (unconfirmed), as are ema and weight.
    """

    paper: ClassVar[str] = ("Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient "
                            "Tuning (2024), arXiv:2402.18865")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    context: ClassVar[dict[str, Key]] = {
        "replay": Key("1 for a sample of the memory, else 0", training=True)}
    sees_run: ClassVar[bool] = True
    by_data: ClassVar[bool] = True                       # how many samples are of the memory
    excused: ClassVar[dict[str, str]] = {
        "it_acts": "what trains does not answer in evaluation, where the check looks; "
                   "tests/methods/test_i_lora.py"}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    ema: float = setting(0.99, "lambda_e, what the long-term set keeps at an update",
                         alias=("lambda_e",), other=(0.5,))
    weight: float = setting(1.0, "gamma, of the term that holds on to the memory", other=(100.0,))
    compare: Literal["logits", "hidden"] = setting(
        "logits", "with those of the long-term set: logits, or the states after each block",
        beside={"weight": 100.0})
    target: Literal["symmetric", "max"] = setting(
        "symmetric", "what long-term values pull: all others, or only those below them",
        beside={"weight": 100.0})

    def __post_init__(self) -> None:
        check_dropout("i_lora", self.dropout)
        if not 0 <= self.ema < 1 or self.weight < 0:
            raise RecipeError("i_lora: ema from 0 to below 1 and a weight of at least 0 are "
                              f"expected, got {self.ema} and {self.weight}")

    def delta(self, site: Site) -> Interpolated:
        site.place.check_rank(self.rank, "i_lora")
        term = Interpolated(site.place, self.rank, self.alpha / self.rank, self.dropout)
        for p in term.theta():
            p.burnish_decay = False                      # type: ignore[attr-defined]
        return term

    def controller(self, tuned: Tuned) -> Following:
        return Following([t for _, t in tuned.terms(Interpolated)], self.ema)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        z = logits_of(run.outputs, self.name)
        rows = _memory(run.given.get("replay", 0), z) if self.weight else []
        if not rows:                                     # nothing to hold on to in this batch
            yield 0 * z.sum()
            return
        if self.compare == "hidden":
            theirs = run.reference_taps(tuned.training, rows)
            pairs = [(state(run.taps[p]), state(theirs[p])) for p in self.taps(tuned.anatomy)]
            anatomy = tuned.anatomy
            counts = [_valid(run.batch, mask_key(anatomy, b), rows, t)
                      for b, (_, t) in zip(anatomy.blocks, pairs, strict=True)]
            yield self.weight / len(pairs) * sum(
                self._off(f[rows], t, m) for (f, t), m in zip(pairs, counts, strict=True))
            return
        slow = logits_of(run.reference(tuned.training, rows), self.name)
        counts = counted(tuned.model, run.batch, z.shape[:-1])
        yield self.weight * self._off(z[rows], slow, None if counts is None else counts[rows])

    def _off(self, z: Tensor, slow: Tensor, counts: Tensor | None) -> Tensor:
        """mean (z - t)^2 over rows and entries; over rows that count."""
        off = (slow - z).to(torch.promote_types(z.dtype, torch.float32))
        off = (off.clamp_min(0) if self.target == "max" else off).square().mean(-1)
        m = torch.ones_like(off) if counts is None else counts.to(off.dtype)
        return (off * m).sum() / m.sum().clamp_min(1)

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        if self.compare == "logits" or not self.weight:
            return ()
        if not anatomy.blocks:
            raise RecipeError("i_lora(compare='hidden') compares the states after each block, and "
                              "this model has none; expected compare='logits'")
        return tuple(b.path for b in anatomy.blocks)

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        """A task after the other, all in this adapter."""
        for task in tasks:
            yield Stage(tuned.training or next(iter(tuned.adapters)), data=task)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)


def _memory(replay: Any, z: Tensor) -> list[int]:
    """Which samples are from the memory; all of them where nobody knows (a simulation)."""
    given = torch.as_tensor(replay)
    if isinstance(given, FakeTensor):
        return list(range(len(z)))
    return given.expand(len(z)).nonzero().flatten().tolist()


def _valid(batch: Any, key: str, rows: list[int], states: Tensor) -> Tensor | None:
    """The tokens of these samples that count; None: all do. Raises ConfigError where some do not,
    and it cannot be said which of the states they are."""
    given = inputs(batch)
    mask = given.get(key) if isinstance(given, Mapping) else None
    if not isinstance(mask, Tensor):
        return None
    if mask.shape == (len(mask), *states.shape[1:-1]):
        return mask[rows]
    if isinstance(mask, FakeTensor) or bool(mask.all()):
        return None
    raise ConfigError(f"i_lora(compare='hidden'): the {key} leaves tokens out, and is "
                      f"{tuple(mask.shape)} where states are {tuple(states.shape[:-1])}; expected "
                      "one entry a token, or compare='logits'")
