"""The optimizer that carries out a :class:`~burnish.blocks.step.Plan`.

The step of one tensor, slice by slice, so that no temporary grows with the tensor:

    read state slice (codec) -> direction (rule) -> weight slice (rounding) -> write both

and for a projected matrix, whose only full-size object is the gradient it was given:

    refresh basis every T -> R = down(G) -> direction on R, in place -> W += back(R), panel by panel

In backward the same code runs from a hook on each tensor, in the same order of arithmetic, so
the weights are the same bit for bit. A basis is linear: while it stays, the projections of
micro-batches add up to the projection of their sum, so a projected gradient accumulates in R.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, FormatError, RecipeError
from . import named
from .clip import Clip
from .codecs import SMALL, Block, Codec, Plain
from .noise import CounterNoise
from .numerics import NUMERICS
from .plan import Plan, check_shape
from .projecting import Projecting
from .rules import Whole, accumulator
from .subspace import in_memory_order, matrix, panels
from .sweep import Bunch, State, cut, state_parts, strip, sweep, sweep_whole
from .transform import Seen

#: of a tensor that is stepped with others: itself, its gradient, size, name and state
_Small = tuple[nn.Parameter, Tensor, int, str, State]


class Composed(Projecting, torch.optim.Optimizer):
    """See the module. `param_groups` hold lr, weight_decay and the rule's hyperparameters.

    state of a parameter: ``step`` (int), each state of the rule (``exp_avg``, or
    ``exp_avg.codes`` and ``exp_avg.absmax`` under a block codec), ``projector.left``/``right``,
    ``master`` or ``compensation``; ``folded`` between micro-batches.
    """

    def __init__(self, groups: list[dict[str, Any]], plan: Plan, *, seed: int = 0,
                 accumulation: int = 1, max_grad_norm: float = 0.0):
        self.plan, self.seed, self.accumulation = plan, seed, accumulation
        self.in_backward = plan.in_backward
        self._numerics = NUMERICS[plan.rounding]
        self._micro: dict[nn.Parameter, int] = {}       # backward passes since the last update
        self._done: set[nn.Parameter] = set()           # stepped since the last tick
        self._where: dict[nn.Parameter, tuple[dict[str, Any], str]] = {}
        self._hooks: list[Any] = []
        self.muted = False                              # a backward that is only looked at
        self.clip = Clip(plan.clip_value, max_grad_norm if plan.in_backward else 0.0)
        self._covered: dict[nn.Parameter, bool] = {}
        self.burnish_shapes: dict[nn.Parameter, torch.Size] = {}
        #: called with every tensor that was stepped inside backward, its gradient still there
        self.on_updated: Callable[[nn.Parameter, Tensor], None] | None = None
        super().__init__(groups, {"lr": 1e-3, **plan.rule.hyper()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            raise ConfigError("give the optimizer named parameters: (name, parameter) pairs")
        for name, p in zip(group["param_names"], group["params"], strict=True):
            self._where[p] = (group, name)
            if self.in_backward:
                self._hooks.append(_hook(self, p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; inside-backward plans only finish
        what a short last accumulation left open, and start the next update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together = self._together()
        for p in [p for g in self.param_groups for p in g["params"] if p not in together]:
            if "folded" in self.state.get(p, ()):
                self._update(p, None)
            elif p.grad is not None and p not in self._done:
                self._update(p, p.grad)
                if self.in_backward:
                    p.grad = None
        self._micro.clear()
        self._done.clear()
        self.clip.over()
        return loss

    def _together(self) -> set[nn.Parameter]:
        """Step small dense tensors in bunches of one slice's size, with a handful of kernels for
        all; returns what was stepped. Bit for bit what :meth:`_dense_step` does."""
        done = set[nn.Parameter]()
        rule = self.plan.rule
        whole = isinstance(rule, Whole)
        if self.in_backward or self.plan.transforms or (
                whole and rule.together is None):
            return done
        bunches: dict[tuple[Any, ...], list[_Small]] = {}
        for k, group in enumerate(self.param_groups):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                g, n = p.grad, p.numel()
                if g is None or n > self._slice(p.device) or g.is_sparse or self._projected(p) \
                        or not (p.is_contiguous() and g.is_contiguous()):
                    continue
                state = self.state[p]
                codec = Plain() if whole else self._codec(p, n)
                key = (k, p.device, p.dtype, g.dtype, state.get("step", 0), codec,
                       whole and p.dim() > 1)
                bunches.setdefault(key, []).append((p, g, n, name, state))
        for (k, device, *_, step, codec, _), found in bunches.items():
            for p, _, _, name, state in found:       # before a count of any of them moves
                check_shape(name, p, state, self.burnish_shapes)
            for p, _, n, _, state in found:
                if "step" not in state:
                    self.burnish_shapes.setdefault(p, p.shape)
                if whole:
                    self._allocate_whole(state, p)
                else:
                    self._allocate(state, codec, n, device, p.shape)
                self._numerics.prepare(p.detach().view(-1), state)
                state["step"] = step + 1
            done.update(p for p, *_ in found)
            found = self._alike(found)
            for lo, hi in cut([n for _, _, n, _, _ in found], self._slice(device), codec.block):
                self._step_bunch(self.param_groups[k], found[lo:hi], codec, step + 1)
        return done

    def _alike(self, found: list[_Small]) -> list[_Small]:
        """Those that are stepped in their place (a simulation of fewer blocks takes some again)."""
        return found

    def _step_bunch(self, group: dict[str, Any], found: list[_Small], codec: Codec, t: int) -> None:
        ws = [p.detach().view(-1) for p, *_ in found]
        bunch = Bunch([name for *_, name, _ in found], [state for *_, state in found],
                      [(0, n) for _, _, n, _, _ in found], ws, [g.view(-1) for _, g, *_ in found])
        if isinstance(self.plan.rule, Whole):
            sweep_whole(self.plan.rule, self._numerics, bunch, [_form(p) for p, *_ in found], t,
                        group, self.seed)
        else:
            sweep(self.plan.rule, codec, self._numerics, bunch, t, group, self.seed)

    @torch.no_grad()
    def _arrived(self, p: nn.Parameter) -> None:
        """The gradient of `p` is complete for this backward pass."""
        if p.grad is None:
            return
        if self.muted:
            if self.clip.weighs(p.grad):
                p.grad = None
            return
        count = self._micro.get(p, 0) + 1
        if count > self.accumulation:
            raise RecipeError(
                f"{self._where[p][1]} got gradient number {count} since the last step(), but its "
                f"step inside backward was set up for {self.accumulation}: pass accumulation= to "
                "tuned.optimizer, or call step() after every backward")
        self.clip.cut_(p.grad, self._where[p][1])
        self._micro[p] = count
        last = count == self.accumulation
        if self.accumulation > 1 and self._projected(p):
            self._fold(p, p.grad)
            p.grad = None
            if last:
                self._update(p, None)
        elif last:
            self._update(p, p.grad)
            p.grad = None
        if last:
            self._done.add(p)

    # -- one tensor -----------------------------------------------------------------------
    def _update(self, p: nn.Parameter, grad: Tensor | None) -> None:
        if grad is not None and grad.is_sparse:
            raise RecipeError(f"{self._where[p][1]} has a sparse gradient; dense ones only")
        check_shape(self._where[p][1], p, self.state.get(p), self.burnish_shapes,
                    not self._projected(p))
        self.burnish_shapes.setdefault(p, p.shape)
        changed = grad
        if grad is not None:
            group, name = self._where[p]
            for transform in self.plan.transforms:
                state = self.state[p]
                changed = transform.apply(changed, Seen(
                    name, p.detach(), state, state.get("step", 0) + 1, group))
        if self._projected(p):
            self._project_step(p, changed)
        elif isinstance(self.plan.rule, Whole):
            self._whole_step(p, changed)
        else:
            self._dense_step(p, changed)
        if self.on_updated is not None and grad is not None:
            self.on_updated(p, grad)

    def _dense_step(self, p: nn.Parameter, grad: Tensor) -> None:
        group, name = self._where[p]
        state, rule = self.state[p], self.plan.rule
        state["step"] = t = state.get("step", 0) + 1
        w = in_memory_order(p.detach())[0].reshape(-1)
        g_flat = in_memory_order(grad, like=p)[0].reshape(-1)
        codec = self._codec(p, p.numel())
        self._allocate(state, codec, p.numel(), p.device, tuple(p.shape))
        self._numerics.prepare(w, state)
        for lo, hi in self._slices(p.numel(), p.device):
            sweep(rule, codec, self._numerics, Bunch([name], [state], [(lo, hi)], [w[lo:hi]],
                                                     [g_flat[lo:hi]]), t, group, self.seed)

    def _whole_step(self, p: nn.Parameter, grad: Tensor) -> None:
        """A rule that reads the tensor at once; the weight is stepped some rows at a time."""
        (group, name), state = self._where[p], self.state[p]
        rule = self.plan.rule.of(name)  # type: ignore[attr-defined]
        state["step"] = t = state.get("step", 0) + 1
        w = in_memory_order(p.detach())[0].reshape(-1)
        shape = _form(p)
        self._allocate_whole(state, p)
        self._numerics.prepare(w, state)
        width = p.numel() // max(1, shape[0])

        def weight(lo: int, hi: int) -> Tensor:
            return self._numerics.read(w, state, lo * width, hi * width).view(-1, *shape[1:])

        rows = rule.rows(in_memory_order(grad, like=p)[0].reshape(shape), weight, state, t, group)
        noise = CounterNoise(self.seed, f"{name}/round")
        for lo, hi in panels(shape[0], width, self._slice(p.device)):
            x = weight(lo, hi)
            if group["weight_decay"]:
                x.mul_(1 - group["lr"] * group["weight_decay"])
            x.add_(rows(lo, hi), alpha=-group["lr"])
            self._numerics.write(w, state, lo * width, hi * width, x.view(-1), noise, t)

    # -- storage --------------------------------------------------------------------------
    def _codec(self, p: nn.Parameter, n: int) -> Codec:
        codec = self.plan.codec
        if p.dtype == torch.float64 or (isinstance(codec, Block) and n < SMALL):
            return Plain(accumulator(p.dtype))
        return codec

    def _allocate(self, state: State, codec: Codec, n: int, device: torch.device,
                  shape: tuple[int, ...]) -> None:
        for s, signed in self.plan.rule.states.items():
            if not state_parts(state, s):
                for part, tensor in codec.empty(n, signed, device).items():
                    state[f"{s}.{part}" if part else s] = tensor if part else tensor.view(shape)

    def _allocate_whole(self, state: State, p: Tensor) -> None:
        rule = self.plan.rule.of(self._where[p][1])  # type: ignore[attr-defined]
        for key, size in rule.shapes(_form(p)).items():
            if key not in state:
                state[key] = torch.zeros(size, dtype=accumulator(p.dtype), device=p.device)

    @staticmethod
    def _slice(device: torch.device) -> int:
        return strip(device)

    def _slices(self, n: int, device: torch.device) -> Any:
        size = self._slice(device)
        return ((lo, min(lo + size, n)) for lo in range(0, n, size))

    # -- saving ---------------------------------------------------------------------------
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state keeps its own dtype (torch casts to the parameter's)."""
        super().load_state_dict(state_dict)
        params = [p for g in self.param_groups for p in g["params"]]
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().clone().to(p.device)
        self._where = {p: (g, n) for g in self.param_groups
                       for n, p in zip(g["param_names"], g["params"], strict=True)}

    def named_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See :func:`burnish.blocks.named.named_state`."""
        return named.named_state(self)

    def load_named_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """See :func:`burnish.blocks.named.load_named_state`."""
        beside = self.plan.subspace.beside if self.plan.subspace is not None else None
        known = {"step", "projector", "master", "compensation", "folded", *self.plan.rule.states,
                 *(beside.states if beside is not None else ()),
                 *(s for t in self.plan.transforms for s in t.states)}
        for key in tensors:
            name = max((n for _, n in self._where.values() if key.startswith(f"{n}.")),
                       key=len, default=None)
            if name is not None and key[len(name) + 1 :].split(".")[0] not in known:
                raise FormatError(f"optimizer state {key} belongs to another optimizer")
        named.load_named_state(self, tensors, scalars)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for h in self._hooks:
            h.remove()
        self._hooks.clear()


def _form(p: Tensor) -> tuple[int, ...]:
    """In what shape a rule of whole tensors sees one: (first dimension in memory, rest)."""
    return tuple(matrix(p.detach()).shape) if p.dim() > 1 else (p.numel(),)


def _hook(optimizer: Composed, p: nn.Parameter) -> Any:
    """Step `p` when its gradient is complete. The hook outlives freezing, and does not keep
    the optimizer alive."""
    ref = weakref.ref(optimizer)

    def arrived(param: nn.Parameter) -> None:
        if (opt := ref()) is not None:
            opt._arrived(param)

    live = p.requires_grad
    p.requires_grad_(True)                       # torch registers on live tensors only
    handle = p.register_post_accumulate_grad_hook(arrived)
    p.requires_grad_(live)
    return handle
