"""Steering: a vector behind a block, made of contrasts, folded into a bias."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.methods.test_branch_sites import Block, Stack

import burnish
from burnish.blocks.state.steered import purified
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, ConfigError, RecipeError
from burnish.testing.models import tiny

BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "bert": "bert.encoder.layer.{}",
          "vit": "vit.layers.{}"}


def pairs_for(model, n=3, seed=0):
    """n pairs of batches of two rows, whose last tokens are the responses."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        pair = []
        for _ in "hl":
            ids = torch.randint(3, 60, (2, 9), generator=g)
            labels = ids.clone()
            labels[0, :5], labels[1, :3] = -100, -100
            pair.append({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                         "labels": labels})
        out.append(tuple(pair))
    return out


def hooked(net, path, add):
    """The untouched model, `add` added to what its block returns."""
    def out(m, args, y):
        return y + add if isinstance(y, torch.Tensor) else (y[0] + add, *y[1:])
    net.get_submodule(path).register_forward_hook(out)
    return net


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_the_equation_written_out(beside, model):
    """It is what a hook on the block's result does, also where a norm ends the block."""
    one = beside(model, "steering(layer=0, alpha=1.5)")
    ((_, shift),) = one.at("shift")
    hooked(one.base, BLOCKS[model].format(0), 1.5 * shift)
    one.agree()


@pytest.mark.parametrize("model, layer", [("llama", 0), ("llama", 1), ("gpt2", -1), ("bert", 0)])
def test_the_vector_is_the_difference_of_means_and_merges_into_a_bias(model, layer):
    net, _ = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net.eval(), f"steering(layer={layer}, alpha=2.0)", head=False)
    pairs, path = pairs_for(model), BLOCKS[model].format(layer % 2)
    part = tuned.recipe[0]
    got = part.lifecycle(tuned, pairs)

    def mean(side):
        seen = []
        hook = base.get_submodule(path).register_forward_hook(
            lambda m, a, y: seen.append(y if isinstance(y, torch.Tensor) else y[0]))
        for pair in pairs:
            base(**{k: v for k, v in pair[side].items() if k != "labels"})
        hook.remove()
        return torch.stack([h[i][pair[side]["labels"][i] != -100].mean(0)
                            for h, pair in zip(seen, pairs, strict=True) for i in range(2)]).mean(0)

    want = mean(0) - mean(1)
    assert torch.allclose(got, want, atol=1e-12) and float(want.detach().norm()) > 1e-3
    batch = {k: v for k, v in pairs[0][0].items() if k != "labels"}
    plain = base(**batch).logits
    steered = hooked(base, path, 2.0 * want)(**batch).logits
    assert torch.allclose(net(**batch).logits, steered, atol=1e-7)
    assert not torch.allclose(plain, steered, atol=1e-4)
    had = {n for n, _ in tiny(model)[0].named_parameters()}
    merged = tuned.merge()
    assert torch.allclose(merged(**batch).logits, steered, atol=1e-7)       # bias against hook
    made = {n for n, _ in merged.named_parameters()} - had
    said = {n for n in made if merged.get_parameter(n).any()}    # the others the config asks for
    assert said == ({f"{path}.mlp.down_proj.bias"} if model == "llama" else set())


def test_nothing_happens_at_no_strength():
    net, batch = tiny("llama", dtype=torch.float64)
    plain = net.eval()(**batch).logits.detach()
    tuned = burnish.tune(net, "steering(alpha=0.0)", head=False)
    assert float(tuned.recipe[0].lifecycle(tuned, pairs_for("llama")).norm()) > 0
    assert torch.equal(net(**batch).logits, plain)
    delta = net(**batch).logits.detach().log_softmax(-1) - plain.log_softmax(-1)
    assert float(delta.abs().max()) == 0.0


def test_a_purified_vector_is_orthogonal():
    g = torch.Generator().manual_seed(1)
    v, c, d = (torch.randn(64, generator=g) for _ in range(3))
    once = purified(v, [c])
    assert abs(float(once @ c)) < 1e-5 * float(v.norm() * c.norm())
    unit = c / c.norm()
    assert torch.allclose(once, v - (v @ unit) * unit, atol=1e-6)
    both = purified(v, [c, d])
    assert max(abs(float(both @ c)), abs(float(both @ d))) < 1e-4
    assert torch.equal(purified(v, [torch.zeros(64)]), v)
    assert torch.equal(purified(v, []), v)


def test_purification_is_of_what_is_set():
    tuned = burnish.tune(tiny("llama")[0].eval(), "steering", head=False)
    part, other = tuned.recipe[0], torch.randn(32)
    part.lifecycle(tuned, pairs_for("llama"), against=[other])
    (shift,) = tuned.parameters()
    assert abs(float(shift @ other)) < 1e-5 and float(shift.norm()) > 1e-3


def test_the_middle_block_and_its_numbers(published):
    anatomy, _ = published("Gemma2Config", "Gemma2ForCausalLM", hidden_size=2304,
                           num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
                           head_dim=256, intermediate_size=9216)
    part = burnish.parse("steering")[0]
    assert part.block(anatomy).path == "model.layers.13"
    (branch,) = part.branch(anatomy)
    assert sum(p.numel() for p in branch.module.parameters()) == part.count(2304) == 2304
    # a norm stands behind this MLP: what is added to the stream is the norm's result
    assert branch.write == "model.layers.13.post_feedforward_layernorm"


def test_where_a_norm_without_a_shift_ends_the_block_the_branch_acts_and_does_not_merge():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    net = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)).double().eval()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "steering(layer=1)", head=False)
    v = tuned.recipe[0].lifecycle(tuned, pairs_for("gemma"))
    batch = {"input_ids": pairs_for("gemma")[0][0]["input_ids"]}
    want = hooked(base, "model.layers.1", v)(**batch).logits
    assert torch.allclose(net(**batch).logits, want, atol=1e-7)
    with pytest.raises(CheckError, match="Gemma2RMSNorm has no bias to hold a shift"):
        tuned.merge()


def test_a_start_without_decay_that_trains():
    net, batch = tiny("llama")
    plain = net(**batch).logits
    tuned = burnish.tune(net, "steering", head=False)
    assert torch.equal(net(**batch).logits, plain)
    assert [g["weight_decay"] for g in tuned.optimizer(lr=1, weight_decay=0.5).param_groups] == [0]
    assert tuned.recipe[0].repeats() is None


def test_refusals():
    with pytest.raises(RecipeError, match=r"steering\(layer=2\): this model has blocks 0 to 1"):
        burnish.tune(tiny("llama")[0], "steering(layer=2)")
    with pytest.raises(RecipeError, match=r"steering\(layer=-3\)"):
        burnish.tune(tiny("llama")[0], "steering(layer=-3)")
    with pytest.raises(RecipeError, match="expected a finite number"):
        burnish.parse("steering(alpha=1e999)")
    with pytest.raises(RecipeError, match="steering needs blocks whose MLP ends in one linear"):
        burnish.tune(tiny("mamba")[0], "steering")
    tuned = burnish.tune(tiny("llama")[0], "steering", head=False)
    with pytest.raises(ConfigError, match="there are no pairs"):
        tuned.recipe[0].lifecycle(tuned, [])
    high, low = pairs_for("llama")[0]
    with pytest.raises(ConfigError, match="a row has no token of a response"):
        tuned.recipe[0].lifecycle(tuned, [(high, {**low, "labels": low["labels"] * 0 - 100})])
    with pytest.raises(ConfigError, match="one label per token is expected"):
        tuned.recipe[0].lifecycle(tuned, [(high, {**low, "labels": low["labels"][:, 1:]})])


@pytest.mark.parametrize("alpha", [1.0, 1e6])
def test_sums_in_another_order_each_time_are_no_more_than_an_addition(alpha):
    """States that differ from run to run by some roundings, as those of atomic sums do."""
    net, _ = tiny("llama")
    tuned = burnish.tune(net.eval(), f"steering(layer=0, alpha={alpha})", head=False)
    g = torch.Generator().manual_seed(0)
    net.model.layers[0].register_forward_hook(
        lambda m, a, y: y * (1 + 1e-5 * torch.randn(y.shape, generator=g)))
    v = tuned.recipe[0].lifecycle(tuned, pairs_for("llama"))
    (shift,) = tuned.parameters()
    assert torch.equal(shift.detach(), v) and v.any()


def test_of_several_stacks_the_last_ones_block_is_steered():
    for blocks in (1, 2):
        net, _ = tiny("t5", num_decoder_layers=blocks)
        tuned = burnish.tune(net, "steering(layer=0)", head=False)
        ((name, _),) = tuned.named_parameters()
        assert name.startswith("decoder.block.0.layer.2.DenseReluDense.wo.")


@pytest.mark.parametrize("norms, end", [
    (("norm1", "post_operator_norm", "ffn_norm"), "mlp.fc2"),
    (("norm1", "norm2", "post_self_attn_norm"), "mlp.fc2"),
    (("norm1", "norm2", "post_ffn_norm"), "post_ffn_norm")])
def test_a_norm_ends_a_block_where_it_stands_last_and_behind_the_mlp(norms, end):
    anatomy = Anatomy.of(Stack(Block(8, 8, norms=norms), Block(8, 8, norms=norms), final=True))
    (branch,) = burnish.parse("steering(layer=0)")[0].branch(anatomy)
    assert branch.write == f"layers.0.{end}"


def test_its_vector_is_told_from_what_stands_beside_it():
    net, batch = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net.eval(), "lora(rank=2, targets='down') + beft + steering(layer=1)",
                         head=False)
    v = tuned.recipe.named("steering").lifecycle(tuned, pairs_for("llama"))
    own = {n: p for n, p in tuned.named_parameters() if n.endswith("shift") and p.any()}
    assert [n.partition(".burnish")[0] for n in own] == ["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(next(iter(own.values())).detach().double(), v.double())


def test_a_block_that_does_more_than_add_is_refused_and_left_alone():
    net, _ = tiny("llama")
    tuned = burnish.tune(net.eval(), "steering(layer=0)", head=False)
    net.model.layers[0].register_forward_hook(lambda m, a, y: y * 2)
    with pytest.raises(ConfigError, match="does more with what its MLP gives than add it"):
        tuned.recipe[0].lifecycle(tuned, pairs_for("llama"))
    assert not any(p.any() for p in tuned.parameters())
