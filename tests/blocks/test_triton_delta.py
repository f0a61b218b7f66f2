"""The kernel delta in Triton's interpreter: against the formula in float64, with
``torch.quantile`` for the threshold, and against torch's operators."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.gpu import distances, road
from burnish.blocks.weight import dropped, panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.quantise import Nf4Provider
from burnish.blocks.weight.tiled import KernelDelta
from burnish.blocks.weight.within import Within
from burnish.core.site import Place
from burnish.testing.models import tiny

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place(out, inp):
    return Place("layer", "weight", "linear", out, inp)


@torch.no_grad()
def kernel(out=70, inp=21, rank=8, s=0.6, mixed=True, seed=0, **kw):
    """Away from the start: entries of a size at which every part of the gradient counts."""
    torch.manual_seed(seed)
    term = KernelDelta(place(out, inp), rank, s, mixed, **kw)
    term.A.normal_(), term.B.normal_()
    if mixed:
        term.alpha.fill_(0.7), term.gamma.fill_(0.05), term.beta.fill_(0.02)
    return term


def formula(A, B, s, mix=(), linear_form=False):
    """Delta (out, in) from the paper's equations; autograd does the rest."""
    square = (B[:, :, None, :] - A[:, None, :, :]).square().sum(-1)
    d = torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
    K = 0.1 * (d[0] - d[1])
    if mix:
        alpha, gamma, beta = mix
        K = K + alpha * torch.softmax(K / gamma, dim=0) + beta
    tau = torch.quantile(K.detach().abs().flatten(), s) if s > 0 else -1.0
    gate = (K.abs() > tau).to(K.dtype) * (1 if linear_form else K.abs())
    return K * gate.detach()


def reference(term):
    """(its tensors in float64, Delta of them)."""
    P = [p.detach().double().requires_grad_() for p in term.parameters()]
    return P, formula(P[0], P[1], term.sparsity, P[2:], term.magnitude == "linear")


def made(term, G, cuts):
    """(Delta, gradients) by panels that end at `cuts`; pull gives the panels once more."""
    state, grads = term.prepare(), [None] * len(list(term.parameters()))
    runs = list(zip([0, *cuts], [*cuts, term.inp], strict=True))
    tiles = torch.cat([term.tile(a, b, state) for a, b in runs], 1)
    again = torch.cat([term.pull(a, b, G[:, a:b], state, grads) for a, b in runs], 1)
    assert torch.equal(tiles.nan_to_num(7), again.nan_to_num(7))
    return tiles, grads


CASES = {
    "snell": {"mixed": False}, "snella": {"mixed": True},
    "dense": {"mixed": False, "s": 0.0}, "nearly all zero": {"s": 0.99, "rank": 12},
    "linear": {"mixed": False, "magnitude": "linear"},
    "linear dense": {"s": 0.0, "magnitude": "linear", "rank": 6},
    "one entry": {"out": 1, "inp": 1, "s": 0.0}, "one row": {"out": 130, "inp": 1},
    "one output": {"out": 1, "inp": 40}, "less than a block": {"out": 5, "inp": 7, "rank": 32},
    "wide": {"out": 33, "inp": 40, "rank": 32, "mixed": False},
}


@pytest.mark.parametrize("case", CASES)
def test_panels_and_gradients_equal_the_formula(case):
    term = kernel(**CASES[case])
    P, want = reference(term)
    G = torch.randn(term.out, term.inp)
    cuts = [5, 9] if term.inp > 9 else []
    with road.use("triton"):
        assert term.road() == ""
        got, grads = made(term, G, cuts)
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-5, atol=2e-6)
    assert torch.equal(got == 0, want == 0)
    for g, w in zip(grads, torch.autograd.grad(want, P, G.double()), strict=True):
        assert g.dtype == torch.float32
        size = float(w.abs().max())
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * size + 1e-9)


@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
@pytest.mark.parametrize("busy", [1, 4, 1000])
def test_however_sums_are_cut_into_parts(busy, mixed, monkeypatch):
    monkeypatch.setattr(distances, "BUSY", busy)
    term = kernel(140, 36, mixed=mixed, rank=2)
    P, want = reference(term)
    G = torch.randn(140, 36)
    with road.use("triton"):
        got, grads = made(term, G, [])
        assert all(map(torch.equal, grads, made(term, G, [])[1]))      # to the bit, again
    for g, w in zip(grads, torch.autograd.grad(want, P, G.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * float(w.abs().max()))


def test_parts_cover_every_step_once():
    for programs in (0, 1, 7, 300, 600):
        for steps in (0, 1, 2, 5, 64, 1000):
            parts, per = distances.parts_of(programs, steps, 16)
            assert per % 16 == 0 and (parts - 1) * per < max(1, steps * 16) <= parts * per
            assert parts <= max(1, distances.BUSY // max(1, programs))


@pytest.mark.parametrize("layout", ["rows", "columns", "cut out", "bf16", "fp16"])
def test_a_gradient_of_any_layout_and_precision(layout):
    term = kernel(40, 21, rank=4)
    G = torch.randn(60, 30)
    G = {"rows": lambda: G[:40, :21].contiguous(), "columns": lambda: G.t()[:30, :21],
         "cut out": lambda: G[7:47, 3:24], "bf16": lambda: G[:40, :21].bfloat16(),
         "fp16": lambda: G[:40, :21].half()}[layout]()
    if layout == "columns":
        term = kernel(30, 21, rank=4)
    P, want = reference(term)
    with road.use("triton"):
        _, grads = made(term, G, [16])
    for g, w in zip(grads, torch.autograd.grad(want, P, G.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * float(w.abs().max()))


@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
@pytest.mark.parametrize("s", [0.1, 0.5, 0.99, 0.9999])
def test_the_threshold_is_the_exact_quantile_of_what_the_panels_hold(s, mixed):
    """s of the entries, within one, and those that are counted are those that are made."""
    term = kernel(66, 19, s=s, mixed=mixed, rank=4)
    with road.use("triton"):
        state = term.prepare()
        panel = term.tile(0, 19, state)
        dense = kernel(66, 19, s=0.0, mixed=mixed, rank=4, magnitude="linear")
        K = dense.tile(0, 19, dense.prepare()).abs().flatten()
        assert term.nnz() == int((panel != 0).sum())
        assert dense.nnz() == 66 * 19
    want = torch.quantile(K.double(), s)
    torch.testing.assert_close(state.tau.double(), want, rtol=3e-7, atol=0)
    assert int((panel != 0).sum()) == int((K > state.tau).sum())
    assert abs(int((panel == 0).sum()) - s * 66 * 19) <= 1


def test_entries_that_are_equal_fall_together():
    """Strictly above the threshold stays: with all rows alike whole columns of ties go at once."""
    term = kernel(40, 20, s=0.5, mixed=False, rank=4)
    with torch.no_grad():
        term.B[:] = term.B[:, :1]
    with road.use("triton"):
        panel, tau = term.tile(0, 20, term.prepare()), term.prepare().tau
    _, want = reference(term)
    K = (panel[0].abs()).sqrt()
    assert torch.equal(panel == 0, want == 0) and int((panel[0] == 0).sum()) == 10
    assert float(tau) <= float(K[K > 0].min())
    with torch.no_grad():
        term.A[:] = term.A[:, :1]                 # all entries of the matrix are one number
    with road.use("triton"):
        assert int((term.tile(0, 20, term.prepare()) != 0).sum()) == term.nnz() == 0


def test_a_zero_distance_has_no_gradient():
    term = kernel(6, 5, mixed=False, s=0.0)
    with torch.no_grad():
        term.B[:, 2] = term.A[:, 3]
    G = torch.zeros(6, 5)
    G[2, 3] = 1.0
    with road.use("triton"):
        panel, grads = made(term, G, [])
        assert panel[2, 3] == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)
        with torch.no_grad():
            term.B[0] = term.A[0, :1]             # a head at distance zero everywhere from one row
        _, grads = made(term, torch.ones(6, 5), [])
    assert all(g.isfinite().all() for g in grads)


def test_distances_are_direct_differences():
    """Close, long factors: the Gram form would lose all digits of their distance in fp32."""
    term = kernel(70, 70, s=0.0, mixed=False, magnitude="linear")
    with torch.no_grad():
        for p in (term.A, term.B):
            p.mul_(1e-5).add_(1.0)
    with road.use("triton"):
        got = term.tile(0, 70, term.prepare()).double()
    want = formula(term.A.double(), term.B.double(), 0.0, linear_form=True).detach()
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_is_seen_where_torch_shows_it(bad, mixed):
    """Never a plain zero in the place of a number that went wrong."""
    shown = {}
    for how in ("torch", "triton"):
        term = kernel(20, 9, mixed=mixed)
        with torch.no_grad():
            term.A[0, 4, 1] = bad
        with road.use(how):
            shown[how], grads = made(term, torch.ones(20, 9), [])
            assert not all(g.isfinite().all() for g in grads)
    finite = torch.isfinite(shown["torch"])
    assert torch.equal(torch.isfinite(shown["triton"]), finite) and not finite.all()
    torch.testing.assert_close(shown["triton"][finite], shown["torch"][finite])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_factors_in_half_precision_are_compared_in_fp32(dtype):
    term = kernel(40, 21, rank=4).to(DTYPES[dtype])
    _, want = reference(term)
    G = torch.randn(40, 21)
    with road.use("triton"):
        panel, grads = made(term, G, [8])
    assert panel.dtype == DTYPES[dtype] and {g.dtype for g in grads} == {DTYPES[dtype]}
    torch.testing.assert_close(panel.double(), want.detach(), rtol=2e-2, atol=1e-5)


def test_what_the_kernels_do_not_compute_torch_does_and_says_so():
    with road.use("triton"):
        assert kernel(norm_p=3.0, mixed=False).road() == "norm_p=3, and Triton's kernels are for 2"
        assert kernel().double().road().startswith("in float64")
        for term in (kernel(norm_p=1.0, mixed=False), kernel().double()):
            state = term.prepare()
            assert state.stats is None and term.tile(0, 21, state).isfinite().all()


@pytest.mark.parametrize("then", ["torch", "triton"])
def test_backward_may_take_the_other_road(then):
    first = "torch" if then == "triton" else "triton"
    term, G = kernel(), torch.randn(70, 21)
    P, want = reference(term)
    grads = [None] * 5
    with road.use(first):
        state = term.prepare()
    with road.use(then):
        tile = term.tile(0, 21, state)
        term.pull(0, 21, G, state, grads)
    torch.testing.assert_close(tile.double(), want.detach(), rtol=1e-4, atol=1e-5)
    for g, w in zip(grads, torch.autograd.grad(want, P, G.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4 * float(w.abs().max()))


# -- as a part of a layer -----------------------------------------------------------------
N, OUT, IN = 6, 24, 20


def layer(term, provider, D, how, scale=0.9, w=None):
    torch.manual_seed(2)                          # of dropout
    term.zero_grad()
    x = torch.randn(2, N, IN, generator=torch.Generator().manual_seed(1)).to(D).requires_grad_()
    out = OUT if w is None else w.out
    op = Weighted(provider.weight, [(term if w is None else w, scale)], None, provider.buffers,
                  coded=provider.coded)
    assert op.theta()
    with road.use(how):
        y = linear(x, op, None)
        g = torch.randn(2, N, out, generator=torch.Generator().manual_seed(3)).to(D)
        return [y.detach(), *torch.autograd.grad(y, [x, *term.parameters()], g)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["plain", "dropping"])
def test_a_layer_on_either_road_is_one_layer(drop, dtype, monkeypatch):
    """Several panels, tokens of each precision, the same draws; the plain one against float64."""
    monkeypatch.setattr(panels, "PANEL", 9 * OUT)
    monkeypatch.setattr(dropped, "PANEL", 9 * OUT)
    D, provider = DTYPES[dtype], Nf4Provider(torch.randn(OUT, IN))
    term = kernel(OUT, IN, dropout=drop, drop_path=drop)
    one, two = (layer(term, provider, D, how) for how in ("torch", "triton"))
    eps = {"fp32": 3e-5, "bf16": 3e-2, "fp16": 4e-3}[dtype]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=eps, atol=eps * float(a.abs().max()))
    if not drop:
        P, delta = reference(term)
        x = torch.randn(2, N, IN, generator=torch.Generator().manual_seed(1)).to(D).double()
        x.requires_grad_()
        y = x @ (provider.weight().double() + 0.9 * delta).t()
        g = torch.randn(2, N, OUT, generator=torch.Generator().manual_seed(3)).to(D).double()
        for b, w in zip(two, [y.detach(), *torch.autograd.grad(y, [x, *P], g)], strict=True):
            torch.testing.assert_close(b.double(), w, rtol=eps, atol=eps * float(w.abs().max()))


def test_rows_of_a_fused_matrix():
    term, provider = kernel(OUT, IN), Nf4Provider(torch.randn(3 * OUT, IN))
    whole = Within(term, (OUT, 2 * OUT), 3 * OUT)
    one, two = (layer(term, provider, torch.float32, how, w=whole) for how in ("torch", "triton"))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5 * float(a.abs().max()))


def test_what_waits_for_backward():
    """The input, a number for the matrix and two for each input feature of a mixed kernel."""
    for mixed in (False, True):
        term = kernel(OUT, IN, mixed=mixed)
        with road.use("triton"):
            y = linear(torch.randn(2, IN, requires_grad=True),
                       Weighted(lambda: torch.randn(OUT, IN), [(term, 1.0)]), None)
            (state,) = y.grad_fn.states
        assert state.tau.shape == () and state.panel is None
        assert (state.stats.shape == (2, IN)) if mixed else state.stats is None


def steps(recipe, how):
    torch.manual_seed(0)
    net, batch = tiny("llama")
    tuned = burnish.tune(net, recipe, targets="q")
    tuned.optimizer(lr=1e-2)
    torch.manual_seed(1)
    with road.use(how):
        losses = [float(tuned.step(batch)) for _ in range(2)]
        net.eval()
        with torch.no_grad():
            losses.append(float(net(**batch).logits.double().square().mean()))
        tuned.merge()
        with torch.no_grad():
            losses.append(float(net(**batch).logits.double().square().mean()))
        return losses


@pytest.mark.parametrize("recipe", [
    "nf4 + snella(rank=4, s=0.3) + checkpoint",
    "snell(rank=4, s=0.9, dropout=0.1, drop_path=0.2) + lean(level=3)"])
def test_a_model_learns_the_same_on_either_road(recipe):
    a, b = (steps(recipe, how) for how in ("torch", "triton"))
    assert a == pytest.approx(b, rel=1e-3) and a[0] != a[1]


def test_a_convolution_s_weight_is_added_to():
    term = kernel(8, 27, rank=4)
    W, G = torch.randn(8, 27), torch.randn(8, 27)
    P, delta = reference(term)
    with road.use("triton"):
        V = Weighted(lambda: W, [(term, 1.0)]).effective(W)
        got = torch.autograd.grad(V, list(term.parameters()), G)
    torch.testing.assert_close(V.double(), W.double() + delta.detach(), rtol=1e-5, atol=1e-5)
    for g, w in zip(got, torch.autograd.grad(delta, P, G.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * float(w.abs().max()))
