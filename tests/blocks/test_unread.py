"""A block that runs again in backward leaves out the product that nobody reads, and only that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.tape import unread
from burnish.testing import stir
from burnish.testing.models import tiny


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm x))), with something behind it."""

    def __init__(self, d=8, behind=None):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.behind = behind

    def forward(self, x):
        y = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return y if self.behind is None else self.behind(y)


def stack(behind=lambda: None, blocks=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(behind=behind()) for _ in range(blocks)]).double()


def gradients(tuned, x):
    tuned.model.zero_grad()
    tuned.model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


def both(make, recipe, x, **kw):
    """(gradients of three passes with checkpoint, those without)."""
    plain = stir(burnish.tune(make(), recipe, head=False, **kw))
    again = stir(burnish.tune(make(), f"{recipe} + checkpoint", head=False, **kw))
    return [gradients(again, x) for _ in range(3)], gradients(plain, x)


@pytest.fixture
def left(monkeypatch):
    """How many products have been left out."""
    count = []
    nothing = unread.nothing
    monkeypatch.setattr(unread, "nothing", lambda *a: count.append(1) or nothing(*a))
    return count


@pytest.mark.parametrize("recipe,targets", [
    ("lora(rank=2)", "all"), ("lora(rank=2)", "*.fc1"), ("dora(rank=2)", "all"),
    ("snella(rank=2)", "all"), ("full", "all"), ("norms", None)])
def test_a_pre_norm_block_leaves_its_last_product_out(recipe, targets, left):
    x = torch.randn(4, 8, dtype=torch.float64)
    kw = {} if targets is None else {"targets": targets}
    again, plain = both(stack, recipe, x, **kw)
    assert len(left) in (4, 6)          # 2 passes after the first, the first block may need nothing
    for got in again:
        assert got.keys() == plain.keys()
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


class Doubled(nn.Module):
    """A product, which keeps its factors."""

    def forward(self, y):
        return y * y


@pytest.mark.parametrize("behind", [lambda: nn.LayerNorm(8), nn.GELU, Doubled,
                                    lambda: nn.Dropout(0.0)])
def test_a_block_that_reads_it_runs_whole(behind, left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again, plain = both(lambda: stack(behind), "lora(rank=2)", x)
    assert bool(left) == isinstance(behind(), nn.Dropout)
    for got in again:
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


class Sometimes(nn.Module):
    """Reads the result only when told to."""

    on = False

    def forward(self, y):
        return y * y if self.on else y


def test_a_block_that_reads_it_later_runs_again_whole(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again = stir(burnish.tune(stack(Sometimes), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(Sometimes), "lora(rank=2)", head=False))
    for on in (False, False, True, True, False):
        for tuned in (again, plain):
            for m in tuned.model.modules():
                if isinstance(m, Sometimes):
                    m.on = on
        want = gradients(plain, x)
        for n, g in gradients(again, x).items():
            assert torch.equal(g, want[n]), (on, n)
    assert len(left) == 6                            # the second pass, and the third in vain


class Refuses(nn.Module):
    def forward(self, y):
        if y.isnan().any():
            raise ValueError("not a number")
        return y


def test_a_block_that_minds_what_it_is_given_runs_again_whole(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again, plain = both(lambda: stack(Refuses), "lora(rank=2)", x)
    assert left
    for got in again:
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


def test_hooks_see_numbers(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    seen = []
    for m in tuned.model.modules():
        if isinstance(m, Block):
            m.fc2.register_forward_hook(lambda m, a, out: seen.append(out.isnan().any().item()))
    for _ in range(3):
        gradients(tuned, x)
    assert len(seen) == 18 and not any(seen) and not left


def test_real_models_leave_it_out_where_they_may(left):
    """ViT, Llama and GPT-2 add the last product to the stream; BERT norms it."""
    for name, expected in (("vit", True), ("llama", True), ("gpt2", True), ("bert", False)):
        left.clear()
        net, batch = tiny(name)
        net.train()
        tuned = stir(burnish.tune(copy.deepcopy(net), "lora(rank=2) + checkpoint", head=False))
        plain = stir(burnish.tune(net, "lora(rank=2)", head=False))
        for _ in range(2):
            for t in (tuned, plain):
                torch.manual_seed(0)
                t.model.zero_grad()
                t.loss(batch).backward()
        assert bool(left) == expected, name
        want = dict(plain.named_parameters())
        for n, p in tuned.named_parameters():
            assert torch.equal(p.grad, want[n].grad), (name, n)


def test_what_an_autocast_keeps_is_seen(left):
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(tiny("vit")[0], "lora(rank=2)", head=False))
    for _ in range(3):
        for t in (tuned, plain):
            t.model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = t.loss(batch)
            loss.backward()
    want = dict(plain.named_parameters())
    assert left
    for n, p in tuned.named_parameters():
        assert torch.equal(p.grad, want[n].grad), n


class Gelus(TorchDispatchMode):
    """Counts how often GELU is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.gelu.default
        return func(*args, **(kwargs or {}))


def test_what_the_product_left_out_reads_is_not_made_again():
    """Its backward comes first, so its input is kept: of three blocks each runs its GELU once in
    forward and once in backward. In the first pass, where nothing is left out yet, the lean tape
    makes the input once more."""
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(), "lora(rank=2)", head=False))
    x = torch.randn(4, 8, dtype=torch.float64)
    want, counts = gradients(plain, x), []
    for _ in range(3):
        with Gelus() as seen:
            got = gradients(tuned, x)
        counts.append(seen.count)
        assert all(torch.equal(got[n], want[n]) for n in want)
    assert counts == [9, 6, 6]


def test_what_the_product_left_out_reads_comes_in_strips_where_it_is_large(monkeypatch):
    """Whole, it would stand beside its own gradient."""
    from burnish.blocks.tape import activations

    monkeypatch.setitem(activations.STRIP, "cpu", 40)
    rows, was = [], activations.Strips.__iter__

    def iterate(self):
        rows.append(self.shape)
        return was(self)

    monkeypatch.setattr(activations.Strips, "__iter__", iterate)
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(), "lora(rank=2)", head=False))
    x = torch.randn(4, 8, dtype=torch.float64)
    want = gradients(plain, x)
    rows.clear()
    for _ in range(3):
        got = gradients(tuned, x)
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=1e-12, atol=1e-12)
    assert len(rows) == 9                                # three blocks, each time
