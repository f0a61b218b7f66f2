"""A model opened without reading it: the same bits as loaded whole, and little of it at once."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import burnish
from burnish.core import unread
from burnish.core.errors import ConfigError, FormatError
from burnish.core.unread import is_unread, read_all
from burnish.memory.during import watching
from burnish.testing import tiny
from burnish.testing.ran import Living

FAMILIES = ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "qwen_moe", "roberta", "clip", "swin"]
#: a Llama in which no weight is more than a sixth of all
DEEP = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6, "vocab_size": 128,
        "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def every_tensor_waits(monkeypatch):
    monkeypatch.setattr(unread, "WAITS", 1)


def folder_of(name, tmp_path, shard="20KB", **settings):
    model = tiny(name, seed=3, **settings)[0]
    model.save_pretrained(tmp_path / name, max_shard_size=shard)
    return tmp_path / name, type(model)


def tensors(model):
    return {**dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False))}


def same(left, right):
    assert left.keys() == right.keys()
    for name, t in left.items():
        assert t.dtype == right[name].dtype and t.shape == right[name].shape, name
        assert torch.equal(t, right[name]), name


@pytest.mark.parametrize("name", FAMILIES)
def test_an_opened_model_is_the_loaded_one_once_it_is_read(name, tmp_path):
    folder, cls = folder_of(name, tmp_path)
    whole = cls.from_pretrained(folder)
    model = burnish.open_model(folder)
    assert is_unread(model) and type(model) is cls
    read_all(model)
    assert not is_unread(model) and not model._forward_pre_hooks
    same(tensors(model), tensors(whole))
    assert [n for n, p in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.name_or_path == whole.name_or_path and model.training == whole.training
    if whole.can_generate():
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()


RECIPES = [("llama", "nf4 + lora(rank=2)"), ("llama", "nf4 + pissa(rank=2)"),
           ("llama", "bf16 + dora(rank=2)"), ("llama", "lora(rank=2)"), ("llama", "norms + nf4"),
           ("gpt2", "nf4 + lora(rank=2)"), ("gpt2", "bf16 + pissa(rank=2)"),
           ("bert", "nf4 + bitfit"), ("bert", "nf4 + dora(rank=2)"), ("t5", "nf4 + lora(rank=2)"),
           ("vit", "nf4(double_quant=False) + lora(rank=2)"), ("vit", "full"),
           ("mixtral", "nf4 + lora(rank=2)"), ("mixtral", "bf16 + norms")]


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_tuned_unread_or_whole_is_the_same_bit_for_bit(name, recipe, tmp_path):
    folder, cls = folder_of(name, tmp_path)
    whole = burnish.tune(cls.from_pretrained(folder), recipe)
    streamed = burnish.tune(burnish.open_model(folder), recipe)
    assert not is_unread(streamed.model)
    same(tensors(streamed.model), tensors(whole.model))
    same(dict(streamed.tensors()), dict(whole.tensors()))
    streamed.detach()
    same(tensors(streamed.model), tensors(cls.from_pretrained(folder)))


# -- how much is in memory at once ------------------------------------------------------------
def largest(model):
    return max(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_coded_model_and_the_largest_weight(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("burnish.engine.originals.IN_MEMORY", 1)
    folder, cls = folder_of("llama", tmp_path, **DEEP)
    cls.from_pretrained(folder, dtype=dtype).save_pretrained(folder := tmp_path / dtype)
    with Living() as living:
        tuned = burnish.tune(burnish.open_model(folder), "nf4 + lora(rank=2)")
    stands = sum(t.nbytes for t in tensors(tuned.model).values())
    whole = cls.from_pretrained(folder)
    # the weight as it stands in the file, and for each of its entries three words of four bytes:
    # its value, that over the scale, and where in the table of codes it is looked up
    one = largest(whole) + 3 * 4 * max(p.numel() for p in whole.parameters())
    assert stands <= living.peak <= stands + one
    assert living.peak < sum(p.nbytes for p in whole.parameters()) * 2 / 3


def test_stacked_experts_are_made_one_at_a_time(tmp_path):
    folder, cls = folder_of("mixtral", tmp_path, num_hidden_layers=6)
    whole = cls.from_pretrained(folder)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) > len(list(whole.parameters()))             # they are apart in the files
    with Living() as living:
        model = burnish.open_model(folder)
    assert living.peak <= 3 * largest(whole) < sum(p.nbytes for p in whole.parameters()) / 3
    read_all(model)
    same(tensors(model), tensors(whole))


@pytest.mark.parametrize("recipe", ["nf4 + lora(rank=2) + checkpoint", "lora(rank=2)",
                                    "bf16 + dora(rank=2)", "nf4 + pissa(rank=2)"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_promise_of_loading_is_kept(name, recipe, tmp_path):
    folder, _ = folder_of(name, tmp_path, **(DEEP if name == "llama" else {}))
    model = burnish.open_model(folder)
    promise = burnish.simulate(model, recipe, (2, 8), during="load")
    with watching(model) as told:
        burnish.tune(model, recipe)
    if "pissa" in recipe:         # a start that is computed from the weight is in no promise
        assert promise.peak_bytes <= told[0].peak_bytes
    else:
        assert promise.peak_bytes == told[0].peak_bytes


def test_a_step_of_an_opened_model_is_promised_as_of_a_loaded_one(tmp_path):
    folder, cls = folder_of("llama", tmp_path)
    recipe = "nf4 + lora(rank=2)"
    opened, whole = burnish.open_model(folder).train(), cls.from_pretrained(folder).train()
    for during in ("train", "evaluate", "save", "merge"):
        left = burnish.simulate(opened, recipe, (2, 8), during=during)
        right = burnish.simulate(whole, recipe, (2, 8), during=during)
        assert (left.peak_bytes, left.by_category) == (right.peak_bytes, right.by_category)


# -- what the base was ---------------------------------------------------------------------------
def test_the_base_waits_in_the_folder_and_not_in_a_copy(tmp_path, monkeypatch):
    from burnish.blocks.tape import disk

    folder, cls = folder_of("llama", tmp_path)
    monkeypatch.setattr("burnish.engine.originals.IN_MEMORY", 1)
    monkeypatch.setattr(disk, "write", lambda *_: pytest.fail("the base was written once more"))
    tuned = burnish.tune(burnish.open_model(folder), "nf4 + lora(rank=2)")
    assert not any(isinstance(t, torch.Tensor) for t in tuned.originals.kept.values())
    tuned.detach()
    same(tensors(tuned.model), tensors(cls.from_pretrained(folder)))


def test_a_folder_that_has_changed_is_refused(tmp_path, monkeypatch):
    folder, _ = folder_of("llama", tmp_path, shard="1GB")
    monkeypatch.setattr("burnish.engine.originals.IN_MEMORY", 1)
    tuned = burnish.tune(burnish.open_model(folder), "nf4 + lora(rank=2)")
    file = folder / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="has changed since"):
        tuned.detach()


def test_an_adapter_of_an_opened_base_belongs_to_the_loaded_one(tmp_path):
    folder, cls = folder_of("llama", tmp_path)
    tuned = burnish.tune(burnish.open_model(folder), "nf4 + lora(rank=2)")
    batch = tiny("llama")[1]
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    tuned.save(tmp_path / "adapter")
    again = burnish.load(cls.from_pretrained(folder), tmp_path / "adapter")
    third = burnish.load(burnish.open_model(folder), tmp_path / "adapter")
    for other in (again, third):
        same(dict(other.tensors()), dict(tuned.tensors()))
        other.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(third.model(**batch).logits, again.model(**batch).logits,
                                   rtol=0, atol=0)


# -- what is refused -------------------------------------------------------------------------------
def test_an_opened_model_does_not_run_before_it_is_read(tmp_path):
    folder, _ = folder_of("llama", tmp_path)
    model, batch = burnish.open_model(folder), tiny("llama")[1]
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ConfigError, match="still in its files"):
            one(**batch)
    tuned = burnish.tune(model, "nf4 + lora(rank=2)")
    assert torch.isfinite(tuned.model(**batch).loss)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj"),
    (lambda t: t.update({"extra.weight": torch.ones(3)}), "called, extra.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight"),
])
def test_tensors_that_do_not_belong_together_are_refused_by_name(tmp_path, change, said):
    folder, _ = folder_of("llama", tmp_path, shard="1GB")
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((FormatError, ConfigError), match=said):
        burnish.open_model(folder)


def test_a_truncated_shard_and_a_pickle_are_refused(tmp_path):
    folder, _ = folder_of("llama", tmp_path, shard="1GB")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="truncated"):
        burnish.open_model(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickled"):
        burnish.open_model(folder)
    with pytest.raises(ConfigError, match="no model folder"):
        burnish.open_model(tmp_path)


def test_a_refused_recipe_leaves_a_model_that_can_be_tuned(tmp_path):
    folder, cls = folder_of("llama", tmp_path)
    model = burnish.open_model(folder)
    with pytest.raises(burnish.RecipeError):
        burnish.tune(model, "nf4 + full")
    tuned = burnish.tune(model, "nf4 + lora(rank=2)")
    whole = burnish.tune(cls.from_pretrained(folder), "nf4 + lora(rank=2)")
    same(tensors(tuned.model), tensors(whole.model))


def test_a_recipe_that_reads_data_first_reads_the_base_whole_before(tmp_path):
    folder, cls = folder_of("llama", tmp_path)
    data = [tiny("llama")[1]]
    streamed = burnish.tune(burnish.open_model(folder), "eva(rank=2)", calibration=data)
    whole = burnish.tune(cls.from_pretrained(folder), "eva(rank=2)", calibration=data)
    same(dict(streamed.tensors()), dict(whole.tensors()))


def test_another_dtype_is_the_one_transformers_gives(tmp_path):
    folder, cls = folder_of("llama", tmp_path)
    model = burnish.open_model(folder, dtype="bfloat16")
    read_all(model)
    same(tensors(model), tensors(cls.from_pretrained(folder, dtype=torch.bfloat16)))
