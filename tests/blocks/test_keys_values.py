"""Rows before keys and values: the gated form, masks, heads, causal calls, what a file holds, and
the keys and values that real tokens have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import burnish
from burnish.blocks.state.keys_values import KeysValues, Seen, Trunk
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import DataError, RecipeError
from burnish.formats import safe
from burnish.testing import stir
from burnish.testing.models import tiny


def state(active=(("a", 1.0),), off=False, rows=None):
    return SimpleNamespace(active=active, off=off, rows=rows, tape=Tape(), box={})


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def test_a_finished_file_holds_the_rows_and_a_checkpoint_what_makes_them(tmp_path):
    """findings 3.8: 2 L d numbers per layer, P = MLP(P') written out, and the same answers."""
    net, batch = tiny("gpt2", dtype=torch.float64)
    tuned = burnish.tune(net, "prefix(length=3, hidden=5)")
    net.double()
    stir(tuned, size=0.5)
    tuned.add("other", "prefix(length=2, hidden=4) + lora(rank=2)")
    net.double()
    net.eval()
    want = logits(net, **batch)
    rows = {}
    for path, m in net.named_modules():
        if isinstance(m, KeysValues) and m.adapter == "default":
            t, up = m.trunk, m.up
            made = torch.tanh(t.rows @ t.down.weight.T + t.down.bias) @ up.weight.T + up.bias
            rows[path] = torch.stack([made[:, :32], made[:, 32:]]).detach()
    assert len(rows) == 2
    before = {n: t.clone() for n, t in tuned.tensors().items()}
    tuned.save(tmp_path / "end")
    assert all(torch.equal(t, before[n]) for n, t in tuned.tensors().items())
    file = safe.load_file(tmp_path / "end" / "adapter_model.safetensors")
    mine = {n: t for n, t in file.items() if ".default." in n}
    assert sum(t.numel() for t in mine.values()) == 2 * 2 * 3 * 32
    for path, P in rows.items():
        (name,) = [n for n in mine if n.startswith(path)]
        torch.testing.assert_close(mine[name], P, rtol=1e-12, atol=1e-14)
    again = burnish.load(tiny("gpt2", dtype=torch.float64)[0].eval(), tmp_path / "end")
    assert str(again.recipe) == "prefix(length=3)"
    assert str(again.adapters["other"].recipe) == "prefix(length=2) + lora(rank=2)"
    torch.testing.assert_close(logits(again.model.double(), **batch), want, rtol=1e-6, atol=1e-6)
    tuned.save(tmp_path / "middle", whole=True)
    again = burnish.load(tiny("gpt2", dtype=torch.float64)[0].eval(), tmp_path / "middle")
    assert set(again.tensors()) == set(before) and str(again.recipe) == str(tuned.recipe)


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
    s = state()
    banks = [KeysValues(s, "a", 3, 4) for _ in range(2)]
    mask = torch.zeros(2, 1, 5, 5)
    wide = [b._wider(mask, 5) for b in banks]
    assert wide[0] is wide[1] and wide[0].shape == (2, 1, 5, 8)
    one = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    assert banks[0]._wider(one, 6).shape == (2, 1, 1, 9), "one entry may serve all keys"


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
    att = Attention(kv=4).double()
    bank = KeysValues(state(), "a", 3, 8, std=5.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    open_ = torch.ones(5, 5, dtype=torch.bool).tril()
    wide = bank._wider(open_, 5)
    wide[:, :3] = False
    torch.testing.assert_close(bank(att, att, x, mask=open_), att(x, mask=open_), rtol=1e-12,
                               atol=1e-14)


def test_gradients_of_the_rows():
    att = Attention(causal=True).double()
    bank = KeysValues(state(), "a", 3, 4, std=1.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.double)
    open_ = torch.ones(5, 8, dtype=torch.bool)
    open_[:, 3:].tril_()
    got = torch.autograd.grad(bank(att, att, x).square().sum(), bank.rows)
    want = torch.autograd.grad(by_hand(att, bank.rows, x, open_).square().sum(), bank.rows)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def mha_by_hand(mha, x, source, rows, pad):
    """nn.MultiheadAttention over its own keys and values, rows (2, B, L, D) and its own bias rows,
    head by head; pad (B, T) hides tokens."""
    D, heads = mha.embed_dim, mha.num_heads
    if mha.in_proj_weight is None:
        weights = mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight
    else:
        weights = mha.in_proj_weight.split(D)
    biases = (0, 0, 0) if mha.in_proj_bias is None else mha.in_proj_bias.split(D)
    q, k, v = (t @ W.t() + b for t, W, b in zip((x, source, source), weights, biases, strict=True))
    k, v = (torch.cat([t, r], 1) for t, r in zip((k, v), rows, strict=True))
    if mha.bias_k is not None:
        k, v = (torch.cat([t, b.expand(len(x), -1, -1)], 1)
                for t, b in ((k, mha.bias_k), (v, mha.bias_v)))
    q, k, v = (t.view(len(x), -1, heads, D // heads).transpose(1, 2) for t in (q, k, v))
    s = q @ k.transpose(-1, -2) * (D // heads) ** -0.5
    hide = F.pad(pad, (0, k.shape[2] - pad.shape[1]))[:, None, None]
    a = s.masked_fill(hide, -torch.inf).softmax(-1) @ v
    return mha.out_proj(a.transpose(1, 2).reshape(len(x), -1, D))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"kdim": 6, "vdim": 6},
                                  {"add_bias_kv": True}])
def test_multihead_attention_takes_them_too(kind, p):                          # findings 3.9
    """As bias rows, or behind each sample's own where its rows are dropped by themselves."""
    mha = nn.MultiheadAttention(8, 4, batch_first=True, **kind).double()
    bank = KeysValues(state(), "a", 3, 8, std=1.0, dropout=p).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=g, dtype=torch.double)
    source = torch.randn(2, 4, kind.get("kdim", 8), generator=g, dtype=torch.double)
    pad = torch.zeros(2, 4, dtype=torch.bool)
    pad[1, 3:] = True
    torch.manual_seed(2)
    rows = F.dropout(bank.rows.unsqueeze(1).expand(-1, 2, -1, -1), p, p > 0)
    want = mha_by_hand(mha, x, source, rows, pad)
    for weights in (True, False):
        torch.manual_seed(2)
        got = bank(mha, mha, x, source, source, key_padding_mask=pad, need_weights=weights)[0]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.manual_seed(2)
    alone = bank(mha, mha, x, source, source)[0]
    torch.testing.assert_close(alone, mha_by_hand(mha, x, source, rows, pad & False))
    torch.manual_seed(2)
    first = F.dropout(bank.rows.unsqueeze(1), p, p > 0)
    torch.manual_seed(2)
    single = bank(mha, mha, x[0], source[0], source[0])[0]     # without a batch
    torch.testing.assert_close(single, mha_by_hand(mha, x[:1], source[:1], first, pad[:1])[0])


def test_multihead_attention_under_a_mask_is_refused():
    mha, bank = nn.MultiheadAttention(8, 4, batch_first=True), KeysValues(state(), "a", 3, 8)
    x = torch.randn(2, 5, 8)
    with pytest.raises(RecipeError, match="attention mask"):
        bank(mha, mha, x, x, x, attn_mask=torch.zeros(5, 5))


def test_dropout_keeps_nothing_and_stops_in_evaluation():                      # findings 3.9
    """A sample's rows are K' already; their mask is drawn again and waits for no backward."""
    bank = KeysValues(state(), "a", 3, 4, std=1.0, dropout=0.5)
    P = bank._dropped(bank.rows.unsqueeze(1), 4)
    assert P.shape == (2, 4, 3, 4) and 0.2 < float((P == 0).float().mean()) < 0.8
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        bank._dropped(bank.rows.unsqueeze(1), 4)
    assert not kept
    (grad,) = torch.autograd.grad(P.sum(), bank.rows)
    torch.testing.assert_close(grad, (P != 0).float().sum(1) * 2)
    bank.eval()
    assert torch.equal(bank._dropped(bank.rows.unsqueeze(1), 4), bank.rows.unsqueeze(1))


# -- what real tokens have ------------------------------------------------------------------------
class Two(nn.Module):
    """Two attentions, one after another, and one that nobody asks about."""

    def __init__(self, gqa=False):
        super().__init__()
        self.a, self.b, self.c = Attention(gqa=gqa), Attention(gqa=gqa), Attention(gqa=gqa)

    def forward(self, x):
        for m in (self.a, self.b, self.c):
            x = m(x).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("gqa", [False, True])
def test_the_keys_and_values_of_real_tokens(gqa):                              # findings 3.9
    """Of the first tokens, sample by sample, before heads are repeated for queries."""
    net, x = Two(gqa), torch.randn(3, 2, 8)
    with Seen(net, {"a": 4, "b": 4}, 3) as seen:
        assert not seen.done
        net(x[:1])
        assert not seen.done
        with pytest.raises(DataError, match="a was given 2 tokens, where 3 rows"):
            seen.rows("a")
        net(x[1:])
        assert seen.done
    first = net.a(x).transpose(1, 2).flatten(2)
    for path, m, t in (("a", net.a, x), ("b", net.b, first)):
        want = torch.stack([m.k(t).flatten(0, 1)[:3], m.v(t).flatten(0, 1)[:3]])
        torch.testing.assert_close(seen.rows(path), want)
        assert not seen.rows(path).requires_grad
    assert set(seen.found) == {"a", "b"}
    assert sum(t.shape[1] for t in seen.found["a"]) == 3, "no more is held than was wanted"
    net(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_an_attention_that_fails_leaves_the_next_one_alone():
    """Whose keys these are is told by what runs now."""
    net = Two()
    with Seen(net, {"a": 4, "b": 4}, 2) as seen:
        with pytest.raises(RuntimeError):
            net.a(torch.randn(1, 2, 5))
        net.c(torch.randn(1, 2, 8))
        assert not seen.done and not seen.inside
        net(torch.randn(1, 2, 8))
    assert seen.done


def test_an_mlp_starts_from_rows():                                            # findings 3.9
    """Where it is wide enough it meets them, else it comes as near as least squares can."""
    rows = torch.randn(2, 4, 6)
    wide = KeysValues(state(), "a", 4, 6, Trunk(4, 5, 3))
    wide.begin(rows)
    torch.testing.assert_close(wide.made(), rows, rtol=1e-4, atol=1e-5)
    narrow = KeysValues(state(), "a", 4, 6, Trunk(4, 5, 1))
    narrow.begin(rows)
    inner = torch.cat([narrow.trunk(), torch.ones(4, 1)], 1)
    best = inner @ torch.linalg.lstsq(inner, rows.transpose(0, 1).reshape(4, 12)).solution
    torch.testing.assert_close(narrow.made(), best.view(4, 2, 6).transpose(0, 1).detach(),
                               rtol=1e-4, atol=1e-5)
    plain = KeysValues(state(), "a", 4, 6)
    plain.begin(rows)
    assert torch.equal(plain.rows, rows) and plain.rows.requires_grad


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


def causal(q, k, v, L, scale=None):
    """Attention in which query t sees the L rows and keys 0..t, entry by entry."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    t, s = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2]).unsqueeze(0)
    return scores.masked_fill(s > t + L, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"enable_gqa": True}])
@pytest.mark.parametrize("keys, queries", [(6, 6), (6, 4)])
def test_a_causal_call_with_a_prefix_is_the_masked_reference(extra, keys, queries):
    """findings 3.8: value and gradients, in float64; query t sees the rows and keys 0..t."""
    L, heads, own = 3, 4, 2 if extra.get("enable_gqa") else 4
    bank = KeysValues(None, "a", L, own * 8, std=1.0).double()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64, requires_grad=True)
               for h, n in ((heads, queries), (own, keys), (own, keys)))
    got = bank.attend(F.scaled_dot_product_attention, (q, k, v), {"is_causal": True, **extra})
    P = [r.view(L, own, 8).transpose(0, 1).expand(2, -1, -1, -1) for r in bank.rows]
    wide = [torch.cat([p, x], 2).repeat_interleave(heads // own, 1) for p, x in
            zip(P, (k, v), strict=True)]
    want = causal(q, *wide, L, extra.get("scale"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    to = [q, k, v, bank.rows]
    for a, b in zip(torch.autograd.grad(got.square().sum(), to),
                    torch.autograd.grad(want.square().sum(), to), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(out)
                                      if isinstance(t, torch.Tensor))])
        return out


def test_a_causal_call_with_a_prefix_makes_no_mask():
    """findings 3.8: T (T + L) numbers stand nowhere, neither in the forward nor in the backward,
    and the numbers are those of the masked reference."""
    T, L, h = 64, 3, 8
    bank = KeysValues(None, "a", L, h, std=1.0)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, T, h, generator=g, requires_grad=True) for _ in range(3))
    with Largest() as seen:
        got = bank.attend(F.scaled_dot_product_attention, (q, k, v), {"is_causal": True})
        got.square().sum().backward()
    assert seen.most <= 2 * (T + L) * h < T * T
    with Largest() as seen:
        want = causal(q, *(torch.cat([r.expand(1, 1, -1, -1), x], 2)
                           for r, x in zip(bank.rows, (k, v), strict=True)), L)
    assert seen.most >= T * (T + L), "a mask would have been seen"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(want.square().sum(), bank.rows)[0],
                               bank.rows.grad, rtol=1e-4, atol=1e-5)


def test_a_causal_model_with_a_prefix_runs_on_the_fused_kernel():
    """findings 3.8: forward and backward with every other kernel forbidden."""
    net, batch = tiny("llama")
    burnish.tune(net, "prefix(length=3)")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        net(**batch).loss.backward()
    assert all(p.grad.any() for m in net.modules() if isinstance(m, KeysValues)
               for p in m.parameters())
