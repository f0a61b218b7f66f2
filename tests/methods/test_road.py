"""RoAd: outputs turned and scaled two at a time, against the planes written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state import planes
from burnish.blocks.state.planes import Planes
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.models import tiny


def rotation(theta, alpha, out, block, own):
    """The (out, out) matrix of all planes, entry by entry."""
    R = [[torch.zeros((), dtype=theta.dtype)] * out for _ in range(out)]
    half = block // 2
    for start in range(0, out, block):
        for k in range(half):
            i, j = start + k, start + k + half
            if own == 1:
                n = start // 2 + k
                at = {"ci": n, "cj": n, "si": n, "sj": n}
            elif own == 2:
                at = {"ci": i, "cj": j, "si": i, "sj": j}
            else:
                at = {"ci": 2 * start + k, "cj": 2 * start + k + half,
                      "si": 2 * start + block + k, "sj": 2 * start + block + k + half}
            R[i][i] = alpha[at["ci"]] * theta[at["ci"]].cos()
            R[j][j] = alpha[at["cj"]] * theta[at["cj"]].cos()
            R[i][j] = -alpha[at["si"]] * theta[at["si"]].sin()
            R[j][i] = alpha[at["sj"]] * theta[at["sj"]].sin()
    return torch.stack([torch.stack(r) for r in R])


def made(recipe, inp=7, out=12, kind="linear", bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out, bias=bias))
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D
        model = nn.Sequential(Conv1D(out, inp))
    model = model.double()
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, gate), = tuned.branches(Planes)
    gate.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    return model, tuned, gate


@pytest.mark.parametrize("strip", [1, 30, 1 << 17])
@pytest.mark.parametrize("block", [2, 4, 12])
@pytest.mark.parametrize("own", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_the_planes(own, block, strip, monkeypatch):
    """In strips of a token, of a few, and all at once."""
    monkeypatch.setattr(planes, "STRIP", strip)
    model, tuned, gate = made(f"road(own={own}, block={block})")
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    follows(tuned, lambda x, t, a: F.linear(x, W, b) @ rotation(t, a, 12, block, own).t(),
            [gate.theta, gate.alpha], (3, 5, 7))


def test_a_conv1d_and_a_layer_without_bias():
    model, tuned, gate = made("road(block=4)", kind="conv1d")
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    follows(tuned, lambda x, t, a: (x @ W + b) @ rotation(t, a, 12, 4, 1).t(),
            [gate.theta, gate.alpha], (5, 7))
    model, tuned, gate = made("road(block=4)", bias=False)
    W2 = model[0].weight.detach().clone()
    follows(tuned, lambda x, t, a: x @ W2.t() @ rotation(t, a, 12, 4, 1).t(),
            [gate.theta, gate.alpha], (5, 7))


def test_with_one_length_lengths_of_pairs_stay():
    """own=1 and a = 1 is a rotation: of each pair, and of all outputs."""
    _, _, gate = made("road(block=4)")
    with torch.no_grad():
        gate.alpha.fill_(1.0)
    h = torch.randn(6, 12, dtype=torch.float64)
    y = gate(h)
    assert (y - h).abs().max() > 0.1
    torch.testing.assert_close(y.unflatten(1, (3, 2, 2)).norm(dim=2),
                               h.unflatten(1, (3, 2, 2)).norm(dim=2), rtol=1e-12, atol=1e-12)


def test_rows_of_a_fused_weight_are_turned_in_place():
    net, _ = tiny("gpt2")
    tuned = burnish.tune(net, "road(block=8, targets='v,k')", head=False)
    path, gate = next((p, g) for p, g in tuned.branches(Planes))
    assert path.endswith("c_attn") and gate.rows == ((32, 64), (64, 96))
    assert gate.theta.numel() == gate.alpha.numel() == 32
    gate.double()
    with torch.no_grad():
        gate.theta.normal_()
    h = torch.randn(3, 2, 96, dtype=torch.float64)
    R = [rotation(gate.theta[k : k + 16], gate.alpha[k : k + 16], 32, 8, 1) for k in (0, 16)]
    want = torch.cat([h[..., :32], h[..., 32:64] @ R[0].t(), h[..., 64:] @ R[1].t()], -1)
    torch.testing.assert_close(gate(h), want, rtol=1e-12, atol=1e-12)


def test_nothing_is_turned_to_nothing():
    assert Planes(8, 4)(torch.zeros(0, 8)).shape == (0, 8)


def test_half_precision_rounds_once():
    gate = Planes(8, 4)
    with torch.no_grad():
        gate.theta.normal_(), gate.alpha.normal_()
    h = torch.randn(5, 8).bfloat16().requires_grad_()
    R = rotation(gate.theta.double(), gate.alpha.double(), 8, 4, 1)
    y = gate(h)
    want = h.double() @ R.t()
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [h, gate.theta, gate.alpha], g)
    ref = torch.autograd.grad(want, [h, gate.theta, gate.alpha], g.double())
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], ref[0].bfloat16(), rtol=1e-2, atol=1e-2)
    for a, b in zip(got[1:], ref[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_under_a_transform_and_where_nothing_of_it_trains():
    _, _, gate = made("road(own=4, block=4)")
    h = torch.randn(5, 2, 12, dtype=torch.float64)
    R = rotation(gate.theta, gate.alpha, 12, 4, 4).detach()
    J = torch.func.jacfwd(lambda x: gate(x).sum((0, 1)))(h)
    torch.testing.assert_close(J[:, 0, 0], R, rtol=1e-12, atol=1e-12)
    gate.requires_grad_(False)
    h.requires_grad_()
    (d,) = torch.autograd.grad(gate(h).sum(), h)
    torch.testing.assert_close(d, R.sum(0).expand(5, 2, -1), rtol=1e-12, atol=1e-12)


def test_the_start_is_the_base_to_the_last_bit():
    for name in ("vit", "gpt2"):
        net, batch = tiny(name)
        net.eval()
        want = net(**batch).logits
        burnish.tune(net, "road(block=8)")
        assert torch.equal(net(**batch).logits, want)


def test_what_is_made_again_is_not_kept():
    """Of what follows, y is made from z: only z waits (an activation would keep y besides)."""
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4))
    tuned = burnish.tune(net, "road(block=8, targets='0')", head=False)
    kept, tape = [], tuned.state.tape
    inner = tape.policy.pack
    tape.policy.pack = lambda t, role=None: kept.append(t) or inner(t, role)
    net(torch.randn(10, 32))
    kept = {t.data_ptr(): tuple(t.shape) for t in kept if len(t) == 10}
    assert list(kept.values()) == [(10, 64)]


def test_counts():
    (method,) = burnish.parse("road")
    llama = 4 * [Place("a", "weight", "linear", 4096, 4096)] + \
        2 * [Place("a", "weight", "linear", 11008, 4096)] + \
        [Place("a", "weight", "linear", 4096, 11008)]
    assert [method.count(p) for p in llama[-2:]] == [11008, 4096]
    assert 32 * sum(method.count(p) for p in llama) == 32 * (5 * 4096 + 2 * 11008) == 1_359_872
    for own in (1, 2, 4):
        tuned = burnish.tune(nn.Sequential(nn.Linear(6, 16)), f"road(block=8, own={own})",
                             head=False, targets="0")
        assert sum(p.numel() for p in tuned.parameters()) == 16 * own == \
            burnish.parse(f"road(own={own})")[0].count(Place("0", "weight", "linear", 16, 6))


def test_defaults_and_decay():
    assert burnish.parse("road")[0].settings() == {"targets": None, "own": 1, "block": 64}
    _, tuned, _ = made("road(block=4)")
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
    gate = Planes(8, 4)
    assert not gate.theta.any() and torch.equal(gate.alpha, torch.ones(4))
    assert math.isclose(float(gate(torch.ones(1, 8)).sum()), 8)


@pytest.mark.parametrize("recipe, words", [
    ("road(own=3)", "own=3: expected 1, 2 or 4"), ("road(block=3)", "an even number"),
    ("road(block=0)", "an even number"),
    ("road(block=8)", "does not divide the 12 outputs of 0.weight; 2, 4 would")])
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises(RecipeError, match=f"^road: .*{words}"):
        burnish.tune(nn.Sequential(nn.Linear(7, 12)), recipe, head=False, targets="0")


def test_a_path_stands_for_its_own_width():
    """Of two linears the second's gate has the second's width, and pairs of two are the least."""
    net = nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 8))
    tuned = burnish.tune(net, "road(block=2)", head=False, targets="*")
    assert [g.channels for _, g in tuned.branches(Planes)] == [12, 8]
    with pytest.raises(RecipeError, match="block=-2"):
        burnish.parse("road(block=-2)")


def test_where_nothing_can_be_turned():
    with pytest.raises(RecipeError, match="none would"):
        burnish.tune(nn.Sequential(nn.Linear(7, 9)), "road", head=False, targets="0")
    with pytest.raises(RecipeError, match="; 2, 4, 8, 16, 32, 64 would"):
        burnish.tune(nn.Sequential(nn.Linear(7, 192)), "road(block=10)", head=False, targets="0")
    with pytest.raises(RecipeError, match="is no linear that its module calls"):
        burnish.tune(tiny("vit")[0], "road(block=2, targets='conv')")
    with pytest.raises(RecipeError, match="is no linear that its module calls"):
        burnish.tune(tiny("encoder")[0], "road(block=2, targets='out_proj')")
