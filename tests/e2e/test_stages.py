"""A run in stages, from the command line and from Python: two tasks one after the other, the first
adapter frozen and active while the second trains; killed anywhere it ends in the same weights."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, FormatError
from burnish.core.method import Method, setting
from burnish.core.stage import Stage
from burnish.fit import checkpoint, loop, watch
from burnish.formats import safe

RECIPE = "lora(rank=2, dropout=0.1) + o_lora(weight=2.0)"
QUIET = {"batch_size": 4, "lr": 1e-2, "logging_steps": 1, "seed": 3, "report": False,
         "measure": False, "quiet": True}


def lines(path, word, n):
    path.write_text("".join(json.dumps({"prompt": f"{word} {i % 4}",
                                        "completion": f"{word} it is {i % 3}"}) + "\n"
                            for i in range(n)))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 and 30 rows, of which 18 and 27 train: 5 and 7 updates of 4 an epoch."""
    folder = tmp_path_factory.mktemp("tasks")
    return {"cats": lines(folder / "cats.jsonl", "the cat", 20),
            "money": lines(folder / "money.jsonl", "stocks", 30)}


@pytest.fixture(scope="module")
def whole(qwen, data, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    burnish.fit(str(qwen), data, RECIPE, output=folder, epochs=1, **QUIET)
    return folder


@dataclass(frozen=True, kw_only=True)
class HeadFirst(Method):
    """Head first, then the rest: the head alone for a share of the run, then all that trains."""

    paper: ClassVar[str] = "Fine-Tuning can Distort Pretrained Features (2022), arXiv:2202.10054"

    share: float = setting(0.5, "of the run, for the head alone")
    schedule: str = setting("restart", "of the second stage")

    def stages(self, tuned, tasks):
        heads = tuple(tuned.anatomy.head)
        yield Stage(tuned.training, until=self.share, only=lambda n: n.startswith(heads))
        yield Stage(tuned.training, optimizer={"lr": 1e-3}, schedule=self.schedule)


@pytest.fixture(scope="module", autouse=True)
def head_first():
    from burnish.core import registry

    burnish.register(HeadFirst, "head_first")
    yield
    registry._EXTRA.pop("head_first", None)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder):
    return safe.load_file(folder / "adapter_model.safetensors")


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- from the command line ------------------------------------------------------------------------
@pytest.mark.slow
def test_two_tasks_from_the_command_line(qwen, data, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["fit", "--model", str(qwen), "--data", f"cats={data['cats']}",
                 "--data", f"money={data['money']}", "--recipe", RECIPE, "--output", str(out),
                 "--max_steps", "12", "--batch_size", "4", "--lr", "1e-2", "--logging_steps", "1"])
    said, err = capsys.readouterr()
    assert code == 0, err
    assert "stage 1/2 cats: 5 updates" in said and "stage 2/2 money: 7 updates" in said
    facts = json.loads((out / "run.json").read_text())
    one, two = facts["stages"]
    assert (one["first"], one["steps"], one["beside"]) == (1, 5, {})
    assert (two["first"], two["steps"], two["beside"]) == (6, 7, {"cats": 1.0})
    assert set(facts["metrics"]) == {"cats validation", "money validation"}
    memory = facts["memory"]["simulated"]
    assert memory["peak_bytes"] == max(memory["stages"].values()) and len(memory["stages"]) == 2
    assert abs(facts["memory"]["difference"]) < 0.05, "measured in the stage that was promised"
    losses = [(r["step"], r["stage"]) for r in rows(out) if "loss" in r]
    assert losses == [(n, "1/2 cats" if n <= 5 else "2/2 money") for n in range(1, 13)]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "<h2>Stages</h2>" in page and "2/2 money" in page and "## Stages" in card

    assert main(["evaluate", str(out), data["money"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"]["loss"] == pytest.approx(facts["metrics"]["money validation"]["loss"])
    assert main(["simulate", str(qwen), "--recipe", RECIPE, "--tasks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["stages"]) == {"1/2 task1", "2/2 task2"}
    assert report["peak_bytes"] == max(report["stages"].values())


def test_the_first_adapter_is_active_and_stays_while_the_second_trains(qwen, data, tmp_path):
    from transformers import AutoModelForCausalLM

    seen = []

    class Look(watch.Stop):
        def on_step_end(self, args, state, control, model=None, **kw):
            from burnish.engine.owners import tuned_of

            tuned = tuned_of(model)
            seen.append((tuned.training, dict(tuned.state.active),
                         {n: p.detach().clone() for n, p in model.named_parameters()
                          if ".cats." in n}))

    run = burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "out", epochs=1,
                      callbacks=[Look()], **QUIET)
    assert [s[0] for s in seen] == ["cats"] * 5 + ["money"] * 7
    assert seen[-1][1] == {"cats": 1.0, "money": 1.0}
    learnt = seen[4][2]
    assert all(torch.equal(learnt[n], t) for s in seen[5:] for n, t in s[2].items())
    again = burnish.load(AutoModelForCausalLM.from_pretrained(qwen), tmp_path / "out")
    assert set(again.adapters) == {"cats", "money"} and again.training == "money"
    ids = torch.tensor([[5, 6, 7, 8]])
    run.tuned.model.eval(), again.model.eval()
    both = run.tuned.model(ids).logits
    assert torch.equal(again.model(ids).logits, both)
    again.use("money")
    assert not torch.allclose(again.model(ids).logits, both)


# -- going on --------------------------------------------------------------------------------------
def stopped(at, folder, *args, **kw):
    """Ctrl-C in the step `at` of the whole run."""
    class Stop(watch.Stop):
        def on_step_end(self, a, state, control, **more):
            count.append(1)
            if len(count) == at:
                self.asked = signal.SIGTERM
            super().on_step_end(a, state, control, **more)

    count, kept = [], watch.Stop
    watch.Stop = Stop
    try:
        with pytest.raises(KeyboardInterrupt, match=f"after step {at}"):
            burnish.fit(*args, output=folder, **kw)
    finally:
        watch.Stop = kept


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 5, 6, 9, 12])
def test_stopped_in_any_stage_it_ends_in_the_same_weights(qwen, data, whole, tmp_path, at):
    """In the first stage, at its end, in the second's first step, in the middle, at the end."""
    how = {**QUIET, "epochs": 1}
    stopped(at, tmp_path / "broken", str(qwen), data, RECIPE, **how)
    assert checkpoint.all_in(tmp_path / "broken")[-1].name == f"checkpoint-{at}"
    kept = json.loads((tmp_path / "broken" / f"checkpoint-{at}" / "loop.json").read_text())["tree"]
    assert kept["stage"] == (0 if at <= 5 else 1)
    run = burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "broken", resume=True, **how)
    assert same(whole, tmp_path / "broken")
    a, b = ([(r["step"], r["stage"], r["loss"]) for r in rows(folder) if "loss" in r]
            for folder in (whole, tmp_path / "broken"))
    assert a == b
    assert [s["steps"] for s in run.facts["stages"]] == [5, 7]
    assert [h["step"] for h in run.history if "loss" in h] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["step", "name", "begin"])
def test_killed_in_the_second_stage_it_goes_on_there(qwen, data, tmp_path, point):
    """SIGKILL in the second stage: in a step, once its first checkpoint has its name, and before
    any of it (then the first stage's last checkpoint is gone on from)."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    how = {**QUIET, "max_steps": 12, "save_steps": 2, "eval_steps": 2}
    burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "whole", **how)
    child = context.Process(target=die, args=(point, str(qwen), data, tmp_path / "broken", how))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    newest = checkpoint.all_in(tmp_path / "broken")[-1]
    assert newest.name == {"step": "checkpoint-9", "name": "checkpoint-7",
                           "begin": "checkpoint-5"}[point]
    burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "broken", resume=True, **how)
    assert same(tmp_path / "whole", tmp_path / "broken")


def die(point, model, data, folder, how):
    torch.set_num_threads(1)
    steps = []

    def dying(owner, name, wanted, after):
        real = getattr(owner, name)

        def wrapped(*a, **k):
            now = wanted(*a, **k)
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            out = real(*a, **k)
            if now and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        setattr(owner, name, wrapped)

    if point == "step":
        dying(loop.Trainer, "training_step", lambda *a, **k: steps.append(1) or len(steps) == 10,
              False)
    elif point == "name":
        dying(os, "replace", lambda a, b: str(b).endswith("checkpoint-7"), True)
    else:
        from burnish.fit import stages
        dying(stages, "begin", lambda t, s, **k: s.trains == "money", False)
    burnish.fit(model, data, RECIPE, output=folder, **how)


def test_a_run_divided_otherwise_is_not_gone_on_with(qwen, data, tmp_path):
    stopped(8, tmp_path / "out", str(qwen), data, RECIPE, epochs=1, **QUIET)
    with pytest.raises(FormatError, match="its stages are 1/2 cats of 5 updates.*this run's are "
                                          "1/2 cats of 10"):
        burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "out", resume=True, epochs=2,
                    **QUIET)
    other = {"cats": data["cats"], "coins": data["money"]}
    with pytest.raises(FormatError, match="2/2 money.*2/2 coins"):
        burnish.fit(str(qwen), other, RECIPE, output=tmp_path / "out", resume=True, epochs=1,
                    **QUIET)


# -- head first ------------------------------------------------------------------------------------
def test_head_first_then_the_rest(vit, tmp_path):
    """One data set, two stages of one adapter: shares of the run, rates of their own."""
    moved, rates = [], []

    class Look(watch.Stop):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kw):
            moved.append({n.rpartition(".burnish.")[0] != "" for n, p in model.named_parameters()
                          if p.requires_grad})
            rates.append(max(g["initial_lr"] for g in optimizer.param_groups))

    how = {**QUIET, "max_steps": 8, "batch_size": 16, "test": False, "callbacks": [Look()]}
    recipe = "lora(rank=2) + head_first(share=0.25)"
    run = burnish.fit(str(vit), "digits", recipe, output=tmp_path / "whole", **how)
    assert moved == [{False}] * 2 + [{False, True}] * 6
    assert rates == [1e-2] * 2 + [1e-3] * 6
    assert run.promise.stage == "2/2 default" and set(run.promise.stages) == {
        "1/2 default", "2/2 default"}
    assert [s["trainable"] for s in run.facts["stages"]][0] < run.facts["trainable"]
    for at in (2, 3):
        folder = tmp_path / f"broken{at}"
        stopped(at, folder, str(vit), "digits", recipe, **how)
        burnish.fit(str(vit), "digits", recipe, resume=True, output=folder, **how)
        assert same(tmp_path / "whole", folder)


def test_a_schedule_may_go_on_as_the_whole_runs(vit, tmp_path):
    rate = {}
    for name in ("restart", "continue"):
        recipe = f"lora(rank=2) + head_first(schedule='{name}')"
        burnish.fit(str(vit), "digits", recipe, output=tmp_path / name, max_steps=8, test=False,
                    warmup_steps=0, **{**QUIET, "lr": 1e-3})
        rate[name] = [r["learning_rate"] for r in rows(tmp_path / name) if "loss" in r]
    down = [1e-3 * (1 - k / 8) for k in range(8)]
    assert rate["continue"] == pytest.approx(down[:1] + [1e-3 * (1 - k / 4) for k in range(1, 4)]
                                             + down[4:])
    assert rate["restart"] == pytest.approx([1e-3 * (1 - k / 4) for k in range(4)] * 2)


def test_accumulation_and_evaluation_inside_each_stage(vit, tmp_path):
    run = burnish.fit(str(vit), "digits", "lora(rank=2) + head_first", output=tmp_path / "a",
                      max_steps=6, eval_steps=1, save_steps=1, accumulation=3, test=False,
                      save_total_limit=9, **{**QUIET, "batch_size": 8})
    assert [c.name for c in checkpoint.all_in(tmp_path / "a")] == [
        f"checkpoint-{n}" for n in range(1, 7)]
    shown = [(r["step"], r["stage"][:3]) for r in rows(tmp_path / "a") if "eval_loss" in r]
    assert shown == [(n, "1/2" if n <= 3 else "2/2") for n in range(1, 7)]
    assert all(1 <= s["kept"] - s["first"] + 1 <= 3 for s in run.facts["stages"])


def test_the_state_of_an_earlier_stage_is_gone(vit, tmp_path):
    """The dearest stage decides what a run takes, so moments of one do not wait through another."""
    old, alive = [], []

    class Look(watch.Stop):
        def on_step_end(self, args, state, control, optimizer=None, **kw):
            inner = getattr(optimizer, "optimizer", optimizer)
            moments = [t for s in inner.state.values() for t in s.values()
                       if isinstance(t, torch.Tensor) and t.dim()]
            if state.max_steps == 2:
                old.extend(map(weakref.ref, moments))
            else:
                gc.collect()
                alive.append(sum(r() is not None for r in old))

    burnish.fit(str(vit), "digits", "lora(rank=2) + head_first(share=0.4)", output=tmp_path / "a",
                max_steps=5, test=False, callbacks=[Look()], **QUIET)
    assert old and alive == [0, 0, 0]


def test_stopped_in_the_second_stage_it_goes_on_there(qwen, data, whole, tmp_path):
    stopped(8, tmp_path / "out", str(qwen), data, RECIPE, epochs=1, **QUIET)
    burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "out", resume=True, epochs=1, **QUIET)
    assert same(whole, tmp_path / "out")


# -- refused beforehand ----------------------------------------------------------------------------
@pytest.mark.parametrize("given, recipe, words", [
    (["a", "b"], RECIPE, "each has a name: {'first'"),
    ({"a": 1, "b": 2}, "lora(rank=2)", "trains in one stretch, and the data are tasks by name"),
    ({"a": 1, "b": 2}, None, "there is no recipe, and the data are tasks"),
    ({"a b": 1}, RECIPE, "adapter name 'a b'"),
    ({}, RECIPE, "names no data set"),
    ({"a": 1}, f"{RECIPE} + head_first", "both take the stages of the run"),
])
def test_what_cannot_be_divided_is_refused_before_anything_is_read(given, recipe, words):
    with pytest.raises(burnish.BurnishError, match=words):
        burnish.fit("somewhere/model", given, recipe)


def test_too_few_updates_for_the_stages(qwen, data, tmp_path):
    with pytest.raises(ConfigError, match="1 updates are too few for 2 stages: 1/2 cats would have "
                                          "none left; max_steps of 2 or more"):
        burnish.fit(str(qwen), data, RECIPE, output=tmp_path / "a", max_steps=1, **QUIET)
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_another_loop_is_refused(vit):
    """transformers' own trainer has one optimizer for everything: the stages would be left out."""
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    tuned = burnish.tune(AutoModelForImageClassification.from_pretrained(vit),
                         "lora(rank=2) + head_first")
    trainer = Trainer(tuned.model, TrainingArguments("unused", report_to=[], use_cpu=True),
                      train_dataset=[{}], optimizers=(tuned.optimizer(1e-3), None),
                      callbacks=[burnish.TrainerCallback(tuned)])
    with pytest.raises(ConfigError, match="trains in 2 stages.*burnish.fit drives them"):
        trainer.train()


def test_one_data_set_is_said_to_leave_a_part_idle(qwen, data, tmp_path, capsys):
    burnish.fit(str(qwen), data["cats"], RECIPE, output=tmp_path / "a", max_steps=1,
                **{**QUIET, "quiet": False})
    assert "o_lora is for tasks one after the other" in capsys.readouterr().out
