"""Runs that fail in the middle go on, and end in the weights of a run that never failed.

A loss that is not finite, and a disk that fills while activations are written to it; for updates
that make no gradient, for activations that wait on disk and for networks that read taps.
"""

from __future__ import annotations

import errno
import json

import pytest
import torch

import burnish
from burnish.blocks.tape import spool
from burnish.core.errors import BurnishError, FormatError
from burnish.fit import checkpoint, loop
from burnish.fit.state import scalar_log
from burnish.formats import safe

RECIPES = ["mezo + lora(rank=2)", "zo(rule='momentum') + lora(rank=2)", "full + zo_fo",
           "lora(rank=2, dropout=0.1) + offload(to='disk', threshold=0)", "lst(reduction=4)",
           "unipt"]

STEPS = 6


def settings(folder, recipe, resume):
    return {"recipe": recipe, "output": folder, "resume": resume, "max_steps": STEPS,
            "batch_size": 8, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "lr": 1e-2,
            "test": False, "quiet": True, "report": False, "measure": False, "seed": 3,
            "weight_decay": 0.01}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
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


def at_step(monkeypatch, number, change):
    """The batch of the training step of this number is what `change` makes of it."""
    train = loop.Trainer.training_step

    def training_step(self, model, inputs, *a, **k):
        if self.state.global_step + 1 == number:
            inputs = change(dict(inputs))
        return train(self, model, inputs, *a, **k)

    monkeypatch.setattr(loop.Trainer, "training_step", training_step)


def ends_alike(one, two):
    a, b = (safe.load_file(f / "adapter_model.safetensors") for f in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    losses = [{r["step"]: r["loss"] for r in map(json.loads, (f / "metrics.jsonl").open())
               if "loss" in r} for f in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loss_that_is_no_number_stops_the_run_before_anything_moves(
        vit, tmp_path, monkeypatch, recipe):
    def nan(batch):
        return {k: v * float("nan") if v.is_floating_point() else v for k, v in batch.items()}

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    burnish.fit(vit, "digits", **settings(whole, recipe, False))
    with monkeypatch.context() as patch:
        at_step(patch, 4, nan)
        with pytest.raises(BurnishError, match="the loss is nan.*nothing was updated"):
            burnish.fit(vit, "digits", **settings(broken, recipe, False))
    assert all(checkpoint.whole(f) for f in broken.glob("checkpoint-*"))
    last = checkpoint.all_in(broken)[-1]
    assert last.name == "checkpoint-3"
    burnish.fit(vit, "digits", **settings(broken, recipe, True))
    ends_alike(broken, whole)


def test_a_disk_that_fills_during_a_step_stops_the_run_and_it_goes_on(
        vit, tmp_path, monkeypatch):
    recipe = "lora(rank=2, dropout=0.1) + offload(to='disk', threshold=0)"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    burnish.fit(vit, "digits", **settings(whole, recipe, False))
    put, full, wrote = spool.put, [False], []

    def write(file, view, at):
        wrote.append(len(view))
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(file, view, at)

    def fill(batch):
        full[0] = True
        return batch

    with monkeypatch.context() as patch:
        at_step(patch, 4, fill)
        patch.setattr(spool, "put", write)
        with pytest.raises(BurnishError, match="No space left on device"):
            burnish.fit(vit, "digits", **settings(broken, recipe, False))
    assert wrote and all(checkpoint.whole(f) for f in broken.glob("checkpoint-*"))
    assert checkpoint.all_in(broken), "there is nothing to go on from"
    burnish.fit(vit, "digits", **settings(broken, recipe, True))
    ends_alike(broken, whole)


@pytest.mark.parametrize("recipe", ["mezo(queries=2) + lora(rank=2)", "full + mezo",
                                    "full + zo(rule='adam', s=0.3, measure='weights')",
                                    "spsa_gc + bitfit"])
def test_a_run_is_its_start_and_its_log_of_scalars(vit, tmp_path, recipe):
    """The log as a run has left it in its last checkpoint, on a model as it was: no data."""
    done = burnish.fit(vit, "digits", **{**settings(tmp_path, recipe, False), "save_steps": STEPS,
                                         "eval_steps": STEPS})
    folder = checkpoint.all_in(tmp_path)[-1]
    assert folder.name == f"checkpoint-{STEPS}"
    log = scalar_log(folder)
    assert len(log) == STEPS * {"mezo(queries=2) + lora(rank=2)": 2, "spsa_gc + bitfit": 5}.get(
        recipe, 1)
    trained = {n: t.clone() for n, t in done.tuned.tensors().items()}
    from transformers import ViTForImageClassification
    fresh = burnish.tune(ViTForImageClassification.from_pretrained(vit), recipe, seed=3)
    start = {n: t.clone() for n, t in fresh.tensors().items()}
    assert any(not torch.equal(start[n], t) for n, t in trained.items())
    fresh.optimizer(lr=1.0, seed=11, weight_decay=0.01).replay(log)
    now = fresh.tensors()
    assert now.keys() == trained.keys()
    assert all(torch.equal(now[n], t) for n, t in trained.items())



def test_a_run_with_gradients_leaves_no_log(vit, tmp_path):
    burnish.fit(vit, "digits", **{**settings(tmp_path, "bitfit", False), "max_steps": 2})
    with pytest.raises(FormatError, match="leaves no log of scalars"):
        scalar_log(checkpoint.all_in(tmp_path)[-1])
