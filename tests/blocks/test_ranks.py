"""Components that compete and terms that grow, with no recipe: plain tensors and a plain resize."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.choose.ranks import Falling, Rising, Shrinking, Widening
from burnish.blocks.update.noise import fold
from burnish.core.errors import RecipeError


class Row(nn.Module):
    """r components, each one number."""

    scoring, score = False, 0.0

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def theta(self):
        return (self.w,)

    rank = property(lambda self: self.w.numel())
    most = 3

    def importance(self):
        return self.score

    def fresh(self, n, drawn):
        return {"w": drawn(n)}

    def grown(self, n):
        self.had = n

    def done(self):
        return None

    def extent(self):
        return self.w.detach().norm()


def resize(term, keep=None, fresh=None):
    w = term.w.detach()
    w = w if keep is None else w[keep if torch.is_tensor(keep) else keep["w"]]
    term.w = nn.Parameter(w if fresh is None else torch.cat([w, fresh["w"].to(w)]))


def rest(term, alive):
    with torch.no_grad():
        term.w.mul_(alive)


def test_the_budget_falls_as_a_cubic_and_ends_before_the_run_does():
    f = Falling(12, 8, 0.1, 0.3)
    assert [f.at(t, 1000) for t in (0, 100, 700, 999)] == [12, 12, 8, 8]
    assert f.at(400, 1000) == pytest.approx(8 + 4 * 0.5 ** 3)
    assert [f.last(1000), Falling(2, 1, 0, 0).last(10)] == [700, 9]


def test_the_best_of_all_terms_stay_and_the_rest_goes_for_good():
    rows = {"a": Row(1.0, 9.0, 3.0), "b": Row(8.0, 2.0, 0.1)}
    rested = []
    s = Shrinking(rows, resize, Falling(3, 1, 0.0, 0.2), 2, lambda w: w,
                  lambda t, alive: (rested.append(alive), rest(t, alive)))
    s.start(10)
    for step in range(10):
        for row in rows.values():
            if not s.fixed:
                s.tensor_updated(row.w, torch.ones_like(row.w))
        s.after_update(step)
        if step == 7:
            assert sum(r.rank for r in rows.values()) == 6, "they may still come back"
    assert rows["a"].w.tolist() == [9.0] and rows["b"].w.tolist() == [8.0]
    assert len(rested) == 2 * 3 and not s.scores, "after updates 2, 4 and 6"
    again = Shrinking(rows, resize, Falling(3, 1, 0.0, 0.2), 2, lambda w: w, rest)
    again.load_state_dict(s.state_dict())
    again.after_update(9)
    assert again.fixed and rows["a"].rank == rows["b"].rank == 1


def test_a_run_of_unknown_length_shrinks_nothing():
    rows = {"a": Row(1.0, 2.0), "b": Row(3.0, 4.0)}
    s = Shrinking(rows, resize, Falling(2, 1, 0.0, 0.0), 1, lambda w: w, rest)
    s.start(None)
    for row in rows.values():
        s.tensor_updated(row.w, torch.ones(2))
    s.after_update(50)
    assert rows["a"].w.tolist() == [1.0, 2.0]
    assert s.budget(0) == s.budget(50) == 2 * 2


def grow(rows, **kw):
    how = {"goal": 5, "grow": 1, "top": 1, "warmup": 2, "every": 2, "label": "rows"} | kw
    return Rising(rows, resize, **how)


def test_who_matters_most_gains_until_its_most_and_then_the_others():
    rows = {"a": Row(1.0), "b": Row(1.0)}
    r = grow(rows)
    ranks = []
    for step in range(10):
        for name, row in rows.items():
            assert row.scoring == (r.left > 0)
            row.score = 5.0 if name == "b" else 1.0
        r.after_update(step)
        ranks.append((rows["a"].rank, rows["b"].rank))
    assert ranks == [(1, 1), *[(1, 2)] * 2, *[(1, 3)] * 2, *[(2, 3)] * 5]
    assert not rows["a"].scoring and rows["b"].had == 1
    assert 0 < float(rows["b"].w[1:].detach().abs().max()) < 0.1


def test_growth_is_counted_from_the_end_of_the_warmup():
    rows = {"a": Row(1.0)}
    r = grow(rows, goal=3, warmup=1, every=3)
    ranks = []
    for step in range(5):
        rows["a"].score = 3.0
        r.after_update(step)
        ranks.append(rows["a"].rank)
        assert step > 3 or rows["a"].score == 0.0, "the next update counts from nothing"
        assert rows["a"].scoring == (step < 3), "the last component is waited for"
    assert ranks == [2, 2, 2, 3, 3]


def test_in_a_simulation_nobody_matters_most_and_the_ranks_still_grow():
    with FakeTensorMode():
        rows = {"a": Row(1.0), "b": Row(1.0)}
        r = grow(rows, goal=3, warmup=1, every=1)
        for row in rows.values():
            row.score = torch.ones(())
        r.after_update(0)
    assert (rows["a"].rank, rows["b"].rank) == (2, 1)


def test_what_is_gained_is_drawn_from_label_name_and_step():
    made = []
    for label in ("rows", "rows", "others"):
        rows = {"a": Row(1.0)}
        r = grow(rows, label=label, goal=2)
        assert rows["a"].scoring, "one component is to be given"
        r.scores["a"].update(torch.ones(1))
        r.rise(7)
        made.append(rows["a"].w.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    g = torch.Generator().manual_seed(fold("rows", "a", 7) >> 1)
    assert torch.equal(made[0][1:], (0.02 * torch.randn(1, generator=g)).double())


def test_a_run_that_ends_before_anything_could_grow_is_refused():
    with pytest.raises(RecipeError, match="grows from update 9 on, and the run has 8: nothing "
                                          "would grow; try warmup=1, every=1"):
        grow({"a": Row(1.0)}, warmup=9).start(8)
    with pytest.raises(RecipeError, match="nothing would grow"):
        grow({"a": Row(1.0)}, warmup=9, goal=2).start(8)       # one component left is to be given
    grow({"a": Row(1.0)}, warmup=8).start(8)
    grow({"a": Row(1.0)}, warmup=0).start(1)
    with pytest.raises(RecipeError, match="from update 1 on, and the run has 0"):
        grow({"a": Row(1.0)}, warmup=0).start(0)
    grow({"a": Row(1.0)}, warmup=9).start(None)
    grow({"a": Row(1.0)}, warmup=9, goal=1).start(8)


def test_what_has_gone_can_be_taken_back():
    """As measuring does: state from before the last fall brings its scores with it."""
    rows = {"a": Row(1.0, 9.0, 3.0), "b": Row(8.0, 2.0, 0.1)}
    s = Shrinking(rows, resize, Falling(3, 1, 0.0, 0.2), 2, lambda w: w, rest)
    s.start(10)
    for row in rows.values():
        s.tensor_updated(row.w, torch.ones_like(row.w))
    before = s.state_dict()
    s.after_update(8)
    assert s.fixed and rows["a"].rank == 1
    rows["a"].w, rows["b"].w = (nn.Parameter(torch.ones(3)) for _ in "ab")
    s.load_state_dict(before)
    assert not s.fixed and s.pattern(2)["a"].tolist() == [False, True, False]


# -- growth by what has been learnt ----------------------------------------------------------------
def widening(rows, **kw):
    how = {"goal": 6, "grow": 1, "warmup": 0.2, "every": 2, "linear": True, "label": "rows"} | kw
    return Widening(rows, resize, **how)


def learn(row, by):
    with torch.no_grad():
        row.w[0] += by


def test_the_norm_that_rose_most_since_the_check_before_grows():
    rows = {"a": Row(5.0), "b": Row(1.0)}
    r = widening(rows, goal=4)
    r.start(10)
    ranks = []
    for step in range(10):
        learn(rows["b"], 1.0)
        r.after_update(step)
        ranks.append((rows["a"].rank, rows["b"].rank))
    # at update 2 the largest norm, at 4 the largest rise
    assert ranks == [(1, 1), (2, 1), (2, 1), *[(2, 2)] * 7]
    again = widening({"a": Row(1.0), "b": Row(1.0)})
    again.load_state_dict(r.state_dict())
    assert again.total == 10 and again.before.keys() == rows.keys()
    assert float(again.before["a"]) == float(rows["a"].extent())


@pytest.mark.parametrize("linear, tops", [(True, [1, 1, 4, 6, 8]), (False, [1, 1, 2, 4, 8])])
def test_how_many_grow_follows_the_law(linear, tops):
    r = widening({"a": Row(1.0)}, goal=9, linear=linear)
    assert [r.top(c) for c in (0.0, 0.1, 0.5, 0.75, 1.0)] == tops


def test_shares_of_the_way_are_counted_from_the_warmup():
    r = widening({"a": Row(1.0)}, goal=101, warmup=0.2, every=4)
    asked = []
    r.rise = lambda step, top: asked.append((step + 1, top))
    for total in (None, 10):
        r.start(total)
        for step in range(10):
            r.after_update(step)
    assert asked == [(2, 1), (6, 50), (10, 100)]
    r = widening({"a": Row(1.0)}, goal=1)
    r.start(10)
    r.rise = None
    r.after_update(1)                              # nothing is left


def test_one_update_after_the_warmup_is_the_whole_way():
    rows = {n: Row(0.0) for n in "abcd"}
    w = widening(rows, goal=8, warmup=0.8, every=1)
    seen = []
    w.rise = lambda step, top: seen.append((step, top))
    w.start(5)
    for step in range(5):
        w.after_update(step)
    assert seen == [(3, 1), (4, 4)]


def test_none_gains_more_than_it_can_have():
    rows = {"a": Row(1.0, 1.0), "b": Row(1.0)}
    r = widening(rows, goal=9, grow=2)
    r.start(4)
    r.after_update(0)
    r.widen(["a", "b"], 3)
    assert (rows["a"].rank, rows["b"].rank) == (3, 3) and (rows["a"].had, rows["b"].had) == (1, 2)
    r.widen(["a", "b"], 4)
    assert r.left == 3 and rows["a"].rank == 3


@pytest.mark.parametrize("make", [grow, widening])
def test_a_rehearsal_is_of_the_ranks_in_the_end(make):
    rows = {"a": Row(1.0), "b": Row(1.0, 1.0), "c": Row(1.0)}
    r = make(rows, goal=6)
    r.rehearse(0)
    assert r.left == 0 and [x.rank for x in rows.values()] == [2, 2, 2]
    r = make({"a": Row(1.0)}, goal=9)
    r.rehearse(0)
    assert r.terms["a"].rank == 3                  # its most


def test_in_a_simulation_nobody_rose_most():
    with FakeTensorMode():
        rows = {"a": Row(1.0), "b": Row(1.0)}
        r = widening(rows, warmup=0.0)
        r.start(9)
        r.rise(0, 1)
    assert (rows["a"].rank, rows["b"].rank) == (2, 1)


def test_scores_go_on_where_they_stood():
    rows = {"a": Row(1.0), "b": Row(1.0)}
    r = grow(rows, warmup=9)
    rows["a"].score, rows["b"].score = 3.0, 5.0
    r.after_update(0)
    again = grow({"a": Row(1.0), "b": Row(1.0)}, warmup=9)
    again.load_state_dict(r.state_dict())
    for name, s in r.scores.items():
        assert s.score() > 0 and torch.equal(again.scores[name].score(), s.score())
