"""Several adapters on one model: by name, mixed, one per sample, saved, taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.provided import Term
from burnish.core.errors import CheckError, ConfigError, RecipeError
from burnish.engine.slot import slots
from burnish.engine.swap import ATTR
from burnish.testing import stir
from burnish.testing.models import tiny


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def pair(recipe, model="llama", head=False, dtype=torch.float64):
    """A model with adapters `default` and `other` of one recipe, both stirred, in eval mode."""
    net, batch = tiny(model, dtype=dtype, batch=3)
    tuned = burnish.tune(net.eval(), recipe, head=head)
    tuned.add("other", recipe, seed=1)
    for _, _, slot in slots(net):
        slot.to(dtype)
    stir(tuned, 1, 0.2, adapter="default")
    stir(tuned, 2, 0.2, adapter="other")
    net.eval()
    batch.pop("labels")
    return tuned, batch


RECIPES = ["lora(rank=4)", "dora(rank=4)", "snella(rank=4)", "miss(rank=4)", "shira(rank=2)",
           "houlsby(bottleneck=4, norms=False)", "ia3", "lora(rank=4) + checkpoint"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_by_name_each_is_as_if_alone(recipe):
    tuned, batch = pair(recipe)
    base, _ = tiny("llama", dtype=torch.float64)
    want = logits(base.eval(), batch)
    got = {}
    for name in ("default", "other"):
        tuned.use(name)
        got[name] = logits(tuned.model, batch)
        alone = burnish.tune(tiny("llama", dtype=torch.float64)[0].eval(), recipe, head=False,
                             name=name)
        for _, _, slot in slots(alone.model):
            slot.to(torch.float64)
        values = tuned.tensors(name)
        for key, t in alone.tensors(name).items():
            if not key.endswith("_extra_state"):
                t.copy_(values[key])
        alone.model.eval()
        torch.testing.assert_close(got[name], logits(alone.model, batch), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got["default"], got["other"])
    with tuned.disabled():
        torch.testing.assert_close(logits(tuned.model, batch), want, rtol=1e-12, atol=1e-12)
    tuned.use("default")
    assert torch.equal(logits(tuned.model, batch), got["default"])


@pytest.mark.parametrize("recipe", ["lora(rank=4)", "snella(rank=4)", "miss(rank=4)",
                                    "shira(rank=2)"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.5, -1.0), (0.0, 2.0)], ids=str)
def test_a_mix_adds_the_weighted_updates(recipe, weights):
    tuned, batch = pair(recipe)
    a, b = weights
    deltas = [dict(tuned.terms(Term, n)) for n in ("default", "other")]
    base, _ = tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        for name in deltas[0]:
            base.get_parameter(name).add_(a * deltas[0][name].dense() + b * deltas[1][name].dense())
    tuned.use({"default": a, "other": b})
    want = logits(base.eval(), batch)
    torch.testing.assert_close(logits(tuned.model, batch), want, rtol=1e-9, atol=1e-9)
    assert next(tuned.parameters(), None) is None, "a mix trains nothing"
    torch.testing.assert_close(logits(tuned.merge(), batch), want, rtol=1e-9, atol=1e-9)


def test_a_mix_of_branches_adds_their_weighted_outputs():
    """One block, one place: y + .7 f(y) + .3 g(y)."""
    torch.manual_seed(0)
    net, batch = tiny("llama", num_hidden_layers=1, dtype=torch.float64)
    tuned = burnish.tune(net.eval(), "parallel(bottleneck=4)", head=False)
    tuned.add("other", "parallel(bottleneck=4)", seed=1)
    stir(tuned, 1, 0.2, adapter="default")
    stir(tuned, 2, 0.2, adapter="other")
    mlp = net.model.layers[0].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        with tuned.disabled():
            base = mlp(x)
        outs = []
        for name in ("default", "other"):
            tuned.use(name)
            outs.append(mlp(x) - base)
        tuned.use({"default": 0.7, "other": 0.3})
        torch.testing.assert_close(mlp(x), base + 0.7 * outs[0] + 0.3 * outs[1], rtol=1e-6,
                                   atol=1e-6)


def test_a_scaling_at_half_strength():
    """IA3 at .5 scales halfway: h + .5 (l h - h)."""
    tuned, batch = pair("ia3", dtype=torch.float32)
    tuned.use({"default": 0.5})
    k = tuned.model.model.layers[0].self_attn.k_proj
    x = torch.randn(2, 32)
    with torch.no_grad():
        half = k(x)
        tuned.use("default")
        full = k(x)
        with tuned.disabled():
            base = k(x)
    torch.testing.assert_close(half, (full + base) / 2)


def test_a_function_of_w_is_used_whole():
    tuned, batch = pair("dora(rank=4)")
    want = tuned.model(**batch).logits
    with pytest.raises(RecipeError, match="can be used whole"):
        tuned.use({"default": 0.5})
    with pytest.raises(RecipeError, match="functions of W"):
        tuned.use({"default": 1.0, "other": 1.0})
    assert torch.equal(tuned.model(**batch).logits, want)        # as it was before
    tuned.use({"default": 1.0, "other": 0.0})
    assert torch.equal(tuned.model(**batch).logits, want)


@pytest.mark.parametrize("recipe", ["prompt_tuning(length=2)", "prefix(length=2)",
                                    "lst(reduction=4)"])
def test_prompts_and_side_networks_are_used_whole_and_for_whole_batches(recipe):
    tuned, batch = pair(recipe)
    want = tuned.model(**batch).logits
    with pytest.raises(RecipeError, match="can be used whole, not at 0.5"):
        tuned.use({"default": 0.5})
    with pytest.raises(RecipeError, match="every sample of a batch"):
        tuned.use(["default", None, None])
    assert torch.equal(tuned.model(**batch).logits, want)        # as it was before


@pytest.mark.parametrize("model", ["llama", "vit", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_adapter_per_sample(recipe, model):
    """Every sample gets what it gets alone with its adapter; None gets the base."""
    tuned, batch = pair(recipe, model)
    rows = ["other", None, "default"]
    want = []
    for i, name in enumerate(rows):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        if name is None:
            with tuned.disabled():
                want.append(logits(tuned.model, one))
        else:
            tuned.use(name)
            want.append(logits(tuned.model, one))
    tuned.use(rows)
    torch.testing.assert_close(logits(tuned.model, batch), torch.cat(want), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model, recipe", [("timm_qkv", "lora(rank=4, targets='q,v')"),
                                           ("cnn", "lora(rank=4)"),
                                           ("encoder", "lora(rank=4)"),
                                           ("llama", "lora(rank=4, targets='embedding')")])
def test_one_adapter_per_sample_in_other_modules(model, recipe):
    settings = {"tie_word_embeddings": False} if model == "llama" else {}
    net, batch = tiny(model, dtype=torch.float64, batch=3, **settings)
    batch.pop("labels")
    tuned = burnish.tune(net.eval(), recipe, head=False)
    tuned.add("other", recipe, seed=1)
    stir(tuned, 1, 0.2, adapter="default")
    stir(tuned, 2, 0.2, adapter="other")
    net.eval()
    want = []
    for i, name in enumerate(["other", "default", "other"]):
        tuned.use(name)
        want.append(logits(net, {k: v[i : i + 1] for k, v in batch.items()}))
    tuned.use(["other", "default", "other"])
    torch.testing.assert_close(logits(net, batch), torch.cat(want), rtol=1e-6, atol=1e-6)


def test_per_sample_lists_must_fit_the_batch():
    tuned, batch = pair("lora(rank=4)")
    tuned.use(["default", "other"])
    with pytest.raises(RecipeError, match="2 adapters are named for a batch of 3"):
        tuned.model(**batch)


def test_per_sample_refuses_what_all_samples_share():
    tuned, _ = pair("lora(rank=4)", "vit", head=True)
    with pytest.raises(ConfigError, match="every sample of a batch shares"):
        tuned.use(["default", "other"])
    assert tuned.state.active == (("default", 1.0),), "nothing has changed"
    tuned.use(["other", None])


@pytest.mark.parametrize("recipe", ["vpt", "lst(reduction=4)"])
def test_per_sample_refuses_what_acts_on_the_whole_batch(recipe):
    net, batch = tiny("vit", batch=2)
    tuned = burnish.tune(net, "lora(rank=4)", head=False)
    tuned.add("other", recipe)
    want = net(**batch).logits
    with pytest.raises(burnish.BurnishError, match="every sample of a batch"):
        tuned.use(["other", None])
    assert torch.equal(net(**batch).logits, want)


def test_there_is_no_merging_per_sample():
    tuned, _ = pair("lora(rank=4)")
    tuned.use(["default", None, "other"])
    with pytest.raises(CheckError, match="per-sample"):
        tuned.merge()


# -- training one of several --------------------------------------------------------------------

def test_only_the_active_one_trains():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=4)")
    tuned.add("other", "lora(rank=2)", targets="q")
    tuned.use("other")
    assert {n.split(f".{ATTR}.")[1].split(".")[0] for n, _ in tuned.named_parameters()} == {"other"}
    before = {k: v.clone() for k, v in tuned.tensors("default").items()}
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    assert all(torch.equal(before[k], v) for k, v in tuned.tensors("default").items())
    assert any(p.abs().sum() > 0 for n, p in tuned.named_parameters() if n.endswith("B"))


def test_adding_changes_nothing_until_it_is_used():
    net, batch = tiny("llama")
    tuned = burnish.tune(net.eval(), "lora(rank=4)")
    trains = [n for n, _ in tuned.named_parameters()]
    want = logits(net, batch)
    tuned.add("other", "snella(rank=4)")
    assert torch.equal(logits(net, batch), want)
    assert [n for n, _ in tuned.named_parameters()] == trains


def test_an_optimizer_from_before_does_not_train_silently_nothing():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=4)")
    tuned.step(batch)
    tuned.add("other", "lora(rank=4)")
    tuned.use("other")
    with pytest.raises(CheckError, match="not in the optimizer.*optimizer"):
        tuned.step(batch)
    tuned.optimizer()
    tuned.step(batch)
    tuned.use("default")
    with pytest.raises(CheckError, match="not in the optimizer"):
        tuned.step(batch)


# -- base weights of several --------------------------------------------------------------------

def heads(recipe="lora(rank=4)"):
    """Two adapters that both train the head."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, recipe)
    tuned.add("other", recipe, head=True, seed=1)
    for name in ("default", "other"):
        tuned.use(name)
        tuned.optimizer(lr=1e-2)
        for _ in range(2 if name == "other" else 1):
            tuned.step(batch)
    net.eval()
    return tuned, batch


def test_each_adapter_has_its_own_head():
    tuned, batch = heads()
    start = tiny("vit")[0].classifier.weight
    other = tuned.model.classifier.weight.clone()
    tuned.use("default")
    default = tuned.model.classifier.weight.clone()
    assert not torch.equal(default, other) and not torch.equal(default, start)
    tuned.use("other")
    assert torch.equal(tuned.model.classifier.weight, other)
    tuned.use({"default": 0.25, "other": 0.75})
    torch.testing.assert_close(tuned.model.classifier.weight,
                               start + 0.25 * (default - start) + 0.75 * (other - start))
    with tuned.disabled():
        assert torch.equal(tuned.model.classifier.weight, start)
    tuned.detach()
    assert torch.equal(tuned.model.classifier.weight, start)


def test_an_adapter_without_base_weights_stands_on_the_base():
    net, batch = tiny("vit")
    start = net.classifier.weight.clone()
    tuned = burnish.tune(net, "lora(rank=4)")
    tuned.step(batch)
    trained = net.classifier.weight.clone()
    tuned.add("other", "bitfit")
    tuned.use("other")
    assert torch.equal(net.classifier.weight, start)
    assert not net.classifier.weight.requires_grad
    tuned.use("default")
    assert torch.equal(net.classifier.weight, trained)
    assert not hasattr(net.classifier.bias, "burnish_decay") or net.classifier.bias.burnish_decay


def test_an_adapter_is_exported_with_its_own_head(tmp_path):
    from safetensors.torch import load_file

    tuned, _ = heads()
    tuned.use("default")
    want = tuned.model.classifier.weight.clone()
    tuned.use("other")
    burnish.export_peft(tuned, tmp_path / "peft", name="default")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    (head,) = (v for k, v in written.items() if "classifier" in k and k.endswith("weight"))
    assert torch.equal(head, want)


# -- files --------------------------------------------------------------------------------------

def test_all_adapters_are_saved_and_loaded(tmp_path):
    tuned, batch = heads()
    tuned.add("third", "snella(rank=4)", targets="fc1", seed=3)
    stir(tuned, 3, 0.2, adapter="third")
    want = {}
    for name in ("default", "third", "other"):
        tuned.use(name)
        want[name] = logits(tuned.model, batch)
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0].eval(), tmp_path / "a")
    assert again.state.active == (("other", 1.0),), "the active one is active again"
    torch.testing.assert_close(logits(again.model, batch), want["other"])
    for name in ("third", "default", "other"):
        again.use(name)
        again.model.eval()
        torch.testing.assert_close(logits(again.model, batch), want[name])


def test_an_active_mix_is_active_again(tmp_path):
    tuned, batch = pair("lora(rank=4)", dtype=torch.float32)
    tuned.use({"default": 0.25, "other": 0.75})
    want = logits(tuned.model, batch)
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("llama")[0].eval(), tmp_path / "a")
    assert again.state.active == (("default", 0.25), ("other", 0.75))
    torch.testing.assert_close(logits(again.model, batch), want)


# -- leaving ------------------------------------------------------------------------------------

def snapshot(model):
    return ([(n, type(m)) for n, m in model.named_modules()],
            {n: (p.detach().clone(), p.requires_grad, p.data_ptr())
             for n, p in model.named_parameters()})


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for n, (value, flag, where) in a[1].items():
        assert torch.equal(value, b[1][n][0]) and (flag, where) == b[1][n][1:], n


def test_detach_takes_all_of_them_out():
    net, batch = tiny("vit")
    net.vit.layernorm.weight.requires_grad_(False)
    before = snapshot(net)
    tuned = burnish.tune(net, "lora(rank=4) + checkpoint")
    tuned.add("other", "houlsby(bottleneck=4, norms=False) + bitfit")
    tuned.use("other")
    tuned.optimizer()
    tuned.step(batch)
    tuned.detach()
    same(before, snapshot(net))


REFUSED = ["lora(rank=99)", "lora(rank=4) + full(targets='nothing_like_it')",
           "nf4 + full + checkpoint + lora(rank=4)",
           "checkpoint + offload(to='disk') + lora(rank=99)",
           "lean(on=False) + vpt + lora(rank=99)",
           "houlsby(bottleneck=4, norms=False) + lst(reduction=4)"]


@pytest.mark.parametrize("recipe", REFUSED)
def test_a_refused_add_leaves_the_model_as_it_was(recipe):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=4)")
    before, tape = snapshot(net), (tuned.state.tape.lean, tuned.state.tape.policy)
    modes = {p: (s.mode, list(s.listeners), dict(s.providers))
             for p, _, s in slots(net)}
    originals = set(tuned.originals)
    with pytest.raises(burnish.BurnishError):
        tuned.add("other", recipe)
    same(before, snapshot(net))
    assert (tuned.state.tape.lean, tuned.state.tape.policy) == tape
    assert modes == {p: (s.mode, list(s.listeners), dict(s.providers))
                     for p, _, s in slots(net)}
    assert list(tuned.adapters) == ["default"] and set(tuned.originals) == originals
    tuned.add("other", "lora(rank=2)")              # the name is free again
    tuned.step(batch)


def test_all_stand_on_one_base():
    """A storage in a later recipe would change what the others compute."""
    tuned = burnish.tune(tiny("llama", hidden_size=64)[0], "nf4 + lora(rank=4)")
    with pytest.raises(ConfigError, match="nf4 changes the form.*default"):
        tuned.add("other", "nf4 + lora(rank=4)")
    tuned.add("other", "lora(rank=2)")


@pytest.mark.parametrize("name", ["a b", "3", "", "default", "forward", "train", "parts", "mode",
                                  "state", "provided_weight", "run", "x.y"])
def test_names_that_cannot_be(name):
    tuned = burnish.tune(nn.Sequential(nn.Linear(8, 8)), "lora(rank=2)", head=False)
    with pytest.raises(ConfigError, match="adapter"):
        tuned.add(name, "lora(rank=2)")


def test_unknown_names_suggest_the_nearest():
    tuned = burnish.tune(nn.Sequential(nn.Linear(8, 8)), "lora(rank=2)", name="french")
    with pytest.raises(ConfigError, match="did you mean 'french'"):
        tuned.use("frnech")
    for nothing in ([], {}):
        with pytest.raises(ConfigError, match="names no adapter"):
            tuned.use(nothing)


def test_a_copy_of_the_model_goes_its_own_way():
    tuned, batch = pair("lora(rank=4)")
    tuned.use("other")
    twin = copy.deepcopy(tuned.model)
    want = logits(twin, batch)
    tuned.use("default")
    assert torch.equal(logits(twin, batch), want)
    assert not torch.equal(logits(tuned.model, batch), want)


def test_a_selection_is_of_the_model_and_not_of_another_adapter():
    net, _ = tiny("bert")
    tuned = burnish.tune(net, "houlsby", head=False)
    tuned.add("second", "bitfit")
    tuned.use("second")
    names = [n for n, _ in tuned.named_parameters()]
    assert names and not [n for n in names if ".burnish." in n]
