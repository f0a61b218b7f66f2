"""Single entries of g^T x in Triton's interpreter, and the sparse updates that ask for them:
against the sum over tokens in float64, and against torch's operators."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.choose.dropgrow import Seeking
from burnish.blocks.gpu import distances, entries, road
from burnish.blocks.gpu.entries import at_entries
from burnish.blocks.weight import panels
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.rechosen import Rechosen
from burnish.blocks.weight.sparse import SparseDelta, spread
from burnish.blocks.weight.within import Within
from burnish.core.site import Place
from burnish.testing.models import tiny
from burnish.testing.ran import Allocations

OUT, IN, N = 24, 20, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)
DTYPES = {"fp32": (torch.float32, 3e-6), "bf16": (torch.bfloat16, 2e-2),
          "fp16": (torch.float16, 3e-3)}


def sums(g, x, rows, cols):
    """sum_n g[n, o_k] x[n, i_k], and of the magnitudes."""
    terms = g.double()[:, rows] * x.double()[:, cols]
    return terms.sum(0), terms.abs().sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, k", [(0, 5), (1, 1), (7, 64), (70, 65), (33, 130), (9, 0)])
@pytest.mark.parametrize("busy", [1, 512], ids=["one part", "parts"])
def test_entries_are_sums_over_tokens(dtype, tokens, k, busy, monkeypatch):
    """Added up in fp32 whatever the precision of the tokens."""
    monkeypatch.setattr(distances, "BUSY", busy)
    D, _ = DTYPES[dtype]
    g, x = torch.randn(tokens, 31).to(D), torch.randn(tokens, 17).to(D)
    at = spread(31 * 17, k, 0)
    rows, cols = at // 17, at % 17
    got = at_entries(g, x, rows, cols)
    want, size = sums(g, x, rows, cols)
    assert got.dtype == torch.float32 and got.shape == (k,)
    assert bool(((got - want).abs() <= 2e-6 * size).all())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_tokens_of_any_layout(index):
    base = torch.randn(90, 90)
    rows, cols = torch.tensor([3, 0, 8]).to(index), torch.tensor([1, 8, 8]).to(index)
    for g, x in ((base.t()[:40, :9], base[:80:2, 5:14]),
                 (base[:1, :9].expand(40, 9), base[:40, 3:12]),
                 (base.flatten()[1:361].view(40, 9), base[:40].flip(0)[:, :9])):
        want, _ = sums(g, x, rows.long(), cols.long())
        got = at_entries(g, x, rows, cols).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sums_are_in_fp32_whatever_the_default_is_and_no_part_of_them_is_empty(monkeypatch):
    programs = []

    def launch(kernel, n, *args, **meta):
        programs.append(n)
        return road.launch(kernel, n, *args, **meta)

    monkeypatch.setattr(entries, "launch", launch)
    g, x, at = torch.randn(70, 31), torch.randn(70, 17), torch.arange(130)
    torch.set_default_dtype(torch.float64)
    try:
        got = at_entries(g, x, at // 17, at % 17)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert programs == [3 * 3], "of 130 entries in 64s, over 70 tokens in 32s"


# -- as a part of a layer -------------------------------------------------------------------
def few_columns():
    rows, cols = torch.meshgrid(torch.arange(0, OUT, 2), torch.tensor([3, 11]), indexing="ij")
    return (rows * IN + cols).flatten()


def filled(term):
    torch.manual_seed(4)
    torch.nn.init.normal_(term.values)
    if getattr(term, "held", None) is not None:
        term.held.normal_()
    return term


TERMS = {"few columns": lambda: SparseDelta(PLACE, few_columns(), False),
         "everywhere": lambda: SparseDelta(PLACE, spread(OUT * IN, 70, 0), False),
         "all": lambda: SparseDelta(PLACE, torch.arange(OUT * IN), False),
         "one": lambda: SparseDelta(PLACE, torch.tensor([OUT * IN - 1]), False),
         "some rest": lambda: Rechosen(PLACE, spread(OUT * IN, 60, 0), live=25)}


def run(term, how, D, scale=0.8, need_x=True, rows=None):
    g = torch.Generator().manual_seed(1)
    out = OUT if rows is None else 3 * OUT
    W, x = (torch.randn(s, generator=g).to(D) for s in ((out, IN), (N, IN)))
    x.requires_grad_(need_x)
    one = term if rows is None else Within(term, rows, out)
    with road.use(how):
        y = linear(x, Weighted(lambda: W, [(one, scale)]), None)
        G = torch.randn(y.shape, generator=g).to(D)
        wanted = [x, term.values] if need_x else [term.values]
        return W, x, G, [y.detach(), *torch.autograd.grad(y, wanted, G)]


@pytest.mark.parametrize("panel", [panels.PANEL, 5 * OUT], ids=["one panel", "many panels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TERMS)
def test_values_get_their_entries_of_the_gradient(kind, dtype, panel, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    D, eps = DTYPES[dtype]
    term = filled(TERMS[kind]())
    W, x, G, (y, dx, dv) = run(term, "triton", D)
    V = W.double() + 0.8 * term.dense().detach().double()
    index = term.index.long()[: len(term.values)]
    want, size = sums(G, x.detach(), index // IN, index % IN)
    assert float(((dv - 0.8 * want).abs() / size).max()) < 2e-6      # not rounded to D on the way
    for a, b in ((y, x.double() @ V.t()), (dx, G.double() @ V)):
        torch.testing.assert_close(a.double(), b.detach(), rtol=eps, atol=4 * eps)
    _, _, _, other = run(term, "torch", D)
    for a, b in zip((y, dx, dv), other, strict=True):
        torch.testing.assert_close(a, b, rtol=eps, atol=8 * eps)


def test_the_first_layer_s_input_wants_no_gradient():
    term = filled(TERMS["everywhere"]())
    _, _, _, (y, dv) = run(term, "triton", torch.float32, need_x=False)
    _, _, _, (_, _, other) = run(term, "triton", torch.float32)
    assert torch.equal(dv, other)


@pytest.mark.parametrize("kind", ["few columns", "everywhere"])
def test_rows_of_a_fused_matrix(kind):
    term = filled(TERMS[kind]())
    a, b = (run(term, how, torch.float32, rows=(OUT, 2 * OUT))[3] for how in ("torch", "triton"))
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-5, atol=1e-5)


def test_no_gradient_of_the_matrix_is_made(monkeypatch):
    """Of its size, or of a panel's, and none is made where only values want a gradient."""
    place = Place("layer", "weight", "linear", 256, 256)
    term = filled(SparseDelta(place, spread(256 * 256, 50, 0), False))
    W, x = torch.randn(256, 256), torch.randn(2, 256)
    with road.use("triton"):
        y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
        monkeypatch.setattr(term, "pull", lambda *a: pytest.fail("a panel's gradient"))
        with Allocations() as made:
            y.sum().backward()
    assert term.values.grad.shape == (50,) and made.largest < 256 * 256


def test_who_looks_at_the_whole_gradient_is_shown_it():
    """A search for entries to grow, or any class with a `pull` of its own."""
    class Watching(SparseDelta):
        seen = 0

        def pull(self, i0, i1, G, state, grads):
            self.seen += G.numel()
            return super().pull(i0, i1, G, state, grads)

    watching = filled(Watching(PLACE, spread(OUT * IN, 30, 0), False))
    seeking = filled(Seeking(PLACE, spread(OUT * IN, 30, 0)))
    found = {}
    for how in ("torch", "triton"):
        seeking.look_for(4)
        _, _, _, first = run(seeking, how, torch.float32)
        found[how] = seeking.found
        seeking.look_for(0)
        _, _, _, then = run(seeking, how, torch.float32)
        torch.testing.assert_close(first, then, rtol=1e-5, atol=1e-5)
        run(watching, how, torch.float32)
    assert watching.seen == 2 * OUT * IN
    assert torch.equal(found["torch"], found["triton"]) and found["torch"].numel() == 4


def test_other_precisions_take_torch_s_operators():
    with road.use("triton"):
        term = filled(TERMS["everywhere"]())
        assert term.road() == ""
        assert term.double().road().startswith("in float64")
        assert not term.pull_straight(torch.ones(2, OUT), torch.ones(2, IN), 1.0, [None])
        run(term, "triton", torch.float64)
    assert TERMS["everywhere"]().road().startswith("on cpu")


@pytest.mark.parametrize("recipe", ["nf4 + shira(rank=1) + checkpoint", "dst(density=0.1) + lean"])
def test_a_model_learns_the_same_on_either_road(recipe):
    told = {}
    for how in ("torch", "triton"):
        torch.manual_seed(0)
        net, batch = tiny("llama")
        tuned = burnish.tune(net, recipe, targets="q")
        tuned.optimizer(lr=1e-2)
        with road.use(how):
            told[how] = [float(tuned.step(batch)) for _ in range(3)]
    assert told["torch"] == pytest.approx(told["triton"], rel=1e-4)
    assert told["torch"][0] != told["torch"][2]
