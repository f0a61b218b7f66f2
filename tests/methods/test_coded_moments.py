"""8- and 4-bit Adam: each step is Adam's on what the codes stand for, and codes are neighbours.

The map, the blocks and the recurrence are written out here in float64; only the draw between two
neighbouring entries is the library's, and its mean is checked.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from burnish.blocks.update.step import compose
from burnish.core.recipe import parse

F64 = torch.float64


def entries(bits, signed):
    """10^-k times the middles of equal parts of [0.1, 1], zero and one: 2^bits of them."""
    found = {0.0, 1.0}
    for k in range(bits - 1):
        parts = 2 ** (bits - 2 - k if signed else bits - 1 - k)
        for i in range(parts):
            middle = (0.1 + 0.9 * (2 * i + 1) / (2 * parts)) / 10**k
            found |= {middle, -middle} if signed else {middle}
    assert len(found) == 2**bits
    return torch.tensor(sorted(found), dtype=F64)


def decoded(state, name, bits, block, n):
    """The moment that the optimizer's tensors stand for, and the scale of each element."""
    signed = f"{name}.codes" in state
    codes = state[f"{name}.codes" if signed else f"{name}.ucodes"].long()
    if bits == 4:
        codes = torch.stack([codes % 16, codes // 16], 1).flatten()
    scale = state[f"{name}.absmax"].to(F64).repeat_interleave(block)[:n]
    return entries(bits, signed)[codes[:n]] * scale, scale


def neighbours(x, scale, bits, signed):
    """The entries below and above x (scaled), so that x lies between them."""
    table = entries(bits, signed)
    part = x / scale
    above = torch.searchsorted(table, part.clamp(table[0], table[-1])).clamp(1, len(table) - 1)
    return table[above - 1] * scale, table[above] * scale


@pytest.mark.parametrize("recipe, bits, block", [("adam8bit", 8, 256), ("adam4bit", 4, 128)])
def test_steps_are_adams_on_what_the_codes_stand_for(recipe, bits, block):      # findings 6, 2.4
    """m <- b1 m + (1 - b1) g, v alike, both from the stored codes; W as AdamW with decay and a
    falling rate; what is stored is one of the two entries around each moment, |.| <= max."""
    n, b1, b2, eps, wd = 5000, 0.8, 0.95, 1e-6, 0.1              # the last block is short
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(n, generator=g))
    opt = compose([parse(f"{recipe}(betas=({b1}, {b2}), eps={eps}, weight_decay={wd})")[0]
                   .optimizer()], [("w", p)], 1e-2)
    m, v = torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
    for t in range(1, 7):
        lr = opt.param_groups[0]["lr"] = 1e-2 / t
        G = torch.randn(n, generator=g) * 10.0 ** torch.randint(-2, 2, (n,), generator=g)
        W = p.detach().to(F64)
        p.grad = G.clone()
        opt.step()
        G = G.to(F64)
        m, v = b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(p.detach().to(F64), W * (1 - lr * wd) - lr * u, rtol=1e-5,
                                   atol=1e-7)
        state = opt.state[p]
        for name, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            signed = name == "exp_avg"
            got, scale = decoded(state, name, bits, block, n)
            most = torch.nn.functional.pad(exact.abs(), (0, -n % block)).view(-1, block).amax(1)
            torch.testing.assert_close(state[f"{name}.absmax"].to(F64), most, rtol=1e-6, atol=0)
            low, high = neighbours(exact, scale, bits, signed)
            near = 1e-6 * scale
            one_of = ((got - low).abs() <= near) | ((got - high).abs() <= near)
            assert one_of.all(), name
            if not signed:
                assert (got[exact > 0] > 0).all(), "a second moment that is not zero never is"
        m, v = decoded(state, "exp_avg", bits, block, n)[0], \
            decoded(state, "exp_avg_sq", bits, block, n)[0]


@pytest.mark.parametrize("recipe, bits, block", [("adam8bit", 8, 256), ("adam4bit", 4, 128)])
def test_the_draw_between_neighbours_has_the_right_mean(recipe, bits, block):   # findings 2.4
    """Over equal elements the mean of the codes is the moment, within five deviations."""
    n, b1 = 64 * 256, 0.9
    G = torch.full((n,), 0.37)
    G[::block] = 1.0                                           # the largest of every block
    p = nn.Parameter(torch.zeros(n))
    opt = compose([parse(recipe)[0].optimizer()], [("w", p)], 1e-3)
    p.grad = G.clone()
    opt.step()
    got, scale = decoded(opt.state[p], "exp_avg", bits, block, n)
    x = (1 - b1) * 0.37
    (low,), (high,) = neighbours(torch.tensor([x], dtype=F64), scale[1:2], bits, True)
    up = float((x - low) / (high - low))
    rest = got[torch.arange(n) % block != 0]
    spread = float(high - low) * math.sqrt(up * (1 - up) / len(rest))
    assert 0.05 < up < 0.95 and abs(float(rest.mean()) - x) < 5 * spread


@pytest.mark.parametrize("recipe", ["adam8bit", "adam4bit"])
def test_what_is_small_is_plain_adamw(recipe):
    """Below 4,096 elements nothing is coded: torch's AdamW with the same words, to rounding."""
    words = "(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)"
    g = torch.Generator().manual_seed(0)
    W = torch.randn(63, 65, generator=g)
    p, q = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    mine = compose([parse(recipe + words)[0].optimizer()], [("w", p)], 1e-2)
    stock = torch.optim.AdamW([q], 1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    for _ in range(6):
        p.grad = torch.randn(63, 65, generator=g)
        q.grad = p.grad.clone()
        mine.step()
        stock.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recipe", ["adam8bit", "adam4bit"])
def test_defaults_and_declared_bytes(recipe):
    m = parse(recipe)[0]
    assert (m.betas, m.eps, m.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    for shape in ((4095,), (4096,), (64, 65), (4097, 1), (5001,)):
        p = nn.Parameter(torch.zeros(shape))
        opt = compose([m.optimizer()], [("w", p)], 1e-3)
        p.grad = torch.ones_like(p)
        opt.step()
        held = sum(v.nbytes for v in opt.state[p].values() if isinstance(v, torch.Tensor))
        assert held == m.state_bytes(shape, 4), shape
    with_lion = [m.optimizer(), parse("lion")[0].optimizer()]
    with pytest.raises(Exception, match=f"{recipe} and lion"):
        compose(with_lion, [("w", nn.Parameter(torch.zeros(3)))], 0.1)
