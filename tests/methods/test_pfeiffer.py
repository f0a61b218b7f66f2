"""Pfeiffer: both placements written out in float64, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.recipe import parse
from burnish.testing.models import tiny


def inner(one, path, x, prefix="", act=torch.relu):
    """act(x W_down^T + b_down) W_up^T + b_up."""
    A, a, B, b = (one.theta[path, prefix + leaf] for leaf in
                  ("down.weight", "down.bias", "up.weight", "up.bias"))
    return act(x @ A.t() + a) @ B.t() + b


@pytest.mark.parametrize("model, site", [("bert", "bert.encoder.layer.{}.output.dense"),
                                         ("vit", "vit.layers.{}.mlp.fc2"),
                                         ("gpt2", "transformer.h.{}.mlp.c_proj")])
@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_plain_adds_to_what_the_mlp_made(beside, model, site, act):            # findings 6
    """F <- F + f(F), r = d // reduction."""
    one = beside(model, f"pfeiffer(reduction=5, act={act!r})")
    assert [p for p, _ in one.at("down.weight")] == [site.format(i) for i in range(2)]
    assert one.at("down.weight")[0][1].shape == (32 // 5, 32)
    for path, _ in one.at("down.weight"):
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: out + inner(one, path, out, act=getattr(torch, act)))
    one.agree()


def test_the_library_form_norms_twice(beside):                                 # findings 6
    """u = F + x,  out = LN(u + f(LN(u))), both times the frozen norm of the block."""
    one = beside("bert", "pfeiffer(reduction=4, placement='library')")
    paths = [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    assert [p for p, _ in one.at("inner.down.weight")] == paths
    for path in paths:
        norm = one.base.get_submodule(path)

        def forward(u, path=path, norm=norm):
            z = F.layer_norm(u, (32,), norm.weight, norm.bias, norm.eps)
            return F.layer_norm(u + inner(one, path, z, "inner."), (32,), norm.weight, norm.bias,
                                norm.eps)

        norm.forward = forward
    one.agree()


def test_a_reduction_beyond_the_width_leaves_one_channel():
    tuned = burnish.tune(tiny("vit")[0], "pfeiffer(reduction=64)", head=False)
    shapes = {tuple(p.shape) for p in tuned.parameters()}
    assert shapes == {(1, 32), (1,), (32, 1), (32,)}
    assert parse("pfeiffer(reduction=64)")[0].count(32) == 32 + 1 + 32 + 32


def test_the_defaults_are_the_librarys():
    m = parse("pfeiffer")[0]
    assert (m.reduction, m.placement, m.act, m.init) == (16, "plain", "relu", "bert")


@pytest.mark.parametrize("placement", ["plain", "library"])
def test_the_start_asked_for_is_the_start_given(placement):
    for init, spread in (("bert", 0.02), ("truncated", 0.0088), ("zero", 0.0)):
        torch.manual_seed(0)
        tuned = burnish.tune(tiny("bert")[0],
                             f"pfeiffer(reduction=1, placement={placement!r}, init={init!r})",
                             head=False)
        up = torch.cat([p.detach().flatten() for n, p in tuned.named_parameters()
                        if n.endswith("up.weight")])
        assert float(up.std()) == pytest.approx(spread, rel=0.06)
