"""RTN: whole numbers of a few bits, written out entry by entry in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight import grids
from burnish.blocks.weight.grids import WholeProvider
from burnish.blocks.weight.quantise import Quantiser
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing.models import tiny

F64 = torch.float64


def run_of(w, bits, symmetric, keep=1.0):
    """One run of inputs on its grid, in Python's numbers: (codes, scale, zero, values)."""
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low, high = min(0.0, min(w)) * keep, max(0.0, max(w)) * keep
    s = max(-low, high) / top if symmetric else (high - low) / top
    s = s or 1.0
    z = 0 if symmetric else round(-low / s)
    least = -top if symmetric else 0
    q = [max(least, min(top, round(x / s) + z)) for x in w]
    return q, s, z, [s * (k - z) for k in q]


def written_out(W, bits, group, symmetric, clipped=False):
    out = torch.empty_like(W, dtype=F64)
    for o, row in enumerate(W.double().tolist()):
        size = group or len(row)
        for i in range(0, len(row), size):
            w = row[i : i + size]
            tried = [run_of(w, bits, symmetric, keep)[3] for keep in
                     ([1 - k / 40 for k in range(21)] if clipped else [1.0])]
            out[o, i : i + size] = torch.tensor(
                min(tried, key=lambda v: sum((a - b) ** 2 for a, b in zip(v, w, strict=True))),
                dtype=F64)
    return out


def layer(kind):
    torch.manual_seed(0)
    made = {"linear": lambda: nn.Linear(20, 9), "the transpose": lambda: Conv1D(9, 20),
            "conv": lambda: nn.Conv2d(8, 6, (3, 2), groups=2)}[kind]()
    nn.init.normal_(made.weight, mean=0.3)
    return made


def out_in(kind, w):
    return w.t() if kind == "the transpose" else w.flatten(1)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group", [(2, 8), (3, 0), (4, 6), (5, 5), (6, 64), (7, 3), (8, 0)])
def test_every_entry_is_on_its_grid(bits, group, symmetric, clipped):
    net = nn.Sequential(layer("linear"))
    W = net[0].weight.detach().clone()
    burnish.tune(net, f"rtn(bits={bits}, group={group}, symmetric={symmetric}, clipped={clipped}) "
                      "+ lora(rank=2)", targets="0", head=False)
    torch.testing.assert_close(net[0].weight.detach().double(),
                               written_out(W, bits, group, symmetric, clipped), rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "the transpose", "conv"])
def test_runs_go_along_the_inputs_whatever_the_module(kind, monkeypatch):
    """Also where a few rows are worked on at a time."""
    monkeypatch.setattr(grids, "PIECE", 1)
    net = nn.Sequential(layer(kind))
    W = out_in(kind, net[0].weight.detach().clone())
    burnish.tune(net, "rtn(bits=3, group=7) + bitfit", targets="0", head=False)
    held = net[0].weight.detach()
    assert held.shape == layer(kind).weight.shape
    torch.testing.assert_close(out_in(kind, held).double(), written_out(W, 3, 7, False), rtol=1e-5,
                               atol=1e-6)


def test_experts_have_grids_of_their_own():
    W = torch.randn(3, 10, 6)
    place = Place("e", "w", "experts", 10, 6, experts=3)
    held = WholeProvider(W, place, Quantiser(4, 4, False)).weight()
    for e in range(3):
        torch.testing.assert_close(held[e].double(), written_out(W[e], 4, 4, False), rtol=1e-5,
                                   atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric, beside", [(False, 5), (True, 4)])
def test_bits_per_weight(bits, symmetric, beside):
    place = Place("l", "weight", "linear", 64, 512)
    held = WholeProvider(torch.randn(64, 512), place, Quantiser(bits, 64, symmetric))
    assert held.nbytes * 8 == 64 * 512 * bits + 8 * beside * 64 * 512 // 64
    assert held.bits == bits + beside * 8 / 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_codes_stay_what_they_are_when_the_model_changes_its_precision(dtype):
    net = nn.Sequential(layer("linear"))
    burnish.tune(net, "rtn(bits=4, group=5) + lora(rank=2)", targets="0", head=False)
    want = net[0].weight.detach()
    (held,) = [m for m in net.modules() if isinstance(m, WholeProvider)]
    codes = held.codes4.clone()
    net.to(dtype)
    assert held.codes4.dtype == held.zero.dtype == torch.uint8 and torch.equal(held.codes4, codes)
    assert held.scale.dtype == torch.float32 and net[0].weight.dtype == dtype
    torch.testing.assert_close(net[0].weight.detach().float(), want, rtol=1e-2, atol=1e-6)


def test_whole_numbers_are_fixed_points():
    """What is on a grid stays where it is: a model coded twice is the model coded once."""
    place = Place("l", "weight", "linear", 12, 32)
    how = Quantiser(4, 8, symmetric=True)
    once = WholeProvider(torch.randn(12, 32), place, how).weight()
    twice = WholeProvider(once, place, how).weight()
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_no_number_is_refused():
    place = Place("l", "weight", "linear", 2, 4)
    assert not WholeProvider(torch.zeros(2, 4), place, Quantiser(3, 2, False)).weight().any()
    for bad in (float("inf"), float("nan")):
        W = torch.ones(2, 4)
        W[1, 3] = bad
        with pytest.raises(ConfigError, match="inf or nan"):
            WholeProvider(W, place, Quantiser(3, 2, False))
    with pytest.raises(ConfigError, match="floating-point"):
        WholeProvider(torch.ones(2, 4, dtype=torch.int8), place, Quantiser(3, 2, False))


@pytest.mark.parametrize("group", [8, 0])
def test_beside_peqa_only_the_scales_of_whole_numbers_train(group):
    """PEQA on its own grid: ``(1 + d) s (q - z)``, output and gradient in float64."""
    net = nn.Sequential(nn.Linear(16, 6)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"rtn(bits=3, group={group}) + peqa(group={group})", targets="0",
                         head=False)
    (d,) = tuned.parameters()
    x = torch.randn(5, 16, dtype=F64)
    V = written_out(W, 3, group, False)
    own = torch.zeros(6, 16 // (group or 16), dtype=F64, requires_grad=True)
    want = x @ ((1 + own).repeat_interleave(group or 16, 1) * V).t() + net[0].bias.detach()
    got = net(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(d.grad.double(), own.grad, rtol=1e-5, atol=1e-5)


def test_pissa_has_its_residual_held():
    """What is held is W less the principal part: the recipe's storage takes starts as nf4 does."""
    net = nn.Sequential(nn.Linear(24, 18, bias=False))
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, "rtn(bits=8, group=0) + pissa(rank=4)", targets="0", head=False)
    (_, term), = [(n, t) for n, t in tuned.terms(nn.Module) if hasattr(t, "A0")]
    rest = W - term.scale * term.B0 @ term.A0
    torch.testing.assert_close(net[0].weight.detach().double(), written_out(rest, 8, 0, False),
                               rtol=1e-4, atol=1e-5)


def test_heads_stay_as_they_are_and_two_grids_are_refused():
    net, _ = tiny("vit")
    burnish.tune(net, "rtn(targets='all-linear, head') + lora(rank=2, targets='q')", head=False)
    assert net.classifier._parameters["weight"] is not None
    with pytest.raises(RecipeError, match="the grid of the stored weights"):
        burnish.tune(tiny("vit")[0], "nf4 + rtn + lora(rank=2)")


def test_settings():
    (method,) = parse("rtn")
    assert (method.bits, method.group, method.symmetric, method.clipped) == (4, 64, False, False)
    assert str(parse("int8")[0]) == "rtn(bits=8, group=0, symmetric=True)"
    for bad, said in (("bits=1", "expected 2 to 8"), ("bits=9", "expected 2 to 8"),
                      ("group=-1", "inputs that share a scale")):
        with pytest.raises(RecipeError, match=said):
            parse(f"rtn({bad})")


def test_narrower_spans_help_where_the_largest_entries_are_few():
    W = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    place = Place("l", "weight", "linear", 8, 256)
    off = [(WholeProvider(W, place, Quantiser(2, 0, False, rule)).weight() - W).square().sum()
           for rule in ("absmax", "search")]
    assert off[1] < 0.7 * off[0]


def test_of_a_weight_without_values_one_run_of_rows_is_made():
    with FakeTensorMode():
        W = torch.empty(1 << 12, 1 << 10)
        held = WholeProvider(W, Place("l", "weight", "linear", *W.shape), Quantiser(4, 64, False))
        assert len(list(held.runs())) == 1 and held.weight().shape == W.shape
        assert held.bits == 4.625
