"""Blocks that are run again: a deeper model of the same weights, with an adapter at each run."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, ConfigError
from burnish.testing import stir
from burnish.testing.models import tiny

SPANS = [(0, 2), (0, 1), (1, 2)]


def outputs(model, batch, **kw):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], **kw)


def by_hand(model, order):
    """The same function of a model whose blocks are plain copies."""
    deep = copy.deepcopy(model)
    stack = deep.model if hasattr(deep, "model") else deep.transformer
    name = "layers" if hasattr(stack, "layers") else "h"
    blocks = torch.nn.ModuleList(copy.deepcopy(getattr(stack, name)[i]) for i in order)
    for k, block in enumerate(blocks):
        for m in block.modules():
            if hasattr(m, "layer_idx"):
                m.layer_idx = k
    setattr(stack, name, blocks)
    deep.config.num_hidden_layers = len(order)
    if getattr(deep.config, "layer_types", None):
        deep.config.layer_types = [deep.config.layer_types[i] for i in order]
    return deep


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen_moe"])
def test_it_is_the_deeper_model_and_no_weight_is_held_twice(name):
    model, batch = tiny(name)
    size = sum(p.numel() for p in model.parameters())
    want = by_hand(model, (0, 1, 0, 1))
    assert burnish.repeat_blocks(model, SPANS) is model
    assert sum(p.numel() for p in model.parameters()) == size
    assert torch.equal(outputs(model, batch).logits, outputs(want, batch).logits)
    first = outputs(model, {"input_ids": batch["input_ids"][:, :5]}, use_cache=True)
    rest = outputs(model, {"input_ids": batch["input_ids"][:, 5:]},
                   past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, outputs(want, batch).logits[:, 5:], rtol=1e-4, atol=1e-5)
    places = [p for p in Anatomy.of(model).places if p.block is not None]
    assert {p.block for p in places} == {0, 1, 2, 3}
    assert len(places) % 4 == 0 and len(Anatomy.of(model).again) == len(places) // 2


def test_every_run_has_an_adapter_of_its_own(tmp_path):
    model, batch = tiny("llama")
    want = by_hand(model, (0, 1, 0, 1))
    recipe = "lora(rank=2, targets='q,down')"
    tuned = stir(burnish.tune(burnish.repeat_blocks(model, SPANS), recipe), size=0.3)
    same = stir(burnish.tune(want, recipe), size=0.3)
    ours, theirs = dict(tuned.named_parameters()), dict(same.named_parameters())
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for t in (tuned, same):
        t.model.train()
        t.optimizer(lr=1e-2)
    assert float(tuned.step(batch)) == pytest.approx(float(same.step(batch)), rel=1e-6)
    for n, p in ours.items():
        torch.testing.assert_close(p, theirs[n], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs(model, batch).logits, outputs(want, batch).logits)
    tuned.save(tmp_path)
    again = burnish.load(burnish.repeat_blocks(tiny("llama")[0], SPANS), tmp_path)
    torch.testing.assert_close(outputs(again.model, batch).logits, outputs(model, batch).logits)
    with pytest.raises(CheckError, match="is model.layers.0.* once more, and one weight"):
        tuned.merge()


@pytest.mark.parametrize("at", [0, 2])
def test_what_is_added_to_blocks_that_run_once_merges(at):
    """Blocks 0 1 2 1 2: 0 runs once, 2 does not."""
    model, batch = tiny("llama", num_hidden_layers=3)
    tuned = stir(burnish.tune(burnish.repeat_blocks(model, ((0, 3), (1, 3))),
                              f"lora(rank=2, targets='q@{at}')"), size=0.3)
    want = outputs(tuned.model, batch).logits
    if at:
        with pytest.raises(CheckError, match="is model.layers.2.* once more"):
            tuned.merge()
    else:
        torch.testing.assert_close(outputs(tuned.merge(), batch).logits, want)


def test_a_weight_that_trains_whole_trains_once():
    model, batch = tiny("llama")
    tuned = burnish.tune(burnish.repeat_blocks(model, SPANS), "full(targets='q')")
    assert [n for n, _ in tuned.named_parameters()] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    tuned.step(batch)
    assert model.model.layers[0].self_attn.q_proj.weight is \
        model.model.layers[2].self_attn.q_proj.weight


@pytest.mark.parametrize("spans", [[], [(0, 3)], [(1, 1)], [(-1, 1)], [(0, 1, 2)], "a", [(0, 1.0)],
                                   [(True, 2)]])
def test_spans_that_are_none(spans):
    model, batch = tiny("llama")
    want = outputs(model, batch).logits
    with pytest.raises(ConfigError, match="runs of blocks are pairs of numbers"):
        burnish.repeat_blocks(model, spans)
    assert torch.equal(outputs(model, batch).logits, want)


def test_models_that_have_no_such_list():
    with pytest.raises(ConfigError, match="already"):
        burnish.repeat_blocks(burnish.repeat_blocks(tiny("llama")[0], SPANS), SPANS)
    with pytest.raises(ConfigError, match="this one is tuned"):
        burnish.repeat_blocks(burnish.tune(tiny("llama")[0], "lora(rank=2)").model, SPANS)
    for name in ("t5", "mlp"):
        with pytest.raises(ConfigError, match="no one list of blocks"):
            burnish.repeat_blocks(tiny(name)[0], SPANS)


def test_what_a_configuration_says_of_each_block_follows():
    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, use_sliding_window=True,
        sliding_window=4, max_window_layers=1)
    model = burnish.repeat_blocks(transformers.Qwen3ForCausalLM(config), SPANS)
    assert model.config.layer_types == ["full_attention", "sliding_attention"] * 2
    assert model.config.num_hidden_layers == 4
    assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def test_a_storage_leaves_what_is_read_twice():
    tuned = burnish.tune(burnish.repeat_blocks(tiny("llama")[0], [(0, 2), (0, 1)]),
                         "nf4 + lora(rank=2)")
    held = {n.split(".")[2] for n, _ in tuned.model.named_modules() if n.endswith("provided_weight")
            and ".layers." in n}
    assert held == {"1"}
