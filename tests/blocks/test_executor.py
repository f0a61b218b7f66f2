"""Blocks that run again in backward: the same gradients to the bit, and only their input kept."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as stock

from burnish.blocks.tape.executor import checkpoint, no_grad
from burnish.blocks.tape.saved import Tape

D, M, N = 16, 64, 12


class Block(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, M), nn.Linear(M, D)
        self.p, self.runs = p, 0

    def forward(self, x):
        self.runs += 1
        h = F.dropout(F.gelu(self.fc1(self.norm(x))), self.p, self.training)
        return x + F.dropout(self.fc2(h), self.p, self.training)


def blocks(n=4, p=0.0):
    torch.manual_seed(0)
    return nn.ModuleList(Block(p) for _ in range(n))


def run(stack, x, mode=None):
    for b in stack:
        x = checkpoint(b, b.forward, (x,), {}) if mode else b(x)
    return x


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_are_bit_equal(p):
    """Dropout included: the generator's state is kept and drawn from again."""
    stack = blocks(p=p)
    x = torch.randn(2, N, D, requires_grad=True)
    results = []
    for mode in (None, "checkpoint"):
        torch.manual_seed(7)
        y = run(stack, x, mode)
        after = torch.rand(1)                       # the generator outside goes on undisturbed
        results.append((y, after, torch.rand(1) if y.sum().backward() is None else None,
                        [p.grad.clone() for p in (x, *stack.parameters())]))
        x.grad = None
        stack.zero_grad(set_to_none=True)
    (y0, a0, b0, g0), (y1, a1, b1, g1) = results
    assert torch.equal(y0, y1) and torch.equal(a0, a1) and torch.equal(b0, b1)
    for a, b in zip(g0, g1, strict=True):
        assert torch.equal(a, b)


def test_one_unit_is_kept_per_block():
    stack, unit = blocks(5), 2 * N * D * 4
    x = torch.randn(2, N, D, requires_grad=True)
    kept = {}
    owned = {p.untyped_storage()._cdata for p in stack.parameters()}

    def see(t):
        if t.untyped_storage()._cdata not in owned:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        y = run(stack, x, "checkpoint")
    assert sum(kept.values()) == 5 * unit
    assert y.shape == x.shape


def test_the_live_block_is_lean():
    """The block runs again under the tape it is given, so what it keeps there is lean too."""
    block = Block()
    x = torch.randn(2, N, D, requires_grad=True)
    tape, noted = Tape(), []
    keep = tape.pack
    tape.pack = lambda t: (noted.append(type(keep(t)).__name__), keep(t))[1]
    with tape.recording():
        y = checkpoint(block, block.forward, (x,), {}, tape)
    assert noted.count("Note") == 0
    y.sum().backward()
    assert noted.count("Note") >= 2                # norm and gelu


def test_frozen_embeddings_need_no_magic_call():
    """Gradients reach a block's parameters although its input carries none."""
    block = Block()
    x = torch.randn(2, N, D)
    checkpoint(block, block.forward, (x,), {}).sum().backward()
    got = [p.grad.clone() for p in block.parameters()]
    block.zero_grad(set_to_none=True)
    block(x).sum().backward()
    for g, p in zip(got, block.parameters(), strict=True):
        assert torch.equal(g, p.grad)


def test_a_block_without_anything_to_train_just_runs():
    block = Block().requires_grad_(False)
    x = torch.randn(2, N, D)
    assert checkpoint(block, block.forward, (x,), {}).grad_fn is None
    assert block.runs == 1
    h = torch.randn(2, N, D, requires_grad=True)    # frozen, but the gradient passes through
    checkpoint(block, block.forward, (h,), {}).sum().backward()
    assert block.runs == 3 and h.grad is not None


def test_without_gradients_it_runs_once():
    block = Block()
    with torch.no_grad():
        checkpoint(block, block.forward, (torch.randn(1, N, D),), {})
    assert block.runs == 1


Answer = namedtuple("Answer", ["hidden", "extra"])


class Awkward(nn.Module):
    """Keyword arguments, nested outputs, integers, None, and an input handed through."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, mask=None, *, scale=1.0, more=None):
        h = self.linear(x) * scale
        if mask is not None:
            h = h.masked_fill(mask, 0)
        if more is not None:
            h = h + more["bias"]
        return Answer(h, (x, h.argmax(-1), None, "name"))


def test_structures_come_back_as_they_are():
    block = Awkward()
    x = torch.randn(2, D, requires_grad=True)
    bias = torch.randn(D, requires_grad=True)
    mask = torch.rand(2, D) < 0.3
    grads = []
    for again in (False, True):
        args, kw = (x, mask), {"scale": 2.0, "more": {"bias": bias}}
        out = checkpoint(block, block.forward, args, kw) if again else block(*args, **kw)
        assert type(out) is Answer and out.extra[2:] == (None, "name")
        assert torch.equal(out.extra[0], x) and not out.extra[1].is_floating_point()
        (out.hidden.square().sum() + out.extra[0].sum()).backward()
        grads.append([t.grad.clone() for t in (x, bias, *block.parameters())])
        for t in (x, bias, *block.parameters()):
            t.grad = None
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_an_output_nobody_uses_is_no_trouble():
    block = Awkward()
    x = torch.randn(2, D, requires_grad=True)
    out = checkpoint(block, block.forward, (x,), {})
    (gx,) = torch.autograd.grad(out.extra[0].sum(), x)
    assert torch.equal(gx, torch.ones_like(x))


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(D, D), []

    def forward(self, x, past_key_values=None, use_cache=False):
        self.seen.append((past_key_values, use_cache))
        return self.linear(x)


class DynamicCache:
    def get_seq_length(self):
        return 0


def test_a_cache_is_not_filled_twice():
    block = Cached()
    x = torch.randn(2, D, requires_grad=True)
    checkpoint(block, block.forward, (x,),
               {"past_key_values": DynamicCache(), "use_cache": True}).sum().backward()
    assert block.seen == [(None, False)] * 2


def test_nested_blocks_agree_with_the_stock_function():
    stack = blocks(2, p=0.2)
    x = torch.randn(2, N, D, requires_grad=True)

    def both(x):
        return run(stack, x, "checkpoint")

    outer = nn.Module()
    outer.stack = stack
    torch.manual_seed(1)
    y = checkpoint(outer, both, (x,), {})
    got = torch.autograd.grad(y.sum(), [x, *stack.parameters()])
    torch.manual_seed(1)
    y = stock(lambda x: run(stack, x), x, use_reentrant=False)
    for a, b in zip(got, torch.autograd.grad(y.sum(), [x, *stack.parameters()]), strict=True):
        assert torch.equal(a, b)


def test_autocast_is_the_same_when_the_block_runs_again():
    """Backward runs outside the autocast context; the block must not."""
    block = Block()
    x = torch.randn(2, N, D, requires_grad=True)
    grads = []
    for again in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(block, block.forward, (x,), {}) if again else block(x)
        grads.append(torch.autograd.grad(y.float().sum(), [x, *block.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_block_without_a_graph():
    block = Block()
    y = no_grad(block, block.forward, (torch.randn(1, N, D, requires_grad=True),), {})
    assert not y.requires_grad
