"""Sparse updates whose entries are chosen again: values, places and moments go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.resize import resize
from burnish.blocks.weight import panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.rechosen import Rechosen, rechoose
from burnish.core.site import Place

OUT, IN, N = 12, 10, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)


def made(k=9, live=None):
    torch.manual_seed(0)
    term = Rechosen(PLACE, torch.randperm(OUT * IN)[:k], live).double()
    nn.init.normal_(term.values)
    nn.init.normal_(term.held)
    return term


def at(term):
    """{position: value} of the whole update."""
    return dict(zip(term.index.tolist(), [*term.values.tolist(), *term.held.tolist()],
                    strict=True))


def by_hand(term, optimizer=None):
    """Tuned.resize without a model."""
    def change(which, keep, fresh, moments):
        assert which is term
        for name, dim in term.ranked.items():
            resize(getattr(term, name), dim, keep.get(name), fresh.get(name), optimizer, name,
                   moments)
    return change


def test_all_train_at_the_start_and_nothing_is_added():
    term = Rechosen(PLACE, torch.tensor([13, 3, 53]))
    assert term.index.tolist() == [3, 13, 53] == term.trained.tolist()
    assert term.values.tolist() == [0, 0, 0] and term.held.numel() == 0
    assert term.settled() == term.counted == {"entries": 3, "live": 3}
    assert not term.tokenwise and term.tiled and term.keeps_input, "though in one column"
    assert term.standing() is term.values, "no copy where nothing is held"
    assert Rechosen(PLACE, torch.arange(5), 2).settled() == {"entries": 5, "live": 2}


@pytest.mark.parametrize("panel", [panels.PANEL, 3 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("live", [9, 4, 0])
def test_held_entries_count_and_get_no_gradient(panel, live, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    term = made(9, live)
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(N, OUT, dtype=torch.float64)
    delta = torch.zeros(OUT, IN, dtype=torch.float64)
    for p, v in at(term).items():
        delta[p // IN, p % IN] = v
    torch.testing.assert_close(term.dense(), delta)
    y = linear(x, Weighted(lambda: W, [(term, 0.8)]), None)
    torch.testing.assert_close(y, x @ (W + 0.8 * delta).t())
    dx, dv = torch.autograd.grad(y, [x, term.values], g)
    torch.testing.assert_close(dx, g @ (W + 0.8 * delta))
    torch.testing.assert_close(dv, 0.8 * (g.t() @ x).flatten()[term.index[:live].long()])
    index, values = term.entries()
    assert index.tolist() == sorted(at(term))
    assert values.tolist() == [at(term)[i] for i in index.tolist()] and not values.requires_grad
    torch.testing.assert_close(term.weights(W), (W + delta).flatten()[term.trained])


@pytest.mark.parametrize("live", [9, 5])
def test_those_that_leave_are_held_at_what_they_learned(live):
    term = made(9, live)
    before, trained = at(term), term.trained.tolist()
    stay = torch.tensor([True, False, True, False, True, *[True] * (live - 5)])
    rechoose(term, by_hand(term), stay)
    assert at(term) == before
    assert term.trained.tolist() == [p for p, s in zip(trained, stay, strict=True) if s]
    assert term.settled() == {"entries": 9, "live": live - 2}
    assert (term.values.numel(), term.held.numel()) == (live - 2, 11 - live)


def test_those_that_come_stand_in_their_place_at_zero():
    term = made(9, 6)
    before, trained = at(term), term.trained.tolist()
    free = [p for p in range(OUT * IN) if p not in before][:2]
    stay = torch.tensor([True, False, True, True, False, True])
    rechoose(term, by_hand(term), stay, torch.tensor(free))
    gone = {trained[1], trained[4]}
    assert at(term) == {**{p: v for p, v in before.items() if p not in gone},
                        **dict.fromkeys(free, 0.0)}
    assert term.trained.tolist() == [p for p in trained if p not in gone] + free
    assert term.settled() == {"entries": 9, "live": 6}


@pytest.mark.parametrize("moments", ["keep", "drop"])
def test_moments_go_where_entries_go_or_begin_again(moments):
    term = made()
    optimizer = torch.optim.AdamW(term.parameters())
    term.values.square().sum().backward()
    optimizer.step()
    was = dict(zip(term.index.tolist(), optimizer.state[term.values]["exp_avg"].tolist(),
                   strict=True))
    stay = torch.ones(9, dtype=torch.bool)
    stay[[0, 3]] = False
    free = [p for p in range(OUT * IN) if p not in was][:2]
    rechoose(term, by_hand(term, optimizer), stay, torch.tensor(free), moments=moments)
    if moments == "drop":
        assert term.values not in optimizer.state
    else:
        assert optimizer.state[term.values]["exp_avg"].tolist() == \
            [was.get(p, 0.0) for p in term.trained.tolist()]
    assert term.values.grad.shape == term.values.shape


def test_weights_are_at_least_single():
    term = Rechosen(PLACE, torch.arange(3))
    assert term.weights(torch.ones(OUT, IN, dtype=torch.bfloat16)).dtype == torch.float32
    assert term.weights(torch.ones(OUT, IN, dtype=torch.float64)).dtype == torch.float64


def test_a_measurement_puts_back_what_it_chose_again():
    """Held values, too, have the shape that they had."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    tuned = burnish.tune(net, "sara(tau=0.1, switch=1)", targets="0,2", head=False)
    batch = (torch.randn(4, 12), torch.randn(4, 4))
    tuned.optimizer(lr=0.1)
    was = {n: t.clone() for n, t in tuned.tensors().items()}
    burnish.measure(tuned, batch, loss=lambda out, b: (out - b[1]).square().mean())
    now = tuned.tensors()
    assert set(now) == set(was) and all(torch.equal(t, was[n]) for n, t in now.items())
