"""What joining a recipe to a model does and leaves alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import tempfile
from typing import Any

import torch

from ...engine.slot import ATTR, slots
from ...formats.adapter import load
from .common import (
    TRAINS,
    Skip,
    axes_of,
    close,
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
    widen,
)


def _not_the_base(name: str) -> Skip | None:
    return None if method_of(name).identity else \
        Skip("does not claim to start as the pre-trained function")


def _no_count(name: str) -> Skip | None:
    cls = method_of(name)
    if "delta" not in cls.axes():
        return Skip("no delta: its own test file holds its count")
    return None if hasattr(cls, "count") else Skip("declares no count")


def _trains_nothing(name: str) -> Skip | None:
    return None if TRAINS & set(method_of(name).axes()) else \
        Skip("trains nothing itself; `beside_a_partner_it_acts` looks at it")


def _stored(name: str) -> Skip | None:
    return Skip("the base is the stored form then") if "storage" in axes_of(recipe(name)) else None


def _selects(name: str) -> Skip | None:
    return Skip("a selection's own test names what it selects") \
        if partner(name) or {"select", "side"} & set(method_of(name).axes()) else None


def _decays(name: str) -> Skip | None:
    said = " ".join((method_of(name).__doc__ or "").split())
    if (beside := partner(name)) and TRAINS & axes_of(beside):
        return Skip("what it stands beside trains too")
    return None if re.search(r"\b[Nn]o (weight )?decay(?! on)", said) else \
        Skip("its docstring does not say of all that it trains that decay leaves it alone")


@where(_not_the_base)
def identity_at_the_start(name: str, model: str) -> Skip | None:
    """Step 0 is the pre-trained function where the method says so."""
    tuned, batch, base = make(name, model, train=False)
    widen(tuned)
    with torch.no_grad():
        got, want = logits(tuned.model(**batch)), logits(base(**batch.bare))
    close(got, want, "outputs at step 0", 1e-6)
    return None


@where(_no_count)
def declared_count(name: str, model: str) -> Skip | None:
    """`count(place)` is what a delta trains there; one that needs to know what was settled there,
    or the tensors its places share, takes them by name."""
    tuned, _, _ = make(name, model, torch.float32)
    method: Any = tuned.recipe.named(name)
    settled = tuned.adapters["default"].settled.get(name, {})
    shared = tuned.model._modules[ATTR]._modules.get("default", {})
    common = {"shared": shared[f"{name}_shared"]} if f"{name}_shared" in shared else {}
    taken = inspect.signature(method.count).parameters
    seen = 0
    for _, _, slot in slots(tuned.model):
        by_place: dict[Any, int] = {}
        for part in slot.parts:
            if part.place is not None and part.key.startswith(name) \
                    and not getattr(slot.module_of(part), "mirrors", False):
                n = sum(p.numel() for p in slot.module_of(part).parameters() if p.requires_grad)
                by_place[part.place] = by_place.get(part.place, 0) + n
        for place, n in by_place.items():
            known = {**settled.get(place.name, {}), **common}
            says = method.count(place, **{k: v for k, v in known.items() if k in taken})
            assert n == says, f"{place.name}: trains {n}, says {says}"
            seen += 1
    assert seen, "a delta that stands nowhere"
    return None


@where(_trains_nothing)
def it_acts(name: str, model: str) -> Skip | None:
    """With its tensors moved, the model's outputs are no longer the base's."""
    tuned, batch, base = make(name, model, train=False)
    widen(tuned)
    stir(tuned)
    with torch.no_grad():
        got, want = logits(tuned.model(**batch)), logits(base(**batch.bare))
    assert float((got - want).abs().max()) > 1e-6 * float(want.abs().max()), \
        "every trainable tensor was moved and the outputs are still the base's"
    return None


def detaches_bit_for_bit(name: str, model: str) -> Skip | None:
    """After steps, detach gives back classes, names, values and flags."""
    net, batch = fresh(model, text=recipe(name))
    base = copy.deepcopy(net)
    tuned = join(net, recipe(name), model)
    ready(tuned, 1)
    tuned.step(batch)
    tuned.detach()
    assert [type(m) for m in net.modules()] == [type(m) for m in base.modules()]
    assert list(net.state_dict()) == list(base.state_dict())
    for (n, a), b in zip(net.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{n} differs after detach"
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}
    return None


def base_stays_visible(name: str, model: str) -> Skip | None:
    """isinstance holds, names and storages stay, the state dict without our keys is the base's."""
    net, _ = fresh(model)
    kinds = [(n, type(m)) for n, m in net.named_modules()]
    where = {n: p.data_ptr() for n, p in net.named_parameters()}
    keys = list(net.state_dict())
    join(net, recipe(name), model)
    for n, kind in kinds:
        assert isinstance(net.get_submodule(n), kind), n
    for n, p in net.named_parameters():
        if f".{ATTR}." not in f".{n}":
            assert where[n] == p.data_ptr(), f"{n} moved"
    if "storage" not in axes_of(recipe(name)):
        assert [n for n in net.state_dict() if f".{ATTR}." not in f".{n}"] == keys
    return None


def copies_and_pickles(name: str, model: str) -> Skip | None:
    """Deep copies and pickles of the tuned model compute the same."""
    tuned, batch, _ = make(name, model, torch.float32, train=False)
    stir(tuned)
    with torch.no_grad():
        want = logits(tuned.model(**batch))
        for other in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
            torch.testing.assert_close(logits(other(**batch)), want)
    return None


@where(_stored)
def switches_off(name: str, model: str) -> Skip | None:
    """Inside `disabled()` the model answers as the base."""
    tuned, batch, base = make(name, model, torch.float32, train=False)
    stir(tuned)
    with torch.no_grad(), tuned.disabled():
        torch.testing.assert_close(logits(tuned.model(**batch)), logits(base(**batch.bare)))
    return None


@where(_selects)
def only_it_trains(name: str, model: str) -> Skip | None:
    """Without the head, exactly what the parts add or select asks for gradients."""
    tuned, _, _ = make(name, model, torch.float32)
    for n, p in tuned.model.named_parameters():
        assert not p.requires_grad or f".{ATTR}." in f".{n}", f"{n} of the base trains"
    return None


@where(_decays)
def is_left_alone_by_decay(name: str, model: str) -> Skip | None:
    """Where the docstring says that there is no weight decay, the optimizer has none for any
    tensor, before it is saved and after it is loaded."""
    tuned, _, _ = make(name, model, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        loaded = load(fresh(model)[0], folder)
    for one in (tuned, loaded) if list(loaded.parameters()) else (tuned,):
        names = {id(p): n for n, p in one.named_parameters()}
        for group in one.optimizer(lr=1e-3, weight_decay=0.5).param_groups:
            assert not group["weight_decay"], \
                f"decay acts on {', '.join(names[id(p)] for p in group['params'][:3])}"
    return None


CHECKS = (identity_at_the_start, declared_count, it_acts, only_it_trains, is_left_alone_by_decay,
          detaches_bit_for_bit, base_stays_visible, copies_and_pickles, switches_off)
