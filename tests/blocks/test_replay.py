"""Randomness drawn again: on every device at once, and nobody outside notices."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.tape import replay


class Generators:
    """The random side of an accelerator's module: one counter per device number."""

    def __init__(self, numbered=True):
        self.at = {0: 10, 1: 20}
        if not numbered:                         # as torch.mps has it: no device to name
            self.get_rng_state = lambda: self.state(0)
            self.set_rng_state = lambda state: self.put(state, 0)

    def is_available(self):
        return True

    def state(self, index):
        return torch.tensor([self.at[index]])

    def put(self, state, index):
        self.at[index] = int(state)

    def get_rng_state(self, device):
        return self.state(device.index or 0)

    def set_rng_state(self, state, device):
        self.put(state, device.index or 0)


@pytest.fixture
def devices(monkeypatch):
    made = {"xpu": Generators(), "mps": Generators(numbered=False)}
    monkeypatch.setattr(torch, "get_device_module", lambda d: made[torch.device(d).type])
    return made


def test_every_device_draws_again_and_is_put_back(devices):       # findings 1.10
    where = ["cpu", "xpu:0", "xpu:1", "mps"]
    states = replay.rng_state(where)
    first = torch.rand(3)
    devices["xpu"].at = {0: 11, 1: 22}
    devices["mps"].at = {0: 33}
    outside = torch.get_rng_state()
    with replay.replay(where, states):
        assert torch.equal(torch.rand(3), first)
        assert devices["xpu"].at == {0: 10, 1: 20} and devices["mps"].at[0] == 10
        devices["xpu"].at[1] = 99
    assert devices["xpu"].at == {0: 11, 1: 22} and devices["mps"].at == {0: 33}
    assert torch.equal(torch.get_rng_state(), outside)


def test_generators_are_put_back_behind_an_exception():
    state = replay.rng_state("cpu")
    torch.rand(3)
    outside = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), replay.replay("cpu", state):
        torch.rand(5)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), outside)


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "privateuseone"])
def test_a_device_without_a_generator_is_answered_for_by_the_host(device, monkeypatch):
    nothing = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "get_device_module", lambda d: nothing)
    state = replay.rng_state(torch.device(device))
    first = torch.rand(2)
    with replay.replay(device, state):
        assert torch.equal(torch.rand(2), first)


def test_dropout_is_the_stock_one_twice_differentiable():
    """Its backward is dropout again, so its own gradient is the same mask once more."""
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    got, want = [], []
    for fn, into in ((lambda t: replay.dropout(t, 0.4), got),
                     (lambda t: F.dropout(t, 0.4, True), want)):
        torch.manual_seed(3)
        y = fn(x)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        into += [y, g, *torch.autograd.grad(g.pow(2).sum(), x)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", [
    types.SimpleNamespace(is_available=lambda: True),
    types.SimpleNamespace(is_available=lambda: False, get_rng_state=lambda d: torch.zeros(1))])
def test_a_generator_is_asked_where_there_is_one_and_it_works(module, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda d: module)
    (state,) = replay.rng_state("xpu:0")
    assert torch.equal(state, torch.get_rng_state())


def cast_here():
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return kind, torch.is_autocast_cache_enabled()


def test_what_autocast_is_here_is_told_of_a_device_that_has_one():
    with torch.autocast("cpu", torch.bfloat16):
        assert replay.autocast_state("meta") == ("cpu", True, torch.bfloat16)
        assert replay.autocast_state("cpu") == ("cpu", True, torch.bfloat16)
    assert replay.autocast_state("xpu:0")[:2] == ("xpu", False)


@pytest.mark.parametrize("cache", [True, False])
def test_a_cast_that_was_is_on_again_and_caches_only_when_told(cache):
    with torch.autocast("cpu", torch.bfloat16):
        on = replay.autocast_state("cpu")
        with replay.autocast(on):                    # the user's own goes on, cache and all
            assert cast_here() == (torch.bfloat16, True)
    off = replay.autocast_state("cpu")
    with replay.autocast(on, cache) if cache else replay.autocast(on):
        assert cast_here() == (torch.bfloat16, cache)
    with torch.autocast("cpu", torch.bfloat16), replay.autocast(off):
        assert cast_here() == (None, False)


def test_a_mask_is_drawn_as_dropout_draws_it_and_again_on_any_layout():
    x, g = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64).t()
    for first in (x, torch.randn(6, 5, dtype=torch.float64).t(), torch.randn(5, 12)[:, ::2]):
        torch.manual_seed(4)
        want = F.dropout(first, 0.4, True)
        torch.manual_seed(4)
        mask = replay.Mask(first, 0.4)
        assert torch.equal(mask.first(first), want)
        for t in (g, g.contiguous(), torch.ones(5, 12)[:, ::2]):
            torch.rand(3)
            here = torch.get_rng_state()
            got = mask(t)
            torch.testing.assert_close(got, t * (want != 0) / 0.6)
            assert got.dtype == t.dtype and torch.equal(torch.get_rng_state(), here)


def test_dropout_under_a_transform_is_the_stock_one():
    """Where a function of its own, which no transform knows, could not stand."""
    x, drawn = torch.randn(3, 40), []
    for fn in (lambda t: replay.dropout(t, 0.4), lambda t: F.dropout(t, 0.4, True)):
        torch.manual_seed(2)
        y = torch.func.vmap(fn, randomness="different")(x)
        drawn.append((y, torch.func.grad(lambda t, fn=fn: fn(t).pow(2).sum())(x)))
    assert 0 < (drawn[0][0] == 0).sum() < x.numel()
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a, b)
