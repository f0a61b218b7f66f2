"""Sparse updates that move: who is looked for, who leaves, and what the bits remember."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from burnish.blocks.choose.dropgrow import DropGrow, Seeking
from burnish.blocks.update.resize import resize
from burnish.blocks.weight import panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.core.site import Place

OUT, IN, N = 12, 10, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)


def made(k=9, fired=False):
    torch.manual_seed(0)
    term = Seeking(PLACE, torch.randperm(OUT * IN)[:k], **({"fired": True} if fired else {}))
    nn.init.normal_(term.values)
    return term


def backward(term, seed=1):
    g = torch.Generator().manual_seed(seed)
    W, x, dy = (torch.randn(*s, generator=g) for s in ((OUT, IN), (N, IN), (N, OUT)))
    linear(x, Weighted(lambda: W, [(term, 1.0)]), None).backward(dy)
    return (dy.t() @ x).flatten().abs()


@pytest.mark.parametrize("panel", [panels.PANEL, 3 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("barred", [None, [3, 50, 51, 119]])
@pytest.mark.parametrize("n", [1, 4, 60])
def test_the_largest_gradients_of_those_that_do_not_train(panel, barred, n, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    term = made()
    if barred:
        term.barred = torch.tensor(barred)
    backward(term, seed=5)
    assert term.found.numel() == 0, "nobody looks unless told"
    term.look_for(n)
    backward(term, seed=4)
    size = backward(term)                                    # the last one counts
    size[term.index.long()] = -1
    size[torch.tensor(barred or [], dtype=torch.long)] = -1
    assert term.found.tolist() == size.argsort(descending=True)[:n].tolist()
    term.look_for(2)
    assert term.found.numel() == 0 and term.seek == 2


def test_held_entries_are_not_looked_for():
    term = Seeking(PLACE, torch.arange(5), 2)
    term.look_for(115)
    backward(term)
    assert set(term.found.tolist()) == set(range(5, 120))


def test_bits_remember_who_has_trained():
    term = made(fired=True)
    first = set(term.index.tolist())
    assert term.fired.dtype == torch.uint8 and term.fired.shape == (15,)
    assert set(term.ever().nonzero().flatten().tolist()) == first
    term.index.copy_(torch.arange(100, 109))
    term.fire()
    assert set(term.ever().nonzero().flatten().tolist()) == first | set(range(100, 109))
    odd = Seeking(Place("l", "w", "linear", 3, 3), torch.tensor([8]), fired=True)
    assert odd.fired.shape == (2,) and odd.ever().nonzero().tolist() == [[8]]
    plain = made()
    plain.fire()
    assert plain.fired is None and "fired" not in plain.state_dict()


def handler(terms, every=2, drop=0.34, looks=False, grow=None, room=lambda t: 100):
    def change(term, keep, fresh, moments):
        for name, dim in term.ranked.items():
            resize(getattr(term, name), dim, keep.get(name), fresh.get(name), None, name, moments)

    def least(term, n, step):
        return torch.tensor([p for p in range(120) if p not in term.index.tolist()][:n])
    return DropGrow(terms, change, every, drop, grow or least, room, looks)


def test_the_least_leave_and_as_many_come():
    term, still = made(), made()
    had = dict(zip(term.index.tolist(), term.values.tolist(), strict=True))
    least = sorted(had, key=lambda p: abs(had[p]))[:3]                    # int(0.34 * 9)
    move = handler({"a": term})
    move.after_update(0)
    assert term.index.tolist() == still.index.tolist(), "not yet"
    move.after_update(1)
    now = dict(zip(term.index.tolist(), term.values.tolist(), strict=True))
    fresh = [p for p in range(120) if p not in had][:3]
    assert now == {**{p: v for p, v in had.items() if p not in least}, **dict.fromkeys(fresh, 0.0)}


def test_equal_ones_leave_by_place():
    term = made()
    with torch.no_grad():
        term.values.zero_()
    first = term.index.tolist()
    handler({"a": term}).after_update(1)
    assert term.index.tolist()[:6] == first[3:]


@pytest.mark.parametrize("total, moves", [(None, [1, 3, 5]), (6, [1, 3]), (7, [1, 3, 5])])
def test_nothing_moves_after_the_last_update(total, moves):
    move = handler({})
    move.start(total)
    assert [k for k in range(7) if move.due(k)] == moves
    assert [k for k in range(9) if handler({}, every=3).due(k)] == [2, 5, 8]


def test_no_more_leave_than_could_come():
    term = made()
    assert handler({}, drop=1.0).moving(term) == 9
    assert handler({}, drop=1.0, room=lambda t: 4).moving(term) == 4
    few = made()
    handler({"a": few}, drop=1.0, grow=lambda t, n, s: torch.tensor([0, 1])).after_update(1)
    assert few.settled() == {"entries": 9, "live": 9} and few.index.tolist()[7:] == [0, 1]
    nobody = made()
    before = copy.deepcopy(nobody.state_dict())
    handler({"a": nobody}, drop=0.1).after_update(1)
    assert all(torch.equal(t, before[n]) for n, t in nobody.state_dict().items())


def test_gradients_are_looked_at_in_the_step_before_a_move():
    term = made()
    move = handler({"a": term}, looks=True)
    seen = []
    for k in range(4):
        move.step_begin(k)
        seen.append(term.seek)
    assert seen == [0, 3, 0, 3]
    move.step_begin(2)
    move.rehearse(2)
    assert term.seek == 3, "a promise is of the dearest step"
    state = move.state_dict()
    assert state == {"total": None, "at": 2}
    again = handler({"a": term}, looks=True)
    assert again.state_dict() == {"total": None, "at": 0}
    again.load_state_dict({"total": 9, "at": 1})
    assert term.seek == 3 and again.total == 9 and again.at == 1
    blind = handler({"a": term})
    blind.step_begin(1)
    assert term.seek == 0


def test_moved_entries_have_trained():
    term = made(fired=True)
    first = set(term.index.tolist())
    handler({"a": term}).after_update(1)
    assert set(term.ever().nonzero().flatten().tolist()) == first | set(term.index.tolist())
    assert SimpleNamespace(**term.settled()).entries == 9
