"""Keys of the batch that parts of a recipe read: task ids, sample types, what a method names."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.call import Call
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


def test_an_optional_key_is_asked_for_nowhere_and_read_where_it_is():
    net, batch = tiny("clip")
    tuned = burnish.tune(net, "mmrl(length=2, layers=1, code=8)", head=False)
    assert examples(tuned.recipe, 2) == {} and set(keys_of(tuned.recipe)) == {"unseen"}
    batch.pop("return_loss")
    assert tuned.loss(batch, lambda out, b: out.logits_per_image.sum()).isfinite()
    net.eval()
    plain = net(**batch).logits_per_image
    assert not torch.equal(net(**batch, unseen=1).logits_per_image, plain)


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


class Rated(burnish.Method):
    """Reads two numbers of every sample."""

    context = {"rating": Key("how good", real=True, shape=(2,))}
    name = "rated"


def test_a_real_key_is_any_number_from_0_to_1():
    read = keys_of([Rated()])["rating"]
    assert read.key.shape == (2,) and read.range == "from 0 to 1"
    made = examples([Rated()], 3)["rating"]
    assert made.shape == (3, 2) and made.min() == 0.25 and made.max() == 0.75
    for right in ([[0.0, 1.0]], torch.tensor([[0.5, 0.25]]), torch.empty(0, 2),
                  torch.ones(1, 2, dtype=torch.int64), torch.full((1, 2), 3.0, device="meta")):
        read.check("rating", right)
    for wrong, said in ((1.5, "1.5"), ([[0.5, -0.25]], "-0.25"), (float("nan"), "nan"),
                        ("good", "'good'"), (torch.tensor([0.5, 2.0]), "2.0")):
        with pytest.raises(burnish.RecipeError,
                           match=f"rated reads 'rating'.*good.*numbers from 0 to 1, not {said}"):
            read.check("rating", wrong)
    assert read.takes(0.3) and not read.takes(1.01) and not read.takes(float("nan"))
    whole = Read("x", Key("a", below=3), 3)
    assert whole.takes(2) and not whole.takes(3) and not whole.takes(0.5) and not whole.takes(-1)
    assert whole.range == "from 0 to 2"


def test_rows_by_entry():
    call = Call(given={"k": torch.tensor([1, 0]), "v": torch.tensor([0.5, 1.0])})
    x = torch.rand(6, 3)
    entries, rows = call.by_entry("k", x)
    assert entries.tolist() == [1, 0] and torch.equal(rows, x.view(2, 3, 3))
    one, all_ = call.by_entry("v", x, dims=1)
    assert one.shape == (1, 2) and torch.equal(all_, x[None])
    with pytest.raises(burnish.RecipeError, match="'k' has 2 entries.*given 5 rows"):
        call.by_entry("k", x[:5])
