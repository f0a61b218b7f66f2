"""FP8: the nearest of the format's numbers, which are listed here once more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.grids import Fp8Provider
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing.models import tiny

F64 = torch.float64


def numbers(exponent, mantissa):
    """All finite numbers of a format, from its definition: bias 2^(e-1) - 1, subnormals below."""
    bias, out = 2 ** (exponent - 1) - 1, {0.0}
    for e in range(2**exponent):
        for m in range(2**mantissa):
            if exponent == 5 and e == 31 or exponent == 4 and e == 15 and m == 7:
                continue                                 # infinities and nan; of e4m3 one nan alone
            value = 2.0 ** (1 - bias) * m / 2**mantissa if e == 0 else \
                2.0 ** (e - bias) * (1 + m / 2**mantissa)
            out |= {value, -value}
    return torch.tensor(sorted(out), dtype=F64)


FORMATS = {"e4m3": (numbers(4, 3), 448.0, 1 / 16), "e5m2": (numbers(5, 2), 57344.0, 1 / 8)}


@pytest.mark.parametrize("group", [0, 6])
@pytest.mark.parametrize("which", FORMATS)
def test_every_entry_is_the_nearest_number_of_the_format(which, group):
    values, top, share = FORMATS[which]
    assert float(values.max()) == top
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 9))
    W = net[0].weight.detach().double()
    burnish.tune(net, f"fp8(format={which!r}, group={group}) + lora(rank=2)", targets="0",
                 head=False)
    held = net[0].weight.detach().double()
    size = group or 20
    for o in range(9):
        for i in range(0, 20, size):
            w, got = W[o, i : i + size], held[o, i : i + size]
            s = w.abs().max() / top
            near = values[(w[:, None] / s - values).abs().argmin(1)]
            torch.testing.assert_close(got, near * s, rtol=1e-6, atol=1e-12)
            assert ((got - w).abs() <= share * w.abs() * 1.0001).all()


def test_bytes():
    held = Fp8Provider(torch.randn(32, 128), Place("l", "weight", "linear", 32, 128), 0, "e4m3")
    assert held.nbytes == 32 * 128 + 4 * 32
    held = Fp8Provider(torch.randn(32, 128), Place("l", "weight", "linear", 32, 128), 64, "e4m3")
    assert held.bits == 8 + 32 / 64


def test_closer_than_int8_where_a_row_has_an_outlier():
    torch.manual_seed(0)
    W = torch.randn(16, 64)
    W[:, 5] = 60.0
    off = {}
    for recipe in ("fp8", "int8"):
        net = nn.Sequential(nn.Linear(64, 16, bias=False))
        net[0].weight.data.copy_(W)
        burnish.tune(net, f"{recipe} + lora(rank=2)", targets="0", head=False)
        off[recipe] = float((net[0].weight.detach() - W)[:, 6:].square().mean())
    assert off["fp8"] < 0.1 * off["int8"]


def test_settings_and_heads():
    (method,) = parse("fp8")
    assert method.format == "e4m3" and method.group == 0
    with pytest.raises(RecipeError, match="expected one of 'e4m3', 'e5m2'"):
        parse("fp8(format='e3m4')")
    with pytest.raises(RecipeError, match="inputs that share a scale"):
        parse("fp8(group=-1)")
    net, _ = tiny("vit")
    burnish.tune(net, "fp8(targets='all-linear, head') + lora(rank=2, targets='q')", head=False)
    assert net.classifier._parameters["weight"] is not None
    with pytest.raises(RecipeError, match="the grid of the stored weights"):
        burnish.tune(tiny("vit")[0], "nf4 + fp8 + lora(rank=2)")
