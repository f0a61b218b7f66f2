"""Killed at any moment, a run goes on and ends in the very same weights.

Each run is a process of its own that sends itself SIGKILL at a chosen point: in the middle of a
step, while a checkpoint is being written, just before or after it gets its name, while an older
one is removed, while it evaluates. It is then started again with ``resume=True``, killed at the
next point, and so on until it gets through.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest
import torch

from burnish.fit import checkpoint
from burnish.formats import safe

STEPS = 6


def settings(folder, recipe, resume):
    return {"recipe": recipe, "output": folder, "resume": resume, "max_steps": STEPS,
            "batch_size": 8, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "lr": 1e-2,
            "test": False, "quiet": True, "report": False, "measure": False,
            "save_total_limit": 1, "seed": 3, "weight_decay": 0.01}


def run(folder, model, recipe, resume, point=None, count=1):
    """In a process of its own: fit, and die at the `count`-th passing of `point`."""
    torch.set_num_threads(1)
    import burnish
    from burnish.fit import loop

    left = [count]

    def die_at(owner, name, before=True, wanted=lambda *a, **k: True):
        real = getattr(owner, name)

        def wrapped(*a, **k):
            counts = wanted(*a, **k)
            left[0] -= counts
            if before and counts and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            out = real(*a, **k)
            if not before and counts and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        setattr(owner, name, wrapped)

    def checkpoints(source, *a, **k):
        return "checkpoint-" in str(source)

    if point == "step":
        die_at(loop.Trainer, "training_step")
    elif point == "file":
        die_at(safe, "save_file", before=False, wanted=lambda t, p, *a: checkpoints(p))
    elif point == "before the name":
        die_at(os, "replace", wanted=lambda a, b: str(a).endswith(".writing"))
    elif point == "after the name":
        die_at(os, "replace", before=False, wanted=lambda a, b: str(a).endswith(".writing"))
    elif point == "removal":
        die_at(checkpoint, "_delete", wanted=lambda p: p.name.endswith(".going") and p.is_dir())
    elif point == "evaluation":
        die_at(loop.Trainer, "evaluate")
    burnish.fit(model, "digits", **settings(folder, recipe, resume))


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported and no thread running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["burnish.fit.run", "burnish.fit.loop", "sklearn.datasets",
                                    "transformers.models.vit.modeling_vit", "datasets"])
    return context


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Dropout everywhere, so that generators must go on where they were."""
    from transformers import ViTConfig, ViTForImageClassification

    from burnish.fit.pictures import Picture
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1)).save_pretrained(folder)
    Picture(8, 8, (0.5,), (0.5,)).save_pretrained(folder)
    return str(folder)


def start(processes, *args):
    """Run to the end or to the kill; returns the exit code."""
    child = processes.Process(target=run, args=args)
    child.start()
    child.join(300)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def results(folder):
    tensors = safe.load_file(folder / "adapter_model.safetensors")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: (r["loss"], r["grad_norm"], r["learning_rate"]) for r in rows
              if "loss" in r}
    scores = {r["step"]: r["eval_loss"] for r in rows if "eval_loss" in r}
    assert len([r for r in rows if "loss" in r]) == len(losses), "a step stands twice"
    return tensors, losses, scores, json.loads((folder / "run.json").read_text())["best"]


#: every one in turn, on the way of a single run
POINTS = [("step", 2), ("file", 1), ("step", 3), ("before the name", 1), ("evaluation", 1),
          ("after the name", 1), ("removal", 1), ("step", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    "lora(rank=2, dropout=0.1)", "snella(rank=4) + adam8bit", "mezo(queries=2) + lora(rank=2)",
    "full + zo_fo", "lst(reduction=4)",
    "lora(rank=2, dropout=0.1) + offload(to='disk', threshold=0)"])
def test_killed_again_and_again_it_ends_in_the_same_weights(processes, vit, tmp_path, recipe):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(processes, whole, vit, recipe, False) == 0
    for point, count in POINTS:
        code = start(processes, broken, vit, recipe, "auto", point, count)
        assert code in (-signal.SIGKILL, 0)
        for folder in broken.glob("checkpoint-*"):
            assert checkpoint.whole(folder), f"{folder.name} is broken after a kill at {point}"
        if code == 0:
            break
    assert start(processes, broken, vit, recipe, "auto") == 0
    for mine, theirs in zip(results(broken), results(whole), strict=True):
        if isinstance(mine, dict) and all(isinstance(v, torch.Tensor) for v in mine.values()):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
        else:
            assert mine == theirs
    assert not list(broken.glob(".checkpoint*"))


@pytest.mark.slow
def test_each_point_was_really_reached(processes, vit, tmp_path):
    """A kill that never happens would prove nothing."""
    for point in ("step", "file", "before the name", "after the name", "evaluation"):
        assert start(processes, tmp_path / point, vit, "bitfit", False, point, 1) \
            == -signal.SIGKILL, point
    assert start(processes, tmp_path / "removal", vit, "bitfit", False, "removal", 1) \
        == -signal.SIGKILL


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(vit, tmp_path, monkeypatch):
    import burnish
    from burnish.fit.loop import Trainer
    real, calls = Trainer.training_step, []

    def step(self, *a, **k):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *a, **k)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        burnish.fit(vit, "digits", **settings(tmp_path / "a", "lora(rank=2)", False))
    assert checkpoint.all_in(tmp_path / "a")[-1].name == "checkpoint-3"
    burnish.fit(vit, "digits", **settings(tmp_path / "a", "lora(rank=2)", True))
    burnish.fit(vit, "digits", **settings(tmp_path / "b", "lora(rank=2)", False))
    a, b = (results(tmp_path / n) for n in "ab")
    assert all(torch.equal(a[0][k], b[0][k]) for k in b[0]) and a[1:] == b[1:]


@pytest.mark.parametrize("recipe", ["full + galore(rank=4)", "lisa(layers=1)",
                                    "mezo + lora(rank=2)", "full + lion",
                                    "lora(rank=2, dropout=0.1) + sam",
                                    "greentrainer(budget=0.6, every=2)"])
def test_every_kind_of_optimizer_goes_on(vit, tmp_path, recipe):
    """Stopped at step 3 and resumed, in one process: state of subspaces, schedules, scalars."""
    import burnish
    from burnish.fit import watch
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    first = burnish.fit(vit, "digits", **settings(whole, recipe, False))

    class Stop(watch.Stop):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3:
                self.asked = signal.SIGTERM
            super().on_step_end(args, state, control, **kw)

    kept, watch.Stop = watch.Stop, Stop
    try:
        with pytest.raises(KeyboardInterrupt):
            burnish.fit(vit, "digits", **settings(halves, recipe, False))
    finally:
        watch.Stop = kept
    second = burnish.fit(vit, "digits", **settings(halves, recipe, True))
    one, two = first.tuned.tensors(), second.tuned.tensors()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(processes, vit, tmp_path):
    """SIGKILL from outside, twenty times after a random while; the ends agree bit for bit."""
    import random

    draw, recipe = random.Random(0), "lora(rank=2, dropout=0.1)"
    assert start(processes, tmp_path / "whole", vit, recipe, False) == 0
    want = results(tmp_path / "whole")
    kills, n = 0, 0
    while kills < 20:
        folder, resume, n = tmp_path / f"run{n}", False, n + 1
        while True:
            child = processes.Process(target=run, args=(folder, vit, recipe, resume))
            child.start()
            child.join(draw.uniform(0.3, 4.0) if kills < 20 else 300)
            if child.exitcode is None:
                child.kill()
                child.join(60)
                kills += 1
                resume = folder.exists()
                continue
            assert child.exitcode == 0
            break
        got = results(folder)
        assert all(torch.equal(got[0][k], want[0][k]) for k in want[0]) and got[1:] == want[1:]
