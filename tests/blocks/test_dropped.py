"""Generated updates that drop, against the equation under the masks stock torch draws, in fp64."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks import weight
from burnish.blocks.weight import dropped
from burnish.blocks.weight.hadamard import Hadamard
from burnish.blocks.weight.kronecker import Kronecker
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.path import Path
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.term import DROPS, asks_to_drop
from burnish.blocks.weight.tiled import KernelDelta
from burnish.blocks.weight.triplets import Triplets
from burnish.core.call import Call, resume
from burnish.core.registry import find, names
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


# -- updates that work on tokens, or column by column -----------------------------------------
class Thin(Path):
    """``B A`` written as a path; `into`: A is frozen and stands in front."""

    def __init__(self, into):
        super().__init__()
        self.inp = IN
        self.B = nn.Parameter(torch.randn(OUT, 3).double())
        self.A = nn.Parameter(torch.randn(3, IN).double(), requires_grad=not into)
        self.first = into

    @property
    def into(self):
        return self.A if self.first else None

    def theta(self):
        return (self.B,) if self.first else (self.B, self.A)

    def path(self, h):
        return (h if self.first else h @ self.A.t()) @ self.B.t()


def terms():
    torch.manual_seed(0)
    place = Place("l", "weight", "linear", OUT, IN)
    triplets = Triplets(place, 3, 0.7).double()
    with torch.no_grad():
        for p in triplets.parameters():
            p.normal_()
    return {"path": Thin(False), "path behind": Thin(True), "triplets": triplets,
            "kronecker": Kronecker((5, 4), (2, 3), 2, (True, False), 0.5, 1, False).double(),
            "columns": Hadamard(OUT, IN, 2, 0.5, 1, False).double(), "tiles": term()}


CHANCES = [{"dropout": 0.4}, {"rank_dropout": 0.4}, {"rank_dropout": 0.4, "rescale": True},
           {"module_dropout": 0.5}, {"drop_path": 0.5},
           {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.4, "drop_path": 0.3}]


def drawn(t, x, delta, seed):
    """k m (Delta drop(x)) by plain functions, drawn in the order that dropped.py says."""
    torch.manual_seed(seed)
    xd = F.dropout(x.reshape(-1, IN), t.dropout, True) if t.dropout else x.reshape(-1, IN)
    m = torch.ones(OUT).double()
    if t.rank_dropout:
        m = torch.empty(OUT).double().bernoulli_(1 - t.rank_dropout)
        m = m / m.mean() if t.rescale and m.any() else m
    k = torch.ones(4).double()
    if t.drop_path:
        k = torch.empty(4).double().bernoulli_(1 - t.drop_path) / (1 - t.drop_path)
    if t.module_dropout:
        m = m * torch.empty(1).double().bernoulli_(1 - t.module_dropout)
    y = (xd @ delta.t()) * m
    return (y.view(4, -1) * k[:, None]).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("chances", CHANCES, ids=lambda c: " ".join(c))
@pytest.mark.parametrize("kind", ["path", "path behind", "triplets", "kronecker", "columns",
                                  "tiles"])
def test_whatever_it_drops_is_drawn_as_the_equation_says(kind, chances, monkeypatch):
    monkeypatch.setattr(dropped, "PANEL", OUT * 5)
    t = terms()[kind]
    with torch.no_grad():
        for p in t.parameters():
            p.normal_()
    for word, p in chances.items():
        setattr(t, word, p)
    W, bias = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    x = torch.randn(4, 3, IN).double().requires_grad_()
    wanted = [x, *[p for p in t.theta() if p.requires_grad]]
    outs = set()
    for seed, s in enumerate((-0.6, 1.0, 2.0, -0.6, 1.0, 2.0)):
        op = Weighted(lambda: W, [(t, s)])

        def expect(seed=seed, s=s):
            return F.linear(x, W, bias) + s * drawn(t, x, t.dense(), seed)

        want = expect()
        torch.manual_seed(seed)
        same(linear(x, op, bias), want, wanted)
        torch.manual_seed(seed)
        alone = linear(x.detach(), op, bias)            # only the factors want gradients
        g = torch.randn_like(alone)
        for a, b in zip(torch.autograd.grad(alone, wanted[1:], g),
                        torch.autograd.grad(expect(), wanted[1:], g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        torch.manual_seed(seed)
        torch.testing.assert_close(x @ W.t() + bias + s * t.plain(x), want)
        with torch.no_grad():
            torch.manual_seed(seed)
            torch.testing.assert_close(linear(x, op, bias), want)
        outs.add(want.sum().item())
    assert len(outs) > 1
    t.eval()
    torch.testing.assert_close(linear(x, op, bias), F.linear(x, W + s * t.dense(), bias))
    torch.testing.assert_close(t.plain(x), F.linear(x, t.dense()))


@pytest.mark.parametrize("chances", CHANCES, ids=lambda c: " ".join(c))
@pytest.mark.parametrize("kind", ["path", "path behind", "triplets", "columns"])
def test_under_a_length_of_rows(kind, chances):
    """``y = m / c (W x + what is left of Delta x)``, c of W + Delta, a constant."""
    t = terms()[kind]
    with torch.no_grad():
        for p in t.parameters():
            p.normal_()
    for word, p in chances.items():
        setattr(t, word, p)
    W = torch.randn(OUT, IN).double()
    wrap = Magnitude(W).double()
    x = torch.randn(4, 3, IN).double().requires_grad_()
    f = wrap.m / torch.linalg.vector_norm(W + 0.8 * t.dense().detach(), dim=1)
    want = f * (x @ W.t() + 0.8 * drawn(t, x, t.dense(), 5))
    torch.manual_seed(5)
    same(linear(x, Weighted(lambda: W, [(t, 0.8)], wrap), None), want,
         [x, *[p for p in t.theta() if p.requires_grad], wrap.m])


def test_outputs_that_are_left_out_all_at_once_are_no_fault():
    m = dropped.outputs(torch.ones(1), 3, 1.0 - 1e-9, True)
    assert torch.equal(m, torch.zeros(3))
    torch.manual_seed(0)
    m = dropped.outputs(torch.ones(1), 1000, 0.75, True)
    assert m.mean().sub(1).abs() < 1e-4 and set(m.ne(0).tolist()) == {True, False}
    assert dropped.outputs(torch.ones(1), 1000, 0.75, False).unique().tolist() == [0.0, 1.0]


def test_nothing_drops_unless_it_is_asked_to():
    plain = Thin(False)
    assert [getattr(plain, w) for w in (*DROPS[:4], "rescale", "own_drops")] \
        == [0.0, 0.0, 0.0, 0.0, False, False]
    assert not asks_to_drop(plain) and plain.training and not dropped.drops(plain)
    plain.dropout = 0.5
    x = torch.randn(2, IN).double()
    torch.manual_seed(3)
    F.dropout(x, 0.5)
    want = torch.get_rng_state()
    torch.manual_seed(3)
    plain.plain(x)                               # and what does not drop draws nothing
    assert torch.equal(torch.get_rng_state(), want)


def test_nothing_is_made_where_nothing_is_wanted():
    """A frozen update, and no gradient of x: a gradient for each tensor, all of them None."""
    t = term(0.5)
    t.requires_grad_(False)
    run = dropped.Dropped(t, torch.zeros(3, IN).double())
    run.forward_(torch.zeros(3, IN).double(), torch.zeros(3, OUT).double(), 1.0)
    assert run.backward_(torch.zeros(3, OUT).double(), None, (), None, 1.0) == [None] * 2


def test_a_run_is_asked_for_panels_where_its_term_is():
    for t in terms().values():
        run = dropped.Dropped(t, torch.zeros(1, IN))
        assert run.tokenwise and (run.tiled, run.cheap_tile) == (t.tiled, t.cheap_tile)


def below(cls):
    for one in cls.__subclasses__():
        yield one
        yield from below(one)


def test_a_term_that_drops_within_itself_says_so():
    """What stands around the others drops for them: they would drop twice."""
    for module in pkgutil.iter_modules(weight.__path__):
        importlib.import_module(f"{weight.__name__}.{module.name}")
    for name in names():
        find(name)
    terms = {t for t in below(dropped.Dropping) if t.__module__.startswith("burnish.")}
    within = {t for t in terms if "F.dropout(" in inspect.getsource(t)}
    assert within and len(terms) > 40
    assert all(t.own_drops for t in within), within
