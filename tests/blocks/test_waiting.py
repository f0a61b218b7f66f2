"""A parameter that waits on the host is to every reader what the last step has left it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.weight.hosted import standing_in
from burnish.blocks.weight.waiting import Waiting, come_home, put, value, wait, waiting


def linear(late=True):
    """(a layer whose weight waits and has a move to be made, the weight as it is to read)."""
    torch.manual_seed(0)
    made = nn.Linear(3, 4)
    want = made.weight.detach() * 3 + 1
    wait(made.weight)
    if late:
        made.weight.burnish_waits.later(lambda w: w.mul_(3))
        made.weight.burnish_waits.later(lambda w: w.add_(1))
    return made, want


def _pickled(m):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False).weight


READERS = {
    "detach": lambda m: m.weight.detach(), "data": lambda m: m.weight.data,
    "clone": lambda m: m.weight.clone(), "numpy": lambda m: torch.from_numpy(
        m.weight.detach().numpy()), "state_dict": lambda m: m.state_dict()["weight"],
    "held": lambda m: next(iter(m.parameters())) + 0, "index": lambda m: torch.stack(
        [m.weight[k] for k in range(4)]), "stack": lambda m: torch.stack([m.weight, m.weight])[1],
    "deepcopy": lambda m: copy.deepcopy(m).weight.detach(), "pickle": _pickled,
    "forward": lambda m: (m(torch.eye(3)) - m.bias).T, "to": lambda m: m.double().weight.float(),
    "func": lambda m: torch.func.functional_call(m, {}, torch.eye(3)).T - m.bias[:, None],
    "foreach": lambda m: torch._foreach_add([m.weight], 0.0)[0],
    "come_home": lambda m: (come_home(m.weight), m.weight.data)[1]}


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("reader", READERS)
@torch.no_grad()
def test_every_reader_sees_the_move_that_was_due(reader, away):
    with standing_in(away):
        made, want = linear()
        torch.testing.assert_close(READERS[reader](made), want)
        torch.testing.assert_close(READERS[reader](made), want)      # and it is made once


def test_facts_are_told_without_a_move():
    made, _ = linear()
    p = made.weight
    assert (p.shape, p.dtype, p.device, p.numel(), p.dim(), p.stride()) == (
        (4, 3), torch.float32, torch.device("cpu"), 12, 2, (3, 1))
    assert p.requires_grad and p.is_leaf and p.is_floating_point() and p.is_contiguous()
    p.requires_grad_(False)
    assert p.grad is None and p in {p: 1} and len(p.burnish_waits._late) == 2


def test_it_is_the_same_parameter_of_the_same_class_name():
    made = nn.Linear(3, 4)
    p, before = made.weight, made.weight.detach().clone()
    wait(p)
    wait(p)
    assert made.weight is p and isinstance(p, nn.Parameter) and isinstance(p, Waiting)
    assert type(p).__name__ == "Parameter" and waiting([made, made]) == [p.burnish_waits]
    assert dict(made.named_parameters())["weight"] is p
    come_home(p)
    come_home(p)
    assert type(p) is nn.Parameter and not vars(p) and torch.equal(p, before)


@pytest.mark.parametrize("away", [False, True])
def test_what_is_written_stays(away):
    with standing_in(away), torch.no_grad():
        made, want = linear()
        made.weight.add_(1)
        torch.testing.assert_close(made.weight.detach(), want + 1)
        made.weight.copy_(want)
        made.weight[0] = 7.0
        assert torch.equal(made.weight.detach()[1:], want[1:]) and bool((made.weight[0] == 7).all())
        made.weight.burnish_waits.later(lambda w: w.mul_(0))
        made.weight.data = want * 2                  # its own from now on: nothing is due
        assert torch.equal(made.weight.detach(), want * 2)


@pytest.mark.parametrize("away", [False, True])
def test_gradients_reach_it(away):
    with standing_in(away):
        made, want = linear()
        plain = nn.Parameter(want.clone())
        x = torch.randn(5, 3)
        made(x).square().sum().backward()
        F.linear(x, plain, made.bias.detach()).square().sum().backward()
        torch.testing.assert_close(made.weight.grad, plain.grad)


@torch.no_grad()
def test_what_is_on_the_device_is_moved_there_and_written_back_when_it_goes():
    with standing_in(True):
        made, want = linear()
        held, before = made.weight.burnish_waits, made.weight.burnish_waits.held.clone()
        held.bring()
        held.catch_up()
        held.catch_up()
        there = value(made.weight)
        assert torch.equal(there, want) and torch.equal(held.held, before)
        assert torch.equal(made.weight.detach(), want) and torch.equal(held.held, before)
        assert torch.equal(made(torch.eye(3)), F.linear(torch.eye(3), want, made.bias))
        held.leave()
        assert torch.equal(held.held, want) and held._here is None
        assert value(made.weight) is not there and held.held is not value(made.weight)


@torch.no_grad()
def test_what_stands_for_it_is_read_and_its_own_comes_back():
    for away in (False, True):
        with standing_in(away):
            made, want = linear()
            own = put(made.weight, torch.ones(4, 3))
            assert torch.equal(made.weight.detach(), torch.ones(4, 3))
            assert torch.equal(made.weight.data, torch.ones(4, 3))
            assert len(made.weight.burnish_waits._late) == 2
            put(made.weight, own)
            torch.testing.assert_close(made.weight.detach(), want)
    plain = nn.Linear(3, 4)
    was = plain.weight.data
    assert put(plain.weight, torch.zeros(4, 3)).data_ptr() == was.data_ptr()
    assert not plain.weight.any() and value(plain.weight).data_ptr() == plain.weight.data_ptr()


def test_computing_away_makes_a_copy_and_looking_does_not():
    made, _ = linear(late=False)
    p, seen = made.weight, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for away, copies in ((False, 0), (True, 1)):
        seen.clear()
        with standing_in(away), torch.no_grad(), Watch():
            F.linear(torch.eye(3), p)
        assert seen.count("_to_copy") == copies
    with standing_in(True), torch.no_grad(), Watch():
        seen.clear()
        assert p.detach().data_ptr() == p.data.data_ptr() == p.burnish_waits.held.data_ptr()
    assert "_to_copy" not in seen and not any("copy" in s for s in seen)


@torch.no_grad()
def test_it_says_where_it_is_read_and_is_computed_with_there():
    """With a device that has shapes alone; what another has put into it lies where that lay."""
    made, want = linear(late=False)
    p = made.weight
    p.burnish_waits.home = torch.device("meta")
    assert p.device.type == "meta" and p.detach().device.type == "cpu"
    assert copy.deepcopy(made).weight.device.type == "meta"
    y = F.linear(torch.empty(2, 3, device="meta"), p)
    assert y.device.type == "meta" and y.shape == (2, 4)
    assert torch.equal(F.linear(torch.eye(3), p).T, p.detach())
    assert value(p).device.type == "meta"
    p.data = torch.ones(4, 3)
    assert p.device.type == "cpu" and torch.equal(made(torch.eye(3)) - made.bias, torch.ones(3, 4))
