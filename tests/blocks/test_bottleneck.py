"""Bottlenecks and gates against the equation: values, gradients, bytes, folding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.state.bottleneck import ACTIVATIONS, Bottleneck, Normed
from burnish.blocks.state.gates import Affine
from burnish.core.errors import CheckError, ConfigError


def saved_bytes(module, x):
    """Bytes of distinct storages a stock tape keeps for backward, parameters left out."""
    params = {p.untyped_storage()._cdata for p in module.parameters()}
    seen = {}

    def pack(t):
        if t.untyped_storage()._cdata not in params:
            seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(seen.values())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, "in", "out"])
def test_values_and_gradients_are_those_of_the_equation(act, norm):
    b = Bottleneck(6, 3, 5, act=act, norm=norm, scale=0.7, init="bert").double()
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn_like(p))
    h = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(b(h), b.dense(h), rtol=1e-12, atol=1e-12)
    inputs = (h, *b.parameters())
    got = torch.autograd.grad(b(h).square().sum(), inputs)
    want = torch.autograd.grad(b.dense(h).square().sum(), inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_the_equation_written_out():
    b = Bottleneck(4, 2, act="relu", scale=3.0, init="bert").double()
    h = torch.randn(5, 4, dtype=torch.double)
    z = torch.relu(h @ b.down.weight.t() + b.down.bias)
    want = 3 * (z @ b.up.weight.t() + b.up.bias)
    torch.testing.assert_close(b(h), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train_scale", [False, True])
def test_heads_read_their_own_part_of_the_bottleneck(train_scale):
    b = Bottleneck(6, 4, 10, act="gelu", scale=0.7, train_scale=train_scale, heads=2,
                   init="bert").double()
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn_like(p))
    h = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    z = F.gelu(h @ b.down.weight.t() + b.down.bias)
    want = b.scale * (torch.cat([z[..., :2] @ b.up.weight[:5].t(), z[..., 2:]
                                 @ b.up.weight[5:].t()], -1) + b.up.bias)
    torch.testing.assert_close(b.dense(h), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b(h), want, rtol=1e-12, atol=1e-12)
    inputs = (h, *b.parameters())
    for x, y in zip(torch.autograd.grad(b(h).square().sum(), inputs),
                    torch.autograd.grad(want.square().sum(), inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
    assert sum(p.numel() for p in b.parameters()) - train_scale == Bottleneck.count(6, 4, 10, 2)
    with pytest.raises(ConfigError, match="equal heads"):
        Bottleneck(6, 4, 9, heads=2)


def test_a_zero_start_is_exactly_nothing():
    b = Bottleneck(8, 3, act="gelu")
    assert not b(torch.randn(7, 8)).any()
    assert b.down.weight.any() and not b.down.bias.any()


def test_other_starts_have_their_deviation():
    wide = {i: Bottleneck(400, 300, init=i).down.weight for i in ("bert", "truncated")}
    assert wide["bert"].std().item() == pytest.approx(0.02, rel=0.02)
    assert wide["truncated"].abs().max() <= 0.02 and wide["truncated"].std() > 0.008


def test_it_keeps_its_input_and_the_bottleneck_only():
    b, x = Bottleneck(64, 4, act="gelu", init="bert"), torch.randn(2, 16, 64, requires_grad=True)
    assert saved_bytes(b, x) == 4 * 32 * (64 + 4)
    stock = nn.Sequential(nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 64))
    assert saved_bytes(stock, x) == 4 * 32 * (64 + 2 * 4)


def test_no_input_gradient_when_nobody_asks():
    b = Bottleneck(6, 3, init="bert")
    b(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in b.parameters())


def test_dropout_is_the_same_mask_in_backward():
    b = Bottleneck(6, 64, act="tanh", dropout=0.5, init="bert").double()
    h = torch.randn(4, 6, dtype=torch.double, requires_grad=True)

    def stock():
        torch.manual_seed(3)
        z = F.dropout(torch.tanh(b.down(h)), 0.5, True)
        return b.up(z)

    torch.manual_seed(3)
    y = b(h)
    torch.testing.assert_close(y, stock(), rtol=1e-12, atol=1e-12)
    inputs = (h, *b.parameters())
    for x, z in zip(torch.autograd.grad(y.square().sum(), inputs),
                    torch.autograd.grad(stock().square().sum(), inputs), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b.eval()(h), b.dense(h))


def test_the_scale_folds_into_the_up_projection():
    b = Bottleneck(16, 4, scale=4.0, init="bert")
    nn.init.normal_(b.up.bias)
    h = torch.randn(3, 16)
    before = b(h)
    b.absorb_scale()
    assert b.scale == 1
    torch.testing.assert_close(b(h), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alone", [False, True])
def test_a_scale_that_trains(bias, alone):                                     # findings 3.9
    """Its gradient is the sum of g times the branch at s = 1; nothing wide is kept for it."""
    b = Bottleneck(6, 3, 5, scale=0.7, train_scale=True, bias=bias, init="bert").double()
    for p in b.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
        p.requires_grad_(not alone or p is b.scale)
    h = torch.randn(2, 4, 6, dtype=torch.double)
    g = torch.randn(2, 4, 5, dtype=torch.double)
    unscaled = F.linear(torch.relu(F.linear(h, b.down.weight, b.down.bias)), b.up.weight,
                        b.up.bias)
    torch.testing.assert_close(b(h), b.scale * unscaled, rtol=1e-12, atol=1e-12)
    wanted = [p for p in b.parameters() if p.requires_grad]
    for x, y in zip(torch.autograd.grad((b(h) * g).sum(), wanted),
                    torch.autograd.grad((b.scale * unscaled * g).sum(), wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    b.absorb_scale()
    assert float(b.scale.detach()) == 1
    torch.testing.assert_close(b(h), b.dense(h), rtol=1e-12, atol=1e-12)


def test_a_scale_that_trains_keeps_nothing_wide():
    b = Bottleneck(64, 4, act="gelu", init="bert", train_scale=True)
    assert saved_bytes(b, torch.randn(2, 16, 64, requires_grad=True)) == 4 * 32 * (64 + 4)


def test_a_mixer_works_in_the_bottleneck():
    mixer = nn.Linear(3, 3)
    b = Bottleneck(6, 3, mixer=mixer, init="bert").double()
    h = torch.randn(2, 5, 6, dtype=torch.double)
    want = b.up(mixer(torch.relu(b.down(h))))
    torch.testing.assert_close(b(h), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [None, "in", "out"])
def test_low_precision_states_and_autocast(norm):
    b = Bottleneck(16, 4, norm=norm, init="bert")
    h = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    y = b(h)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert b.up.weight.grad.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert b(h.detach().float()).dtype == torch.bfloat16


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gelu'"):
        Bottleneck(4, 2, act="gellu")


def test_normed_reads_behind_the_frozen_norm():
    norm, b = nn.LayerNorm(6), Bottleneck(6, 3, init="bert")
    nn.init.normal_(norm.weight)
    made, h = Normed(norm, b), torch.randn(4, 6)
    torch.testing.assert_close(made(h), b(norm(h)))
    own = {n for n, _ in made.named_parameters()}
    assert own == {f"inner.{n}" for n, _ in b.named_parameters()}


# -- gates ------------------------------------------------------------------------------------
def stirred(gate):
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return gate


def test_the_gradient_of_a_gain_sums_over_tokens():
    gate, h, g = stirred(Affine(5, shift=True)), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    gate(h).backward(g)
    torch.testing.assert_close(gate.gain.grad, (g * h).sum((0, 1)))
    torch.testing.assert_close(gate.shift.grad, g.sum((0, 1)))


def test_a_gate_keeps_the_state_and_nothing_else_of_its_size():
    h = torch.randn(8, 32, requires_grad=True)
    for shift in (False, True):
        assert saved_bytes(Affine(32, shift=shift), h * 1) == 4 * 8 * 32


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 4)


FOLDS = {
    "linear": (lambda: nn.Linear(4, 5), (3, 4), -1, 5, True),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), (3, 4), -1, 5, True),
    "conv1d": (_conv1d, (3, 4), -1, 5, True),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 1, 6, True),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), -1, 4, True),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4), -1, 4, True),
    "batch norm": (lambda: nn.BatchNorm2d(4).eval(), (2, 4, 5, 5), 1, 4, True),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4), -1, 4, False),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_gate_folds_exactly(name):
    make, shape, axis, channels, shift = FOLDS[name]
    module, x = make(), torch.randn(shape)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    gate = stirred(Affine(channels, shift=shift, axis=axis))
    want = gate(module(x))
    values = {}
    gate.fold(module, values)
    for n, v in values.items():
        module._parameters[n] = nn.Parameter(v)
    torch.testing.assert_close(module(x), want, rtol=1e-6, atol=1e-6)


def test_a_norm_that_stores_its_scale_less_one_folds_too():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm, x = GemmaRMSNorm(6), torch.randn(3, 6)
    nn.init.normal_(norm.weight)
    gate, before = stirred(Affine(6)), norm.weight.clone()
    want, values = gate(norm(x)), {}
    gate.fold(norm, values)
    assert torch.equal(norm.weight, before)
    norm.weight = nn.Parameter(values["weight"])
    torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-6)


def test_a_gate_at_the_input_folds_into_columns():
    for module in (nn.Linear(4, 5), _conv1d()):
        gate, x, values = stirred(Affine(4, side="input")), torch.randn(3, 4), {}
        want = module(gate(x))
        gate.fold(module, values)
        module.weight = nn.Parameter(values["weight"])
        assert "bias" not in values
        torch.testing.assert_close(module(x), want, rtol=1e-6, atol=1e-6)


def test_rows_of_a_fused_output():
    gate = stirred(Affine(6, rows=((2, 4), (4, 5))))
    h = torch.randn(3, 6)
    want = h.clone()
    want[:, 2:5] *= gate.gain
    torch.testing.assert_close(gate(h), want)
    assert gate.gain.numel() == 3


def test_a_shift_with_nowhere_to_go_is_refused():
    with pytest.raises(CheckError, match="no bias"):
        stirred(Affine(4, shift=True)).fold(nn.RMSNorm(4), {})


@pytest.mark.parametrize("init", ["zero", "bert", "truncated"])
def test_biases_that_begin_at_nothing_draw_nothing(init):
    """What is drawn behind them, in the same run, stays what it was."""
    states = []
    for bias in (True, False):
        made = Bottleneck(8, 4, bias=bias)
        torch.manual_seed(0)
        made.reset(init)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
