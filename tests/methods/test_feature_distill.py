"""Feature distillation: the term against hooks on a real copy of the base, its gradient, scale."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.methods.objective.feature_distill import apart
from burnish.testing import stir, tiny


def states(net, batch):
    """(states after each block, outputs), by hooks of the test's own."""
    seen, hooks = [], []
    for block in Anatomy.of(net).blocks:
        hooks.append(net.get_submodule(block.path).register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)))
    out = net(**batch)
    for h in hooks:
        h.remove()
    return seen, out


@pytest.mark.parametrize("recipe, model", [
    ("lora(rank=2)", "bert"), ("full", "vit"), ("pela", "vit"), ("lora(rank=2)", "t5"),
    ("lora(rank=2) + checkpoint", "llama")])
@pytest.mark.parametrize("weight, logits", [(0.7, 0.0), (0.7, 0.3), (0.0, 0.3)])
def test_gradients_are_those_of_the_sum(recipe, model, weight, logits):
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).eval().requires_grad_(False)
    tuned = burnish.tune(
        net, f"{recipe} + feature_distill(weight={weight}, logits={logits})", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    theirs, teacher = states(base, batch)
    mine, out = states(net, batch)
    assert len(mine) == len(theirs) > 1
    whole = out.loss + logits * (out.logits - teacher.logits).square().mean()
    for a, b in zip(mine, theirs, strict=True):
        whole = whole + weight / len(mine) * (a - b).square().mean()
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()), allow_unused=True)
    tuned.optimizer(lr=0.0)
    (0.5 * net(**batch).loss).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        assert (p.grad is None) == (g is None), n
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)


def test_the_teacher_gets_no_gradient_and_no_second_forward():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "full + feature_distill(logits=1.0)")
    tuned.optimizer(lr=1e-3)
    runs, grads = [], []

    def count(*given):
        runs.append(1)
        grads.append(torch.is_grad_enabled())

    hook = net.register_forward_hook(count)
    tuned.loss(batch).backward()
    assert grads == [False, True] and len(runs) == 2
    hook.remove()
    assert parse("feature_distill(weight=0.0, logits=1.0)")[0].taps(tuned.anatomy) == ()
    assert len(tuned.recipe[1].taps(tuned.anatomy)) == 2


def test_what_is_kept_of_the_states_is_let_go():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=2) + feature_distill", head=False)
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    assert not tuned.steps.objectives._taps
    with torch.no_grad():
        net(**batch)
    assert not tuned.steps.objectives._taps


def test_another_adapter_may_be_the_teacher():
    net, batch = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    stir(tuned, size=0.2)
    net.eval()
    theirs, _ = states(net, batch)
    theirs = [t.detach() for t in theirs]
    tuned.add("young", "lora(rank=2) + feature_distill(adapter='default')", head=False)
    tuned.use("young")
    stir(tuned, 2, 0.2)
    mine, out = states(net, batch)
    whole = out.loss + sum((a - b).square().mean() for a, b in zip(mine, theirs, strict=True)) / 2
    want = torch.autograd.grad(whole, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    net(**batch).loss.backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7, msg=n)


def test_half_precision_is_compared_in_fp32():
    a, b = torch.full((4,), 1.0), torch.full((4,), 1.0 + 2**-7)
    assert apart(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert float(apart(a.bfloat16(), b.bfloat16())) == 2**-14
    assert apart(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("settings", ["weight=-1.0", "logits=-1.0", "weight=0.0"])
def test_settings_are_checked(settings):
    with pytest.raises(RecipeError, match="weight and logits of at least 0, one of them above"):
        parse(f"feature_distill({settings})")


def test_the_defaults_are_the_papers():
    m = parse("feature_distill")[0]
    assert (m.weight, m.logits, m.adapter) == (1.0, 0.0, None)
    assert parse("feature_distill(kappa_f=0.5, kappa_l=2.0)")[0] == \
        parse("feature_distill(weight=0.5, logits=2.0)")[0]


def test_a_model_without_blocks_or_logits_is_refused():
    with pytest.raises(RecipeError, match="feature_distill needs repeated blocks"):
        burnish.tune(torch.nn.Sequential(torch.nn.Linear(4, 4)), "full + feature_distill")
    net, batch = tiny("vit")
    tuned = burnish.tune(net.vit, "lora(rank=2) + feature_distill(logits=1.0)")
    tuned.optimizer()
    with pytest.raises(ConfigError, match="feature_distill compares logits, and this model"):
        tuned.loss({"pixel_values": batch["pixel_values"]},
                   loss=lambda out, b: out.last_hidden_state.sum())


def test_beside_a_prompt_states_have_no_counterpart():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "prompt_tuning(length=3) + feature_distill", head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="position by position.*leave out the part that adds"):
        tuned.step(batch)


@pytest.mark.parametrize("model,recipe", [
    ("bert", "linear_probe"), ("timm_qkv", "lst")])       # (whose outputs are of no known kind)
def test_where_nothing_that_trains_reaches_a_block_it_is_refused(model, recipe):
    net, batch = tiny(model)
    tuned = burnish.tune(net, f"{recipe} + feature_distill")
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="feature_distill has nothing to act on: what it is made"):
        tuned.step(batch)
