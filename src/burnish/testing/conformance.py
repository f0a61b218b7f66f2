"""The conformance suite: what every method must show, ours and other people's.

    from burnish.testing import conformance

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda c: c.__name__)
    def test_my_method(check):
        check("my_method", "vit")

Every check takes a method's name and the name of a small model (burnish.testing.models.NAMES) and
raises AssertionError with what is wrong. A method that a model has no place for refuses with a
reason; :func:`refusal` gives that reason, and checks are for the pairs where it is None.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..core import registry
from ..core.errors import BurnishError, CheckError
from ..core.method import Method
from ..engine.slot import ATTR, slots
from ..engine.tune import tune
from ..engine.tuned import Tuned
from ..formats.adapter import load
from .models import tiny

#: settings that suit models of width 32, taken when a method has a setting of that name
SMALL: dict[str, Any] = {"rank": 4, "init_rank": 6, "length": 3, "bottleneck": 4, "reduction": 4,
                         "threshold": 1, "every": 1}
#: axes that add or choose something trainable
TRAINS = {"delta", "select", "branch", "prompt", "side", "mixture"}


def recipe(name: str) -> str:
    """A recipe that shows the method on a small model: itself, or beside something that trains."""
    cls = registry.find(name)
    given = {f.name: SMALL[f.name] for f in fields(cls)
             if f.name in SMALL and isinstance(f.default, int) and f.default != SMALL[f.name]}
    given |= getattr(cls, "small", {})
    text = f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given else name
    if TRAINS & set(cls.axes()):
        return text
    return ("full + " if "optimizer" in cls.axes() else "lora(rank=4) + ") + text


@lru_cache(maxsize=512)
def refusal(name: str, model: str) -> str | None:
    """Why the method refuses this model, or None when it applies."""
    net, batch = tiny(model)
    try:
        tune(net, recipe(name), calibration=[batch])
    except CheckError:
        raise
    except BurnishError as e:
        return str(e)
    return None


def make(name: str, model: str, dtype: torch.dtype = torch.float64,
         train: bool = True) -> tuple[Tuned, dict[str, Any], nn.Module]:
    """(tuned, batch, untouched copy of the base), all floating tensors in `dtype`."""
    net, batch = tiny(model)
    if dtype == torch.float64 and hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation("eager")      # the grouped product has no float64 form
    net.to(dtype)
    batch = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
             for k, v in batch.items()}
    base = copy.deepcopy(net)
    tuned = tune(net, recipe(name), calibration=[batch])
    net.train(train)
    base.train(train)
    return tuned, batch, base


def widen(tuned: Tuned, dtype: torch.dtype = torch.float64) -> None:
    """Put everything that was added in `dtype` too, for comparisons without rounding."""
    for _, _, slot in slots(tuned.model):
        slot.to(dtype)


@torch.no_grad()
def stir(tuned: Tuned, seed: int = 1, size: float = 0.05) -> None:
    """Move every trainable tensor away from its start, so that zeros hide nothing."""
    g = torch.Generator().manual_seed(seed)
    for _, p in tuned.named_parameters():
        p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) * size)


def _own_axes(name: str) -> set[str]:
    return set(registry.find(name).axes())


def _logits(out: Any) -> Tensor:
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out.loss


# -- checks -------------------------------------------------------------------------------------

def identity_at_the_start(name: str, model: str) -> None:
    """Step 0 is the pre-trained function where the method says so."""
    if not registry.find(name).identity:
        return
    tuned, batch, base = make(name, model, train=False)
    widen(tuned)
    with torch.no_grad():
        got, want = _logits(tuned.model(**batch)), _logits(base(**batch))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def gradients_reach_exactly_what_trains(name: str, model: str) -> None:
    """Every trainable tensor gets a finite gradient; nothing else gets one."""
    tuned, batch, _ = make(name, model, torch.float32)
    tuned.loss(batch).backward()
    for n, p in tuned.model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, f"{n}: gradient where none belongs"
        if p.grad is not None:
            assert p.grad.isfinite().all(), f"{n}: gradient is not finite"


def declared_count(name: str, model: str) -> None:
    """`count(place)` is what a delta trains there; one that needs to know what was settled there,
    or the tensors its places share, takes them by name."""
    cls = registry.find(name)
    if "delta" not in cls.axes() or not hasattr(cls, "count"):
        return
    tuned, _, _ = make(name, model, torch.float32)
    method = tuned.recipe.named(name)
    settled = tuned.adapters["default"].settled.get(name, {})
    shared = tuned.model._modules[ATTR]._modules.get("default", {})
    for _, _, slot in slots(tuned.model):
        by_place: dict[Any, int] = {}
        for part in slot.parts:
            if part.place is not None and part.key.startswith(name):
                n = sum(p.numel() for p in slot.module_of(part).parameters() if p.requires_grad)
                by_place[part.place] = by_place.get(part.place, 0) + n
        for place, n in by_place.items():
            known = {**settled.get(place.name, {}),
                     **({"shared": shared[f"{name}_shared"]} if f"{name}_shared" in shared else {})}
            taken = inspect.signature(method.count).parameters
            says = method.count(place, **{k: v for k, v in known.items() if k in taken})
            assert n == says, f"{place.name}: trains {n}, says {says}"


@contextmanager
def _dense_weights(tuned: Tuned, base: nn.Module) -> Iterator[None]:
    """Inside, `base` computes with weights formed densely and differentiably from the terms."""
    made: dict[str, Tensor] = {n: p for n, p in tuned.model.named_parameters()
                               if f".{ATTR}." not in f".{n}"}
    for path, module, slot in slots(tuned.model):
        groups, _, _ = slot._planned(module, tuned.state.active)
        for place, op in groups:
            key = f"{path}.{place.param}" if path else place.param
            stored = made.get(key, slot._stored(module, place.param).detach())
            view = place.view(stored)
            whole = op.dense(view)
            if place.rows is not None:
                full = _whole_view(place, stored)
                a, b = place.rows
                whole = torch.cat([full[..., :a, :], whole, full[..., b:, :]], dim=-2)
            if place.kind == "conv":
                whole = whole.reshape(stored.shape)
            elif place.transposed:
                whole = whole.transpose(-1, -2)
            made[key] = whole
    with _reparametrize_module(base, made, tie_weights=True):
        yield


def _whole_view(place: Any, stored: Tensor) -> Tensor:
    from dataclasses import replace

    return replace(place, rows=None).view(stored)


def delta_equals_dense_reference(name: str, model: str) -> None:
    """Outputs and all gradients of a delta against dense weights, in float64."""
    if not _own_axes(name) <= {"delta", "controller", "objective", "activations"} \
            or "delta" not in _own_axes(name):
        return
    tuned, batch, base = make(name, model)
    widen(tuned)
    stir(tuned)
    names, params = zip(*tuned.named_parameters(), strict=True)
    loss = tuned.loss(batch)
    got = torch.autograd.grad(loss, params)
    with _dense_weights(tuned, base):
        reference = base(**batch).loss
        want = torch.autograd.grad(reference, params)
    torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-11)
    for n, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def merges_and_unmerges(name: str, model: str) -> None:
    """Merged outputs agree; unmerging restores every bit; what cannot merge says why."""
    tuned, batch, _ = make(name, model, train=False)
    widen(tuned)
    stir(tuned)
    before = {n: t.clone() for n, t in tuned.model.state_dict().items() if isinstance(t, Tensor)}
    with torch.no_grad():
        want = _logits(tuned.model(**batch))
    if not all(m.merges for m in tuned.recipe):
        try:
            tuned.merge()
        except CheckError as e:
            assert "merge" in str(e)
            return
        raise AssertionError("merges although it says it cannot")
    merged = tuned.merge()
    assert not any(f".{ATTR}." in f".{n}" for n in merged.state_dict())
    with torch.no_grad():
        got = _logits(merged(**batch))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    tuned.unmerge()
    after = tuned.model.state_dict()
    for n, t in before.items():
        assert torch.equal(after[n], t), f"{n} differs after unmerge"
    with torch.no_grad():
        assert torch.equal(_logits(tuned.model(**batch)), want)


def detaches_bit_for_bit(name: str, model: str) -> None:
    """After steps, detach gives back classes, names, values and flags."""
    net, batch = tiny(model)
    base = copy.deepcopy(net)
    tuned = tune(net, recipe(name), calibration=[batch])
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    tuned.detach()
    assert [type(m) for m in net.modules()] == [type(m) for m in base.modules()]
    assert list(net.state_dict()) == list(base.state_dict())
    for (n, a), b in zip(net.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{n} differs after detach"
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}


def base_stays_visible(name: str, model: str) -> None:
    """isinstance holds, names and storages stay, the state dict without our keys is the base's."""
    net, batch = tiny(model)
    kinds = [(n, type(m)) for n, m in net.named_modules()]
    where = {n: p.data_ptr() for n, p in net.named_parameters()}
    tuned = tune(net, recipe(name), calibration=[batch])
    for n, kind in kinds:
        assert isinstance(net.get_submodule(n), kind), n
    provided = "storage" in {a for m in tuned.recipe for a in m.axes()}
    for n, p in net.named_parameters():
        if f".{ATTR}." not in f".{n}":
            assert where[n] == p.data_ptr(), f"{n} moved"
    if not provided:
        ours = [n for n in net.state_dict() if f".{ATTR}." not in f".{n}"]
        assert ours == list(tiny(model)[0].state_dict())


def saves_and_loads(name: str, model: str) -> None:
    """A saved folder gives the same outputs on a fresh base."""
    net, batch = tiny(model)
    base = copy.deepcopy(net)
    tuned = tune(net, recipe(name), calibration=[batch])
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    net.eval()
    base.eval()
    with torch.no_grad():
        want = _logits(net(**batch))
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        again = load(base, folder)
        with torch.no_grad():
            got = _logits(again.model(**batch))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def is_deterministic(name: str, model: str) -> None:
    """The same seed gives the same start and the same two steps."""
    ends = []
    for _ in range(2):
        tuned, batch, _ = make(name, model, torch.float32)
        torch.manual_seed(3)
        tuned.optimizer(lr=1e-3)
        losses = [float(tuned.step(batch)) for _ in range(2)]
        ends.append((losses, {n: p.detach().clone() for n, p in tuned.named_parameters()}))
    assert ends[0][0] == ends[1][0]
    for n, p in ends[0][1].items():
        assert torch.equal(p, ends[1][1][n]), n


def copies_and_pickles(name: str, model: str) -> None:
    """Deep copies and pickles of the tuned model compute the same."""
    tuned, batch, _ = make(name, model, torch.float32, train=False)
    with torch.no_grad():
        want = _logits(tuned.model(**batch))
        for other in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
            torch.testing.assert_close(_logits(other(**batch)), want)


def runs_in_bfloat16(name: str, model: str) -> None:
    """A bf16 base trains: finite loss, finite tensors."""
    tuned, batch, _ = make(name, model, torch.bfloat16)
    tuned.optimizer(lr=1e-3)
    for _ in range(2):
        assert tuned.step(batch).isfinite()
    for n, p in tuned.named_parameters():
        assert p.isfinite().all(), n


def checkpointing_changes_nothing(name: str, model: str) -> None:
    """The same gradients with `+ checkpoint`, where the two may be joined."""
    first, batch, base = make(name, model, torch.float64)
    if not first.anatomy.blocks:
        return
    net = copy.deepcopy(base)
    try:
        second = tune(net, f"{recipe(name)} + checkpoint", calibration=[batch])
    except BurnishError as e:
        assert "cannot be joined" in str(e) or "mode" in str(e), e
        return
    net.train()
    grads = []
    for tuned in (first, second):
        widen(tuned)
        stir(tuned)
        torch.manual_seed(5)
        tuned.loss(batch).backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=1e-9, atol=1e-12,
                                   msg=lambda m, n=n: f"{n}: {m}")


def loss_falls(name: str, model: str) -> None:
    """Fifteen steps on one batch make it more likely."""
    tuned, batch, _ = make(name, model, torch.float32)
    # zeroth-order steps and sign steps have their own scale of learning rates
    opt = tuned.optimizer()
    zeroth = getattr(opt, "zeroth_order", False)
    tuned.optimizer(lr=1e-3 if zeroth else 5e-3)
    first = float(tuned.loss(batch).detach())
    for _ in range(15):
        tuned.step(batch)
    last = float(tuned.loss(batch).detach())
    assert last < first, f"loss went from {first:.4f} to {last:.4f}"


def switches_off(name: str, model: str) -> None:
    """Inside `disabled()` the model answers as the base."""
    tuned, batch, base = make(name, model, torch.float32, train=False)
    stir(tuned)
    storage = "storage" in {a for m in tuned.recipe for a in m.axes()}
    if storage:                                     # the base *is* the stored form then
        return
    with torch.no_grad(), tuned.disabled():
        torch.testing.assert_close(_logits(tuned.model(**batch)), _logits(base(**batch)))


def simulated_is_measured(name: str, model: str) -> None:
    """The promise: the simulated peak is within 3 % of the measured one."""
    from ..memory import measure, simulate

    net, batch = tiny(model)
    promise = simulate(copy.deepcopy(net), recipe(name), batch)
    tuned = tune(net, recipe(name), calibration=[batch])
    tuned.optimizer(lr=1e-3)
    truth = measure(tuned, batch)
    ratio = promise.peak_bytes / truth.peak_bytes
    assert abs(ratio - 1) <= 0.03, f"promised {promise.peak_bytes:,}, took {truth.peak_bytes:,}"


CHECKS: tuple[Callable[[str, str], None], ...] = (
    identity_at_the_start, gradients_reach_exactly_what_trains, declared_count,
    delta_equals_dense_reference, merges_and_unmerges, detaches_bit_for_bit, base_stays_visible,
    saves_and_loads, is_deterministic, copies_and_pickles, runs_in_bfloat16,
    checkpointing_changes_nothing, loss_falls, switches_off, simulated_is_measured,
)


def methods() -> list[str]:
    """Names of every registered method that joins to a model (not pure lifecycle functions)."""
    return [n for n in registry.names() if set(registry.find(n).axes()) - {"lifecycle"}]


def check(name: str | type[Method], model: str = "vit") -> None:
    """All checks of one method on one small model."""
    name = name if isinstance(name, str) else registry.register(name).name
    for one in CHECKS:
        one(name, model)
