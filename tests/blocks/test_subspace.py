"""Subspaces: shapes, the best rank-r image, panels, refresh guards, rotation."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.subspace import SubspaceMap, in_memory_order, matrix, panels, rotate
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
