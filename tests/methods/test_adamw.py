"""AdamW: torch's own where nothing wraps it, and the same trajectory where something does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.update.composed import Composed
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse


def build(recipe, p, lr=1e-2, **kw):
    return compose([m.optimizer() for m in parse(recipe)], [("w", p)], lr, **kw)


def run(opt, p, steps=20):
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        opt.step()
    return p.detach()


def parameter(dtype=torch.float32):
    return nn.Parameter(torch.linspace(-1, 1, 5000, dtype=torch.float64).view(50, 100).to(dtype))


def test_plain_is_torch_fused():
    opt = build("adamw(betas=(0.8, 0.9), weight_decay=0.2)", parameter())
    assert type(opt) is torch.optim.AdamW and opt.defaults["fused"]
    assert opt.defaults["betas"] == (0.8, 0.9) and opt.param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("extra", ["", " + master_weights", " + step_in_backward"])
def test_steps_are_the_recurrence(extra):                                       # findings 6
    """Six updates in float64, written out, with decay, other betas and a falling rate."""
    b1, b2, eps, wd = 0.8, 0.95, 1e-3, 0.3
    g = torch.Generator().manual_seed(0)
    p = parameter(torch.float64)
    opt = build(f"adamw(betas=({b1}, {b2}), eps={eps}, weight_decay={wd}){extra}", p)
    W, m, v = p.detach().clone(), 0.0, 0.0
    for t in range(1, 7):
        lr = opt.param_groups[0]["lr"] = 1e-2 / t
        G = torch.randn(p.shape, generator=g, dtype=torch.float64) * 10.0 ** (t % 3 - 2)
        if "backward" in extra:
            (p * G).sum().backward()
        else:
            p.grad = G
        opt.step()
        m, v = b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2
        W = W * (1 - lr * wd) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(p.detach(), W, rtol=1e-12, atol=1e-13)


def test_defaults_are_torchs():
    m = parse("adamw")[0]
    stock = torch.optim.AdamW([parameter()]).defaults
    assert (m.betas, m.eps, m.weight_decay) == (stock["betas"], stock["eps"],
                                                stock["weight_decay"])
    assert m.state == "fp32" and m.state_bytes((3, 5), 2) == 2 * 15 * 2


@pytest.mark.parametrize("recipe", ["adamw + step_in_backward", "adamw + master_weights"])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_wrapped_is_the_same_trajectory(recipe, dtype, tol):
    p, q = parameter(dtype), parameter(dtype)
    mine, torchs = build(recipe, p, weight_decay=0.1), build("adamw", q, weight_decay=0.1)
    assert type(mine) is Composed and type(torchs) is torch.optim.AdamW
    torch.testing.assert_close(run(mine, p), run(torchs, q), rtol=tol, atol=tol)


def test_bf16_weights_with_a_master_follow_fp32():
    p, q = parameter(torch.bfloat16), parameter(torch.bfloat16)
    q = nn.Parameter(q.detach().float())
    run(build("adamw + master_weights", p, lr=1e-4), p, 50)
    torchs = build("adamw", q, lr=1e-4)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        q.grad = torch.randn(q.shape, generator=g, dtype=torch.float64).bfloat16().float()
        torchs.step()
    torch.testing.assert_close(p.detach(), q.detach().bfloat16(), rtol=2**-7, atol=1e-6)


def test_bf16_state_halves_the_bytes_and_v_still_moves():
    p = parameter(torch.bfloat16)
    opt = build("adamw(state='bf16')", p)
    run(opt, p, 30)
    state = opt.state[p]
    assert sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor)) == 4 * p.numel()
    v = state["exp_avg_sq"].double().mean() / (1 - 0.999**30)
    assert v == pytest.approx(1.0, rel=0.05)


def test_moments_in_another_form_are_counted_in_it():
    """Two moments of 5,000: 2 bytes in bf16; a byte and 4 per 256 in 8 bits; torch's own are of the
    weight's type."""
    from burnish.core.recipe import parse

    want = {"fp32": 4 * 5000, "bf16": 2 * 5000, "8bit": 5000 + 4 * 20, "4bit": 2500 + 4 * 40}
    for form, size in want.items():
        assert parse(f"adamw(state={form!r})")[0].state_bytes((50, 100), 4) == 2 * size, form
