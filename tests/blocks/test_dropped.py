"""Generated updates that drop, against the equation under the masks stock torch draws, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import dropped
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.call import Call, resume
from burnish.core.site import Place
from burnish.memory.ledger import Ledger

OUT, IN = 10, 12


def term(dropout=0.0, drop_path=0.0, mixed=False, s=0.4, dtype=torch.float64):
    torch.manual_seed(0)
    t = KernelDelta(Place("l", "weight", "linear", OUT, IN), 6, s, mixed, dropout=dropout,
                    drop_path=drop_path).to(dtype)
    with torch.no_grad():
        t.A.normal_()
        t.B.normal_()
    return t


def formula(t):
    """Delta from the paper's equation."""
    d = [((t.B[h][:, None] - t.A[h][None]) ** 2).sum(-1).sqrt() for h in (0, 1)]
    K = 0.1 * (d[0] - d[1])
    if t.mixed:
        K = K + t.alpha * torch.softmax(K / t.gamma, 0) + t.beta
    M = K.abs() * (K.abs() > torch.quantile(K.abs().flatten(), t.sparsity))
    return K * M.detach()


def expected(t, x, W, seed, samples):
    """W x + k Delta drop(x): the mask first, then one number per sample, as stock torch draws."""
    torch.manual_seed(seed)
    xd = F.dropout(x.reshape(-1, IN), t.dropout, True) if t.dropout else x.reshape(-1, IN)
    y = xd @ formula(t).t()
    if t.drop_path:
        k = torch.empty(samples).double().bernoulli_(1 - t.drop_path) / (1 - t.drop_path)
        y = y * k.repeat_interleave(len(xd) // samples).unsqueeze(1)
    return x @ W.t() + y.view(*x.shape[:-1], OUT)


def same(got, want, wanted):
    g = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("panels", [1, 4])
@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
@pytest.mark.parametrize("dropout, drop_path", [(0.5, 0.0), (0.0, 0.5), (0.4, 0.3)])
def test_base_and_update_see_their_own_inputs(dropout, drop_path, mixed, panels, monkeypatch):
    monkeypatch.setattr(dropped, "PANEL", OUT * IN // panels)               # findings 3.9
    t = term(dropout, drop_path, mixed)
    W = torch.randn(OUT, IN).double()
    x = torch.randn(4, 3, IN).double().requires_grad_()
    want = expected(t, x, W, 7, 4)
    torch.manual_seed(7)
    same(linear(x, Weighted(lambda: W, [(t, 1.0)]), None), want, [x, *t.parameters()])


def test_at_a_part_of_its_weight_and_with_frozen_factors():
    t = term(0.5, 0.3)
    W = torch.randn(OUT, IN).double()
    x = torch.randn(4, 3, IN).double().requires_grad_()
    for trains in (True, False):
        t.requires_grad_(trains)
        want = x @ W.t() + 0.3 * (expected(t, x, W, 7, 4) - x @ W.t())
        torch.manual_seed(7)
        same(linear(x, Weighted(lambda: W, [(t, 0.3)]), None), want,
             [x, *t.parameters()] if trains else [x])


@pytest.mark.parametrize("shape, called, samples", [
    ((6, 2, IN), (3,), 3), ((6, IN), (3,), 3), ((6, 2, IN), (), 6), ((6, 2, IN), (4, 6), 6),
    ((IN,), (), 1), ((6, 2, IN), (4,), 6), ((6, 2, IN), (0, 2), 2)],
    ids=["windows", "flattened", "alone", "of several", "one row", "not a multiple", "empty first"])
def test_a_sample_is_what_the_model_was_called_with(shape, called, samples):
    t = term(0.0, 0.5)
    W, x = torch.randn(OUT, IN).double(), torch.randn(shape).double().requires_grad_()
    want = expected(t, x, W, 5, samples)
    with resume(Call(samples=called)):
        torch.manual_seed(5)
        same(linear(x, Weighted(lambda: W, [(t, 1.0)]), None), want, [x, *t.parameters()])


def test_evaluation_drops_nothing_and_backward_goes_by_the_forward():
    t = term(0.5, 0.5)
    W, x = torch.randn(OUT, IN).double(), torch.randn(4, IN).double().requires_grad_()
    op = Weighted(lambda: W, [(t, 1.0)])
    want = expected(t, x, W, 7, 4)
    torch.manual_seed(7)
    got = linear(x, op, None)
    t.eval()
    same(got, want, [x, *t.parameters()])
    torch.testing.assert_close(linear(x, op, None), x @ (W + formula(t)).t())


@pytest.mark.parametrize("recipe", ["lora(rank=3, dropout=0.5)", "miss(rank=4, dropout=0.5)",
                                    "mola(rank=3, dropout=0.5, allocation='1')",
                                    "snell(rank=4, s=0.5, dropout=0.5)"])
def test_an_input_that_lies_transposed_is_dropped_in_backward_as_in_forward(recipe):
    """A mask is drawn in the order of memory; gradients lie otherwise than such an input."""
    got = []
    for turned in (False, True):
        torch.manual_seed(0)
        x = torch.randn(16, 16).double()
        x = x.t() if turned else x.t().contiguous()
        x.requires_grad_()
        if recipe.startswith("mola"):
            from burnish.blocks.weight.experts import ExpertChains
            model = ExpertChains(16, 12, 1, 3, 1, dropout=0.5).double()
        else:
            model = nn.Sequential(nn.Linear(16, 12)).double()
            tuned = burnish.tune(model, recipe, head=False, targets="0")
            for _, m in tuned.terms(nn.Module):
                m.double()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        torch.manual_seed(3)
        y = model(x)
        direction = torch.randn(16, 16).double()
        with torch.no_grad():
            torch.manual_seed(3)
            moved = model(x + 1e-6 * direction.t().contiguous().t() if turned
                           else x + 1e-6 * direction)
        slope = float((moved - y.detach()).sum()) / 1e-6
        (g,) = torch.autograd.grad(y.sum(), x)
        got.append((float((g * direction).sum()), slope))
    for gradient, slope in got:
        assert gradient == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_only_x_and_a_few_numbers_wait_for_backward():
    """No dropped copy of x, no mask, nothing of the weight's size: whatever the sizes."""
    def kept(out, tokens):
        t = KernelDelta(Place("l", "weight", "linear", out, 64), 4, 0.5, False, dropout=0.5,
                        drop_path=0.5)
        W, x = torch.randn(out, 64), torch.randn(tokens, 64, requires_grad=True)
        with Ledger() as ledger:
            ledger.watch("weights", [W, x, *t.parameters()])
            y = linear(x, Weighted(lambda: W, [(t, 1.0)]), None)
            held = sum(e.bytes for e in ledger.entries
                       if e.death is None and ledger.category(e) != "weights")
        return held - y.nbytes

    few = torch.get_rng_state().nbytes + 64
    assert kept(32, 256) <= few + 4 * 256 and kept(4096, 256) <= few + 4 * 256


def test_a_function_of_w_sees_the_dropped_update():
    """y = gain (W x + k Delta drop(x)) + b, gain = m / ||W + Delta|| held constant in its norm."""
    from burnish.blocks.weight.magnitude import Magnitude

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    tuned = burnish.tune(model, "dora(rank=2) + snell(rank=6, s=0.4, dropout=0.5)", head=False,
                         targets="0")
    for _, m in tuned.terms(nn.Module):
        m.double()
    ((_, t),), ((_, length),) = tuned.terms(KernelDelta), tuned.terms(Magnitude)
    with torch.no_grad():
        t.A.normal_()
        t.B.normal_()
    x = torch.randn(6, IN).double().requires_grad_()
    W, b = model[0].weight.detach(), model[0].bias.detach()
    gain = length.m / (W + formula(t).detach()).norm(dim=1)
    want = expected(t, x, W, 7, 6) * gain + b
    torch.manual_seed(7)
    same(model(x), want, [x, t.A, t.B, length.m])
