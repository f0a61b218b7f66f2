from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...blocks.choose.novelty import Recent, Sketch, looked_at
from ...core.errors import ConfigError, RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ..objective.distill import counted, logits_of

if TYPE_CHECKING:
    from ...core.protocols import Pass, Tuned

#: passes of a classifier after which it is said that the surest rows are kept, and how much surer
#: they must be: the mean probability of the likeliest class, of those kept less of all
PASSES, SURER = 16, 0.1
TOLD = "of two samples the same one is taken whatever it is: tests/methods/test_uds.py"


@dataclass(frozen=True, kw_only=True)
class Uds(Method):
    """UDS: of every micro-batch the samples train that say much and that were not said lately.

        score_i = ||Z_i||_* + alpha * mean_m ||e_i - e_m||      the `best` of a micro-batch

    Z_i (L, V) are a sample's logits on the rows that answer a label (without labels per row: those
    that the attention mask counts; a classifier has one), ``||.||_*`` the sum of singular values
    and e_i a sketch of Z_i (`sketch_rows` x `sketch_columns` numbers, blocks/choose/novelty.py); m
    runs over the last `buffer` samples that trained, and nothing is far from none. A forward
    without gradients and in evaluation mode scores all, then forward and backward are of those that
    were kept alone: (1 + 3 K / B) / 3 of a step. Their mean loss weighs what the micro-batch's
    would. With as many kept as there are, every update is the ordinary one.

    Trains what stands beside it. Held: `buffer` sketches, and while it scores the logits.

    Sketches have the distances of the logits. ``legacy_scale`` multiplies them by sqrt(L V) / 2, as
    the authors' code does by leaving out the Fourier transform's scale, which their strength of
    0.0025 (0.0015 for MMLU) is of. The default is the same at their L = 512, V = 152,064.

    Of a classifier Z_i is one row, so that ``||Z_i||_*`` is its length, which grows as the model
    is surer: what is kept are the rows it knows (docs/letters/selection.md: 31 % right after it, 59
    % after all rows). A run tells how sure it was of those kept and of all (``confidence``), and
    warns where they are far apart.

    Departures: prompts and padding do not score, dropout is off while it looks, and answers may
    have any length. Several processes choose each among their own.
    """

    paper: ClassVar[str] = "Utility-Diversity Aware Online Batch Selection for LLM SFT (2025)"
    tier: ClassVar[str] = "checked against an independent equation"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step",)
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "own loss"})
    small: ClassVar[Mapping[str, Any]] = {"best": 1}
    excused: ClassVar[Mapping[str, str]] = {
        "loss_falls": "by chance: the samples that do not train have their loss counted, too; "
                      "tests/methods/test_uds.py shows that of those that do"}

    best: int = setting(2, "K, samples of a micro-batch that train")
    alpha: float | None = setting(None, "of the distance; None: 11, with legacy_scale 0.0025",
                                  other=(0.0, 1e6))
    buffer: int = setting(1024, "samples that trained, to be far from")
    sketch_rows: int = setting(8, "r1, of a sketch")
    sketch_columns: int = setting(128, "r2, of a sketch")
    legacy_scale: bool = setting(False, "distances in the authors' scale", unseen=TOLD)
    seed: int = setting(0, "of the sketch", unseen=TOLD)

    def __post_init__(self) -> None:
        for name in ("best", "buffer", "sketch_rows", "sketch_columns"):
            if (value := getattr(self, name)) < 1:
                raise RecipeError(f"uds: {name} is at least 1, got {value}")
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise RecipeError(f"uds: alpha is 0 or above, got {self.alpha}")

    @property
    def strength(self) -> float:
        """alpha, or its default."""
        if self.alpha is not None:
            return self.alpha
        return 2.5e-3 if self.legacy_scale else 11.0

    def claims(self) -> tuple[str, ...]:
        return ("the samples of a pass",)

    def controller(self, tuned: Tuned) -> Choosing:
        return Choosing(self, tuned)


class Choosing:
    """Before all others that stand around a pass: they see the samples that train."""

    phase: ClassVar[int] = EARLY - 1

    def __init__(self, method: Uds, tuned: Tuned):
        self.method, self.tuned = method, tuned
        self.sketch = Sketch(method.sketch_rows, method.sketch_columns, method.seed)
        self.recent = Recent(method.buffer)
        self.seen = self.kept = self.passes = 0
        self.sure = 0.0, 0.0                             # of all samples, of those that trained

    def around_step(self, step: Pass) -> Iterator[None]:
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        step.probe(grads=False, evaluate=True, of=lambda run: self._look(run, found))
        if not found:
            raise ConfigError("uds: the forward of this pass was not seen: it is not the tuned "
                              "model's own")
        scores, sketches, sure = found[0]
        many, keep = len(scores), min(self.method.best, len(scores))
        rows = list(range(keep)) if isinstance(scores, FakeTensor) else sorted(
            scores.sort(descending=True, stable=True).indices[:keep].tolist())
        if keep < many:
            step.narrow(rows)
        self.recent.add(sketches[rows])
        self.seen, self.kept = self.seen + many, self.kept + keep
        if sure is not None and not isinstance(sure, FakeTensor):
            self._sure(float(sure.sum()), float(sure[rows].sum()))
        found.clear()
        del scores, sketches, sure
        yield

    def _sure(self, all_of_them: float, kept: float) -> None:
        """How sure a classifier was of a pass's samples, summed; a warning, once."""
        self.passes += 1
        self.sure = self.sure[0] + all_of_them, self.sure[1] + kept
        if self.passes != PASSES:
            return
        pool, mine = (s / n for s, n in zip(self.sure, (self.seen, self.kept), strict=True))
        if mine - pool > SURER:
            warnings.warn(
                f"uds keeps what this classifier knows: in {PASSES} passes the likeliest class has "
                f"{mine:.0%} on average of the {self.kept} rows that trained and {pool:.0%} of all "
                f"{self.seen}. One row of logits scores by its length, which grows as a model is "
                "surer; leave uds out, or keep more (best), or weigh the distance more (alpha)",
                UserWarning, stacklevel=2)

    def _look(self, run: Any, found: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Scores and sketches of the samples; what is returned stands for the loss."""
        logits = logits_of(run.outputs, "uds").detach()
        if logits.dim() not in (2, 3):
            raise ConfigError("uds reads logits (samples, classes) or (samples, tokens, "
                              f"vocabulary), and these are {list(logits.shape)}")
        counts = counted(self.tuned.model, run.batch, logits.shape[:-1])
        mask = run.batch.get("attention_mask") if isinstance(run.batch, Mapping) else None
        if counts is None and isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            counts = mask.bool()
        sizes, sketches = looked_at(logits, counts, self.sketch)
        if self.method.legacy_scale:
            sketches = sketches * (math.sqrt(logits[0].numel()) / 2)
        far = self.recent.far(sketches)
        sure = None
        if logits.dim() == 2 and logits.shape[1] > 1:
            wide = torch.promote_types(logits.dtype, torch.float32)
            sure = logits.softmax(-1, dtype=wide).amax(-1)
        found.append((sizes + self.method.strength * far, sketches, sure))
        return far.sum()

    def told(self) -> Mapping[str, Any]:
        """How many samples were looked at, and how many trained; how sure a classifier was of
        either, on average."""
        told: dict[str, Any] = {"seen": self.seen, "trained": self.kept}
        if self.passes:
            told["confidence"] = {"seen": round(self.sure[0] / self.seen, 4),
                                  "trained": round(self.sure[1] / self.kept, 4)}
        return told

    def state_dict(self) -> Mapping[str, Any]:
        return {**self.recent.state(), "seen": self.seen, "kept": self.kept,
                "passes": self.passes, "sure": self.sure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent.load(dict(state))
        self.seen, self.kept = state["seen"], state["kept"]
        self.passes, self.sure = state["passes"], tuple(state["sure"])
