"""SSF: a scale and a shift behind everything, written out in float64 with stock hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.recipe import parse
from burnish.methods.branch._sites import channel_axis
from burnish.testing.models import tiny

LINEAR = (nn.Linear, nn.Conv2d)


def scaled(one, path, axis):
    gain, shift = one.theta[path, "gain"], one.theta.get((path, "shift"))

    def hook(module, args, h):
        shape = (-1, 1, 1) if axis == 1 else (-1,)
        y = h * gain.view(shape)
        return y if shift is None else y + shift.view(shape)

    one.base.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize("model", ["vit", "bert", "gpt2", "llama", "cnn", "convnext"])
def test_the_equation_written_out(beside, model):                              # findings 6
    """h <- gamma h + beta per channel, behind every linear, convolution and norm of the body."""
    one = beside(model, "ssf")
    for path in {p for p, _ in one.theta}:
        module = one.base.get_submodule(path)
        maps = isinstance(module, nn.Conv2d | nn.BatchNorm2d) or \
            getattr(module, "data_format", "") == "channels_first"
        scaled(one, path, 1 if maps else -1)
    one.agree()


def test_every_site_and_no_other():
    """Linears, convolutions and norms; not the head, not a table of embeddings."""
    net, _ = tiny("bert")
    want = {n for n, m in net.named_modules()
            if isinstance(m, (*LINEAR, nn.LayerNorm)) and not n.startswith("classifier")}
    tuned = burnish.tune(net, "ssf", head=False)
    assert {n.partition(".burnish")[0] for n, _ in tuned.named_parameters()} == want


def test_a_router_is_left_as_it_is():
    tuned = burnish.tune(tiny("mixtral")[0], "ssf", head=False)
    paths = {n.partition(".burnish")[0] for n, _ in tuned.named_parameters()}
    assert paths and not any(p.endswith(("gate", "router", "lm_head", "embed_tokens"))
                             for p in paths)


def test_a_single_layer_is_a_model():
    """The root itself has the empty name."""
    net = nn.Linear(4, 3).double()
    tuned = burnish.tune(net, "ssf", head=False, targets=None)
    (gain, shift) = tuned.parameters()
    with torch.no_grad():
        gain.copy_(torch.tensor([1.0, 2.0, 3.0]))
        shift.copy_(torch.tensor([4.0, 5.0, 6.0]))
    x = torch.randn(2, 4, dtype=torch.float64)
    want = (x @ net.weight.t() + net.bias) * gain.double() + shift.double()
    torch.testing.assert_close(net(x), want)
    assert net(x).shape == (2, 3)


def test_a_bare_norm_gets_its_own_scale():
    """An RMS norm has no shift of its own, so none is added that could not fold."""
    tuned = burnish.tune(tiny("llama")[0], "ssf(targets='norm')", head=False)
    names = [n.rpartition(".")[2] for n, _ in tuned.named_parameters()]
    assert names and set(names) == {"gain"}


def test_a_module_names_its_matrices_and_its_norms():
    tuned = burnish.tune(tiny("bert")[0], "ssf(targets='layer.0.attention')", head=False)
    stems = {n.partition(".burnish")[0].partition("attention.")[2] for n, _ in
             tuned.named_parameters()}
    assert stems == {"self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"}


def test_counts_and_defaults():
    m = parse("ssf")[0]
    assert m.init == "identity" and m.count(32) == 64 and m.count(32, shift=False) == 32
    with pytest.raises(burnish.RecipeError, match="no linear, convolution or norm"):
        burnish.tune(nn.Sequential(nn.Embedding(4, 4)), "ssf")


@pytest.mark.parametrize("module, axis", [
    (nn.Conv2d(3, 4, 3), 1), (nn.BatchNorm2d(4), 1), (nn.GroupNorm(2, 4), 1),
    (nn.Conv1d(3, 4, 3), 1), (nn.Linear(3, 4), -1), (nn.LayerNorm(4), -1)],
    ids=lambda v: type(v).__name__)
def test_the_axis_of_the_channels(module, axis):
    assert channel_axis(module) == axis


def test_other_peoples_norms_of_maps():
    class LayerNorm2d(nn.LayerNorm):
        pass

    first = nn.LayerNorm(4)
    first.data_format = "channels_first"
    assert channel_axis(LayerNorm2d(4)) == channel_axis(first) == 1


def test_a_pattern_names_the_norms_beside_the_matrices():
    tuned = burnish.tune(tiny("bert")[0], "ssf(targets='*layer.0.attention.output*')", head=False)
    assert {n.partition(".burnish")[0].rpartition(".")[2] for n, _ in tuned.named_parameters()} \
        == {"dense", "LayerNorm"}


def test_a_single_layer_is_named_by_its_weight():
    net = nn.Linear(4, 3)
    assert len(list(burnish.tune(net, "ssf(targets='weight')", head=False).parameters())) == 2
