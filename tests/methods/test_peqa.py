"""PEQA: of weights in codes only the scales train, by gradients or (QZO) by evaluations alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.weight.quantise import Nf4Provider
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.methods.delta.ofw.peqa import Rescaled
from burnish.testing import follows, stir
from burnish.testing.models import tiny

F64 = torch.float64
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def made(group, inp=12, out=9, conv1d=False):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, inp) if conv1d else nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"peqa(group={group})", head=False, targets="0")
    (_, term), = tuned.terms(Rescaled)
    term.double()
    with torch.no_grad():
        term.d.uniform_(-0.6, 0.6)
    return model, tuned, term


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("group, groups", [(4, 3), (5, 3), (12, 1), (0, 1), (64, 1), (1, 12)])
def test_outputs_and_gradients_are_those_of_the_equation(group, groups, conv1d):
    model, tuned, term = made(group, conv1d=conv1d)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    W = W.t() if conv1d else W
    assert term.d.shape == (9, groups)
    size = {12: 1, 3: group, 1: 12}[groups]

    def equation(x, d):
        columns = torch.stack([1 + d[:, i // size] for i in range(12)], 1)
        return F.linear(x, columns * W, bias)

    follows(tuned, equation, [term.d], (5, 3, 12))


def test_a_scale_below_zero_counts_as_zero():
    model, tuned, term = made(4)
    with torch.no_grad():
        term.d[0] = torch.tensor([-1.5, -1.0, -0.5], dtype=F64)
    want = model[0].weight.detach()[0] * torch.tensor([0.0] * 8 + [0.5] * 4, dtype=F64)
    torch.testing.assert_close(tuned.merge()[0].weight[0], want, rtol=1e-6, atol=1e-9)


def test_in_half_precision_a_scale_moves_by_less_than_the_spacing_at_one():
    V = torch.tensor([[1.984375, 3.0]], dtype=torch.bfloat16)
    term = Rescaled(match(Anatomy.of(nn.Sequential(nn.Linear(2, 1))), "0")[0], 0)
    with torch.no_grad():
        term.d.fill_(0.0015)                         # in bf16 1.0015 is 1
    assert term.of(V).tolist() == [[1.984375, 3.0]] and term.of(V).dtype == V.dtype
    with torch.no_grad():
        term.d.fill_(0.003)
    assert term.of(V).tolist() == [[1.9921875, 3.015625]]


@pytest.mark.parametrize("group, count", [(0, 1_359_872), (128, 50_593_792)])
def test_the_published_counts(group, count):
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse(f"peqa(group={group})")
    assert sum(method.count(p) for p in match(anatomy, "q,k,v,o,gate,up,down")) == count


def test_settings():
    (method,) = parse("peqa")
    assert method.group == 64
    with pytest.raises(RecipeError, match="peqa: group=-1: expected the columns"):
        parse("peqa(group=-1)")


def wide(recipe, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, burnish.tune(model, recipe, targets="0", head=False, **kw)


def held(model):
    return [m for m in model.modules() if isinstance(m, Nf4Provider)]


def codes(model):
    return [{n: b.clone() for n, b in m.named_buffers()} for m in held(model)]


X = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))


def error(out, batch):
    return (out - batch[1]).square().mean()


@pytest.mark.parametrize("recipe", ["nf4 + peqa", "qzo"])
def test_only_scales_move_and_a_merge_writes_them(recipe):
    model, tuned = wide(recipe)
    before, start = codes(model), model(X).detach()
    W = held(model)[0].weight().clone()
    torch.testing.assert_close(start, model[2](torch.tanh(F.linear(X, W, model[0].bias))))
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step((X, Y), loss=error)) for _ in range(40)]
    assert losses[-1] < losses[0]
    for a, b in zip(before, codes(model), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    (_, term), = tuned.terms(Rescaled)
    assert [p.shape for p in tuned.parameters()] == [(16, 2)] and term.d.count_nonzero() == 32
    want = W * (1 + term.d.detach()).repeat_interleave(64, 1)
    torch.testing.assert_close(tuned.merge()[0].weight.detach(), want)


@torch.no_grad()
def test_qzo_is_a_bounded_step_along_the_noise_of_the_scales():
    """Six steps: g = (L(s (1 + d + eps z) q) - L(s (1 + d - eps z) q)) / (2 eps), cut to C."""
    model, tuned = wide("nf4 + peqa(group=64) + mezo(g_max=0.03, eps=1e-2)")
    W = held(model)[0].weight().double()
    opt = tuned.optimizer(lr=0.5)
    (_, term), = tuned.terms(Rescaled)
    d, cut = torch.zeros(16, 2, dtype=F64), 0

    def loss(d):
        V = W * (1 + d).clamp_min(0).repeat_interleave(64, 1)
        h = torch.tanh(F.linear(X.double(), V, model[0].bias.double()))
        out = F.linear(h, model[2].weight.double(), model[2].bias.double())
        return float((out - Y).square().mean())

    for _ in range(6):
        before = term.d.clone()
        tuned.step((X, Y), loss=error)
        z = CounterNoise(opt.log.seeds[-1], opt.param_groups[0]["param_names"][0]) \
            .normal(32).double().view(16, 2)
        g = (loss(d + 1e-2 * z) - loss(d - 1e-2 * z)) / 2e-2
        cut += abs(g) > 0.03
        d = d - 0.5 * max(-0.03, min(g, 0.03)) * z
        assert (term.d - before).norm() <= 0.5 * 0.03 * z.norm() * (1 + 1e-5)
        torch.testing.assert_close(term.d.double(), d, rtol=2e-2, atol=2e-4)
    assert 0 < cut < 6


def test_qzo_holds_codes_and_scales_and_no_gradient():
    model, tuned = wide("qzo")
    opt = tuned.optimizer(lr=1e-3)
    tuned.step((X, Y), loss=error)
    assert all(p.grad is None for p in model.parameters()) and not opt.state
    n = 128 * 16
    coded = n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4      # codes, maxima in 8 bits
    assert held(model)[0].nbytes == coded
    assert sum(p.nbytes for p in tuned.parameters()) == 4 * n // 64


def test_on_a_language_model_the_loss_falls():
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net, "nf4 + peqa(group=8) + mezo(g_max=100.0)", head=False))
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
