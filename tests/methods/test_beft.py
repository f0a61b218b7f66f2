"""BEFT: a bias is added to the values of every attention, written out in float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.errors import CheckError
from burnish.core.recipe import make
from burnish.testing import stir
from burnish.testing.models import tiny

#: model -> (path of what makes values, its runs of rows)
SITES = {
    "llama": ("model.layers.{}.self_attn.v_proj", None),
    "bert": ("bert.encoder.layer.{}.attention.self.value", None),
    "gpt2": ("transformer.h.{}.attn.c_attn", (64, 96)),
}


@pytest.mark.parametrize("model", SITES)
def test_the_equation_written_out(beside, model):
    one = beside(model, "beft")
    path, rows = SITES[model]
    named = [path.format(i) for i in range(2)]
    assert named == [p for p, _ in one.theta]
    for path in named:
        def out(m, args, y, path=path):
            a, b = rows or (0, y.shape[-1])
            shift = one.theta[path, "shift"]
            return torch.cat([y[..., :a], y[..., a:b] + shift, y[..., b:]], -1)

        one.base.get_submodule(path).register_forward_hook(out)
    one.agree()


def test_values_of_cross_attention_too(beside):
    one = beside("t5", "beft")
    kinds = sorted({".".join(p.split(".")[-2:]) for p, _ in one.theta})
    assert kinds == ["EncDecAttention.v", "SelfAttention.v"]
    for path, shift in one.at("shift"):
        one.base.get_submodule(path).register_forward_hook(lambda m, a, y, s=shift: y + s)
    one.agree()


def test_what_is_named_instead(beside):
    one = beside("llama", "beft(targets='q@0,down@1')")
    assert [p for p, _ in one.theta] == ["model.layers.0.self_attn.q_proj",
                                         "model.layers.1.mlp.down_proj"]
    for path, shift in one.at("shift"):
        one.base.get_submodule(path).register_forward_hook(lambda m, a, y, s=shift: y + s)
    one.agree()
    one = beside("gpt2", "beft(targets='v@0,q@0')")
    assert {p.shape for p in one.theta.values()} == {(64,)}


@pytest.mark.parametrize("model", ["llama", "bert", "gpt2"])
def test_it_merges_into_the_bias_which_is_made_where_there_is_none(model):
    net, batch = tiny(model, dtype=torch.float64)
    tuned = stir(burnish.tune(net.eval(), "beft", head=False))
    want = net(**batch).logits
    had = {n for n, _ in tiny(model)[0].named_parameters()}
    merged = tuned.merge()
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-9, atol=1e-11)
    made = {n for n, _ in merged.named_parameters()} - had
    assert {n.rpartition("proj.")[2] for n in made} == ({"bias"} if model == "llama" else set())
    tuned.unmerge()
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-9, atol=1e-11)


def test_what_has_no_bias_to_hold_it_does_not_merge():
    from burnish.blocks.state.gates import Shift

    norm = torch.nn.RMSNorm(4)
    with pytest.raises(CheckError, match="RMSNorm has no bias to hold a shift"):
        Shift(((0, 4),)).fold(norm, {})


def test_a_start_without_decay():
    tuned = burnish.tune(tiny("bert")[0], "beft", head=False)
    assert all(not p.any() for p in tuned.parameters())
    assert [g["weight_decay"] for g in tuned.optimizer(lr=1, weight_decay=0.5).param_groups] == [0]
    assert 12 * type(tuned.recipe[0]).count(768) == 9216
    assert sum(p.numel() for p in tuned.parameters()) == 2 * 32


@pytest.mark.parametrize("scale, why", [(0.0, "a number other than 0"), (float("inf"), "finite"),
                                        (float("nan"), "finite")])
def test_a_scale_that_is_no_number_other_than_0_is_refused(scale, why):
    with pytest.raises(burnish.RecipeError, match=why):
        make("beft", {"scale": scale})


def test_what_has_no_values_of_its_own_says_so():
    with pytest.raises(burnish.RecipeError, match="read by its module without a call"):
        burnish.tune(tiny("mha")[0], "beft(targets='attn')")
    with pytest.raises(burnish.RecipeError, match="beft needs linears that make queries"):
        burnish.tune(tiny("cnn")[0], "beft")
    with pytest.raises(burnish.RecipeError, match="nothing can be added to its output.*lora"):
        burnish.tune(tiny("cnn")[0], "beft(targets='conv')")
