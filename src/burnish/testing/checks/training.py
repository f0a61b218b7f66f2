"""What steps do: everything declared moves, nothing else does, and a run goes on where it was."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.slot import ATTR
from ...formats.adapter import load
from .common import (
    TRAINS,
    Batch,
    Skip,
    axes_of,
    fresh,
    join,
    logits,
    make,
    method_of,
    partner,
    ready,
    recipe,
    stir,
    where,
)

#: updates of a run in which schedules and budgets act from start to end
STEPS = 6


def every_tensor_has_a_gradient(name: str, model: str) -> Skip | None:
    """Away from the start every trainable tensor gets a finite gradient that is not zero; nothing
    else gets one."""
    tuned, batch, base = make(name, model, torch.float32)
    stir(tuned)
    unread = _unread(base, batch)
    tuned.loss(batch).backward()
    for n, p in tuned.model.named_parameters():
        if n in unread:
            continue                               # the model itself never reads it
        assert (p.grad is not None) == p.requires_grad, \
            f"{n}: {'no gradient' if p.requires_grad else 'a gradient where none belongs'}"
        if p.grad is not None:
            assert p.grad.isfinite().all(), f"{n}: gradient is not finite"
            assert p.grad.any(), f"{n}: gradient is zero everywhere"
    return None


def _unread(base: Any, batch: Batch) -> set[str]:
    """Parameters the untouched model's loss does not depend on."""
    base = copy.deepcopy(base)
    named = [(n, p.requires_grad_(True)) for n, p in base.named_parameters()]
    got = torch.autograd.grad(base(**batch.bare).loss, [p for _, p in named], allow_unused=True)
    return {n for (n, _), g in zip(named, got, strict=True) if g is None or not g.any()}


def exactly_what_trains_moves(name: str, model: str) -> Skip | None:
    """In a run of known length every trainable tensor moves; the base, head included, does not."""
    tuned, batch, base = make(name, model, torch.float32)
    unread = _unread(base, batch)
    ready(tuned, STEPS)
    before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
    trains = {n for n, p in tuned.named_parameters()}
    for _ in range(STEPS):
        assert tuned.step(batch).isfinite()
        trains |= {n for n, p in tuned.named_parameters()}       # a schedule may take turns
    after = dict(tuned.model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(after[n], p)}
    still = sorted(trains - moved - unread)
    assert not still, f"{STEPS} steps moved everything but {still[:4]}"
    assert moved <= trains, f"moved without training: {sorted(moved - trains)[:4]}"
    return None


def _trains_itself(name: str) -> Skip | None:
    beside = partner(name)
    return None if beside and TRAINS & axes_of(beside) else \
        Skip("trains something itself; `it_acts` looks at it")


def _no_schedule(name: str) -> Skip | None:
    return None if "controller" in method_of(name).axes() else Skip("has no schedule")


@where(_trains_itself)
def beside_a_partner_it_acts(name: str, model: str) -> Skip | None:
    """A part that trains nothing itself changes weights, outputs or bytes of what does."""
    without, with_it = partner(name), recipe(name)
    if name == "lean":
        without += " + lean(on=False)"            # it is on without being named
    assert differ(model, without, with_it), f"{with_it} does what {without} does"
    return None


def differ(model: str, first: str, second: str) -> bool:
    """Something a part can change is not the same: a run's losses, weights and outputs in fp32,
    then in bf16, then the bytes of a step."""
    return any(look(model, first) != look(model, second)
               for look in (_fp32, _bf16, _waiting))


@lru_cache(maxsize=64)
def _fp32(model: str, text: str) -> tuple[Any, ...]:
    return _run(model, text, torch.float32)


@lru_cache(maxsize=64)
def _bf16(model: str, text: str) -> tuple[Any, ...]:
    return _run(model, text, torch.bfloat16)


def _run(model: str, text: str, dtype: torch.dtype) -> tuple[Any, ...]:
    net, batch = fresh(model, dtype, text)
    tuned = join(net, text, model, calibration=list(_several(batch)))
    ready(tuned, STEPS)
    torch.manual_seed(3)
    losses = [float(tuned.step(batch)) for _ in range(STEPS)]
    ends = {n: float(p.detach().double().sum()) for n, p in tuned.named_parameters()}
    net.eval()
    with torch.no_grad():
        return losses, ends, float(logits(net(**batch)).double().square().sum())


def _several(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches to read beforehand: more than one, and not the same."""
    for n in range(1, 5):
        yield {k: v if not isinstance(v, Tensor) else v.sin() * n if v.is_floating_point()
               else v.roll(n * (n + 1) // 2, -1) for k, v in batch.items()}


@lru_cache(maxsize=64)
def _waiting(model: str, text: str) -> tuple[int, int]:
    """(bytes alive between forward and backward, bytes at the peak of a step)."""
    from ...memory import Ledger, measure

    net, batch = fresh(model, text=text)
    tuned = join(net, text, model)
    ready(tuned, STEPS)
    with Ledger(net) as ledger:
        for value in batch.values():
            ledger.watch("weights", [value])
        loss = tuned.loss(batch)
        alive = sum(e.bytes for e in ledger.entries if e.death is None)
    del loss
    return alive, measure(tuned, batch).peak_bytes


@where(_no_schedule)
def a_known_length_acts(name: str, model: str) -> Skip | None:
    """A budget or schedule runs differently once `total_steps` is set."""
    ends = []
    for total in (None, STEPS):
        tuned, batch, _ = make(name, model, torch.float32)
        ready(tuned, STEPS)
        if not any(hasattr(m.controller(tuned), "start") for m in tuned.recipe):
            return Skip("its handlers ask for no length")
        tuned.total_steps = total
        ends.append([float(tuned.step(batch)) for _ in range(STEPS)])
        ends[-1].append(float(tuned.loss(batch).detach()))           # the last update counts too
    assert ends[0] != ends[1], "the run is the same with and without total_steps"
    return None


def is_deterministic(name: str, model: str) -> Skip | None:
    """The same seed gives the same start and the same steps."""
    ends = []
    for _ in range(2):
        tuned, batch, _ = make(name, model, torch.float32)
        torch.manual_seed(3)
        ready(tuned, 3)
        losses = [float(tuned.step(batch)) for _ in range(3)]
        ends.append((losses, {n: p.detach().clone() for n, p in tuned.named_parameters()}))
    assert ends[0][0] == ends[1][0]
    for n, p in ends[0][1].items():
        assert torch.equal(p, ends[1][1][n]), n
    return None


def goes_on_after_a_cast(name: str, model: str) -> Skip | None:
    """``model.to(torch.bfloat16)`` between two updates takes along whatever a method keeps, in the
    module or beside it."""
    tuned, batch, _ = make(name, model, torch.float32)
    ready(tuned, 3)
    tuned.step(batch)
    tuned.model.to(torch.bfloat16)
    for k, v in batch.items():
        if isinstance(v, Tensor) and v.is_floating_point():
            batch[k] = v.to(torch.bfloat16)
    for _ in range(2):
        assert tuned.step(batch).isfinite(), "the loss is not finite after a cast"
    return None


def resumes_where_it_stopped(name: str, model: str) -> Skip | None:
    """Stopped after two of four updates, written to a folder and read into a fresh base, a run
    ends in the same weights, bit for bit."""
    from ...fit import state

    ends = []
    for stop in (False, True):
        net, batch = fresh(model, text=recipe(name))
        tuned = join(net, recipe(name), model)
        torch.manual_seed(3)
        ready(tuned, 4)
        for k in range(4):
            if stop and k == 2:
                tuned = _again(tuned, model, state)
            tuned.step(batch)
        ends.append({n: p.detach().clone() for n, p in tuned.model.named_parameters()
                     if p.requires_grad or f".{ATTR}." in f".{n}"})
    assert set(ends[0]) == set(ends[1])
    for n, p in ends[0].items():
        assert torch.equal(p, ends[1][n]), f"{n} differs after resuming"
    return None


def _again(tuned: Any, model: str, state: Any) -> Any:
    """The run read back into a fresh base, as fit does it."""
    named = list(tuned.model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder, whole=True)
        tree = {"optimizer": state.optimizer_state(tuned.current_optimizer, named),
                "timeline": tuned.timeline.state(), "random": state.random_state()}
        state.save_tree(tree, Path(folder), "run")
        torch.manual_seed(99)
        again = load(fresh(model)[0], folder)
        kept = state.load_tree(Path(folder), "run")
    again.model.train()
    ready(again, 4)
    state.load_optimizer_state(again.current_optimizer, again.model.named_parameters(),
                               kept["optimizer"])
    again.timeline.load(kept["timeline"])
    state.set_random_state(kept["random"])
    return again


def loss_falls(name: str, model: str) -> Skip | None:
    """Fifteen steps on one batch make it more likely."""
    tuned, batch, _ = make(name, model, torch.float32)
    ready(tuned, 15)
    first = float(tuned.loss(batch).detach())
    for _ in range(15):
        tuned.step(batch)
    last = float(tuned.loss(batch).detach())
    assert last < first, f"loss went from {first:.4f} to {last:.4f}"
    return None


CHECKS = (every_tensor_has_a_gradient, exactly_what_trains_moves, beside_a_partner_it_acts,
          a_known_length_acts, is_deterministic, goes_on_after_a_cast, resumes_where_it_stopped,
          loss_falls)

