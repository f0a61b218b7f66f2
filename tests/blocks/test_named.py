"""The state of an optimizer by name: what it holds, that it comes back, what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from burnish.blocks.update.named import load_named_state, named_state
from burnish.core.errors import FormatError


def pairs(reverse=False):
    g = torch.Generator().manual_seed(0)
    made = [(n, nn.Parameter(torch.randn(s, generator=g)))
            for n, s in (("a", 3), ("a.b", 4), ("a.b.c", (2, 2)))]
    return made[::-1] if reverse else made


def trained(optimizer, steps=3, seed=0):
    """Steps with gradients that belong to names."""
    for k in range(steps):
        for group in optimizer.param_groups:
            for n, p in zip(group["param_names"], group["params"], strict=True):
                g = torch.Generator().manual_seed(1000 * seed + 10 * k + len(n))
                p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return optimizer


def weights(optimizer):
    return {n: p.detach().clone() for group in optimizer.param_groups
            for n, p in zip(group["param_names"], group["params"], strict=True)}


def adam(reverse=False, lr=0.1, betas=(0.9, 0.99)):
    return torch.optim.Adam(pairs(reverse), lr=lr, betas=betas)


def test_it_is_flat_and_the_rest_is_json():
    optimizer = trained(adam())
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    tensors, rest = named_state(optimizer)
    assert set(tensors) == {f"{n}.{k}" for n in ("a", "a.b", "a.b.c")
                            for k in ("step", "exp_avg", "exp_avg_sq")}
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(tensors["a.exp_avg"], optimizer.state[first]["exp_avg"])
    assert rest == json.loads(json.dumps(rest)), "it is what a file gives back"
    (group,) = rest["groups"]
    assert group["names"] == ["a", "a.b", "a.b.c"] and group["betas"] == [0.9, 0.99]
    assert group["lr"] == 0.25 and "params" not in group and "param_names" not in group
    assert rest["state"] == {} and "extra" not in rest


def test_a_scalar_goes_beside_and_what_is_none_nowhere():
    optimizer = torch.optim.SGD(pairs(), lr=0.1)
    for _, p in zip(range(2), optimizer.param_groups[0]["params"], strict=False):
        optimizer.state[p] = {"count": 3, "momentum_buffer": None}
    tensors, rest = named_state(optimizer)
    assert tensors == {} and rest["state"] == {"a.count": 3, "a.b.count": 3}
    again = torch.optim.SGD(pairs(), lr=0.1)
    one, two, three = again.param_groups[0]["params"]
    again.state[three] = {"count": 9}                # of before, and not in the file
    load_named_state(again, tensors, rest)
    assert again.state[one] == again.state[two] == {"count": 3} and three not in again.state


@pytest.mark.parametrize("reverse", [False, True])
def test_a_run_goes_on_in_whatever_order_parameters_are_listed(reverse):
    """Each name has its own: those of ``a``, ``a.b`` and ``a.b.c`` are told apart."""
    whole = trained(trained(adam()), 2, seed=1)
    first = trained(adam())
    again = trained(adam(reverse, lr=0.7, betas=(0.5, 0.5)), 1, seed=5)      # forgets its own
    with torch.no_grad():
        for group in again.param_groups:
            for n, p in zip(group["param_names"], group["params"], strict=True):
                p.copy_(weights(first)[n])
    tensors, rest = named_state(first)
    kept = copy.deepcopy(tensors)
    load_named_state(again, tensors, json.loads(json.dumps(rest)))
    assert again.param_groups[0]["betas"] == (0.9, 0.99)
    want, got = weights(whole), weights(trained(again, 2, seed=1))
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert all(torch.equal(t, kept[k]) for k, t in tensors.items()), "a copy is trained"
    assert "names" not in again.param_groups[0]


class Counting(torch.optim.SGD):
    """Has something beyond its parameters."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.seen = torch.zeros(2)

    def extra_state(self):
        return {"seen": self.seen}, {"word": "x"}

    def load_extra_state(self, tensors, rest):
        (self.seen,), self.word = tensors.values(), rest["word"]
        assert list(tensors) == ["seen"]


def test_what_an_optimizer_has_beyond_its_parameters_goes_along():
    first, again = Counting(pairs()), Counting(pairs())
    first.seen = torch.tensor([3.0, 4.0])
    tensors, rest = named_state(first)
    assert set(tensors) == {"extra/seen"} and rest["extra"] == {"word": "x"}
    load_named_state(again, tensors, rest)
    assert torch.equal(again.seen, first.seen) and again.word == "x"
    del rest["extra"]
    third = Counting(pairs())
    load_named_state(third, {}, rest)                # a file of one that had nothing more
    assert not third.seen.any()


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    tensors, rest = named_state(trained(adam()))
    fresh = torch.optim.Adam(pairs()[:2], lr=0.3)
    with pytest.raises(FormatError, match="a.b.c.step belongs to no parameter|groups its param"):
        load_named_state(fresh, tensors, rest)
    with pytest.raises(FormatError, match="state z.step belongs to no parameter that trains here"):
        load_named_state(adam(), {**tensors, "z.step": torch.zeros(())}, rest)
    split = torch.optim.Adam([{"params": pairs()[:1]}, {"params": pairs()[1:]}], lr=0.3)
    with pytest.raises(FormatError, match="groups its parameters otherwise"):
        load_named_state(split, tensors, rest)
    for one in (fresh, split):
        assert not one.state and all(g["lr"] == 0.3 for g in one.param_groups)
    nameless = torch.optim.Adam([p for _, p in pairs()])
    with pytest.raises(FormatError, match="made without parameter names"):
        named_state(nameless)
