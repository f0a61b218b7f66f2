"""Several PEFT folders on one model: each answers as PEFT's does, alone, in a mix and by sample."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    FrodConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

import burnish
from burnish.core.errors import ConfigError, FormatError, RecipeError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits[:, -8:] if logits.dim() == 3 else logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def saved(name, config, folder, seed):
    theirs = stir(get_peft_model(tiny(name)[0], config), seed=seed, size=0.3)
    theirs.save_pretrained(folder)
    return outputs(theirs, tiny(name)[1])


def test_each_answers_as_there(tmp_path):
    configs = {
        "plain": LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
        "larger": LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_rslora=True),
        "turned": OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        "scaled": VeraConfig(target_modules=["down_proj"], r=4),
        "based": FrodConfig(target_modules=["q_proj"], sparse_rate=0.1, progressbar=False),
        "rows": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    want = {n: saved("llama", c, tmp_path / n, k) for k, (n, c) in enumerate(configs.items())}
    model, batch = tiny("llama")
    base = outputs(model, batch)
    tuned = load_peft(model, tmp_path / "plain", "plain")
    for name in list(configs)[1:]:
        assert load_peft(tuned, tmp_path / name, name) is tuned
    same(outputs(model, batch), want["plain"])           # what was in use is
    for name in configs:
        assert (want[name] - base).abs().max() > 1e-4
        tuned.use(name)
        same(outputs(model, batch), want[name])
    tuned.use(["larger", None])
    mixed = outputs(model, batch)
    same(mixed[0], want["larger"][0])
    same(mixed[1], base[1])
    theirs = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "plain", adapter_name="plain")
    theirs.load_adapter(str(tmp_path / "larger"), adapter_name="larger")
    theirs.add_weighted_adapter(["plain", "larger"], [0.25, 0.5], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    tuned.use({"plain": 0.25, "larger": 0.5})
    same(outputs(model, batch), outputs(theirs, batch))
    export_peft(tuned, tmp_path / "again", name="larger")
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "again")
    same(outputs(back, batch), want["larger"])
    tuned.use("plain")
    tuned.detach()
    assert torch.equal(outputs(model, batch), base)


def test_each_has_its_own_head(tmp_path):
    config = {n: LoraConfig(target_modules=["query"], r=2, task_type="SEQ_CLS") for n in "ab"}
    want = {n: saved("bert", c, tmp_path / n, k) for k, (n, c) in enumerate(config.items())}
    model, batch = tiny("bert")
    tuned = load_peft(model, tmp_path / "a", "a")
    load_peft(tuned, tmp_path / "b", "b")
    assert (want["a"] - want["b"]).abs().max() > 1e-2
    for name in "abab":
        tuned.use(name)
        same(outputs(model, batch), want[name])
    tuned.save(tmp_path / "ours")
    again = burnish.load(tiny("bert")[0], tmp_path / "ours")
    for name in "ba":
        again.use(name)
        same(outputs(again.model, batch), want[name])


def test_beside_one_that_trains_the_base(tmp_path):
    """What a type reads of a weight is the base's, whatever another adapter has made of it."""
    want = saved("llama", FrodConfig(target_modules=["q_proj"], sparse_rate=0.1,
                                     progressbar=False), tmp_path, 1)
    model, batch = tiny("llama")
    tuned = stir(burnish.tune(model, "full(targets='q')"), size=0.3)
    moved = outputs(model, batch)
    load_peft(tuned, tmp_path, "second")
    same(outputs(model, batch), moved)
    tuned.use("second")
    same(outputs(model, batch), want)


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules=["q_proj"], r=2), OFTConfig(target_modules=["q_proj"],
                                                          oft_block_size=8),
    FrodConfig(target_modules=["q_proj"], sparse_rate=0.1, progressbar=False)],
    ids=["lora", "oft", "frod"])
def test_on_a_base_that_is_held_in_four_bits(config, tmp_path):
    """The base is what the four bits say."""
    saved("llama", config, tmp_path, 1)
    model, batch = tiny("llama")
    tuned = burnish.tune(model, "nf4 + lora(rank=2)")
    before, plain = outputs(model, batch), tiny("llama")[0]
    with torch.no_grad():
        for place in tuned.anatomy.places:
            if place.block is not None:
                plain.get_submodule(place.path).weight.copy_(
                    model.get_submodule(place.path).weight)
    load_peft(tuned, tmp_path, "law")
    same(outputs(model, batch), before)
    tuned.use("law")
    assert (outputs(model, batch) - before).abs().max() > 1e-3
    want = outputs(load_peft(plain, tmp_path).model, batch)
    torch.testing.assert_close(outputs(model, batch), want, rtol=1e-4, atol=1e-5)


def test_whatever_is_refused_leaves_all_as_it_was(tmp_path):
    saved("llama", LoraConfig(target_modules=["q_proj"], r=2), tmp_path, 1)
    model, batch = tiny("llama")
    tuned = stir(burnish.tune(model, "lora(rank=3)"))
    want, names = outputs(model, batch), [n for n, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="say what one more adapter is called"):
        load_peft(tuned, tmp_path)
    with pytest.raises(ConfigError, match="or hand over its handle"):
        load_peft(model, tmp_path)
    with pytest.raises((ConfigError, RecipeError), match="default"):
        load_peft(tuned, tmp_path, "default")
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"layer_replication": [[0, 1], [0, 2]]}))
    with pytest.raises(FormatError, match="this one is tuned"):
        load_peft(tuned, tmp_path, "second")
    file.write_text(json.dumps(said | {"r": 5}))
    with pytest.raises(FormatError, match="its settings say 5"):
        load_peft(tuned, tmp_path, "second")
    assert torch.equal(outputs(model, batch), want) and list(tuned.adapters) == ["default"]
    assert [n for n, _ in model.named_parameters()] == names and not tuned.filled
    tuned.step(batch)
