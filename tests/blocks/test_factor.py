"""Factor chains: token side, tiles and lookups against B A written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.provided import Weighted, linear
from burnish.core.site import Place

OUT, IN, N, R = 12, 10, 5, 3


def place(kind="linear", experts=0):
    return Place("layer", "weight", kind, OUT, IN, experts=experts)


def chain(kind="linear", experts=0, **kw):
    term = Chain(place(kind, experts), R, 0.7, dtype=torch.float64, **kw)
    torch.nn.init.normal_(term.A)
    torch.nn.init.normal_(term.B)
    return term


def test_the_start_of_a_linear_and_of_an_embedding():
    term = Chain(Place("l", "weight", "linear", 400, 300), 8)
    bound = 1 / math.sqrt(300)
    A = term.A.detach()
    assert float(A.abs().max()) <= bound and float(A.std()) > 0.9 * bound / math.sqrt(3)
    assert torch.equal(term.B, torch.zeros(400, 8))
    table = Chain(Place("l", "weight", "embedding", 400, 300), 8)
    assert torch.equal(table.A, torch.zeros(8, 300))
    assert float(table.B.detach().std()) == pytest.approx(1.0, rel=0.1)
    assert term.A.dtype == torch.float32


def test_gradients_by_the_equations():
    """dB = s G^T (x A^T), dA = s (G B)^T x."""
    term = chain()
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    G = torch.randn(N, OUT, dtype=torch.float64)
    y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    dx, dA, dB = torch.autograd.grad(y, [x, term.A, term.B], G)
    with torch.no_grad():
        torch.testing.assert_close(y, x @ (W + 0.7 * term.B @ term.A).t())
        torch.testing.assert_close(dB, 0.7 * G.t() @ (x @ term.A.t()))
        torch.testing.assert_close(dA, 0.7 * (G @ term.B).t() @ x)
        torch.testing.assert_close(dx, G @ (W + 0.7 * term.B @ term.A))


@pytest.mark.parametrize("experts", [0, 4])
def test_tiles_and_their_pull(experts):
    term = chain(experts=experts)
    G = torch.randn_like(term.dense())
    want = torch.autograd.grad(term.dense(), [term.A, term.B], G)
    with torch.no_grad():
        grads = [None, None]
        tiles = [term.pull(a, b, G[..., a:b], None, grads) for a, b in ((0, 4), (4, 10))]
        torch.testing.assert_close(torch.cat(tiles, -1), term.dense())
        torch.testing.assert_close(term.tile(2, 7, None), term.dense()[..., 2:7])
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_lookup_takes_columns_of_a():
    term = chain("embedding")
    index = torch.tensor([[1, 1, 9], [0, 4, 2]])
    got = term.take(index)
    torch.testing.assert_close(got, F.embedding(index, term.dense().t()))
    g = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, [term.A, term.B], g),
                    torch.autograd.grad(F.embedding(index, term.dense().t()),
                                        [term.A, term.B], g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("train_a, kept", [(True, [(N, IN), (N, R)]), (False, [(N, R)])],
                         ids=["both", "frozen A"])
def test_what_is_kept(train_a, kept):
    """x once and R numbers a token; with A frozen only those."""
    seen = []
    term = chain(train_a=train_a)
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t,
                                                  lambda t: t):
        linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    assert seen == kept


def test_three_layers_share_one_kept_input():
    seen = set()
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    ops = [Weighted(lambda: W, [(chain(), 1.0)]) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.add((t.untyped_storage()._cdata, t.untyped_storage().nbytes())) or t,
            lambda t: t):
        outs = [linear(x, op, None) for op in ops]
    assert sum(n for _, n in seen) == x.nbytes + 3 * N * R * 8
    assert len(outs) == 3


@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN), (0, IN)])
def test_any_leading_shape(shape):
    term = chain()
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    torch.testing.assert_close(y, x @ (W + term.dense()).t())
    y.sum().backward()
    assert x.grad.shape == x.shape
