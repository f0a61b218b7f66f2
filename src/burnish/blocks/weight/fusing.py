"""Several tuned models fused onto the aligned one they came from, through one mask of what changed.

    theta(m) = theta_a + m * sum_t lambda_t (theta_t - theta_a)

The sum of the changes is held once, in the dtype of a step; one gradient of the whole model is
there at a time. See ``methods/lifecycle/somf.py``.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckError, ConfigError
from ..state.taps import evaluating
from ..update.adapting import asking
from ..update.rules import AdamW, accumulator, move


@dataclass(frozen=True)
class Fused:
    """The mask that was learnt: `kept` by name, a boolean per entry or row; share: what is left
    out of all entries that a task had changed. losses: of every step, at its draw of the mask."""

    kept: dict[str, Tensor]
    share: float
    losses: list[float]


class Fusing:
    def __init__(self, model: nn.Module, aligned: Mapping[str, Tensor],
                 tuned: Sequence[Mapping[str, Tensor]], scales: Sequence[float] | None, rows: bool,
                 start: float):
        if not isinstance(model, nn.Module) or isinstance(tuned, Mapping) or not tuned:
            raise ConfigError("fusing takes a plain model and a list of the tensors of one tuned "
                              "model or more; merge an update first")
        scales = [1.0] * len(tuned) if scales is None else [float(s) for s in scales]
        if len(scales) != len(tuned):
            raise ConfigError(f"{len(tuned)} tuned models and {len(scales)} scales")
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        aligned, *tuned = (self._own(model, one) for one in (aligned, *tuned))
        self.model, self.aligned, self.tuned, self.scales = model, aligned, tuned, scales
        self.change: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            for one in (aligned, *tuned):
                there = one[name] if name in one else None
                if there is None or there.shape != p.shape:
                    raise ConfigError(f"{name} is not in all of these models, in one shape")
            if p.is_floating_point() and bool((change := self._change(name)).any()):
                self.change[name] = change
        if not self.change:
            raise ConfigError("nothing was tuned: all of these models are the aligned one")
        self.logits = {n: torch.full_like(c[..., :1] if rows and c.dim() > 1 else c, start)
                       for n, c in self.change.items()}
        self.rule = AdamW(weight_decay=0.0)
        self.states = {n: self.rule.init(s) for n, s in self.logits.items()}
        self.most = sum(c.numel() for c in self.change.values())
        self.steps, self.losses = 0, []
        self.params = {n: p for n, p in model.named_parameters() if n in self.change}
        for name, p in model.named_parameters():
            if name not in self.change:
                p.data.copy_(aligned[name])

    def _own(self, model: nn.Module, one: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that stay while the model moves: a copy of those that are the model's."""
        mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return ChainMap({n: self.before[n] for n in self.before if n in one
                         and one[n].untyped_storage().data_ptr() in mine}, one)  # type: ignore

    def _change(self, name: str) -> Tensor:
        """sum_t lambda_t tau_t, in fp32 or wider."""
        base = self.aligned[name]
        wide = base.to(accumulator(base.dtype))
        return sum((s * (one[name].to(wide) - wide) for s, one in
                    zip(self.scales, self.tuned, strict=True)), torch.zeros_like(wide))

    @torch.no_grad()
    def stand(self, mask: Mapping[str, Tensor]) -> None:
        """The model at theta(m), m in the dtype of the step."""
        for name, p in self.params.items():
            c = self.change[name]
            p.copy_(self.aligned[name].to(c) + mask[name] * c)

    def gradients(self, batch: Mapping[str, Any], mask: Mapping[str, Tensor],
                  loss: Callable[[Any, Mapping[str, Any]], Tensor] | None
                  ) -> tuple[float, dict[str, Tensor]]:
        """(loss, its gradient by the mask, ``tau * dL / dtheta``, added up along a row) at m."""
        self.stand(mask)
        with evaluating([m for m in self.model.modules() if m.training]), torch.enable_grad(), \
                asking(self.model, self.params.values()):
            if not isinstance(batch, Mapping):
                raise ConfigError(f"a batch of safety data is a mapping of what the model takes, "
                                  f"and this is a {type(batch).__name__}")
            out = self.model(**batch)
            value = getattr(out, "loss", None) if loss is None else loss(out, batch)
            if value is None:
                raise ConfigError("the model gives no loss for these batches: bring labels, or say "
                                  "loss=")
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ConfigError("a safety loss is one number that follows the weights, and this "
                                  f"one is {_said(value)}")
            found = torch.autograd.grad(value, list(self.params.values()), allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in found if g is not None):
            raise CheckError("a gradient of the safety loss is not finite")
        out_ = {}
        for (name, c), g in zip(self.change.items(), found, strict=True):
            each = torch.zeros_like(c) if g is None else c * g.to(c)
            out_[name] = each if self.logits[name].shape == c.shape else each.sum(-1, keepdim=True)
        return float(value.detach()), out_

    @torch.no_grad()
    def step(self, batch: Mapping[str, Any],
             loss: Callable[[Any, Mapping[str, Any]], Tensor] | None, heat: float, weight: float,
             lr: float, generator: torch.Generator) -> None:
        """One draw of the mask and one step of Adam on the logits."""
        mask = {}
        for name, s in self.logits.items():
            u = torch.rand(s.shape, generator=generator, dtype=s.dtype).clamp(1e-6, 1 - 1e-6)
            mask[name] = torch.sigmoid((torch.logit(u).to(s.device) + s) / heat)
        value, grads = self.gradients(batch, mask, loss)
        self.losses.append(value)
        self.steps += 1
        for name, s in self.logits.items():
            m, wide = mask[name], self.change[name].numel() / mask[name].numel()
            g = (grads[name] - weight * wide / self.most) * m * (1 - m) / heat
            state = {k: [v] for k, v in self.states[name].items()}
            move(self.rule, [s], [g], state, self.steps, self.rule.hyper(), lr, 0.0)

    @torch.no_grad()
    def fused(self) -> Fused:
        """The model for good: what is masked is the aligned one's bit for bit, and what is kept of
        one task at scale 1 that task's."""
        kept, left = {}, 0
        for name, p in self.params.items():
            c, base = self.change[name], self.aligned[name].to(p)
            kept[name] = self.logits[name] > 0
            alone = len(self.tuned) == 1 and self.scales[0] == 1
            whole = self.tuned[0][name].to(p) if alone else (base.to(c) + c).to(p.dtype)
            p.copy_(torch.where(kept[name], whole, base))
            left += int((~kept[name]).expand_as(c).sum())
        return Fused(kept, left / self.most, self.losses)

    @torch.no_grad()
    def stand_as_before(self) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(self.before[name])


def _said(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a tensor {list(value.shape)}{'' if value.requires_grad else ' without a graph'}"
