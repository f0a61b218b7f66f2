from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.divided import EXPERT, By, Divided, owners
from ...blocks.update.live import TrainableSchedule
from ...blocks.update.noise import fold
from ...core.call import given_to, giving
from ...core.errors import RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.site import Branch
from ..objective.distill import counted, logits_of
from ._sites import found, mlp_ends

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Pass
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Mosa(Method):
    """MoSA: an adapter in disjoint sparse experts, which train one at a time and add up to it.

    ``F(x) <- F(x) + s (W_up drop(act(W_down x + b_down)) + b_up)`` beside the MLP, x what it reads
    (behind its norm in pre-norm blocks). Every entry of W_up (d, r) has one owner among `experts`,
    drawn in equal bands over the matrix, or within each of its rows or columns. In an update two
    experts are drawn, the same in all blocks: the batch goes forward with the entries of the first,
    then, with dropout drawn anew, with those of the second:

        loss(first) + weight mean_n (KL(p_n || q_n) + KL(q_n || p_n)) / 2

    over rows n that answer a label. Elsewhere (evaluation, a file) all experts stand together,
    which is their sum. ``share="down"``: W_down is everybody's, as released; "none": it is divided,
    too. With ``weight=0`` one expert is drawn and there is one forward.

    Start: W_up and biases 0, the pre-trained function exactly. Trains 2 d r + r + d per block:
    ViT-B/16 with r = 64 1,189,632. An expert that is not drawn has no gradient, so neither momentum
    nor decay moves it; its optimizer state stays. Kept for backward: r numbers per token, twice;
    an owner is a byte, drawn again from `seed`. Not mergeable into W. The file holds what each
    expert owns, together the numbers of one ordinary adapter (`parallel`), whose W_up is
    ``Divided.weight``.

    Departures: the mean of both directions of KL, one draw for all blocks and for the micro-batches
    of an update, no norm of the adapter's own (all unconfirmed); one b_up trains with every expert,
    so there is nothing to average. Running statistics of the model move in both forwards.
    """

    paper: ClassVar[str] = ("Split & Merge: Unlocking the Potential of Visual Adapters via Sparse "
                            "Training (2023), arXiv:2312.02923")
    needs: ClassVar[frozenset[str]] = frozenset({"mlp", "logits"})
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "schedule")
    #: with four units a ReLU may let nothing through where a small model looks
    small: ClassVar[dict[str, Any]] = {"experts": 3, "act": "gelu"}

    bottleneck: int = setting(64, "r, width of the bottleneck", alias=("reduced", "width"),
                              least=1)
    experts: int = setting(4, "disjoint parts of the adapter", alias=("E",))
    mask: Literal["matrix", "row", "column"] = setting("matrix", "which entries are dealt together")
    share: Literal["down", "none"] = setting("down", "what all experts have")
    scale: float = setting(0.1, "s")
    act: str = setting("relu", "activation inside", other=("tanh",))
    dropout: float = setting(0.1, "dropout on the activation")
    weight: float = setting(1.0, "of the consistency of two experts; 0: one forward")
    seed: int = setting(0, "of owners and draws")

    def __post_init__(self) -> None:
        if not 2 <= self.experts <= 255 or self.weight < 0 or not 0 <= self.dropout < 1:
            raise RecipeError("mosa: experts is 2 to 255, weight not negative and dropout below 1, "
                              f"got {self.experts}, {self.weight} and {self.dropout}")

    @property
    def sees_run(self) -> bool:                          # type: ignore[override]
        """Are there two experts to compare?"""
        return self.weight > 0

    def claims(self) -> tuple[str, ...]:
        return ("which experts run",)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = Bottleneck(s.width, self.bottleneck, act=self.act, scale=self.scale,
                              dropout=self.dropout)
            path = s.block.mlp or s.path
            made.up = self.divided(made.up, f"mosa/{path}/up")
            if self.share == "none":
                made.down = self.divided(made.down, f"mosa/{path}/down")
            yield Branch(path, made, read=(s.block.mlp or s.block.mlp_in[0], "input"))

    def divided(self, linear: nn.Linear, key: str) -> Any:
        by: By = self.mask
        owner = owners(*linear.weight.shape, self.experts, by, self.seed, key)
        return Divided(linear.weight.detach(), linear.bias.detach(), owner, self.experts)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        second = given_to(tuned.state).get(SECOND)
        if second is None:                               # outside of a step all stand together
            return
        outputs = run.outputs, run.again(**{EXPERT: second})
        first, other = (logits_of(out, "mosa") for out in outputs)
        counts = counted(tuned.model, run.batch, first.shape[:-1])
        yield self.weight * symmetric(first, other, counts)

    def controller(self, tuned: Tuned) -> Turns:
        return Turns(self, tuned)

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return Bottleneck.count(d, self.bottleneck)


#: of the call: who answers in the second forward
SECOND = "second expert of mosa"


def symmetric(a: Tensor, b: Tensor, counts: Tensor | None = None) -> Tensor:
    """``mean_n (KL(p_n || q_n) + KL(q_n || p_n)) / 2`` of two logits (..., classes), in fp32 at
    least. counts: mask (...,) of the rows that count."""
    wide = torch.promote_types(a.dtype, torch.float32)
    p, q = (F.log_softmax(t.to(wide), -1) for t in (a, b))
    rows = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
    if counts is None:
        return rows.mean()
    m = counts.to(rows.dtype)
    return (rows * m).sum() / m.sum().clamp_min(1)


class Turns:
    """Who runs. Early, so that other handlers see what is live."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: Mosa, tuned: Tuned):
        self.method, self.tuned = method, tuned
        parts = [m for _, b in tuned.branches(Bottleneck) for m in b.modules()
                 if isinstance(m, Divided)]
        groups = {str(k): [m.experts[k] for m in parts] for k in range(method.experts)}
        self.schedule = TrainableSchedule(groups, lambda step: None, state_on_leave="keep",
                                          optimizer=lambda: tuned.current_optimizer)

    def drawn(self, step: int) -> list[int]:
        """First and second, or the one, of an update."""
        rng = Random(fold("mosa", self.method.seed, step))
        return rng.sample(range(self.method.experts), 2 if self.method.weight else 1)

    def step_begin(self, step: int) -> None:
        self.schedule.set(map(str, self.drawn(step)))

    def around_step(self, step: Pass) -> Iterator[None]:
        first, *second = self.drawn(step.index)
        with giving(self.tuned.state, {EXPERT: first, SECOND: second[0] if second else None}):
            yield

    def rehearse(self, step: int) -> None:
        """At first all, which leave their state; then the largest."""
        self.schedule.set(self.schedule.groups if not step else map(str, self.drawn(step)))

    def state_dict(self) -> Mapping[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state)
