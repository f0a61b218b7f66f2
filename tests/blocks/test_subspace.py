"""Subspaces: shapes, the best rank-r image, panels, refresh guards, rotation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.subspace import (
    Basis,
    SubspaceMap,
    in_memory_order,
    matrix,
    panels,
    rotate,
)
from burnish.core.errors import RecipeError

NOISE = CounterNoise(0, "w/subspace")
F64 = torch.float64


def gradient(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def back(basis, N, m):
    return torch.cat([basis.up(N, lo, hi) for lo, hi in panels(m, basis.width, 3 * basis.width)])


@pytest.mark.parametrize("m, n", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_down_and_up_are_the_truncated_svd(m, n, side):
    G, r = gradient(m, n), 5
    how = SubspaceMap(rank=r, side=side)
    basis = how.basis(G, NOISE, 0, F64)
    R = basis.down(G)
    assert R.shape == how.shape(m, n)
    U, S, Vh = torch.linalg.svd(G)
    best = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]           # every side gives the same image
    torch.testing.assert_close(back(basis, R, m), best, rtol=1e-9, atol=1e-9)
    a, c = min(m, n), max(m, n)
    held = sum(t.numel() for t in basis.tensors().values())
    assert held == {"std": a * r, "reverse_std": c * r, "left": m * r, "right": n * r,
                    "full": r * (m + n)}[side]
    if side == "std":
        assert R.numel() == c * r


class Made(TorchDispatchMode):
    """Entries of the tensors that are made (views of what was there left out), and by which."""

    def __init__(self, *there):
        super().__init__()
        self.there = {t.untyped_storage()._cdata for t in there}
        self.sizes, self.calls = [0], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.there:
                self.sizes.append(t.numel())
        return out


def positive(vectors, along):
    """Each with its largest entry positive."""
    return vectors * vectors.gather(along, vectors.abs().argmax(along, keepdim=True)).sign()


@pytest.mark.parametrize("kind", ["svd", "randomized"])
@pytest.mark.parametrize("m, n", [(20, 30), (30, 20)])
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("r", [11, 12])
def test_a_wide_gap_is_decomposed_or_sketched(kind, m, n, side, r):
    """Exactly; or by r + 8 random columns, two power iterations and the decomposition of what they
    span, unless that is no smaller than the matrix."""
    G, turn = gradient(m, n), 3
    basis = SubspaceMap(rank=r, kind=kind, side=side).basis(G, NOISE, turn, F64)
    if kind == "svd" or r + 8 >= 20:
        U, _, Vh = torch.linalg.svd(G)
    else:
        Y = torch.linalg.qr(G @ NOISE.normal(n * (r + 8), turn=turn).view(n, r + 8).double())[0]
        for _ in range(2):
            Y = torch.linalg.qr(G @ torch.linalg.qr(G.t() @ Y)[0])[0]
        U, _, Vh = torch.linalg.svd(Y.t() @ G)
        U = Y @ U
    wanted = {"left": positive(U[:, :r], 0), "right": positive(Vh[:r], 1)}
    named = basis.tensors()
    assert set(named) == ({"left", "right"} if side == "full" else {side})
    for name, factor in named.items():
        torch.testing.assert_close(factor, wanted[name], rtol=0, atol=1e-8)
        assert factor.is_contiguous()


@pytest.mark.parametrize("kind, side, m, n, most", [
    ("svd", "left", 20, 60, 20 * 20), ("svd", "right", 60, 20, 20 * 20),
    ("svd", "full", 20, 60, 20 * 60), ("randomized", "left", 20, 60, 42 * 16),
    ("randomized", "full", 20, 60, 42 * 16)])
def test_a_refresh_makes_no_more_than_its_factors_need(kind, side, m, n, most):
    """On the short side nothing of the gradient's size; never a square of the long one. (A sketch
    is 60 x 11, drawn in runs of 16.)"""
    G = gradient(m, n)
    with Made(G) as made:
        SubspaceMap(rank=3, kind=kind, side=side).basis(G, NOISE, 0, F64)
    assert max(made.sizes) <= most


def test_without_values_the_decomposition_is_still_made():
    with FakeTensorMode():
        G = torch.empty(20, 60)
        old = Basis(torch.empty(20, 3), None, None, 60)
        with Made(G) as made:
            SubspaceMap(rank=3).basis(G, NOISE, 1, torch.float32, old)
    assert any("svd" in name for name in made.calls)


@pytest.mark.parametrize("size", [1e30, 1e-12])
def test_large_and_small_gradients_are_as_good_as_any(size):
    """The square of 1e30 is no number of fp32."""
    old = SubspaceMap(rank=3).basis(gradient(10, 14).float(), NOISE, 0, torch.float32)
    G = gradient(10, 14, 6)
    got = SubspaceMap(rank=3).basis((G * size).float(), NOISE, 1, torch.float32, old).left
    want = positive(torch.linalg.svd(G)[0][:, :3], 0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("m, n", [(10, 14), (14, 10)])
def test_a_first_gradient_of_nothing_gives_the_first_axes(side, m, n):
    named = SubspaceMap(rank=3, side=side).basis(torch.zeros(m, n, dtype=F64), NOISE, 0,
                                                 F64).tensors()
    wanted = {"left": torch.eye(m, 3, dtype=F64), "right": torch.eye(n, 3, dtype=F64).t()}
    assert set(named) == ({"left", "right"} if side == "full" else {side})
    assert all(torch.equal(factor, wanted[name]) for name, factor in named.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gaussian_factor_is_the_drawn_numbers_over_the_root_of_the_rank(side):
    long = {"left": 6, "right": 9}[side]
    named = SubspaceMap(rank=4, kind="gaussian", side=side).basis(
        gradient(6, 9), NOISE, 5, torch.bfloat16).tensors()
    z = NOISE.normal(4 * long, turn=5).double() / 2
    assert set(named) == {side}
    torch.testing.assert_close(named[side], z.view(6, 4) if side == "left" else z.view(4, 9),
                               rtol=1e-6, atol=0)


def test_a_gaussian_factor_is_no_wider_than_the_short_side():
    left = SubspaceMap(rank=99, kind="gaussian").basis(gradient(6, 9), NOISE, 5, F64).left
    torch.testing.assert_close(left, NOISE.normal(36, turn=5).double().view(6, 6) / 6**0.5,
                               rtol=1e-6, atol=0)


SIDES = {"std": (True, False), "reverse_std": (False, True), "left": (True, False),
         "right": (False, True), "full": (True, True)}                        # of a wide matrix


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("m, n", [(8, 20), (20, 8), (8, 8)])
@pytest.mark.parametrize("rank, r", [(1, 1), (3, 3), (99, 8)])
def test_shapes_and_bytes_are_those_of_the_sides(side, m, n, rank, r):
    left, right = SIDES[side]
    if m >= n and "std" in side:
        left, right = right, left
    how = SubspaceMap(rank=rank, side=side)
    assert how.sides(m, n) == (left, right) and how.stores()
    assert how.shape(m, n) == (r if left else m, r if right else n)
    assert how.bytes(m, n, 2) == 2 * r * ((m if left else 0) + (n if right else 0))
    if side != "full":
        drawn = SubspaceMap(rank=rank, kind="gaussian", side=side)
        assert drawn.shape(m, n) == how.shape(m, n) and drawn.bytes(m, n, 2) == 0


@pytest.mark.parametrize("rank, r", [(10, 10), (99, 20)])
def test_columns_are_clamped_to_the_width_alone(rank, r):
    how, G = SubspaceMap(rank=rank, kind="columns"), gradient(6, 20)
    assert how.sides(6, 20) == (False, True)
    assert how.shape(6, 20) == (6, r) and how.bytes(6, 20, 2) == 4 * r
    first, again, other = (how.basis(G, NOISE, t, F64).columns for t in (0, 0, 1))
    assert torch.equal(first, again) and first.numel() == r
    assert torch.equal(first, first.sort().values) and first.dtype == torch.int32
    assert torch.equal(first, other) == (r == 20)


@pytest.mark.parametrize("rows, width, numel, want", [
    (10, 4, 12, [(0, 3), (3, 6), (6, 9), (9, 10)]), (3, 10, 4, [(0, 1), (1, 2), (2, 3)]),
    (6, 1, 3, [(0, 3), (3, 6)]), (4, 0, 3, [(0, 3), (3, 4)]), (0, 5, 9, [])])
def test_panels_cover_all_rows_and_are_at_least_one_high(rows, width, numel, want):
    assert list(panels(rows, width, numel)) == want


def test_low_precision_is_widened_four_million_entries_at_a_time():
    G = torch.zeros(8, 1 << 20, dtype=torch.bfloat16)
    basis = Basis(None, torch.zeros(1, 1 << 20), None, 1 << 20)
    with Made(G) as made:
        basis.down(G)
    assert max(made.sizes) == 1 << 22


def test_a_gradient_of_the_factors_type_is_projected_in_one_product():
    G = gradient(40, 24)
    basis = SubspaceMap(rank=4, side="left").basis(G, NOISE, 0, F64)
    with Made(G) as made:
        basis.down(G, numel=70)
    assert len([c for c in made.calls if "mm" in c]) == 1


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("squared", [False, True])
def test_rotation_is_the_product_of_the_factors(side, squared):
    """P_new^T P_old M on the left, M Q_old Q_new^T on the right; entries squared for V."""
    how = SubspaceMap(rank=4, side=side)
    old, new = (how.basis(gradient(10, 14, k), NOISE, k, F64) for k in (1, 2))
    M = gradient(*how.shape(10, 14), 3).abs()
    want, power = M, 2 if squared else 1
    if side != "right":
        want = (new.left.t() @ old.left) ** power @ want
    if side != "left":
        want = want @ (old.right @ new.right.t()) ** power
    got = rotate(M, old, new, squared=True) if squared else rotate(M, old, new)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_full_rank_loses_nothing_and_larger_ranks_are_clamped():
    for m, n in ((8, 20), (20, 8)):
        G = gradient(m, n)
        basis = SubspaceMap(rank=99).basis(G, NOISE, 0, F64)
        assert basis.down(G).numel() == m * n
        torch.testing.assert_close(back(basis, basis.down(G), m), G, rtol=1e-9, atol=1e-9)


def test_the_sketch_finds_the_range_of_a_decaying_spectrum():
    U, _ = torch.linalg.qr(gradient(60, 60, 1))
    V, _ = torch.linalg.qr(gradient(80, 60, 2))
    S = 2.0 ** -torch.arange(60, dtype=F64)
    G = U @ torch.diag(S) @ V.t()
    exact = SubspaceMap(rank=6).basis(G, NOISE, 0, F64)
    quick = SubspaceMap(rank=6, kind="randomized").basis(G, NOISE, 0, F64)
    assert quick.left.shape == (60, 6)
    torch.testing.assert_close(quick.left @ quick.left.t(), exact.left @ exact.left.t(),
                               rtol=0, atol=1e-6)


def test_low_precision_gradients_are_widened_panel_by_panel():
    G = gradient(40, 24).float()
    for side in ("left", "right", "full"):
        basis = SubspaceMap(rank=4, side=side).basis(G, NOISE, 0, torch.bfloat16)
        for t in basis.tensors().values():
            assert t.dtype == torch.bfloat16
        whole = basis.down(G.bfloat16().float())
        assert whole.dtype == torch.float32
        torch.testing.assert_close(basis.down(G.bfloat16(), numel=70), whole, rtol=1e-5, atol=1e-5)


def test_a_bad_gradient_at_refresh_keeps_the_old_basis():
    G = gradient(10, 14)
    how = SubspaceMap(rank=3)
    old = how.basis(G, NOISE, 0, F64)
    broken = gradient(10, 14, 5)
    broken[2, 3] = float("nan")
    for bad in (torch.zeros_like(G), broken, torch.full_like(G, float("inf"))):
        assert torch.equal(how.basis(bad, NOISE, 1, F64, old).left, old.left)
    assert not torch.equal(how.basis(gradient(10, 14, 6), NOISE, 1, F64, old).left, old.left)
    first = how.basis(torch.zeros_like(G), NOISE, 0, F64).left          # still orthonormal
    torch.testing.assert_close(first.t() @ first, torch.eye(3, dtype=F64))


def test_gaussian_is_drawn_again_and_right_on_average():
    how = SubspaceMap(rank=4, kind="gaussian")
    a, b = (how.basis(gradient(6, 9), NOISE, 2, F64) for _ in range(2))
    assert torch.equal(a.left, b.left) and not how.stores()
    assert not torch.equal(a.left, how.basis(gradient(6, 9), NOISE, 3, F64).left)
    PPt = sum(how.basis(gradient(6, 9), NOISE, t, F64).left @
              how.basis(gradient(6, 9), NOISE, t, F64).left.t() for t in range(800)) / 800
    assert (PPt - torch.eye(6, dtype=F64)).abs().max() < 0.15


def test_columns_are_disjoint_from_the_rest():
    G = gradient(6, 20)
    basis = SubspaceMap(rank=7, kind="columns").basis(G, NOISE, 0, F64)
    idx = basis.columns.long()
    assert len(set(idx.tolist())) == 7
    inside = back(basis, basis.down(G), 6)
    assert torch.equal(inside[:, idx], G[:, idx])
    assert ((inside == 0) | (G - inside == 0)).all()


def test_rotation_carries_a_moment_into_the_new_basis():
    G, H = gradient(10, 30, 1), gradient(10, 30, 2)
    for side in ("left", "right", "full"):
        how = SubspaceMap(rank=10, side=side)               # full rank on the short side
        old, new = how.basis(G, NOISE, 0, F64), how.basis(H, NOISE, 1, F64)
        M = old.down(G)
        moved = rotate(M, old, new)
        if side == "left":                                  # nothing is lost: same full moment
            torch.testing.assert_close(back(new, moved, 10), back(old, M, 10))
        assert moved.shape == M.shape
        assert (rotate(M.square(), old, new, squared=True) >= 0).all()


def test_views_of_any_layout_share_memory():
    conv = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    assert matrix(conv).shape == (8, 54) and matrix(conv).data_ptr() == conv.data_ptr()
    assert matrix(torch.randn(8, 6, 3, 3)).shape == (8, 54)
    t = torch.randn(5, 7).t()
    assert matrix(t).shape == (5, 7) and matrix(t).data_ptr() == t.data_ptr()
    g = torch.randn(8, 6, 3, 3)                             # a gradient of another layout
    assert torch.equal(in_memory_order(g, like=conv)[0], g.permute(0, 2, 3, 1))


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="rank"):
        SubspaceMap(rank=0)
    with pytest.raises(RecipeError, match="one side"):
        SubspaceMap(rank=2, kind="gaussian", side="full")
