"""Prompt tuning: rows before the embeddings, written out in float64 with stock models."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.recipe import parse
from burnish.testing.models import tiny

TABLES = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "mamba": "backbone.embeddings",
          "bert": "bert.embeddings.word_embeddings", "t5": "shared"}


@pytest.mark.parametrize("model, padded", [("llama", False), ("llama", True), ("gpt2", False),
                                           ("gpt2", True), ("mamba", False)])
def test_the_equation_written_out(beside, model, padded):                      # findings 6
    """X' = [P; E(x)] through the stock model; the logits of the rows are cut off."""
    one = beside(model, "prompt_tuning(length=3)")
    (_, P), = one.at("rows")
    ids = one.batch["input_ids"]
    one.batch = {"input_ids": ids}
    x = torch.cat([P.expand(len(ids), -1, -1), one.base.get_submodule(TABLES[model])(ids)], 1)
    kw = {}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        one.batch["attention_mask"] = mask
        mask = torch.cat([torch.ones(len(ids), 3, dtype=mask.dtype), mask], 1)
        kw = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    one.agree(one.base(inputs_embeds=x, **kw).logits[:, 3:])


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_with_a_pooler(beside, padded):                             # findings 6
    """The pooler reads the first token of the text, not the first row; rows count as type 0."""
    one = beside("bert", "prompt_tuning(length=3)")
    (_, P), = one.at("rows")
    ids = one.batch["input_ids"]
    types = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids)
    one.batch = {"input_ids": ids, "token_type_ids": types}
    long = {"token_type_ids": torch.nn.functional.pad(types, (3, 0))}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        one.batch["attention_mask"] = mask
        long["attention_mask"] = torch.nn.functional.pad(mask, (3, 0), value=1)
    x = torch.cat([P.expand(len(ids), -1, -1), one.base.get_submodule(TABLES["bert"])(ids)], 1)
    one.base.bert.pooler.register_forward_pre_hook(lambda m, args: (args[0][:, 3:],))
    one.agree(one.base(inputs_embeds=x, **long).logits)


def test_an_encoder_decoder_reads_the_rows_too(beside):                        # findings 6
    one = beside("t5", "prompt_tuning(length=3)")
    (_, P), = one.at("rows")
    ids, labels = one.batch["input_ids"], one.batch["labels"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    one.batch["attention_mask"] = mask
    x = torch.cat([P.expand(len(ids), -1, -1), one.base.shared(ids)], 1)
    one.agree(one.base(inputs_embeds=x, labels=labels, attention_mask=torch.nn.functional.pad(
        mask, (3, 0), value=1)).logits)


def rows(recipe, model="llama"):
    tuned = burnish.tune(tiny(model)[0], recipe, head=False)
    (P,) = tuned.parameters()
    return P.detach()


def test_the_starts():
    """Rows of the table: drawn, or of ids repeated to length; or N(0, 0.5^2). Always fp32."""
    table = tiny("llama")[0].model.embed_tokens.weight.detach()
    drawn = rows("prompt_tuning(length=40)")
    assert all((table == r).all(1).any() for r in drawn)
    assert len({tuple(r.tolist()) for r in drawn}) > 15, "drawn from the whole of a small table"
    given = rows("prompt_tuning(length=5, ids=[7, 0])")
    assert torch.equal(given, table[[7, 0, 7, 0, 7]])
    normal = rows("prompt_tuning(length=300, init='normal')")
    assert float(normal.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float(normal.mean())) < 0.02
    net = tiny("llama", dtype=torch.bfloat16)[0]
    assert {p.dtype for p in burnish.tune(net, "prompt_tuning(length=2)",
                                          head=False).parameters()} == {torch.float32}


def test_frequent_tokens_are_the_first_five_thousand():
    table = torch.arange(8000.0).unsqueeze(1)
    torch.manual_seed(0)
    got = parse("prompt_tuning(length=100000)")[0].start(table).flatten()
    assert (float(got.min()), float(got.max())) == (0, 4999)


def test_counts_and_defaults():
    m = parse("prompt_tuning")[0]
    assert (m.length, m.init, m.ids, m.count(7)) == (100, "vocabulary", None, 700)


@pytest.mark.parametrize("recipe, why", [
    ("prompt_tuning(length=0)", "at least one row"), ("prompt_tuning(targets='q')", "no targets"),
    ("prompt_tuning(ids=[])", "ids from 0 to 63"), ("prompt_tuning(ids=[-1])", "from 0 to 63"),
    ("prompt_tuning(ids=[3, 64])", "from 0 to 63"),
    ("prompt_tuning(length=1, ids=[0, 63])", "2 tokens are more than the 1 rows"),
    ("prompt_tuning(ids=[3], init='normal')", "init='normal' reads none.*init='vocabulary'"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("llama")[0], recipe)
    burnish.tune(tiny("llama")[0], "prompt_tuning(length=2, ids=[0, 63])")


def test_an_encoder_that_is_padded_on_the_left(beside):
    """Its positions are those the stock encoder gives to that many tokens, padding or not."""
    one = beside("bert", "prompt_tuning(length=3)")
    (_, P), = one.at("rows")
    ids = one.batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    one.batch = {"input_ids": ids, "attention_mask": mask}
    x = torch.cat([P.expand(len(ids), -1, -1), one.base.get_submodule(TABLES["bert"])(ids)], 1)
    one.base.bert.pooler.register_forward_pre_hook(lambda m, args: (args[0][:, 3:],))
    one.agree(one.base(inputs_embeds=x, attention_mask=torch.nn.functional.pad(
        mask, (3, 0), value=1)).logits)


def test_an_encoder_without_anything_above_it():
    """The root embeds, runs the blocks and pools."""
    net, batch = tiny("bert", dtype=torch.float64)
    net, ids = net.bert.eval(), batch["input_ids"]
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "prompt_tuning(length=3)", head=False)
    (P,) = tuned.parameters()
    x = torch.cat([P.detach().double().expand(len(ids), -1, -1), base.get_input_embeddings()(ids)],
                  1)
    want = base(inputs_embeds=x).last_hidden_state[:, 3:]
    got = net(input_ids=ids)
    torch.testing.assert_close(got.last_hidden_state, want)
    torch.testing.assert_close(got.pooler_output, base.pooler(want))
