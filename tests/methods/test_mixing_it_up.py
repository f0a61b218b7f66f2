"""Mixing It Up: what is drawn, in which order, and what a target gains by company."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import burnish
from burnish.blocks.choose.cocktail import Cocktail, shares
from burnish.methods.lifecycle.mixing_it_up import Report

SIZES = {"a": 100, "b": 400, "c": 50}


def method(**kw):
    said = ", ".join(f"{k}={v!r}" for k, v in kw.items())
    return burnish.parse(f"mixing_it_up({said})")[0]


@pytest.mark.parametrize("kw, weights, want", [
    ({"sampling": "size"}, None, {"a": 100 / 550, "b": 400 / 550, "c": 50 / 550}),
    ({"sampling": "size", "temperature": 2.0}, None,
     {"a": 10 / (10 + 20 + 50 ** 0.5), "b": 20 / (10 + 20 + 50 ** 0.5),
      "c": 50 ** 0.5 / (10 + 20 + 50 ** 0.5)}),
    ({"sampling": "weights"}, {"a": 1.0, "b": 0.0, "c": 3.0}, {"a": 0.25, "b": 0.0, "c": 0.75})])
def test_what_is_drawn_is_what_was_asked_for(kw, weights, want):
    n = 4000
    got = Counter(name for name, _ in islice(method(**kw).stream(SIZES, weights), n))
    for name, p in want.items():
        assert abs(got[name] / n - p) <= 4 * (p * (1 - p) / n) ** 0.5, (name, got[name] / n, p)


def test_the_union_has_every_row_once_a_pass_and_each_pass_another_order():
    drawn = list(islice(method().stream(SIZES), 1100))
    every = {(n, i) for n, size in SIZES.items() for i in range(size)}
    assert set(drawn[:550]) == every == set(drawn[550:]) and len(every) == 550
    assert drawn[:550] != drawn[550:]
    assert {n for n, _ in drawn[:20]} >= {"a", "b"}      # shuffled, not one set after the other


def test_rows_of_a_set_come_once_before_any_comes_twice():
    drawn = [i for n, i in islice(method(sampling="size").stream(SIZES), 2000) if n == "c"]
    assert sorted(drawn[:50]) == list(range(50)) == sorted(drawn[50:100])
    assert drawn[:50] != drawn[50:100]


@pytest.mark.parametrize("kw", [{}, {"sampling": "size"}])
def test_a_stream_goes_on_where_it_was(kw):
    m = method(**kw, seed=3)
    whole = list(islice(m.stream(SIZES), 900))
    first = m.stream(SIZES)
    assert list(islice(first, 613)) == whole[:613]
    again = m.stream(SIZES)
    again.load_state_dict(first.state_dict())
    assert list(islice(again, 287)) == whole[613:]
    assert whole != list(islice(method(**kw, seed=4).stream(SIZES), 900))
    with pytest.raises(burnish.ConfigError, match="these data sets have"):
        m.stream({"a": 1}).load_state_dict(first.state_dict())


def digits():
    """Three data sets of one kind of picture: few rows of the target, many of its relations."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    rows = [{"x": (x[i] / 16).round(3).tolist(), "y": int(y[i])} for i in order]
    data = {"target": rows[:40], "near": rows[40:640], "far": [
        {"x": r["x"][::-1], "y": r["y"]} for r in rows[640:900]], "noise": [
        {"x": np.random.default_rng(i).random(64).tolist(), "y": i % 10} for i in range(200)]}
    return data, {"target": rows[900:1300], "near": rows[1300:1500]}


def train(rows):
    return LogisticRegression(max_iter=300).fit([r["x"] for r in rows], [r["y"] for r in rows])


def score(model, task, rows):
    return model.score([r["x"] for r in rows], [r["y"] for r in rows])


def test_a_report_compares_the_target_alone_with_every_cocktail():
    data, held = digits()
    data["near"] = [*data["near"], *held["target"][:7]]              # a leak
    report = method().lifecycle(data, "target", train, score, held=held, general="noise")
    assert list(report.figures) == ["target", "target + near", "target + far", "all",
                                    "all + noise"]
    assert all(set(f) == {"target", "near"} for f in report.figures.values())
    assert report.left_out == {"target": 0, "near": 7, "far": 0, "noise": 0}
    assert report.rows["target + near"] == {"target": 40, "near": 600}
    alone = train([r for r in data["target"]])
    assert report.figures["target"]["target"] == score(alone, "target", held["target"])
    assert report.gain("target + near") > 0.1 and report.gain("target") == 0
    assert report.figures[report.best]["target"] == max(
        f["target"] for f in report.figures.values())
    text = str(report)
    assert all(name in text for name in report.figures) and "gain" in text and "near" in text


def test_the_best_mixture_is_the_target_s_and_drawn_by_the_weights_that_are_given():
    data = {"t": [0] * 30, "r": [1] * 30, "g": [2] * 30}
    seen = []

    def few(rows):
        seen.append(Counter(rows))
        return seen[-1]

    report = method(sampling="weights").lifecycle(
        data, "t", few, lambda m, task, rows: float(m[1] if task == "t" else -m[1]),
        held={"t": [9], "r": [9]}, general="g", count=200, weights={"t": 1.0, "r": 3.0, "g": 0.0})
    assert [sum(c.values()) for c in seen] == [200] * 3 and all(not c[2] for c in seen)
    assert report.rows["all"] == {"t": seen[1][0], "r": seen[1][1]}
    assert seen[0] == {0: 200} and 130 < seen[1][1] < 170              # 3 of 4
    assert report.best == max(report.figures, key=lambda m: report.figures[m]["t"]) != "t"
    other = Report("t", {"t": {"t": 0.2, "r": 0.9}, "b": {"t": 0.7, "r": 0.1},
                         "c": {"t": 0.5, "r": 0.5}}, {}, {})
    assert other.best == "b"
    assert method().settings() == {"targets": None, "sampling": "union", "temperature": 1.0,
                                   "seed": 0}


def test_the_comparisons():
    m = method()
    assert dict(m.mixtures(["t", "r"], "t")) == {"t": ("t",), "all": ("t", "r")}
    assert dict(m.mixtures(["t", "g"], "t", general="g")) == {"t": ("t",), "t + g": ("t", "g")}
    assert dict(m.mixtures(["a", "t", "b", "g", "m"], "t", "g", "m")) == {
        "t": ("t",), "t + a": ("t", "a"), "t + b": ("t", "b"), "all": ("t", "a", "b"),
        "all + g": ("t", "a", "b", "g"), "all + m": ("t", "a", "b", "m")}


def test_rows_for_a_run_and_how_many():
    data = {"a": ["a0", "a1"], "b": ["b0", "b1", "b2"]}
    assert sorted(method().rows(data)) == ["a0", "a1", "b0", "b1", "b2"]
    some = method(sampling="weights").rows(data, 7, {"a": 1.0, "b": 0.0})
    assert len(some) == 7 and set(some) == {"a0", "a1"}


@pytest.mark.parametrize("text, why", [
    ("mixing_it_up(sampling='other')", "expected union, size or weights"),
    ("mixing_it_up(sampling='size', temperature=0.0)", "above 0"),
    ("mixing_it_up(temperature=2.0)", "does nothing"),
    ("mixing_it_up(targets='q')", "targets")])
def test_settings_that_cannot_act_are_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.parse(text)


def test_data_that_cannot_be_mixed_are_refused():
    data, held = {"a": [1, 2], "b": [3]}, {"a": [9]}
    with pytest.raises(burnish.ConfigError, match="no data set 'c'"):
        method().lifecycle(data, "a", train, score, held=held, general="c")
    with pytest.raises(burnish.ConfigError, match="held-out rows of 'b'"):
        method().lifecycle(data, "b", train, score, held=held)
    with pytest.raises(burnish.ConfigError, match="every row of 'b' is held out"):
        method().lifecycle(data, "a", train, score, held={"a": [3]})
    with pytest.raises(burnish.ConfigError, match="go together"):
        method().stream(SIZES, {"a": 1.0})
    with pytest.raises(burnish.ConfigError, match="of one side alone"):
        shares({"a": 1}, {"b": 1.0})
    with pytest.raises(burnish.ConfigError, match="one of them above"):
        shares({"a": 1}, {"a": 0.0})
    with pytest.raises(burnish.ConfigError, match="a row or more"):
        Cocktail({"a": 0}, None, 0)
