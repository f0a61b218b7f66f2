"""Products with a weight decoded tile by tile, in Triton's interpreter: against the codes' own
equation in float64, and against torch's operators."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.gpu import coded, road
from burnish.blocks.gpu.coded import Coded
from burnish.blocks.weight import panels
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.quantise import NF4, Bf16Provider, Nf4Provider, nf4_encode
from burnish.blocks.weight.term import Provider
from burnish.core.site import Place
from burnish.testing.models import tiny
from burnish.testing.ran import Allocations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: of a result, to the sum of the magnitudes that are added up in it
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def levels_8bit():
    """The signed dynamic map: 127 positive fractions in seven decades, their negatives, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float64)


def decoded(q):
    """The weight in float64 from the bytes: entry k is a level times the maximum of its block."""
    n = q.shape.numel()
    k = torch.arange(n)
    byte = q.codes.long()[k // 2]
    code = torch.where(k % 2 == 0, byte // 16, byte % 16)
    a = q.absmax.double()
    if q.offset is not None:
        block = torch.arange(len(a))
        a = levels_8bit()[q.absmax.long()] * q.absmax_max.double()[block // 256] + q.offset.double()
    return (torch.tensor(NF4, dtype=torch.float64)[code] * a[k // 64]).view(q.shape)


def close(got, want, size, dtype, of=None):
    """To the rounding of `dtype` where `size` is what was added up."""
    off = (got.double() - want).abs() / size.clamp_min(1e-30)
    assert got.dtype == (of or dtype) and float(off.max() if off.numel() else 0) < EPS[dtype]


def weight(shape, dq=True, held="fp32"):
    torch.manual_seed(sum(shape))
    return nf4_encode(torch.randn(shape).to(DTYPES[held]), dq)


SHAPES = {"blocks": (70, 128), "rows cut blocks": (33, 45), "less than a block": (5, 7),
          "one row": (1, 64), "one column": (65, 1), "many tiles": (130, 192)}


@pytest.mark.parametrize("dq", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_codes(shape, dtype, dq):
    q, D = weight(SHAPES[shape], dq), DTYPES[dtype]
    W = decoded(q).to(D).double()                      # one rounding more for half precision
    c = q.coded(torch.float32).to(D)
    out, inp = q.shape
    x, g, b = torch.randn(9, inp).to(D), torch.randn(9, out).to(D), torch.randn(out).to(D)
    X, G = x.double(), g.double()
    close(c.linear(x, b), X @ W.t() + b.double(), X.abs() @ W.t().abs() + b.abs().double(), D)
    close(c.linear(x, wide=True), X @ W.t(), X.abs() @ W.t().abs(), torch.float32)
    close(c.back(g), G @ W, G.abs() @ W.abs(), D)


@pytest.mark.parametrize("dq", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", list(SHAPES)[:-1])
def test_decoded_they_are_what_torch_decodes_bit_for_bit(shape, dq):
    for held, dtype in (("fp32", "fp32"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "bf16")):
        q, D = weight(SHAPES[shape], dq, held), DTYPES[dtype]
        want = q.decode().to(D)
        assert torch.equal(q.coded(q.dtype).to(D).decode(), want)
    assert torch.equal(q.coded(q.dtype).to(D).t().decode(), want.t())
    straight = q.decode(dtype=D)
    with road.use("triton"):
        assert torch.equal(q.decode(dtype=D), straight)
        assert torch.equal(q.decode(torch.empty(q.shape, dtype=D)), straight)


def test_a_weight_of_three_axes_is_decoded_too():
    q = nf4_encode(torch.randn(3, 5, 21))
    want = q.decode()
    with road.use("triton"):
        assert torch.equal(q.decode(), want) and q.decode().shape == (3, 5, 21)


@pytest.mark.parametrize("shape, start", [((40, 130), 64), ((40, 128), 64), ((40, 128), 3)])
def test_runs_of_columns_and_of_rows(shape, start):
    q = weight(shape)
    W, c = q.decode(), q.coded(torch.float32)
    x, g = torch.randn(3, shape[1]), torch.randn(3, shape[0])
    for view in (lambda t: t[..., start:start + 30], lambda t: t[..., 5:37, :],
                 lambda t: t.t()[..., start:start + 30, :], lambda t: t[..., 5:, 64:][..., 2:9]):
        V, part = view(W), view(c)
        assert torch.equal(part.decode(), V) and part.shape == V.shape
        torch.testing.assert_close(part.linear(x[:, :V.shape[1]]), x[:, :V.shape[1]] @ V.t())
        torch.testing.assert_close(part.back(g[:, :V.shape[0]]), g[:, :V.shape[0]] @ V)


@pytest.mark.parametrize("how", ["transposed", "every second", "one row for all", "one token",
                                 "none", "shifted"])
def test_tokens_of_any_layout(how):
    q = weight((33, 70))
    W, c = q.decode(), q.coded(torch.float32)
    base = torch.randn(80, 80)
    tokens = {"transposed": lambda n: base.t()[:9, :n], "every second": lambda n: base[:18:2, :n],
            "one row for all": lambda n: base[:1, :n].expand(9, n),
            "one token": lambda n: base[:1, :n], "none": lambda n: base[:0, :n],
            "shifted": lambda n: base.flatten()[3:][:9 * n].view(9, n)}[how]
    x, g = tokens(70), tokens(33)
    torch.testing.assert_close(c.linear(x), x @ W.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c.back(g), g @ W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_weight_held_in_another_precision(layout):
    W = torch.randn(33, 70) if layout == "rows" else torch.randn(70, 33).t()
    held = W.bfloat16()
    c, x, g = Coded(held, (33, 70), torch.float32), torch.randn(9, 70), torch.randn(9, 33)
    assert torch.equal(c.decode(), held.float())
    W, X, G = held.double(), x.double(), g.double()
    close(c.linear(x), X @ W.t(), X.abs() @ W.t().abs(), torch.float32)
    close(c.back(g), G @ W, G.abs() @ W.abs(), torch.float32)


def test_half_precision_is_rounded_half_to_even():
    """The interpreter cuts; the kernels round by themselves there."""
    ties = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2 - 2**-9, float("inf"),
                          float("nan"), 2**-130, 3.39e38]])
    c = Coded(ties, (1, 8), torch.float32).to(torch.bfloat16)
    torch.testing.assert_close(c.decode(), ties.bfloat16(), rtol=0, atol=0, equal_nan=True)


# -- as the base of a layer ------------------------------------------------------------------------
OUT, IN, N = 36, 70, 7
PLACE = Place("layer", "weight", "linear", OUT, IN)


def chain():
    torch.manual_seed(3)
    term = Chain(PLACE, 4, 0.7)
    nn.init.normal_(term.B)
    return term


PROVIDERS = {"nf4": lambda W: Nf4Provider(W), "nf4 single": lambda W: Nf4Provider(W, False),
             "bf16": Bf16Provider}


def layer(provider, terms, wrapped, x, bias, how):
    op = Weighted(provider.weight, [(t, 0.9) for t in terms], wrapped, provider.buffers,
                  coded=provider.coded)
    x = x.clone().requires_grad_()
    with road.use(how):
        y = linear(x, op, bias)
        wanted = [x, *(p for t in op.all for p in t.parameters())]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("wrapped", [False, True], ids=["sum", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", PROVIDERS)
def test_a_layer_on_either_road_is_one_layer(held, dtype, wrapped):
    """Outputs and every gradient against float64, and both roads against each other."""
    torch.manual_seed(0)
    provider, D = PROVIDERS[held](torch.randn(OUT, IN)), DTYPES[dtype]
    W = provider.weight()
    wrap = Magnitude(W) if wrapped else None
    if wrapped:
        nn.init.uniform_(wrap.m, 2, 9)
    x, bias, term = torch.randn(2, N, IN).to(D), torch.randn(OUT).to(D), chain()
    one, two = (layer(provider, [term], wrap, x, bias, how) for how in ("torch", "triton"))
    wide, wide_wrap = copy.deepcopy(term).double(), copy.deepcopy(wrap)
    wide_wrap = None if wrap is None else wide_wrap.double()
    X = x.double().requires_grad_()
    V = W.to(D).double() + 0.9 * wide.dense()
    if wrap is not None:
        c = V.detach().norm(dim=1)
        V = (wide_wrap.m / c)[:, None] * V
    Y = X @ V.t() + bias.double()
    g = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1)).to(D).double()
    own = [wide.A, wide.B, *([wide_wrap.m] if wrapped else [])]
    want = [Y.detach(), *torch.autograd.grad(Y, [X, *own], g)]
    for a, b, w in zip(one, two, want, strict=True):
        size = float(w.abs().max())
        assert float((b.double() - w).abs().max()) < 8 * EPS[D] * size + 4e-6 * size
        assert float((a.double() - b.double()).abs().max()) < 8 * EPS[D] * size + 4e-6 * size


def test_the_wide_update_stands_on_decoded_panels(monkeypatch):
    """In fp32 base and generated update share one product; panels are decoded one by one."""
    from burnish.blocks.weight.tiled import KernelDelta

    monkeypatch.setattr(panels, "PANEL", 20 * OUT)
    torch.manual_seed(0)
    term, provider = KernelDelta(PLACE, 8, 0.5, mixed=False), Nf4Provider(torch.randn(OUT, IN))
    nn.init.normal_(term.A), nn.init.normal_(term.B)
    for D in DTYPES.values():
        x = torch.randn(N, IN).to(D)
        a, b = (layer(provider, [term], None, x, None, how) for how in ("torch", "triton"))
        for s, t in zip(a, b, strict=True):
            size = float(s.abs().max())
            torch.testing.assert_close(s, t, rtol=16 * EPS[D], atol=16 * EPS[D] * size)


def test_no_weight_is_decoded_on_the_way(monkeypatch):
    """Not by asking for it, and no tensor of its size is made."""
    out = inp = 256
    provider = Nf4Provider(torch.randn(out, inp))
    monkeypatch.setattr(provider, "weight", lambda: pytest.fail("decoded"))
    op = Weighted(provider.weight, [], None, provider.buffers, coded=provider.coded)
    x = torch.randn(3, inp, requires_grad=True)
    with road.use("triton"), Allocations() as made:
        linear(x, op, None).sum().backward()
        with torch.no_grad():
            linear(x, op, None)
    assert made.largest <= 4 * 3 * max(out, inp)


def test_who_provides_nothing_in_another_form_is_asked_for_the_weight():
    assert Provider().coded(torch.ones(1)) is None
    bf16 = Bf16Provider(torch.randn(4, 4))
    with road.use("triton"):
        assert bf16.coded(torch.ones(1, dtype=torch.bfloat16)) is None     # a weight like any other
        assert Bf16Provider(torch.randn(2, 2, 2)).coded(torch.ones(1)) is None
        assert Nf4Provider(torch.randn(2, 2, 2)).coded(torch.ones(1)) is None
        assert Nf4Provider(torch.randn(2, 2)).coded(torch.ones(1).double()) is None
        assert bf16.coded(torch.ones(1)) is not None
    assert bf16.coded(torch.ones(1)) is None
    assert Nf4Provider(torch.randn(2, 2)).coded(torch.ones(1)) is None


# -- in a model ------------------------------------------------------------------------------------
def steps(model, recipe, how, **kw):
    torch.manual_seed(0)
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe, **kw)
    tuned.optimizer(lr=1e-2)
    torch.manual_seed(1)
    with road.use(how):
        losses = [float(tuned.step(batch)) for _ in range(2)]
        with torch.no_grad():
            net.eval()
            losses.append(float(net(**batch).logits.double().square().mean()))
    return losses, [p.detach().clone() for p in tuned.parameters()]


MODELS = {"llama": ("llama", "nf4 + lora(rank=2, dropout=0.2) + checkpoint"),
          "gpt2, transposed and fused": ("gpt2", "nf4 + lora(rank=2, targets='q, v') + lora(rank=2)"
                                         " + lean(level=3)"),
          "subtracted starts": ("llama", "nf4 + pissa(rank=2)"),
          "under a function of W": ("llama", "bf16 + dora(rank=2) + lean(level=2)"),
          "all of W": ("llama", "nf4 + oft(block=4)")}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_learns_the_same_on_either_road(case):
    (model, recipe) = MODELS[case]
    (a, p), (b, q) = (steps(model, recipe, how) for how in ("torch", "triton"))
    assert a == pytest.approx(b, rel=2e-4) and a[0] != a[1]
    for s, t in zip(p, q, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-2, atol=2e-3)


def test_products_of_a_model_are_taken_by_the_kernels(monkeypatch):
    """Forward and back, of transposed ones and of rows too, and of layers that nothing is added
    to."""
    taken = []
    for name in ("linear", "back"):
        real = getattr(coded.Coded, name)
        monkeypatch.setattr(coded.Coded, name, lambda self, *a, _r=real, _n=name, **k: (
            taken.append((_n, tuple(self.shape))), _r(self, *a, **k))[1])
    for model in ("llama", "gpt2"):
        taken.clear()
        steps(model, "nf4 + lora(rank=2, targets='q')", "triton")
        assert {n for n, _ in taken} == {"linear", "back"}
        assert len({s for _, s in taken}) > 1
    taken.clear()
    steps("llama", "nf4 + lora(rank=2)", "torch")
    assert not taken


def test_a_model_says_which_road_runs():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "nf4 + lora(rank=2)")
    n = sum(isinstance(m, Nf4Provider) for m in net.modules())
    assert tuned.summary()["kernels"] == {
        "Nf4Provider": {"torch: on cpu, and Triton's kernels are for cuda": n}}
    assert "kernels" not in repr(tuned)
    with road.use("triton"):
        assert tuned.summary()["kernels"] == {"Nf4Provider": {"triton": n}}
        assert f"kernels: {n} Nf4Provider by triton" in repr(tuned)
        net.double()
        assert f"kernels: {n} Nf4Provider by torch: in float64" in repr(tuned)
        assert Bf16Provider(torch.ones(1)).road() == ""
        assert Bf16Provider(torch.ones(1)).bfloat16().road() is None
