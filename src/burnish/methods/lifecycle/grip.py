from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.choose.boards import boards
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.processes import assign


@dataclass(frozen=True)
class Round:
    """One round: the samples that have a label in it.

    number: from 1 to `of`.  k: of one class at most.  index: (n,) samples of the pool, rising.
    labels: (n,) their classes.
    """

    number: int
    of: int
    k: int
    index: Tensor
    labels: Tensor

    def loss(self, pseudo: Tensor, labelled: Tensor | None = None) -> Tensor:
        """The loss of an update, of the means over pseudo-labelled and over labelled samples: each
        set counts alike, however many it has."""
        return pseudo if labelled is None else labelled + pseudo


@dataclass(frozen=True, kw_only=True)
class Grip(Method):
    """GRIP, IFPL and FPL: what a model says of unlabelled samples trains it, in rounds.

    A round labels: every sample of the pool U stands for its likeliest class, at most K a class,
    the surest first, and where a class is full for the next one (``blocks/choose/boards.py``). Then
    what trains begins anew and is trained on these labels.

        mode      rounds                K of round i
        fpl       1                     `shots`                       the base labels
        ifpl      I = `turns`           `shots`                       then the model of round i - 1
        grip      I = `turns`           floor(i |U| / (I C))          until all of U is used

    The loop is the caller's own, with any data loader, schedule and recipe::

        for r in burnish.parse("grip")[0].lifecycle(tuned, say, classes=10):
            optimizer = tuned.optimizer(lr=0.1)
            for batch in batches(r.index, r.labels):
                tuned.step(batch, loss=lambda out, batch: r.loss(...))

    say: gives (|U|, C) probabilities of the pool by the model as it stands, once a round; with
    texts that train alone, features of the pictures are cached and it is one product. It is called
    in evaluation mode without gradients, for the first round as the base answers.

    Start of every round: what was trained, and statistics that moved with it, stand where they
    stood when the loop began. Unlabelled
    data alone: the loss is CE of the pseudo-labels; beside labelled ones (other classes among them
    or not) each set's mean counts alike (`Round.loss`; the exact balance is unconfirmed). Classes
    are taken to be equally frequent in U, which hurts where they are not.
    """

    paper: ClassVar[str] = ("Enhancing CLIP with CLIP: Exploring Pseudolabeling for Limited-Label "
                            "Prompt Tuning, NeurIPS 2023, arXiv:2306.01669")
    tier: ClassVar[str] = "checked against an independent equation"

    mode: Literal["grip", "ifpl", "fpl"] = setting("grip", "how many labels a round has")
    turns: int = setting(10, "I, of labelling and training")
    shots: int = setting(16, "K of fpl and ifpl", alias=("K",), beside={"mode": "ifpl"})

    def __post_init__(self) -> None:
        if self.turns < 1 or self.shots < 1:
            raise ConfigError(f"grip: turns and shots are at least 1, got {self.turns} and "
                              f"{self.shots}")
        for name, other in (("shots", "grip"), ("turns", "fpl")):
            if self.mode == other and (value := getattr(self, name)) != getattr(Grip, name):
                raise ConfigError(f"grip: mode={other!r} reads no {name}, and {name}={value} is "
                                  "given: leave one of them out")

    def size(self, number: int, pool: int, classes: int) -> int:
        """K of a round."""
        if self.mode != "grip":
            return self.shots
        return number * pool // (self.turns * classes)

    def lifecycle(self, tuned: Any, say: Callable[[], Tensor], *, classes: int) -> Iterator[Round]:
        """The rounds; between one and the next the caller trains."""
        start = {n: t.detach().clone() for n, t in self._own(tuned).items()}
        if not any(True for _ in tuned.parameters()):
            raise ConfigError("grip: nothing trains just now; tuned.use(name) for one adapter "
                              "alone")
        of = 1 if self.mode == "fpl" else self.turns
        for number in range(1, of + 1):
            p = self._said(tuned, say, classes, base=number == 1)
            k = self.size(number, len(p), classes)
            if not k:
                raise ConfigError(f"grip: {len(p)} samples are too few for {classes} classes in "
                                  f"{self.turns} rounds: the first would have none; take turns="
                                  f"{max(1, len(p) // classes)} or fewer")
            found = boards(p, k)
            now = self._own(tuned)
            with torch.no_grad():
                for name, value in start.items():
                    assign(now[name], value)
            index, labels = torch.tensor(found, device=p.device).unbind(1)
            yield Round(number, of, k, index, labels)

    def _own(self, tuned: Any) -> dict[str, Tensor]:
        """What training moves: what trains, the adapter's other tensors, running statistics."""
        mine = f".burnish.{tuned.training}."
        held = tuned.model.state_dict()
        return {**dict(tuned.named_parameters()), **dict(tuned.buffers.live()),
                **{n: t for n, t in held.items() if mine in f".{n}" and isinstance(t, Tensor)}}

    @torch.no_grad()
    def _said(self, tuned: Any, say: Callable[[], Tensor], classes: int, base: bool) -> Tensor:
        still = evaluating([m for m in tuned.model.modules() if m.training])
        with still, tuned.disabled() if base else nullcontext():
            p = say()
        if p.dim() != 2 or p.shape[1] != classes:
            raise ConfigError(f"grip: (samples, {classes}) probabilities are expected of the pool, "
                              f"not {tuple(p.shape)}")
        return p
