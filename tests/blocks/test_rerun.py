"""Several blocks that run again as one: stock gradients, one kept input for all of them."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.tape import replay
from burnish.blocks.tape.executor import checkpoint
from burnish.blocks.tape.saved import Tape
from burnish.core.call import Call, again

D, N = 8, 6


class Block(nn.Module):
    """A residual block with dropout that also hands on, and takes, a bias."""

    def __init__(self, p=0.0):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.p, self.runs = p, 0

    def forward(self, x, bias=None):
        self.runs += 1
        h = F.gelu(self.fc1(self.norm(x)))
        h = F.dropout(h, self.p, self.training)
        bias = self.fc2.weight.mean().repeat(D) if bias is None else bias
        return x + self.fc2(h) + bias, bias


def stack(n=6, p=0.0):
    torch.manual_seed(0)
    return nn.ModuleList(Block(p) for _ in range(n)).double().train()


def run(blocks, x, every=None, between=lambda h: h, tape=None):
    """The loop of a model; every: blocks of one segment, None: no checkpointing."""
    if every is None:
        bias = None
        for b in blocks:
            x, bias = b(between(x), bias)
        return x
    tape = tape or Tape()
    with again(Call()), tape.recording():
        bias = None
        for i, b in enumerate(blocks):
            x, bias = checkpoint(b, b.forward, (between(x),), {"bias": bias}, tape,
                                 joins=i % every > 0)
    return x


def gradients(blocks, x, **kw):
    torch.manual_seed(3)
    y = run(blocks, x, **kw)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])]


def same(a, b):
    for s, t in zip(a, b, strict=True):
        assert torch.equal(s, t)


def given(**kw):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, N, D, dtype=torch.float64, generator=g).requires_grad_(), stack(**kw)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("every", [1, 2, 4, 6, 9])
def test_gradients_are_those_of_the_plain_run(every, p):                        # findings 3.9
    x, blocks = given(p=p)
    same(gradients(blocks, x), gradients(blocks, x, every=every))


def kept(blocks, x, every):
    """Bytes of distinct storages that wait for backward, parameters excluded."""
    owned, alive = {p.untyped_storage()._cdata for p in blocks.parameters()}, {}
    tape = Tape(lean=False)
    pack = tape.pack

    def see(t):
        if (key := t.untyped_storage()._cdata) not in owned:
            alive[key] = t.untyped_storage().nbytes()
        return pack(t)

    tape.pack = see
    run(blocks, x, every, tape=tape)
    return sum(alive.values())


@pytest.mark.parametrize("every, segments", [(1, 6), (2, 3), (4, 2), (6, 1)])
def test_one_input_is_kept_per_segment(every, segments):                        # findings 3.9
    """Of the first block. What else its blocks read (a bias here) is one tensor for all."""
    x, blocks = given()
    bias = D * 8 if every < 6 else 0                # made in the first segment, read in others
    assert kept(blocks, x, every) == segments * x.numel() * 8 + bias


@pytest.mark.parametrize("every", [1, 3])
def test_every_block_runs_twice(every):
    x, blocks = given()
    gradients(blocks, x, every=every)
    assert [b.runs for b in blocks] == [2] * 6


@pytest.mark.parametrize("between", [lambda h: h * 2, lambda h: h.view(2, N, D),
                                     lambda h: h.add_(1) if not h.is_leaf else h])
def test_what_a_model_does_between_two_blocks_counts(between):
    """A state that is not what the block below returned is kept; the others still are not."""
    x, blocks = given(p=0.3)
    same(gradients(blocks, x, between=between), gradients(blocks, x, every=3, between=between))


def test_frozen_blocks_below_the_first_trained_run_once():
    x, blocks = given()
    blocks[:3].requires_grad_(False)
    run(blocks, x.detach(), 6).sum().backward()
    assert [b.runs for b in blocks] == [1, 1, 1, 2, 2, 2]
    got = [p.grad.clone() for p in blocks[3:].parameters()]
    blocks.zero_grad()
    run(blocks, x.detach()).sum().backward()
    same(got, [p.grad for p in blocks[3:].parameters()])


def test_a_loss_on_a_state_in_the_middle():
    """Blocks that backward does not reach do not run again, and what ran for nothing goes."""
    x, blocks = given(p=0.2)
    results = []
    for every in (None, 4):
        torch.manual_seed(3)
        half = run(blocks[:3], x, every)
        results.append(torch.autograd.grad(half.sum(), [x, *blocks[:3].parameters()]))
    same(*results)
    tape = Tape()
    with again(Call()), tape.recording():
        h, bias = checkpoint(blocks[0], blocks[0].forward, (x,), {}, tape)
        y, _ = checkpoint(blocks[1], blocks[1].forward, (h,), {"bias": bias}, tape, joins=True)
    before = sum(type(o) is torch.Tensor for o in gc.get_objects())
    got = torch.autograd.grad(y.sum(), list(blocks[1].parameters()), retain_graph=True)
    del got
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) == before
    assert blocks[0].runs > 0 and blocks[2].runs == 3


def test_backward_may_come_twice():
    x, blocks = given(p=0.2)
    torch.manual_seed(3)
    want = torch.autograd.grad(run(blocks, x).sum(), [x, *blocks.parameters()])
    torch.manual_seed(3)
    y = run(blocks, x, 3)
    for keep in (True, False):
        same(want, torch.autograd.grad(y.sum(), [x, *blocks.parameters()], retain_graph=keep))


def test_two_forwards_before_one_backward():
    x, blocks = given(p=0.2)
    results = []
    for every in (None, 3):
        torch.manual_seed(3)
        loss = run(blocks, x, every).sum() + run(blocks, x * 2, every).square().sum()
        results.append(torch.autograd.grad(loss, [x, *blocks.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)            # two sums, which round in their own order


def test_nothing_outlives_the_graph():
    x, blocks = given()
    gc.collect()
    gc.disable()
    try:
        y = run(blocks, x * 1, 3)
        probe = weakref.ref(y.grad_fn)
        y.sum().backward()
        del y
        assert probe() is None
        y = run(blocks, x * 1, 3)
        probe = weakref.ref(y.grad_fn)
        del y                                       # a graph nobody takes
        assert probe() is None
    finally:
        gc.enable()


def test_two_threads_keep_their_own_stretch():
    x, blocks = given()
    want = gradients(blocks, x)
    got: list = [None] * 4

    def work(k):
        y = run(blocks, x, 3)
        got[k] = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for g in got:
        same(want, g)


@pytest.mark.parametrize("p, turned", [(0.0, False), (0.4, True)])
def test_generators_are_turned_back_only_where_something_was_drawn(monkeypatch, p, turned):
    seen, put = [], replay._set
    monkeypatch.setattr(replay, "_set", lambda d, s: (seen.append(d), put(d, s)))
    x, blocks = given(p=p)
    y = run(blocks, x, 2, tape=Tape(lean=False))
    y.sum().backward()
    assert bool(seen) == turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_the_forward_s(dtype):
    x, blocks = given(p=0.2)
    x, blocks = x.detach().float().requires_grad_(), blocks.float()
    results = []
    for every in (None, 3):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = run(blocks, x, every)
        results.append(torch.autograd.grad(y.float().square().sum(), [x, *blocks.parameters()]))
    for a, b in zip(*results, strict=True):         # casts of a weight are summed block by block
        torch.testing.assert_close(a, b, rtol=0 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_inside_somebody_else_s_checkpointing_each_block_stands_alone():
    x, blocks = given(p=0.3)
    results = []
    for every in (None, 3):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(lambda x, e=every: run(blocks, x, e), x,
                                              use_reentrant=False)
        results.append(torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()]))
    same(*results)


@pytest.mark.parametrize("when", ["during the forward", "before backward"])
def test_blocks_run_again_in_the_mode_they_ran_in(when):
    """A mode that holds for the forward only, as that of a fixed body, and one that a loop changes
    before backward."""
    x = torch.randn(2, N, D, dtype=torch.float64)
    blocks = stack(p=0.5)
    blocks.train(when == "before backward")
    torch.manual_seed(3)
    want = torch.autograd.grad(run(blocks, x).square().sum(), list(blocks.parameters()))
    torch.manual_seed(3)
    loss = run(blocks, x, every=2).square().sum()
    blocks.train(when == "during the forward")
    got = torch.autograd.grad(loss, list(blocks.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(b.training == (when == "during the forward") for b in blocks)
