from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.taps import evaluating
from ...core.batches import call
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.outputs import next_token
from ..objective.direction_match import mask_key
from ..objective.distill import logits_of
from ..objective.feature_distill import state
from ._adapted import untargeted


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The chance that a row of `outside` has the higher score, a tie counting half: 0.5 tells
    nothing. ConfigError for a side without rows, or scores that are no numbers."""
    a, b = inside.double().flatten(), outside.double().flatten()
    if not len(a) or not len(b) or not bool(torch.cat([a, b]).isfinite().all()):
        raise ConfigError("scores of rows inside and outside are compared: expected some of each, "
                          f"all numbers; got {len(a)} and {len(b)}")
    a = a.sort().values
    below = torch.searchsorted(a, b) + torch.searchsorted(a, b, right=True)
    return float(below.double().mean() / (2 * len(a)))


@dataclass(frozen=True, kw_only=True)
class Mld(Method):
    """MLD: a student that follows its teacher's layers on one domain alone gives others away.

        levels      s(x) = 1/L sum_l mean_t |f_lt - t_lt|^2 / mean_t |t_lt|^2
        perplexity  s(x) = exp( mean_t -log p(x_{t+1} | x_{<=t}) )        of the student

    f_l, t_l (T, D) the states after block l of the student (what was tuned) and of its teacher (the
    base, on the same rows), t over the tokens that count. The student is trained first, on rows of
    the domain and without labels, by features of every layer: a smaller form of the base, so that
    it cannot follow everywhere: ``pela(compression=4) + feature_distill``. Where a row is of
    another domain it follows badly, and s is high::

        method = burnish.parse("mld")[0]
        s = method.lifecycle(tuned, batches)               # a score a row
        auroc(s_inside, s_outside)                         # of this file

    For texts and pictures alike. Costs a forward of the student and one of the teacher; nothing of
    the model changes. A student equal to its base has no levels to tell by and scores 0.

    Departure: the authors' student is a language model drawn at random, which learns from a teacher
    that was fine-tuned on the domain, and its perplexity is the score: that is
    told_by="perplexity", for models that write on. Their term of layers compares similarities, ours
    states (unconfirmed which is better).
    """

    paper: ClassVar[str] = ("Multi-Level Knowledge Distillation for Out-of-Distribution Detection "
                            "in Text, ACL 2023, arXiv:2211.11300")

    told_by: Literal["levels", "perplexity"] = setting("levels", "what a row is told by")

    def __post_init__(self) -> None:
        untargeted(self, "it reads every block")

    @torch.no_grad()
    def lifecycle(self, tuned: Any, batches: Iterable[Any]) -> Tensor:
        """(rows,) scores, in the order of the batches; the higher the further outside.

        ConfigError for a model without blocks, or (perplexity) one that does not write on.
        """
        if self.told_by == "perplexity" and not next_token(tuned.model):
            raise ConfigError("mld(told_by='perplexity') reads what comes next, and "
                              f"{type(tuned.model).__name__} does not write on; expected 'levels'")
        if self.told_by == "levels" and not tuned.anatomy.blocks:
            raise ConfigError("mld compares the states after each block, and this model has none")
        with evaluating(list(tuned.model.modules())):
            of = self._levels if self.told_by == "levels" else self._perplexity
            found = [of(tuned, batch) for batch in batches]
        if not found:
            raise ConfigError("mld: there is no batch to score")
        return torch.cat(found)

    def _levels(self, tuned: Any, batch: Any) -> Tensor:
        student = _states(tuned, batch)
        with tuned.disabled():
            teacher = _states(tuned, batch)
        blocks, out = tuned.anatomy.blocks, []
        for block, f, t in zip(blocks, student, teacher, strict=True):
            if f.shape != t.shape:
                raise ConfigError(f"mld compares states token by token, and after {block.path} "
                                  f"there are {tuple(f.shape)} beside {tuple(t.shape)} of the base")
            m = torch.ones(f.shape[:-1], device=f.device)
            mask = batch.get(mask_key(tuned.anatomy, block)) if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == m.shape:
                m = mask.to(m)
            off, size = ((v * m.unsqueeze(-1)).flatten(1).norm(dim=1) for v in (f - t, t))
            out.append((off / size.clamp_min(torch.finfo(f.dtype).tiny)).square())
        return torch.stack(out).mean(0)

    def _perplexity(self, tuned: Any, batch: Any) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        z = logits_of(call(tuned.model, batch), self.name)[:, :-1]
        wide = torch.promote_types(z.dtype, torch.float32)
        each = F.cross_entropy(z.to(wide).transpose(1, 2), ids[:, 1:], reduction="none")
        m = torch.ones_like(each) if mask is None else (mask[:, 1:] * mask[:, :-1]).to(each)
        return ((each * m).sum(1) / m.sum(1).clamp_min(1)).exp()


def _states(tuned: Any, batch: Any) -> list[Tensor]:
    """After each block, (rows, ..., width), in fp32 at least."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        h = state(out)
        seen.append(h.to(torch.promote_types(h.dtype, torch.float32)))

    hooks = [tuned.model.get_submodule(b.path).register_forward_hook(keep)
             for b in tuned.anatomy.blocks]
    try:
        call(tuned.model, batch)
    finally:
        for h in hooks:
            h.remove()
    return seen
