"""Clipping: the two formulas in plain fp64, at once and over two backwards; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.update.clip import Clip, check_norm, clip_norm_
from burnish.core.errors import BurnishError, ConfigError

F64 = torch.float64


def gradients(dtype=F64, size=1.0):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=g, dtype=F64) * size).to(dtype)
            for shape in ((6, 9), (7,), (2, 3, 4))]


def by_hand(Gs, c=0.0, C=0.0):
    """Entries to [-c, c], then all together to the length C; 0 cuts nothing."""
    if c:
        Gs = [torch.minimum(torch.full_like(G, c), torch.maximum(torch.full_like(G, -c), G))
              for G in Gs]
    length = float(sum((G**2).sum() for G in Gs)) ** 0.5
    return [G * min(1.0, C / (length + 1e-6)) for G in Gs] if C else Gs, length


def two_backwards(clip, Gs):
    """The gradients of a pass that is weighed, then those of the same pass, cut."""
    with clip.weighing():
        assert all(clip.weighs(G.clone()) is True for G in Gs)
    out = [G.clone() for G in Gs]
    for G in out:
        assert clip.weighs(G) is False
        clip.cut_(G, "sgd")
    return out


# -- gradients that are all there -----------------------------------------------------------------
@pytest.mark.parametrize("size, norm", [(1.0, 0.5), (1.0, 1e3), (1.0, 0.0), (1e-7, 1e-6)])
def test_gradients_of_all_groups_are_cut_together(size, norm):
    Gs = gradients(size=size)
    ps = [nn.Parameter(torch.zeros_like(G)) for G in Gs]
    rests = nn.Parameter(torch.zeros(3, dtype=F64))               # has no gradient
    opt = torch.optim.SGD([{"params": [*ps[:2], rests]}, {"params": ps[2:]}], 0.1)
    for p, G in zip(ps, Gs, strict=True):
        p.grad = G.clone()
    clip_norm_(opt, norm)
    for p, want in zip(ps, by_hand(Gs, C=norm)[0], strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=0)
    assert rests.grad is None


def test_a_step_that_unscales_by_itself_is_cut_at_the_scaled_length():
    Gs = gradients()
    ps = [nn.Parameter(torch.zeros_like(G)) for G in Gs]
    opt = torch.optim.SGD(ps, 0.1)
    opt.grad_scale = torch.tensor(1024.0)
    for p, G in zip(ps, Gs, strict=True):
        p.grad = G * 1024
    clip_norm_(opt, 0.5)
    for p, want in zip(ps, by_hand(Gs, C=0.5)[0], strict=True):
        torch.testing.assert_close(p.grad / 1024, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [0.5, 1e3])
def test_parts_count_with_those_that_other_processes_hold(norm, monkeypatch):
    from burnish.blocks.update import clip

    (first, part, last), elsewhere = gradients(), torch.linspace(1, 2, 5, dtype=F64)
    ps = [nn.Parameter(torch.zeros_like(G)) for G in (first, part, last)]
    for p, G in zip(ps, (first, part, last), strict=True):
        p.grad = G.clone()
    monkeypatch.setattr(clip, "is_sharded", lambda t: t is ps[1])
    monkeypatch.setattr(clip, "gathered", lambda n: n if n != part.norm() else
                        torch.linalg.vector_norm(torch.cat([part, elsewhere])))
    wants, length = by_hand([first, torch.cat([part, elsewhere]), last], C=norm)
    found = clip.cut_together_(ps, norm)
    assert float(found) == pytest.approx(length, rel=1e-12)
    for p, want in zip(ps, wants, strict=True):
        torch.testing.assert_close(p.grad.flatten(), want.flatten()[:p.numel()], rtol=1e-10, atol=0)
    for p, G, length in ((ps[0], first, float(first.norm())),
                         (ps[1], part, by_hand([part, elsewhere])[1])):
        p.grad = G.clone()                           # of one kind alone
        assert float(clip.cut_together_([p], norm)) == pytest.approx(length, rel=1e-12)


# -- gradients that never exist together ----------------------------------------------------------
@pytest.mark.parametrize("c, C", [(0.0, 0.5), (0.3, 0.0), (0.3, 0.5), (0.0, 1e3), (0.3, 1e3)])
def test_two_backwards_are_the_formulas_in_their_order(c, C):
    Gs = gradients()
    clip = Clip(c, C)
    got = two_backwards(clip, Gs)
    want, length = by_hand(Gs, c, C)
    assert float(clip.found) == pytest.approx(length, rel=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_what_nobody_set_cuts_nothing():
    (G, *_), clip = gradients(size=100.0), Clip()
    same = G.clone()
    clip.cut_(same, "sgd")
    assert torch.equal(same, G)


def test_a_length_of_the_floor_s_size_is_cut_with_it():
    """C / (||g|| + 1e-6) at ||g|| = 1e-6 and C = 1e-6: half; one tensor alone."""
    G = torch.tensor([1e-6], dtype=F64)
    (cut,) = two_backwards(Clip(norm=1e-6), [G])
    torch.testing.assert_close(cut, G / 2, rtol=1e-12, atol=0)


def test_half_precision_is_weighed_in_fp32_and_added_up_in_fp64():
    """4096^2 + 1 is no number of fp32."""
    clip = Clip(norm=1.0)
    two_backwards(clip, [torch.tensor([4096.0]), torch.tensor([1.0])])
    assert float(clip.found) == pytest.approx((4096.0**2 + 1) ** 0.5, rel=1e-12)
    Gs = gradients(torch.bfloat16)
    got = two_backwards(clip, Gs)
    want, length = by_hand([G.double() for G in Gs], C=1.0)
    assert float(clip.found) == pytest.approx(length, rel=1e-6)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=0)


class Made(TorchDispatchMode):
    """Full-size tensors with a storage of their own."""

    def __init__(self, n):
        super().__init__()
        self.n, self.seen = n, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.n:
            self.seen.add(out.untyped_storage()._cdata)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighing_leaves_a_gradient_as_it_is_and_makes_one_copy(dtype):
    G = gradients(dtype)[0]
    before, clip = G.clone(), Clip(norm=1.0)
    with clip.weighing(), Made(G.numel()) as made:
        clip.weighs(G)
    assert torch.equal(G, before) and len(made.seen - {G.untyped_storage()._cdata}) == 1


def test_each_update_has_a_norm_of_its_own():
    clip, Gs = Clip(norm=0.5), gradients()
    with pytest.raises(ConfigError, match=r"lion is stepped inside.*0\.5.*tuned\.backward"):
        clip.cut_(Gs[0].clone(), "lion")
    two_backwards(clip, Gs)
    clip.over()
    with pytest.raises(ConfigError, match=r"tuned\.backward"):
        clip.cut_(Gs[0].clone(), "sgd")
    got = two_backwards(clip, [2 * G for G in Gs])
    for a, b in zip(got, by_hand([2 * G for G in Gs], C=0.5)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_stops_the_update(bad):
    clip = Clip(norm=1.0)
    with pytest.raises(BurnishError, match=f"norm of the gradients is {bad}; nothing was"), \
            clip.weighing():
        clip.weighs(torch.tensor([1.0, bad]))
    assert clip.weighs(torch.ones(2)) is False, "the pass is over"
    with pytest.raises(ConfigError, match=r"tuned\.backward"):
        clip.cut_(torch.ones(2), "sgd")


def test_a_pass_without_a_gradient_says_nothing():
    clip = Clip(norm=1.0)
    with clip.weighing():
        pass
    assert clip.found is None


@pytest.mark.parametrize("device, wide", [("cpu", torch.float64), ("cuda", torch.float32)])
def test_it_runs_without_values_and_takes_no_fp64_where_a_device_may_have_none(device, wide):
    with FakeTensorMode():
        G, clip = torch.empty(5, device=device), Clip(norm=1.0)
        (cut,) = two_backwards(clip, [G])
        assert clip.found.dtype == wide and cut.shape == G.shape


# -- the setting ----------------------------------------------------------------------------------
@pytest.mark.parametrize("given, want", [(None, 0.0), (0, 0.0), (0.25, 0.25), (3, 3.0)])
def test_a_length_is_a_number(given, want):
    got = check_norm(given)
    assert got == want and type(got) is float


@pytest.mark.parametrize("given", [-1.0, float("nan"), "1", [1.0]])
def test_what_is_no_length_is_refused(given):
    with pytest.raises(ConfigError, match="max_grad_norm is a length, 0 for no clipping"):
        check_norm(given)
