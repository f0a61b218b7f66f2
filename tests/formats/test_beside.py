"""Adapter folders of burnish on a model that has adapters already."""

from __future__ import annotations

import json

import pytest
import torch

import burnish
from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.formats.folder import CONFIG
from burnish.testing import stir
from burnish.testing.models import tiny


def answer(model, batch):
    model.eval()
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
    return out.logits


def saved(name, recipe, folder, seed, **kw):
    """(the batch, what the adapter of a new folder answers)"""
    model, batch = tiny(name)
    tuned = burnish.tune(model, recipe, seed=seed, **kw)
    stir(tuned, seed=seed, size=0.3)
    tuned.save(folder)
    return batch, answer(model, batch)


RECIPES = {"plain": "lora(rank=2)", "larger": "lora(rank=4) + ia3", "biases": "bitfit",
           "prompted": "prefix(length=3)", "masked": "shira(rank=2)", "started": "pissa(rank=2)"}


def test_each_answers_as_alone(tmp_path):
    want = {n: saved("bert", r, tmp_path / n, k)[1] for k, (n, r) in enumerate(RECIPES.items())}
    model, batch = tiny("bert")
    base = answer(model, batch)
    tuned = burnish.load(model, tmp_path / "plain", name="plain")
    assert list(tuned.adapters) == ["plain"]
    for name in list(RECIPES)[1:]:
        assert burnish.load(tuned, tmp_path / name, name=name) is tuned
    assert torch.equal(answer(model, batch), want["plain"])              # what was in use is
    for name in reversed(RECIPES):
        tuned.use(name)
        assert (want[name] - base).abs().max() > 1e-4
        torch.testing.assert_close(answer(model, batch), want[name], rtol=1e-5, atol=1e-6)
    tuned.save(tmp_path / "all")
    again = burnish.load(tiny("bert")[0], tmp_path / "all")
    for name in RECIPES:
        again.use(name)
        torch.testing.assert_close(answer(again.model, batch), want[name], rtol=1e-5, atol=1e-6)
    tuned.detach()
    assert torch.equal(answer(model, batch), base)


def test_a_folder_of_several_brings_all(tmp_path):
    """Two that train the same base weights, whose names in the file have the adapter's behind."""
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "bitfit", name="first", head=True)
    tuned.add("second", "lora(rank=2) + bitfit", head=True)
    want = {}
    for k, name in enumerate(("first", "second")):
        tuned.use(name)
        stir(tuned, seed=k, size=0.3)
        want[name] = answer(model, batch)
    tuned.save(tmp_path / "two")
    one = burnish.tune(tiny("vit")[0], "bitfit", name="mine", head=True)
    burnish.load(one, tmp_path / "two")
    for name in ("second", "first"):
        one.use(name)
        torch.testing.assert_close(answer(one.model, batch), want[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="holds 2 adapters, first, second"):
        burnish.load(tiny("vit")[0], tmp_path / "two", name="law")
    with pytest.raises(ConfigError, match="there is an adapter 'first' already"):
        burnish.load(one, tmp_path / "two")


def test_running_statistics_come_along(tmp_path):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4),
                                   torch.nn.Flatten(), torch.nn.Linear(16, 2))

    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 2
    want = {}
    for k, name in enumerate(("one", "two")):
        tuned = burnish.tune(net(), "lora(rank=2)", targets="3", head=False)
        tuned.model.train()
        for _ in range(k + 1):
            tuned.model(x)                                       # moves the statistics
        tuned.save(tmp_path / name)
        want[name] = tuned.model.eval()(x)
    both = burnish.load(net(), tmp_path / "one", name="one")
    burnish.load(both, tmp_path / "two", name="two")
    for name in ("two", "one"):
        both.use(name)
        torch.testing.assert_close(both.model.eval()(x), want[name])


def test_a_base_in_four_bits_serves_what_was_trained_on_it(tmp_path):
    batch, want = saved("llama", "nf4 + lora(rank=2)", tmp_path / "one", 1)
    tuned = burnish.tune(tiny("llama")[0], "nf4 + lora(rank=4)", name="mine")
    burnish.load(tuned, tmp_path / "one", name="one")
    assert str(tuned.adapters["one"].recipe) == "lora(rank=2)"
    tuned.use("one")
    torch.testing.assert_close(answer(tuned.model, batch), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs", "said"), [
    ("lora", "nf4 + lora(rank=2)", "was trained on held by nf4, this base is as the model holds"),
    ("nf4 + lora", "lora(rank=2)", "was trained on as the model holds it, this base is held by"),
    ("nf4 + lora", "rtn(bits=4) + lora(rank=2)", "held by rtn"),
])
def test_another_form_of_the_base_is_refused_unless_forced(tmp_path, ours, theirs, said):
    saved("llama", theirs, tmp_path / "one", 1)
    tuned = burnish.tune(tiny("llama")[0], ours)
    before = {k: v.clone() for k, v in tuned.model.state_dict().items()}
    with pytest.raises(FormatError, match=said):
        burnish.load(tuned, tmp_path / "one", name="one")
    assert list(tuned.adapters) == ["default"]
    assert all(torch.equal(v, before[k]) for k, v in tuned.model.state_dict().items())
    burnish.load(tuned, tmp_path / "one", name="one", force=True)
    tuned.use("one")


def test_a_start_that_a_storage_took_in_is_refused(tmp_path):
    saved("llama", "nf4 + pissa(rank=2)", tmp_path / "one", 1)
    tuned = burnish.tune(tiny("llama")[0], "nf4 + lora")
    with pytest.raises(FormatError, match="holds less what pissa starts from"):
        burnish.load(tuned, tmp_path / "one", name="one")
    assert list(tuned.adapters) == ["default"] and not tuned.filled


def test_what_does_not_fit_leaves_all_as_it_was(tmp_path):
    batch, _ = saved("llama", "lora(rank=2)", tmp_path / "one", 1)
    tuned = burnish.tune(tiny("llama")[0], "lora")
    stir(tuned, seed=3)
    before = answer(tuned.model, batch)
    with pytest.raises(ConfigError, match="there is an adapter 'default' already"):
        burnish.load(tuned, tmp_path / "one")
    with torch.no_grad():
        next(tuned.model.parameters()).add_(1)
    with pytest.raises(FormatError, match="trained on another base"):
        burnish.load(tuned, tmp_path / "one", name="law")
    with torch.no_grad():
        next(tuned.model.parameters()).sub_(1)
    where = tmp_path / "one" / CONFIG
    config = json.loads(where.read_text())
    config["adapters"]["default"]["recipe"] = "lora(rank=3)"
    where.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="has shape"):
        burnish.load(tuned, tmp_path / "one", name="law", force=True)
    saved("llama", "houlsby(bottleneck=2)", tmp_path / "two", 1)
    where = tmp_path / "two" / CONFIG
    where.write_text(where.read_text().replace("bottleneck=2", "bottleneck=40000"))
    with pytest.raises(FormatError, match="its recipe makes"):
        burnish.load(tuned, tmp_path / "two", name="law", force=True)
    assert list(tuned.adapters) == ["default"]
    torch.testing.assert_close(answer(tuned.model, batch), before)
    tuned.detach()
    with pytest.raises(BurnishError):
        burnish.load(tuned, tmp_path / "one", name="law")


def test_training_goes_on_with_what_was_loaded(tmp_path):
    saved("llama", "lora(rank=2)", tmp_path / "one", 1)
    tuned = burnish.tune(tiny("llama")[0], "lora")
    burnish.load(tuned, tmp_path / "one", name="law")
    batch = tiny("llama")[1]
    tuned.use("law")
    tuned.optimizer(lr=1e-2)
    first = tuned.step(batch)
    assert all(".law." in n for n, _ in tuned.named_parameters())
    assert tuned.step(batch) < first
