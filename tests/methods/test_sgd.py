"""SGD: the recurrence written out in float64, and torch's own, in every way it can be driven."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse

F64 = torch.float64


def gradients(steps, shape=(6, 9)):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=F64) for _ in range(steps)]


def start(shape=(6, 9)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)


def rate(t):
    return 0.1 / (1 + t)


def ours(recipe, W, Gs):
    p = nn.Parameter(W.clone())
    opt = compose([m.optimizer() for m in parse(recipe)], [("w", p)], 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    for G in Gs:
        p.grad = G.clone()
        opt.step()
        schedule.step()
    return p.detach(), opt


@pytest.mark.parametrize("beside", ["", " + step_in_backward", " + master_weights"])
@pytest.mark.parametrize("mu, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("wd", [0.0, 0.2])
def test_steps_are_the_recurrence(mu, nesterov, wd, beside):                    # findings 6
    """b <- mu b + (g + wd W);  W <- W - lr b, or - lr (g + wd W + mu b) ahead; a falling rate."""
    W, Gs = start(), gradients(6)
    text = f"sgd(momentum={mu}, nesterov={nesterov}, weight_decay={wd}){beside}"
    if "backward" in beside:
        p = nn.Parameter(W.clone())
        opt = compose([m.optimizer() for m in parse(text)], [("w", p)], 0.1)
        for t, G in enumerate(Gs):
            opt.param_groups[0]["lr"] = rate(t)
            (p * G).sum().backward()
            opt.step()
        got = p.detach()
    else:
        got, _ = ours(text, W, Gs)
    b = torch.zeros_like(W)
    for t, G in enumerate(Gs):
        g = G + wd * W
        b = mu * b + g
        W = W - rate(t) * (g + mu * b if nesterov else b)
    torch.testing.assert_close(got, W, rtol=1e-13, atol=1e-13)


def test_plain_is_torchs_own_and_keeps_nothing():
    p, opt = ours("sgd", start(), gradients(2))
    assert type(opt) is torch.optim.SGD
    group = opt.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0, False, 0)
    assert sum(v.numel() for s in opt.state.values() for v in s.values()
               if isinstance(v, torch.Tensor)) == 0


@pytest.mark.parametrize("state, per", [("fp32", 4), ("bf16", 2), ("8bit", 1 + 4 / 256),
                                        ("4bit", 0.5 + 4 / 128)])
def test_the_momentum_is_kept_in_the_form_asked_for(state, per):
    Gs = [g.float() for g in gradients(1, (64, 256))]
    _, opt = ours(f"sgd(momentum=0.9, state={state!r})", torch.zeros(64, 256), Gs)
    (held,) = opt.state.values()
    assert sum(v.nbytes for v in held.values() if isinstance(v, torch.Tensor)) == per * 64 * 256


def test_looking_ahead_of_nothing_is_refused():
    with pytest.raises(burnish.RecipeError, match="there is none.*momentum=0.9"):
        parse("sgd(nesterov=True)")


def test_two_rules_are_refused_by_name():
    with pytest.raises(burnish.RecipeError, match="sgd and lion|lion and sgd"):
        parse("full + sgd + lion")
    from burnish.blocks.update.rules import Lion
    from burnish.blocks.update.step import Inner

    spec = [parse("sgd(momentum=0.9, state='bf16')")[0].optimizer(), Inner(rule=Lion())]
    with pytest.raises(burnish.RecipeError, match="sgd and lion"):
        compose(spec, [("w", nn.Parameter(torch.zeros(3)))], 0.1)


def test_its_state_is_the_momentum_in_the_form_asked_for():
    from burnish.core.recipe import parse

    assert parse("sgd")[0].state_bytes((50, 100), 4) == 0
    for form, size in {"fp32": 20000, "bf16": 10000, "8bit": 5000 + 4 * 20}.items():
        made = parse(f"sgd(momentum=0.9, state={form!r})")[0]
        assert made.state_bytes((50, 100), 4) == size, form
