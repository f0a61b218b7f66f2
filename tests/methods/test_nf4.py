"""NF4: codes against quantiles of the normal law, written out once more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.testing.models import tiny


def codes():
    """16 values: 8 quantiles of each half of the normal law, normed, 0 shared (QLoRA, eq. 4)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    edge = 0.9677083
    up = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([up, torch.zeros(1, dtype=torch.float64), down])
    return (values / values.max()).sort().values.float()


def decoded(w, double_quant):
    """Every block of 64 in its nearest codes; the maxima in 8 bits where asked."""
    flat = w.flatten().view(-1, 64)
    a = flat.abs().amax(1)
    index = (flat / a[:, None])[..., None].sub(codes()).abs().argmin(-1)
    return codes()[index], a


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_their_nearest_codes(double_quant):                    # findings 6
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128))
    w = model[0].weight.detach().clone()
    burnish.tune(model, f"nf4(double_quant={double_quant}) + lora(rank=2)", head=False)
    got = model[0].weight.detach().flatten().view(-1, 64)
    units, a = decoded(w, double_quant)
    scale = (got * units).sum(1) / units.square().sum(1)       # the maximum of each block, as held
    torch.testing.assert_close(got, units * scale[:, None], rtol=1e-5, atol=1e-6)
    off = (scale - a).abs().max() / a.max()
    if double_quant:
        assert 1e-6 < off < 1 / 127                            # 8-bit codes of the maxima
    else:
        assert off < 1e-6                                      # the maxima themselves


def test_bits_per_weight():                                                # findings 6
    held = {}
    for double_quant in (False, True):
        model = nn.Sequential(nn.Linear(512, 512))
        burnish.tune(model, f"nf4(double_quant={double_quant}) + lora(rank=2)", head=False)
        (provider,) = [m for m in model.modules() if hasattr(m, "nbytes")]
        held[double_quant] = 8 * provider.nbytes / 512**2
    assert held[False] == pytest.approx(4.5, rel=0.01)
    assert held[True] == pytest.approx(4.127, rel=0.01)


def test_the_linears_of_a_llama_7b_are_three_and_a_third_gigabytes():
    net, batch = tiny("llama", meta=True, batch=1, vocab_size=32000, hidden_size=4096,
                      intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32)
    linears = sum(p.numel() for n, p in net.named_parameters()
                  if p.dim() == 2 and ".layers." in n)
    assert linears == 6_476_005_376
    held = [burnish.simulate(net, s, batch, dtype="bfloat16").by_category["weights"]
            for s in ("lora", "nf4 + lora", "nf4(double_quant=False) + lora")]
    saved = [(held[0] - h) / linears for h in held[1:]]
    assert [8 * (2 - s) for s in saved] == pytest.approx([4.127, 4.5], abs=2e-3)
    assert linears * (2 - saved[0]) / 1e9 == pytest.approx(3.34, abs=5e-3)


def test_the_default_codes_the_maxima_too():
    from burnish.core.recipe import parse

    (method,) = parse("nf4")
    assert method.double_quant is True and method.identity is False


def test_heads_stay_as_they_are():
    net, _ = tiny("vit")
    burnish.tune(net, "nf4(targets='all-linear, head') + lora(rank=2, targets='q')", head=False)
    assert net.classifier._parameters["weight"] is not None


def test_two_grids_are_refused():
    with pytest.raises(burnish.RecipeError, match="the grid of the stored weights"):
        burnish.tune(tiny("vit")[0], "nf4 + nf4(double_quant=False) + lora(rank=2)")
