"""Trainable tokens: rows of a table, against a table with these rows in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import panels
from burnish.blocks.weight.term import Term
from burnish.blocks.weight.tokens import Looked, Read, Tokens
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


class Tied(nn.Module):
    """Two tables and a head that are one tensor."""

    def __init__(self, padding=None):
        super().__init__()
        self.words = nn.Embedding(11, 4, padding_idx=padding)
        self.more = nn.Embedding(11, 4, padding_idx=padding)
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 11)
        self.more.weight = self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(torch.tanh(self.inner(self.words(x) + 2 * self.more(x.flip(-1)))))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("trained", [False, True])
def test_all_ends_of_a_tied_table_read_the_same_rows(padding, trained):
    torch.manual_seed(0)
    model = Tied(padding).double()
    tuned = burnish.tune(model, f"trainable_tokens(ids={IDS})" + " + bitfit" * trained, head=False)
    rows, = [p for n, p in tuned.named_parameters() if n.endswith("rows")]
    assert rows.shape == (3, 4)
    assert sorted(type(t).__name__ for _, t in tuned.terms(Term)) == ["Looked", "Read", "Tokens"]
    rows.data = torch.randn(3, 4, dtype=torch.float64)
    x = torch.tensor([[7, 2, 2, 0], [10, 9, 7, 5]])
    r = rows.detach().clone().requires_grad_()
    table = model.words.weight.detach().index_add(0, torch.tensor(IDS), r)
    W, b = model.inner.weight.detach(), model.inner.bias.detach()

    def reference(x):
        h = F.embedding(x, table, padding) + 2 * F.embedding(x.flip(-1), table, padding)
        return F.linear(torch.tanh(F.linear(h, W, b)), table, model.out.bias.detach())

    want, got = reference(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(rows.grad, r.grad, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    was = model.words.weight.detach().clone()
    merged = tuned.merge()
    assert merged.out.weight is merged.words.weight is merged.more.weight
    torch.testing.assert_close(merged(x), want, rtol=1e-12, atol=1e-12)
    tuned.unmerge()
    assert torch.equal(model.words.weight, was)
    tuned.use({"default": 0.5})
    half = model.words.weight.detach().index_add(0, torch.tensor(IDS), r.detach() / 2)
    table = half
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    tuned.detach()
    assert not any("burnish" in n for n, _ in model.named_modules())


def test_the_other_ends_as_matrices():
    table = Place("e", "weight", "embedding", 4, 11)
    term = Tokens(table, IDS).double()
    rows = term.rows.data = torch.randn(3, 4, dtype=torch.float64)
    dense = torch.zeros(11, 4, dtype=torch.float64)
    dense[list(IDS)] = rows
    head, looked = term.mirrored(replace(table, kind="linear")), term.mirrored(table)
    assert head.theta() == looked.theta() == (term.rows,) and not head.state_dict()
    assert not list(head.parameters())
    for made, want in ((head, dense), (looked, dense.t())):
        assert torch.equal(made.dense(), want)
        assert torch.equal(made.tile(1, 3, None), want[:, 1:3])
        assert torch.equal(made.panel(1, 3), want[:, 1:3])
        assert made.mirrors and made.keeps_input and set(made.reads(True)) == set(term.reads(True))
        term.rows.requires_grad_(False)
        assert not made.keeps_input
        term.rows.requires_grad_()
    assert not term.mirrors and list(term.state_dict()) == ["rows"]
    assert Tokens.tiled and Looked.tiled and Read.tokenwise and Read.cheap_tile


@pytest.mark.parametrize("scale", [1, -0.5])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_keeps_its_input_alone_and_adds_in_place(scale, frozen):
    term = Tokens(Place("e", "weight", "embedding", 4, 11), IDS)
    term.rows.data.normal_()
    term.rows.requires_grad_(not frozen)
    head = term.mirrored(Place("h", "weight", "linear", 11, 4))
    x, y, g = torch.randn(5, 4), torch.randn(5, 11), torch.randn(5, 11)
    want, dx = y + scale * x @ head.dense().t().detach(), torch.randn(5, 4)
    back = dx + scale * g @ head.dense().detach()
    assert head.forward_(x, y, scale) == ()
    torch.testing.assert_close(y, want)
    grad, = head.backward_(g, x, (), dx, scale)
    torch.testing.assert_close(dx, back)
    if frozen:
        assert grad is None
    else:
        torch.testing.assert_close(grad, scale * g[:, list(IDS)].t() @ x)
        again, = head.backward_(g, x, (), None, scale)
        assert torch.equal(again, grad)
    half = torch.zeros(5, 11, dtype=torch.bfloat16)
    head.forward_(x.bfloat16(), half, 1.0)
    torch.testing.assert_close(half.float(), x @ head.dense().t().detach(), rtol=0.05, atol=0.05)
    grad, = head.backward_(g.bfloat16(), x.bfloat16(), (), dx.bfloat16(), 1.0)
    assert grad is None if frozen else grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper"])
def test_tied_models_step_save_and_merge(name, tmp_path):
    model, batch = tiny(name)
    tuned = burnish.tune(model, "trainable_tokens(ids=(1, 2, 5))")
    first = tuned.step(batch)
    tuned.optimizer(lr=0.05)
    for _ in range(4):
        last = tuned.step(batch)
    assert last < first
    want = model.eval()(**batch).logits.detach()
    tuned.save(tmp_path)
    back = burnish.load(tiny(name)[0], tmp_path)
    assert torch.equal(back.model.eval()(**batch).logits, want)
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-4)
def test_a_file_holds_the_rows_alone():
    """Which tokens they are is a setting of the recipe, and what searches among them made of it."""
    term = Tokens(Place("e", "weight", "embedding", 4, 11), IDS)
    assert set(term.state_dict()) == {"rows"}
    assert set(dict(term.named_buffers())) == {"ids", "sorted", "order"}


def test_a_table_whose_values_are_asked_for_is_made_by_panels(monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 8)                  # two columns of four
    term = Tokens(Place("e", "weight", "embedding", 4, 11), IDS)
    nn.init.normal_(term.rows)
    W = torch.randn(4, 11)
    found = list(panels.Panels(W, [(term, 1.0)], [None]).pieces(False))
    assert [(i, j) for i, j, _ in found] == [(i, min(i + 2, 11)) for i in range(0, 11, 2)]
    torch.testing.assert_close(torch.cat([v for *_, v in found], 1), W + term.dense().detach())


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
    for ids in ("()", "(1, 1)", "(-1,)"):
        with pytest.raises(RecipeError, match="^trainable_tokens: ids="):
            burnish.parse(f"trainable_tokens(ids={ids})")
    assert burnish.parse("trainable_tokens(ids=(0, 3))")
    for ids in ("3", "'ab'", "None", "(True, 2)", "(0.5,)"):
        with pytest.raises(RecipeError, match=r"^trainable_tokens\(ids=.*expected tuple.* or list"):
            burnish.parse(f"trainable_tokens(ids={ids})")
    with pytest.raises(RecipeError, match=r"has 11 rows, so no token 11; resize the table"):
        burnish.tune(Reader(), "trainable_tokens(ids=(11,))", head=False)
    assert burnish.tune(Reader(), "trainable_tokens(ids=(10,))", head=False)
    tied = Tied()
    tied.out = nn.Bilinear(1, 1, 1, bias=False)      # it reads a weight in a way of its own
    tied.out.weight = tied.words.weight
    with pytest.raises(TargetError, match="is tied to more.weight, out.weight"):
        burnish.tune(tied, "trainable_tokens(ids=(1,))", head=False)
    past = nn.MultiheadAttention(4, 2, bias=False)   # it reads its child's weight past it
    past.out_proj.weight = nn.Parameter(torch.zeros(4, 4))
    both = nn.ModuleDict({"words": nn.Embedding(4, 4), "attention": past})
    both.words.weight = past.out_proj.weight
    with pytest.raises(TargetError, match="is tied to attention.out_proj.weight"):
        burnish.tune(both, "trainable_tokens(ids=(1,))", head=False)
    with pytest.raises(TargetError, match="no form for"):
        burnish.tune(tiny("llama")[0], "trainable_tokens(ids=(1,), targets='q')")


def test_of_several_tables_it_takes_the_longest_unless_they_are_named():
    """BERT has tables of words, positions and segments."""
    def tables(recipe):
        tuned = burnish.tune(tiny("bert")[0], recipe, head=False)
        return [n.rpartition(".")[0].rpartition(".")[2] for n, _ in tuned.terms(Tokens)]

    assert tables("trainable_tokens(ids=(1,))") == ["word_embeddings"]
    both = ["word_embeddings", "position_embeddings"]
    assert tables(f"trainable_tokens(ids=(1,), targets={both})") == both


def test_ids_that_are_no_list_are_refused_however_it_is_made():
    with pytest.raises(RecipeError, match="^trainable_tokens: ids=3"):
        type(burnish.parse("trainable_tokens")[0])(ids=3)
