"""The lean tape as a part of a recipe: it is on unless it is switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish


def waiting(recipe):
    """Bytes at the peak of a step of a norm, a GELU and two linears."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(),
                        nn.Linear(64, 16))
    return burnish.simulate(net, recipe, (torch.randn(64, 16),),
                            loss=lambda out, batch: out.square().mean()).peak_bytes


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(),
                         nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 4)).double()


PARTS = ["lora(rank=3)", "lora(rank=3, dropout=0.5)", "full", "nf4 + lora(rank=3)", "dora(rank=3)",
         "snella(rank=4, dropout=0.3, drop_path=0.3)", "miss(rank=2)", "lora(rank=3) + bitfit",
         "lora(rank=3) + offload", "vera(rank=8)", "oft(block=4)"]


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("part", PARTS)
def test_products_made_again_leave_every_gradient_as_it_is(part, level):
    """The same operation on the same numbers, and the same draws where it drops."""
    x = torch.randn(20, 16, dtype=torch.float64)
    found = []
    for k in (1, level):
        tuned = burnish.tune(model(), f"{part} + lean(level={k})")
        net = tuned.model.train()
        torch.manual_seed(1)
        for _, p in sorted(net.named_parameters()):
            if p.requires_grad:
                p.data.add_(torch.randn_like(p) * 0.1)
        torch.manual_seed(2)
        loss = net(x).square().sum()
        loss.backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, g in found[0].items():
        assert torch.equal(g, found[1][name]), name


def test_the_second_level_keeps_less():
    layers = [nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(),
              nn.Linear(64, 16), nn.LayerNorm(16)]
    net = nn.Sequential(*[copy.deepcopy(m) for _ in range(4) for m in layers])

    def peak(recipe):
        return burnish.simulate(net, recipe, (torch.randn(256, 16),),
                                loss=lambda out, batch: out.square().mean()).peak_bytes

    peaks = [peak(f"full + lean(level={k})") for k in (1, 2)]
    assert peaks[0] == peak("full")
    # of four hidden states level 1 keeps all; one stands at the peak of level 2
    assert peaks[1] <= peaks[0] - 2 * 256 * 64 * 4


def test_a_tuned_weight_changed_before_its_product_is_made_again_is_an_error():
    tuned = burnish.tune(model(), "lora(rank=3) + lean(level=2)")
    loss = tuned.model(torch.randn(20, 16, dtype=torch.float64)).square().sum()
    with torch.no_grad():
        next(p for p in tuned.model[2].parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_a_level_that_cannot_act_is_refused():
    for wrong, why in (("lean(level=4)", "1, 2, 3"), ("lean(on=False, level=2)", "nothing to act")):
        with pytest.raises(burnish.RecipeError, match=why):
            burnish.tune(model(), f"full + {wrong}")


def test_the_level_goes_with_the_part():
    net = model()
    tuned = burnish.tune(net, "lora(rank=3) + lean(level=3)")
    assert tuned.state.tape.level == 3
    tuned.add("other", "lora(rank=2)")
    tuned.use("other")
    tuned.remove(next(n for n in tuned.adapters if n != "other"))
    assert tuned.state.tape.level == 1


def test_it_is_on_unless_it_is_switched_off():
    assert waiting("full + lean") == waiting("full") < waiting("full + lean(on=False)")
