"""The log of scalars of every method that leaves one: a run is repeated from it alone, as far as it
goes; a file that was cut off, a damaged number and a failed probe are told apart."""

from __future__ import annotations

import copy
import math
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import burnish
from burnish.blocks.update.noise import ScalarLog
from burnish.blocks.update.step import compose
from burnish.core.errors import FormatError
from burnish.core.recipe import parse
from burnish.core.registry import find, names
from burnish.testing.models import tiny

QUERIES, UPDATES = 3, 4


def logged():
    """Recipes of the methods whose updates leave a log, with several entries an update."""
    found = [n for n in names(extra=False) if "optimizer" in find(n).axes()
             and "queries" in {f.name for f in fields(find(n))}
             and n not in ("zo_fo", "zo2")]       # one has gradients too, one needs blocks
    return [f"{name}(queries={QUERIES})" for name in found]


LOGGED = logged()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def build(recipe, net, seed=7):
    opt = compose([m.optimizer() for m in parse(recipe)], net.named_parameters(), 1e-2, seed=seed)
    opt.model = net
    return opt


def steps(opt, net, n, failed=()):
    def loss():
        out = net(X).square().mean()
        return out * float("nan") if opt.param_groups[0]["updates"] in failed else out

    for _ in range(n):
        opt.step(loss)


def end(recipe, log):
    """Weights that a log alone leads to, and the optimizer."""
    net = Net()
    opt = build(recipe, net)
    opt.replay(copy.deepcopy(log))
    return [p.detach().clone() for p in net.parameters()], opt


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_methods_are_those():
    assert {r.partition("(")[0] for r in LOGGED} >= {"mezo", "zo", "mezo_svrg", "forward_grad",
                                                     "spsa_gc"}


def test_blocks_on_the_host_are_repeated_from_a_log_that_is_whole():
    def start():
        net, batch = tiny("llama")
        tuned = burnish.tune(net, f"full + zo2(queries={QUERIES})", head=False)
        return tuned, batch, tuned.optimizer(lr=1e-3)

    tuned, batch, opt = start()
    for _ in range(2):
        tuned.step(batch)
    again, _, other = start()
    log = ScalarLog.from_tensors(load(save(opt.log.tensors())), opt.log.header)
    part = ScalarLog(dict(log.header), log.seeds[:-1], log.scalars[:-1], log.lrs[:-1])
    with pytest.raises(FormatError, match="3 entries, and 5 are no whole number"):
        other.replay(part)
    assert not same(again.parameters(), tuned.parameters())
    other.replay(log)
    assert same(again.parameters(), tuned.parameters())


@pytest.mark.parametrize("recipe", LOGGED)
def test_a_run_is_repeated_from_its_log_up_to_every_update(recipe):
    net = Net()
    opt, seen = build(recipe, net), []
    for _ in range(UPDATES):
        steps(opt, net, 1)
        seen.append([p.detach().clone() for p in net.parameters()])
    each = len(opt.log) // UPDATES
    assert each == QUERIES and not same(seen[0], seen[-1])
    kept = ScalarLog.from_tensors(load(save(opt.log.tensors())), opt.log.header)
    for k in range(UPDATES + 1):                       # a run that was stopped after k updates
        part = ScalarLog(dict(kept.header), kept.seeds[: k * each], kept.scalars[: k * each],
                         kept.lrs[: k * each])
        got, again = end(recipe, part)
        assert same(got, seen[k - 1] if k else list(Net().parameters()))
        assert again.param_groups[0]["updates"] == k


@pytest.mark.parametrize("recipe", LOGGED)
def test_a_log_that_ends_within_an_update_is_refused_before_anything_moves(recipe):
    net = Net()
    opt = build(recipe, net)
    steps(opt, net, UPDATES)
    for n in range(1, len(opt.log)):
        if n % QUERIES:
            part = ScalarLog(dict(opt.log.header), opt.log.seeds[:n], opt.log.scalars[:n],
                             opt.log.lrs[:n])
            fresh = Net()
            with pytest.raises(FormatError, match="cut off"):
                build(recipe, fresh).replay(part)
            assert same(fresh.parameters(), Net().parameters())


@pytest.mark.parametrize("recipe", LOGGED)
def test_a_probe_that_failed_is_a_number_in_the_log(recipe):
    """A loss that is not finite moves nothing on its own, and the log goes through a file and
    repeats the run with it."""
    net = Net()
    opt = build(recipe, net)
    steps(opt, net, UPDATES, failed=(1,))
    assert all(math.isfinite(g) for g in opt.log.scalars)
    assert opt.log.scalars[QUERIES : 2 * QUERIES] == [0.0] * QUERIES
    got, _ = end(recipe, ScalarLog.from_tensors(load(save(opt.log.tensors())), opt.log.header))
    assert same(got, net.parameters())


def columns(**change):
    log = ScalarLog({"first_update": 0, "resting": [[1, ["w"]]]}, [3, 4], [0.5, -0.5],
                    [(0.1, 0.2), (0.1, 0.2)])
    kept = {k: v.clone() for k, v in log.tensors().items()}
    return {**kept, **{k: f(kept[k]) for k, f in change.items()}}


@pytest.mark.parametrize("change, says", [
    ({"seed": lambda t: t[:1]}, "cut off: it has 1 seeds, 2 scalars, 2 rows of lr"),
    ({"scalar": lambda t: t[:0]}, "cut off: it has 2 seeds, 0 scalars, 2 rows of lr"),
    ({"lr": lambda t: t[:1]}, "cut off: it has 2 seeds, 2 scalars, 1 rows of lr"),
    ({"scalar": lambda t: t * float("nan")}, "entry 0 is damaged"),
    ({"scalar": lambda t: t / torch.tensor([1.0, 0.0])}, "entry 1 is damaged"),
    ({"lr": lambda t: t * torch.tensor([[1.0, 1.0], [1.0, float("inf")]])}, "entry 1 is damaged"),
    ({"seed": lambda t: t.double()}, "entry 0 is damaged: seed 3.0"),
    ({"seed": lambda t: t[None]}, "cut off"), ({"seed": lambda t: t[0]}, "a log of scalars"),
    ({"lr": lambda t: t[:, 0]}, "a log of scalars")])
def test_a_damaged_log_is_refused_in_a_line(change, says):
    assert len(ScalarLog.from_tensors(columns())) == 2
    with pytest.raises(FormatError, match=says) as e:
        ScalarLog.from_tensors(columns(**change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("header", [
    {"first_update": "1"}, {"first_update": -1}, {"first_update": 0.5}, {"first_update": True},
    {"resting": 3}, {"resting": [1]}, {"resting": [["0", ["w"]]]}, {"resting": [[0, [1]]]},
    {"resting": "ab"}, {"resting": [[0, ["w"], 1]]}])
def test_a_damaged_header_is_refused_in_a_line(header):
    with pytest.raises(FormatError, match="log of scalars"):
        ScalarLog.from_tensors(columns(), header)
    assert ScalarLog.from_tensors(columns(), {"first_update": 2, "resting": [[0, ["w"]]]})
