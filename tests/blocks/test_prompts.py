"""Prompt banks: the gated form of a prefix, masks, heads, tokens in and out of a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.state.prompts import KeysValues, Prepended, Tokens, Trunk, is_active
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import RecipeError


def state(active=(("a", 1.0),), off=False, rows=None):
    return SimpleNamespace(active=active, off=off, rows=rows, tape=Tape(), box={})


class Attention(nn.Module):
    """Causal or not, with fewer key heads than query heads."""

    def __init__(self, d=8, heads=4, kv=2, causal=False, gqa=False):
        super().__init__()
        self.heads, self.kv, self.causal, self.gqa = heads, kv, causal, gqa
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d // heads * kv), \
            nn.Linear(d, d // heads * kv)

    def parts(self, x):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, n, -1).transpose(1, 2)
                   for f, n in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv)))
        if self.gqa:
            return q, k, v
        return q, *(t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))

    def forward(self, x, mask=None):
        kw = {"enable_gqa": True} if self.gqa else {}
        return F.scaled_dot_product_attention(*self.parts(x), attn_mask=mask,
                                              is_causal=self.causal and mask is None, **kw)


def by_hand(att, rows, x, open_):
    """Attention over [P; K], [P; V] in the plainest way; open_ (T, L + T)."""
    q, k, v = att.parts(x)
    P = rows.view(2, rows.shape[1], att.kv, -1).transpose(1, 2)
    rep = q.shape[1] // P.shape[1]
    if att.gqa:
        k, v = (t.repeat_interleave(att.heads // att.kv, 1) for t in (k, v))
    pk, pv = (p.repeat_interleave(rep, 0).expand(len(x), -1, -1, -1) for p in P)
    s = q @ torch.cat([pk, k], 2).transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s.masked_fill(~open_, float("-inf"))
    return s.softmax(-1) @ torch.cat([pv, v], 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
def test_keys_and_values_join_as_attention_sees_them(causal, gqa):
    att = Attention(causal=causal, gqa=gqa).double()
    bank = KeysValues(state(), "a", 3, 4, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    open_ = torch.ones(5, 8, dtype=torch.bool)
    if causal:
        open_[:, 3:].tril_()
    want = by_hand(att, bank.rows, x, open_)
    torch.testing.assert_close(bank(att, att, x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_model_grows_by_open_columns(kind):
    att = Attention().double()
    bank = KeysValues(state(), "a", 3, 4, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    keep = torch.rand(2, 1, 5, 5) > 0.4
    keep[..., 0] = True
    mask = keep if kind == "bool" else torch.zeros(2, 1, 5, 5, dtype=torch.double).masked_fill(
        ~keep, torch.finfo(torch.double).min)
    want = by_hand(att, bank.rows, x, F.pad(keep, (3, 0), value=True))
    torch.testing.assert_close(bank(att, att, x, mask=mask), want, rtol=1e-10, atol=1e-12)


def test_layers_share_one_wider_mask():
    s, att = state(), Attention(causal=True)
    banks = [KeysValues(s, "a", 3, 4) for _ in range(2)]
    masks = [b._mask(None, 5, 5, torch.device("cpu")) for b in banks]
    assert masks[0] is masks[1]
    longer = banks[0]._mask(None, 6, 6, torch.device("cpu"))
    assert longer.shape == (6, 9) and att.causal


def test_the_gated_form_of_the_unified_view():
    """Attn over [P; K] = (1 - l) Attn(K, V) + l softmax(q P_k^T) P_v."""
    att = Attention(kv=4).double()
    bank = KeysValues(state(), "a", 3, 8, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    q, k, v = att.parts(x)
    pk, pv = (p.view(3, 4, 2).transpose(0, 1).unsqueeze(0) for p in bank.rows)
    a, b = (q @ t.transpose(-1, -2) * 2 ** -0.5 for t in (pk, k))
    share = a.exp().sum(-1, keepdim=True) / (
        a.exp().sum(-1, keepdim=True) + b.exp().sum(-1, keepdim=True))
    want = (1 - share) * (b.softmax(-1) @ v) + share * (a.softmax(-1) @ pv)
    torch.testing.assert_close(bank(att, att, x), want, rtol=1e-6, atol=1e-6)


def test_a_masked_prefix_is_the_base():
    att = Attention(kv=4, causal=True).double()
    bank = KeysValues(state(), "a", 3, 8, std=5.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    wide = bank._mask(None, 5, 5, torch.device("cpu"))
    wide[:, :3] = False
    torch.testing.assert_close(bank(att, att, x), att(x), rtol=1e-12, atol=1e-14)


def test_gradients_of_the_rows():
    att = Attention(causal=True).double()
    bank = KeysValues(state(), "a", 3, 4, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    open_ = torch.ones(5, 8, dtype=torch.bool)
    open_[:, 3:].tril_()
    got = torch.autograd.grad(bank(att, att, x).square().sum(), bank.rows)
    want = torch.autograd.grad(by_hand(att, bank.rows, x, open_).square().sum(), bank.rows)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_multihead_attention_takes_them_too():
    mha = nn.MultiheadAttention(8, 4, batch_first=True).double()
    bank = KeysValues(state(), "a", 3, 8, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    w, b = mha.in_proj_weight, mha.in_proj_bias
    q, k, v = (F.linear(x, w[i : i + 8], b[i : i + 8]) for i in (0, 8, 16))
    k, v = (torch.cat([t, p.expand(2, -1, -1)], 1) for t, p in zip((k, v), bank.rows, strict=True))
    q, k, v = (t.view(2, -1, 4, 2).transpose(1, 2) for t in (q, k, v))
    hide = torch.cat([pad, torch.zeros(2, 3, dtype=torch.bool)], 1)[:, None, None]
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=~hide)
    want = mha.out_proj(a.transpose(1, 2).reshape(2, 5, 8))
    for weights in (True, False):
        got = bank(mha, mha, x, x, x, key_padding_mask=pad, need_weights=weights)[0]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_attention_that_cannot_be_reached_is_refused_with_a_way_out():
    class Eager(nn.Module):
        def forward(self, x):
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    bank, eager = KeysValues(state(), "a", 3, 8), Eager()
    with pytest.raises(RecipeError, match="attn_implementation='sdpa'"):
        bank(eager, eager, torch.randn(2, 5, 8))
    assert not bank.state.tape.intercept, "nothing is left behind"


def test_the_mlp_makes_rows_and_goes():
    trunk = Trunk(3, 6, 5)
    banks = [KeysValues(state(), "a", 3, 8, trunk) for _ in range(2)]
    want = banks[0].up(torch.tanh(trunk.down(trunk.rows)))          # (3, 16): keys then values
    made = banks[0].made()
    torch.testing.assert_close(made, torch.stack([want[:, :8], want[:, 8:]]))
    banks[0].collapse()
    assert torch.equal(banks[0].made(), made)
    assert [n for n, _ in banks[0].named_parameters()] == ["rows"]
    assert banks[0].rows.numel() == 2 * 3 * 8
    own = sum(p.numel() for p in {p for b in banks[1:] for p in b.parameters()})
    assert own == 3 * 6 + (6 + 1) * 5 + 2 * 8 * (5 + 1)


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
    assert is_active(state(), "a", "a prompt")
    assert not is_active(state(off=True), "a", "a prompt")
    assert not is_active(state(active=(("b", 1.0),)), "a", "a prompt")
    assert not is_active(state(active=(), rows=("b", None)), "a", "a prompt")
    with pytest.raises(RecipeError, match="per-sample"):
        is_active(state(active=(), rows=("a", None)), "a", "a prompt")
    with pytest.raises(RecipeError, match="whole"):
        is_active(state(active=(("a", 0.7),)), "a", "a prompt")


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
