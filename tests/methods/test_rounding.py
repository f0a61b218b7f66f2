"""How half-precision weights are rounded: kahan, master_weights, stochastic_rounding, written out.

Each recurrence stands here once more, with bf16 rounding by integer arithmetic of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse

F64, BF16 = torch.float64, torch.bfloat16
N = 4000


def nearest(x):
    """float64 to the nearest bf16 number (8 bits of mantissa), ties to even, as float64."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 256), exponent - 8)


def ends(x):
    """The bf16 numbers around x: (below, above)."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.floor(mantissa * 256), exponent - 8), \
        torch.ldexp(torch.ceil(mantissa * 256), exponent - 8)


def start():
    g = torch.Generator().manual_seed(1)
    return (torch.randn(N, generator=g) * 0.1).to(BF16)


def gradients(steps):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(N, generator=g).to(BF16) for _ in range(steps)]


def run(recipe, Gs, lr=1e-4, each=lambda p, opt: None):
    p = nn.Parameter(start())
    opt = compose([m.optimizer() for m in parse(recipe)], [("w", p)], lr)
    for t, G in enumerate(Gs, 1):
        opt.param_groups[0]["lr"] = lr / t                      # a falling rate
        p.grad = G.clone()
        opt.step()
        each(p, opt)
    return p.detach(), opt


def adam(steps, wd, lr):
    """(decay factor, lr u) of each step of Adam on these gradients, in float64."""
    m = v = torch.zeros(N, dtype=F64)
    out = []
    for t, G in enumerate(gradients(steps), 1):
        g = G.to(F64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        out.append((1 - lr / t * wd, lr / t * u))
    return out


def test_the_rounding_of_this_file_is_torchs():
    x = torch.randn(10000, dtype=F64).float()
    torch.testing.assert_close(nearest(x.to(F64)), x.to(BF16).to(F64), rtol=0, atol=0)


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_a_master_takes_the_steps_and_the_weight_is_its_image(wd):              # findings 6
    seen = []
    got, opt = run(f"adamw(weight_decay={wd}) + master_weights", gradients(8),
                   each=lambda p, o: seen.append(p.detach().clone()))
    M = start().to(F64)
    for image, (keep, step) in zip(seen, adam(8, wd, 1e-4), strict=True):
        M = M * keep - step
        below, above = ends(M)
        off = (image.to(F64) - nearest(M)).abs()
        assert float((off > 0).double().mean()) < 1e-3, "but where fp32 rounds M over a middle"
        assert (off <= above - below).all()
    assert torch.equal(got, seen[-1])
    held = sum(v.nbytes for v in opt.state.values().__iter__().__next__().values()
               if isinstance(v, torch.Tensor))
    assert held == 12 * N == parse("master_weights")[0].state_bytes((N,), 2)


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_kahan_carries_what_rounding_cut_off(wd):                               # findings 6
    """y = rn(c - lr u), t = rn(W + y), c <- rn(y - (t - W)): from what it held before, each
    step exactly, but for the last bit where fp32 arithmetic stands on a middle."""
    held = [(start().to(F64), torch.zeros(N, dtype=F64))]

    def see(p, opt):
        c, = [v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)
              and v.dtype == BF16 and v.numel() == N]
        held.append((p.detach().to(F64), c.to(F64)))

    run(f"adamw(weight_decay={wd}) + kahan", gradients(8), each=see)
    for (W, c), (W2, c2), (keep, step) in zip(held, held[1:], adam(8, wd, 1e-4), strict=False):
        y = nearest(c - step - (1 - keep) * W)
        t = nearest(W + y)
        right = (W2 == t) & (c2 == nearest(y - (t - W)))
        assert float(right.double().mean()) > 0.98
        # what both hold together is the step, to the last bits of y and of fp32
        total = (W2 + c2) - (W + c - step - (1 - keep) * W)
        assert (total.abs() <= 2.0**-8 * y.abs() + 2.0**-22 * W.abs() + 1e-30).all()
    exact = start().to(F64)
    for keep, step in adam(8, wd, 1e-4):
        exact = exact * keep - step
    together = held[-1][0] + held[-1][1]
    assert float((together - exact).abs().max()) < 2.0**-15 * float(exact.abs().max())


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(wd):     # findings 6
    """W is one of the two bf16 numbers around the exact step, up with the share of the way."""
    held = [start().to(F64)]
    run(f"adamw(weight_decay={wd}) + stochastic_rounding", gradients(8),
        each=lambda p, opt: held.append(p.detach().to(F64)))
    for W, W2, (keep, step) in zip(held, held[1:], adam(8, wd, 1e-4), strict=False):
        x = W * keep - step
        below, above = ends(x)
        near = 1e-6 * x.abs()
        assert (((W2 - below).abs() <= near) | ((W2 - above).abs() <= near)).all()
        share = ((x - below) / (above - below)).nan_to_num(0)
        spread = float(((above - below) ** 2 * share * (1 - share)).sum().sqrt())
        assert abs(float((W2 - x).sum())) < 5 * spread
        ups = float(((W2 - below) > (above - W2)).double().sum())
        assert abs(ups - float(share.sum())) < 5 * float((share * (1 - share)).sum().sqrt()) + 1


def test_the_noise_is_of_seed_tensor_step_and_element():
    """Another seed or name rounds otherwise; the same ones alike; torch's generator stands."""
    def end(seed, name):
        p = nn.Parameter(start())
        opt = compose([m.optimizer() for m in parse("sgd + stochastic_rounding")], [(name, p)],
                      1e-5, seed=seed)
        before = torch.get_rng_state()
        for G in gradients(2):
            p.grad = G.clone()
            opt.step()
        assert torch.equal(before, torch.get_rng_state())
        return p.detach()

    first = end(0, "w")
    assert torch.equal(first, end(0, "w"))
    assert not torch.equal(first, end(1, "w")) and not torch.equal(first, end(0, "v"))


def test_full_precision_weights_need_none_and_fp16_has_no_draw():
    for recipe, extra in (("kahan", 0), ("master_weights", 0)):
        p = nn.Parameter(torch.randn(8))
        q = nn.Parameter(p.detach().clone())
        opt = compose([m.optimizer() for m in parse(f"adamw + {recipe}")], [("w", p)], 1e-2)
        stock = torch.optim.AdamW([q], 1e-2)
        for _ in range(5):
            p.grad = torch.randn(8)
            q.grad = p.grad.clone()
            opt.step()
            stock.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert parse(recipe)[0].state_bytes((8,), 4) == 64 + extra
        held = sum(v.nbytes for v in opt.state[p].values()
                   if isinstance(v, torch.Tensor) and v.numel() > 1)
        assert held == 64
    half = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(burnish.BurnishError, match="bf16|float16|fp16"):
        opt = compose([m.optimizer() for m in parse("sgd + stochastic_rounding")],
                      [("w", half)], 1e-2)
        half.grad = torch.ones_like(half)
        opt.step()


@pytest.mark.parametrize("one, other", [("kahan", "master_weights"),
                                        ("master_weights", "stochastic_rounding"),
                                        ("kahan", "stochastic_rounding")])
def test_there_is_one_rounding(one, other):
    with pytest.raises(burnish.RecipeError, match=f"{one} and {other}|{other} and {one}"):
        parse(f"full + {one} + {other}")
    spec = [m.optimizer() for n in (one, other) for m in parse(n)]
    with pytest.raises(burnish.RecipeError, match=f"{one} and {other}"):
        compose(spec, [("w", nn.Parameter(torch.zeros(4, dtype=BF16)))], 0.1)
    assert math.prod((3, 4)) * 8 == parse("stochastic_rounding")[0].state_bytes((3, 4), 2)
