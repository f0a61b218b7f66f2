"""Outputs and gradients against the untouched model, in float64 and in bf16."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...blocks.weight.dropped import Dropping, stands_beside
from ...core.errors import BurnishError
from ...core.recipe import parse
from ...formats.placed import put
from ..choose import IN_BLOCKS, OTHERWISE, PLACES, ROWS, applies
from .common import (
    DENSE,
    Skip,
    axes_of,
    cast,
    close,
    dense_weights,
    fresh,
    gradients_close,
    join,
    logits,
    make,
    method_of,
    part,
    recipe,
    refusal,
    stir,
    where,
    widen,
)

#: of the loss, and of all gradients together, in bf16 against fp32 (relative, L2)
BF16_LOSS, BF16_GRADIENT = 0.02, 0.15
ESTIMATES = Skip("its gradients are estimates by design: its own test file shows of what")


def _estimates(name: str) -> Skip | None:
    return None if method_of(name).exact else ESTIMATES


def _no_weights(name: str) -> Skip | None:
    return _estimates(name) or (None if axes_of(recipe(name)) <= DENSE else Skip(
        "changes hidden states, not weights: its own test file holds the reference"))


def _no_dropping_weights(name: str) -> Skip | None:
    return _no_weights(name) or (Skip("its body is a fixed function in evaluation mode: it does "
                                      "not drop") if method_of(name).fixed else None)


def _drops(name: str) -> list[str]:
    """The settings that are a dropout."""
    return [f.name for f in fields(method_of(name))
            if "drop" in f.name and isinstance(f.default, float)]


def _no_dropout(name: str) -> Skip | None:
    return None if _drops(name) else Skip("has no dropout")


@where(_no_weights)
def equals_the_untouched_model(name: str, model: str) -> Skip | None:
    """Loss and all gradients are those of the untouched model on dense weights."""
    return _equals(name, model, 0.0)


@where(_no_dropping_weights)
def equals_the_untouched_model_under_dropout(name: str, model: str) -> Skip | None:
    """The same where the model itself drops: the same masks, drawn once and drawn again alike."""
    return _equals(name, model, 0.2)


def _equals(name: str, model: str, dropout: float) -> Skip | None:
    tuned, batch, base = make(name, model, dropout=dropout)
    widen(tuned)
    stir(tuned)
    names, params = zip(*tuned.named_parameters(), strict=True)
    torch.manual_seed(11)
    loss = tuned.loss(batch)
    got = torch.autograd.grad(loss, params, allow_unused=True)
    with dense_weights(tuned, base):
        torch.manual_seed(11)
        reference = base(**batch.bare).loss
        want = torch.autograd.grad(reference, params, allow_unused=True)
    unread = [n for n, g in zip(names, want, strict=True) if g is None]
    assert all(g is None or not g.any() for n, g in zip(names, got, strict=True) if n in unread)
    kept = [i for i, g in enumerate(want) if g is not None]
    rounds = 8 * torch.finfo(reference.dtype).eps       # some models take their loss in fp32
    close(loss.detach(), reference.detach(), "the loss", max(1e-9, rounds))
    gradients_close([names[i] for i in kept], [got[i] for i in kept], [want[i] for i in kept],
                    max(1e-8, rounds))
    return None


@where(_estimates)
def bf16_is_near_fp32(name: str, model: str) -> Skip | None:
    """Loss and gradient of a bf16 base, within stated bounds of the fp32 one's. What was read from
    data in one is given to the other: a bf16 base shows other data."""
    ends: list[tuple[float, dict[str, Tensor]]] = []
    settled: dict[str, Any] = {}
    start: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        net, batch = fresh(model, torch.bfloat16, recipe(name))        # the same numbers in both
        tuned = join(net.to(dtype), recipe(name), model, settled=settled)
        if settled:
            put(tuned, start, "fp32")
        settled = tuned.adapters["default"].settled
        start = {n: t.detach().clone() for n, t in tuned.tensors().items()}
        stir(tuned)
        loss = tuned.loss(cast(batch, dtype))
        loss.backward()
        ends.append((float(loss.detach()), {n: p.grad.double() for n, p in
                                            tuned.named_parameters() if p.grad is not None}))
    (want, right), (got, ours) = ends
    assert abs(got - want) <= BF16_LOSS * abs(want), f"loss {got:.5g} in bf16, {want:.5g} in fp32"
    assert set(ours) == set(right)
    size = sum(float(g.square().sum()) for g in right.values()) ** 0.5
    off = sum(float((ours[n] - g).square().sum()) for n, g in right.items()) ** 0.5
    assert off <= BF16_GRADIENT * size, f"gradients are off by {off / size:.1%} of their size"
    return None


@where(_estimates)
def two_forwards_before_one_backward(name: str, model: str) -> Skip | None:
    """The gradient of a sum of two losses is the sum of their gradients."""
    return _two(name, model, recipe(name))


@where(_estimates)
def two_forwards_under_checkpoint(name: str, model: str) -> Skip | None:
    """The same where blocks run again in backward."""
    return _checkpointed(name, model, lambda text: _two(name, model, text))


def _checkpointed(name: str, model: str, check: Any) -> Skip | None:
    text = f"{recipe(name)} + checkpoint"
    if not make(name, model)[0].anatomy.blocks:
        return Skip("the model has no blocks to run again")
    net, _ = fresh(model)
    try:
        join(net, text, model)
    except BurnishError as e:
        assert "cannot be joined" in str(e) or "mode" in str(e), e
        return Skip(f"refused beside checkpoint: {e}")
    return check(text)


def _two(name: str, model: str, text: str) -> Skip | None:
    tuned, first, _ = make(name, model, text=text)
    whole = math.lcm(*(p.together() for p in parse(text)))
    second = fresh(model, torch.float64, text, seed=1, batch=3 if whole == 1 else 2 * whole)[1]
    widen(tuned)
    stir(tuned)
    alone = []
    for batch in (first, second):
        alone.append(_gradients(tuned, lambda batch=batch: tuned.loss(batch)))
    both = _gradients(tuned, lambda: tuned.loss(first) + tuned.loss(second))
    gradients_close(both, both.values(), [alone[0][n] + alone[1][n] for n in both])
    return None


def _gradients(tuned: Any, loss: Any) -> dict[str, Tensor]:
    for p in tuned.parameters():
        p.grad = None
    torch.manual_seed(5)
    loss().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in tuned.named_parameters()}


@where(_estimates)
def checkpointing_changes_nothing(name: str, model: str) -> Skip | None:
    """The same gradients with `+ checkpoint`, the model's own dropout included."""
    def check(text: str) -> None:
        grads = []
        for one in (recipe(name), text):
            tuned, batch, _ = make(name, model, text=one, dropout=0.1)
            widen(tuned)
            stir(tuned)
            grads.append(_gradients(tuned, lambda t=tuned, b=batch: t.loss(b)))
        gradients_close(grads[0], [grads[1][n] for n in grads[0]], grads[0].values())

    return _checkpointed(name, model, check)


# -- dropout of the method itself -----------------------------------------------------------------
@where(_no_dropout)
def its_dropout_acts(name: str, model: str) -> Skip | None:
    """In training it changes outputs from draw to draw, and once; in evaluation it is not
    there."""
    def check(tuned: Any, batch: Any, plain: Any, word: str) -> None:
        for one in (tuned, plain):
            one.model.eval()
        with torch.no_grad():
            close(logits(tuned.model(**batch)), logits(plain.model(**batch)),
                  f"{word} in evaluation", 1e-9)
            tuned.model.train()
            outs = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                outs.append(logits(tuned.model(**batch)))
        assert torch.equal(outs[0], outs[1]), f"{word}: one seed gives two answers"
        assert not torch.allclose(outs[0], outs[2]), f"{word}=0.5 changes nothing"
        if not method_of(name).context:              # of a batch, which none is given here
            _drops_once(tuned, word)

    return _dropped(name, model, check)


@torch.no_grad()
def _drops_once(tuned: Any, word: str) -> None:
    """What drops around a term is all that drops: alone it answers as if there were none."""
    for place, term in tuned.terms(Dropping):
        if not stands_beside(term):
            continue
        D, rate, said = term.dense(), getattr(term, word), []
        x = torch.randn(64, D.shape[1], dtype=D.dtype)
        for p in (rate, 0.0):
            setattr(term, word, p)
            torch.manual_seed(4)
            y = torch.zeros(64, D.shape[0], dtype=D.dtype)
            if term.tokenwise:
                term.forward_(x, y, 1.0)
            else:
                y += term.product(x)
            said.append(y)
        setattr(term, word, rate)
        assert torch.equal(*said), f"{word} drops twice at {place}: around the term, and within it"


@where(_no_dropout)
def its_dropout_is_differentiated(name: str, model: str) -> Skip | None:
    """The gradient is that of what was computed: backward sees the masks of forward."""
    return _dropped(name, model, lambda tuned, batch, *_: _is_its_own_gradient(tuned, batch))


def _dropped(name: str, model: str, check: Any) -> Skip | None:
    for word in _drops(name):
        try:
            tuned, batch, _ = make(name, model, text=recipe(name, **{word: 0.5}))
            widen(tuned)
            tuned.loss(batch)
        except BurnishError as e:
            assert "drop" in str(e) or refusal(name, model), e
            return Skip(f"refuses dropout here: {e}")
        plain, _, _ = make(name, model)
        widen(plain)
        plain.loss(batch)                               # running statistics of both have moved
        for one in (tuned, plain):
            widen(one)
            stir(one)
        for mine, other in zip(tuned.model.buffers(), plain.model.buffers(), strict=True):
            mine.copy_(other)                           # they follow what was dropped
        check(tuned, batch, plain, word)
    return None


def _is_its_own_gradient(tuned: Any, batch: Any, h: float = 1e-6) -> None:
    """<gradient, d> is the slope of the loss along d, under one seed; terms of the recipe that
    follow the loss backward are part of both. The slope is the median over five steps: a router
    that sends a token elsewhere makes the loss jump within one of them."""
    def value() -> Tensor:
        with _NothingNarrower():
            return logits(tuned.model(**batch)).square().mean()   # losses are often in fp32

    grads = _gradients(tuned, value)
    g = torch.Generator().manual_seed(3)
    along = {n: torch.randn(v.shape, generator=g, dtype=v.dtype) for n, v in grads.items()}
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    riding, values = tuned.state.riding, []
    for k in range(6):
        with torch.no_grad():
            for n, p in tuned.named_parameters():
                p.copy_(start[n] + (k - 2.5) * h * along[n])
            torch.manual_seed(5)
            riding.collected = []
            values.append(float(value()) + sum(map(float, riding.collected)))
    riding.collected = None
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            p.copy_(start[n])
    got = sum(float((grads[n] * d).sum()) for n, d in along.items())
    want = median((after - before) / h for before, after in pairwise(values))
    size = sum(float(v.square().sum()) for v in grads.values()) ** 0.5
    assert abs(got - want) <= 2e-3 * (abs(want) + size), \
        f"the gradient along a direction is {got:.6g}, the loss changes by {want:.6g}"


class _NothingNarrower(TorchFunctionMode):
    """Routers and norms compute in single precision by design, whose rounding a difference quotient
    in double would show: inside, what is double stays double."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


# -- once per method ------------------------------------------------------------------------------
def every_kind_of_place(name: str, model: str, turn: int | None = None) -> Skip | None:
    """On each kind of place and on fused rows: dense reference, count, start, merge, dropout. With
    a number, the reference and one of the others at each, another one for another number."""
    from .attaching import declared_count, identity_at_the_start
    from .weights import merges_and_unmerges

    cls = method_of(name)
    if "delta" not in cls.axes():
        return Skip("no delta")
    others = (identity_at_the_start, declared_count, two_forwards_before_one_backward,
              merges_and_unmerges, its_dropout_acts)
    for i, (kind, net, targets) in enumerate((*PLACES, *ROWS)):
        cell = f"{net}/{targets}"
        if kind not in cls.kinds:
            try:
                join(fresh(cell)[0], part(name), cell)
            except BurnishError as e:
                assert "has no form" in str(e), e
                continue
            raise AssertionError(f"takes {kind} places although `kinds` leaves them out")
        cell = cell if applies(name, net) else IN_BLOCKS.get(cell, cell)
        if "does not divide" in (refusal(name, cell) or ""):
            cell = OTHERWISE.get(cell, cell)
        few = others if turn is None else (others[(turn + i) % len(others)],)
        for check in (equals_the_untouched_model, *few):
            try:
                check(name, cell)
            except Exception as e:
                raise AssertionError(f"{check.__name__} on {cell}: {e}") from e
    return None


CHECKS = (equals_the_untouched_model, equals_the_untouched_model_under_dropout,
          bf16_is_near_fp32, two_forwards_before_one_backward, two_forwards_under_checkpoint,
          checkpointing_changes_nothing, its_dropout_acts, its_dropout_is_differentiated)
ONCE = (every_kind_of_place,)

