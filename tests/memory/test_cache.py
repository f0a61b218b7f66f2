"""Reports of earlier searches: found again, made again where broken, never an error."""

from __future__ import annotations

import json
import os
import threading

import pytest

import burnish
from burnish.core.errors import BurnishError
from burnish.memory import cache as kept
from burnish.memory import simulate
from burnish.memory.cache import Refused, Reports
from burnish.testing.models import config

RECIPES = ["full", "lora(rank=2)", "linear_probe"]


@pytest.fixture
def report():
    return simulate(config("llama"), "lora(rank=2)", (2, 8), count=True)


def never():
    raise AssertionError("it was there already")


def test_a_report_is_made_once_and_comes_back_the_same(tmp_path, report):
    reports = Reports({"config": 1}, tmp_path)
    assert reports.get("lora", 2, lambda: report) is report
    assert Reports({"config": 1}, tmp_path).get("lora", 2, never).to_dict() == report.to_dict()


def test_another_question_has_another_name(tmp_path, report):
    names = {Reports(about, tmp_path).path(recipe, batch)
             for about in ({"config": 1}, {"config": 2}) for recipe in ("lora", "full")
             for batch in (2, (2, 8))}
    assert len(names) == 8


def test_other_code_asks_again(tmp_path, monkeypatch, report):
    reports = Reports({}, tmp_path)
    before = reports.path("lora", 2)
    monkeypatch.setattr(kept, "_surroundings", lambda: {"code": "other"})
    assert reports.path("lora", 2) != before


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"report": {}}', '{"report": 3}', "\x00"])
def test_a_broken_entry_is_made_again(tmp_path, report, broken):
    reports = Reports({}, tmp_path)
    reports.path("lora", 2).write_text(broken)
    assert reports.get("lora", 2, lambda: report) is report
    assert reports.get("lora", 2, never).to_dict() == report.to_dict()


def test_a_refusal_is_kept_with_its_reason(tmp_path):
    reports = Reports({}, tmp_path)

    def refuse():
        raise BurnishError("no biases here")

    with pytest.raises(BurnishError, match="no biases"):
        reports.get("bitfit", 2, refuse)
    with pytest.raises(Refused, match="no biases"):
        reports.get("bitfit", 2, never)


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path, report):
    (tmp_path / "file").write_text("")
    reports = Reports({}, tmp_path / "file" / "below")
    assert reports.get("lora", 2, lambda: report) is report
    reports.tidy()


def test_two_may_write_at_once(tmp_path, report):
    reports = [Reports({}, tmp_path) for _ in range(8)]
    threads = [threading.Thread(target=r.get, args=("lora", 2, lambda: report)) for r in reports]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [f.suffix for f in tmp_path.iterdir()] == [".json"]
    assert reports[0].get("lora", 2, never).to_dict() == report.to_dict()


def test_the_oldest_half_goes_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 4)
    for n in range(6):
        (tmp_path / f"{n}.json").write_text("{}")
        os.utime(tmp_path / f"{n}.json", (n, n))
    Reports({}, tmp_path).tidy()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["3.json", "4.json", "5.json"]


def test_a_second_plan_reads_what_the_first_has_made(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path))
    ask = lambda **kw: burnish.plan(config("llama"), "1GB", (2, 8), candidates=RECIPES,  # noqa: E731
                                    **kw)
    first = ask()
    made = sorted(f.name for f in tmp_path.iterdir())
    assert len(made) == len(RECIPES)
    module = __import__("importlib").import_module("burnish.memory.search")
    monkeypatch.setattr(module, "simulate", lambda *a, **k: never())
    assert ask().to_dict() == first.to_dict()
    with pytest.raises(AssertionError):
        ask(cache=False)
    assert json.loads((tmp_path / made[0]).read_text())["report"]["peak_bytes"] > 0


def test_two_processes_find_what_one_finds(tmp_path):
    recipes = [*RECIPES, "nf4 + lora(rank=2)", "full + checkpoint"]
    alone, both = (burnish.plan(config("llama"), "1GB", (2, 8), candidates=recipes, cache=False,
                                workers=n) for n in (1, 2))
    assert alone.to_dict() == both.to_dict()


def test_lean_and_its_twin_are_one_row():
    plans = burnish.plan(config("llama"), "1GB", (2, 8), cache=False,
                         candidates=["lora(rank=2)", "lora(rank=2) + lean"])
    assert [p.recipe for p in plans] == ["lora(rank=2)"]
