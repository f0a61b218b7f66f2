"""Borders are simulated on both sides; concessions go from cheap to dear and each is simulated."""

from __future__ import annotations

import pytest

from burnish.core.errors import RecipeError
from burnish.memory.concessions import COSTS, State, concessions
from burnish.memory.limits import largest


@pytest.mark.parametrize("curve", [
    lambda n: 100 + 7 * n, lambda n: 100 + 7 * n + n * n // 50, lambda n: 100 + 64 * (n // 64),
    lambda n: max(900, 5 * n), lambda n: int(100 + 20 * n ** 0.5)])
@pytest.mark.parametrize("budget", [99, 107, 899, 1000, 5001])
@pytest.mark.parametrize("start", [1, 30, 4000])
def test_the_border_is_where_one_more_does_not_fit(curve, budget, start):
    asked = []

    def needs(n):
        asked.append(n)
        return curve(n)

    found = largest(needs, budget, start, most=4096)
    want = max((n for n in range(1, 4097) if curve(n) <= budget), default=0)
    assert found.most == want
    assert found.needs == (curve(want) if want else 0) and len(asked) == len(set(asked))
    assert found.above == (curve(want + 1) if want < 4096 else None)
    assert (want + 1 in asked or want == 4096) and (want in asked or want == 0)


def test_a_line_is_found_in_a_few_simulations():
    asked = []
    found = largest(lambda n: asked.append(n) or 10**9 + 123_457 * n, 24 * 10**9, 8)
    assert found.most == 23 * 10**9 // 123_457 and len(asked) <= 5


def test_what_the_model_forbids_is_said():
    found = largest(lambda n: n, 10**6, 8, most=512, why="no more positions")
    assert (found.most, found.above, found.why) == (512, None, "no more positions")


def look(state):
    """A model of 1000 bytes of weights whose tape takes 100 a sample of 64 tokens."""
    parts = state.recipe
    tape = 100 * state.samples * (state.tokens or 64) / 64
    time = 1.0
    if "checkpoint" in parts:
        tape, time = tape / 5, 1.3
    if "lean(level=3)" in parts:
        tape, time = tape / 2, 1.1
    return int((250 if "nf4" in parts else 1000) + tape), time


def quality(recipe):
    return 0.5 if "linear_probe" in recipe else 0.9


def test_nothing_is_given_up_where_it_fits():
    assert concessions(State("lora", 8), 10**6, look, quality) == []


def test_what_only_takes_time_comes_first_and_the_quickest_that_fits_is_taken():
    step, = concessions(State("lora", 8), 1500, look, quality)
    assert (step.what, step.costs) == ("4 samples at once, gradients accumulated", COSTS[0])
    assert step.fits and step.needs == 1400 and step.saves == 400
    one, = concessions(State("lora", 1), 1060, look, quality)
    assert one.what == "lean(level=3)" and one.time == pytest.approx(1.1)


def test_the_order_is_from_cheap_to_dear_and_each_is_what_look_says():
    steps = concessions(State("lora(rank=8)", 8, 512), 290, look, quality)
    dear = [COSTS.index(s.costs) for s in steps]
    assert dear == sorted(dear) and dear[-1] >= 3 and steps[-1].fits
    needs = look(State("lora(rank=8)", 8, 512))[0]
    for s in steps:
        assert s.needs == look(State(s.recipe, s.batch, s.tokens))[0] == needs - s.saves
        needs = s.needs


def test_where_all_of_it_is_not_enough_that_is_said():
    steps = concessions(State("lora", 4), 10, look, quality)
    assert steps and not steps[-1].fits


def test_what_the_model_refuses_is_no_way():
    def strict(state):
        if "checkpoint" in state.recipe or "lean" in state.recipe:
            raise RecipeError("no blocks")
        return look(state)

    steps = concessions(State("lora", 1), 300, strict, quality)
    assert steps[0].what == "nf4" and not any("checkpoint" in s.recipe for s in steps)
