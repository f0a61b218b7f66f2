"""Answers of which one is preferred: DPO and its relatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.batches import call, moved
from ...core.errors import BurnishError, ConfigError, nearest
from ...core.processes import assign
from ...formats.claim import digest
from ...formats.folder import TENSORS
from ...formats.staged import current
from ...formats.warm import begin_from
from ..rows import Choices, Rows
from .base import Batch, Task, flat
from .language import InstructionTuning, pad_tokens

#: loss -> its usual beta
BETAS = {"dpo": 0.1, "ipo": 0.1, "hinge": 1.0, "orpo": 0.1, "simpo": 2.0}
#: losses that compare with what the base says
COMPARED = ("dpo", "ipo", "hinge", "kto")


def preference(kind: str, said: Tensor, counts: Tensor, base: Tensor, beta: float,
               gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """(the loss of each pair (B,), the reward of each answer (B, 2)).

    said, base: log-probabilities log p(y | x) of the chosen and of the rejected answer, (B, 2),
    summed over their tokens, `counts`; q = log p - log p_base, c chosen, r rejected.

        dpo    -log s(beta (q_c - q_r))                          (Rafailov et al., 2023)
        ipo    (q_c / n_c - q_r / n_r - 1 / (2 beta))^2          (Azar et al., 2023; per token)
        hinge  max(0, 1 - beta (q_c - q_r))                      (SLiC: Zhao et al., 2023)
        orpo   -l_c - beta log s(o_c - o_r),  l = log p / n, o = l - log(1 - e^l)   (Hong, 2024)
        simpo  -log s(beta (l_c - l_r) - gamma)                  (Meng et al., 2024)
    """
    mean = said / counts
    if kind == "orpo":
        odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))
        return -mean[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1]), beta * mean
    if kind == "simpo":
        reward = beta * mean
        return -F.logsigmoid(reward[:, 0] - reward[:, 1] - gamma), reward
    reward = beta * (said - base)
    if kind == "ipo":
        per_token = (said - base) / counts
        return (per_token[:, 0] - per_token[:, 1] - 0.5 / beta).square(), reward
    apart = reward[:, 0] - reward[:, 1]
    return F.relu(1 - apart) if kind == "hinge" else -F.logsigmoid(apart), reward


class PreferenceTuning(InstructionTuning):
    """``input_ids`` (B, 2, T): the chosen and the rejected answer behind their prompt, ``labels``
    (B, 2 T) of the one and of the other, ``reference`` (B, 2).

    The base is asked once, before anything trains, so that no second model is held and no second
    forward made: it is the base of the recipe with the adapter off, in the form it is stored in.
    """

    smooths = False
    own_loss = True
    counts_items = False
    alone = False                                # a sample is a pair, which nobody else knows
    truth = ("labels", "reference")
    settings = ("loss_type", "beta", "gamma", "reference_from", "reference_is")

    def prepare(self) -> None:
        super().prepare()
        if self.kind == "kto":
            raise ConfigError("loss_type='kto' learns from answers marked good or bad, each by "
                              "itself: rows of prompt, completion and label (true or false)")
        if self.kind not in BETAS:
            raise ConfigError(f"loss_type={self.kind!r} is not one of {', '.join(BETAS)}"
                              f"{nearest(str(self.kind), BETAS)}")
        for name in ("beta", "gamma"):
            value = self.how.get(name, 1.0)
            good = isinstance(value, int | float) and not isinstance(value, bool)
            if not good or not value >= 0 or name == "beta" and value == 0:
                raise ConfigError(f"{name}={value!r}: expected a number "
                                  f"{'above 0' if name == 'beta' else 'of 0 or more'}")
        if "gamma" in self.how and self.kind != "simpo":
            raise ConfigError(f"gamma is a margin that simpo asks for, and {self.kind} has none")

    @property
    def kind(self) -> str:
        return self.how.get("loss_type", "dpo")

    def make(self, split: str) -> Rows:
        made = Choices(self.data.splits[split], self.processor, self.max_length,
                       self.data.where.get(split))
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        told = [{"input_ids": t.input_ids, "labels": t.labels} for r in rows for t in r["pair"]]
        made = pad_tokens(told, self.processor.pad_token_id)
        labels = made.pop("labels").view(len(rows), -1)
        return {k: v.view(len(rows), 2, -1) for k, v in made.items()} | {
            "labels": labels, "reference": torch.tensor([r["reference"] for r in rows])}

    def feed(self, batch: Batch) -> Batch:
        return flat(batch, 2, self.truth)

    def right(self, truth: Any) -> Tensor:
        """The better answer is the first: there is nothing to say of a pair, 0 for each."""
        labels = truth["labels"] if isinstance(truth, Mapping) else truth[0]
        return torch.zeros(len(labels))

    # -- the loss ----------------------------------------------------------------------------
    def spoken(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log p of every answer, summed over its tokens, and how many they are: (B, 2) each."""
        pairs = len(labels), 2
        wanted = labels.view(2 * len(labels), -1)[:, 1:]
        lost = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(),
                               reduction="none").view(wanted.shape)
        counts = (wanted != -100).sum(-1)
        return -lost.sum(-1).view(pairs), counts.view(pairs)

    def compared(self, logits: Tensor, labels: Tensor, reference: Tensor
                 ) -> tuple[Tensor, Tensor]:
        beta = float(self.how.get("beta", BETAS[self.kind]))
        return preference(self.kind, *self.spoken(logits, labels), reference, beta,
                          float(self.how.get("gamma", 1.0)))

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        return self.compared(self.logits(outputs), *labels)[0].mean()

    # -- the figures -------------------------------------------------------------------------
    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        truth = tuple(truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        losses, rewards = self.compared(self.logits(outputs), *truth)
        return rewards, torch.stack([losses, torch.ones_like(losses)], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """Pairs whose chosen answer has the higher reward, and by how much on average."""
        rewards = torch.as_tensor(answers).double()
        apart = rewards[:, 0] - rewards[:, 1]
        return {"accuracy": float((apart > 0).double().mean()), "margin": float(apart.mean())}

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        return Task.figures(self, answers, losses, labels, rows)      # no perplexity of a pair

    def begun(self, path: str | Path | None) -> None:
        if path is not None and self.kind in COMPARED:
            found = Path(path).resolve()
            self.how["reference_from"] = str(found)
            self.how["reference_is"] = digest(current(found, TENSORS))

    @contextlib.contextmanager
    def base(self, tuned: Any) -> Iterator[None]:
        """The model is what answers are compared with: the base, or the run this one began at."""
        path = self.how.get("reference_from")
        if path is None:
            with tuned.disabled():
                yield
            return
        live = tuned.tensors(tuned.training)
        held = {n: t.detach().clone() for n, t in live.items()}
        try:
            try:
                begin_from(tuned, path)
            except BurnishError as e:
                raise ConfigError("answers are compared with those of the run this one began from, "
                                  f"which run.json names as task.reference_from: {e}") from None
            known = self.how.get("reference_is")
            if known is not None and digest(current(Path(path), TENSORS)) != known:
                raise ConfigError(f"{path} has changed since this run began from it, and answers "
                                  "are compared with what it was")
            yield
        finally:
            for n, t in live.items():
                assign(t, held[n])

    @torch.no_grad()
    def ready(self, tuned: Any, device: Any, batch_size: int) -> None:
        """Asks the base what it says of every answer."""
        if self.kind not in COMPARED:
            return
        model, was = tuned.model, tuned.model.training
        lacking = [rows for rows in map(self.rows, self.data.splits)
                   if isinstance(rows, Choices) and rows.reference is None]
        if not lacking:
            return
        model.eval()
        try:
            with self.base(tuned):
                for rows in lacking:
                    rows.reference = self.asked(model, rows, device, batch_size)
        finally:
            model.train(was)

    def asked(self, model: Any, rows: Choices, device: Any, batch_size: int) -> Tensor:
        """What a model says of every answer, (rows, 2)."""
        found = []
        for start in range(0, len(rows), batch_size):
            batch = moved(self.together([rows.row(i) for i in range(
                start, min(start + batch_size, len(rows)))]), device)
            logits = self.logits(call(model, self.feed(batch)))
            found.append(self.spoken(logits, batch["labels"])[0].float().cpu())
        return torch.cat(found)

    def preview(self, n: int = 3) -> list[str]:
        """The two answers as the model sees them, with what is compared between guillemets."""
        from ..chat import show

        rows = self.rows("train")
        assert isinstance(rows, Choices)
        return [f"+ {show(self.processor, a)}\n- {show(self.processor, b)}"
                for a, b in rows.tokens[:n]]

