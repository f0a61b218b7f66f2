"""LLM-Adapters: bottlenecks around linears, their equation, where they stand, generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing import follows, stir
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def made(settings, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias=bias)).double()
    tuned = burnish.tune(model, f"llm_adapters(bottleneck=3, {settings})", head=False, targets="0")
    (_, b), = tuned.branches(nn.Module)
    b.double()
    return model, stir(tuned, size=0.5), b


@pytest.mark.parametrize("mode", ["parallel", "series"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("act", ["tanh", "relu"])
def test_outputs_and_gradients_are_those_of_the_equation(mode, biases, act):
    """y = W x + c + s W_up act(W_down h), h = x beside and W x + c behind."""
    model, tuned, b = made(f"mode={mode!r}, scale=0.7, bias={biases}, act={act!r}")
    W, c = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    theta = [b.down.weight, b.up.weight, *((b.down.bias, b.up.bias) if biases else ())]

    def equation(x, A, B, *rest):
        a, d = rest or (0, 0)
        y = x @ W.T + c
        h = x if mode == "parallel" else y
        return y + 0.7 * (getattr(torch, act)(h @ A.T + a) @ B.T + d)

    follows(tuned, equation, theta, (5, 3, 12), merged=False)


def test_both_counts_of_the_paper():
    """0.99 % and 3.54 % of all parameters of LLaMA-7B, adapters among them."""
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    own = sum(p.numel() for p in anatomy.model.parameters())
    assert own == 6_738_415_616
    for mode, want, share in (("series", 67_108_864, 0.0099), ("parallel", 247_463_936, 0.0354)):
        m = parse(f"llm_adapters(mode={mode!r})")[0]
        with torch.device("meta"):
            branches = list(m.branch(anatomy))
        count = sum(p.numel() for b in branches for p in b.module.parameters())
        assert count == want and count / (own + count) == pytest.approx(share, abs=5e-5)
        places = {p.path: p for p in anatomy.places}
        assert count == sum(m.count(places[b.write]) for b in branches)
        assert parse(f"llm_adapters(mode={mode!r}, bias=True)")[0].count(
            places[branches[0].write]) - m.count(places[branches[0].write]) == \
            256 + places[branches[0].write].out


def stands(model, settings="", targets=None):
    tuned = burnish.tune(tiny(model)[0], f"llm_adapters(bottleneck=4{settings})", head=False,
                         targets=targets)
    return [p for p, _ in tuned.branches(nn.Module)], tuned


@pytest.mark.parametrize("model, beside, behind", [
    ("llama", ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]),
    ("gpt2", ["mlp.c_fc", "mlp.c_proj"], ["mlp.c_proj"]),
    ("bert", ["intermediate.dense", "output.dense"], ["output.dense"]),
])
def test_where_it_stands(model, beside, behind):
    for mode, leaves in (("parallel", beside), ("series", behind)):
        paths, _ = stands(model, f", mode={mode!r}")
        assert [p for p in paths if not p.endswith(tuple(f".{x}" for x in leaves))] == []
        assert len(paths) == 2 * len(leaves)


def test_targets_name_other_linears_and_rows_of_fused_ones():
    paths, _ = stands("llama", targets="q,v")
    assert len(paths) == 4 and all(p.endswith(("q_proj", "v_proj")) for p in paths)
    paths, tuned = stands("gpt2", targets="q,v")
    assert len(paths) == 4, "two bottlenecks on each fused weight"
    assert {b.rows for _, b in tuned.branches(nn.Module)} == {((0, 32),), ((64, 96),)}
    with pytest.raises(burnish.TargetError, match="acts on linears"):
        stands("encoder", targets="q")


@pytest.mark.parametrize("mode", ["parallel", "series"])
def test_the_start_is_the_base_bit_for_bit(mode):
    net, batch = tiny("llama")
    with torch.no_grad():
        before = net.eval()(**batch).logits
        tuned = burnish.tune(net, f"llm_adapters(bottleneck=4, mode={mode!r})")
        assert torch.equal(net.eval()(**batch).logits, before)
    for n, p in tuned.named_parameters():
        assert bool(p.detach().any()) == n.endswith("down.weight"), n


@pytest.mark.parametrize("mode", ["parallel", "series"])
def test_generation_with_a_cache_is_the_full_forward(mode):
    net, batch = tiny("llama")
    stir(burnish.tune(net, f"llm_adapters(bottleneck=4, mode={mode!r})"), size=0.2)
    net.eval()
    ids = batch["input_ids"][:, :4]
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                       eos_token_id=None)
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_defaults_and_refusals():
    m = parse("llm_adapters")[0]
    assert (m.bottleneck, m.mode, m.act, m.scale, m.dropout, m.bias) == \
        (256, "parallel", "tanh", 1.0, 0.0, False)
    with pytest.raises(burnish.RecipeError, match="at least 1"):
        parse("llm_adapters(bottleneck=0)")
    assert parse("llm_adapters(bottleneck=1)")[0].bottleneck == 1
    with pytest.raises(burnish.RecipeError, match="dropout"):
        parse("llm_adapters(dropout=1.5)")
    with pytest.raises(burnish.CheckError, match="no form as a plain weight"):
        made("mode='parallel'")[1].merge()
