"""A vocabulary split over two processes: each holds its rows of the head, all find the loss of the
whole and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.tape.chunked import Shard, cross_entropy, linear_head
from burnish.core.processes import leave

N, D, WORDS, SPLIT = 9, 4, 11, 6


def case(soft: bool):
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in
               ((N, D), (WORDS, D), (WORDS,)))
    target = torch.randn(N, WORDS, generator=g, dtype=torch.float64).softmax(-1) if soft else \
        torch.tensor([0, 10, 5, 6, -100, 3, 7, -100, 1])
    weight = torch.rand(WORDS, generator=g, dtype=torch.float64) + 0.2
    return x, W, b, target, weight


HOW = [(soft, smoothing, weighed, reduction) for soft in (False, True) for smoothing in (0.0, 0.2)
       for weighed in (False, True) for reduction in ("mean", "sum", "none")]


def one(rank: int, store: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, WORDS)
    found = []
    for soft, smoothing, weighed, reduction in HOW:
        x, W, b, target, weight = case(soft)
        x, W, b = (t.clone().requires_grad_() for t in (x, W[mine], b[mine]))
        loss = cross_entropy(
            x, linear_head(W, b), target[:, mine] if soft else target,
            weight[mine] if weighed else None, label_smoothing=smoothing, reduction=reduction,
            chunk=4, shard=Shard(dist.group.WORLD, mine.start))
        up = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, W, b), up)])
    torch.save(found, f"{out}/{rank}")
    leave()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    torch.multiprocessing.spawn(one, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / str(r)) for r in (0, 1)]
    for k, (soft, smoothing, weighed, reduction) in enumerate(HOW):
        x, W, b, target, weight = case(soft)
        x, W, b = (t.requires_grad_() for t in (x, W, b))
        want = F.cross_entropy(F.linear(x, W, b), target, weight if weighed else None,
                               label_smoothing=smoothing, reduction=reduction)
        up = torch.linspace(1, 2, want.numel(), dtype=want.dtype).view(want.shape)
        dx, dW, db = torch.autograd.grad(want, (x, W, b), up)
        first, second = parts[0][k], parts[1][k]
        for part in (first, second):
            torch.testing.assert_close(part[0], want.detach())
            torch.testing.assert_close(part[1], dx)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), dW)
        torch.testing.assert_close(torch.cat([first[3], second[3]]), db)
