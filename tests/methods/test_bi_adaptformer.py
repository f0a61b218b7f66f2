"""Bi-AdaptFormer: the equation in float64, the start, one bit a weight in the file."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import burnish
from burnish.blocks.state.bits import BitBottleneck
from burnish.core.recipe import parse
from burnish.core.registry import find
from burnish.testing import stir
from burnish.testing.models import tiny

V = {1: (0.6744897501960817,), 2: (0.37775416114944965, 1.2657203250220042)}


def answers(W, bits=1):
    """sigma (w + sg[q - w]) + m, q the nearest of the levels +-v."""
    m, sigma = W.mean(), W.std()
    w = (W - m) / (sigma + 1e-5)
    v = torch.tensor(sorted([*V[bits], *(-x for x in V[bits])]), dtype=W.dtype)
    q = v[(w.detach()[..., None] - v).abs().argmin(-1)]
    return sigma * (w + (q - w).detach()) + m


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("model, mlp, norm", [
    ("vit", "vit.layers.{}.mlp", "vit.layers.{}.layernorm_after"),
    ("llama", "model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm"),
    ("bert", "bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.intermediate.dense")])
def test_the_equation_written_out(beside, model, mlp, norm, bits):
    """MLP(LN x) + s relu(x W^_down^T) W^_up^T, x the residual stream before that norm (what an
    MLP reads whose norm stands behind it)."""
    one = beside(model, f"bi_adaptformer(bottleneck=8, bits={bits}, scale=0.7)")
    assert len(one.theta) == 4, "no biases"
    for i in range(2):
        path, seen = mlp.format(i), []
        A, B = one.theta[path, "down.weight"], one.theta[path, "up.weight"]
        one.base.get_submodule(norm.format(i)).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0]))
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, A=A, B=B, seen=seen: out + 0.7 * torch.relu(
                seen[-1] @ answers(A, bits).t()) @ answers(B, bits).t())
    one.agree()


def test_its_gradient_is_no_difference_of_losses():
    """It passes Q as if it were the identity, and the suite is told so."""
    torch.manual_seed(0)
    part, x = BitBottleneck(6, 2, 1).double().eval(), torch.randn(5, 6).double()
    stir(part, size=0.5)
    W = part.down.weight
    (got,) = torch.autograd.grad(part(x).square().sum(), W)
    want = torch.zeros_like(got)
    with torch.no_grad():
        for i in range(W.shape[0]):
            for j in range(W.shape[1]):
                ends = []
                for step in (1e-6, -2e-6):
                    W[i, j] += step
                    ends.append(float(part(x).square().sum()))
                W[i, j] += 1e-6
                want[i, j] = (ends[0] - ends[1]) / 2e-6
    assert not torch.allclose(got, want, rtol=0.1)
    assert not find("bi_adaptformer").exact


def test_dropout_is_on_the_activation(beside):
    one = beside("vit", "bi_adaptformer(bottleneck=8, dropout=0.4)")
    for i in range(2):
        path, seen = f"vit.layers.{i}.mlp", []
        A, B = (answers(one.theta[path, f"{n}.weight"]) for n in ("down", "up"))
        one.base.get_submodule(f"vit.layers.{i}.layernorm_after").register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0]))
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, A=A, B=B, seen=seen: out + F.dropout(
                torch.relu(seen[-1] @ A.t()), 0.4, True) @ B.t())
    one.tuned.model.train()
    torch.manual_seed(5)
    want = one.base(**one.batch).logits
    torch.manual_seed(5)
    one.agree(want)


def test_the_counts_and_bytes_of_a_published_shape(published):
    """ViT-B, r = 32: 24 matrices, 589,824 bits = 72.0 KiB, and two numbers each."""
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    m = parse("bi_adaptformer")[0]
    with torch.device("meta"):
        branches = list(m.branch(vit))
    count = sum(p.numel() for b in branches for p in b.module.parameters())
    assert count == 12 * m.count(768) == 589_824 and count // 8 == 72 * 1024
    real = BitBottleneck(768, 32, 1)
    held = sum(t.nbytes for side in (real.down, real.up) for t in side.finished().values())
    assert 12 * held == 73_728 + 192
    assert parse("bi_adaptformer(stored=True)")[0].count(768) == 0


def test_the_start_and_the_defaults():
    assert parse("bi_adaptformer")[0].changed() == {}
    m = parse("bi_adaptformer")[0]
    assert (m.bottleneck, m.bits, m.scale, m.act, m.dropout) == (32, 1, 1.0, "relu", 0.1)
    net, batch = tiny("vit")
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "bi_adaptformer(bottleneck=16)", head=False)
    moved = (net.eval()(**batch).logits - before).abs().max()
    assert 0 < moved < 0.05
    for n, p in tuned.named_parameters():
        bound = 2e-3 if n.endswith("up.weight") else 1 / math.sqrt(32)
        assert float(p.detach().abs().max()) <= bound


def test_the_file_holds_one_bit_a_weight_and_answers_the_same(tmp_path):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bi_adaptformer(bottleneck=16)", head=False)
    stir(tuned)
    want = net.eval()(**batch).logits
    tuned.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == 4 * (32 * 16 // 8 + 8)
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert not list(again.parameters()) and "stored=True" in str(again.recipe)
    assert torch.equal(again.model.eval()(**batch).logits, want)
    again.save(tmp_path / "b")                               # once more, as it is
    third = burnish.load(tiny("vit")[0], tmp_path / "b")
    assert torch.equal(third.model.eval()(**batch).logits, want)
    tuned.save(tmp_path / "whole", whole=True)
    on = burnish.load(tiny("vit")[0], tmp_path / "whole")
    assert torch.equal(on.model.eval()(**batch).logits, want)
    on.optimizer(lr=1e-2)
    on.step(batch)
    assert not torch.equal(on.model.eval()(**batch).logits, want)


@pytest.mark.parametrize("recipe, why", [
    ("bi_adaptformer(stored=True)", "has the codes of a saved adapter"),
    ("bi_adaptformer(bottleneck=0)", "at least 1"), ("bi_adaptformer(dropout=1.0)", "dropout"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("vit")[0], recipe)


def test_it_learns():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bi_adaptformer(bottleneck=8)")
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]
    with pytest.raises(burnish.CheckError, match="no form as a plain weight"):
        tuned.merge()
