"""Backward in unusual ways: twice, in part, by two losses, with hooks; odd tensors; exceptions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as foreign

from burnish.blocks.tape.saved import Tape

D = 8


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.LayerNorm(D), "a": nn.Linear(D, D),
                          "b": nn.Linear(D, D)}).double()


def two(m, x):
    """One noted tensor, two readers."""
    y = m["norm"](x * 2)
    return m["a"](y).square().sum(), m["b"](y).square().sum()


def tensors(m):
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    return x, [x, *m.parameters()]


def entries(tape):
    """Every entry a note of this tape stands for, as it is packed."""
    found, pack = [], tape.pack

    def see(t):
        packed = pack(t)
        if hasattr(packed, "entry"):
            found.append(packed.entry)
        return packed

    tape.pack = see
    return found


def test_two_backwards_of_one_graph_share_again(parts):
    x, wanted = tensors(parts)
    tape = Tape()
    made = entries(tape)
    with tape.recording():
        loss = sum(two(parts, x))
    runs = []
    shared = next(e for e in made if e.readers == 2)
    fn = shared.fn
    shared.fn = lambda *a, **k: (runs.append(1), fn(*a, **k))[1]
    want = torch.autograd.grad(sum(two(parts, x)), wanted)
    for keep in (True, True, False):
        got = torch.autograd.grad(loss, wanted, retain_graph=keep)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert shared.value is None
    assert len(runs) == 3                            # once a backward, for both readers


def test_a_value_whose_readers_do_not_all_come_ends_with_its_backward(parts):
    x, wanted = tensors(parts)
    tape = Tape()
    made = entries(tape)
    with tape.recording():
        one, other = two(parts, x)
    first = torch.autograd.grad(one, wanted, retain_graph=True, allow_unused=True)
    assert all(e.value is None for e in made)        # the second reader has not asked, and may not
    second = torch.autograd.grad(other, wanted, allow_unused=True)
    for got, k in ((first, 0), (second, 1)):
        want = torch.autograd.grad(two(parts, x)[k], wanted, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_a_saved_tensor_read_by_hand_is_not_held(parts):
    x, _ = tensors(parts)
    tape = Tape()
    made = entries(tape)
    with tape.recording():
        y = F.gelu(x)
        z = y * y.exp()
    assert torch.equal(z.grad_fn._saved_self, y)
    assert all(e.value is None for e in made)


def test_hooks_on_tensors_see_stock_gradients(parts):
    seen = []
    for tape in (None, Tape()):
        x = torch.ones(4, D, dtype=torch.float64, requires_grad=True)

        def run(x):
            y = parts["norm"](x * 3)
            y.register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
            return parts["a"](y).square().sum() + (y * y).sum()

        if tape is None:
            loss = run(x)
        else:
            with tape.recording():
                loss = run(x)
        loss.backward()
        seen.append(x.grad)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_somebody_elses_checkpoint_inside(parts):
    x, wanted = tensors(parts)

    def run():
        y = parts["norm"](x)
        z = foreign(lambda t: F.gelu(parts["a"](t)) * t, y, use_reentrant=False)
        return parts["b"](z).square().sum()

    want = torch.autograd.grad(run(), wanted)
    with Tape().recording():
        loss = run()
    for a, b in zip(torch.autograd.grad(loss, wanted), want, strict=True):
        assert torch.equal(a, b)


def test_an_exception_in_the_forward_leaves_nothing(parts):
    tape, held = Tape(), []

    def run():
        x, _ = tensors(parts)
        y = F.gelu(x * 1)
        held.append(weakref.ref(y))
        parts["a"](y)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tape.recording():
        run()
    gc.collect()
    assert held[0]() is None and not tape._known and tape._here.depth == 0


MAKE = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(4, D),
    "empty": lambda x: x[:0],
    "sliced": lambda x: x[:, ::2].repeat(1, 2),
    "scalar": lambda x: x.sum() * torch.ones(4, D, dtype=x.dtype),
}


@pytest.mark.parametrize("name", MAKE)
def test_tensors_of_every_layout(name, parts):
    x, wanted = tensors(parts)

    def run():
        h = MAKE[name](x)
        y = F.gelu(h) * h.sum() * torch.arange(D)            # 0-dim and integer arguments
        return parts["a"](y).square().sum() + parts["b"](F.silu(h).t().t()).sum()

    want = torch.autograd.grad(run(), wanted, allow_unused=True)
    with Tape().recording():
        loss = run()
    got = torch.autograd.grad(loss, wanted, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Named(torch.Tensor):
    """A subclass that torch carries along."""


def test_subclasses_and_tensors_without_values():
    w = torch.randn(D, D, requires_grad=True)
    x = torch.randn(4, D).as_subclass(Named)
    with Tape().recording():
        loss = (F.gelu(x @ w) @ w).sum()
    got = torch.autograd.grad(loss, w)[0]
    want = torch.autograd.grad((F.gelu(x @ w) @ w).sum(), w)[0]
    assert torch.equal(got, want)
    m = torch.randn(D, D, device="meta", requires_grad=True)
    with Tape().recording():
        loss = (F.dropout(F.gelu(m @ m), 0.5, True) @ m).sum()
    loss.backward()
    assert m.grad.shape == m.shape
