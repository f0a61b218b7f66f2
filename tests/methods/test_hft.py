"""HFT: half of each block's matrices, drawn, train as in full fine-tuning."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing.checks.common import fresh
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def drawn(model, settings=""):
    return [s.name for s in parse(f"hft({settings})")[0].select(Anatomy.of(model))]


def of_block(names, i, *words):
    return {n.split(f"layers.{i}.")[1] for n in names if f"layers.{i}." in n
            and any(w in n for w in words)}


def test_half_of_llama_2_7b_trains_in_every_block_and_category():
    """32 (2 4096^2 + 1.5 4096 11008 + 4096), embeddings, last norm and head left out."""
    model, _ = tiny("llama", meta=True, **LLAMA_7B)
    names = drawn(model, "ends=False")
    assert sum(model.get_parameter(n).numel() for n in names) == 3_238_133_760
    assert [len(of_block(names, i, "self_attn.")) for i in range(32)] == [2] * 32
    assert [len(of_block(names, i, "mlp.")) for i in range(32)] == [1, 2] * 16
    assert [len(of_block(names, i, "norm")) for i in range(32)] == [1] * 32
    kinds = Counter(n.rpartition("self_attn.")[2] for n in names if "self_attn" in n)
    assert len(kinds) == 4 and max(kinds.values()) < 32, "each matrix trains in some blocks"
    ends = {n for n in drawn(model) if n not in names}
    assert ends == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_draw_is_its_seeds_alone():
    model, _ = tiny("llama")
    first = drawn(model, "seed=3")
    torch.manual_seed(99)
    assert drawn(tiny("llama")[0], "seed=3") == first
    assert len({tuple(drawn(model, f"seed={s}")) for s in range(6)}) > 3
    anew = drawn(tiny("llama", meta=True, **LLAMA_7B)[0])
    assert of_block(anew, 0, "self_attn.") != of_block(anew, 1, "self_attn.") \
        or of_block(anew, 0, "self_attn.") != of_block(anew, 2, "self_attn.")


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "clip"])
def test_what_trains_has_the_gradient_of_full_fine_tuning_and_the_rest_stays(name):
    """theta <- theta - eta (m * dL/dtheta), by plain descent in stock torch."""
    net, batch = fresh(name, torch.float64, "")
    stock = copy.deepcopy(net)
    for m in (net, stock):
        m.eval()
    tuned = burnish.tune(net, "hft + sgd", head=False)
    trains = {n for n, _ in tuned.named_parameters()}
    before = {n: p.detach().clone() for n, p in stock.named_parameters()}
    stock(**batch).loss.backward()
    tuned.optimizer(lr=0.1, momentum=0.0, weight_decay=0.0)
    tuned.step(batch)
    assert set(before) - trains
    for n, p in net.named_parameters():
        if n not in trains:
            assert torch.equal(p, before[n]), n
        elif (g := stock.get_parameter(n).grad) is not None:
            torch.testing.assert_close(p, before[n] - 0.1 * g, rtol=1e-7, atol=1e-10)


def test_a_matrix_and_its_bias_stand_together():
    model, _ = tiny("bert")
    names = drawn(model, "ends=False")
    for n in names:
        other = n.removesuffix("bias") + "weight" if n.endswith("bias") else \
            n.removesuffix("weight") + "bias"
        assert other in names
    for i in range(2):
        inside = [n for n in names if f"layer.{i}." in n and n.endswith("weight")]
        norms = [n for n in inside if "LayerNorm" in n]
        attention = [n for n in inside if ".attention." in n and n not in norms]
        assert (len(norms), len(attention), len(inside)) == (1, 2, 4)


def test_fused_weights_and_those_read_past_their_module_are_units():
    gpt2 = [n for n in drawn(tiny("gpt2")[0], "ends=False") if n.endswith("weight")]
    assert [sum(f"h.{i}.attn" in n for n in gpt2) for i in (0, 1)] == [1, 1]
    mha = drawn(tiny("encoder")[0], "ends=False")
    read = [n for n in mha if "in_proj_" in n]
    assert len(read) == 2 * sum(n.endswith("in_proj_weight") for n in read)


def test_moments_are_half_of_full_fine_tunings():
    def numbers(recipe):
        net, batch = tiny("llama")
        tuned = burnish.tune(net, recipe, head=False)
        opt = tuned.optimizer(lr=1e-3)
        tuned.step(batch)
        blocks = {id(p) for p in net.model.layers.parameters()}
        return sum(t.numel() for p, s in opt.state.items() for t in s.values()
                   if t.dim() and id(p) in blocks)

    share = numbers("hft(ends=False)") / numbers("full")
    assert share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("recipe, each", [("full", 16), ("hft(ends=False)", 9)])
def test_bytes_of_a_number_on_blocks_of_llama_2_7b(recipe, each):
    """bf16 with fp32 copies and moments: 16 a number; of half of them 2 + 14 / 2."""
    model, _ = tiny("llama", meta=True, dtype=torch.bfloat16, **LLAMA_7B | {
        "num_hidden_layers": 2, "vocab_size": 64})
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    peak = burnish.simulate(model, f"{recipe} + master_weights", {"input_ids": ids, "labels": ids},
                            head=False).peak_bytes
    numbers = sum(p.numel() for p in model.model.layers.parameters())
    assert peak / numbers == pytest.approx(each, rel=0.01)


def test_targets_narrow_it_and_a_model_without_blocks_is_refused():
    model, _ = tiny("llama")
    whole, some = drawn(model), drawn(model, "targets='mlp'")
    assert some and set(some) < set(whole) and all(".mlp." in n for n in some)
    with pytest.raises(burnish.BurnishError, match="no blocks"):
        burnish.tune(nn.Sequential(nn.Linear(4, 4)), "hft", head=False)


def test_what_else_a_block_has_is_a_category_of_its_own():
    """A linear that is neither: alone in its category, so it trains in every second block."""
    net, _ = tiny("llama")
    for layer in net.model.layers:
        layer.modulation = nn.Linear(4, 4)
    names = drawn(net, "ends=False")
    assert [len(of_block(names, i, "modulation")) for i in (0, 1)] == [0, 2]
    assert [len(of_block(names, i, "self_attn.")) for i in (0, 1)] == [2, 2]
    assert [len(of_block(names, i, "mlp.")) for i in (0, 1)] == [1, 2]


def test_what_others_have_added_is_no_matrix_of_the_block():
    net, _ = tiny("llama")
    want = drawn(net, "ends=False")
    burnish.tune(net, "lora(rank=2)")
    assert drawn(net, "ends=False") == want


def test_a_role_names_the_weight_and_not_its_bias():
    assert {n.rpartition(".")[2] for n in drawn_asked("bert", "attention")} == {"weight"}
    assert {n.rpartition(".")[2] for n in drawn(tiny("bert")[0])} == {"weight", "bias"}


def drawn_asked(name, targets):
    return [n for n, _ in burnish.tune(tiny(name)[0], "hft", targets=targets, head=False)
            .named_parameters()]


def test_what_is_no_floating_tensor_and_what_is_tied_trains_once():
    model, _ = tiny("gpt2")
    names = drawn(model)
    assert len(names) == len(set(names)) and "transformer.wte.weight" in names
    assert "lm_head.weight" not in names, "it is the embedding"
    assert parse("hft")[0].settings() == {"targets": None, "ends": True, "seed": 0}
    assert parse("hft")[0].repeats() is None
