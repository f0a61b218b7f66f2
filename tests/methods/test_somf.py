"""Somf: masks of what changed, their gradient against autograd, weights bit for bit one of two."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.blocks.weight.fusing import Fusing
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.somf import Somf
from burnish.testing.models import tiny


def setup(tasks=2, dtype=torch.float64):
    """(model, aligned, tuned, batches)"""
    model, batch = tiny("vit", dtype=dtype, dropout=0.2)
    aligned = {n: t.detach().clone() for n, t in model.named_parameters()}
    g = torch.Generator().manual_seed(2)
    tuned = [{n: t + 0.1 * torch.randn(t.shape, generator=g).to(t) if "q_proj" in n or "fc1" in n
              else t.clone() for n, t in aligned.items()} for _ in range(tasks)]
    batches = [{"pixel_values": torch.randn(batch["pixel_values"].shape, generator=g).to(dtype),
                "labels": torch.tensor([i % 3, 1])} for i in range(3)]
    return model, aligned, tuned, batches


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [False, True])
def test_a_mask_of_ones_is_the_sum_of_the_tasks_and_of_noughts_the_aligned_model(rows):
    model, aligned, tuned, _ = setup()
    run = Fusing(model, aligned, tuned, [0.5, 2.0], rows, 3.0)
    run.stand({n: torch.zeros_like(s) for n, s in run.logits.items()})
    assert all(torch.equal(p, aligned[n]) for n, p in weights(model).items())
    run.stand({n: torch.ones_like(s) for n, s in run.logits.items()})
    for n, p in weights(model).items():
        want = aligned[n] + 0.5 * (tuned[0][n] - aligned[n]) + 2 * (tuned[1][n] - aligned[n])
        torch.testing.assert_close(p, want, rtol=1e-13, atol=1e-13)
    for n, s in run.logits.items():
        assert s.shape == (aligned[n][..., :1].shape if rows and aligned[n].dim() > 1
                           else aligned[n].shape)


@pytest.mark.parametrize("rows", [False, True])
def test_the_mask_s_gradient_is_the_change_times_the_weight_s(rows):
    model, aligned, tuned, batches = setup()
    run = Fusing(model, aligned, tuned, None, rows, 3.0)
    g = torch.Generator().manual_seed(0)
    mask = {n: torch.rand(s.shape, generator=g, dtype=s.dtype).requires_grad_()
            for n, s in run.logits.items()}
    _, got = run.gradients(batches[0], {n: m.detach() for n, m in mask.items()}, None)
    twin = copy.deepcopy(model).eval()
    whole = {n: aligned[n] + mask[n] * sum(t[n] - aligned[n] for t in tuned) if n in mask
             else aligned[n] for n in aligned}
    out = torch.func.functional_call(twin, whole, kwargs=batches[0])
    want = torch.autograd.grad(out.loss, list(mask.values()))
    for (n, a), b in zip(got.items(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.parametrize("heats", [[1.0], [1.0, 0.4], [1.0, 0.8, 0.6, 0.4]])
def test_steps_are_those_of_adam_on_the_written_loss(heats):
    model, aligned, tuned, batches = setup(1)
    method = Somf(updates=len(heats), weight=2.0, step_rate=0.3, hot=1.0, seed=5, **(
        {"cold": 0.4} if len(heats) > 1 else {}))
    twin = copy.deepcopy(model).eval()
    found = method.lifecycle(model, aligned, tuned, batches)
    names = [n for n in aligned if not torch.equal(tuned[0][n], aligned[n])]
    s = {n: torch.full_like(aligned[n], 3.0).requires_grad_() for n in names}
    total = sum(t.numel() for t in s.values())
    optimizer = torch.optim.Adam(s.values(), lr=0.3)
    g = torch.Generator().manual_seed(5)
    losses = []
    for t, heat in enumerate(heats):
        whole, away = dict(aligned), 0.0
        for n in names:
            u = torch.rand(s[n].shape, generator=g, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            m = torch.sigmoid((u.log() - (1 - u).log() + s[n]) / heat)
            whole[n] = aligned[n] + m * (tuned[0][n] - aligned[n])
            away = away + (1 - m).sum() / total
        loss = torch.func.functional_call(twin, whole, kwargs=batches[t % 3]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + 2.0 * away).backward()
        optimizer.step()
    assert found.losses == pytest.approx(losses, rel=1e-9)
    assert set(found.kept) == set(names)
    assert all(torch.equal(found.kept[n], s[n] > 0) for n in names)


@pytest.mark.parametrize("form", ["entry", "row"])
def test_what_is_left_out_is_the_aligned_model_s_and_the_rest_the_tuned_one_s(form):
    model, aligned, tuned, batches = setup(1, torch.float32)
    method = Somf(updates=30, weight=0.0, step_rate=0.5, start=0.5, form=form)

    def loss(out, batch):                                # which the change has made worse
        return 30 * torch.nn.functional.cross_entropy(out.logits, batch["labels"])

    found = method.lifecycle(model, aligned, tuned, batches, loss=loss)
    seen = {True: 0, False: 0}
    for n, p in weights(model).items():
        if n not in found.kept:
            assert torch.equal(p, aligned[n])
            continue
        kept = found.kept[n].expand_as(p)
        assert torch.equal(p[kept], tuned[0][n][kept])
        assert torch.equal(p[~kept], aligned[n][~kept])
        for k in seen:
            seen[k] += int((kept == k).sum())
    assert seen[True] and seen[False]
    assert found.share == seen[False] / sum(seen.values()) and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_safety_gets_better_by_the_mask():
    model, aligned, _, batches = setup(1)
    twin = copy.deepcopy(model).eval()

    def value(tensors):
        with torch.no_grad():
            return sum(float(torch.func.functional_call(twin, tensors, kwargs=b).loss)
                       for b in batches)

    tuned = {n: t.clone() for n, t in aligned.items()}   # the head moved both ways
    g = torch.Generator().manual_seed(4)
    tuned["classifier.weight"] += torch.randn(tuned["classifier.weight"].shape, generator=g)
    Somf(weight=0.001, step_rate=0.3).lifecycle(model, aligned, [tuned], batches)
    assert value(weights(model)) < min(value(tuned), value(aligned)) - 0.01


def test_an_exception_leaves_the_model_as_it_was():
    model, aligned, tuned, batches = setup()
    before = {n: t + 1 for n, t in aligned.items()}
    model.load_state_dict(before, strict=False)

    def loss(out, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Somf().lifecycle(model, aligned, tuned, batches, loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_its_settings():
    assert parse("somf")[0].settings() == {
        "targets": None, "form": "entry", "weight": 0.1, "updates": 200, "step_rate": 0.1,
        "start": 3.0, "hot": 1.0, "cold": 0.1, "seed": 0}


def test_what_cannot_act_is_refused():
    for settings, said in (({"form": "column"}, "entry or row"), ({"updates": 0}, "at least 1"),
                           ({"step_rate": 0.0}, "positive"), ({"start": 0.0}, "positive"),
                           ({"weight": -1.0}, "at least 0"), ({"cold": 0.0}, "stay above 0"),
                           ({"updates": 1, "cold": 0.5}, "cold is of the last"),
                           ({"hot": 0.05}, "fall"), ({"targets": "q"}, "targets do nothing")):
        with pytest.raises(ConfigError, match=said):
            Somf(**settings)
    model, aligned, tuned, batches = setup()
    with pytest.raises(ConfigError, match="needs batches"):
        Somf().lifecycle(model, aligned, tuned, [])
    with pytest.raises(ConfigError, match="one tuned model or more"):
        Somf().lifecycle(model, aligned, [], batches)
    with pytest.raises(ConfigError, match="2 tuned models and 1 scales"):
        Somf().lifecycle(model, aligned, tuned, batches, scales=[1.0])
    with pytest.raises(ConfigError, match="all of these models are the aligned one"):
        Somf().lifecycle(model, aligned, [aligned], batches)
    with pytest.raises(ConfigError, match="not in all of these"):
        Somf().lifecycle(model, aligned, [{}], batches)
    with pytest.raises(ConfigError, match="a list of the tensors of one tuned"):
        Somf().lifecycle(model, aligned, tuned[0], batches)
    for wrong, said in ((lambda o, b: 1.0, "is 1.0"), (lambda o, b: o.logits, r"tensor \[2, "),
                        (lambda o, b: torch.ones(()), "without a graph")):
        with pytest.raises(ConfigError, match=said):
            Somf().lifecycle(model, aligned, tuned, batches, loss=wrong)
    with pytest.raises(ConfigError, match="is a mapping of what the model takes"):
        Somf().lifecycle(model, aligned, tuned, [batches[0]["pixel_values"]])
    with pytest.raises(ConfigError, match="gives no loss"):
        Somf().lifecycle(model, aligned, tuned, [{"pixel_values": batches[0]["pixel_values"]}])
    assert all(torch.equal(p, aligned[n]) for n, p in weights(model).items())


@pytest.mark.parametrize("mine", ["tuned", "aligned"])
def test_tensors_may_be_those_of_the_model_that_is_fused(mine):
    """It moves while the mask is learnt, and what was handed over is what it was before."""
    made = []
    for own in (False, True):
        model, aligned, tuned, batches = setup(1)
        model.load_state_dict(tuned[0] if mine == "tuned" else aligned, strict=False)
        given = {"tuned": [tuned[0]], "aligned": aligned}
        if own:
            here = dict(model.named_parameters()) if mine == "tuned" else model.state_dict()
            given[mine] = [here] if mine == "tuned" else here
        told = Somf(updates=6, start=1.0, step_rate=0.5).lifecycle(
            model, given["aligned"], given["tuned"], batches)
        made.append(weights(model))
        assert 0 < told.share < 1
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
