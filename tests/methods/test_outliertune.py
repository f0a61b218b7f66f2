"""OutlierTune: scales of channels in the weight, held against sums of int64 and plain float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.choose.inputs import ChannelRanges
from burnish.blocks.weight.migrated import PerChannel, PerToken
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.storage.outliertune import BEHIND_NORMS
from burnish.testing.models import tiny

F64 = torch.float64


class Mlp(nn.Module):
    """A norm, a linear that reads it, and one that does not."""

    def __init__(self, kind="linear", inp=12, hidden=10):
        super().__init__()
        self.norm = nn.LayerNorm(inp)
        made = (lambda i, o: Conv1D(o, i)) if kind == "the transpose" else nn.Linear
        self.fc1, self.fc2, self.head = made(inp, hidden), made(hidden, inp), nn.Linear(inp, 2)
        for m in (self.fc1, self.fc2):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(self.norm(x)).tanh()))


def made(kind="linear", bits=8, input_bits=8, centred=True, outlier=None, recipe="bitfit"):
    torch.manual_seed(0)
    net = Mlp(kind).double()
    if outlier:
        with torch.no_grad():
            net.norm.weight[3] *= outlier
    data = [torch.randn(5, 7, 12, dtype=F64) for _ in range(3)]
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"{recipe} + outliertune(bits={bits}, input_bits={input_bits}, "
                              f"centred={centred})", targets="fc1, fc2", head=False,
                         calibration=data)
    return net, tuned, base, data


def out_in(m):
    return m.weight.detach().t() if isinstance(m, Conv1D) else m.weight.detach()


def calibrated(base, data, bits, input_bits, centred):
    """(z, s, whole W^, its scale (out, 1)) of fc1, written out."""
    x = torch.cat([base.norm(d).reshape(-1, 12) for d in data]).detach()
    low, high = x.amin(0), x.amax(0)
    z = (low + high) / 2 if centred else torch.zeros_like(low)
    s = (x - z).abs().amax(0) / (2 ** (input_bits - 1) - 1)
    W = out_in(base.fc1) * s
    step = W.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return z, s, (W / step).round(), step


@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("bits, input_bits, centred", [(8, 8, True), (6, 6, True), (8, 4, False)])
def test_the_product_is_one_of_whole_numbers(bits, input_bits, centred, kind):
    net, _, base, data = made(kind, bits, input_bits, centred)
    z, s, q, step = calibrated(base, data, bits, input_bits, centred)
    top = 2 ** (input_bits - 1) - 1
    x = base.norm(1.5 * torch.randn(4, 7, 12, dtype=F64)).detach()
    codes = ((x.reshape(-1, 12) - z) / s).round().clamp(-top, top)
    assert float((codes.abs() == top).double().mean()) > 0
    sums = codes.long() @ q.long().t()                             # no scale within the sum
    want = sums.double() * step.t() + out_in(base.fc1) @ z + base.fc1.bias.detach()
    got = net.fc1(x).reshape(-1, 10).detach()
    # scales are kept in fp32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert torch.equal(codes, codes.long()) and int(q.abs().max()) == 2 ** (bits - 1) - 1


def test_int8_kernels_give_the_same():
    net, _, base, data = made()
    z, s, q, step = calibrated(base, data, 8, 8, True)
    x = base.norm(torch.randn(4, 8, 12, dtype=F64)).detach()
    codes = ((x.reshape(-1, 12) - z) / s).round().clamp(-127, 127)
    pad = nn.functional.pad
    sums = torch._int_mm(pad(codes.to(torch.int8), (0, 4)).contiguous(),
                         pad(q.to(torch.int8), (0, 4, 0, 6)).contiguous().t())[:, :10]
    want = sums.double() * step.t() + base.fc1.weight.detach() @ z + base.fc1.bias.detach()
    torch.testing.assert_close(net.fc1(x).reshape(-1, 10).detach(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_where_nothing_is_rounded_it_is_the_same_layer(centred):
    """W diag(s) of whole numbers, (x - z) / s too: W x + b, whatever z and s."""
    net, _, base, data = made(outlier=50, centred=centred)
    z, s, _, _ = calibrated(base, data, 8, 8, centred)
    with torch.no_grad():                        # z alone reads no rounded weight
        torch.testing.assert_close(net.fc1(z[None]), base.fc1(z[None]), rtol=1e-5, atol=1e-5)
    torch.manual_seed(1)
    net = copy.deepcopy(base)
    q = torch.randint(-127, 128, (10, 12)).double()
    q[:, 0] = 127
    with torch.no_grad():
        net.fc1.weight.copy_(1e-3 * (0.5 + torch.rand(10, 1, dtype=F64)) * q * s.max() / s)
    base = copy.deepcopy(net)
    burnish.tune(net, f"bitfit + outliertune(centred={centred})", targets="fc1, fc2", head=False,
                 calibration=data)
    x = z + s * torch.randint(-127, 128, (4, 7, 12))
    with torch.no_grad():
        want = base.fc1(x)
        torch.testing.assert_close(net.fc1(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert (net.fc1(x + s / 3) - base.fc1(x + s / 3)).abs().max() > 1e-3


def test_other_linears_read_each_token_on_a_grid_of_its_own():
    net, _, base, _ = made(bits=6, input_bits=4)
    x = torch.randn(3, 10, dtype=F64)
    s = x.abs().amax(1, keepdim=True) / 7
    W = base.fc2.weight.detach()
    step = W.abs().amax(1, keepdim=True) / 31
    want = ((x / s).round() * s) @ ((W / step).round() * step).t() + base.fc2.bias.detach()
    torch.testing.assert_close(net.fc2(x).detach(), want, rtol=1e-5, atol=1e-5)
    held = [m for m in net.modules() if isinstance(m, PerToken)]
    assert [type(m) for m in held] == [PerChannel, PerToken]


def test_an_outlier_channel_costs_the_others_nothing():
    """Below per-token int8 on the same inputs, where one channel is fifty times the others."""
    net, _, base, data = made(outlier=50)
    x = base.norm(torch.cat(data)).detach().reshape(-1, 12)
    want = base.fc1(x).detach()
    s = x.abs().amax(1, keepdim=True) / 127
    W = base.fc1.weight.detach()
    step = W.abs().amax(1, keepdim=True) / 127
    per_token = ((x / s).round() * s) @ ((W / step).round() * step).t() + base.fc1.bias.detach()
    quiet = [k for k in range(12) if k != 3]
    off_x = [((m - x)[:, quiet]).square().mean() for m in (
        next(p for p in net.modules() if isinstance(p, PerChannel)).given(x), (x / s).round() * s)]
    assert off_x[0] < 0.1 * off_x[1]
    assert (net.fc1(x).detach() - want).square().mean() < (per_token - want).square().mean()


def test_taking_the_middle_off_narrows_the_scales():
    """A channel with an offset: its scale, and the range of W diag(s), are smaller."""
    place = Place("fc1", "weight", "linear", 6, 8, role="fc1")
    ranges = torch.stack([-torch.ones(8), torch.ones(8)])
    ranges[:, 2] += 20
    W = torch.randn(6, 8)
    off = {}
    for centred in (True, False):
        held = PerChannel(W, place, 8, 8, ranges, centred)
        off[centred] = float((held.weight() - W)[:, [0, 1, 3, 4, 5, 6, 7]].square().mean())
        assert float(held.step.max() / held.step.min()) == pytest.approx(1 if centred else 21)
    assert off[True] < 0.1 * off[False]


def test_a_channel_that_never_moves_has_a_scale():
    place = Place("fc1", "weight", "linear", 6, 4, role="fc1")
    ranges = torch.tensor([[0.0, -1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    W = torch.randn(6, 4)
    held = PerChannel(W, place, 8, 8, ranges, True)
    assert held.step[[0, 2]].tolist() == [held.step.max() * 2.0**-16] * 2
    x = torch.tensor([[0.0, 0.5, 2.0, 1.0]])
    y = held.gives(held.given(x) @ held.weight().t())
    torch.testing.assert_close(y, x @ W.t(), rtol=0.05, atol=0.05)
    blank = PerChannel(W, place, 8, 8, torch.zeros(2, 4), True)
    assert blank.step.eq(1).all() and held.nbytes == blank.nbytes == 24 + 6 * 8 + 4 * 8


def test_gradients_go_straight_through_and_stop_where_it_clips():
    net, tuned, base, data = made(input_bits=6, recipe="lora(rank=2)")
    z, s, q, step = calibrated(base, data, 8, 6, True)
    x = base.norm(2 * torch.randn(6, 12, dtype=F64)).detach() * 1.5
    x.requires_grad_()
    inside = ((x.detach() - z) / s).round().abs() <= 31
    assert 0 < int((~inside).sum()) < inside.numel()
    for p in tuned.parameters():
        p.data.normal_()
    (term,) = [t for n, t in tuned.terms(nn.Module) if n.startswith("fc1") and hasattr(t, "A")]
    V = q * step / s + term.scale * (term.B @ term.A).detach().double()
    g = torch.randn(6, 10, dtype=F64)
    (net.fc1(x) * g).sum().backward()
    torch.testing.assert_close(x.grad, (g @ V) * inside, rtol=1e-5, atol=1e-5)
    read = (((x.detach() - z) / s).round().clamp(-31, 31) * s + z)
    want = term.scale * (g @ term.B.double()).t() @ read
    torch.testing.assert_close(term.A.grad.double(), want, rtol=1e-4, atol=1e-4)


def test_a_file_has_the_scales_and_a_load_needs_no_data(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + outliertune", head=False, calibration=[batch])
    with torch.no_grad():
        want = net(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("llama")[0], tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, want)
    with pytest.raises(CheckError, match="merge"):
        again.merge()


def test_what_is_calibrated():
    (method,) = parse("outliertune")
    roles = {r: method.observe(Place("x", "weight", "linear", 4, 6, role=r))
             for r in (*BEHIND_NORMS, "o", "fc2", "down", "head", "")}
    assert {r for r, seen in roles.items() if seen is not None} == set(BEHIND_NORMS)
    seen = roles["q"]
    assert seen.nbytes == 48 and seen.key == ChannelRanges(6).key != ChannelRanges(7).key
    for x in (torch.tensor([[1.0, 2, 3, 4, 5, 6], [-1, 7, 3, 4, 5, 6]]),
              torch.tensor([[0.0, 0, 9, 4, 5, 6]])):
        seen.update(x)
    assert seen.value.tolist() == [[-1, 0, 3, 4, 5, 6], [1, 7, 9, 4, 5, 6]]
    seen.update(torch.full((1, 2, 6), 100.0), torch.tensor([[False, False]]))
    assert float(seen.value.max()) == 9


def test_settings():
    (method,) = parse("outliertune")
    assert (method.bits, method.input_bits, method.centred, method.samples) == (8, 8, True, 128)
    assert parse("outliertune(bits=2, input_bits=2, samples=1)")[0].bits == 2
    for bad in ("bits=1", "input_bits=9", "samples=0"):
        with pytest.raises(RecipeError, match=f"outliertune: {bad}"):
            parse(f"outliertune({bad})")
    with pytest.raises(RecipeError, match="the grid of the stored weights"):
        burnish.tune(tiny("vit")[0], "nf4 + outliertune + lora(rank=2)")
