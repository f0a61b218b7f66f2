"""(IA)^3 and SSF: counts, folding, gradients of gains, rows of fused weights, bytes."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny


def trained(anatomy, recipe):
    with torch.device("meta"):
        return sum(p.numel() for b in parse(recipe)[0].branch(anatomy)
                   for p in b.module.parameters())


def gates(tuned):
    return {path: slot.module_of(p) for path, _, slot in slots(tuned.model) for p in slot.parts}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_counts_on_published_shapes(published):
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    assert trained(vit, "ssf") == 205_824
    llama, config = published("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=2)
    assert (config.hidden_size, config.intermediate_size) == (4096, 11008)
    assert trained(llama, "ia3") * 16 == 32 * (2 * 4096 + 11008) == 614_400
    ia3 = parse("ia3")[0]
    assert 32 * ia3.count(4096, 11008) == 614_400 and parse("ssf")[0].count(768) == 1536


@pytest.mark.parametrize("model", ["vit", "bert", "gpt2", "llama", "t5", "timm_qkv", "qwen_moe"])
@pytest.mark.parametrize("recipe", ["ia3", "ssf"])
def test_a_start_of_ones_is_the_base_bit_for_bit(model, recipe):
    net, batch = tiny(model)
    before = logits(net.eval(), batch)
    burnish.tune(net, recipe)
    assert torch.equal(logits(net.eval(), batch), before)


def test_the_authors_start_is_not():
    tuned = burnish.tune(tiny("vit")[0], "ssf(init='author')", head=False)
    gains = torch.cat([m.gain.detach() for m in gates(tuned).values()])
    shifts = torch.cat([m.shift.detach() for m in gates(tuned).values()])
    for t, mean in ((gains, 1.0), (shifts, 0.0)):
        assert t.mean().item() == pytest.approx(mean, abs=0.004)
        assert t.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("model", ["vit", "convnext", "cnn", "gpt2", "llama", "t5", "timm_qkv"])
@pytest.mark.parametrize("recipe", ["ia3", "ssf"])
def test_folding_is_exact(model, recipe):
    if (model, recipe) == ("cnn", "ia3"):
        with pytest.raises(burnish.RecipeError, match="neither keys and values"):
            burnish.tune(tiny(model)[0], recipe)
        return
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, recipe, head=False)
    for m in gates(tuned).values():
        m.double()
    stir(tuned, size=0.1)
    net.eval()
    want = logits(net, batch)
    plain = {n: tuple(p.shape) for n, p in net.named_parameters() if ".burnish." not in n}
    tuned.merge()
    torch.testing.assert_close(logits(net, batch), want, rtol=1e-9, atol=1e-9)
    merged = {n: tuple(p.shape) for n, p in net.named_parameters()}
    assert {n: merged[n] for n in plain} == plain, "merging changes no shape"
    tuned.unmerge()
    assert torch.equal(logits(net, batch), want)


def test_folding_in_single_precision():
    for model in ("vit", "llama"):
        net, batch = tiny(model)
        tuned = burnish.tune(net, "ssf")
        stir(tuned, size=0.1)
        net.eval()
        want = logits(net, batch)
        torch.testing.assert_close(logits(tuned.merge(), batch), want, rtol=1e-5, atol=1e-6)


def test_ia3_by_the_equation():
    """K <- l_k K, V <- l_v V, W_2 (l_ff h), on a copy of the model with stock hooks."""
    net, batch = tiny("llama", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "ia3")
    for m in gates(tuned).values():
        m.double()
    stir(tuned, size=0.1)
    stock = {}
    for path, m in gates(tuned).items():
        gain = stock[path] = m.gain.detach().clone().requires_grad_()
        module = base.get_submodule(path)
        if path.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _, a, g=gain: (a[0] * g,))
        else:
            module.register_forward_hook(lambda _, a, out, g=gain: out * g)
    assert {p.rpartition(".")[2] for p in stock} == {"k_proj", "v_proj", "down_proj"}
    loss, want = tuned.loss(batch), base(**batch).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    loss.backward()
    for path, g in zip(stock, torch.autograd.grad(want, list(stock.values())), strict=True):
        torch.testing.assert_close(gates(tuned)[path].gain.grad, g, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("model, path", [("gpt2", "transformer.h.0.attn.c_attn"),
                                         ("timm_qkv", "blocks.0.attn.qkv")])
def test_ia3_scales_rows_of_a_fused_projection(model, path):
    net, batch = tiny(model)
    gate = gates(burnish.tune(net, "ia3"))[path]
    assert gate.rows == ((32, 64), (64, 96)) and gate.gain.numel() == 64
    with torch.no_grad():
        gate.gain.copy_(torch.arange(64.0))
    h = torch.ones(1, 96)
    want = torch.cat([torch.ones(32), torch.arange(64.0)])
    assert torch.equal(gate(h)[0], want)


def test_ia3_with_targets_of_its_own():
    tuned = burnish.tune(tiny("llama")[0], "ia3(targets='q,down@0')")
    assert {p.partition("layers.")[2]: m.side for p, m in gates(tuned).items()} == {
        "0.self_attn.q_proj": "output", "1.self_attn.q_proj": "output", "0.mlp.down_proj": "input"}
    tuned = burnish.tune(tiny("llama")[0], "ia3(inner=False)")
    assert not any("down" in p for p in gates(tuned))


def test_ia3_says_where_it_cannot():
    with pytest.raises(burnish.RecipeError, match="read by its module without a call"):
        burnish.tune(tiny("encoder")[0], "ia3")


def test_ssf_sites_and_shifts():
    """Everything but the head is gated; what has no bias of its own gets a scale only."""
    tuned = burnish.tune(tiny("vit")[0], "ssf", head=False)
    stems = {p.split("layers.0.")[-1] for p in gates(tuned) if "layers.1" not in p}
    assert stems == {"vit.embeddings.patch_embeddings.projection", "layernorm_before",
                     "layernorm_after", "attention.q_proj", "attention.k_proj",
                     "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
                     "vit.layernorm"}
    llama = gates(burnish.tune(tiny("llama")[0], "ssf"))
    assert all((m.shift is None) == ("norm" in p) for p, m in llama.items())
    only = gates(burnish.tune(tiny("vit")[0], "ssf(targets='fc1')"))
    assert all(p.endswith("fc1") for p in only)


def test_maps_are_scaled_by_channel():
    tuned = burnish.tune(tiny("cnn")[0], "ssf")
    assert all(m.axis == 1 for m in gates(tuned).values())
    net, _ = tiny("convnext")
    axes = {type(net.get_submodule(p)).__name__: m.axis
            for p, m in gates(burnish.tune(net, "ssf")).items() if "downsampl" not in p}
    assert axes["Conv2d"] == 1 and axes["Linear"] == -1


def test_no_decay_pulls_gains_to_zero():
    for recipe in ("ia3", "ssf"):
        tuned = burnish.tune(tiny("vit")[0], recipe, head=False)
        assert all(p.burnish_decay is False for p in tuned.parameters())
        opt = tuned.optimizer(lr=0.1, weight_decay=0.5)
        for p in tuned.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        assert all(torch.equal(m.gain, torch.ones_like(m.gain)) for m in gates(tuned).values())


@pytest.mark.parametrize("recipe, units", [
    ("ia3", 0.0),     # keys, values and the inner state are kept by a frozen block too
    ("ssf", 2.0),     # the results of the two projections back into the residual stream
])
def test_what_waits_for_backward(recipe, units, kept):
    """Per token and block in units of the width, beyond a frozen block on the gradient's path."""
    more = []
    for name in ("bitfit", recipe):
        per = []
        for layers in (2, 4):
            net, batch = tiny("vit", batch=4, num_hidden_layers=layers)
            per.append(kept(burnish.tune(net, name, head=False), batch))
        more.append((per[1] - per[0]) / 2)
    tokens = 4 * 17
    assert (more[1] - more[0]) / (tokens * 32 * 4) == pytest.approx(units, abs=0.08)


def test_checkpointing_changes_no_gradient():
    for recipe in ("ia3", "ssf"):
        grads = []
        for extra in ("", " + checkpoint"):
            net, batch = tiny("llama", dtype=torch.float64)
            tuned = burnish.tune(net, recipe + extra)
            tuned.loss(batch).backward()
            grads.append([p.grad for p in tuned.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
