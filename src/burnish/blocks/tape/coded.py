"""Kept tensors in a few bits, by what backward does with them (roles.py).

linear input,  k-bit codes of groups, rounded at random: gradients are right in the mean
factor
norm           x^ = (x - mean) / std in k bits, 1 / std exact; a linear that reads the norm's output
               makes it again from x^, so it keeps nothing of its own
activation     ReLU one bit and GELU, SiLU the number of an interval of their derivative
softmax        where asked for: probabilities in k bits, right in the mean (probabilities.py)
weight         never
other          as it is; what is kept as it is anyway is not coded a second time

Outputs are those of the stock functions. Somebody else's checkpointing counts what is kept and runs
without us, so under it everything is stock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allocated import Allocated
from .codes import Codes, packed, pieces, unpacked
from .derivatives import table
from .functions import once_differentiable, storage_of, version_of
from .notes import View
from .probabilities import Softmax
from .roles import IN_THE_MEAN, Role, name_of
from .running import Ranges, Running, site, width
from .saved import Policy

if TYPE_CHECKING:
    from .saved import Tape


class _Packed:
    """Codes that wait where the inner policy says, and how the tensor looked at its storage."""

    def __init__(self, codes: Codes, inner: Policy):
        self.kind, self.meta = type(codes), (codes.n, codes.bits, codes.group, codes.dtype)
        self.held = [inner.pack(t) for t in codes.tensors]

    def codes(self) -> Codes:
        return self.kind(tuple(h.open() for h in self.held), *self.meta)


class _Coded:
    """A tensor kept as codes of its storage, or of its own values."""

    def __init__(self, codes: _Packed, view: View | None, shape: torch.Size):
        self.codes, self.view, self.shape = codes, view, shape

    def open(self) -> Tensor:
        flat = self.codes.codes().values()
        return flat.view(self.shape) if self.view is None else self.view.of(flat)


class Coded(Policy):
    """bits: of linear inputs. norm: of norms. derivative: of GELU and SiLU (ReLU takes one).
    softmax: of probabilities. 0 keeps that role as it is. group: values that share a range. seed:
    of the rounding, which draws from a generator of its own. mean: bits of linear inputs in the
    mean, in place of `bits`, which go to the groups by their ranges (allocated.py). running: how
    slowly ranges move that steps share (running.py), in place of one for every group."""

    roles = True
    outer = True
    beside = "what is kept for backward is coded (coded)"

    def __init__(self, bits: int = 4, norm: int = 8, derivative: int = 4, group: int = 256,
                 seed: int = 0, softmax: int = 0, mean: float = 0.0, running: float = 0.0):
        self.softmax, self.softmaxes = softmax, 0    # so many so far in this step
        self.bits, self.norm, self.derivative, self.group = bits, norm, derivative, group
        self.mean = mean
        self.ranges = Ranges(running) if running else None
        self.kind = Allocated if mean else Running if running else Codes
        self.room = mean or bits
        self.seed, self.step = seed, 0
        self._generators: dict[torch.device, torch.Generator] = {}
        # storage -> (the storage, its version, what keeps it), weakly: addresses are used again
        self._exact: dict[int, tuple[Any, int, Any]] = {}
        self._made: dict[int, tuple[Any, int, Any]] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self.bits, self.norm, self.derivative, self.group, self.seed,
                            self.softmax, self.mean,
                            0.0 if self.ranges is None else self.ranges.decay), \
            {"inner": self.inner, "step": self.step}

    def begin(self, step: int) -> None:
        """The numbers of a step depend on the seed and the step alone."""
        self.step, self.softmaxes = step, 0
        self._generators.clear()
        if self.ranges is not None:
            self.ranges.begin()

    @property
    def moves(self) -> bool:                         # type: ignore[override]
        return self.inner.moves

    def start(self) -> None:
        self.inner.start()
        self._exact.clear()
        self._made.clear()

    def generator(self, device: torch.device) -> torch.Generator | None:
        if device.type == "meta":
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(
                (self.seed * 1_000_003 + self.step) % 2 ** 63)
        return self._generators[device]

    def encode(self, part: Callable[[int, int], Tensor], n: int, bits: int, like: Tensor,
               unit: int = 1) -> Codes:
        if self.ranges is not None:
            return Running.on(self.ranges, site(), part, n, bits, (self.group, unit), like,
                              self.generator(like.device))
        return Codes.of(part, n, bits, self.group, like, self.generator(like.device), unit)

    def end(self) -> None:
        self.inner.end()

    def enter(self) -> None:
        self.inner.enter()

    def changing(self, tensors: Iterable[Tensor]) -> None:
        self.inner.changing(tensors)

    # -- tensors --------------------------------------------------------------------------------
    def pack(self, t: Tensor, role: Role | None = None) -> Any:
        key = storage_of(t)
        if role not in IN_THE_MEAN or not self.room or key is None or not t.is_floating_point() \
                or t.element_size() * t.numel() <= self.kind.nbytes(t.numel(), self.room,
                                                                    self.group, t.dtype):
            return self._as_it_is(t, key, role)
        if self._found(self._exact, t, key) is not None:
            return self.inner.pack(t)                         # it is kept anyway
        whole = t.untyped_storage().nbytes() // t.element_size()
        if whole > t.numel():                                 # a part of something larger
            flat = t.detach().reshape(-1)
            return _Coded(self._coded(flat, 1), None, t.shape)
        codes = self._found(self._made, t, key)
        if codes is None:
            codes = self._coded(t.detach().as_strided((whole,), (1,), 0), width(t))
            self._made[key] = weakly(t, codes)
        return _Coded(codes, View(t), t.shape)

    def _coded(self, flat: Tensor, D: int) -> _Packed:
        if self.ranges is not None:
            return _Packed(self.encode(lambda a, b: flat[a:b], flat.numel(), self.bits, flat, D),
                           self.inner)
        return _Packed(self.kind.of(lambda a, b: flat[a:b], flat.numel(), self.room, self.group,
                                    flat, self.generator(flat.device)), self.inner)

    def _as_it_is(self, t: Tensor, key: int | None, role: Role | None) -> Any:
        kept = self.inner.pack(t)
        if key is not None and role != "weight":
            self._exact[key] = weakly(t, kept)
        return kept

    @staticmethod
    def _found(where: dict[int, tuple[Any, int, Any]], t: Tensor, key: int) -> Any:
        """What keeps this storage as it is now, if somebody still does."""
        storage, version, kept = where.get(key, (_gone, -1, _gone))
        return kept() if storage() is not None and version == version_of(t) else None

    # -- functions ------------------------------------------------------------------------------
    def replaces(self, func: Any, args: tuple, kwargs: dict) -> Callable[[Tape], Tensor] | None:
        """What runs instead of a norm or an activation that carries a gradient, or None."""
        name = name_of(func)
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.requires_grad or not x.is_floating_point() \
                or x.numel() == 0:
            return None
        if name in ("relu", "gelu", "silu"):
            if len(args) > 1 or kwargs.get("inplace") or kwargs.get("out") is not None:
                return None
            if name == "gelu" and kwargs.get("approximate", "none") != "none":
                name = "gelu_tanh"
            if name != "relu" and not self.derivative:
                return None
            return lambda tape: _Activation.apply(x, _on(func, args, kwargs), name,
                                                  1 if name == "relu" else self.derivative)
        if name == "softmax" and self.softmax and kwargs.get("out") is None and \
                (args[1] if len(args) > 1 else kwargs.get("dim")) in (-1, x.dim() - 1):
            self.softmaxes += 1
            seed = hash_of(self.seed, self.step, self.softmaxes)
            return lambda tape: Softmax.apply(x, _on(func, args, kwargs), self.softmax, seed)
        if name in ("layer_norm", "rms_norm") and self.norm:
            return lambda tape: self._normed(tape, name, func, args, kwargs)
        return None

    def _normed(self, tape: Tape, name: str, func: Any, args: tuple, kwargs: dict) -> Tensor:
        words = ("input", "normalized_shape", "weight", "bias", "eps") if name == "layer_norm" \
            else ("input", "normalized_shape", "weight", "eps")
        given = dict(zip(words, args, strict=False)) | kwargs
        x, w, b = given["input"], given.get("weight"), given.get("bias")
        eps = given.get("eps", 1e-5 if name == "layer_norm" else None)
        made: list[Codes] = []
        y = _Norm.apply(x, w, b, (self, lambda v: _called(func, given, v), made,
                                  name == "layer_norm", eps,
                                  torch.Size(_sizes(given["normalized_shape"])).numel()))
        if tape.lean:
            waits = _Packed(made[0], self.inner)
            dtype, shape = y.dtype, y.shape

            def again() -> Tensor:
                return _affine(waits.codes(), w, b, dtype, shape)

            tape.note(y, again, (), {}, [t for t in (w, b) if t is not None], approximate=True)
        return y


class Steps:
    """Tells the policy which step it is: a run that goes on draws what it would have drawn."""

    def __init__(self, tuned: Any):
        self.tuned = tuned

    @property
    def policy(self) -> Any:                     # the tape's own: taking an adapter out renews it
        return self.tuned.state.tape.policy

    def step_begin(self, step: int) -> None:
        self.policy.begin(step)

    def state_dict(self) -> dict[str, Any]:
        ranges = self.policy.ranges
        return {"step": self.policy.step} | ({} if ranges is None else {"ranges": ranges.state()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_begin(state["step"])
        if self.policy.ranges is not None:
            self.policy.ranges.load(state.get("ranges", {}))


def hash_of(*numbers: int) -> int:
    """One seed of several numbers."""
    made = 0
    for n in numbers:
        made = (made * 6364136223846793005 + n + 1442695040888963407) % 2 ** 63
    return made


def _gone() -> None:
    return None


def weakly(t: Tensor, kept: Any) -> tuple[Any, int, Any]:
    return weakref.ref(t.untyped_storage()), version_of(t), weakref.ref(kept)


def _sizes(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _called(func: Any, given: dict, x: Tensor) -> Tensor:
    return func(**{**given, "input": x})


def _on(func: Any, args: tuple, kwargs: dict) -> Callable[[Tensor], Tensor]:
    """The function of its first argument."""
    rest = {k: v for k, v in kwargs.items() if k != "input"}
    return lambda x: func(x, *args[1:], **rest)


def _intervals(name: str, device: torch.device, bits: int) -> tuple[Tensor, Tensor]:
    borders, levels, _ = table(name, bits)
    return (torch.tensor(borders, dtype=torch.float32, device=device),
            torch.tensor(levels, dtype=torch.float32, device=device))


class _Activation(torch.autograd.Function):
    """y = f(x) exactly; dx = g l_i with i in k bits (ReLU: one bit, exactly)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], name: str,
                bits: int) -> Tensor:
        y = run(x)
        ctx.name, ctx.bits, ctx.shape = name, bits, x.shape
        flat, n = x.reshape(-1), x.numel()
        code = torch.empty(-(-n // (8 // bits)), dtype=torch.uint8, device=x.device)
        borders = None if name == "relu" else _intervals(name, x.device, bits)[0]
        for a, b in pieces(n, 8):
            v = flat[a:b]
            i = (v <= 0).logical_not_() if borders is None else \
                torch.bucketize(v.float(), borders, out_int32=True)
            code[a // (8 // bits):-(-b // (8 // bits))] = packed(i.to(torch.uint8), bits)
        ctx.save_for_backward(code)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (code,), bits = ctx.saved_tensors, ctx.bits
        per, n, flat = 8 // bits, g.numel(), g.reshape(-1)
        dx = torch.empty(n, dtype=g.dtype, device=g.device)
        levels = None if ctx.name == "relu" else _intervals(ctx.name, g.device, bits)[1]
        for a, b in pieces(n, 8):
            i = unpacked(code[a // per:-(-b // per)], bits, b - a)
            dx[a:b] = flat[a:b].masked_fill(i == 0, 0) if levels is None else \
                flat[a:b] * levels[i.int()]
        return dx.view(ctx.shape), None, None, None


class _Norm(torch.autograd.Function):
    """y = norm(x) w + b exactly, keeping x^ in k bits and 1 / std:

        dx = (h - mean(h) - x^ mean(h x^)) / std,  h = g w;  RMSNorm has no mean(h)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, how: tuple) -> Tensor:
        policy, run, made, centred, eps, D = how
        y = run(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        rows = x.reshape(-1, D)
        ctx.centred, ctx.D, ctx.dtype, ctx.shape = centred, D, x.dtype, x.shape
        mean, rstd = (torch.zeros(len(rows), 1, dtype=wide, device=x.device) for _ in range(2))

        def part(a: int, b: int) -> Tensor:
            at = slice(a // D, b // D)
            v = rows[at].to(wide)
            if centred:
                mean[at] = v.mean(1, keepdim=True)
                v = v - mean[at]
            rstd[at] = v.square().mean(1, keepdim=True).add_(eps).rsqrt_()
            return (v * rstd[at]).view(-1)

        codes = policy.encode(part, x.numel(), policy.norm, x, unit=D)
        made.append(codes)
        ctx.kind, ctx.meta = type(codes), (codes.n, codes.bits, codes.group, codes.dtype)
        ctx.save_for_backward(*codes.tensors, rstd, w)
        ctx.affine = (None if w is None else (w.shape, w.dtype),
                      None if b is None else (b.shape, b.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        codes, low, step, rstd, w = ctx.saved_tensors
        held, D = ctx.kind((codes, low, step), *ctx.meta), ctx.D
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        grads, scale = g.reshape(-1, D), None if w is None else w.reshape(-1).to(rstd.dtype)
        dx = torch.empty(grads.shape, dtype=ctx.dtype, device=g.device) if need_x else None
        dw, db = (torch.zeros(D, dtype=rstd.dtype, device=g.device) if n else None
                  for n in (need_w, need_b))
        for a, b in held.runs(D):
            at = slice(a // D, b // D)
            h, v = grads[at].to(rstd.dtype), held.part(a, b).view(-1, D)
            if db is not None:
                db += h.sum(0)
            if dw is not None:
                dw += (h * v).sum(0)
            if dx is None:
                continue
            h = h if scale is None else h * scale
            d = h - v * (h * v).mean(1, keepdim=True)
            if ctx.centred:
                d -= h.mean(1, keepdim=True)
            dx[at] = d * rstd[at]
        of_w, of_b = ctx.affine
        return (None if dx is None else dx.view(ctx.shape),
                None if dw is None else dw.view(of_w[0]).to(of_w[1]),
                None if db is None else db.view(of_b[0]).to(of_b[1]), None)


def _affine(codes: Codes, w: Tensor | None, b: Tensor | None, dtype: torch.dtype,
            shape: torch.Size) -> Tensor:
    """x^ w + b from the codes of x^."""
    D = shape[-1] if w is None else w.numel()
    out = torch.empty(codes.n // D, D, dtype=dtype, device=codes.tensors[0].device)
    for i, j in codes.runs(D):
        v = codes.part(i, j).view(-1, D)
        if w is not None:
            v.mul_(w.detach().reshape(-1))
        if b is not None:
            v.add_(b.detach().reshape(-1))
        out[i // D:j // D] = v
    return out.view(shape)
