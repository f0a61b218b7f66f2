"""Stepping inside backward: the weights are those of the same rule stepped afterwards."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.recipe import parse
from burnish.testing.models import tiny


@pytest.mark.parametrize("rule", ["sgd", "adamw(weight_decay=0.2)", "lion(weight_decay=0.2)",
                                  "sgd(momentum=0.9)"])
@pytest.mark.parametrize("model", ["vit", "llama"])
def test_bit_for_bit_that_of_the_rule_alone(model, rule):
    """Five updates with a falling rate; tied weights step once, with the whole gradient."""
    ends = []
    for recipe in (f"full + {rule} + master_weights", f"full + {rule} + step_in_backward"):
        net, batch = tiny(model, dtype=torch.float64)
        net.eval()
        tuned = burnish.tune(net, recipe)
        opt = tuned.optimizer(lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
        for _ in range(5):
            net(**batch).loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        ends.append({n: p.detach().clone() for n, p in net.named_parameters()})
    for n, p in ends[0].items():
        torch.testing.assert_close(ends[1][n], p, rtol=1e-12, atol=1e-14, msg=n)


def test_against_stock_torch_alone():
    """torch.optim.SGD behind a whole backward, on an untouched copy."""
    net, batch = tiny("vit", dtype=torch.float64)
    stock, _ = tiny("vit", dtype=torch.float64)
    stock.load_state_dict(net.state_dict())
    for m in (net, stock):
        m.eval()
    tuned = burnish.tune(net, "full + sgd(momentum=0.9, weight_decay=0.1) + step_in_backward")
    opt = tuned.optimizer(lr=1e-2)
    other = torch.optim.SGD(stock.parameters(), 1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        net(**batch).loss.backward()
        assert all(p.grad is None for p in net.parameters()), "each is freed when it is used"
        opt.step()
        other.zero_grad()
        stock(**batch).loss.backward()
        other.step()
    for (n, a), b in zip(net.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=n)


def test_it_is_a_site_and_not_a_rule():
    (m,) = parse("step_in_backward")
    assert m.state_bytes((3, 5), 4) == 8 * 15, "beside AdamW, which a recipe without a rule takes"
    with pytest.raises(burnish.RecipeError, match="step_in_backward"):
        parse("full + step_in_backward + step_in_backward")
    net, batch = tiny("vit")
    opt = burnish.tune(net, "full + step_in_backward").optimizer(lr=1e-3)
    net(**batch).loss.backward()
    with pytest.raises(burnish.BurnishError, match="step_in_backward|backward"):
        net(**batch).loss.backward()                         # nobody stepped in between
    assert opt.param_groups[0]["lr"] == 1e-3
