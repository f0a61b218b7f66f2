"""The life of a handle: whatever is done in whatever order, what a handle promises holds.

Random sequences of add, use, step, resize, merge, save, load, remove and detach on a model with
dropout and batch norm are run beside a plain record of what must be true: what the base answers,
what each adapter answered when it was last trained, and which of them is in use.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import burnish
from burnish.blocks.weight.triplets import Triplets
from burnish.testing import stir

NAMES = ("default", "second", "third")
STORAGES = ("", "bf16 + ", "nf4 + ")
RECIPES = ("lora(rank=2)", "lora(rank=2) + l2_sp", "adalora(rank=2, init_rank=3)",
           "dora(rank=2)", "full", "bitfit", "vera(rank=4) + norms")
DIM = 64


def network() -> nn.Module:
    torch.manual_seed(7)
    net = nn.Sequential()
    net.add_module("one", nn.Linear(DIM, DIM))
    net.add_module("norm", nn.BatchNorm1d(DIM))
    net.add_module("act", nn.ReLU())
    net.add_module("drop", nn.Dropout(0.2))
    net.add_module("two", nn.Linear(DIM, 4))
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.one.bias.requires_grad_(False)               # flags are given back too
    return net


X = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


def answer(net: nn.Module) -> torch.Tensor:
    was = {m: m.training for m in net.modules()}
    net.eval()
    with torch.no_grad():
        out = net(X)
    for m, training in was.items():
        m.training = training
    return out


class Life(RuleBasedStateMachine):
    """`own`: adapter -> what it answers alone; `used`: the one in use, or the weights of a mix."""

    @initialize(storage=st.sampled_from(STORAGES), recipe=st.sampled_from(RECIPES),
                train=st.booleans())
    def begin(self, storage, recipe, train):
        if storage and recipe.startswith(("full", "bitfit")):
            storage = ""                                 # what trains whole is held plainly
        self.net = network().train(train)
        self.pristine = copy.deepcopy(self.net)
        self.storage = storage
        self.tuned = burnish.tune(self.net, storage + recipe, head=False)
        with self.tuned.disabled():
            self.base = answer(self.net)
        if not storage:
            assert torch.equal(self.base, answer(self.pristine))
        self.recipes = {"default": storage + recipe}
        self.own = {"default": answer(self.net)}
        self.used: str | dict[str, float] = "default"
        self.gone: set[str] = set()
        self.merged: nn.Module | None = None

    # -- what may be done --------------------------------------------------------------------------
    def plain(self) -> bool:
        return self.merged is None

    def trains(self) -> bool:
        return self.merged is None and isinstance(self.used, str)

    @precondition(plain)
    @rule(name=st.sampled_from(NAMES), recipe=st.sampled_from(RECIPES))
    def add(self, name, recipe):
        if name in self.own:
            with pytest.raises(burnish.ConfigError, match="already"):
                self.tuned.add(name, recipe, head=False)
            return
        if self.storage and recipe in ("full", "bitfit"):
            return
        self.tuned.add(name, recipe, head=False)
        self.recipes[name] = recipe
        self.gone.discard(name)
        with_it, self.used = self.used, name
        self.tuned.use(name)
        self.own[name] = answer(self.net)
        torch.testing.assert_close(self.own[name], self.base, rtol=1e-4, atol=1e-5)
        self.used = with_it
        self.tuned.use(with_it)

    @precondition(plain)
    @rule(name=st.sampled_from(NAMES))
    def use(self, name):
        if name not in self.own:
            with pytest.raises(burnish.ConfigError, match="no adapter"):
                self.tuned.use(name)
            return
        self.tuned.use(name)
        self.used = name

    @precondition(plain)
    @rule(weight=st.sampled_from([0.0, 0.25, 0.5]))
    def mix(self, weight):
        mixed = {n: w for n, w in zip(self.own, (weight, 1 - weight), strict=False)}
        if any("dora" in self.recipes[n] and w not in (0, 1) for n, w in mixed.items()):
            with pytest.raises(burnish.RecipeError, match="can be used whole"):
                self.tuned.use(mixed)
            return
        self.tuned.use(mixed)
        self.used = mixed
        if self.used == {next(iter(self.own)): 1.0}:
            self.used = next(iter(self.own))

    @precondition(trains)
    @rule(n=st.integers(1, 2))
    def step(self, n):
        self.tuned.optimizer(lr=1e-2)
        for _ in range(n):
            assert self.tuned.step((X, Y), loss=lambda out, batch: (out - batch[1]).square().mean()
                                   ).isfinite()
        self.own[self.used] = answer(self.net)

    @precondition(lambda self: self.plain() and not self.trains())
    @rule()
    def a_mix_trains_nothing(self):
        with pytest.raises(burnish.BurnishError):
            self.tuned.step((X, Y), loss=lambda out, batch: (out - batch[1]).square().mean())

    @precondition(trains)
    @rule(seed=st.integers(0, 9))
    def move(self, seed):
        stir(self.tuned, seed, 0.1)
        self.own[self.used] = answer(self.net)

    @precondition(trains)
    @rule(keep=st.sampled_from([[0], [1, 0], [0, 2], []]))
    def resize(self, keep):
        """Components whose weight is zero are taken out: nothing else changes."""
        for _, term in self.tuned.terms(Triplets):
            keep = [k for k in keep if k < term.E.shape[0]]
            out = [k for k in range(term.E.shape[0]) if k not in keep]
            with torch.no_grad():
                term.E[out] = 0
            before = answer(self.net)
            self.tuned.resize(term, keep=torch.tensor(keep, dtype=torch.long))
            torch.testing.assert_close(answer(self.net), before, rtol=1e-5, atol=1e-5)
        self.own[self.used] = answer(self.net)

    @precondition(plain)
    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        if name not in self.own or len(self.own) == 1:
            with pytest.raises(burnish.ConfigError, match="no adapter|the only adapter"):
                self.tuned.remove(name)
            return
        self.tuned.remove(name)
        del self.own[name], self.recipes[name]
        self.gone.add(name)
        if self.used == name or isinstance(self.used, dict) and name in self.used:
            self.used = next(iter(self.own))

    @precondition(plain)
    @rule()
    def merge(self):
        want = answer(self.net)
        self.merged = self.tuned.merge()
        torch.testing.assert_close(answer(self.merged), want, rtol=1e-4, atol=1e-5)

    @precondition(lambda self: self.merged is not None)
    @rule()
    def merged_it_is_no_place_to_work(self):
        for call in (lambda: self.tuned.add("more", "lora"), lambda: self.tuned.use("default"),
                     lambda: self.tuned.optimizer(), lambda: self.tuned.remove("default"),
                     lambda: self.tuned.save("nowhere")):
            with pytest.raises(burnish.ConfigError, match="unmerge"):
                call()

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        self.tuned.unmerge()
        self.merged = None

    @precondition(plain)
    @rule(go_on=st.booleans())
    def save_and_load(self, go_on):
        """A fresh base answers as this one does, with every adapter; the life may go on there."""
        with tempfile.TemporaryDirectory() as folder:
            self.tuned.save(Path(folder) / "kept")
            net = copy.deepcopy(self.pristine)
            again = burnish.load(net, Path(folder) / "kept")
        torch.testing.assert_close(answer(net), self.expected(), rtol=1e-5, atol=1e-6)
        if go_on:
            self.net, self.tuned = net, again

    @precondition(plain)
    @rule()
    def copy(self):
        """A copy of the handle has a life of its own; this one's goes on in it."""
        twin = copy.deepcopy(self.tuned)
        self.tuned.detach()
        self.tuned, self.net = twin, twin.model

    @rule(recipe=st.sampled_from(RECIPES))
    def detach(self, recipe):
        """The base bit for bit, and a handle that says what happened; then another begins."""
        old = self.tuned
        assert old.detach() is self.net and old.detach() is self.net
        given = self.net.state_dict()
        assert list(given) == list(self.pristine.state_dict())
        for key, value in self.pristine.state_dict().items():
            assert torch.equal(given[key], value), key
        for (n, p), (m, q) in zip(self.net.named_parameters(), self.pristine.named_parameters(),
                                  strict=True):
            assert n == m and p.requires_grad == q.requires_grad, n
        assert [type(m) for m in self.net.modules()] == [type(m) for m in self.pristine.modules()]
        for call in (lambda: old.use("default"), lambda: old.add("more", "lora"), old.merge,
                     old.unmerge, lambda: old.optimizer(), lambda: old.step((X, Y)),
                     lambda: old.remove("default"), lambda: old.save("nowhere"),
                     lambda: old.recipe, lambda: old.summary(), lambda: old.tensors("default"),
                     lambda: list(old.terms(nn.Module)), lambda: old.disabled().__enter__()):
            with pytest.raises(burnish.ConfigError, match="detached"):
                call()
        self.storage = ""
        self.tuned = burnish.tune(self.net, recipe, head=False)
        self.base = answer(self.pristine)
        self.recipes, self.own = {"default": recipe}, {"default": answer(self.net)}
        self.used, self.gone, self.merged = "default", set(), None

    # -- what holds at every moment ----------------------------------------------------------------
    def expected(self) -> torch.Tensor:
        return self.own[self.used] if isinstance(self.used, str) else answer(self.net)

    @invariant()
    def the_base_is_behind_it(self):
        if self.merged is None:
            with self.tuned.disabled():
                assert torch.equal(answer(self.net), self.base)

    @invariant()
    def each_adapter_answers_as_it_was_left(self):
        if self.merged is None:
            assert torch.equal(answer(self.net), self.expected())

    @invariant()
    def what_trains_is_the_one_in_use(self):
        if self.merged is None:
            assert set(self.tuned.adapters) == set(self.own)
            alone = self.used if isinstance(self.used, str) else None
            assert self.tuned.training == alone
            held = {n.split(".burnish.")[1].split(".")[0] for n, _ in self.tuned.named_parameters()
                    if ".burnish." in n}
            assert held <= {alone}
            assert bool(list(self.tuned.parameters())) == (alone is not None)

    @invariant()
    def what_was_removed_says_so(self):
        for name in self.gone if self.merged is None else ():
            for call in (self.tuned.use, self.tuned.tensors, self.tuned.remove,
                         lambda n: list(self.tuned.terms(nn.Module, n)),
                         lambda n: list(self.tuned.branches(nn.Module, n))):
                with pytest.raises(burnish.ConfigError, match=f"no adapter '{name}'"):
                    call(name)


def test_what_a_handle_promises_holds_in_every_order():
    many = os.environ.get("BURNISH_ALL", "") not in ("", "0")
    run_state_machine_as_test(Life, settings=settings(
        max_examples=200 if many else 15, stateful_step_count=30 if many else 12, deadline=None,
        derandomize=not many, database=None, suppress_health_check=list(HealthCheck)))


def test_an_adapter_added_after_the_base_was_asked_counts_once():
    """`disabled()` gives a module that trains whole a class that shows its base weights; a slot
    that comes later finds it so, and detach finds the way back."""
    net = network().eval()
    tuned = burnish.tune(net, "full", head=False)
    with tuned.disabled():
        answer(net)
    tuned.add("second", "lora(rank=2, alpha=4)", targets="one", head=False)
    tuned.use("second")
    stir(tuned, size=0.3)
    (_, term), = tuned.terms(nn.Module)
    pristine = network().eval()
    with torch.no_grad():
        pristine.one.weight += 2.0 * term.B @ term.A
    torch.testing.assert_close(answer(net), answer(pristine))
    tuned.detach()
    assert type(net.one) is nn.Linear
