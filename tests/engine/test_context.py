"""Keys of the batch that parts of a recipe read: task ids, sample types, what a method names."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.keys import Key, Read, examples, keys_of
from burnish.testing import stir
from burnish.testing.models import tiny

HYPER = "hyperformer(tasks=3, reduction=8, norms=False)"


def gradients(tuned):
    got = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.model.zero_grad(set_to_none=True)
    return got


@pytest.mark.parametrize("recipe", [HYPER, f"{HYPER} + checkpoint"])
@pytest.mark.parametrize("foreign", [False, True])
def test_recomputation_reads_the_task_of_its_forward(recipe, foreign):
    net, batch = tiny("bert")
    tuned = stir(burnish.tune(net, recipe))
    if foreign:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    alone = []
    for task in (0, 2):
        tuned.loss({**batch, "task": task}).backward()
        alone.append(gradients(tuned))
    losses = [tuned.loss({**batch, "task": t}) for t in (0, 2)]
    with torch.no_grad(), tuned.given(task=1):
        net(**batch)
    sum(losses).backward()
    got = gradients(tuned)
    for n in got:
        torch.testing.assert_close(got[n], alone[0][n] + alone[1][n], rtol=1e-4, atol=1e-6)


def test_a_batch_that_lacks_the_key_is_refused_with_the_reason():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, HYPER)
    with pytest.raises(burnish.RecipeError, match="hyperformer reads 'task' of the batch"):
        tuned.step(batch)
    with tuned.disabled():
        net(**batch, task=1)                       # the base needs none and minds none
        net(**batch)
    with tuned.given(task=1):
        tuned.step(batch)
    with pytest.raises(burnish.ConfigError, match="no part of the recipe reads 'tusk'; did you"):
        with tuned.given(tusk=1):
            pass
    tuned.add("plain", "lora(rank=2)")
    tuned.use("plain")
    net(**batch)                                   # nobody active reads it


def test_a_step_is_simulated_with_its_keys():
    net, batch = tiny("vit")
    report = burnish.simulate(net, HYPER, {**batch, "task": torch.tensor([0, 1])})
    assert report.peak_bytes > 0
    tuned = burnish.tune(net, HYPER, example={**batch, "task": torch.tensor([0, 1])})
    assert tuned.step({**batch, "task": torch.tensor([0, 1])}).isfinite()


def test_per_sample_adapters_get_their_samples_keys():
    net, batch = tiny("vit", batch=3)
    tuned = stir(burnish.tune(net, HYPER, head=False))
    net.eval()
    task = torch.tensor([2, 0, 1])
    with torch.no_grad():
        whole, off = net(**batch, task=task).logits, None
        with tuned.disabled():
            off = net(**batch).logits
        tuned.use(["default", None, "default"])
        got = net(**batch, task=task).logits
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(got[1], off[1])


def test_examples_are_within_what_each_key_may_be():
    parts = burnish.parse("hyperformer(tasks=3) + loramoe")
    made = examples(parts, 5)
    assert made["task"].tolist() == [0, 1, 2, 0, 1]
    assert made["sample_type"].tolist() == [0, 1, 0, 1, 0]
    assert keys_of(parts)["task"] == Read("hyperformer", parts[0].context["task"], 3)
    assert keys_of(burnish.parse("loramoe(balance=0)")) == {}      # nothing reads it then

    narrow = burnish.parse("hyperformer(tasks=5) + hyperformer(tasks=2)")
    assert keys_of(narrow)["task"].below == 2

    class Modal(burnish.Method):
        context = {"modalities": Key("which are there", shape=(2, 3))}

    assert examples([Modal()], 4)["modalities"].shape == (4, 2, 3)


def test_a_key_of_training_alone_is_not_asked_for_in_evaluation():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loramoe(rank=2)")
    with pytest.raises(burnish.RecipeError, match="loramoe reads 'sample_type' of the batch"):
        tuned.step(batch)
    net.eval()
    with torch.no_grad():
        net(**batch)


@pytest.mark.parametrize("model, batch", [("vit", 3), ("llama", (2, 8)), ("mlp", 2)])
def test_a_simulation_of_so_many_samples_makes_the_keys(model, batch):
    recipe = "hyperformer(tasks=3) + loramoe(rank=2)" if model != "mlp" else "lora(rank=2)"
    net, _ = tiny(model)
    assert burnish.simulate(net, recipe, batch).peak_bytes > 0


def test_a_plan_takes_the_keys_of_its_candidates():
    net, _ = tiny("bert")
    plans = burnish.plan(net, "1GB", 4, candidates=["hyperformer(tasks=3)", "loramoe(rank=2)"])
    assert len(plans.fits) == 2 and not plans.refused


def test_a_data_pass_leaves_the_keys_to_those_who_read_them():
    net, batch = tiny("bert")
    batch["task"] = torch.tensor([0, 2])
    tuned = burnish.tune(net, f"eva(rank=2) + {HYPER}", calibration=[batch])
    assert tuned.step(batch).isfinite()
    tuned.add("other", f"eva(rank=2) + {HYPER}", calibration=[batch])
