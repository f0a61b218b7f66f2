"""Trainable tokens: rows of a table, against a table with these rows in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.tokens import Tokens
from burnish.core.errors import RecipeError, TargetError
from burnish.core.site import Place
from burnish.testing.models import tiny


class Reader(nn.Module):
    def __init__(self, padding=None):
        super().__init__()
        self.words = nn.Embedding(11, 4, padding_idx=padding)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.words(x))


IDS = (7, 2, 9)


@pytest.mark.parametrize("padding", [None, 2, 5])
def test_outputs_and_gradients_are_those_of_a_changed_table(padding):
    torch.manual_seed(0)
    model = Reader(padding).double()
    tuned = burnish.tune(model, f"trainable_tokens(ids={IDS})", head=False)
    (_, term), = tuned.terms(Tokens)
    term.double()
    assert not term.rows.any()
    with torch.no_grad():
        term.rows.normal_()
    x = torch.tensor([[7, 2, 2, 0], [10, 9, 7, 5]])
    rows = term.rows.detach().clone().requires_grad_()
    table = model.words.weight.detach().index_add(0, torch.tensor(IDS), rows)
    want = F.linear(F.embedding(x, table, padding), model.out.weight.detach(),
                    model.out.bias.detach())
    got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(term.rows.grad, rows.grad, rtol=1e-12, atol=1e-12)
    assert bool(rows.grad[1].any()) is (padding != 2)
    dense = torch.zeros(4, 11, dtype=torch.float64)
    dense[:, list(IDS)] = term.rows.detach().t()
    assert torch.equal(term.dense(), dense)
    assert torch.equal(term.tile(3, 9, None), dense[:, 3:9])
    assert torch.equal(term.tile(0, 11, None), dense)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-12, atol=1e-12)


def test_the_other_rows_stay_and_steps_move_these():
    model, batch = tiny("llama")
    ids = sorted(set(batch["input_ids"][0, 3:6].tolist()))
    tuned = burnish.tune(model, f"trainable_tokens(ids={tuple(ids)})")
    was = model.get_input_embeddings().weight.detach().clone()
    first = tuned.step(batch)
    tuned.optimizer(lr=0.05)
    for _ in range(4):
        last = tuned.step(batch)
    assert last < first
    (_, term), = tuned.terms(Tokens)
    assert term.rows.detach().abs().sum(1).min() > 0
    assert torch.equal(model.get_input_embeddings().weight, was)
    table = tuned.merge().get_input_embeddings().weight
    moved = (table != was).any(1).nonzero().flatten().tolist()
    assert moved == ids


def test_beside_lora_only_lora_is_narrowed_by_the_recipes_targets():
    tuned = burnish.tune(tiny("llama")[0], "lora(rank=2) + trainable_tokens(ids=(3,))",
                         targets="q")
    assert {n.split(".burnish.")[0].rpartition(".")[2] for n, _ in tuned.named_parameters()} \
        == {"q_proj", "embed_tokens"}


def test_its_count_its_start_and_its_decay():
    (method,) = burnish.parse("trainable_tokens(ids=(1, 2, 3))")
    place = Place("e", "weight", "embedding", 4096, 128256)
    assert method.count(place) == 12_288 and method.per_token(place) == 0
    assert method.settings() == {"targets": "embedding", "ids": (1, 2, 3)}
    model, batch = tiny("llama")
    model.eval()
    want = model(**batch).logits
    tuned = burnish.tune(model, method)
    assert torch.equal(model(**batch).logits, want)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_what_cannot_be_is_refused():
    assert burnish.parse("trainable_tokens")[0].ids == (0,)
    for ids in ("()", "(1, 1)", "(-1,)", "(True, 2)", "(0.5,)"):
        with pytest.raises(RecipeError, match="^trainable_tokens: ids="):
            burnish.parse(f"trainable_tokens(ids={ids})")
    assert burnish.parse("trainable_tokens(ids=(0, 3))")
    for ids in ("3", "'ab'", "None"):
        with pytest.raises(RecipeError, match=r"^trainable_tokens\(ids=.*expected tuple or list"):
            burnish.parse(f"trainable_tokens(ids={ids})")
    with pytest.raises(RecipeError, match=r"has 11 rows, so no token 11; resize the table"):
        burnish.tune(Reader(), "trainable_tokens(ids=(11,))", head=False)
    assert burnish.tune(Reader(), "trainable_tokens(ids=(10,))", head=False)
    with pytest.raises(TargetError, match="is tied to"):
        burnish.tune(tiny("gpt2")[0], "trainable_tokens(ids=(1,))")
    with pytest.raises(TargetError, match="no form for"):
        burnish.tune(tiny("llama")[0], "trainable_tokens(ids=(1,), targets='q')")
