"""Houlsby: the equation written out, in float64, on blocks that normalise last and first."""

from __future__ import annotations

import math

import pytest
import torch

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.testing.models import tiny


def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


ACT = {"gelu": gelu, "relu": lambda z: z.clamp(min=0), "tanh": torch.tanh}


def adapted(one, path, act):
    """F -> a(F) = F + act(F W_down^T + b_down) W_up^T + b_up behind a module of the base."""
    t = {leaf: one.theta[path, leaf] for leaf in ("down.weight", "down.bias", "up.weight",
                                                  "up.bias")}

    def hook(module, args, F):
        z = F @ t["down.weight"].t() + t["down.bias"]
        return F + ACT[act](z) @ t["up.weight"].t() + t["up.bias"]

    one.base.get_submodule(path).register_forward_hook(hook)


SITES = {"bert": ["bert.encoder.layer.{}.attention.output.dense",
                  "bert.encoder.layer.{}.output.dense"],
         "vit": ["vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp.fc2"],
         "llama": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"]}


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("model", SITES)
def test_the_equation_written_out(beside, model, act):                         # findings 6
    """a(h) behind both sub-layers, before the residual; the norms train too."""
    one = beside(model, f"houlsby(bottleneck=4, act={act!r})")
    paths = [s.format(i) for i in range(2) for s in SITES[model]]
    assert [p for p, _ in one.at("down.weight")] == paths
    norms = sum(p.numel() for (_, rest), p in one.theta.items() if not rest)
    assert norms == 5 * 32 * (1 if model == "llama" else 2)
    for path in paths:
        adapted(one, path, act)
    one.agree()


def test_without_norms_only_the_bottlenecks_train(beside):
    one = beside("bert", "houlsby(bottleneck=4, norms=False)")
    assert all(rest for _, rest in one.theta) and len(one.theta) == 16
    for path, _ in one.at("down.weight"):
        adapted(one, path, "gelu")
    one.agree()


def drawn(init):
    tuned = burnish.tune(tiny("bert")[0], f"houlsby(bottleneck=32, init={init!r})", head=False)
    made = [m for m in tuned.model.modules() if isinstance(m, Bottleneck)]
    return (torch.cat([torch.stack([m.down.weight, m.up.weight]).detach().flatten()
                       for m in made]),
            torch.cat([torch.cat([m.down.bias, m.up.bias]).detach() for m in made]))


@pytest.mark.parametrize("init, spread, most", [("bert", 0.02, None), ("truncated", 0.0088, 0.02)])
def test_the_starts(init, spread, most):
    """N(0, 0.02^2); or of 0.01 cut at two of them, whose own deviation is 0.88 of it."""
    weights, biases = drawn(init)
    assert not biases.any()
    assert float(weights.std()) == pytest.approx(spread, rel=0.03)
    assert float(weights.mean().abs()) < 4 * spread / weights.numel() ** 0.5
    assert most is None or float(weights.abs().max()) <= most


def test_the_defaults_are_the_published_ones():
    m = burnish.core.recipe.parse("houlsby")[0]
    assert (m.bottleneck, m.act, m.init, m.norms) == (64, "gelu", "bert", True)
    with pytest.raises(burnish.RecipeError, match="no attention or MLP"):
        burnish.tune(tiny("mlp")[0], "houlsby")


def test_norms_are_left_out_of_weight_decay():                                # findings 2.6
    tuned = burnish.tune(tiny("vit")[0], "houlsby(bottleneck=4)", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.3)
    names = {id(p): n for n, p in tuned.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    norms = {n for n in decay if "norm" in n}
    assert norms and all(decay[n] == 0 for n in norms)
    assert all(decay[n] == 0.3 for n in decay if n.endswith(("down.weight", "up.weight")))


@pytest.mark.parametrize("init", ["bert", "truncated", "zero"])
def test_every_start_can_be_simulated(init):
    net, batch = tiny("vit")
    report = burnish.simulate(net, f"houlsby(bottleneck=4, init={init!r})", batch)
    assert report.peak_bytes > 0
