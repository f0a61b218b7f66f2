"""The table, the streams that every machine has, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.continual.plane import network, plane

import burnish
from burnish.cli import main
from burnish.continual import Training, real
from burnish.continual import report as module
from burnish.continual.report import Line, Report
from burnish.core.errors import ConfigError

QUICK = Training(epochs=1, batch=8, rate=3e-2)


def test_a_table_beside_the_baselines():
    lines = []
    report = burnish.continual(lambda s: plane(seed=s), ["lora(rank=2)", "lora(rank=2) + o_lora"],
                               seeds=2, training=QUICK, say=lines.append)
    assert isinstance(report, Report) and report.seeds == (0, 1) and lines
    assert [(x.recipe, x.learner) for x in report.lines] == [
        ("lora(rank=2)", "joint"), ("lora(rank=2)", "sequential"), ("lora(rank=2)", "replay"),
        ("lora(rank=2) + o_lora", "joint"), ("lora(rank=2) + o_lora", "sequential"),
        ("lora(rank=2) + o_lora", "replay"), ("linear_probe", "sequential")]
    assert "all at once" in report.lines[3].refused
    assert [len(x.results) for x in report.lines] == [2, 2, 2, 0, 2, 2, 2]
    text = str(report)
    assert "rows do not say their task" in text and "is refused: o_lora trains one task" in text
    assert text.count("refused") == 2 and " ± " in text
    row = next(r for r in text.splitlines() if r.startswith("lora(rank=2)  ") and "sequential" in r)
    last = report.lines[1].figures("last")
    assert f"{100 * sum(last) / 2:.1f}" in row
    assert report.page().count("\n| `") == 7
    told = json.loads(json.dumps(report.to_dict()))
    assert told["rows"][1]["last"]["mean"] == pytest.approx(sum(last) / 2)
    assert told["rows"][0]["forgetting"] is None and "refused" in told["rows"][3]
    assert len(told["rows"][1]["runs"][0]["accuracies"]) == 3


def test_a_row_that_cannot_be_learnt_leaves_the_others():
    report = burnish.continual(plane(), ["lora(rank=2)", "lora(rank=2, targets='nowhere')"],
                               learners=["lae", "conpet"], baselines=False, training=QUICK)
    assert "freeze=0 or less" in report.lines[0].refused and report.lines[1].results
    assert "nowhere" in report.lines[3].refused
    wild = replace(plane(), logits=lambda out: out * float("nan"))
    with pytest.raises(ConfigError, match="nothing could be learnt: the loss is nan"):
        burnish.continual(wild, "full", baselines=False)
    with pytest.raises(ConfigError, match="a head of 6 classes"):        # the stream is wrong
        burnish.continual(replace(plane(), model=lambda: network(4)), "full")


def test_a_row_that_breaks_leaves_those_that_are_done(monkeypatch):
    """Whatever it breaks with: the hours before it are not lost."""
    real, seen = module.run, []

    def run(*a, **k):
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("a kernel gave up")
        return real(*a, **k)

    monkeypatch.setattr(module, "run", run)
    report = burnish.continual(plane(), ["lora(rank=2)", "full", "bitfit"], baselines=False,
                               training=QUICK)
    assert [bool(x.results) for x in report.lines] == [True, False, True]
    assert report.lines[1].refused == "RuntimeError: a kernel gave up"


def test_one_recipe_one_learner_no_baselines():
    report = burnish.continual(plane(), "full", learners=["replay(memory=7)"], baselines=False,
                               training=QUICK)
    assert [x.learner for x in report.lines] == ["replay(memory=7)"]
    alone = burnish.continual(plane(), burnish.parse("full")[0], baselines=False, training=QUICK)
    assert [x.learner for x in alone.lines] == ["sequential"]
    assert report.lines[0].results[0].stored[-1].samples == 7


@pytest.mark.parametrize("stream, recipes, how, why", [
    ("digit", "full", {}, "did you mean 'digits'"), (plane(), [], {}, "learnt with a recipe"),
    (plane(), "full", {"seeds": 0}, "how many, or which"),
    (plane(), "full", {"seeds": True}, "how many, or which"),
    (plane(), "full", {"scenario": "task"}, "of a named stream"),
    ("tables", "full", {"scenario": "class"}, "stream is of domains"),
    ("digits", "full", {"scenario": "clas"}, "'class', 'domain' or 'task'"),
    ("tables", "full", {"scenario": "clas"}, "'class', 'domain' or 'task'"),
    ("digits", "full", {"seeds": [-1]}, "order=-1: expected a seed"),
    (3, "full", {}, "not a int"), (plane(), "full", {"learners": ["lay"]}, "no learner 'lay'"),
    (plane(), "poly(tasks=3)", {}, "nothing could be learnt"),
    (plane(), "lorra", {}, "did you mean 'lora'")])
def test_what_is_no_table_is_refused(stream, recipes, how, why):
    with pytest.raises(ConfigError, match=why):
        burnish.continual(stream, recipes, **{"baselines": False, **how})


def test_figures_that_have_no_meaning_are_empty():
    assert Line("a", "b", refused="c").cells()[2] == "refused"


@pytest.mark.parametrize("name, scenario, tasks, width", [
    ("digits", "class", 5, 10), ("digits", "task", 5, 10), ("digits", "domain", 5, 2),
    ("text", "domain", 5, 2), ("text", "class", 5, 10), ("tables", "domain", 4, 2)])
def test_streams_that_every_machine_has(name, scenario, tasks, width):
    made = real.named(name, scenario)
    stream, other = made(0), made(1)
    assert len(stream.tasks) == tasks and stream.width == width and stream.scenario == scenario
    assert [t.name for t in stream.tasks] != [t.name for t in other.tasks]
    again = made(0)
    assert [t.name for t in again.tasks] == [t.name for t in stream.tasks]
    assert stream.content == again.content
    rows = [stream.collate([x for x, _ in t.test[:2]]) for t in stream.tasks[:1]]
    model = stream.model().eval()
    with torch.no_grad():
        out = model(**rows[0]) if isinstance(rows[0], dict) else model(rows[0])
    assert stream.logits(out).shape == (2, width)
    if scenario != "domain":
        assert stream.shape == ("class" if scenario == "class" else "task", (2,) * 5)
    if name == "digits":                             # all 1,797 scans, the second half to test
        assert sum(len(t.test) for t in stream.tasks) == 899 or scenario == "domain"
        assert sum(len(t.train) + len(t.test) for t in made(1993).tasks) <= 1797
    train = {repr(x) for t in stream.tasks for x, _ in t.train}
    assert name == "digits" or not train & {repr(x) for t in stream.tasks for x, _ in t.test}


def test_settings_chosen_on_text_may_be_judged_on_digits():
    text, digits = real.named("text", "class")(0), real.named("digits", "class")(0)
    assert text.shape == digits.shape and text.data != digits.data


def test_the_command(capsys, tmp_path):
    page = tmp_path / "page.md"
    call = ["continual", "lora(rank=2)", "--stream", "tables", "--epochs", "1", "--learner",
            "replay(memory=9)", "--page", str(page)]
    assert main(call) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tables, by domain: 4 tasks") and "replay(memory=9)" in out
    assert "linear_probe" in out and "1 epochs" in out and "task 1 of 4" in err
    assert page.read_text().startswith("## tables, by domain")
    assert main([*call[:-2], "--json", "--no-baselines", "--rate", "0.01"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [r["learner"] for r in told["rows"]] == ["replay(memory=9)"]
    assert told["training"]["rate"] == 0.01
    assert main(["continual", "full", "--stream", "pictures"]) == 2
    capsys.readouterr()
    assert main([*call[:-1], str(tmp_path)]) == 1    # a folder; said before anything is learnt
    assert "task 1 of 4" not in (said := capsys.readouterr().err) and "is a folder" in said
    assert main(["continual", "full", "--stream", "tables", "--learner", "replai"]) == 2
