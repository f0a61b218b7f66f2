"""A plan is a ranked list of promises within a budget."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.memory import measure, simulate
from burnish.memory import plan as make_plan
from burnish.memory.plan import PREFERENCES, _part, quality_of, shipped
from burnish.testing.models import config, tiny

FEW = ["full", "lora(rank=4)", "lora(rank=4) + checkpoint", "linear_probe"]


@pytest.fixture(scope="module")
def vit():
    return tiny("timm_qkv", meta=True)[0]


@pytest.fixture(scope="module")
def costs(vit):
    return {r: simulate(vit, r, 32).peak_bytes for r in FEW}


def test_what_fits_fits_and_the_rest_says_by_how_much(vit, costs):
    budget = sorted(costs.values())[2] + 1
    plans = make_plan(vit, budget, 32, candidates=FEW)
    assert plans.fits and plans.best is plans.fits[0]
    assert all(p.needs <= budget for p in plans.fits)
    assert all(p.needs > budget for p in plans.over)
    assert {p.recipe for p in [*plans.fits, *plans.over]} == {str(parse(r)) for r in FEW}
    assert plans.missing_bytes == 0


def test_each_plan_is_what_a_simulation_says(vit):
    plans = make_plan(vit, "1GB", 8, candidates=FEW)
    for p in plans:
        alone = simulate(vit, p.recipe, 8)
        assert p.peak_bytes == alone.peak_bytes and p.trainable == alone.trainable
        assert (p.batch, p.accumulate) == (8, 1)


def test_the_batch_is_halved_before_giving_up(vit, costs):
    recipe = "lora(rank=4)"
    small = simulate(vit, recipe, 8, accumulation=4).peak_bytes
    plans = make_plan(vit, small + 1, 32, candidates=[recipe])
    assert (plans.best.batch, plans.best.accumulate) == (8, 4)
    assert plans.best.peak_bytes == small
    odd = make_plan(vit, small + 1, 30, candidates=[recipe]).best
    assert odd.batch * odd.accumulate >= 30 and odd.batch <= 8


def test_nothing_fits_is_said_with_the_cheapest(vit):
    plans = make_plan(vit, "9kB", 4, candidates=FEW)
    assert plans.fits == [] and plans.best is None and len(plans) == 0
    assert plans.cheapest.batch == 1
    assert plans.missing_bytes == plans.cheapest.needs - 9_000 > 0
    assert "nothing fits" in plans.text() and plans.cheapest.recipe in plans.text()


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_preferences_order_the_list(vit, prefer):
    plans = make_plan(vit, "1GB", 8, prefer=prefer, candidates=FEW)
    best, least = (f(p.quality for p in plans) for f in (max, min))
    width = (best - least) / 20                     # what differs by less counts as equal
    key = {"quality": lambda p: (int((best - p.quality) / width), p.time),
           "speed": lambda p: p.time, "memory": lambda p: p.needs,
           "size": lambda p: p.adapter_bytes}[prefer]
    values = [key(p) for p in plans]
    assert values == sorted(values)


def test_of_recipes_that_are_as_good_the_faster_is_first(vit, monkeypatch):
    from importlib import import_module

    quality = import_module("burnish.memory.quality")
    for dora, first in ((0.801, "lora"), (0.85, "dora")):
        monkeypatch.setattr(quality, "priors", lambda dora=dora: {
            "lora": known(0.8), "dora": known(dora), "bitfit": known(0.7)})
        plans = make_plan(vit, "1GB", 8, candidates=["lora(rank=4)", "dora(rank=4)", "bitfit"])
        assert [p.recipe.split("(")[0] for p in plans][0] == first
        assert plans.fits[-1].recipe == "bitfit"


def test_relative_time_is_of_full_fine_tuning(vit):
    plans = {p.recipe: p for p in make_plan(vit, "1GB", 512, candidates=[
        "full", "full + checkpoint", "linear_probe", "lora(rank=4)"])}
    assert plans["full"].time == pytest.approx(1.0)
    assert plans["full + checkpoint"].time > 1.1
    assert plans["linear_probe"].time < 0.5 < plans["lora(rank=4)"].time


def test_what_a_model_cannot_do_is_listed_with_the_reason():
    model, batch = tiny("mlp")
    plans = make_plan(model, "1GB", batch, candidates=["lora", "lora + checkpoint"])
    assert [p.recipe for p in plans] == ["lora"]
    assert "blocks" in plans.refused["lora + checkpoint"]
    assert "not possible here" in plans.text()


def test_a_fitting_variant_spares_its_slower_sisters(vit):
    plans = make_plan(vit, "4GB", 2)
    names = [p.recipe for p in plans]
    assert "lora" in names and "lora + checkpoint" not in names
    able = [f for f in shipped() if f[0] not in plans.refused]
    assert sorted(names) == sorted(f[0] for f in able) and len(able) > 10


def test_shipped_candidates_are_real_recipes():
    families = shipped()
    assert len(families) >= 12
    for family in families:
        assert len(set(family)) == len(family)
        for recipe in family:
            assert str(parse(recipe)) == recipe


def known(score, spread=0.01, **kinds):
    return {"score": {"other": [score, spread], **kinds}, "source": "digits"}


def test_quality_comes_from_measurements_or_says_that_it_does_not(monkeypatch):
    from importlib import import_module

    quality = import_module("burnish.memory.quality")
    monkeypatch.setattr(quality, "priors", lambda: {
        "_": {}, "lora": known(0.8), "lora(rank=16)": known(0.85), "full": known(0.9),
        "mezo + lora": known(0.4)})
    assert quality_of("nf4 + lora(rank=4) + checkpoint") == (0.8, 0.01, "digits")
    assert quality_of("lora(rank=16)").score == 0.85 and quality_of("lora(rank=16)").known
    assert quality_of("mezo + lora").score == 0.4
    assert quality_of("mezo + full") == (0.4, 0.01, "no measured quality for mezo + full")
    middle = quality_of("bitfit")
    assert middle.score == pytest.approx((0.8 + 0.85 + 0.9 + 0.4) / 4)
    assert middle.spread == pytest.approx(0.1974, abs=1e-3)            # of the four scores
    assert "no measured quality" in middle.source and not middle.known


def test_quality_is_of_the_kind_of_task_where_it_was_measured(monkeypatch):
    from importlib import import_module

    quality = import_module("burnish.memory.quality")
    monkeypatch.setattr(quality, "priors", lambda: {"lora": known(0.8, text=[0.6, 0.002])})
    assert quality_of("lora", "text")[:2] == (0.6, 0.002)
    assert quality_of("lora", "sound")[:2] == quality_of("lora")[:2] == (0.8, 0.01)


@pytest.mark.parametrize(("name", "kind"), [
    ("vit", "image"), ("bert", "text"), ("llama", "language"), ("t5", "language"),
    ("whisper", "sound"), ("mlp", "table")])
def test_the_kind_of_a_task_is_read_off_what_a_model_is_called_with(name, kind):
    from burnish.memory.quality import kind_of

    model, batch = tiny(name)
    assert kind_of(model, batch) == kind


def test_a_plan_says_how_sure_its_quality_is(vit):
    plans = make_plan(vit, "1GB", (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])),
                      candidates=["ssf", "bitfit"], loss=lambda out, batch: out.logits.sum())
    first = plans.best
    assert first.spread > 0
    assert f"{first.quality:.2f} ± {first.spread:.2f}" in " ".join(plans.text().split())
    assert json.loads(plans.json())["fits"][0]["spread"] == first.spread
    assert "pictures" in " ".join(plans.notes)


def test_the_prior_is_what_the_runs_of_the_board_make():
    """src/burnish/memory/quality.json is generated: python benchmarks/quality.py"""
    import importlib.util
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("made", root / "benchmarks" / "quality.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.made() == made.OUT.read_text("utf-8")


def test_every_candidate_is_on_the_board_in_some_form():
    for family in shipped():
        head = family[0]
        assert quality_of(head).known or "mezo" in head, head


def test_plans_as_data_and_as_text(vit):
    plans = make_plan(vit, "1GB", 4, candidates=FEW)
    data = json.loads(plans.json())
    assert [p["recipe"] for p in data["fits"]] == [p.recipe for p in plans]
    assert data["budget"] == 10**9 and "timeline" not in data["fits"][0]["report"]
    text = plans.text()
    for p in plans:
        assert p.recipe in text and f"{p.trainable:,}" in text


def test_a_batch_of_tensors_is_cut_by_samples():
    model, batch = tiny("timm_qkv", batch=8)
    part = _part(batch, 3)
    assert all(v.shape[0] == 3 for v in part.values() if isinstance(v, torch.Tensor))
    plans = make_plan(model, "1GB", batch, candidates=["lora"])
    assert plans.batch == 8
    assert plans.best.peak_bytes == measure(burnish.tune(model, "lora"), batch).peak_bytes


def test_a_config_is_enough():
    plans = make_plan(config("llama"), "1GB", (2, 16), candidates=["lora", "nf4 + lora"])
    assert len(plans) == 2


def test_an_accelerator_keeps_a_share_for_itself(vit):
    plans = make_plan(vit, "1GiB", 4, candidates=["lora"], device="cuda")
    assert plans.best.needs > plans.best.peak_bytes + 500 * 2**20


@pytest.mark.parametrize(("kw", "says"), [
    ({"memory": "plenty"}, "8GB"), ({"prefer": "qality"}, "quality"), ({"batch": 0}, "positive"),
    ({"batch": (4, -1)}, "positive"), ({"batch": {"x": 3}}, "tensor"),
    ({"batch": {"pictures": torch.ones(2, 3)}}, "pictures")])
def test_calls_that_make_no_sense(vit, kw, says):
    with pytest.raises(ConfigError, match=says):
        make_plan(vit, **{"memory": "1GB", "batch": 2, "candidates": ["lora"], **kw})


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_candidates_one_by_one(vit, workers):
    told: list[tuple[int, int]] = []
    make_plan(vit, "1GB", 8, candidates=FEW, workers=workers,
              progress=lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == len(FEW)
    assert {total for _, total in told} == {len(FEW)}


def test_an_interrupted_search_leaves_no_process_behind(vit):
    before = set(multiprocessing.active_children())

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_plan(vit, "1GB", 8, candidates=[f"lora(rank={r})" for r in range(1, 9)], workers=2,
                  progress=interrupt)
    assert set(multiprocessing.active_children()) <= before
