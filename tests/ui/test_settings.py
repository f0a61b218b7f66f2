"""Settings of the page: that none of `fit` is forgotten, that each acts, and what is refused."""

from __future__ import annotations

import csv
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import ConfigError
from burnish.fit.arguments import LEAST, MOST, OF_TASK, Options, sort_out
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.tasks import TASKS
from burnish.ui import desk, settings
from burnish.ui.runs import READING

VIT = {"model": str(GLYPH_VIT), "data": "digits", "tops": []}


def ask(what, **how):
    told = desk.answer(what, how, lambda done, total: None)
    assert "error" not in told, told
    return told["answer"]


def refused(what, **how):
    return desk.answer(what, how, lambda done, total: None)["error"]


def test_every_option_of_fit_is_offered_or_left_out_with_a_reason():
    ours = {f.name for f in fields(Options)}
    offered = {f.name for f in settings.offered()}
    left = ours - offered - {*OF_TASK}
    assert left == {*settings.LEFT_OUT} - {"output"} and all(settings.LEFT_OUT.values())
    assert not offered & {*OF_TASK} and not offered & {*settings.LEFT_OUT}
    assert {f.name for f in settings.offered() if f.group == "Columns"} == {*READING}


@pytest.mark.parametrize("field", settings.offered(), ids=lambda f: f.name)
def test_each_is_a_setting_of_fit_with_a_word_about_it(field):
    assert field.help and field.acts in ("reading", "plan", "run")
    value = {"int": "3", "float": "0.5", "bool": "true", "str": "x",
             "choice": field.choices and field.choices[0]}[field.kind]
    own, args, _ = sort_out(settings.told({field.name: value}))
    canonical = settings.declared(field.name)[1]
    assert args.get(canonical, getattr(own, canonical, None)) is not None
    assert (field.least, field.most) == (LEAST.get(canonical), MOST.get(canonical))


@given(st.sampled_from([f for f in settings.offered() if f.kind in ("int", "float", "bool")]),
       st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.booleans(), st.none(),
                 st.lists(st.integers(), max_size=1)))
def test_what_is_no_value_is_refused_by_the_name_of_its_field(field, value):
    try:
        told = settings.told({field.name: value})
    except ConfigError as e:
        assert str(e).startswith(field.name)
        return
    if value is None:
        assert not told
        return
    found = told[field.name]
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}[field.kind]
    assert isinstance(found, kinds) and (field.kind == "bool") == isinstance(found, bool)
    assert field.least is None or found >= field.least
    assert field.most is None or found <= field.most


def test_what_is_not_offered_says_why_or_what_was_meant():
    for name, why in settings.LEFT_OUT.items():
        with pytest.raises(ConfigError, match=f"{name!r} is not set here: ") as e:
            settings.told({name: 1})
        assert why in str(e.value)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        settings.told({"learning_rat": 1})
    with pytest.raises(ConfigError, match="expected one of .*did you mean 'cosine'"):
        settings.told({"lr_scheduler_type": "cosin"})
    for name, value in (("label_smoothing_factor", 2), ("eval_steps", -1), ("save_steps", -0.5)):
        with pytest.raises(ConfigError, match=f"{name}={value}.*: expected "):
            settings.told({name: value})
    with pytest.raises(ConfigError, match="targets=3: expected text"):
        settings.told({"targets": 3})
    assert settings.told({"head": "false", "dtype": "bfloat16"}) == {
        "head": False, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", settings.SCHEDULES)
def test_each_schedule_asks_for_nothing_more(name):
    import torch
    from transformers import get_scheduler

    made = get_scheduler(name, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 2, 9)
    rates = []
    for _ in range(9):
        made.optimizer.step()
        made.step()
        rates.append(made.get_last_lr()[0])
    assert max(rates) == 1.0


def test_how_rows_are_read_acts_on_what_is_read(tmp_path):
    rows = tmp_path / "a.csv"
    with rows.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["said", "mood", "topic"])
        out.writerows([f"text {i}", "good" if i % 2 else "bad", "abc"[i % 3]] for i in range(40))
    given = {"data": str(rows), "tops": [str(tmp_path)]}
    asked = {"text": "said", "label": "topic"}
    assert ask("data", **given, how=asked)["labels"] == ["a", "b", "c"]
    kept = ask("data", **given, how=asked, settings={"validation": 0.25})["rows"]
    assert kept == {"train": 30, "validation": 10}
    assert ask("data", **given, how=asked, settings={"validation": 0})["rows"] == {"train": 40}
    one, other = (ask("data", **given, how=asked, settings={"seed": s})["samples"]
                  for s in (1, 2))
    assert one != other
    assert "did you mean 'topic'" in refused("data", **given, how={"text": "said",
                                                                   "label": "topics"})


def test_what_acts_on_the_plan_is_what_fit_promises(tmp_path):
    import burnish

    seen = []
    for told in ({}, {"dtype": "bfloat16"}, {"targets": "layers.0.*"}, {"accumulation": "2"}):
        given = settings.told(told)
        plan = ask("plan", **VIT, memory="1 GB", batch=32, candidates=["lora(rank=4)"],
                   settings=given)["recipes"][0]
        run = burnish.fit(str(GLYPH_VIT), "digits", recipe="lora(rank=4)", batch_size=32,
                          max_steps=1, quiet=True, measure=False, report=False, test=False,
                          output=tmp_path / f"out{len(seen)}", **given)
        assert run.promise.peak_bytes == plan["peak"] and run.promise.by_category == plan["by"]
        assert run.promise.trainable == plan["trainable"]
        seen.append((plan["peak"], plan["trainable"]))
        assert run.promise.accumulation == plan["accumulate"] == given.get("accumulation", 1)
    usual, half, few, twice = seen
    assert twice[0] > usual[0] and twice[1] == usual[1]     # gradients wait for the second batch
    assert half[0] < 0.75 * usual[0] and few[0] < usual[0] and few[1] < usual[1] == half[1]
    bare = ask("plan", model=str(GLYPH_VIT), memory="1 GB", batch=32, task="image-classification",
               candidates=["lora(rank=4)"], settings={"dtype": "bfloat16"})["recipes"][0]
    assert bare["peak"] < 0.75 * usual[0]


@pytest.mark.parametrize(("told", "why"), [
    ({"early_stopping_patience": 2, "eval_steps": 3, "max_steps": 9, "save_steps": 2},
     "early_stopping_patience=2 ends a run by"),
    ({"group_by_length": True}, "group_by_length puts rows of like length together"),
    ({"group": "topic"}, "group=")])
def test_what_fit_refuses_is_said_before_there_is_a_run(told, why):
    assert why in refused("check", **VIT, settings=settings.told(told))


def test_what_fit_takes_is_checked_and_taken():
    told = {"early_stopping_patience": 2, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
            "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 3, "max_steps": 20,
            "save_total_limit": 1, "test": "false", "tensorboard": "true"}
    assert ask("check", **VIT, settings=settings.told(told), recipe="lora(rank=4)") == {}
    assert "lora" in refused("check", **VIT, recipe="lara(rank=4)")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_idle_for_a_task_is_what_fit_refuses_there(task):
    from burnish.fit.order import by_length
    from burnish.fit.tasks import smooths

    def refuses(call, *how):
        try:
            call(*how)
        except ConfigError:
            return True
        return False

    idle = desk.idle_of(task)
    assert ("group_by_length" in idle) == refuses(by_length, task, True, None)
    assert ("label_smoothing_factor" in idle) == refuses(smooths, task, 0.1)
    assert ("group" in idle) == ("shots" not in [s["name"] for s in desk.asked_of(task)])
    assert {*idle} <= {f.name for f in settings.offered()}


def test_the_page_is_told_what_is_idle():
    assert ask("data", **{k: v for k, v in VIT.items() if k != "model"})["idle"] == [
        "group", "group_by_length"]
