"""Both evaluations of a probe block by block: each block's weights come to the device once.

    x+_0 = x-_0,     x+_(i+1) = block_i(x+_i; theta + eps z)
                     x-_(i+1) = block_i(x-_i; theta - eps z)

The evaluation at theta + eps z runs the model; behind each block the same block runs once more, at
theta - eps z, on the state that the block before it gave there. The evaluation at theta - eps z
then runs what stands before and behind the blocks alone: the last one answers with the state that
is there already. Both losses have the bits that two evaluations one after the other have. Where
something that trains stands before the blocks, x-_0 is another state than x+_0: an evaluation in
which no block does anything finds it first.

Block i + 1 comes while block i runs, and block i goes when both its runs are over, so that the
device holds the weights of two blocks (:class:`~burnish.blocks.weight.hosted.Hosted`). What trains
of them (:mod:`~burnish.blocks.weight.waiting`) is moved by update t - 1 when it is read next, there
in update t or anywhere, and is written back when its block goes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import BurnishError, ConfigError, RecipeError
from ...core.reading import plain
from ..weight.hosted import Away, hosted
from ..weight.waiting import Waiting, waiting
from .numerics import NUMERICS
from .precise import Evaluation
from .scratch import Scratch
from .step import Plan
from .zeroth import ZerothOrder, ZerothOrderOptimizer

#: what a block gives beside its state: nothing, or so many of a kind of sequence
Form = tuple[Any, int] | None


@dataclass(frozen=True, kw_only=True)
class Blockwise(ZerothOrder):
    """:class:`~burnish.blocks.update.zeroth.ZerothOrder` whose probes go block by block."""

    honours: ClassVar[frozenset[str]] = frozenset({"schedule", "rounding", "groups"})
    why: ClassVar[Mapping[str, str]] = {
        **ZerothOrder.why,
        "objective": "a block runs at both points of a probe in one evaluation, which would mix "
                     "what objectives collect at them"}

    name: str = "zo2"
    reads_model: ClassVar[bool] = True

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> BlockwiseOptimizer:
        return BlockwiseOptimizer(groups, self, plan, seed)


class BlockwiseOptimizer(ZerothOrderOptimizer):
    """Raises ConfigError where the blocks are not all that lies between the first one's input and
    the last one's result; RecipeError for a rounding that keeps a tensor beside a weight that waits
    on the host. At its first update both evaluations are made one after the other as well, and the
    losses compared."""

    _compared = False
    _form: list[Form] = []

    def __init__(self, groups: list[dict[str, Any]], spec: ZerothOrder, plan: Plan, seed: int):
        super().__init__(groups, spec, plan, seed)
        if NUMERICS[self._rounding].kept and any(isinstance(p, Waiting) for _, p in self._all()):
            raise RecipeError(
                f"{self._rounding} keeps a tensor beside each weight, and {spec.name} holds these "
                "on the host; take stochastic_rounding, or leave it out")

    def _move(self, p: nn.Parameter, move: Callable[[Tensor], None]) -> None:
        if isinstance(p, Waiting):
            p.burnish_waits.later(move)
        else:
            super()._move(p, move)

    def _pair(self, seed: int, eps: float) -> Generator[Evaluation, float, tuple[float, float]]:
        if self.model is None or self._callers is None:
            raise ConfigError(f"{self.spec.name} runs the blocks of a model: use tuned.step(batch)")
        blocks = Blocks(self.model, self.blocks, self.spec.name, not self._compared)
        blocks.check(self._callers.called)
        return (yield from self._lockstep(blocks, seed, eps))

    def _lockstep(self, blocks: Blocks, seed: int, eps: float
                  ) -> Generator[Evaluation, float, tuple[float, float]]:
        plain = None
        if not self._compared:
            with blocks.watched() as self._form:
                plain = yield from super()._pair(seed, eps)
        scratch = [Scratch(self.named(), seed, scale, self._callers, self.noise, self._there)
                   for scale in (eps, -eps)]
        if blocks.follows(self._callers.called, self._callers.first):
            yield self._at(blocks.ahead(scratch[1], self._form))
        up = yield self._at(blocks.both(scratch[0]))
        up += self._beside(seed, eps)
        down = yield self._at(blocks.behind(scratch[1]))
        down += self._beside(seed, -eps)
        if plain is not None:
            self._compared = True
            if not self.simulated and any(abs(a - b) > 1e-5 * (1 + abs(a))
                                          for a, b in zip(plain, (up, down), strict=True)):
                raise ConfigError(
                    f"{self.spec.name}: the losses at both points of the first probe are "
                    f"{plain[0]:.9g} and {plain[1]:.9g}, block by block {up:.9g} and {down:.9g}: "
                    "this loss reads more of the blocks than what the last one gives (states or "
                    "attention of others, a balance of experts); take mezo")
        return up, down


class Blocks:
    """The blocks of a model, which follow each other, for one probe. whole: both points have been
    evaluated in the plain way before."""

    def __init__(self, model: nn.Module, paths: tuple[str, ...], name: str, whole: bool = False):
        self.model, self.paths, self.name, self.whole = model, paths, name, whole
        self.blocks = [model.get_submodule(p) for p in paths]
        self.held: list[list[Away]] = [[*hosted([b]), *waiting([b])] for b in self.blocks]
        self.at, self.inside = 0, False
        self.plus: Tensor | None = None              # what the last block gave
        self.minus: Any = None                       # the same at the other point, whole at the end
        self.start: Tensor | None = None             # what the first is given there, if another

    def check(self, called: Mapping[str, int]) -> None:
        """ConfigError where there are no blocks."""
        if not self.paths or any(p not in called for p in self.paths):
            raise ConfigError(f"{self.name}: this model calls no row of blocks; take mezo")

    def follows(self, called: Mapping[str, int], first: Mapping[str, int]) -> bool:
        """Does something that trains run before the first block?"""
        begin = min(called[p] for p in self.paths)
        return any(at < begin for at in first.values())

    # -- what stands before the blocks, at theta - eps z ---------------------------------------
    @contextmanager
    def watched(self) -> Iterator[list[Form]]:
        """Evaluations as any other; what kind of answer the blocks give."""
        forms: list[Form] = []
        hook = self.blocks[0].register_forward_hook(
            lambda _m, _a, out: forms.append(None if isinstance(out, Tensor)
                                             else (type(out), len(out))))
        try:
            yield forms
        finally:
            hook.remove()

    @contextmanager
    def ahead(self, scratch: Scratch, forms: list[Form]) -> Iterator[None]:
        """An evaluation in which each block gives what it is given; its loss means nothing."""
        for i, block in enumerate(self.blocks):
            block.__dict__["forward"] = partial(self._passed, i, forms[0])
        try:
            with scratch:
                yield
            if self.start is None:
                raise self._apart(0)
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]

    def _passed(self, i: int, form: Form, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            raise self._apart(i)
        self.start = x                               # (the same for every block)
        return x if form is None else form[0]([x] + [None] * (form[1] - 1))

    # -- at theta + eps z --------------------------------------------------------------------
    @contextmanager
    def both(self, scratch: Scratch) -> Iterator[None]:
        """An evaluation at the first point, in which each block runs at the second as well."""
        hooks: list[Any] = []
        try:
            with scratch:                            # (its hooks come first behind a block)
                for i, block in enumerate(self.blocks):
                    hooks += [block.register_forward_pre_hook(partial(self._arrive, i),
                                                              prepend=True),
                              block.register_forward_hook(partial(self._again, i, scratch),
                                                          with_kwargs=True)]
                with self._only_here():
                    yield
            if self.at != len(self.blocks):
                raise self._apart(self.at)
        finally:
            for hook in hooks:
                hook.remove()
            for p in (p for held in self.held for p in held):
                p.leave()

    def _arrive(self, i: int, *_: Any) -> None:
        if not self.inside:
            for p in (p for held in self.held[i:i + 2] for p in held):
                p.bring()

    def _again(self, i: int, scratch: Scratch, block: nn.Module, args: tuple, kwargs: dict,
               out: Any) -> None:
        if self.inside:
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if i != self.at or not isinstance(x, Tensor) or i and x is not self.plus:
            raise self._apart(i)
        mine = _state(self.minus) if i else x if self.start is None else self.start
        given = ((mine, *args[1:]), kwargs) if args else \
            ((), {**kwargs, next(iter(kwargs)): mine})
        self.inside, scratch.scale = True, -scratch.scale
        try:
            self.minus = block(*given[0], **given[1])
        finally:
            self.inside, scratch.scale = False, -scratch.scale
        self.plus, self.at = _state(out), i + 1
        for p in self.held[i]:
            p.leave()

    @contextmanager
    def _only_here(self) -> Iterator[None]:
        """What ran in the plain way and fails now fails because blocks run twice, or not at all."""
        try:
            yield
        except (BurnishError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if not self.whole:
                raise
            raise ConfigError(
                f"{self.name}: something of this recipe counts on each block running once in an "
                f"evaluation, and failed block by block ({plain(e, 80)}); take mezo") from e

    def _apart(self, i: int) -> ConfigError:
        at = self.paths[min(i, len(self.paths) - 1)]
        return ConfigError(f"{self.name}: {at} is not given what the block before it gives, and "
                           "nothing else: the blocks do not follow each other; take mezo")

    # -- at theta - eps z --------------------------------------------------------------------
    @contextmanager
    def behind(self, scratch: Scratch) -> Iterator[None]:
        """An evaluation at the second point that runs no block."""
        for i, block in enumerate(self.blocks):
            block.__dict__["forward"] = partial(self._skipped, i)
        try:
            with scratch, self._only_here():
                yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]
            self.plus = self.minus = None

    def _skipped(self, i: int, *args: Any, **kwargs: Any) -> Any:
        if i == len(self.blocks) - 1:
            return self.minus
        last = self.minus                            # nobody may read what the others gave
        none = torch.empty((), device="meta").expand(_state(last).shape)
        return none if isinstance(last, Tensor) else type(last)([none, *last[1:]])


def _state(out: Any) -> Any:
    return out if isinstance(out, Tensor) else out[0]
