"""A parameter that changes its shape while somebody still holds a graph of the step before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.resize import resize
from burnish.testing.models import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("keep", "fresh"), [(None, 2), ([0, 2], None), ([1], 3)])
def test_gradients_have_the_new_shape_whatever_graph_is_alive(dtype, keep, fresh):
    p = nn.Parameter(torch.arange(12, dtype=dtype).view(3, 4))
    held = (p * 2).sum()
    held.backward()
    resize(p, 0, None if keep is None else torch.tensor(keep),
           None if fresh is None else torch.ones(fresh, 4, dtype=dtype))
    rows = len(keep or range(3)) + (fresh or 0)
    assert p.shape == (rows, 4) and p.dtype == dtype and p.is_leaf and p.requires_grad
    assert p.grad.shape == (rows, 4)
    p.grad = None
    (p * 3).sum().backward()
    assert torch.equal(p.grad, torch.full((rows, 4), 3, dtype=dtype))
    assert held.requires_grad                                          # it is still there


def test_ranks_grow_in_a_loop_that_holds_its_last_loss():
    net, batch = tiny("vit")
    recipe = "increlora(rank=3, init_rank=1, warmup=1, every=1, top=4)"
    tuned = burnish.tune(net, recipe)
    opt = tuned.optimizer(lr=1e-3)
    ranks = []
    for _ in range(4):
        loss = net(**batch).loss                                       # the one before is alive
        loss.backward()
        opt.step()
        opt.zero_grad()
        ranks.append(sum(p.shape[0] for n, p in tuned.named_parameters() if n.endswith(".Q")))
        assert torch.isfinite(loss)
    assert ranks[-1] > ranks[0]


def picked(rows, dim, keep, fresh):
    """By lists: the slices that stay, in this order, then fresh ones."""
    columns = [list(c) for c in zip(*rows, strict=True)] if dim else [list(r) for r in rows]
    new = [columns[i] for i in (keep if keep is not None else range(len(columns)))] + fresh
    return [list(r) for r in zip(*new, strict=True)] if dim else new


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("keep", "grown"), [(None, 2), ([2, 0], 0), ([1], 3), ([0, 2], 1)])
def test_moments_and_gradient_go_with_their_slices(dim, keep, grown):
    """Whole or flat; fresh slices begin with none, counts go on, and what is no tensor stays."""
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(3, 3, generator=g))
    p.grad = torch.randn(3, 3, generator=g)
    optimizer = torch.optim.SGD([p], 0.1)
    m, v = torch.randn(3, 3, generator=g), torch.randn(3, 3, generator=g)
    optimizer.state[p] = {"step": torch.tensor(4.0), "m": m, "v": v.view(-1), "word": "x"}
    optimizer.burnish_shapes = {p: p.shape}
    width = 3
    fresh = [[7.0] * width for _ in range(grown)]
    none = [[0.0] * width for _ in range(grown)]
    want = [picked(t.tolist(), dim, keep, new) for t, new in
            ((p.detach(), fresh), (p.grad, none), (m, none), (v, none))]
    more = torch.full((grown, width) if dim == 0 else (width, grown), 7.0) if grown else None
    resize(p, dim, None if keep is None else torch.tensor(keep), more, optimizer)
    state = optimizer.state[p]
    assert [p.tolist(), p.grad.tolist(), state["m"].tolist()] == want[:3]
    assert state["v"].dim() == 1 and state["v"].view(p.shape).tolist() == want[3]
    assert (state["step"].item(), state["word"]) == (4.0, "x")
    assert optimizer.burnish_shapes == {p: p.shape} and p.is_contiguous()


def test_a_vector_s_moments_are_vectors():
    p = nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.SGD([p], 0.1)
    optimizer.state[p] = {"m": torch.arange(4.0) + 10}
    resize(p, 0, torch.tensor([3, 1]), torch.ones(1), optimizer)
    assert p.tolist() == [3, 1, 1] and optimizer.state[p]["m"].tolist() == [13, 11, 0]
    assert p.grad is None and not hasattr(optimizer, "burnish_shapes")


@pytest.mark.parametrize("shape", [(12,), (2, 6)])
def test_moments_that_are_dropped_are_of_no_shape(shape):
    """A state in whatever form goes, and with it what was counted."""
    p = nn.Parameter(torch.zeros(12).view(shape))
    optimizer = torch.optim.SGD([p], 0.1)
    optimizer.state[p] = {"codes": torch.zeros(5), "step": 3}
    resize(p, 0, torch.tensor([0]), optimizer=optimizer, moments="drop")
    assert p not in optimizer.state and p.shape == (1, *shape[1:])
    resize(p, 0, fresh=torch.ones(1, *shape[1:]), moments="drop")     # without an optimizer
    assert p.shape == (2, *shape[1:])


def test_a_state_that_has_lost_the_shape_is_refused_and_nothing_is_changed():
    p = nn.Parameter(torch.arange(12.0).view(3, 4))
    p.grad = torch.ones(3, 4)
    optimizer = torch.optim.SGD([p], 0.1)
    optimizer.state[p] = {"m": torch.ones(3, 4), "codes": torch.zeros(5)}
    with pytest.raises(burnish.RecipeError, match="w cannot change its shape: .* 'codes' is held"):
        resize(p, 0, torch.tensor([0]), optimizer=optimizer, name="w")
    assert p.shape == p.grad.shape == optimizer.state[p]["m"].shape == (3, 4)
    assert p.detach().flatten().tolist() == list(range(12))
