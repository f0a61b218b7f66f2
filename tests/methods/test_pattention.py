"""Pattention: attention to parameters beside a linear, its equation, its growth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.pattention import Pattention as Layer
from burnish.core.site import Place
from burnish.testing import follows, stir, tiny


def made(settings="tokens=5, scale=2.0", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"pattention({settings})", head=False, targets="0")
    ((_, layer),) = tuned.branches(Layer)
    layer.double()
    with torch.no_grad():
        layer.K.normal_()
        layer.V.normal_()
    return model, tuned, layer


def equation(x, K, V, tau, s):
    A = x @ K.T
    z = A * tau / A.norm(dim=-1, keepdim=True)
    return s * (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ V


@pytest.mark.parametrize("settings, tau", [("tokens=5, scale=2.0", math.sqrt(5)),
                                           ("tokens=5, scale=2.0, size=0.7", 0.7)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, tau):
    model, tuned, layer = made(settings)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    follows(tuned, lambda x, K, V: F.linear(x, W, bias) + equation(x, K, V, tau, 2.0),
            [layer.K, layer.V], (5, 3, 12), rtol=1e-7, atol=1e-8, merged=False)


def test_it_sees_the_direction_of_its_input_alone():
    _, _, layer = made()
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.testing.assert_close(layer.run(37.0 * x), layer.run(x), rtol=1e-7, atol=1e-8)
    assert not torch.allclose(layer.run(-x), layer.run(x))
    assert not layer.run(0 * x).any() and layer.run(0 * x).isfinite().all()


def test_rows_of_a_fused_weight_get_it_alone():
    net, batch = tiny("timm_qkv")
    tuned = stir(burnish.tune(net, "pattention(tokens=3, targets='q,v')", head=False))
    layers = dict(tuned.branches(Layer))
    assert set(layers) == {f"blocks.{b}.attn.qkv" for b in (0, 1)}
    y = layers["blocks.0.attn.qkv"](torch.randn(2, 32))
    assert y.shape == (2, 96) and not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()


def test_a_norm_in_half_precision_is_taken_wide():
    torch.manual_seed(0)
    layer = stir(Layer(64, 8, 16, 4.0, 1.0), size=1.0)
    x = (torch.randn(3, 64) * 200).half()                # squares of the scores overflow there
    assert layer.run(x).isfinite().all() and layer.run(x).dtype == torch.float16


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_growth_changes_no_answer(model, tmp_path):
    """Keys of zero at the old tau; the root of the new number would change every answer."""
    net, batch = tiny(model, dtype=torch.float64)
    tuned = stir(burnish.tune(net, "pattention(tokens=4) + lora(rank=2)", head=False), size=0.3)
    net.double().eval()
    with torch.no_grad():
        want = net(**batch).logits
        tuned.recipe.named("pattention").lifecycle(tuned, 7, "larger")
        net.double()
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-6, atol=1e-7)
    layers = [m for _, m in tuned.branches(Layer)]
    assert layers and all(len(m.K) == len(m.V) == 7 and m.tau == 2.0 for m in layers)
    assert all(not m.K[4:].any() and m.K[3].any() for m in layers)
    new = torch.cat([m.V[4:].flatten() for m in layers])
    assert 0.015 < new.std() < 0.025
    assert len({float(m.V[4, 0].detach()) for m in layers}) == len(layers)
    part = tuned.recipe.named("pattention")
    assert part.settings() == {"targets": None, "tokens": 7, "scale": 1.0, "size": 2.0}
    net(**batch).logits.sum().backward()
    assert all(m.K.grad[4:].any() for m in layers)
    for m in layers:
        m.tau = math.sqrt(7)
    assert not torch.allclose(net(**batch).logits, want, rtol=1e-3)


@pytest.mark.parametrize("tokens", [4, 3])
def test_it_grows_to_more(tokens):
    _, tuned, _ = made("tokens=4")
    with pytest.raises(burnish.RecipeError, match=f"has 4 tokens and grows .* not to {tokens}"):
        tuned.recipe.named("pattention").lifecycle(tuned, tokens, "no")
    tuned.recipe.named("pattention").lifecycle(tuned, 5, "more")


def test_start_counts_and_cost():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "pattention")
    assert torch.equal(net(**batch).logits, want)
    keys = torch.cat([m.K.flatten() for _, m in tuned.branches(Layer)])
    assert 0.019 < keys.std() < 0.021
    assert all(not m.V.any() for _, m in tuned.branches(Layer))
    (method,) = burnish.parse("pattention")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 65_536
    assert method.settings() == {"targets": None, "tokens": 8, "scale": 1.0, "size": None}


@pytest.mark.parametrize("settings, said", [("tokens=0", "at least 1"), ("size=0.0", "above 0"),
                                            ("size=-1.0", "above 0")])
def test_what_cannot_act_is_refused(settings, said):
    with pytest.raises(burnish.RecipeError, match=f"^pattention.*{said}"):
        burnish.parse(f"pattention({settings})")
    made("tokens=1")


def test_what_is_no_linear_is_refused():
    with pytest.raises(burnish.TargetError, match="pattention acts on linears; .* of kind conv"):
        burnish.tune(tiny("cnn")[0], "pattention(targets='conv')", head=False)
    with pytest.raises(burnish.RecipeError, match="none of the targets is one of the linears"):
        burnish.tune(tiny("cnn")[0], "pattention", head=False)


def test_the_input_alone_waits_for_backward(kept):
    """The same bytes whatever the tokens are."""
    def bytes_of(tokens):
        net, batch = tiny("bert", batch=8)
        return kept(burnish.tune(net, f"pattention(tokens={tokens})", head=False), batch)

    assert bytes_of(2) == bytes_of(32)


def test_an_input_without_direction_has_a_gradient():
    """1e-8 inside the root: of zeros the answer is zero, and what it is a function of moves."""
    layer = Layer(3, 2, 4, 2.0, 1.0)
    with torch.no_grad():
        layer.K.copy_(torch.arange(12.0).view(4, 3))
        layer.V.fill_(1.0)
    x = torch.zeros(1, 3, requires_grad=True)
    y = layer.run(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    torch.testing.assert_close(dx, 2 * 0.5 * 2.0 * 1e4 * layer.K.detach().sum(0, keepdim=True))
