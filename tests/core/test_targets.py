"""The target language: what is matched, and what is said when nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.core.anatomy import Anatomy
from burnish.core.errors import TargetError
from burnish.core.targets import GROUPS, explain, match
from burnish.testing import NAMES, tiny


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Anatomy]:
    return {name: Anatomy.of(tiny(name, meta=True)[0]) for name in NAMES}


def names(a: Anatomy, targets=None) -> list[str]:
    return [p.name for p in match(a, targets)]


def leaves(a: Anatomy, targets=None) -> set[str]:
    return {n.removesuffix(".weight").rpartition(".")[2] for n in names(a, targets)}


DEFAULT = {
    "vit": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
    "convnext": {"pwconv1", "pwconv2"},
    "bert": {"query", "key", "value", "dense"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "timm_qkv": {"qkv", "proj", "fc1", "fc2"},
    "encoder": {"in_proj_weight", "out_proj", "linear1", "linear2"},
    "mha": {"embed", "in_proj_weight", "out_proj"},
    "cnn": {"0", "4"},
    "mlp": {"0", "3"},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_the_linears_of_the_blocks(anatomies, name):
    a = anatomies[name]
    found = match(a)
    linear = (nn.Linear,)
    if a.blocks:                            # every linear of a block, and nothing else
        want = {f"{p}.weight" for p, m in a.model.named_modules()
                if (isinstance(m, linear) or type(m).__name__ == "Conv1D")
                and any(p.startswith(f"{b.path}.") for b in a.blocks)
                and not p.endswith("shared_expert_gate")}
        got = {p.name for p in found if p.kind != "experts" and p.param != "in_proj_weight"}
        assert got == want
    assert all(p.role not in ("router", "head", "embed", "position", "patch") for p in found)
    assert not any(p.rows for p in found)
    if name in DEFAULT:
        assert leaves(a) == DEFAULT[name]


def test_roles_groups_and_names_agree(anatomies):
    a = anatomies["vit"]
    assert names(a, "q,v") == names(a, "q_proj,v_proj") == names(a, ["q", "v"]) \
        == names(a, r"re:.*\.(q|v)_proj") == names(a, "layers.*.q_proj,*.v_proj")
    assert names(a, "attention,mlp") == names(a, "linear") == names(a, "all-linear") == names(a)
    assert names(a, "head") == names(a, "classifier") == ["classifier.weight"]
    assert names(a, "conv") == names(a, "patch")
    assert len(names(a, "all")) == len(a.places)


def test_order_is_the_models(anatomies):
    a = anatomies["vit"]
    assert names(a, "v,q") == names(a, "q,v") == [p.name for p in a.places if p.role in ("q", "v")]


def test_module_names_as_in_peft(anatomies):
    a = anatomies["bert"]
    assert names(a, "self.query") == names(a, "query") == names(a, "q")
    assert names(a, "encoder.layer.*.attention.*") == names(a, "attention")
    assert names(a, "bert.pooler.dense") == names(a, "pooler")
    assert len(names(anatomies["encoder"], "out_proj")) == 2
    assert len(names(anatomies["mamba"], "mixer.out_proj")) == 2
    assert names(anatomies["mixtral"], "experts") == names(anatomies["mixtral"], "mlp.experts")


def test_ranges_count_blocks(anatomies):
    a = anatomies["swin"]
    assert {p.block for p in match(a, "q@-1")} == {2}
    assert {p.block for p in match(a, "q@0:2")} == {0, 1}
    assert {p.block for p in match(a, "q@::2")} == {0, 2}
    found = match(a, "q@0,v@1:")
    assert [(p.role, p.block) for p in found] == [("q", 0), ("v", 1), ("v", 2)]
    assert {p.block for p in match(anatomies["t5"], "q@0")} == {0, 2}        # of each stack


def test_exclusions(anatomies):
    a = anatomies["vit"]
    assert names(a, "all-linear,-o") == names(a, "-o") == names(a, "q,k,v,mlp")
    assert names(a, "attention,-o@0") == [n for n in names(a, "attention")
                                         if n != "vit.layers.0.attention.o_proj.weight"]
    with pytest.raises(TargetError, match="leave nothing"):
        match(a, "q,-q")


def test_fused_weights_whole_and_by_rows(anatomies):
    for name in ("gpt2", "timm_qkv", "encoder", "mha"):
        a = anatomies[name]
        q, v = match(a, "q,v")[:2]
        assert (q.role, q.rows, v.role, v.rows) == ("q", (0, 32), "v", (64, 96))
        assert (q.out, q.inp) == (32, 32)
        assert all(not p.rows for p in match(a, "attention"))
        assert match(a, "qkv") == [p for p in a.places if p.role == "qkv"]
        for both in ("qkv,q", "attention,v", "q,all-linear"):
            with pytest.raises(TargetError, match="whole and its rows"):
                match(a, both)
    a = anatomies["gpt2"]
    assert [p.role for p in match(a, "attention,-q@0")] == ["k", "v", "o", "qkv", "o"]
    assert names(a, "transformer.h.0.attn.c_attn.weight[q]") == names(a, "q@0")


def test_cross_attention(anatomies):
    a = anatomies["t5"]
    assert len(names(a, "q")) == 4 and len(names(a, "cross_q")) == 2
    assert len(names(a, "cross")) == 8
    assert set(names(a, "cross")) < set(names(a, "attention"))
    assert len(names(anatomies["whisper"], "q_proj")) == 6           # a name means every one


def test_routers_and_experts(anatomies):
    a = anatomies["qwen_moe"]
    assert len(names(a, "router")) == 4
    assert len(names(a, "experts")) == 4
    assert [(p.kind, bool(p.rows)) for p in match(a, "gate@0")] == [
        ("experts", True), ("linear", False)]


@pytest.mark.parametrize(("name", "targets", "says"), [
    ("vit", "qproj", "'qproj' matches nothing in ViTForImageClassification; did you mean 'q_proj'"),
    ("vit", "q,nothing", "'nothing' matches nothing"),
    ("vit", "atention", "did you mean 'attention'"),
    ("vit", "q@7", r"no block .* there are 2 in vit.layers, counted from 0; 'q' is in blocks 0..1"),
    ("vit", "patch@0", "outside the blocks"),
    ("bert", "gate", "its MLP is made of fc1, fc2"),
    ("bert", "encoder.layer", r"holds others; write 'encoder.layer.\*'"),
    ("bert", "LayerNorm", "has no weight matrix"),
    ("bert", "cross_q", "no cross-attention"),
    ("gpt2", "lm_head", "tied to transformer.wte.weight; target 'transformer.wte'"),
    ("gpt2", "head", "tied to transformer.wte.weight"),
    ("clip", "head", "no task head"),
    ("mlp", "linear@0", "no repeated blocks; write 'linear'"),
    ("vit", "", "targets are empty"),
    ("vit", "re:(", "no regular expression"),
    ("vit", ["q", 3], "not 3"),
])
def test_what_matches_nothing_is_an_error_that_helps(anatomies, name, targets, says):
    with pytest.raises(TargetError, match=says):
        match(anatomies[name], targets)


def test_commas_inside_a_pattern_do_not_split(anatomies):
    a = anatomies["vit"]
    assert names(a, r"re:vit\.layers\.\d{1,2}\.mlp\.fc1,o") == names(a, "fc1,o")


def test_interleaved_weights_say_why():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=64, bos_token_id=1, eos_token_id=2))
    a = Anatomy.of(model)
    assert len(match(a, "qkv")) == 1
    with pytest.raises(TargetError, match="interleaves its parts.*target 'qkv'"):
        match(a, "q")


def test_nothing_to_tune_by_default():
    with pytest.raises(TargetError, match="no linear or convolution"):
        match(Anatomy.of(nn.Sequential(nn.Embedding(4, 4), nn.ReLU())))


def test_one_layer_alone_is_its_own_target():
    assert names(Anatomy.of(nn.Linear(4, 3))) == ["weight"]
    assert names(Anatomy.of(nn.Linear(4, 3)), "linear") == ["weight"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_offered_can_be_asked(anatomies, name):
    a = anatomies[name]
    offer = explain(a)
    assert set(offer["groups"]) <= set(GROUPS)
    for word in (*offer["roles"], *offer["groups"], *offer["names"]):
        assert match(a, word)
