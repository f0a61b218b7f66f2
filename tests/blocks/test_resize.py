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
