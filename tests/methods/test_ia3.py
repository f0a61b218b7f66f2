"""(IA)^3: keys, values and inner states scaled by vectors, written out in float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.recipe import parse
from burnish.testing.models import tiny

#: (model, path of what is scaled at its output with its runs of rows, at its input)
SITES = {
    "llama": ([("model.layers.{}.self_attn.k_proj", None),
               ("model.layers.{}.self_attn.v_proj", None)], ["model.layers.{}.mlp.down_proj"]),
    "bert": ([("bert.encoder.layer.{}.attention.self.key", None),
              ("bert.encoder.layer.{}.attention.self.value", None)],
             ["bert.encoder.layer.{}.output.dense"]),
    "gpt2": ([("transformer.h.{}.attn.c_attn", (32, 96))], ["transformer.h.{}.mlp.c_proj"]),
    "timm_qkv": ([("blocks.{}.attn.qkv", (32, 96))], ["blocks.{}.mlp.fc2"]),
}


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("model", SITES)
def test_the_equation_written_out(beside, model, inner):                       # findings 6
    """K <- l_k K, V <- l_v V, W_2 (l_ff h); bias included; nothing else moves."""
    one = beside(model, f"ia3(inner={inner})")
    outputs, inputs = SITES[model]
    named = set()
    for i in range(2):
        for path, rows in outputs:
            path = path.format(i)
            named.add(path)

            def out(m, args, y, path=path, rows=rows):
                gain = one.theta[path, "gain"]
                if rows is None:
                    return y * gain
                a, b = rows
                return torch.cat([y[..., :a], y[..., a:b] * gain, y[..., b:]], -1)

            one.base.get_submodule(path).register_forward_hook(out)
        for path in inputs if inner else ():
            path = path.format(i)
            named.add(path)
            one.base.get_submodule(path).register_forward_pre_hook(
                lambda m, args, path=path: (args[0] * one.theta[path, "gain"],))
    assert named == {p for p, _ in one.theta}
    one.agree()


def test_cross_attention_has_its_keys_and_values_scaled(beside):
    one = beside("t5", "ia3")
    for path in {p for p, _ in one.theta}:
        module = one.base.get_submodule(path)
        if path.endswith("wo"):
            module.register_forward_pre_hook(
                lambda m, args, path=path: (args[0] * one.theta[path, "gain"],))
        else:
            module.register_forward_hook(lambda m, args, y, path=path: y * one.theta[path, "gain"])
    kinds = sorted({".".join(p.split(".")[-2:]) for p, _ in one.theta})
    assert kinds == ["DenseReluDense.wo", "EncDecAttention.k", "EncDecAttention.v",
                     "SelfAttention.k", "SelfAttention.v"]
    one.agree()


def test_only_what_is_named_is_scaled(beside):
    one = beside("llama", "ia3(targets='q@0,down@1')")
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert [p for p, _ in one.theta] == [q, down]
    one.base.get_submodule(q).register_forward_hook(lambda m, a, y: y * one.theta[q, "gain"])
    one.base.get_submodule(down).register_forward_pre_hook(
        lambda m, a: (a[0] * one.theta[down, "gain"],))
    one.agree()


def test_inner_states_alone(beside):
    one = beside("vit", "ia3(targets='fc2')")
    assert [p for p, _ in one.theta] == [f"vit.layers.{i}.mlp.fc2" for i in range(2)]
    for path, gain in one.at("gain"):
        one.base.get_submodule(path).register_forward_pre_hook(lambda m, a, g=gain: (a[0] * g,))
    one.agree()


def test_what_has_no_states_to_scale_says_so():
    assert parse("ia3")[0].inner is True
    with pytest.raises(burnish.RecipeError, match="read by its module without a call"):
        burnish.tune(tiny("mha")[0], "ia3(targets='attn')")
    with pytest.raises(burnish.RecipeError, match="neither keys and values nor an MLP"):
        burnish.tune(tiny("cnn")[0], "ia3")
    with pytest.raises(burnish.RecipeError, match="output cannot be scaled.*lora"):
        burnish.tune(tiny("cnn")[0], "ia3(targets='conv')")


def test_experts_in_one_parameter_have_no_inner_state():
    """Mixtral's experts are left as they are; keys and values are scaled."""
    tuned = burnish.tune(tiny("mixtral")[0], "ia3", head=False)
    names = {n.partition(".burnish")[0].rpartition(".")[2] for n, _ in tuned.named_parameters()}
    assert names == {"k_proj", "v_proj"}


@pytest.mark.parametrize("at, size", [("input", 48), ("output", 32), ("auto", 48)])
def test_the_side_of_named_targets_can_be_told(beside, at, size):
    one = beside("llama", f"ia3(targets='down', at={at!r})")
    for path in {p for p, _ in one.theta}:
        module = one.base.get_submodule(path)
        assert one.theta[path, "gain"].shape == (size,)
        if size == 48:
            module.register_forward_pre_hook(
                lambda m, args, path=path: (args[0] * one.theta[path, "gain"],))
        else:
            module.register_forward_hook(
                lambda m, args, y, path=path: y * one.theta[path, "gain"])
    one.agree()
    tuned = burnish.tune(tiny("llama")[0], "ia3(targets='q', at='input')")
    assert {p.shape for p in tuned.parameters()} == {(32,)}


def test_a_side_without_targets_or_of_some_rows_is_refused():
    with pytest.raises(burnish.RecipeError, match="is about targets that are named"):
        parse("ia3(at='input')")
    with pytest.raises(burnish.RecipeError, match="which all read one input; name it whole"):
        burnish.tune(tiny("gpt2")[0], "ia3(targets='q', at='input')")
