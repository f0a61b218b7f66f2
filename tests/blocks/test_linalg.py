"""The one decomposition that many methods lean on, against torch's exact one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.linalg import over_tokens, polar, svd, walsh
from burnish.blocks.tape.activations import Strips


def matrix(m, n, fall, seed=0):
    """(m, n) in float64 with singular values fall^0, fall^1, ..."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return (U * fall ** torch.arange(k, dtype=torch.float64)) @ V.t()


@pytest.mark.parametrize("m, n", [(30, 40), (40, 30), (40, 40), (7, 60), (120, 90), (90, 120)])
@pytest.mark.parametrize("fall", [0.7, 0.9])
def test_it_is_the_best_approximation_of_its_rank(m, n, fall):
    """|M - U S V|_2 is the next singular value, U and V are orthonormal, S falls."""
    M, k = matrix(m, n, fall), 2
    U, S, V = svd(M, k)
    assert (U.shape, S.shape, V.shape) == ((m, k), (k,), (k, n))
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U.t() @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ V.t(), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, fall ** torch.arange(k, dtype=torch.float64), rtol=1e-5, atol=0)
    off = torch.linalg.matrix_norm(M - U * S @ V, 2)
    assert float(off) == pytest.approx(fall**k, rel=1e-2)


@pytest.mark.parametrize("m, n", [(40, 60), (60, 40)])
def test_a_matrix_that_is_small_beside_the_rank_is_decomposed_exactly(m, n):
    """Four times (rank + 8) is small: there no sketch is near enough, and none is taken."""
    M = matrix(m, n, 0.999)
    U, S, V = svd(M, 2)
    torch.testing.assert_close(S, torch.linalg.svdvals(M)[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(U * S @ V, U @ (U.t() @ M), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(M @ V.t(), U * S, rtol=1e-10, atol=1e-12)


def test_a_large_one_is_read_through_a_sketch_and_more_passes_come_nearer():
    M, k = matrix(300, 200, 0.97), 4
    want = 0.97 ** torch.arange(k, dtype=torch.float64)
    off = [float((svd(M, k, passes=p)[1] - want).abs().max()) for p in (0, 1, 4, 12)]
    assert off == sorted(off, reverse=True) and off[0] > 0.05 > 5e-3 > off[2] > off[3]
    assert torch.equal(svd(M, k)[1], svd(M, k, passes=4)[1])


def test_more_than_there_are_gives_what_there_is():
    M = matrix(6, 9, 0.5)
    U, S, V = svd(M, 50)
    assert (U.shape, S.shape, V.shape) == ((6, 6), (6,), (6, 9))
    torch.testing.assert_close(U * S @ V, M, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_drawn_and_the_same_matrix_has_the_same_answer(dtype):
    M = matrix(200, 150, 0.95).to(dtype)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = svd(M, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for a, b in zip(first, svd(M, 3), strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


@pytest.mark.parametrize("n, out, r", [(7, 5, 2), (7, 2, 5), (7, 5, 5), (1, 3, 1), (0, 3, 2)])
def test_a_sum_over_tokens_is_g_transposed_h_whichever_is_narrower(n, out, r):
    g, h = torch.randn(n, out, dtype=torch.float64), torch.randn(n, r, dtype=torch.float64)
    want = torch.einsum("no,nr->or", g, h)
    torch.testing.assert_close(over_tokens(g, h), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out, r", [(5, 2), (2, 5)])
def test_the_narrower_matrix_comes_first(out, r):
    """With 8 columns or fewer the other order costs a CPU many times as much."""
    order = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                order.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        over_tokens(torch.randn(7, out), torch.randn(7, r))
    assert order == [2]


@pytest.mark.parametrize("tokens", [7, 3, 1])
def test_strips_are_summed_one_after_the_other(tokens):
    """Of g as an activation gives it, made again some tokens at a time."""
    x, h = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    got = over_tokens(Strips(x, F.relu, {}, tokens), h)
    torch.testing.assert_close(got, x.relu().t() @ h, rtol=1e-12, atol=1e-12)


class Decomposed(torch.utils._python_dispatch.TorchDispatchMode):
    """Shapes of the matrices that a singular value decomposition is asked of."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._linalg_svd.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 3])
def test_a_sketch_is_taken_past_four_times_the_rank_and_its_eight_directions(k):
    small = 4 * (k + 8)
    for m, want in ((small, (small, 90)), (small + 1, (k + 8, 90))):
        with Decomposed() as seen:
            svd(matrix(m, 90, 0.9), k)
        assert seen.shapes == [want]


@pytest.mark.parametrize("m, n", [(20, 300), (300, 20), (60, 300), (300, 60)])
def test_what_it_gives_holds_no_square_of_the_longer_side(m, n):
    """Views are given: behind them lie the numbers of one thin form, not of a full one."""
    for t in svd(matrix(m, n, 0.9), 2):
        assert t.untyped_storage().nbytes() <= 8 * m * n


def test_the_sketch_is_the_same_under_another_default_precision():
    M = matrix(200, 150, 0.95)
    first = svd(M, 3)
    torch.set_default_dtype(torch.float64)
    try:
        again = svd(M, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("m, n", [(30, 40), (40, 30), (30, 30)])
def test_the_polar_factor_is_that_of_the_decomposition(m, n):
    M = matrix(m, n, 0.8)                            # to a thousandth of the largest
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(polar(M), U @ V, rtol=0, atol=1e-12)
    torch.testing.assert_close(polar(M * 1e-6), U @ V, rtol=0, atol=1e-12)


def test_directions_that_are_not_there_stay_out_of_the_polar_factor():
    a, b = torch.ones(6, 1, dtype=torch.float64), torch.arange(1.0, 5.0, dtype=torch.float64)
    one = a * b
    torch.testing.assert_close(polar(one), one / torch.linalg.vector_norm(one))
    assert not polar(torch.zeros(3, 4)).any()
    few = polar(torch.diag(torch.tensor([1.0, 1e-3])), passes=1)
    torch.testing.assert_close(few, torch.diag(torch.tensor([1.0, 1.5e-3])), rtol=1e-3, atol=0)


def test_how_many_passes_the_polar_factor_takes():
    """So many that what is above 1.5^-30 of the norm, 5e-6, ends at one."""
    small = torch.tensor([1.0, 1e-4, 3e-7], dtype=torch.float64)
    X = small / small.norm()
    for _ in range(30):
        X = 1.5 * X - 0.5 * X**3
    torch.testing.assert_close(polar(torch.diag(small)), torch.diag(X), rtol=1e-12, atol=0)
    assert X[1] > 1 - 1e-6 and 0.05 < X[2] < 0.1


def hadamard(n):
    """H by its recursion."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_fast_transform_is_the_matrix(n):
    x = torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, n, dtype=torch.float64)
    got, want = walsh(x), x @ hadamard(n)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))
    _, along = torch.func.jvp(walsh, (x.detach(),), (g,))
    torch.testing.assert_close(along, g @ hadamard(n))
    rows = torch.func.vmap(walsh)(x.detach())
    torch.testing.assert_close(rows, want.detach())


def test_the_transform_of_one_number_is_a_tensor_of_its_own():
    x = torch.randn(3, 1)
    assert walsh(x).data_ptr() != x.data_ptr() and torch.equal(walsh(x), x)


@pytest.mark.parametrize("n, copies", [(1, 1), (8, 0)])
def test_the_transform_copies_nothing_that_it_has_made(n, copies):
    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.clone.default
            return func(*args, **(kwargs or {}))

    with Copies() as found:
        walsh(torch.randn(3, n))
    assert found.seen == copies


def test_walsh_is_twice_differentiable():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: walsh(t).pow(3), (x,))
