"""Zeroth-order steps: evaluate the loss at two mirrored points, move along the noise between them.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)        theta <- theta - lr (g z + wd theta)

z comes from :class:`~burnish.blocks.noise.CounterNoise`, so it is drawn again wherever it is needed
and never stored. The step is a generator that yields what to evaluate and receives the loss; the
training loop, the simulator and the tests drive the same body::

    gen = optimizer.passes()
    where = next(gen)
    while True:
        with where:                       # the model's weights read as theta +- eps z
            loss = ...                    # no grad, eval mode, the same batch every time
        where = gen.send(float(loss))     # StopIteration carries the mean loss

The context also lets loss functions compute in fp32 (see precise.py): a loss in half precision is
refused, since the difference of two is below its spacing.

What is kept during an evaluation, besides one forward without gradients:

in_place    nothing; but adding and taking away eps z rounds, so half-precision weights drift.
scratch     theta is never written. With ``optimizer.model`` set, a module's perturbed weights exist
            while that module runs: the largest one is kept (parameters that are read without
            calling their own module, as in `nn.MultiheadAttention`, live while the nearest module
            that is called runs; one extra forward at the first step finds out which). Without a
            model the whole trainable set is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import BurnishError, FormatError, RecipeError
from ...core.processes import processes
from .noise import STREAM, STREAMS, ScalarLog, as_fp32, fold
from .numerics import NUMERICS
from .objective import OnWeights, Riding
from .precise import Evaluation, NotFinite, host_float, no_value, widened
from .scratch import Callers, Evaluate, Scratch, perturbed, strips
from .step import Plan
from .subspace import in_memory_order

Mode = Literal["scratch", "in_place"]
#: updates in a row without a difference between the losses before the run is stopped
PATIENCE = 5
#: what a log's header says of its run, and not of the optimizer that may repeat it
OF_A_RUN = ("first_update", "resting", "factors", "shares")


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """The innermost answer of MeZO and its relatives; :func:`burnish.blocks.step.compose` builds.

    eps: radius of the probe.  queries: probes averaged per update, all at the same theta.
    mode: see the module.  weight_decay: on matrices only, as published.
    noise: "portable" draws the same z on every kind of device, slowly.
    bound: of |g|, which a probe's is cut to; 0: none.
    """

    #: words of other parts that it carries out; it refuses the rest (core/words.py)
    honours: ClassVar[frozenset[str]] = frozenset({"objective", "schedule", "rounding",
                                                  "groups"})
    why: ClassVar[Mapping[str, str]] = {
        "subspace": "a step of evaluations makes no gradient that could be projected",
        "transform": "a step of evaluations makes no gradient that could be changed",
        "step site": "a step of evaluations has no backward to step in",
        "around_step": "a step of evaluations has no forward and backward to stand around",
        "gradient": "a step of evaluations makes no gradient to read",
        "gradients": "a step of evaluations makes no gradients to read"}

    eps: float = 1e-3
    queries: int = 1
    mode: Mode = "scratch"
    weight_decay: float = 0.0
    noise: Literal["device", "portable"] = "device"
    bound: float = 0.0
    name: str = "mezo"

    #: how many radii lie between the two evaluations of a probe
    width: ClassVar[int] = 2
    #: its learning rate is that of a probe, a hundredth of a gradient's
    rates_probes: ClassVar[bool] = True
    #: it needs a model, and not only its loss
    reads_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.eps <= 0 or self.queries < 1:
            raise RecipeError(f"{self.name}: eps is positive and queries at least 1, got "
                              f"eps={self.eps}, queries={self.queries}")
        if self.bound < 0:
            raise RecipeError(f"{self.name}: a bound of |g| is positive, or 0 for none, got "
                              f"{self.bound:g}")

    def hyper(self) -> dict[str, Any]:
        return {"eps": self.eps, "weight_decay": self.weight_decay}

    def build(self, groups: list[dict[str, Any]], plan: Plan, seed: int,
              accumulation: int) -> ZerothOrderOptimizer:
        if accumulation > 1:
            raise RecipeError(f"{self.name} makes no gradient that could accumulate; average the "
                              "loss over the micro-batches inside the closure")
        return self.make(groups, plan, seed)

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> ZerothOrderOptimizer:
        """Its optimizer."""
        return ZerothOrderOptimizer(groups, self, plan, seed)


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Drives :meth:`passes`; ``step(closure)`` does it for a closure that returns the loss.

    log: every query as (seed, g, lr): with the starting weights it is the run (:meth:`replay`).
        It is saved with the optimizer, so a resumed run keeps writing the same log.
    model: set it to keep one module's perturbed weights at a time (see the module).
    terms, riding: objectives beside the loss; their values at theta +- eps z are added to it.
        A schedule's tensors that rest are neither perturbed nor moved.
    state of a parameter: only what the rounding needs (none by default).
    """

    zeroth_order = True
    #: a step on fake tensors, whose losses have no value
    simulated = False
    #: the last loss was a tensor; a plain number may be a count, which stands still for longer
    smooth = True
    #: a loss that is not finite raises NotFinite before anything moves; False: it moves nothing
    stops = False

    def __init__(self, groups: list[dict[str, Any]], spec: ZerothOrder, plan: Plan, seed: int):
        self.spec, self.seed = spec, seed
        self.noise: Any = STREAMS[spec.noise]        # (seed, name) -> z of a probe
        self.moves = self.noise                      # and what is moved along
        self.model: nn.Module | None = None
        self.blocks: tuple[str, ...] = ()            # paths of the model's
        self.training = False                        # the mode it stands in between steps
        self._rounding = plan.rounding if "rounding" in plan.names else "stochastic"
        self._callers: Callers | None = None
        self.terms: Sequence[OnWeights] = ()
        self.riding: Riding | None = None
        self._terms: list[Tensor] | None = None
        self._only: frozenset[str] | None = None     # of one unit alone
        self._there: Mapping[str, Tensor] = {}       # what a probe stands at, if not at theta
        self._flat = 0                       # updates in a row that found no difference
        super().__init__(groups, {"lr": 1e-6, **spec.hyper(), "updates": 0})
        self.log = ScalarLog(header={
            "method": spec.name, "queries": spec.queries, "rounding": self._rounding,
            "weight_decay": [g["weight_decay"] for g in self.param_groups], "seed": seed,
            "noise": spec.noise if spec.noise == "portable" else self._device(), "stream": STREAM})

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """What is live: a schedule may have put the others to rest."""
        return [(n, p) for n, p in self._all()
                if _live(p) and (self._only is None or n in self._only)]

    def _device(self) -> str:
        return self.param_groups[0]["params"][0].device.type

    def _all(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for g in self.param_groups
                for n, p in zip(g["param_names"], g["params"], strict=True)]

    def resting(self) -> frozenset[str]:
        """Names of the tensors that a schedule keeps still for now."""
        return frozenset(n for n, p in self._all() if not _live(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:
        """One update. `closure` returns the loss at the current weights: eval mode, same batch
        at every call, no backward. Returns the mean of the losses seen."""
        if closure is None:
            raise RecipeError(f"{self.spec.name} needs evaluations of the loss, not gradients: "
                              "use tuned.step(batch), or optimizer.step(closure)")
        with closing(self.passes()) as passes:       # one that breaks off leaves all as it was
            where = next(passes)
            while True:
                with where:
                    value = closure()
                    loss, self.simulated = self._read(value), no_value(value)
                    self.smooth = isinstance(value, Tensor)
                    del value
                try:
                    where = passes.send(loss)
                except StopIteration as done:
                    return done.value

    def passes(self) -> Generator[Evaluate, float, float]:
        """One update as a generator: yields contexts to evaluate the loss in, receives losses."""
        if self.spec.mode == "scratch" and self.model is not None and self._callers is None:
            callers = Callers(self.model, self._all())
            yield Evaluation(callers.watch(), self.model)
            self._callers = callers
        update = self.param_groups[0]["updates"]
        eps = self._radius(update)
        lrs, units, q = self._rates(update), self.units(), self.spec.queries
        found, losses = [], []
        self._still = True                           # nothing has moved yet
        try:
            yield from self._begin(update)
            for u, self._only in enumerate(units):
                seeds = [self._seed(update, k, u) for k in range(q)]
                here = []
                for s in seeds:
                    slope, seen = yield from self._slope(s, eps)
                    losses += seen
                    g = as_fp32(slope / q)
                    if not math.isfinite(g):
                        g = 0.0                      # a failed probe moves nothing
                    here.append(_cut(g, self.spec.bound / q))
                found += here
                here = yield from self._decided(seeds, here, lrs)
                if u == len(units) - 1:
                    self._moving(found, losses)
                if not len(self.log):
                    self.log.header["first_update"] = update
                self._only = None
                self.log.rests(self.resting())
                for s, g in zip(seeds, here, strict=True):
                    self.log.append(s, g, lrs)
                self._still = False
                self._take(seeds, here, lrs, (update * len(units) + u) * q)
        finally:
            self._only = None
        for group in self.param_groups:
            group["updates"] = update + 1
        return sum(losses) / len(losses)

    # -- what relatives say otherwise (zoo.py) ----------------------------------------------
    def units(self) -> Sequence[frozenset[str] | None]:
        """Names of what is probed and moved together, one after the other; None: all."""
        return (None,)

    def _seed(self, update: int, query: int, unit: int) -> int:
        return fold("query", self.seed, update, query) & 0x7FFFFFFF

    def _rates(self, update: int) -> list[float]:
        """The learning rate of each group."""
        return [g["lr"] for g in self.param_groups]

    def _radius(self, update: int) -> float:
        """How far from the weights an update probes."""
        return self.param_groups[0]["eps"]

    def _begin(self, update: int) -> Generator[Evaluate, float, None]:
        """Before the probes of an update."""
        yield from ()

    def _decided(self, seeds: list[int], found: list[float], lrs: list[float]
                 ) -> Generator[Evaluate, float, list[float]]:
        """What is logged and moved along, of what the probes found."""
        yield from ()
        return found

    def _take(self, seeds: list[int], found: list[float], lrs: Sequence[float], index: int,
              rest: frozenset[str] | None = None) -> None:
        """The moves of one unit's queries, of which the first is number `index` of the run."""
        for k, (s, g) in enumerate(zip(seeds, found, strict=True)):
            self._apply(s, g, lrs, index + k, rest)

    def _of_all(self, *losses: float) -> tuple[float, ...]:
        """Means over the processes of a run: each sees its own rows, and all take one step."""
        if not self.simulated and processes() > 1:
            device = self.param_groups[0]["params"][0].device
            both = torch.tensor(losses, dtype=torch.float64, device=device)
            torch.distributed.all_reduce(both)
            losses = tuple((both / processes()).tolist())
        if self.stops and self._still and not all(map(math.isfinite, losses)):
            raise NotFinite(self.spec.name, next(x for x in losses if not math.isfinite(x)))
        return losses

    def _read(self, value: Any) -> float:
        """What a closure gave, as a number; asked for within the context it was evaluated in."""
        return host_float(value, self.spec.name)

    def _slope(self, seed: int, eps: float
               ) -> Generator[Evaluate, float, tuple[float, Sequence[float]]]:
        """(the slope of the loss along z, the losses seen)."""
        up, down = self._of_all(*(yield from self._pair(seed, eps)))
        return (up - down) / (self.spec.width * eps), (up, down)

    def _pair(self, seed: int, eps: float) -> Generator[Evaluate, float, tuple[float, float]]:
        if self.spec.mode == "scratch":
            both = []
            for scale in (eps, -eps):
                where = Scratch(self.named(), seed, scale, self._callers, self.noise,
                                self._there)
                both.append((yield self._at(where)) + self._beside(seed, scale))
            return both[0], both[1]
        away = 0.0                           # how far along z the stored weights stand
        try:
            losses = []
            for target in (eps, -eps):
                self._shift(seed, target - away)
                away = target
                losses.append((yield self._at(nullcontext())) + self._beside(seed, 0.0))
        finally:
            self._shift(seed, -away)
        return losses[0], losses[1]

    def _at(self, where: Evaluate) -> Evaluate:
        self._terms = [] if self.riding is None else None
        return Evaluation(where, self.model) if self.riding is None else \
            Evaluation(where, self.model, self._collect())

    @contextmanager
    def _collect(self) -> Iterator[None]:
        with self.riding.collecting() as self._terms:
            yield

    def _beside(self, seed: int, scale: float) -> float:
        """The objectives of the evaluation just made: those the forward collected, and those of
        weights alone at theta + scale z (0 where the stored weights stand there already)."""
        total = sum(host_float(t, self.spec.name) for t in self._terms or ())
        live = dict(self.named()) if self.terms else {}
        names = {p: n for n, p in live.items()}
        for term in self.terms:
            moved = {names[p]: p for p in term.params if p in names} if scale else {}
            with Scratch(moved.items(), seed, scale, None, self.noise, self._there):
                total += host_float(widened(term.value()), self.spec.name)
        return total

    def _moving(self, found: list[float], losses: list[float]) -> None:
        """A run whose probes never differ goes nowhere: say so instead of going on."""
        stands = not any(found) and not self.simulated
        self._flat = self._flat + 1 if stands else 0
        if self._flat < (PATIENCE if self.smooth else 20 * PATIENCE):
            return
        name, n, eps = self.spec.name, self._flat, self.param_groups[0]["eps"]
        if not all(map(math.isfinite, losses)):
            raise BurnishError(f"{name}: the losses of {n} updates in a row were not finite "
                               f"({losses[-1]}), so nothing moves; try a smaller eps than {eps} "
                               "and look at the rows of these batches")
        raise BurnishError(
            f"{name}: the two losses of {n} updates in a row were equal (last {losses[-1]:.9g}), "
            "so the estimated gradient is 0 and nothing moves. Either the loss is rounded too "
            "coarsely (compute it in fp32; a loss of counts needs a larger batch), or a probe of "
            f"radius eps={eps} is too small to be seen (try eps={eps * 10:g}), or what trains has "
            "no part in the loss")

    @torch.no_grad()
    def _shift(self, seed: int, scale: float) -> None:
        for name, p in self.named():
            perturbed(p.detach(), name, seed, scale, p.detach(), self.noise)

    @torch.no_grad()
    def _apply(self, seed: int, g: float, lrs: Sequence[float], index: int,
               rest: frozenset[str] | None = None) -> None:
        """The update of query number `index` of the run; decay rides on an update's first.
        rest: names of tensors that stay; None: those that do not train just now."""
        if rest is None:
            rest = self.resting()
        first = index % self.spec.queries == 0
        units = self.units()
        only = units[index // self.spec.queries % len(units)]
        for group, lr in zip(self.param_groups, lrs, strict=True):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if name in rest or only is not None and name not in only:
                    continue
                keep = 1 - lr * group["weight_decay"] if first and p.dim() > 1 else 1.0
                self._move(p, partial(self._moved, p, name, seed, -lr * g, keep, index))

    def _move(self, p: nn.Parameter, move: Callable[[Tensor], None]) -> None:
        """Carry out ``move(weight)``, in place."""
        move(p.detach())

    def _moved(self, p: nn.Parameter, name: str, seed: int, along: float, keep: float, index: int,
               weight: Tensor) -> None:
        """weight <- keep weight + along z, rounded as the optimizer rounds."""
        numerics = NUMERICS[self._rounding]
        w = in_memory_order(weight)[0].view(-1)
        state = self.state[p] if p in self.state else {}
        numerics.prepare(w, state)
        if state:
            self.state[p] = state
        stream, low = self.moves(seed, name), self.noise(seed, f"{name}/round")
        for lo, hi in strips(w.numel(), w.device):
            x = numerics.read(w, state, lo, hi)
            if keep != 1.0:
                x.mul_(keep)
            z = stream.normal(hi - lo, lo, device=w.device)
            x.add_(z.to(x.dtype), alpha=along)
            numerics.write(w, state, lo, hi, x, low, index)

    def replay(self, log: ScalarLog) -> None:
        """Repeat a logged run on its starting weights: bit for bit, no data, no forward."""
        self._accept(log)
        first, q = int(log.header.get("first_update", 0)), self.spec.queries  # type: ignore
        each = q * len(self.units())
        for i in range(0, len(log), q):
            self._take(log.seeds[i : i + q], log.scalars[i : i + q], log.lrs[i],
                       first * each + i, log.resting(i))
        self.log = log
        for group in self.param_groups:
            group["updates"] = first + len(log) // each

    def _accept(self, log: ScalarLog) -> None:
        """FormatError for a log that this optimizer cannot repeat."""
        for key in (k for k in self.log.header if k not in ("seed", "method", *OF_A_RUN)):
            if log.header.get(key) != self.log.header[key]:
                raise FormatError(f"the log was written with {key}={log.header.get(key)!r}, this "
                                  f"optimizer has {self.log.header[key]!r}")
        log.check(self.spec.queries)
        if len(log) and len(log.lrs[0]) != len(self.param_groups):
            raise FormatError(f"the log has {len(log.lrs[0])} learning rates per entry, this "
                              f"optimizer has {len(self.param_groups)} parameter groups")

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The log, for :func:`burnish.blocks.named.named_state`."""
        return self.log.tensors(), dict(self.log.header)

    def load_extra_state(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self.log = ScalarLog.from_tensors(tensors, header)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the log."""
        return {**super().state_dict(), "log": self.extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = {k: v for k, v in state_dict.items() if k != "log"}
        super().load_state_dict(rest)
        params = [p for g in self.param_groups for p in g["params"]]
        ids = [i for g in rest["param_groups"] for i in g["params"]]
        for i, p in zip(ids, params, strict=True):       # torch casts to the weight's dtype
            for key, value in rest["state"].get(i, {}).items():
                self.state[p][key] = value.detach().clone().to(p.device) \
                    if isinstance(value, Tensor) else value
        if "log" in state_dict:
            self.load_extra_state(*state_dict["log"])


def _cut(g: float, bound: float) -> float:
    return as_fp32(max(-bound, min(g, bound))) if bound else g


def _live(p: nn.Parameter) -> bool:
    return p.requires_grad
