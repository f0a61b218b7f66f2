"""Relatives of the plain zeroth-order step: other probes, other moves, one part after another.

    G = sum over queries of g z          the estimate, one slice of a tensor at a time
    theta <- theta - lr rule(G)          any element-wise rule; its moments are all that is kept

The noise has a shape: ``z / d`` is probed and ``d z`` (or z) moved along where groups of tensors
have a size d of their own, and entries under a mask, drawn again as the noise is, stay as they are.
A log says all of a run as it does for the plain step: masks follow from seed and update, sizes
stand in its header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..choose.quantile import SAMPLE, quantile
from .noise import STREAMS, fold
from .numerics import NUMERICS
from .plan import Plan
from .precise import host_float
from .rules import Rule, accumulator
from .scratch import Evaluate, Scratch, strip, strips
from .subspace import in_memory_order
from .zeroth import ZerothOrder, ZerothOrderOptimizer

#: of what is probed together: all of it, a repeated block, or a module with tensors of its own
Unit = Literal["whole", "block", "module"]
#: of a group's own size: 1, the root mean square of its weights, or the slope a probe of it finds
Size = Literal["none", "weights", "probe"]
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def unit_of(name: str, unit: Unit) -> str:
    """The unit that a tensor of this name belongs to: of blocks, the path up to its first number;
    what stands outside is taken module by module."""
    found = _BLOCK.match(f".{name}") if unit == "block" else None
    return found.group(1) if found else name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Zoo(ZerothOrder):
    """The innermost answer of the relatives.

    rule: what is made of the estimate; None: plain descent. scalar_sign: g is replaced by its sign.
    one_sided: against the loss at theta itself. conservative: of theta and theta -+ lr g z the one
    with the least loss is kept. unit: see :data:`Unit`. sparsity: share of entries that stay, drawn
    anew every `resample` updates; mask: the same share of each tensor ("layer"), or of each the
    share of its entries that lie below the quantile `sparsity` of all |theta| ("global"), as the
    weights were at the first update. size: see :data:`Size`; unbiased: d z is moved along, not z.
    """

    rule: Rule | None = None
    scalar_sign: bool = False
    one_sided: bool = False
    conservative: bool = False
    unit: Unit = "whole"
    sparsity: float = 0.0
    resample: int = 1
    mask: Literal["layer", "global"] = "layer"
    size: Size = "none"
    unbiased: bool = True
    name: str = "zo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1 or self.resample < 1:
            raise RecipeError(f"{self.name}: sparsity is a share below 1 and resample at least 1, "
                              f"got {self.sparsity:g} and {self.resample}")
        if self.conservative and (self.rule is not None or self.queries > 1 or self.weight_decay
                                  or self.unit != "whole" or self.mode != "scratch"
                                  or self.size != "none" or self.scalar_sign):
            raise RecipeError(f"{self.name}: a conservative step compares three points on one "
                              "line; it goes with one query, plain descent of the whole, mode "
                              "'scratch' and no decay")
        if self.scalar_sign and self.rule is not None:
            raise RecipeError(f"{self.name}: the sign of g alone is plain descent; it goes with no "
                              f"rule ({self.rule.name})")

    @property
    def width(self) -> int:  # type: ignore[override]
        return 1 if self.one_sided else 2

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> ZooOptimizer:
        return ZooOptimizer(groups, self, plan, seed)


@dataclass
class Shaped:
    """(seed, name) -> z of that tensor, times its factor, zero under the mask of this turn."""

    base: Any
    spec: Zoo
    seed: int
    factors: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)       # of zeros, where they differ
    turn: int = 0

    def __call__(self, seed: int, name: str) -> Any:
        stream = self.base(seed, name)
        factor = self.factors.get(name, 1.0)
        share = self.shares.get(name, self.spec.sparsity)
        if not share and factor == 1.0 or name.endswith("/round"):
            return stream
        return _Stream(stream, factor, share, self.base(self.seed, f"{name}/mask"), self.turn)


@dataclass(frozen=True)
class _Stream:
    z: Any
    factor: float
    sparsity: float
    mask: Any
    turn: int

    def normal(self, n: int, offset: int = 0, *, device: torch.device | None = None) -> Tensor:
        z = self.z.normal(n, offset, device=device)
        if self.factor != 1.0:
            z.mul_(self.factor)
        if self.sparsity:
            u = self.mask.uniform(n, offset, turn=self.turn, device=device)
            z.masked_fill_(u < self.sparsity, 0.0)
        return z


class ZooOptimizer(ZerothOrderOptimizer):
    """See the module. State of a parameter: what its rule keeps, and ``step``."""

    spec: Zoo
    #: hyperparameters that stand in a log's header, so that no other optimizer repeats it
    TOLD: ClassVar[tuple[str, ...]] = ("scalar_sign", "unit", "sparsity", "resample", "mask",
                                       "size", "unbiased")

    def __init__(self, groups: list[dict[str, Any]], spec: Zoo, plan: Plan, seed: int):
        super().__init__(groups, spec, plan, seed)
        base = STREAMS[spec.noise]
        self.noise, self.moves = Shaped(base, spec, seed), Shaped(base, spec, seed)
        self._units: list[frozenset[str] | None] | None = None
        self._here: float | None = None              # the loss at theta, of this unit
        rule = None if spec.rule is None else [spec.rule.name, _plain(spec.rule.hyper())]
        self.log.header.update({k: getattr(spec, k) for k in self.TOLD}, rule=rule)

    def units(self) -> Sequence[frozenset[str] | None]:
        if self.spec.unit == "whole":
            return (None,)
        if self._units is None:
            self._units = list(self._grouped(self.spec.unit).values())
        return self._units

    def _grouped(self, unit: Unit) -> dict[str, frozenset[str]]:
        found: dict[str, list[str]] = {}
        for name, _ in self._all():
            found.setdefault(unit_of(name, unit), []).append(name)
        return {k: frozenset(v) for k, v in found.items()}

    def _seed(self, update: int, query: int, unit: int) -> int:
        if self.spec.unit == "whole":
            return super()._seed(update, query, unit)
        return fold("query", self.seed, update, query, unit) & 0x7FFFFFFF

    # -- sizes and masks ---------------------------------------------------------------------
    def _begin(self, update: int) -> Generator[Evaluate, float, None]:
        self._turn(update)
        self._here = None                            # of an update that broke off
        if self.spec.mask == "global" and "shares" not in self.log.header:
            self.log.header["shares"] = self._shares()
            self._sized()
        if self.spec.size != "none" and "factors" not in self.log.header:
            sizes: dict[str, float] = {}
            for k, names in enumerate(self._grouped("block").values()):
                sizes |= dict.fromkeys(sorted(names), (yield from self._size(names, k)))
            self.log.header["factors"] = sizes
            self._sized()

    def _turn(self, update: int) -> None:
        self.noise.turn = self.moves.turn = update // self.spec.resample

    @torch.no_grad()
    def _shares(self) -> dict[str, float]:
        """Of each tensor the share of entries below the quantile of all of them."""
        every = [(n, p.detach()) for n, p in self._all()]
        n, like = sum(p.numel() for _, p in every), every[0][1]

        def stream() -> Iterator[Tensor]:
            for _, p in every:
                yield from (part.abs().float() for part in p.reshape(-1).split(strip(p.device)))

        def sample() -> Tensor:
            step = max(1, n // SAMPLE)
            return torch.cat([p.reshape(-1)[::step].abs().float().to(like.device)
                              for _, p in every])

        border = host_float(quantile(stream, n, self.spec.sparsity, sample, like.float()))
        return {name: sum(host_float((part.abs().float() < border).sum().double())
                          for part in p.reshape(-1).split(strip(p.device))) / max(1, p.numel())
                for name, p in every}

    def _size(self, names: frozenset[str], number: int) -> Generator[Evaluate, float, float]:
        self._only = names
        here = self.named()
        if self.spec.size == "probe" and here:
            eps = self.param_groups[0]["eps"]
            up, down = self._of_all(*(yield from self._pair(
                fold("size", self.seed, number) & 0x7FFFFFFF, eps)))
            size = abs(up - down) / (self.spec.width * eps)
        else:
            square = sum(host_float(p.detach().double().square().sum()) for _, p in here)
            size = (square / max(1, sum(p.numel() for _, p in here))) ** 0.5
        return size if 0 < size < float("inf") else 1.0

    def _sized(self) -> None:
        known: Mapping[str, float] = self.log.header.get("factors") or {}  # type: ignore
        self.noise.factors = {n: 1 / d for n, d in known.items()}
        self.moves.factors = dict(known) if self.spec.unbiased else {}
        self.noise.shares = self.moves.shares = dict(self.log.header.get("shares") or {})  # type: ignore

    def load_extra_state(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        super().load_extra_state(tensors, header)
        self._sized()

    def replay(self, log: Any) -> None:
        self._accept(log)
        for key in ("factors", "shares"):
            if key in log.header:
                self.log.header[key] = log.header[key]
        for shaped in (self.noise, self.moves):      # masks are those of the seed that was
            if isinstance(shaped, Shaped):
                shaped.seed = int(log.header.get("seed", self.seed))
        self._sized()
        super().replay(log)

    # -- probes and moves --------------------------------------------------------------------
    def _pair(self, seed: int, eps: float) -> Generator[Evaluate, float, tuple[float, float]]:
        if not self.spec.one_sided:
            return (yield from super()._pair(seed, eps))
        if self._here is None:
            self._here = (yield self._at(nullcontext())) + self._beside(seed, 0.0)
        return (yield from self._point(seed, eps, self.noise)), self._here

    def _point(self, seed: int, scale: float, noise: Any) -> Generator[Evaluate, float, float]:
        """The loss at theta + scale z, whose stored weights stand as they are."""
        if self.spec.mode == "scratch":
            where = Scratch(self.named(), seed, scale, self._callers, noise)
            return (yield self._at(where)) + self._beside(seed, scale)
        try:
            self._shift(seed, scale)
            return (yield self._at(nullcontext())) + self._beside(seed, 0.0)
        finally:
            self._shift(seed, -scale)

    def _decided(self, seeds: list[int], found: list[float], lrs: list[float]
                 ) -> Generator[Evaluate, float, list[float]]:
        before, self._here = self._here, None
        if self.spec.scalar_sign:
            return [(g > 0) - (g < 0) + 0.0 for g in found]
        if not self.spec.conservative:
            return found
        if len(set(lrs)) > 1:
            raise RecipeError(f"{self.spec.name}: a conservative step has one learning rate, and "
                              f"here are {len(set(lrs))}")
        best, kept = before, 0.0
        if best is None:
            best = (yield self._at(nullcontext())) + self._beside(seeds[0], 0.0)
        best, = self._of_all(best)
        for g in (found[0], -found[0]) if found[0] else ():
            value, = self._of_all((yield from self._point(seeds[0], -lrs[0] * g, self.moves)))
            if value < best:
                best, kept = value, g
        return [kept]

    def _take(self, seeds: list[int], found: list[float], lrs: Sequence[float], index: int,
              rest: frozenset[str] | None = None) -> None:
        self._turn(index // (self.spec.queries * len(self.units())))
        if self.spec.rule is None:
            return super()._take(seeds, found, lrs, index, rest)
        rest = self.resting() if rest is None else rest
        only = self.units()[index // self.spec.queries % len(self.units())]
        for group, lr in zip(self.param_groups, lrs, strict=True):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if name not in rest and (only is None or name in only):
                    self._direct(name, p, seeds, found, lr, group["weight_decay"], index)
        return None

    @torch.no_grad()
    def _direct(self, name: str, p: nn.Parameter, seeds: list[int], found: list[float], lr: float,
                decay: float, index: int) -> None:
        """One tensor along what the rule makes of the estimate, slice by slice."""
        def estimate(lo: int, hi: int, dtype: torch.dtype) -> Tensor:
            G = torch.zeros(hi - lo, dtype=dtype, device=p.device)
            for seed, g in zip(seeds, found, strict=True):
                G.add_(self.moves(seed, name).normal(hi - lo, lo, device=p.device).to(dtype),
                       alpha=g)
            return G

        self._along(name, p, estimate, self.spec.rule, lr, decay, seeds[0], index)

    def _along(self, name: str, p: nn.Parameter, G: Callable[[int, int, torch.dtype], Tensor],
               rule: Rule, lr: float, decay: float, seed: int, index: int) -> None:
        """One tensor along what `rule` makes of ``G(lo, hi, dtype)``, entries of an estimate."""
        numerics, state = NUMERICS[self._rounding], self.state[p]
        wide = accumulator(p.dtype)
        w = in_memory_order(p.detach())[0].view(-1)
        numerics.prepare(w, state)
        for s in rule.states:
            if s not in state:
                state[s] = torch.zeros_like(w, dtype=wide).view(p.shape)
        state["step"] = t = state.get("step", 0) + 1
        low, hyper = self.noise.base(seed, f"{name}/round"), rule.hyper()
        for lo, hi in strips(p.numel(), p.device):
            x = numerics.read(w, state, lo, hi)
            if decay and p.dim() > 1:
                x.mul_(1 - lr * decay)
            kept = {s: state[s].view(-1)[lo:hi] for s in rule.states}
            x.add_(rule.direction(G(lo, hi, wide), kept, t, hyper), alpha=-lr)
            numerics.write(w, state, lo, hi, x, low, index)


def _plain(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Of a rule, what it reads: decay is the step's."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in hyper.items()
            if k != "weight_decay"}
