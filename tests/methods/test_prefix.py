"""Prefix tuning: attention with rows before keys and values, written out in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.prompts import KeysValues
from burnish.core.recipe import parse
from burnish.methods.prompt.prefix import _key_width
from burnish.testing.models import tiny


def attention(q, k, v, P_k, P_v, mask, causal, scale):
    """softmax(q [P_k; K]^T) [P_v; V] by explicit sums, head by head; the rows see no mask."""
    h = q.shape[-1]
    own = P_k.shape[-1] // h
    P_k, P_v = (P.view(-1, own, h).transpose(0, 1) for P in (P_k, P_v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    P_k, P_v = (t.repeat_interleave(q.shape[1] // own, 0) for t in (P_k, P_v))
    scale = 1 / math.sqrt(h) if scale is None else scale
    real = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if causal:
        real = real.masked_fill(~torch.ones_like(real, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        real = real.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else real + mask
    rows = scale * torch.einsum("bhqd,hkd->bhqk", q, P_k)
    most = torch.cat([rows, real], -1).max(-1, keepdim=True).values
    e_rows, e_real = (rows - most).exp(), (real - most).exp()
    total = e_rows.sum(-1, keepdim=True) + e_real.sum(-1, keepdim=True)
    return (torch.einsum("bhqk,hkd->bhqd", e_rows, P_v)
            + torch.einsum("bhqk,bhkd->bhqd", e_real, v)) / total


def stock(one, monkeypatch, rows, batch=None):
    """Logits of the base whose attentions, in the order of their calls, take these rows."""
    calls = iter(rows)

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        assert not dropout_p
        return attention(q, k, v, *next(calls), attn_mask, is_causal, scale)

    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        out = one.base(**(batch or one.batch)).logits
    assert next(calls, None) is None, "every attention was met"
    return out


@pytest.mark.parametrize("model", ["vit", "timm_qkv", "llama", "gpt2", "bert"])
def test_the_equation_written_out(beside, monkeypatch, model):                 # findings 6
    """K' = [P_k; K], V' = [P_v; V] in every attention; grouped queries, causal and padded too."""
    one = beside(model, "prefix(length=3)")
    rows = [p for _, p in one.at("rows")]
    assert len(rows) == len(one.theta) == 2 and rows[0].shape[:2] == (2, 3)
    if model in ("llama", "bert"):
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -2:] = 0
    one.agree(stock(one, monkeypatch, rows))


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_rows_made_by_an_mlp(beside, monkeypatch, model):                      # findings 6
    """P_l = up_l tanh(W P' + b), P', W and b shared by all layers: 2 H h numbers per row."""
    one = beside(model, "prefix(length=3, hidden=5)")
    (where, P), = one.at("trunk.rows")
    (_, W), = one.at("trunk.down.weight")
    (_, b), = one.at("trunk.down.bias")
    shared = torch.tanh(P @ W.t() + b)
    rows = []
    for (_, U), (_, c) in zip(one.at("up.weight"), one.at("up.bias"), strict=True):
        made = shared @ U.t() + c
        rows.append((made[:, :32], made[:, 32:]))
    assert P.shape == (3, 32) and W.shape == (5, 32) and len(rows) == 2 and where
    one.agree(stock(one, monkeypatch, rows))


def test_multi_head_attention_of_torch(beside):                                # findings 6
    """nn.MultiheadAttention: q, k, v by its own matrices, rows before keys and values."""
    one = beside("encoder", "prefix(length=3)")
    rows = dict(one.at("rows"))
    assert len(rows) == 2
    for path, P in rows.items():
        attn = one.base.get_submodule(path)

        def forward(query, key, value, attn=attn, P=P, **kw):
            assert kw.get("attn_mask") is None and kw.get("key_padding_mask") is None
            x = query if attn.batch_first else query.transpose(0, 1)
            B, N, D = x.shape
            q, k, v = (t.view(B, N, attn.num_heads, -1).transpose(1, 2) for t in
                       (x @ attn.in_proj_weight.t() + attn.in_proj_bias).chunk(3, -1))
            y = attention(q, k, v, P[0], P[1], None, False, None).transpose(1, 2).reshape(B, N, D)
            y = y @ attn.out_proj.weight.t() + attn.out_proj.bias
            return (y if attn.batch_first else y.transpose(0, 1)), None

        attn.forward = forward
    for m in (one.base, one.tuned.model):
        m.train()                                 # in eval torch takes a fused path of its own
    one.agree()


def test_it_is_a_gated_sum():
    """(1 - l) Attn(K, V) + l softmax(q P_k^T) P_v, l the share of the rows."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4, generator=g, dtype=torch.float64) for _ in range(3))
    P_k, P_v = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    rows, real = (torch.exp(q @ t.transpose(-1, -2) / 2) for t in (P_k, k))
    share = rows.sum(-1, keepdim=True) / (rows.sum(-1, keepdim=True) + real.sum(-1, keepdim=True))
    want = (1 - share) * torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v \
        + share * torch.softmax(q @ P_k.t() / 2, -1) @ P_v
    torch.testing.assert_close(attention(q, k, v, P_k, P_v, None, False, None), want)


@pytest.mark.parametrize("recipe", ["prefix(length=500)", "prefix(length=500, hidden=4)"])
def test_the_start(recipe):
    """Rows N(0, 0.02^2); with an MLP P' is normal."""
    tuned = burnish.tune(tiny("vit")[0], recipe, head=False)
    rows = next(p for n, p in tuned.named_parameters() if n.endswith("rows")).detach()
    spread = 1.0 if "hidden" in recipe else 0.02
    assert float(rows.std()) == pytest.approx(spread, rel=0.03)
    assert abs(float(rows.mean())) < 0.05 * spread


def test_keys_narrower_than_the_state_and_cross_attention():
    """One bank per attention, as wide as its keys, in the order of the blocks."""
    sites = {"qwen_moe": 16, "mixtral": 16, "whisper": 32}
    for model, width in sites.items():
        net = tiny(model)[0]
        attentions = [n for n, m in net.named_modules()
                      if n.endswith(("self_attn", "encoder_attn"))]
        banks = {n: m for n, m in burnish.tune(net, "prefix(length=2)").model.named_modules()
                 if isinstance(m, KeysValues)}
        assert [n.partition(".burnish")[0] for n in banks] == attentions
        assert all(m.width == width for m in banks.values())


def test_the_mlp_reads_the_width_of_the_model(beside):
    """P' is as wide as the state, the rows as the keys: under grouped queries they differ."""
    one = beside("llama", "prefix(length=1, hidden=5)")
    ((_, P),) = one.at("trunk.rows")
    assert P.shape == (1, 32) and {U.shape for _, U in one.at("up.weight")} == {(32, 5)}


def test_blocks_of_different_widths():
    """Each attention has rows of its own width, whatever the other blocks hold."""
    tuned = burnish.tune(tiny("swin")[0], "prefix(length=2)", head=False)
    assert [tuple(p.shape) for p in tuned.parameters()] == [(2, 2, 16), (2, 2, 16), (2, 2, 32)]


def test_keys_of_a_fused_weight_that_interleaves_its_heads():
    """out = (heads + 2 kv) h numbers, of which kv h are keys; without heads nothing can be said."""
    place = SimpleNamespace(block=3, role="qkv", out=96, rows=None)
    first = SimpleNamespace(block=3, role="fc1", out=7, rows=None)
    anatomy = SimpleNamespace(places=[first, place], slices=lambda p: [])
    block = SimpleNamespace(heads=4, kv_heads=2, path="layers.3")
    assert _key_width(anatomy, 3, block, "") == 24
    for heads, kv in ((None, 2), (4, None)):
        with pytest.raises(burnish.RecipeError, match="cannot be told"):
            _key_width(anatomy, 3, SimpleNamespace(heads=heads, kv_heads=kv, path="x"), "")
    for number, prefix in ((2, ""), (3, "cross_")):
        with pytest.raises(burnish.RecipeError, match="cannot be told"):
            _key_width(anatomy, number, block, prefix)


def test_counts_and_defaults():
    m = parse("prefix")[0]
    assert m.count(2, 16) == 2 * 2 * 30 * 16
    assert (m.length, m.hidden) == (30, 0)
    assert parse("prefix(length=4, hidden=5)")[0].count(2, 16, 32) == \
        4 * 32 + 33 * 5 + 2 * 2 * 16 * 6


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "prefix(length=0)", "at least one row"), ("vit", "prefix(targets='q')", "no targets"),
    ("convnext", "prefix", "no attention"), ("mlp", "prefix", "no attention"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


@pytest.mark.parametrize("kind", ["eager", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_take_rows_is_refused_before(kind):
    net = tiny("llama")[0]
    net.config._attn_implementation = kind
    with pytest.raises(burnish.RecipeError, match=f"{kind}.*sdpa"):
        burnish.tune(net, "prefix")
