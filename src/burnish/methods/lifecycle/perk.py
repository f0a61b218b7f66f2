from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.update.reader import Loss, Reader
from ...core.errors import ConfigError, DataError
from ...core.method import Method, setting
from ..objective.distill import logits_of


@dataclass(frozen=True, kw_only=True)
class Perk(Method):
    """PERK: a long context is read into a LoRA by a few gradient steps, from a start that learns.

        phi_{k+1} = phi_k - eta_k * grad (1/n) sum_i NLL(c_i; theta, phi_k)      k = 0 .. K - 1
        learn phi_0 and eta:  min NLL(answer | question; theta, phi_K)

    c_1 .. c_n are rows of one batch, the context cut into segments, so no long sequence is run;
    phi is the LoRA that ``tune`` has joined (A and B of every place), eta a positive number for
    each tensor and step, K = `updates`. The outer loss goes back through the last `unrolled` steps
    to second order; before those gradients are constants (unrolled=0: first order). theta is
    frozen::

        perk = burnish.parse("perk")[0].lifecycle(tuned)
        perk.learn(lessons)                       # each (context, question), two batches
        with perk.reading(context):
            tuned.model(**question)               # the LoRA holds the context

    Start: phi_0 as LoRA has it, eta = the setting. Trains phi_0 and ``K`` numbers a tensor.
    Reading costs K forwards and backwards of the context, linear in it, of `segments` rows at a
    time, whatever their number; learning holds `unrolled` graphs of all segments. Merges as LoRA
    does; inside `reading`, ``tuned.save`` writes the adapter of this context.

    The mean over segments is of each one's mean, so their order and `segments` change nothing.
    Inner attention takes the plain kernel, as fused ones have no second derivative.

    When: one long context, several questions. When not: many short ones, for which a prompt is
    cheaper. Unconfirmed: K = 4 with 2 unrolled, plain gradient steps inside, the rates; that eta is
    learnt as a logarithm; gradients before the unrolled steps as constants.
    """

    paper: ClassVar[str] = ("PERK: Long-Context Reasoning as Parameter-Efficient Test-Time "
                            "Learning (2025), arXiv:2507.06415")
    tier: ClassVar[str] = "from the text"

    updates: int = setting(4, "K, inner steps on a context")
    unrolled: int = setting(2, "of them, the last, that are differentiated through")
    eta: float = setting(5e-5, "eta before it has learnt")
    step_rate: float = setting(1e-5, "learning rate of these updates")
    rate_rate: float = setting(1e-3, "learning rate of log eta")
    lessons: int = setting(1, "of one step, their mean")
    segments: int = setting(8, "of a context that are run at once")

    def __post_init__(self) -> None:
        if self.updates < 1 or not 0 <= self.unrolled <= self.updates:
            raise ConfigError("perk: updates of at least 1 and unrolled from 0 to as many are "
                              f"expected, got {self.updates} and {self.unrolled}")
        if min(self.eta, self.step_rate, self.rate_rate) <= 0 or \
                min(self.lessons, self.segments) < 1:
            raise ConfigError("perk: positive rates, and lessons and segments of at least 1 are "
                              "expected")

    def lifecycle(self, tuned: Any, loss: Loss | None = None) -> Reader:
        """The reader of a model with a LoRA. loss: (outputs, batch) -> a number a row; default:
        the mean over a row's tokens of the next one's."""
        return Reader(tuned, loss or next_tokens, **{n: getattr(self, n) for n in (
            "updates", "unrolled", "eta", "step_rate", "rate_rate", "lessons", "segments")})


def next_tokens(out: Any, batch: Any) -> Tensor:
    """(rows,): of each row the mean over its tokens of -log p(the next). Labels of -100 and
    padding have no part; without labels every token has."""
    given = batch if isinstance(batch, Mapping) else {}
    labels = given.get("labels", given.get("input_ids"))
    logits = logits_of(out, "perk")
    if labels is None or logits.shape[:-1] != labels.shape or logits.dim() != 3:
        raise DataError("perk: contexts and questions are mappings with input_ids, of a model that "
                        "says the next token; of others say loss=, (outputs, batch) -> (rows,)")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    right = labels[:, 1:]
    if (mask := given.get("attention_mask")) is not None:
        right = right.masked_fill(mask[:, 1:] == 0, -100)
    each = F.cross_entropy(wide.transpose(1, 2), right, reduction="none")
    return each.sum(1) / (right != -100).sum(1).clamp(min=1)
