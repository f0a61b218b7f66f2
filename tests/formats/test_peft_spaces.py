"""PEFT's later types, those of peft_principal.py and others: the same outputs on both sides."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AdamssConfig,
    AdaptionPromptConfig,
    BeftConfig,
    DeftConfig,
    FrodConfig,
    GloraConfig,
    LilyConfig,
    OSFConfig,
    PeanutConfig,
    PeftModel,
    PsoftConfig,
    PveraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    WaveFTConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

import burnish
from burnish.blocks.weight.between import Turned
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


OUT = {
    "llama osf": ("llama", "osf"),
    "llama osf how many": ("llama", "osf(kept=20, targets='q,down')"),
    "llama osf two": ("llama", "osf(kept=20, targets='q') + osf(kept=0.25, targets='v')"),
    "llama psoft": ("llama", "psoft(rank=6)"),
    "llama psoft series": ("llama", "psoft(rank=6, terms=4, bound=0.2, gain_in=False)"),
    "llama psoft free": ("llama", "psoft(rank=6, free=True, balanced=True, gain_out=False)"),
    "llama peanut": ("llama", "peanut(rank=4)"),
    "llama peanut deep": ("llama", "peanut(rank=4, encoders=2, act='gelu', scale=3.0)"),
    "llama deft": ("llama", "deft(rank=4)"),
    "gpt2 deft": ("gpt2", "deft(rank=4, form='qr', alpha=6.0, targets='c_attn,c_fc')"),
    "llama deft para": ("llama", "deft(rank=4, inject=False)"),
    "llama beft": ("llama", "beft"),
    "llama adaption_prompt": ("llama", "adaption_prompt(length=4)"),
    "llama adaption_prompt last": ("llama", "adaption_prompt(length=4, layers=1, squash=True)"),
    "llama adamss": ("llama", "adamss(rank=10, clusters=3)"),
    "llama adamss all": ("llama", "adamss(rank=12, clusters=4, each=3, "
                         "threshold=0.3, targets='q,down')"),
    "llama glora": ("llama", "glora(rank=3)"),
    "llama glora columns": ("llama", "glora(form='vector', targets='v,down')"),
    "vit glora": ("vit", "glora(form='constant')"),
    "llama frod": ("llama", "frod(density=0.1)"),
    "gpt2 frod": ("gpt2", "frod(density=0.1, ridge=0.1, seed=3, targets='c_attn,c_fc')"),
    "llama supertuning": ("llama", "supertuning(density=0.1)"),
    "llama supertuning with a lora": ("llama", "supertuning(density=0.05, largest=False, rank=3)"),
    "bert beft": ("bert", "beft(targets='query,value')"),
    "llama lily": ("llama", "lily(rank=4, stride=2, experts=3, scale=2.0)"),
    "llama lily of a size": ("llama", "lily(rank=4, grouping='size', targets='q,o')"),
    "llama pvera": ("llama", "pvera(rank=16)"),
    "llama vblora": ("llama", "vblora(rank=3, vectors=9, span=8, k=3)"),
    "gpt2 vblora": ("gpt2", "vblora(rank=3, vectors=9, span=4, targets='c_attn,c_fc')"),
    "llama unilora": ("llama", "unilora(rank=3, dimension=40, seed=5, start=0.5)"),
    "gpt2 unilora": ("gpt2", "unilora(rank=3, dimension=40, start=0.5, targets='c_fc,c_attn')"),
    "llama tinylora": ("llama", "tinylora(rank=3, dimension=9)"),
    "llama tinylora tied": ("llama", "tinylora(rank=3, dimension=9, tying=0.4, targets='*')"),
    "gpt2 tinylora": ("gpt2", "tinylora(rank=50, dimension=9, tying=1.0, targets='c_attn,c_fc')"),
    "llama waveft": ("llama", "waveft(n=60, positions='torch', alpha=40.0)"),
    "llama waveft two": ("llama", "waveft(n=60, positions='torch', wavelet='coif1', targets='q') + "
                         "waveft(n=40, positions='torch', wavelet='coif1', targets='down')"),
    "gpt2 waveft": ("gpt2", "waveft(n=90, positions='torch', wavelet='db5', "
                    "targets='c_attn,c_fc')"),
    "llama waveft entries": ("llama", "waveft(n=60, positions='torch', wavelet='none', seed=3)"),
}


@pytest.mark.parametrize("case", OUT)
def test_peft_computes_what_we_exported(case, tmp_path):
    name, recipe = OUT[case]
    model, batch = tiny(name)
    base = outputs(model, batch)
    tuned = stir(burnish.tune(model, recipe, head=False))
    ours = outputs(model, batch)
    export_peft(tuned, tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind.lower() == tuned.recipe[0].name
    theirs = outputs(PeftModel.from_pretrained(tiny(name)[0], tmp_path), batch)
    assert (ours - base).abs().max() > 1e-4
    same(theirs, ours)


IN = {
    "llama osf": ("llama", OSFConfig(target_modules=["q_proj", "down_proj"])),
    "llama osf numbers": ("llama", OSFConfig(
        target_modules=["q_proj", "down_proj"], effective_rank=0.7,
        rank_pattern={"layers.0.self_attn.q_proj": 3})),
    "llama psoft": ("llama", PsoftConfig(target_modules=["q_proj", "down_proj"], r=6)),
    "llama psoft series": ("llama", PsoftConfig(
        target_modules=["v_proj", "down_proj"], r=6, use_cayley_neumann=True,
        num_cayley_neumann_terms=3, cayley_neumann_eps=0.5, psoft_mag_a=False, psoft_alpha=7)),
    "llama psoft free": ("llama", PsoftConfig(
        target_modules=["v_proj", "o_proj"], r=6, psoft_orth=False, ab_svd_init="pissa_init",
        psoft_mag_b=False, psoft_alpha=7)),
    "llama peanut": ("llama", PeanutConfig(target_modules=["q_proj", "down_proj"], r=5)),
    "llama peanut deep": ("llama", PeanutConfig(target_modules=["v_proj", "down_proj"], r=5,
                                                depth=3, act_fn="silu", scaling=4.0)),
    "llama deft": ("llama", DeftConfig(target_modules=["q_proj", "down_proj"], r=5)),
    "gpt2 deft": ("gpt2", DeftConfig(target_modules=["c_attn"], r=5, alpha=7,
                                     decomposition_method="qr", fan_in_fan_out=True)),
    "gpt2 deft biases": ("gpt2", DeftConfig(target_modules=["c_fc"], r=5, fan_in_fan_out=True,
                                            bias="deft_only")),
    "llama deft para": ("llama", DeftConfig(target_modules=["q_proj"], r=5, para=True)),
    "bert beft": ("bert", BeftConfig(target_modules=["value"], modules_to_save=["classifier"])),
    "llama supertuning": ("llama", SupertuningConfig(target_modules=["q_proj", "down_proj"],
                                                     sparsity=0.9)),
    "llama supertuning found": ("llama", SupertuningConfig(
        target_modules=["q_proj"], sparsity=0.8, save_precomputed_indices=False)),
    "llama supertuning with a lora": ("llama", SupertuningConfig(
        target_modules=["q_proj", "down_proj"], sparsity=0.95, r=3, lora_alpha=5,
        select_top=False)),
    "llama lily": ("llama", LilyConfig(target_modules=["q_proj", "down_proj"], r=3, num_B=3)),
    "llama lily in strides": ("llama", LilyConfig(target_modules=["v_proj", "self_attn.q_proj"],
                                                  r=3, stride_A=2, scaling=3)),
    "llama lily of a size": ("llama", LilyConfig(target_modules=r".*self_attn\.(q|o)_proj", r=3,
                                                 stride_A=3)),
    "bert lily": ("bert", LilyConfig(target_modules=["query"], r=3, stride_A=2,
                                     modules_to_save=["classifier"])),
    "llama pvera": ("llama", PveraConfig(target_modules=["q_proj", "down_proj"], r=16)),
    "gpt2 pvera drawn": ("gpt2", PveraConfig(
        target_modules=["c_attn", "c_fc"], r=16, save_projection=False, projection_prng_key=7,
        fan_in_fan_out=True, bias="pvera_only", generator_seed=3)),
    "llama vblora": ("llama", VBLoRAConfig(target_modules=["q_proj", "down_proj"], r=3,
                                           num_vectors=11, vector_length=8)),
    "llama vblora best": ("llama", VBLoRAConfig(
        target_modules=["q_proj", "down_proj"], r=3, num_vectors=11, vector_length=8, topk=3,
        save_only_topk_weights=True)),
    "gpt2 vblora biases": ("gpt2", VBLoRAConfig(
        target_modules=["c_attn"], r=2, num_vectors=300, vector_length=16, fan_in_fan_out=True,
        bias="vblora_only")),
    "llama unilora": ("llama", UniLoraConfig(target_modules=["q_proj", "down_proj"], r=3,
                                             theta_d_length=50)),
    "llama unilora with its deal": ("llama", UniLoraConfig(
        target_modules=["q_proj", "down_proj"], r=3, theta_d_length=50, save_indices=True)),
    "llama unilora a layer": ("llama", UniLoraConfig(
        target_modules=["down_proj", "q_proj"], r=3, theta_d_length=50, proj_seed=7,
        layers_to_transform=1)),
    "llama unilora a pattern": ("llama", UniLoraConfig(
        target_modules=r".*layers\.1.*(q|v)_proj", r=3, theta_d_length=50)),
    "gpt2 unilora biases": ("gpt2", UniLoraConfig(
        target_modules=["c_fc", "c_attn"], r=3, theta_d_length=50, fan_in_fan_out=True, bias="all",
        layers_to_transform=[0], layers_pattern=["h"])),
    "llama tinylora": ("llama", TinyLoraConfig(target_modules=["q_proj", "down_proj"], r=3, u=7)),
    "llama tinylora drawn": ("llama", TinyLoraConfig(
        target_modules=["q_proj", "down_proj"], r=3, u=7, save_projection=False,
        projection_seed=9)),
    "gpt2 tinylora biases": ("gpt2", TinyLoraConfig(
        target_modules=["c_attn", "c_fc", "c_proj"], r=50, u=7, weight_tying=0.6,
        fan_in_fan_out=True, bias="tinylora_only")),
    "bert tinylora": ("bert", TinyLoraConfig(
        target_modules=["word_embeddings", "query"], r=3, u=7, init_weights="uniform",
        save_projection=False, modules_to_save=["classifier"])),
    "llama waveft": ("llama", WaveFTConfig(target_modules=["q_proj", "down_proj"], n_frequency=60,
                                           wavelet_family="sym4", random_loc_seed=5, scaling=40)),
    "llama waveft entries": ("llama", WaveFTConfig(target_modules=["q_proj"], n_frequency=60,
                                                   use_idwt=False)),
    "bert waveft by size": ("bert", WaveFTConfig(
        target_modules=["query", "value", "output.dense"], n_frequency=60,
        proportional_parameters=True, modules_to_save=["classifier"])),
    "llama waveft pattern": ("llama", WaveFTConfig(
        target_modules=["q_proj", "down_proj"], n_frequency=60, wavelet_family="coif2",
        n_frequency_pattern={"layers.1.self_attn.q_proj": 90})),
    "gpt2 waveft biases": ("gpt2", WaveFTConfig(target_modules=["c_attn"], n_frequency=60,
                                                fan_in_fan_out=True, bias="waveft_only")),
    "llama adamss": ("llama", AdamssConfig(target_modules=["q_proj", "down_proj"], r=10,
                                           num_subspaces=3, subspace_rank=2)),
    "llama adamss dynamic": ("llama", AdamssConfig(
        target_modules=["q_proj", "v_proj"], num_subspaces=6, subspace_rank=4, random_seed=3,
        use_dynamic_rank=True, svd_threshold=0.5)),
    "llama glora": ("llama", GloraConfig(target_modules=["q_proj", "down_proj"], r=3)),
    "llama glora numbers": ("llama", GloraConfig(
        target_modules=["q_proj", "down_proj"], config_A_B="constant", config_C="none")),
    "bert glora": ("bert", GloraConfig(
        target_modules=["query", "value"], config_A_B="vector", config_C="none",
        config_D_E="none", bias="glora_only", modules_to_save=["classifier"])),
    "llama frod": ("llama", FrodConfig(target_modules=["q_proj", "down_proj"], sparse_rate=0.1,
                                       progressbar=False)),
    "llama frod made again": ("llama", FrodConfig(
        target_modules=["q_proj", "v_proj"], sparse_rate=0.05, regularization_alpha=0.1,
        projection_prng_key=5, save_projection=False, progressbar=False)),
    "gpt2 frod biases": ("gpt2", FrodConfig(
        target_modules=["c_attn"], sparse_rate=0.1, fan_in_fan_out=True, bias="frod_only",
        progressbar=False)),
    "llama adaption_prompt": ("llama", AdaptionPromptConfig(adapter_len=4, adapter_layers=2)),
    "llama adaption_prompt last": ("llama", AdaptionPromptConfig(adapter_len=3, adapter_layers=1)),
    "llama beft": ("llama", BeftConfig(target_modules=["v_proj", "down_proj"])),
}


def from_peft(case, folder):
    name, config = IN[case]
    model, batch = tiny(name)
    theirs = get_peft_model(model, config)
    stir(theirs, size=0.2)
    theirs.save_pretrained(folder)
    return name, batch, outputs(theirs, batch)


@pytest.mark.parametrize("case", IN)
def test_we_compute_what_peft_saved_and_give_it_back(case, tmp_path):
    name, batch, theirs = from_peft(case, tmp_path / "peft")
    model, _ = tiny(name)
    assert (outputs(model, batch) - theirs).abs().max() > 1e-3
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = load_peft(model, tmp_path / "peft")
    same(outputs(model, batch), theirs)
    tuned.save(tmp_path / "ours")
    export_peft(tuned, tmp_path / "again")
    again = burnish.load(tiny(name)[0], tmp_path / "ours")
    same(outputs(again.model, batch), theirs)
    kinds = {json.loads((tmp_path / f / "adapter_config.json").read_text())["peft_type"]
             for f in ("peft", "again")}
    assert len(kinds) == 1
    same(outputs(PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again"), batch), theirs)
    tuned.detach()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)


@pytest.mark.parametrize("case", [c for c in IN if c.startswith("llama")])
def test_a_damaged_folder_is_one_clear_error(case, tmp_path):
    name, _, _ = from_peft(case, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    model, batch = tiny(name)
    want = outputs(model, batch)
    some = {k.rpartition(".")[2]: k for k in tensors}
    for key in some.values():
        t = tensors[key]
        for other in (None, t[: t.shape[0] // 2].clone(), t[None].clone(), t.int() + 1000,
                      torch.full(t.shape, float("nan")), t[:0].clone()):
            if other is None and len(some) < 2:
                continue                         # one module less, no fault
            changed = {k: v for k, v in tensors.items() if k != key}
            save_file(changed if other is None else {**changed, key: other}, file)
            with pytest.raises(burnish.BurnishError) as caught:
                load_peft(model, tmp_path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
            assert torch.equal(outputs(model, batch), want)


def test_psoft_of_an_approximate_decomposition(tmp_path):
    """The same sketch of the same seed; what we write of it is the low-rank pair it is."""
    model, batch = tiny("llama")
    theirs = stir(get_peft_model(model, PsoftConfig(
        target_modules=["q_proj"], r=3, psoft_svd="lowrank", psoft_svd_lowrank_niter=0,
        random_seed=7)), size=0.2)
    theirs.save_pretrained(tmp_path / "a")
    want = outputs(theirs, batch)
    tuned = load_peft(tiny("llama")[0], tmp_path / "a")
    same(outputs(tuned.model, batch), want)
    export_peft(tuned, tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["peft_type"] == "LORA"
    same(outputs(PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "b"), batch), want)


def test_psoft_whose_vectors_another_machine_turned_round(tmp_path):
    """Signs are told apart, and what turns with them; a short series has no form there."""
    model, batch = tiny("llama")
    tuned = stir(burnish.tune(model, "psoft(rank=5)"))
    want = outputs(model, batch)
    for k, (_, term) in enumerate(tuned.terms(Turned)):
        sign = torch.tensor([1.0, -1, -1, 1, -1]).roll(k)
        i, j = torch.triu_indices(5, 5, 1)
        with torch.no_grad():
            term.L.mul_(sign), term.R.mul_(sign[:, None])
            term.upper.mul_(sign[i] * sign[j])
    same(outputs(model, batch), want)
    export_peft(tuned, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "PSOFT"
    same(outputs(PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "a"), batch), want)


def test_a_bias_of_some_outputs_has_no_form(tmp_path):
    tuned = burnish.tune(tiny("gpt2")[0], "beft")
    with pytest.raises(FormatError, match="BEFT has no form for a Conv1D"):
        export_peft(tuned, tmp_path)
    tuned = burnish.tune(tiny("timm_qkv")[0], "beft", head=False)
    with pytest.raises(FormatError, match="a bias to all outputs of a layer, here to some"):
        export_peft(tuned, tmp_path)
    tuned = burnish.tune(tiny("timm_qkv")[0], "bitfit(which='query-mlp')", head=False)
    with pytest.raises(FormatError):
        export_peft(tuned, tmp_path)


@pytest.mark.parametrize("case, change, words", [
    ("llama osf", {"effective_rank": 20}, "trains 16 of 32 triplets, its settings keep 20"),
    ("llama osf", {"effective_rank": "x"}, "field 'effective_rank'"),
    ("llama psoft", {"ab_svd_init": "other"}, "ab_svd_init = 'other'; expected one of"),
    ("llama psoft", {"psoft_svd": "half"}, "psoft_svd = 'half'; expected one of"),
    ("llama psoft", {"psoft_dropout": 0.1}, "psoft_dropout = 0.1 has no counterpart"),
    ("llama psoft", {"r": 5}, "the model needs"),
    ("llama peanut", {"act_fn": "mish"}, "activation 'mish' has no counterpart"),
    ("llama peanut", {"depth": 1}, "lacks peanut_encoders.0.weight"),
    ("llama deft", {"decomposition_method": "svd"}, "decomposition_method = 'svd'; expected"),
    ("llama deft", {"para": True}, "para is True, and deft_R is there"),
    ("llama deft para", {"para": False}, "para is False, and deft_R is missing"),
    ("llama supertuning", {"sparsity": 1.0}, "sparsity = 1.0; expected"),
    ("llama supertuning", {"r": 2}, "lacks supertuning_lora_A.weight"),
    ("llama unilora with its deal", {"proj_seed": 3}, "indices_A is not what proj_seed = 3 deals"),
    ("llama unilora", {"layers_to_transform": 7}, "names no module of this model"),
    ("llama vblora", {"topk": 12}, "k=12: expected from 1 to vectors=11"),
    ("llama adaption_prompt", {"adapter_layers": 1}, "2 attentions have .* settings say 1"),
    ("llama adamss", {"subspace_rank": 1}, "the model needs rank 1 at most"),
    ("llama glora", {"config_C": "x"}, "config_C = 'x'; expected one of"),
    ("llama frod made again", {"save_projection": True}, "no whole basis of self_attn"),
    ("llama psoft series", {"num_cayley_neumann_terms": 2}, "a series of 2 terms"),
])
def test_settings_that_are_not_the_tensors_are_refused(case, change, words, tmp_path):
    name, _, _ = from_peft(case, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model, _ = tiny(name)
    with pytest.raises(FormatError, match=words):
        load_peft(model, tmp_path)
    assert not any("burnish" in n for n, _ in model.named_modules())
