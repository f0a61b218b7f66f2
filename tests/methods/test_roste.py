"""RoSTE: rounding in turned coordinates, written out with dense matrices in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight.turned import Turned, TurnErrors
from burnish.blocks.weight.walsh import Walsh, order, paley, sylvester
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place, Site
from burnish.core.targets import match
from burnish.memory import Ledger
from burnish.testing.models import tiny

F64 = torch.float64


def dense(n, seed=0):
    """R: signs, then the Hadamard matrix, one block for each run of the largest that fits."""
    base, power = order(n)
    H = torch.kron(torch.ones(1, 1) if base == 1 else paley(base), sylvester(power)).double()
    R = torch.block_diag(*[H] * (n // len(H))) * len(H) ** -0.5
    signs = 2 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)) - 1
    return signs.double()[:, None] * R


@pytest.mark.parametrize("n", [1, 2, 6, 12, 20, 24, 28, 36, 64, 128, 768, 172])
def test_a_turn_is_orthogonal_with_entries_of_one_size(n):
    walsh, eye = Walsh(n), torch.eye(n, dtype=F64)
    R = walsh.turn(eye)
    torch.testing.assert_close(R, dense(n), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(R @ R.t(), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(walsh.back(R), eye, rtol=0, atol=1e-12)
    size = walsh.length
    assert ((R.abs() * size**0.5 - 1).abs() < 1e-9).double().mean() == size / n
    assert n % size == 0


@pytest.mark.parametrize("n, block", [(768, 768), (3072, 3072), (4096, 4096), (11008, 256),
                                      (14336, 14336), (13824, 13824), (5120, 5120), (7, 1)])
def test_widths_of_models_and_the_blocks_they_turn_in(n, block):
    base, power = order(n)
    assert base * power == block


@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 44, 60, 76, 108])
def test_paley_s_matrices(n):
    H = paley(n)
    assert H.abs().eq(1).all() and torch.equal(H @ H.t(), n * torch.eye(n))


@pytest.mark.parametrize("settings, words", [
    ("rotation='none', seed=1", "seed do nothing.*'chosen' or 'hadamard'"),
    ("rotation='none', samples=4", "samples do nothing.*rotation='chosen', or"),
    ("rotation='none', samples=4, seed=1", "samples and seed do nothing"),
    ("rotation='hadamard', samples=4", "samples do nothing.*rotation='chosen', or")])
def test_settings_that_nothing_would_read_are_refused(settings, words):
    with pytest.raises(RecipeError, match=f"roste: {words}"):
        parse(f"roste({settings})")
    parse("roste(samples=4, seed=1)"), parse("roste(rotation='hadamard', seed=1)")


def test_other_orders_have_none():
    assert [m for m in range(3, 60) if paley(m) is None and m % 4 == 0] == [16, 40, 52, 56]
    assert paley(6) is None


def grid_x(x, bits, span):
    """(values, inside): each row on the grid of its own range, in Python's numbers."""
    out, inside = torch.empty_like(x), torch.empty_like(x)
    for n, row in enumerate(x.tolist()):
        low, high, top = min(0.0, *row) * span, max(0.0, *row) * span, 2**bits - 1
        s = (high - low) / top
        z = round(-low / s)
        for i, v in enumerate(row):
            q = round(v / s) + z
            out[n, i] = s * (max(0, min(top, q)) - z)
            inside[n, i] = float(0 <= q <= top or span == 1)
    return out, inside


def grid_w(W, bits):
    s = W.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (W / s).round() * s


class Equation(torch.autograd.Function):
    """Rounding as an identity for gradients."""

    @staticmethod
    def forward(ctx, x, values, inside):
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


def equation(x, W, bias, R, bits, input_bits, span):
    xr, wr = x @ R, W @ R
    xq = Equation.apply(xr, *grid_x(xr.detach(), input_bits, span))
    wq = Equation.apply(wr, grid_w(wr.detach(), bits), torch.ones_like(wr))
    return F.linear(xq, wq, bias)


@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
@pytest.mark.parametrize("rotation, bits, input_bits, span", [
    ("hadamard", 4, 4, 1.0), ("none", 3, 5, 0.6), ("hadamard", 8, 2, 0.7)])
def test_outputs_and_gradients_are_those_of_the_equation(rotation, bits, input_bits, span, recipe,
                                                         kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 10) if kind == "linear" else Conv1D(10, 24)).double()
    nn.init.normal_(net[0].weight)
    tuned = burnish.tune(net, f"{recipe} + roste(bits={bits}, input_bits={input_bits}, kv_bits=0, "
                              f"clip_ratio={span}, rotation={rotation!r})", targets="0", head=False)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.1 * torch.randn_like(p.data, dtype=F64)
    own = [p.detach().clone().requires_grad_() for p in tuned.parameters()]
    W = net[0].weight.detach().clone()
    if recipe == "full":
        (i,) = [k for k, p in enumerate(tuned.parameters()) if p is net[0].weight]
        W = own[i]
    W = W if kind == "linear" else W.t()
    if recipe != "full":
        A, B = own
        (term,) = [t for _, t in tuned.terms(nn.Module) if hasattr(t, "A")]
        W = W + term.scale * B @ A
    R = torch.eye(24, dtype=F64) if rotation == "none" else dense(24)
    x = torch.randn(3, 4, 24, dtype=F64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    want = equation(y.reshape(-1, 24), W, net[0].bias.detach(), R, bits, input_bits, span)
    got = net(x)
    # codes are made in fp32: a number at a border may take the neighbouring one
    torch.testing.assert_close(got.reshape(-1, 10), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), got, rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for p, ref in zip(tuned.parameters(), own, strict=True):
        if ref.grad is not None:
            torch.testing.assert_close(p.grad, ref.grad, rtol=1e-5, atol=1e-5)
    assert sum(p.grad is not None for p in own) == (1 if recipe == "full" else 2)


def test_without_rounding_a_turn_changes_nothing():
    x, W = torch.randn(9, 36), torch.randn(14, 36)
    term = Turned(36, 8, 8, 1.0, Walsh(36))
    torch.testing.assert_close(term.ready(x) @ term.ready(W).t(), x @ W.t(), rtol=1e-4, atol=1e-4)
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    h = Walsh(16)
    torch.testing.assert_close(h.turn(q) @ h.turn(k).mT, q @ k.mT, rtol=1e-4, atol=1e-4)


def test_a_turn_takes_an_outlier_apart():
    """Kurtosis of inputs with a planted outlier falls, and so does what rounding changes."""
    torch.manual_seed(0)
    x = torch.randn(64, 96)
    x[:, 5] *= 40
    term = Turned(96, 4, 4, 1.0, Walsh(96))

    def kurtosis(v):
        return float((v - v.mean()).pow(4).mean() / (v - v.mean()).square().mean() ** 2)

    turned = term.ready(x)
    assert kurtosis(x) > 20 and kurtosis(turned) < 5
    seen = TurnErrors(term)
    seen.weigh(torch.randn(32, 96))
    seen.update(x)
    assert seen.errors[1] < 0.5 * seen.errors[0]


def test_the_choice_is_the_smaller_error_and_is_in_the_file(tmp_path):
    torch.manual_seed(0)
    plain, spiky = torch.randn(2, 5, 16).sign(), torch.randn(2, 5, 16)
    spiky[..., 3] *= 30
    net = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8), "head": nn.Linear(8, 2)})
    net["a"].weight.data.sign_()                     # both lie on their grids as they are

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, a, b):
            return self.net["head"](self.net["a"](a) + self.net["b"](b))

    model = Both()
    fresh = copy.deepcopy(model)
    tuned = burnish.tune(model, "lora(rank=2) + roste(kv_bits=0)", targets="net.a, net.b",
                         head=False, calibration=[{"a": plain, "b": spiky}])
    terms = {n: t for n, t in tuned.terms(Turned)}
    turned = {n.split(".")[1]: t.walsh is not None for n, t in terms.items()}
    assert turned == {"a": False, "b": True}
    for key, x in (("a", plain), ("b", spiky)):
        W = model.net[key].weight.detach().double()
        R, rows = dense(16), x.reshape(-1, 16).double()
        off = [float((grid_x(rows @ r, 4, 1.0)[0] - rows @ r).square().sum() / rows.square().sum()
                     + (grid_w(W @ r, 4) - W @ r).square().sum() / W.square().sum())
               for r in (torch.eye(16, dtype=F64), R)]
        assert (off[1] < off[0]) == turned[key]
    want = model(plain, spiky).detach()
    tuned.save(tmp_path / "t")
    again = burnish.load(fresh, tmp_path / "t")
    assert torch.equal(again.model(plain, spiky), want)


def fitted(bits, spike=0.0, rotation="none"):
    """(prediction error, error of the rounded weight) where descent on 24 samples of 64 inputs has
    converged: the mean of the last fifty steps."""
    torch.manual_seed(0)
    x, W = torch.randn(24, 64), torch.randn(8, 64) / 8
    W[:, 3] += spike
    net = nn.Sequential(nn.Linear(64, 8, bias=False))
    net[0].weight.data.copy_(W + 0.02 * torch.randn_like(W))
    tuned = burnish.tune(net, f"full + roste(bits={bits}, input_bits=8, kv_bits=0, "
                              f"rotation='{rotation}')", targets="0", head=False)
    (V,), R = tuned.parameters(), dense(64) if rotation == "hadamard" else torch.eye(64).double()
    off, rounding = [], []
    for _ in range(250):
        V.grad = None
        loss = (net(x) - x @ W.t()).square().sum() / 24
        (loss / 2).backward()
        V.data.sub_(V.grad, alpha=0.2)
        turned = V.detach().double() @ R
        off.append(float(loss.detach()))
        rounding.append(float((grid_w(turned, bits) - turned).square().sum()))
    return sum(off[-50:]) / 50, sum(rounding[-50:]) / 50


def test_the_error_of_a_fit_goes_with_that_of_its_rounded_weights():
    """More inputs than samples: what stays is a multiple of the rounding of what it converged to,
    over three orders of magnitude, and a turn that takes an outlier apart lowers both."""
    each = [fitted(bits) for bits in (3, 4, 5, 6, 8)]
    assert all(a[0] > 3 * b[0] for a, b in zip(each, each[1:], strict=False))
    assert each[0][0] > 1000 * each[-1][0]
    ratios = [off / rounding for off, rounding in each]
    assert max(ratios) < 2.5 * min(ratios)
    plain, turned = (fitted(4, 2.0, how) for how in ("none", "hadamard"))
    assert turned[1] < 0.5 * plain[1] and turned[0] < 0.5 * plain[0]


@pytest.mark.parametrize("input_bits, span, nbytes", [
    (4, 1.0, 32), (3, 1.0, 32), (8, 1.0, 64), (2, 1.0, 16), (4, 0.5, 32 + 8)])
def test_backward_keeps_codes_in_place_of_the_input(input_bits, span, nbytes):
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    burnish.tune(net, f"full + roste(kv_bits=0, rotation='hadamard', input_bits={input_bits}, "
                      f"clip_ratio={span})", targets="0", head=False)
    x = torch.randn(10, 64)
    with Ledger(net) as ledger:
        ledger.watch("weights", [x])
        y = net(x)
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert alive - y.nbytes == 10 * (nbytes + 4 + 1)     # codes, a scale and a zero point a token


def test_keys_and_values_lie_on_grids_and_queries_are_turned_with_them(monkeypatch):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + roste(kv_bits=3, rotation='hadamard')", head=False)
    stock, met = F.scaled_dot_product_attention, []

    def look(q, k, v, *args, **kw):
        met.append((q, k, v))
        return stock(q, k, v, *args, **kw)

    listener = [m for m in net.modules() if type(m).__name__ == "RoundedKeys"][0]
    q, k, v = (torch.randn(2, 4, 5, listener.walsh.length, dtype=F64) for _ in range(3))
    got = listener.attend(None, look, (q, k, v), {"is_causal": True})
    R = dense(listener.walsh.length)
    (q1, k1, v1), = met
    n = R.shape[0]
    torch.testing.assert_close(q1, q @ R, rtol=1e-9, atol=1e-9)
    for had, was, turn in ((k1, k @ R, None), (v1, v @ R, R)):
        want = grid_x(was.reshape(-1, n), 3, 1.0)[0].view(had.shape)
        want = want if turn is None else want @ R.t()
        torch.testing.assert_close(had, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, stock(q1, k1, v1, is_causal=True))
    with torch.no_grad():
        off = net(**batch).logits
        with tuned.disabled():
            assert float((net(**batch).logits - off).abs().max()) > 1e-3


@pytest.mark.parametrize("rotation, turned", [("none", False), ("hadamard", True),
                                              ("chosen", True)])
def test_queries_and_keys_are_turned_as_rotation_says(rotation, turned):
    net, batch = tiny("llama")
    burnish.tune(net, f"lora(rank=2) + roste(rotation={rotation!r})", head=False,
                 calibration=[batch])
    found = [m for m in net.modules() if type(m).__name__ == "RoundedKeys"]
    assert [m.walsh is not None for m in found] == [turned] * 2
    assert all(m.walsh.length == net.config.head_dim for m in found if turned)


def test_heads_that_cannot_be_counted_are_refused():
    anatomy = Anatomy.of(tiny("llama")[0])
    assert [k.h for k in parse("roste")[0].branch(anatomy)] == [anatomy.model.config.head_dim] * 2
    anatomy.blocks = [replace(b, kv_heads=None) for b in anatomy.blocks]
    with pytest.raises(RecipeError, match="how many heads model.layers.0.self_attn has .* kv_bits"):
        list(parse("roste")[0].branch(anatomy))


def test_what_is_read_and_what_is_turned_without_data():
    place = Place("a", "weight", "linear", 8, 16, "q")
    W = torch.ones(8, 16)
    for rotation, reads, turns in (("chosen", True, True), ("hadamard", False, True),
                                   ("none", False, False)):
        (method,) = parse(f"roste(rotation={rotation!r})")
        assert (method.observe(place) is not None) == reads
        assert method.observe(Place("h", "weight", "linear", 8, 16, "head")) is None
        term = method.delta(Site(place, W, blank=True, places=[place]))
        assert (term.walsh is not None) == turns, "of a choice that is to come: the dearer"


def test_it_trains_what_is_rounded():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "full + roste(rotation='hadamard')", head=False)
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(CheckError, match="merge"):
        tuned.merge()


def test_one_says_how_attention_is_computed():
    parse("roste(targets='q') + roste(targets='v', kv_bits=0)")
    with pytest.raises(RecipeError, match="how attention is computed"):
        parse("roste(targets='q') + roste(targets='v')")


def test_settings_and_refusals():
    (method,) = parse("roste")
    assert (method.bits, method.input_bits, method.kv_bits, method.clip_ratio, method.rotation,
            method.samples, method.seed) == (4, 4, 4, 1.0, "chosen", 8, 0)
    for bad, said in (("bits=1", "bits=1: expected 2 to 8"), ("input_bits=9", "input_bits=9"),
                      ("kv_bits=1", "kv_bits=1"), ("clip_ratio=0.0", "clip_ratio=0.0"),
                      ("clip_ratio=1.1", "clip_ratio=1.1"),
                      ("samples=0", "samples=0")):
        with pytest.raises(RecipeError, match=said):
            parse(f"roste({bad})")
    parse("roste(bits=2, input_bits=8, kv_bits=8, clip_ratio=1.0, samples=1)")
    with pytest.raises(RecipeError, match="attention"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "full + roste(rotation='none')", targets="0",
                     head=False)
    head = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    tuned = burnish.tune(head, "lora(rank=2) + roste(kv_bits=0, rotation='none')", targets="all",
                         head=False)
    assert [n for n, _ in tuned.terms(Turned)] == ["body.weight"]
    assert method.observe(match(Anatomy.of(head), "body")[0]).nbytes == 32


def test_a_transform_is_refused():
    net = nn.Sequential(nn.Linear(8, 8))
    burnish.tune(net, "lora(rank=2) + roste(kv_bits=0, rotation='none')", targets="0", head=False)
    with pytest.raises(RecipeError, match="no form that torch.func"):
        torch.func.vmap(net)(torch.randn(3, 8))
