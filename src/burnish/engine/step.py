"""The step of a tuned model: its optimizer, the events around an update, and one whole step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..blocks.update.clip import check_norm, clip_norm_
from ..blocks.update.rules import accumulator
from ..blocks.update.step import Plan, block_matrices, compose, plan_of, short_side
from ..core.anatomy import Anatomy
from ..core.batches import call, singly, taken
from ..core.caches import without_cache
from ..core.errors import BurnishError, CheckError, ConfigError, RecipeError
from ..core.events import Timeline
from ..core.groups import outputs
from ..core.processes import anywhere, processes
from ..core.words import honours, why
from .around import Each, Pass, Some, probe
from .check import check_gradients
from .objectives import Objectives
from .room import allowing
from .spread import check_own, watch

if TYPE_CHECKING:
    from .tuned import Tuned

#: ``loss(outputs, batch) -> scalar``
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def block_weights(anatomy: Anatomy) -> Callable[[str], bool]:
    """name -> is it a matrix of a repeated block, or an added tensor inside one? In a model without
    repeated blocks: a matrix outside the head."""
    within = tuple(f"{b.path}." for b in anatomy.blocks) or ("",)
    weights = {p.name.partition("[")[0] for p in anatomy.places
               if p.kind != "embedding" and p.name.startswith(within)
               and (anatomy.blocks or not anatomy.in_head(p))}
    return lambda name: name in weights or ".burnish." in name and name.startswith(within)


class Steps:
    """What a tuned model does once per update. A part of :class:`~burnish.engine.tuned.Tuned`,
    which says what each method does for a user.

    tuned: the handle it belongs to.  optimizer: the one that was made last.
    still: a pass is under way that sends no event.  passes: made through here since the last
    update.  checked: every tensor has been seen to get a gradient.  through: what is called in the
    model's place (DistributedDataParallel around it).
    """

    def __init__(self, tuned: Tuned):
        self.tuned = tuned
        self.optimizer: Any = None
        self.objectives: Objectives | None = None
        self._timeline: Timeline | None = None
        self._forms: dict[int, tuple[torch.dtype, torch.device]] = {}     # by id of the tensor
        self._clip_norm = 0.0
        self.still, self.checked, self.passes = False, False, 0
        self.through: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        """That of a copy, which makes its own optimizer."""
        return type(self)(memo[id(self.tuned)])

    def make(self, lr: float, *, scaler: Any = None, **kw: Any) -> torch.optim.Optimizer:
        """The optimizer the recipe names, with the recipe's events."""
        self.tuned.check_ready()
        self.let_go()
        self._wake()
        answers = [m.optimizer() for m in self.tuned.recipe if "optimizer" in m.axes()]
        plan = plan_of(answers)
        if plan.in_backward and processes() > 1:
            raise ConfigError(f"{plan.names['step site']} steps each tensor before {processes()} "
                              "processes have shared its gradient, so that they would train "
                              "different weights; use one process, or step after backward")
        watch(self.tuned)
        late = not plan.in_backward and not any(hasattr(a, "build") for a in answers)
        # behind the objectives, which add to gradients when they are complete
        self._clip_norm = check_norm(kw.pop("max_grad_norm", None)) if late else 0.0
        if self._clip_norm and (secret := [m.name for m in self.tuned.recipe if m.private]):
            raise ConfigError(f"max_grad_norm cuts what {secret[0]} sums before it has added its "
                              f"noise; {secret[0]} cuts each sample's gradient: leave it out")
        # its hooks come first, so that a step inside backward sees gradient and objective together
        self.objectives = Objectives(self.tuned, plan.in_backward)
        try:
            opt = compose(answers, list(self.tuned.named_parameters()), lr=lr, scaler=scaler,
                          inside=block_weights(self.tuned.anatomy),
                          outputs=outputs(self.tuned.anatomy),
                          width=self.tuned.anatomy.hidden_size, **kw)
            self.say_projected()
        except BaseException:
            self.objectives.close()
            self.objectives = None
            raise
        self.optimizer, self._forms = opt, {}
        accumulation = kw.get("accumulation", 1)
        self.tuned.state.riding.rest = lambda: \
            (1.0 if scaler is None else float(scaler.get_scale())) / accumulation
        self.passes = 0
        self._timeline = Timeline([(m.name, h) for m in self.tuned.recipe
                                   if (h := m.controller(self.tuned)) is not None])
        self._listen(opt, plan, answers, accumulation)
        opt.register_step_pre_hook(lambda *_: self._before_update())
        opt.register_step_post_hook(lambda *_: self._after_update())
        self.tuned.state.tape.on_start = self._start
        return opt

    def let_go(self) -> None:
        """Drop the optimizer with its state and all that hangs on it."""
        old, self.optimizer = self.optimizer, None
        if hasattr(old, "close"):
            old.close()                              # one that steps in backward would go on
        if self.objectives is not None:
            self.objectives.close()
        self.objectives = self._timeline = None

    def say_projected(self) -> None:
        """A note of what a subspace covers; one that covers nothing is refused (RecipeError)."""
        answers = [m.optimizer() for m in self.tuned.recipe if "optimizer" in m.axes()]
        if (sub := plan_of(answers).subspace) is None:
            return
        inside = block_weights(self.tuned.anatomy)
        where = sub.where or block_matrices(sub.map.rank, inside)
        named = list(self.tuned.named_parameters())
        names = [n for n, p in named if where(n, p)]
        if not names:
            everywhere = dataclasses.replace(sub, where=block_matrices(0, inside))
            short = max((short_side(p) for n, p in named if everywhere.covers(n, p)), default=0)
            reason = f"the largest short side there is {short}: take a rank below it" if short > 1 \
                else "nothing that trains is a matrix inside a repeated block"
            raise RecipeError(f"{sub.name}(rank={sub.map.rank}) projects nothing: {reason}, name "
                              f"other weights with targets, or drop {sub.name}")
        said = f"{sub.name} projects"
        notes = [n for n in self.tuned.active.notes if not n.startswith(said)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said += f" {len(names)} of {len(named)} trained tensors to rank {sub.map.rank}: "
        self.tuned.active.notes = [*notes, f"{said}{', '.join(names[:3])}{more}"]

    def _wake(self) -> None:
        """What an earlier optimizer's schedule had put to rest trains again."""
        for p in self.tuned.model.parameters():
            if vars(p).pop("burnish_resting", False):
                p.requires_grad_(True)

    def _listen(self, opt: Any, plan: Plan, answers: list[Any], accumulation: int) -> None:
        if getattr(opt, "zeroth_order", False):
            opt.riding, opt.terms = self.tuned.state.riding, self.objectives.on_weights
            opt.blocks = tuple(b.path for b in self.tuned.anatomy.blocks)
        if not self.timeline.listens("tensor_updated"):
            return
        for answer in answers:
            if not honours(answer, "gradient"):
                raise ConfigError(f"a part of {self.tuned.recipe} reads gradients, but "
                                  f"{why(answer, 'gradient')}")
        if plan.in_backward:
            if accumulation > 1:
                raise ConfigError(f"a part of {self.tuned.recipe} reads whole gradients, which "
                                  "never exist where projected ones accumulate inside backward; "
                                  "use accumulation 1")
            opt.on_updated = self.timeline.tensor_updated

    @property
    def timeline(self) -> Timeline:
        if self._timeline is None:
            raise ConfigError("no optimizer yet; call tuned.optimizer(lr) first")
        return self._timeline

    def _start(self) -> None:
        if self._timeline is not None and torch.is_grad_enabled() and not self.still:
            self.follow()
            self._timeline.start(self.tuned.total_steps)

    def follow(self) -> None:
        """A model that was cast or moved takes the optimizer's state along."""
        opt, was = self.optimizer, self._forms
        now = {id(p): (p.dtype, p.device) for g in opt.param_groups for p in g["params"]}
        other = [(was[i], f) for i, f in now.items() if was.get(i, f) != f] if opt.state else []
        own = not type(opt).__module__.startswith("torch.")
        for (a, _), (b, _) in other:
            if own and accumulator(a) != accumulator(b):
                a, b = (str(d).removeprefix("torch.") for d in (a, b))
                raise ConfigError(f"the model was cast from {a} to {b}, and the optimizer's state "
                                  f"is of {a}; call tuned.optimizer(lr) for one that begins anew, "
                                  "or cast back")
        self._forms = now
        if any(not own or here != there for (_, here), (_, there) in other):
            opt.load_state_dict(opt.state_dict())

    def _before_update(self) -> None:
        self.tuned.check_here()
        self.follow()
        if self.still:                              # an update that is only looked at
            return
        self.timeline.start(self.tuned.total_steps)
        self._passed()
        self.objectives.before_update(self.optimizer)
        if not self.checked:
            self.check_gradients()
        clip_norm_(self.optimizer, self._clip_norm)
        self.timeline.before_update()

    def _after_update(self) -> None:
        if self.still:
            return
        opt = self.optimizer
        if self.timeline.listens("tensor_updated") and getattr(opt, "on_updated", None) is None:
            scale = getattr(opt, "grad_scale", None)           # a fused step unscales by itself
            for p in [p for g in opt.param_groups for p in g["params"] if p.grad is not None]:
                self.timeline.tensor_updated(p, p.grad if scale is None else p.grad / scale)
        self.timeline.after_update()

    def check_gradients(self) -> None:
        """Every tensor that should train has a finite gradient, or CheckError names those
        without (a silent no-op is the worst way to fail)."""
        self.tuned.check_ready()
        check_own(self.tuned)
        check_gradients(self.tuned)
        self.checked = True

    def step(self, batch: Any, loss: Loss | None = None) -> Tensor:
        """One whole training step; the loss (detached)."""
        self.tuned.check_plain()
        opt = self.optimizer or self.tuned.optimizer()
        if getattr(opt, "zeroth_order", False):      # evaluations instead of a backward
            with without_cache(self.tuned.model), allowing(self.tuned.state.room, 0):
                return self._evaluate(opt, batch, loss)
        opt.zero_grad(set_to_none=True)
        value = self.backward(batch, loss, 1.0)
        opt.step()
        return value

    def _evaluate(self, opt: Any, batch: Any, loss: Any) -> Tensor:
        was, opt.model = self.tuned.model.training, self.tuned.model
        opt.training = was
        self.tuned.model.eval()
        for m in self.tuned.model.modules():         # what learns by passing, in every pass
            if was and getattr(m, "moves_by_passing", False):
                m.train()
        try:
            with torch.no_grad():
                value = opt.step(lambda: self.loss(batch, loss))
        finally:
            self.tuned.model.train(was)
        return torch.tensor(value)

    def loss(self, batch: Any, loss: Loss | None) -> Tensor:
        """The task's loss on a batch, objectives on its back."""
        riding = self.tuned.state.riding
        with riding.to_join(loss is not None):
            out = call(self.through or self.tuned.model, batch)
        if loss is not None:
            return riding.join(loss(out, riding.asked(batch)))
        value = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
        if not isinstance(value, Tensor) or value.dim():
            raise ConfigError("the model returned no scalar loss; pass labels in the batch or "
                              "give step(batch, loss=lambda outputs, batch: ...)")
        return value

    def _finite(self, value: Tensor) -> None:
        if isinstance(value, FakeTensor):
            return
        bad, shards = not math.isfinite(float(value.detach())), self.tuned.state.shards
        if not (anywhere(bad, shards.average.group) if shards is not None else bad):
            return
        found = float(value.detach()) if bad else "not finite in another process"
        raise BurnishError(f"the loss is {found} at step {self.timeline.step}; "
                           "nothing was updated: the weights are those of the step before")

    # -- passes (see around.py) ------------------------------------------------------------------
    def around(self, whole: Callable[[], Tensor], alone: Callable[[], Tensor],
               each: Each | None = None, scale: Any = 1.0, some: Some | None = None) -> Tensor:
        """``whole()``, with what the recipe does around it."""
        self.timeline.start(self.tuned.total_steps)
        self.passes += 1
        with ExitStack() as stack:
            pass_ = Pass(self.tuned, whole, alone, each, scale, some)
            for handler in self.timeline.around():
                stack.enter_context(contextmanager(handler.around_step)(pass_))
            clip = getattr(self.optimizer, "clip", None)
            if clip is not None and clip.norm:       # LOMO: one backward for the norm alone
                with clip.weighing():
                    probe(self.tuned, pass_.whole, grads=True, statistics=False)
            return pass_.made()

    def nothing_came(self) -> None:
        """A batch had no sample: objectives have had no part in it, and that is right."""
        self.tuned.state.riding.ridden = True
        if self.objectives is not None:
            self.objectives._seen = True

    def backward(self, batch: Any, loss: Loss | None, scale: Any) -> Tensor:
        """Forward and backward of one micro-batch; the loss (detached)."""
        opt = self.optimizer or self.tuned.optimizer()
        if getattr(opt, "zeroth_order", False):
            raise ConfigError(f"{self.tuned.recipe} evaluates the loss and makes no gradient: "
                              "use tuned.step(batch, loss)")

        def whole(batch: Any, scale: Any) -> Tensor:
            value = self.loss(batch, loss)
            self._finite(value)
            if not value.requires_grad:
                raise CheckError("the loss depends on nothing that trains: what was chosen is no "
                                 "part of the computation of this batch; check targets")
            (value if isinstance(scale, float) and scale == 1 else value * scale).backward()
            return value.detach()

        def passes(batch: Any) -> Any:
            return (lambda: whole(batch, scale), lambda: self.loss(batch, loss),
                    lambda: (partial(whole, one, 1.0) for one in singly(batch)))

        def some(rows: Sequence[int]) -> Any:
            return passes(taken(batch, rows))

        with without_cache(self.tuned.model):
            return self.around(*passes(batch), scale, some)

    def _passed(self) -> None:
        """Raises ConfigError when an update comes whose passes the recipe could not surround."""
        acts = self.timeline.around()
        if acts and not self.passes:
            names = [n for n, h in self.timeline.handlers if h in acts]
            raise ConfigError(
                f"{' and '.join(names)} acts around the forward and backward, which this loop made "
                "by itself: call tuned.backward(batch, loss) instead of loss.backward() (or "
                "tuned.step, burnish.fit). Nothing was updated")
        self.passes = 0
