"""Answers that a model has drawn itself, weighed by how they compare with others to one prompt.

    A_g = (r_g - mean r) / std r                 of a prompt's G answers; 0 where all r are equal
    L   = - mean_g A_g (1 / |o_g|) sum_t log p(o_g,t | prompt, o_g,<t)

The policy gradient at the policy that drew them (a ratio of 1, nothing to clip), without a KL term.
std is over the G answers themselves (n, not n - 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """(P, G) A, of the rewards of P prompts' answers."""
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    alike = (wide == wide[:, :1]).all(1, keepdim=True)
    std = wide.std(1, unbiased=False, keepdim=True)
    made: Tensor = ((wide - wide.mean(1, keepdim=True)) / std.masked_fill(alike, 1.0)
                    ).masked_fill(alike, 0.0)
    return made


def policy_loss(logits: Tensor, labels: Tensor, weights: Tensor, answers: int) -> Tensor:
    """L, of logits (n, L, V) and labels (n, L) that are -100 outside of the answers; row t answers
    the label t + 1.

    weights: (n,) A of these rows.  answers: over how many the mean is; those of no A may be left
    out.
    """
    right = labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), right.flatten(), reduction="none",
                           ignore_index=-100).view(right.shape)
    mean = each.sum(1) / (right != -100).sum(1).clamp_min(1)
    return (weights.to(mean) * mean).sum() / answers


def answered(drawn: Tensor, prompt: int, ends: Sequence[int]) -> Tensor:
    """(n, L) labels of sequences whose first `prompt` tokens were given: -100 there, and behind the
    first of `ends`, which is the last token of its answer."""
    labels = drawn.clone()
    labels[:, :prompt] = -100
    over = torch.isin(drawn[:, prompt:], drawn.new_tensor(ends)).int().cumsum(1)
    over = F.pad(over, (1, 0))[:, :-1] > 0
    labels[:, prompt:] = labels[:, prompt:].masked_fill(over, -100)
    return labels
