"""A block that keeps what is costly and makes the rest again: stock gradients, no product twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.tape.executor import checkpoint
from burnish.blocks.tape.saved import Tape

B, N, D = 2, 6, 8


class Written(nn.Module):
    """A block in small operations: attention, a norm and a GELU written out, dropout."""

    def __init__(self, p=0.0, fused=False):
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.gain, self.p, self.fused = nn.Parameter(torch.ones(D)), p, fused

    def norm(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.gain

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(B, N, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = F.dropout((q @ k.mT / 2).softmax(-1), self.p) @ v
        x = x + F.dropout(self.o(a.transpose(1, 2).reshape(B, N, D)), self.p)
        h = self.up(self.norm(x))
        h = h * 0.5 * (1 + torch.tanh(0.8 * (h + 0.04 * h * h * h)))
        return x + self.down(h)


def given():
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, N, D, dtype=torch.float64, generator=g).requires_grad_()


def gradients(block, x, run):
    torch.manual_seed(3)
    y = run(block, x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def plain(block, x):
    return block(x)


def selective(block, x, tape=None):
    tape = tape or Tape()
    with tape.recording():
        return checkpoint(block, block, (x,), {}, tape, selective=True)


def same(a, b):
    for s, t in zip(a, b, strict=True):
        assert torch.equal(s, t)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_bit_equal(p, fused):                                     # findings 3.9
    torch.manual_seed(0)
    block, x = Written(p, fused).double(), given()
    same(gradients(block, x, plain), gradients(block, x, selective))


class Costly(TorchDispatchMode):
    """Counts products and attentions."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.n += "mm" in name or "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_costly_runs_again(fused):                                      # findings 3.9
    """As many operations as a plain step; checkpoint makes a forward more."""
    block, x, counted = Written(fused=fused).double(), given(), {}
    runs = {"plain": plain, "selective": selective,
            "whole": lambda b, x: checkpoint(b, b, (x,), {}, Tape())}
    for name, run in runs.items():
        with Costly() as seen:
            run(block, x).square().sum().backward()
        counted[name] = seen.n
    assert counted["selective"] == counted["plain"] < counted["whole"]


def kept(block, x, run):
    """Hidden states that wait for backward, parameters excluded."""
    owned, alive = {p.untyped_storage()._cdata for p in block.parameters()}, {}

    def see(t):
        if (key := t.untyped_storage()._cdata) not in owned:
            alive[key] = t.untyped_storage().nbytes(), t
        return t

    def pack(t):
        see(t)
        return t

    if run is plain:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x)
    else:
        tape = Tape(lean=False)
        before = tape.pack
        tape.pack = lambda t: (see(t), before(t))[1]
        selective(block, x, tape)
    return sum(n for n, _ in alive.values()) / (B * N * D * 8)


def test_products_and_attention_are_kept_and_nothing_else():                    # findings 3.9
    """x, q k v, the scores of attention and what they make, o, up. What `down` makes goes into the
    sum at the end, which nothing in the block reads."""
    block, x = Written().double(), given()
    scores = 2 * N * N / (N * D)                    # of two heads
    assert kept(block, x, selective) == 1 + 3 + scores + 1 + 1 + 4
    assert kept(block, x, plain) > 25
    fused = kept(Written(fused=True).double(), x, selective)
    assert 1 + 3 + 1 + 1 + 4 < fused < 1 + 3 + 1 + 1 + 4 + 0.6      # with its log-sum-exp


class Changes(nn.Module):
    """Products that are changed in place, before and after somebody reads them."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(D, D), nn.Linear(D, D), how
        if how == "product":
            self.c, self.d = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))

    def forward(self, x):
        y = self.a(x)
        if self.how == "activation":
            y = F.relu(y, inplace=True)
        elif self.how == "product":
            y.view(-1, D).addmm_((x @ self.c).view(-1, 2), self.d)
        elif self.how == "a part":
            y[:, 1:3].mul_(2)
        elif self.how == "after reading":
            z = y + 1
            y = y.mul_(3) * z.detach()
        elif self.how == "twice":
            y = F.relu(y.add_(1), inplace=True)
        return self.b(y) + x


@pytest.mark.parametrize("how", ["activation", "product", "a part", "after reading", "twice"])
def test_what_is_changed_in_place_is_answered_as_it_ends(how):
    torch.manual_seed(0)
    block, x = Changes(how).double(), given()
    same(gradients(block, x, plain), gradients(block, x, selective))


class Weights(nn.Module):
    """A weight that is made by a product of its own."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(8, 64))

    def forward(self, x):
        return torch.tanh(x @ (self.w @ self.u))


def test_a_product_that_makes_a_weight_is_not_kept():
    """Nothing of size out x in may wait for backward."""
    block = Weights().double()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    seen = []
    tape = Tape(lean=False)
    before = tape.pack
    tape.pack = lambda t: (seen.append(t.shape), before(t))[1]
    y = selective(block, x, tape)
    assert sorted(map(tuple, seen)) == [(3, 64), (3, 64)]       # x, and the product that tanh reads
    same(torch.autograd.grad(y.sum(), [x, block.w], retain_graph=True),
         torch.autograd.grad(block(x).sum(), [x, block.w]))
    y.sum().backward()


class Fickle(nn.Module):
    """It takes another way when it runs again."""

    def __init__(self, change):
        super().__init__()
        self.a, self.runs, self.change = nn.Linear(D, D), 0, change

    def forward(self, x):
        self.runs += 1
        if self.runs > 1 and not self.change:
            return self.a(x.view(-1, D).repeat(2, 1)[:B * N]).view_as(x)
        y = self.a(x)
        return y.mul_(2) if self.runs > 1 else y


def test_a_block_that_does_something_else_runs_whole_or_says_so():
    x = given()
    block = Fickle(change=False).double()
    y = selective(block, x)
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, block.a.weight.sum(0).expand_as(x))
    y = selective(Fickle(change=True).double(), x)
    with pytest.raises(RuntimeError, match="something else when it ran again"):
        y.sum().backward()


def test_backward_may_come_twice():
    torch.manual_seed(0)
    block, x = Written(0.3).double(), given()
    torch.manual_seed(3)
    y = selective(block, x).square().sum()
    torch.manual_seed(3)
    want = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    for keep in (True, False):
        same(want, torch.autograd.grad(y, [x, *block.parameters()], retain_graph=keep))


class Looks(nn.Module):
    """It decides by a number of what a product has made, which else goes into a sum alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x)))
        scale = 2 if float(y.flatten()[0]) > 0 else 3
        return x * scale + y


def test_a_number_that_python_reads_is_there_again():
    torch.manual_seed(0)
    block, x = Looks().double(), given()
    for sign in (1, -1):
        with torch.no_grad():
            block.b.bias.fill_(10.0 * sign)
        same(gradients(block, x, plain), gradients(block, x, selective))
