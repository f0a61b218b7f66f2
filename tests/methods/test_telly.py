"""Telly: stock full fine-tuning of the upper blocks, and nothing of the lower ones."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

ROBERTA = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12}


def test_count_on_a_base_size_encoder():
    """7,087,872 parameters a block: 4 (768 768 + 768), 2 768 3072 + 3840, 4 768."""
    model, _ = tiny("roberta", meta=True, **ROBERTA)
    names = [s.name for s in parse("telly(freeze=6)")[0].select(Anatomy.of(model))]
    assert sum(model.get_parameter(n).numel() for n in names) == 6 * 7_087_872 == 42_527_232
    assert {n.split(".")[3] for n in names} == {"6", "7", "8", "9", "10", "11"}


@pytest.mark.parametrize("freeze", [0, 1])
def test_gradients_are_those_of_full_fine_tuning_and_end_at_the_first_block_that_trains(freeze):
    net, batch = tiny("vit", dtype=torch.float64)
    stock = copy.deepcopy(net)
    stock(**batch).loss.backward()
    tuned = burnish.tune(net, f"telly(freeze={freeze})", head=False)
    tuned.loss(batch).backward()
    want = {n: p.grad for n, p in stock.named_parameters()
            if any(n.startswith(f"vit.layers.{i}.") for i in range(freeze, 2))}
    got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert set(got) == set(want) and len(want) == 16 * (2 - freeze)
    for n, g in got.items():
        torch.testing.assert_close(g, want[n], rtol=1e-9, atol=1e-12)


def test_steps_are_stock_adamw_s_and_what_is_frozen_does_not_move():
    net, batch = tiny("bert", dtype=torch.float64)
    stock, start = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    mine = [p for n, p in stock.named_parameters() if ".layer.1." in n]
    opt = torch.optim.AdamW(mine, lr=1e-2, weight_decay=0.0)
    tuned = burnish.tune(net, "telly(freeze=1) + adamw", head=False)
    tuned.optimizer(lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        opt.zero_grad()
        stock(**batch).loss.backward()
        opt.step()
        tuned.step(batch)
    for n, p in stock.named_parameters():
        now = net.get_parameter(n)
        torch.testing.assert_close(now, p, rtol=1e-8, atol=1e-10)
        assert torch.equal(now, start[n]) == (".layer.1." not in n), n


def test_backward_keeps_nothing_below(kept):
    whole, half = (kept(burnish.tune(net, f"telly(freeze={k})", head=False), batch)
                   for k in (0, 1) for net, batch in [tiny("vit", batch=16)])
    none = kept(burnish.tune(tiny("vit")[0], "linear_probe"), tiny("vit", batch=16)[1])
    assert abs((half - none) / (whole - none) - 0.5) < 0.1


@pytest.mark.parametrize("recipe, runs", [("", [1, 1]), (" + checkpoint", [1, 2])])
def test_no_block_below_runs_again_and_none_has_a_graph(recipe, runs):
    """Checkpoints are of the blocks that train."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, f"telly(freeze=1){recipe}", head=False)
    seen, graph = [0, 0], []
    for i, block in enumerate(net.bert.encoder.layer):
        def count(m, args, out, i=i):
            seen[i] += 1
            graph.append((i, out.requires_grad))

        block.intermediate.dense.register_forward_hook(count)
    tuned.loss(batch).backward()
    assert seen == runs and {g for i, g in graph if i == 0} == {False}
    assert any(g for i, g in graph if i == 1)


def test_a_tied_head_stays_with_the_embeddings():
    names = {head: {n for n, _ in burnish.tune(tiny("gpt2")[0], "telly(freeze=1)", head=head)
                    .named_parameters()} for head in ("auto", True)}
    assert all(".h.1." in n for n in names["auto"])
    assert names[True] - names["auto"] == {"transformer.wte.weight"}


def test_blocks_of_all_stages_count_in_order():
    def trains(model, freeze):
        tuned = burnish.tune(tiny(model)[0], f"telly(freeze={freeze})", head=False)
        return {n for n, _ in tuned.named_parameters()}

    assert all(".decoder." in n for n in trains("whisper", 2))
    assert all(".decoder." in n or ".encoder.layers.1." in n for n in trains("whisper", 1))
    assert len({n.split(".blocks.")[0] for n in trains("swin", 2)}) == 1


def test_targets_narrow_it():
    tuned = burnish.tune(tiny("vit")[0], "telly(freeze=1, targets='fc1')", head=False)
    assert {n for n, _ in tuned.named_parameters()} == {"vit.layers.1.mlp.fc1.weight"}


def test_what_leaves_nothing_to_train_is_refused():
    with pytest.raises(RecipeError, match="leaves none of the 2 blocks .* that leaves one is 1"):
        burnish.tune(tiny("vit")[0], "telly")
    with pytest.raises(RecipeError, match="freeze=-1: expected a number of blocks, 0 or more"):
        parse("telly(freeze=-1)")
    assert parse("telly")[0].freeze == 6
    assert parse("telly")[0].repeats() is None
