"""What types of PEFT's that are nearly ours have no form for, in either direction."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AdamssConfig,
    AdaptionPromptConfig,
    FrodConfig,
    PeftModel,
    get_peft_model,
)

import burnish
from burnish.blocks.weight.clustered import Clustered
from burnish.blocks.weight.joint import Joint
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def kind(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("name, config, words", [
    ("gpt2", AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
     "of llama and mistral as wide as the model, not for a GPT2Attention"),
    ("bert", AdamssConfig(r=8, target_modules=["query"]), "query has a bias, which PEFT's ADAMSS"),
])
def test_a_folder_that_is_another_function(name, config, words, tmp_path):
    stir(get_peft_model(tiny(name)[0], config)).save_pretrained(tmp_path)
    model, batch = tiny(name)
    want = outputs(model, batch)
    with pytest.raises(FormatError, match=words):
        load_peft(model, tmp_path)
    assert torch.equal(outputs(model, batch), want)


@pytest.mark.parametrize("name, recipe, words, sizes", [
    ("gpt2", "adaption_prompt", "not for a GPT2Attention", {}),
    ("vit", "adaption_prompt", "of llama and mistral", {}),
    ("llama", "adaption_prompt(per_head=True)", "one gate for an attention, here is one", {}),
    ("llama", "adaption_prompt", "o_proj has a bias, which PEFT's ADAPTION_PROMPT adds twice",
     {"attention_bias": True}),
    ("llama", "adaption_prompt", "as wide as the model", {"head_dim": 16}),
    ("gpt2", "glora(targets='c_attn')", "GLORA has no form for a Conv1D", {}),
])
def test_an_adapter_that_peft_would_read_otherwise(name, recipe, words, sizes, tmp_path):
    tuned = stir(burnish.tune(tiny(name, **sizes)[0], recipe, head=False))
    with pytest.raises(FormatError, match=words):
        export_peft(tuned, tmp_path / "a")


def test_rows_of_other_attentions_than_the_last(tmp_path):
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    model = tiny("llama", num_hidden_layers=3)[0]
    with pytest.raises(FormatError, match="stands in the last attentions of a model, here "
                                          r"model\.layers\.2"):
        load_peft(model, tmp_path)


def test_a_basis_that_peft_would_not_find(tmp_path):
    """On another base, or made on another machine: U would be read off it otherwise."""
    tuned = stir(burnish.tune(tiny("llama")[0], "frod(density=0.1)"))
    _, term = next(iter(tuned.terms(Joint)))
    term.V[:, 3] *= -1
    with pytest.raises(FormatError, match="and finds another than this adapter has"):
        export_peft(tuned, tmp_path / "a")


def test_two_of_a_kind_in_a_layer(tmp_path):
    tuned = burnish.tune(tiny("mixtral")[0], "frod(density=0.1, targets='q')")
    export_peft(tuned, tmp_path / "a")
    assert kind(tmp_path / "a") == "FROD"
    net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(
        {n: torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}) for n in ("0", "1")})])})
    from burnish.formats.peft_principal import _bases

    named = {n: m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    with pytest.raises(FormatError, match="tells one q in layer 0, and here are two"):
        _bases(named, 1e-3)


@pytest.mark.parametrize("change, words", [
    (lambda t, n: t.pop(f"base_model.frod_V.{n}"), "no whole basis of self_attn_q_proj"),
    (lambda t, n: t.pop(f"base_model.frod_s_size.{n}"), "no whole basis of self_attn_q_proj"),
    (lambda t, n: t[f"base_model.frod_s_indices.{n}"].__setitem__((0, 0), 32), "are no entries of"),
    (lambda t, n: t[f"base_model.frod_s_indices.{n}"].__setitem__((0, 0), -1), "are no entries of"),
    (lambda t, n: t[f"base_model.frod_s_size.{n}"].__setitem__(1, 31), "are no entries of"),
])
def test_a_basis_that_is_none(change, words, tmp_path):
    from safetensors.torch import load_file, save_file

    config = FrodConfig(target_modules=["q_proj"], sparse_rate=0.1, progressbar=False)
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, "self_attn_q_proj")
    save_file(tensors, file)
    with pytest.raises(FormatError, match=words):
        load_peft(tiny("llama")[0], tmp_path)


@pytest.mark.parametrize("name, recipe", [
    ("bert", "adamss(rank=8, targets='query')"), ("llama", "adamss(rank=8)")])
def test_clusters_that_peft_would_not_find_are_the_low_rank_pair_they_are(name, recipe, tmp_path):
    """A bias would be one more input there; other clusters are another function."""
    model, batch = tiny(name)
    tuned = stir(burnish.tune(model, recipe, head=False))
    if name == "llama":
        _, term = next(iter(tuned.terms(Clustered)))
        term.cluster.copy_(term.cluster.roll(1))
    want = outputs(model, batch)
    export_peft(tuned, tmp_path / "a")
    assert kind(tmp_path / "a") == "LORA"
    theirs = PeftModel.from_pretrained(tiny(name)[0], tmp_path / "a")
    torch.testing.assert_close(outputs(theirs, batch), want, rtol=1e-5, atol=5e-6)
