"""The step of a tuned model: its optimizer, the events around an update, and one whole step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..blocks.update.clip import check_norm, clip_norm_
from ..blocks.update.step import Plan, block_matrices, compose, plan_of
from ..core.anatomy import Anatomy
from ..core.call import giving
from ..core.errors import BurnishError, ConfigError, RecipeError, nearest
from ..core.events import Timeline
from ..core.processes import processes
from ..core.recipe import Recipe
from ..core.words import honours, why
from .around import Around
from .check import check_gradients
from .objectives import Objectives
from .persample import sample_norms
from .state import State


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's answer to a batch: a mapping is passed as keywords, a tuple is (inputs, target),
    anything else is the inputs."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def block_weights(anatomy: Anatomy) -> Callable[[str], bool]:
    """name -> is it a matrix of a repeated block, or an added tensor inside one? In a model without
    repeated blocks: a matrix outside the head."""
    within = tuple(f"{b.path}." for b in anatomy.blocks) or ("",)
    weights = {p.name.partition("[")[0] for p in anatomy.places
               if p.kind != "embedding" and p.name.startswith(within)
               and (anatomy.blocks or not anatomy.in_head(p))}
    return lambda name: name in weights or ".burnish." in name and name.startswith(within)


class Stepping(Around):
    """What :class:`~burnish.engine.tuned.Tuned` does once per update (the life-cycle is there)."""

    model: nn.Module
    anatomy: Anatomy
    state: State
    current_optimizer: torch.optim.Optimizer | None
    total_steps: int | None
    _timeline: Timeline | None
    _checked: bool
    _objectives: Objectives | None = None
    _clip_norm: float = 0.0

    @property
    def recipe(self) -> Recipe:
        """The recipe that trains."""
        raise NotImplementedError

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of everything that trains."""
        raise NotImplementedError

    @property
    def _active(self) -> Any:
        """The adapter that trains."""
        raise NotImplementedError

    def _here(self) -> None:
        """Raises ConfigError on a handle that was detached."""
        raise NotImplementedError

    def _plain(self) -> None:
        """Raises ConfigError on one that was detached or merged."""
        raise NotImplementedError

    def _ready(self) -> None:
        """Raises ConfigError on one that was detached or merged, or whose parts are gone."""
        raise NotImplementedError

    @contextmanager
    def given(self, **keys: Any) -> Iterator[None]:
        """Inside, in this thread, every call has these keys of context (``task=2``), as if the
        batch had brought them: for ``generate`` and loops that pass inputs alone.

        Raises ConfigError for a key that no part of a recipe reads.
        """
        read = {k for adapter in self.state.context.values() for k in adapter}
        for key in keys:
            if key not in read:
                raise ConfigError(f"no part of the recipe reads {key!r}{nearest(key, read)} (parts "
                                  f"read {', '.join(sorted(read)) or 'nothing'})")
        with giving(self.state, keys):
            yield

    def optimizer(self, lr: float = 1e-3, *, scaler: Any = None, **kw: Any
                  ) -> torch.optim.Optimizer:
        """The optimizer the recipe names (AdamW if it names none), with the recipe's events.

        Objectives, schedules, budgets and masks of the recipe hang on its ``step()``, so any
        loop that calls it runs the recipe right. `kw` goes to the innermost rule (betas, eps,
        weight_decay).

        accumulation: backward passes per update; a step inside backward must know, and objectives
        that cannot see the loss.  scaler: the loop's GradScaler, for the same two.
        max_grad_norm: all gradients of an update together are cut to this norm, objectives
        included; a step inside backward learns it in a further forward and backward
        (``tuned.step`` and ``tuned.backward`` make it). Raises RecipeError where it cannot act.
        """
        self._ready()
        self.let_go()
        self._wake()
        answers = [m.optimizer() for m in self.recipe if "optimizer" in m.axes()]
        plan = plan_of(answers)
        if plan.in_backward and processes() > 1:
            raise ConfigError(f"{plan.names['step site']} steps each tensor before {processes()} "
                              "processes have shared its gradient, so that they would train "
                              "different weights; use one process, or step after backward")
        late = not plan.in_backward and not any(hasattr(a, "build") for a in answers)
        # behind the objectives, which add to gradients when they are complete
        self._clip_norm = check_norm(kw.pop("max_grad_norm", None)) if late else 0.0
        # its hooks come first, so that a step inside backward sees gradient and objective together
        self._objectives = Objectives(self, plan.in_backward)
        try:
            opt = compose(answers, list(self.named_parameters()), lr=lr, scaler=scaler,
                          inside=block_weights(self.anatomy), **kw)
            self.say_projected()
        except BaseException:
            self._objectives.close()
            self._objectives = None
            raise
        self.current_optimizer = opt
        accumulation = kw.get("accumulation", 1)
        self.state.riding.rest = lambda: (1.0 if scaler is None else float(scaler.get_scale())) \
            / accumulation
        self._passes = 0
        self._timeline = Timeline([(m.name, h) for m in self.recipe
                                   if (h := m.controller(self)) is not None])
        self._listen(opt, plan, answers, accumulation)
        opt.register_step_pre_hook(lambda *_: self._before_update())
        opt.register_step_post_hook(lambda *_: self._after_update())
        self.state.tape.on_start = self._start
        return opt

    def let_go(self) -> None:
        """Drop the optimizer with its state and all that hangs on it."""
        old, self.current_optimizer = self.current_optimizer, None
        if hasattr(old, "close"):
            old.close()                              # one that steps in backward would go on
        if self._objectives is not None:
            self._objectives.close()
        self._objectives = self._timeline = None

    def say_projected(self) -> None:
        """A note of what a subspace covers; one that covers nothing is refused (RecipeError)."""
        answers = [m.optimizer() for m in self.recipe if "optimizer" in m.axes()]
        if (sub := plan_of(answers).subspace) is None:
            return
        inside = block_weights(self.anatomy)
        where = sub.where or block_matrices(sub.map.rank, inside)
        named = list(self.named_parameters())
        names = [n for n, p in named if where(n, p)]
        if not names:
            everywhere = dataclasses.replace(sub, where=block_matrices(0, inside))
            short = max((min(p.shape[0], p[0].numel()) for n, p in named
                         if everywhere.covers(n, p)), default=0)
            reason = f"the largest short side there is {short}: take a rank below it" if short > 1 \
                else "nothing that trains is a matrix inside a repeated block"
            raise RecipeError(f"{sub.name}(rank={sub.map.rank}) projects nothing: {reason}, name "
                              f"other weights with targets, or drop {sub.name}")
        said = f"{sub.name} projects"
        notes = [n for n in self._active.notes if not n.startswith(said)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said += f" {len(names)} of {len(named)} trained tensors to rank {sub.map.rank}: "
        self._active.notes = [*notes, f"{said}{', '.join(names[:3])}{more}"]

    def _wake(self) -> None:
        """What an earlier optimizer's schedule had put to rest trains again."""
        for p in self.model.parameters():
            if vars(p).pop("burnish_resting", False):
                p.requires_grad_(True)

    def _listen(self, opt: Any, plan: Plan, answers: list[Any], accumulation: int) -> None:
        if getattr(opt, "zeroth_order", False):
            opt.riding, opt.terms = self.state.riding, self._objectives.on_weights
        if not self.timeline.listens("tensor_updated"):
            return
        for answer in answers:
            if not honours(answer, "gradient"):
                raise ConfigError(f"a part of {self.recipe} reads gradients, but "
                                  f"{why(answer, 'gradient')}")
        if plan.in_backward:
            if accumulation > 1:
                raise ConfigError(f"a part of {self.recipe} reads whole gradients, which never "
                                  "exist where projected ones accumulate inside backward; use "
                                  "accumulation 1")
            opt.on_updated = self.timeline.tensor_updated

    @property
    def timeline(self) -> Timeline:
        if self._timeline is None:
            raise ConfigError("no optimizer yet; call tuned.optimizer(lr) first")
        return self._timeline

    def _start(self) -> None:
        if self._timeline is not None and torch.is_grad_enabled() and not self._still:
            self._timeline.start(self.total_steps)

    def _before_update(self) -> None:
        self._here()
        if self._still:                              # an update that is only looked at
            return
        self.timeline.start(self.total_steps)
        self._passed()
        self._objectives.before_update(self.current_optimizer)
        if not self._checked:
            self.check_gradients()
        clip_norm_(self.current_optimizer, self._clip_norm)
        self.timeline.before_update()

    def _after_update(self) -> None:
        if self._still:
            return
        opt = self.current_optimizer
        if self.timeline.listens("tensor_updated") and getattr(opt, "on_updated", None) is None:
            scale = getattr(opt, "grad_scale", None)           # a fused step unscales by itself
            for p in [p for g in opt.param_groups for p in g["params"] if p.grad is not None]:
                self.timeline.tensor_updated(p, p.grad if scale is None else p.grad / scale)
        self.timeline.after_update()

    def check_gradients(self) -> None:
        """Every tensor that should train has a finite gradient, or CheckError names those
        without (a silent no-op is the worst way to fail)."""
        self._ready()
        check_gradients(self)
        self._checked = True

    def step(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """One whole training step, right for every recipe; returns the loss (detached).

        batch: a mapping (passed as keywords), or a tuple ``(inputs, target)``.
        loss: ``loss(outputs, batch) -> scalar``; default: ``outputs.loss``, or the outputs
        themselves when they are a scalar.

        Raises BurnishError when the loss is not finite: nothing has been updated then.
        """
        self._plain()
        opt = self.current_optimizer or self.optimizer()
        if getattr(opt, "zeroth_order", False):      # evaluations instead of a backward
            return self._evaluate(opt, batch, loss)
        opt.zero_grad(set_to_none=True)
        value = self.backward(batch, loss)
        opt.step()
        return value

    def _evaluate(self, opt: Any, batch: Any, loss: Any) -> Tensor:
        was, opt.model = self.model.training, self.model
        self.model.eval()
        try:
            with torch.no_grad():
                value = opt.step(lambda: self.loss(batch, loss))
        finally:
            self.model.train(was)
        return torch.tensor(value)

    def loss(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """The task's loss on a batch (see :meth:`step`). Going backward it takes the recipe's
        objectives along, at its own scale."""
        self._here()
        riding = self.state.riding
        with riding.to_join(loss is not None):
            out = forward(self.model, batch)
        if loss is not None:
            return riding.join(loss(out, batch))
        value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
        if not isinstance(value, Tensor) or value.dim():
            raise ConfigError("the model returned no scalar loss; pass labels in the batch or "
                              "give step(batch, loss=lambda outputs, batch: ...)")
        return value

    def sample_norms(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """(B,): the norm of each sample's own gradient, over everything that trains.

        A sample's gradient is its part of the batch's mean loss, times B; the model runs in
        evaluation mode (dropout off). Terms on linears need no gradient for it (the ghost norm).
        Nothing is updated, and no ``.grad`` is touched.
        """
        self._plain()
        trained = [p for _, p in self.named_parameters()]
        return sample_norms(self.model, trained, batch, lambda b: self.loss(b, loss))

    def _finite(self, value: Tensor) -> None:
        if isinstance(value, FakeTensor) or math.isfinite(float(value.detach())):
            return
        raise BurnishError(f"the loss is {float(value.detach())} at step {self.timeline.step}; "
                           "nothing was updated: the weights are those of the step before")
