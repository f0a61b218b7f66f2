"""What acts around a pass acts in `fit` as in a loop of `tuned.backward`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError
from burnish.fit.loop import Trainer
from burnish.fit.pictures import Picture

SMALL = {"batch_size": 8, "quiet": True, "report": False, "test": False, "measure": False,
         "validation": 0, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
         "lr": 0.05, "load_best_model_at_end": False}


def vit(dropout=0.0):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(),
                         nn.Linear(12, 10))


def fitted(model, recipe, folder, monkeypatch, **kw):
    """The weights of a run, and the micro-batches it saw."""
    seen = []
    real = Trainer.training_step

    def step(self, net, inputs, *rest):
        seen.append({k: v.clone() for k, v in inputs.items()})
        return real(self, net, inputs, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "training_step", step)
        said = {**SMALL, **kw}
        if "clip" in kw:
            del said["max_grad_norm"]                    # the other spelling of it
        run = burnish.fit(model, "digits", recipe, output=folder,
                          processor=Picture(8, 8, (0.5,), (0.5,)), **said)
    return run, seen


def test_a_pass_of_another_scalar_is_that_of_a_loop(tmp_path, monkeypatch):
    """R-AMT looks at the divergence from the base first: the same masks, and within the promise."""
    model = vit()
    other = copy.deepcopy(model)
    run, seen = fitted(model, "r_amt(init=0.006)", tmp_path, monkeypatch, max_steps=3, lr=1e-3,
                       gradient_accumulation_steps=2, measure=True)
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)
    tuned = burnish.tune(other.train(), "r_amt(init=0.006)")
    opt = tuned.optimizer(1e-3)
    for k in range(3):
        opt.zero_grad()
        for batch in seen[2 * k: 2 * k + 2]:
            tuned.backward(batch, scale=0.5)
        opt.step()
    ends = [dict(t.named_parameters()) for t in (run.tuned, tuned)]
    assert ends[0].keys() == ends[1].keys()
    for n, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][n], rtol=1e-4, atol=1e-6, msg=n)
    assert any(bool((p <= 5e-3).any()) for n, p in ends[0].items() if n.endswith(".m"))


@dataclass(frozen=True, kw_only=True)
class Looker(burnish.Method):
    paper: ClassVar[str] = "nobody's"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step",)
    met: ClassVar[list] = []
    modes: ClassVar[list] = []

    def controller(self, tuned):
        class Looking:
            met, modes = self.met, self.modes

            def around_step(self, step):
                for grads in (False, True):
                    for evaluate in self.modes:
                        found = []
                        step.probe(grads, evaluate=evaluate, of=lambda run, f=found: (
                            f.append(("labels" in run.batch, any(
                                m.training for m in tuned.model.modules()),
                                run.outputs.logits.detach())), run.outputs.logits.sum())[1])
                        self.met.append((evaluate, *found[0]))
                yield
                assert tuned.model.training

        return Looking()


@pytest.mark.parametrize("smoothing, modes", [(0.0, [True, False]), (0.1, [True])])
def test_a_look_in_evaluation_mode_is_one_and_has_the_labels(tmp_path, monkeypatch, smoothing,
                                                             modes):
    """A trainer's pass asks for training mode first, and smoothing takes labels off the batch."""
    monkeypatch.setattr(Looker, "met", [])
    monkeypatch.setattr(Looker, "modes", modes)
    burnish.register(Looker, "looker")
    model = vit(dropout=0.5)
    other = copy.deepcopy(model).eval()
    _, (seen, *_) = fitted(model, "lora(rank=2) + looker", tmp_path, monkeypatch, max_steps=1,
                           label_smoothing_factor=smoothing)
    want = other(**seen).logits
    met = Looker.met[-2 * len(modes):]                     # others are of the promise
    assert [m[:3] for m in met] == [(m, True, not m) for m in modes] * 2
    for evaluated, _, _, logits in met:
        assert torch.allclose(logits, want, atol=1e-5) == evaluated


def test_label_smoothing_makes_the_loss_where_nobody_sees_it(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="in fit, no label smoothing"):
        fitted(vit(), "r_amt", tmp_path, monkeypatch, max_steps=1, label_smoothing_factor=0.1)


@pytest.mark.parametrize("make", [vit, plain])
def test_fit_takes_the_steps_of_a_loop(make, tmp_path, monkeypatch):
    """Two micro-batches an update; the loop is held against plain torch in test_sam.py."""
    recipe = "full + l2_sp(alpha=0.3, beta=0.2) + sam(radius=0.5) + sgd"
    model = make()
    other = copy.deepcopy(model)
    run, seen = fitted(model, recipe, tmp_path, monkeypatch, max_steps=3,
                       gradient_accumulation_steps=2)
    assert len(seen) == 6
    tuned = burnish.tune(other.train(), recipe, head=True)
    opt = tuned.optimizer(0.05)

    def loss(out, batch):
        return torch.nn.functional.cross_entropy(getattr(out, "logits", out), batch["labels"])

    def pixels(batch):
        return (batch["pixel_values"], batch["labels"])

    for k in range(3):
        opt.zero_grad()
        for batch in seen[2 * k: 2 * k + 2]:
            tuned.backward(pixels(batch), lambda out, b: loss(out, {"labels": b[1]}), scale=0.5)
        opt.step()
    moved = run.tuned.model.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-7, msg=name)
    still = make().state_dict()
    assert any(not torch.equal(still[n], moved[n]) for n in still)


def test_a_step_of_no_length_is_the_run_without_it(tmp_path, monkeypatch):
    """Dropout draws the same, gradients accumulate and are clipped the same."""
    ends = []
    for k, recipe in enumerate(("lora(rank=2, dropout=0.2)",
                                "lora(rank=2, dropout=0.2) + sam(radius=1e-30)")):
        monkeypatch.setattr("burnish.methods.controller.sam.Sharpness._look", lambda *a: None)
        run, _ = fitted(vit(0.1), recipe, tmp_path / str(k), monkeypatch, max_steps=3,
                        gradient_accumulation_steps=2, max_grad_norm=0.5)
        ends.append(run.tuned.tensors())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_the_promise_of_a_run_covers_both_passes(tmp_path, monkeypatch):
    run, _ = fitted(vit(), "full + sam", tmp_path, monkeypatch, max_steps=2, measure=True)
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)


def test_a_choice_within_a_budget_trains_in_fit(tmp_path, monkeypatch):
    """With a warm-up from no rate, accumulation, and the promise."""
    recipe = "greentrainer(budget=0.6, every=2)"
    still = {n: p.detach().clone() for n, p in vit().named_parameters()}
    run, _ = fitted(vit(), recipe, tmp_path, monkeypatch, max_steps=4, measure=True, lr=1e-3,
                    gradient_accumulation_steps=2, warmup_steps=2, lr_scheduler_type="linear")
    moved = {n for n, p in run.tuned.model.named_parameters() if not torch.equal(p, still[n])}
    live = {n for n, _ in run.tuned.named_parameters()}
    assert live and live <= moved and len(moved) < len(still)
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)


# findings 3.9
def test_the_one_clipping_setting_acts_where_gradients_never_exist_together(tmp_path, monkeypatch):
    """fit(clip=...) of LOMO against transformers' clipping of plain descent, through dropout; the
    norms it reports are those before the cut."""
    ends, norms = [], []
    for k, recipe in enumerate(("full + sgd", "full + sgd + step_in_backward")):
        run, _ = fitted(vit(0.1), recipe, tmp_path / str(k), monkeypatch, max_steps=3, clip=0.05,
                        logging_steps=1)
        ends.append(run.tuned.model.state_dict())
        norms.append([h["grad_norm"] for h in run.history if "grad_norm" in h])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert len(norms[0]) == 3 and norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert min(norms[0]) > 0.05, "it must have acted"


# findings 3.9
@pytest.mark.parametrize("recipe, kw, word", [
    ("full + mezo", {}, "mezo makes no gradient"),
    ("full + galore(rank=4, in_backward=True)", {"gradient_accumulation_steps": 2}, "cannot clip")])
def test_clipping_that_cannot_act_is_refused(recipe, kw, word, tmp_path, monkeypatch):
    with pytest.raises(burnish.BurnishError, match=word):
        fitted(vit(), recipe, tmp_path, monkeypatch, max_steps=2, **{**kw, "max_grad_norm": 0.5})
