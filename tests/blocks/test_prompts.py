"""Prompt banks: embeddings in front of a sequence, tokens in and out of a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from burnish.blocks.state.prompts import Fixed, Prepended, Tokens, is_active
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import RecipeError


def state(active=(("a", 1.0),), off=False, rows=None):
    return SimpleNamespace(active=active, off=off, rows=rows, tape=Tape(), box={})


# -- tokens -------------------------------------------------------------------------------------
def run(bank, x, fn=lambda t: t):
    return bank(nn.Identity(), fn, x)


def test_tokens_enter_are_replaced_and_leave():
    x, rows = torch.arange(10.0).view(1, 5, 2), torch.full((2, 2), -1.0)
    seen = []

    def block(t):
        seen.append(t.clone())
        return t + 100

    kw = {"after": 1, "dropout": 0.0}
    first = Tokens(state(), "a", 2, rows, enter=True, leave=False, **kw)
    second = Tokens(state(), "a", 2, rows * 2, enter=False, leave=True, **kw)
    out = run(second, run(first, x, block), block)
    assert torch.equal(seen[0][0, :, 0], torch.tensor([0.0, -1, -1, 2, 4, 6, 8]))
    assert torch.equal(seen[1][0, :, 0], torch.tensor([100.0, -2, -2, 102, 104, 106, 108]))
    assert torch.equal(out, x + 200)


def test_carried_tokens_are_left_alone():
    bank = Tokens(state(), "a", 2, None, after=1, enter=False, leave=False)
    x = torch.randn(1, 5, 2)
    assert torch.equal(run(bank, x), x) and not list(bank.parameters())


def test_tokens_between_blocks_need_tokens_without_a_mask():
    class Block(nn.Module):
        def forward(self, x, attention_mask=None):
            return x

    bank = Tokens(state(), "a", 2, torch.zeros(2, 2), after=0, enter=True, leave=True)
    with pytest.raises(RecipeError, match="attention mask"):
        bank(Block(), Block(), torch.randn(1, 4, 2), attention_mask=torch.ones(1, 4))
    with pytest.raises(RecipeError, match="tokens"):
        bank(Block(), Block(), torch.randn(1, 2, 4, 4))


# -- when ----------------------------------------------------------------------------------------
def test_only_while_its_adapter_is_active():
    assert is_active(state(active=(("a", 0.0),)), "a", "a prompt") is False
    assert is_active(state(), "a", "a prompt")
    assert is_active(state(off=True), "a", "a prompt") is False
    assert is_active(state(active=(("b", 1.0),)), "a", "a prompt") is False
    assert is_active(state(active=(), rows=("b", None)), "a", "a prompt") is False
    with pytest.raises(RecipeError, match="per-sample"):
        is_active(state(active=(), rows=("a", None)), "a", "a prompt")
    with pytest.raises(RecipeError, match="whole"):
        is_active(state(active=(("a", 0.7),)), "a", "a prompt")


def test_a_listener_refuses_beforehand_what_it_would_refuse_in_a_run():
    bank = Tokens(state(), "a", 2, torch.zeros(2, 2), after=0, enter=True, leave=True)
    bank.check(state())
    with pytest.raises(RecipeError, match="a prompt of 'a' can be used whole"):
        bank.check(state(active=(("a", 0.5),)))


def test_what_is_fixed_runs_in_evaluation_mode_while_its_adapter_is_in_use():
    """Whatever the run raises; a mode has no scale, so a part of an adapter will do."""
    drop, other, seen = nn.Dropout(), nn.Dropout(), []

    def run(**kw):
        fixed = Fixed(state(**kw), "a", [drop])
        assert not list(fixed.children()), "the model's modules are no children of it"
        fixed.check(fixed.state)
        fixed(nn.Identity(), lambda x: seen.append((drop.training, other.training, x)), 3)
        assert drop.training

    run()
    run(active=(("a", 0.5),))
    run(off=True)
    run(active=(("b", 1.0),))
    assert seen == [(False, True, 3)] * 2 + [(True, True, 3)] * 2
    drop.eval()
    Fixed(state(), "a", [drop])(nn.Identity(), lambda: None)
    assert not drop.training


class Stack(nn.Module):
    """Embeds and returns what it was given."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.given = {}

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, past_key_values=None):
        self.given = dict(mask=attention_mask, types=token_type_ids, at=position_ids)
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        return {"last_hidden_state": x, "hidden_states": (x, x)}


def test_what_grows_with_a_prompt():
    stack, ids = Stack(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    bank = Prepended(state(), "a", torch.randn(2, 4), causal=True)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = bank(stack, stack, ids, attention_mask=mask, token_type_ids=torch.ones_like(ids))
    assert torch.equal(out["last_hidden_state"], stack.table(ids))
    assert all(h.shape == (2, 3, 4) for h in out["hidden_states"])
    assert torch.equal(stack.given["mask"], torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]))
    assert torch.equal(stack.given["types"], torch.tensor([[0, 0, 1, 1, 1]] * 2))
    assert torch.equal(stack.given["at"], torch.tensor([[0, 1, 1, 2, 3], [0, 1, 2, 3, 4]]))
    bank(stack, stack, ids, position_ids=torch.tensor([[0, 1, 2]]))
    assert torch.equal(stack.given["at"], torch.tensor([[0, 1, 2, 3, 4]]))


def test_a_filled_cache_holds_the_prompt_already():
    stack = Stack()
    bank = Prepended(state(), "a", torch.randn(2, 4), causal=True)
    cache = SimpleNamespace(get_seq_length=lambda: 5)
    out = bank(stack, stack, torch.tensor([[7]]), attention_mask=torch.ones(1, 4),
               position_ids=torch.tensor([[3]]), past_key_values=cache)
    assert out["last_hidden_state"].shape == (1, 1, 4)
    assert stack.given["mask"].shape == (1, 6) and stack.given["at"].item() == 5


def test_a_mask_made_for_one_length_is_refused():
    stack = Stack()
    bank = Prepended(state(), "a", torch.randn(2, 4), causal=True)
    with pytest.raises(RecipeError, match="attention_mask"):
        bank(stack, stack, torch.tensor([[7]]), attention_mask=torch.ones(1, 1, 4, 4))
