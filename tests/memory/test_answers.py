"""A plan answers what a person asks beside the recipe, and refuses what contradicts itself."""

from __future__ import annotations

import json

import pytest

from burnish.core.errors import ConfigError
from burnish.memory import plan, simulate
from burnish.memory.gpus import gpu
from burnish.testing.models import config, tiny

FEW = ["full", "lora(rank=4)"]


def ask(**kw):
    return plan(config("llama"), **{"memory": "1GB", "batch": (2, 16), "candidates": FEW,
                                    "cache": False, "workers": 1, **kw})


@pytest.fixture(scope="module")
def told():
    return ask(memory=None, gpu="rtx 3060 12gb", rows=1001, epochs=3)


def test_hours_are_updates_times_the_seconds_of_one(told):
    assert (told.rows, told.epochs, told.updates) == (1001, 3.0, 3 * 501)
    for p in told:
        low, high = p.seconds
        assert 0 < low < high and p.hours == pytest.approx((1503 * low / 3600, 1503 * high / 3600))
        counted = simulate(config("llama"), p.recipe, (2, 16), device="cuda", count=True)
        assert p.seconds == pytest.approx(told.rates.seconds(counted))


def test_a_card_gives_budget_device_and_rates(told):
    card = gpu("RTX 3060 12GB")
    assert (told.budget, told.device, told.gpu) == (card.shows, "cuda", card.label)
    assert "published rates" in told.rates.source
    assert told.best.card == "RTX 2060 (6 GB)"
    assert "smallest card" in told.text() and "seconds" in told.text()
    assert max(map(len, told.text().splitlines())) <= 80


def test_all_of_it_is_data_too(told):
    data = json.loads(told.json())
    assert data["updates"] == 1503 and data["fits"][0]["hours"] == list(told.best.hours)
    assert data["rates"]["source"] == told.rates.source and data["gpu"] == told.gpu


def test_tokens_are_rows_of_the_batchs_length():
    assert ask(tokens=1600, candidates=["lora"]).updates == 50


def test_the_largest_batch_and_the_longest_sequence_fit_and_one_more_does_not():
    at = simulate(config("llama"), "lora(rank=4)", (5, 16)).peak_bytes
    plans = ask(memory=at, candidates=["lora(rank=4)"], limits=True)
    batch, length = plans.limits["largest batch of 16 tokens"], plans.limits[
        "longest sequence at batch 2"]
    assert batch.most >= 5 and batch.needs <= at < batch.above

    def peak(*shape):
        return simulate(config("llama"), "lora(rank=4)", shape).peak_bytes

    assert (peak(batch.most, 16), peak(batch.most + 1, 16)) == (batch.needs, batch.above)
    assert length.most > 16 and peak(2, length.most) == length.needs <= at
    assert length.why or peak(2, length.most + 1) == length.above > at
    assert f"largest batch of 16 tokens: {batch.most}" in plans.text()


def test_where_nothing_fits_it_says_what_to_give_up_first():
    whole = simulate(config("llama"), "lora(rank=4)", (1, 16)).peak_bytes
    plans = ask(memory=whole - 1, candidates=["lora(rank=4)"])
    assert not plans.fits and plans.concessions
    for s in plans.concessions:
        assert s.needs == simulate(config("llama"), s.recipe, (s.batch, s.tokens),
                                   accumulation=2 // s.batch).peak_bytes
    assert plans.concessions[-1].fits == (plans.concessions[-1].needs <= plans.budget)
    assert "give up in this order" in plans.text()


def test_what_fits_a_smaller_card_as_it_is_says_so():
    plans = ask(memory=None, gpu="RTX 4090", smaller="T4", candidates=["lora"])
    assert plans.held and not plans.concessions and "fits T4 (16 GB) as it is" in plans.text()


def test_a_long_recipe_does_not_widen_the_table():
    model = tiny("timm_qkv", meta=True)[0]
    long = "nf4 + lora(rank=4, alpha=16.0, dropout=0.125) + checkpoint + adamw(weight_decay=0.25)"
    text = plan(model, "1GB", 4, candidates=[long, "lora"], workers=1).text()
    table = [line for line in text.splitlines() if "nf4" not in line]
    assert max(map(len, table)) <= 80 and any("nf4" in line for line in text.splitlines())


@pytest.mark.parametrize(("kw", "says"), [
    ({"epochs": -1, "rows": 9}, "epochs=-1"), ({"rows": 0}, "rows=0"), ({"epochs": 2}, "rows="),
    ({"rows": 5, "tokens": 50}, "give one"), ({"tokens": 50, "batch": 2}, "samples, tokens"),
    ({"gpu": "T4", "memory": "24GB"}, "more than T4"), ({"gpu": "T4", "device": "cpu"}, "device"),
    ({"gpu": "RTX 4909"}, "RTX 4090"), ({"memory": "8GB", "smaller": "A100 80GB"}, "not smaller"),
    ({"memory": "1kB", "smaller": True}, "no card")])
def test_what_contradicts_itself_is_refused_beforehand(kw, says, monkeypatch):
    from burnish.memory.search import Search

    monkeypatch.setattr(Search, "report", lambda *a: pytest.fail("something was simulated"))
    with pytest.raises(ConfigError, match=says):
        ask(**kw)


@pytest.mark.parametrize("hours, said", [
    ((3.14, 5.9), "3.1-5.9 hours"), ((0.2, 0.21), "12-13 minutes"),
    ((27 / 3600, 28 / 3600), "27-28 seconds"), ((0.0, 0.0), "0.00 seconds")])
def test_a_time_is_said_in_the_unit_that_suits(hours, said):  # newcomer C8
    from burnish.memory.table import duration

    assert duration(hours) == said


def test_a_column_of_times_is_in_one_unit_and_a_ratio_says_of_what(told):
    short = ask(rows=40, candidates=["lora(rank=4)"])
    unit = next(u for u in ("hours", "minutes", "seconds") if u in short.text().splitlines()[2])
    assert unit == "seconds" and "seconds, without" in " ".join(short.text().split())
    assert "full fine-tuning being 1" in ask().text()
    assert "full fine-tuning being 1" not in told.text()


def test_what_a_device_keeps_for_itself_is_named(told):  # newcomer C8
    assert "600 MiB" in told.kept_back and "5 %" in told.kept_back
    said = " ".join(told.text().split())
    assert told.kept_back in said
    assert ask().kept_back == ""
    best = told.best
    assert best.needs == -(-best.peak_bytes * 105 // 100) + 600 * 2**20


def test_a_recipe_without_a_backward_has_not_the_quality_of_its_head():  # newcomer C8
    plans = ask(candidates=["mezo + lora(rank=4)", "lora(rank=4)"])
    assert [p.recipe.split("(")[0] for p in plans] == ["lora", "mezo + lora"]
    row = next(line for line in plans.text().splitlines() if "mezo" in line)
    assert " ? " in row
