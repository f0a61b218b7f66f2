"""LLaMA-Adapter: rows beside an attention, behind a gate, written out in float64."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.gated_rows import GatedRows
from burnish.blocks.weight.factor import Chain
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.methods.prompt._stacks import key_value_linears
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def softmax_sum(scores, v):
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    return torch.einsum("bhqk,bhkd->bhqd", e / e.sum(-1, keepdim=True), v)


def attention(q, k, v, mask, causal, scale):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    real = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if causal:
        real = real.masked_fill(~torch.ones_like(real, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        real = real.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else real + mask
    return softmax_sum(real, v)


def aside(q, P_k, P_v, g, scale):
    """g softmax(t q P_k^T) P_v, head by head; no mask, no positions."""
    B, H, _, h = q.shape
    P_k, P_v = (P.view(len(P), -1, h).permute(1, 0, 2).expand(B, -1, -1, -1) for P in (P_k, P_v))
    P_k, P_v = (P.repeat_interleave(H // P.shape[1], 1) for P in (P_k, P_v))
    scale = 1 / math.sqrt(h) if scale is None else scale
    return g.view(1, -1, 1, 1) * softmax_sum(scale * torch.einsum("bhqd,bhkd->bhqk", q, P_k), P_v)


def projected(attn, P):
    """W_k P + b_k and W_v P + b_v of an attention of any of these families."""
    found = dict(attn.named_modules())
    for last in ("c_attn", "qkv"):
        if last in found:
            m = found[last]
            W = m.weight if last == "c_attn" else m.weight.t()
            return (P @ W + m.bias).chunk(3, -1)[1:]
    made = []
    for kind in ("k", "v"):
        m = next(m for n, m in found.items() if n.rpartition(".")[2] in
                 (kind, f"{kind}_proj", {"k": "key", "v": "value"}[kind]))
        made.append(P @ m.weight.t() + (0 if m.bias is None else m.bias))
    return made


def stock(one, monkeypatch, squash=False):
    """Logits of the base with the equation in the place of its attention, call by call."""
    gates = dict(one.at("gate"))
    calls = [(one.base.get_submodule(path), P, gates[path]) for path, P in one.at("rows")]
    free = 2 - len(calls)                        # the first blocks have no rows
    met = []

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        met.append(1)
        y = attention(q, k, v, attn_mask, is_causal, scale)
        if len(met) <= free:
            return y
        attn, P, g = calls[len(met) - 1 - free]
        return y + aside(q, *projected(attn, P), g.tanh() if squash else g, scale)

    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        out = one.base(**one.batch).logits
    assert len(met) == 2
    return out


@pytest.mark.parametrize("model", ["vit", "timm_qkv", "llama", "gpt2", "bert"])
def test_the_equation_written_out(beside, monkeypatch, model):
    """One gate; fused projections, grouped queries, causal and padded too."""
    one = beside(model, "adaption_prompt(length=3)")
    assert [tuple(p.shape) for p in one.theta.values()] == [(3, 32), (1,)] * 2
    if model in ("llama", "bert"):
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -2:] = 0
    one.agree(stock(one, monkeypatch))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_gate_for_each_head_and_its_tanh(beside, monkeypatch, model):
    one = beside(model, "adaption_prompt(length=3, per_head=True, squash=True)", size=0.7)
    assert {tuple(p.shape) for _, p in one.at("gate")} == {(4,)}
    one.agree(stock(one, monkeypatch, squash=True))


def test_the_last_layers_alone(beside, monkeypatch):
    one = beside("llama", "adaption_prompt(length=3, layers=1)")
    assert [path for path, _ in one.at("rows")] == ["model.layers.1.self_attn"]
    one.agree(stock(one, monkeypatch))


def test_an_update_of_the_projections_moves_the_rows_too():
    """P_k and P_v are what the layer makes of the rows, adapters on it included."""
    net, batch = tiny("llama", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "adaption_prompt(length=3) + lora(rank=2, targets='k,v')")
    g = torch.Generator().manual_seed(0)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    merged = burnish.tune(base, "adaption_prompt(length=3)")
    own = dict(tuned.named_parameters())
    for name, p in merged.named_parameters():
        p.data = own[name].data.clone()
    for name, term in tuned.terms(Chain):
        base.get_parameter(name).data += term.dense().detach()
    for m in (net, base):
        m.eval()
    torch.testing.assert_close(net(**batch).logits, base(**batch).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("recipe", ["prefix(length=2) + adaption_prompt(length=3)",
                                    "adaption_prompt(length=3) + prefix(length=2)"])
def test_beside_a_prefix(recipe, monkeypatch):
    """Rows before the keys take their share of real attention, and nothing of the rows beside."""
    net, batch = tiny("llama", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, recipe)
    g = torch.Generator().manual_seed(0)
    prefix, rows = [], []
    for name, p in tuned.named_parameters():
        p.data = p.data.double() + 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
        (prefix if ".prefix." in name else rows).append(p.detach())
    attns = [b.self_attn for b in base.model.layers]
    calls = iter(zip(prefix, zip(attns, rows[::2], rows[1::2], strict=True), strict=True))

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        assert attn_mask is None
        P, (attn, R, gate) = next(calls)
        T = q.shape[-2]
        seen = torch.ones(T, T, dtype=torch.bool).tril() if is_causal else \
            torch.ones(T, T, dtype=torch.bool)
        own = P.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2).unsqueeze(1)
        own = own.expand(-1, len(q), -1, -1, -1)
        own = own.repeat_interleave(k.shape[1] // own.shape[2], 2)
        y = attention(q, torch.cat([own[0], k], 2), torch.cat([own[1], v], 2),
                      F.pad(seen, (P.shape[1], 0), value=True), False, scale)
        return y + aside(q, *projected(attn, R), gate, scale)

    for m in (net, base):
        m.eval()
    got = net(**batch).logits
    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        want = base(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_the_start():
    """Gates of zero: the base bit for bit; rows are normal."""
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "adaption_prompt(length=300)")
    net.eval()
    assert torch.equal(net(**batch).logits, want)
    for name, p in tuned.named_parameters():
        if name.endswith("gate"):
            assert not p.any()
        else:
            assert float(p.detach().std()) == pytest.approx(1, rel=0.05)


def test_counts_and_defaults():
    m = parse("adaption_prompt")[0]
    assert (m.length, m.layers, m.per_head, m.squash) == (10, None, False, False)
    assert m.count(2, 16, 4) == 2 * 161
    assert parse("adaption_prompt(length=1)")[0].count(2, 16, 4) == 2 * 17
    assert parse("adaption_prompt(per_head=True)")[0].count(2, 16, 4) == 2 * 164
    assert (m.repeats(), parse("adaption_prompt(layers=1)")[0].repeats()) == (1, None)


def test_the_count_of_the_paper():
    """1.2M on LLaMA-7B: 10 rows in the last 30 blocks."""
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    m = parse("adaption_prompt(layers=30)")[0]
    blocks = m.prompt(anatomy).blocks
    assert [b.index for b in blocks] == list(range(2, 32))
    widths = {key_value_linears(anatomy, b.index, b.attn, m.name)[0].inp for b in blocks}
    assert widths == {4096} and m.count(30, 4096, 32) == 1_228_830


def test_every_stack_has_its_last_layers():
    net = tiny("whisper")[0]
    burnish.tune(net, "adaption_prompt(length=2, layers=1)")
    at = [n.partition(".burnish")[0] for n, m in net.named_modules() if isinstance(m, GatedRows)]
    assert at == ["model.encoder.layers.1.self_attn", "model.decoder.layers.1.self_attn"]


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "adaption_prompt(length=0)", "at least one row"),
    ("vit", "adaption_prompt(targets='q')", "no targets.*layers"),
    ("vit", "adaption_prompt(layers=3)", "has 2 blocks with attention"),
    ("vit", "adaption_prompt(layers=0)", "has 2 blocks with attention"),
    ("convnext", "adaption_prompt", "no attention"),
    ("encoder", "adaption_prompt", "MultiheadAttention"),
    ("vit", "adaption_prompt + pq_attention", "the exact attention"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_keys_that_no_linear_makes_alone():
    fused = SimpleNamespace(block=3, role="qkv", kind="linear", path="h.3.attn.qkv")
    other = SimpleNamespace(block=2, role="k", kind="linear", path="h.3.attn.k")
    cross = SimpleNamespace(block=3, role="k", kind="linear", path="h.3.other.k")
    anatomy = SimpleNamespace(places=[other, cross, fused], slices=lambda p: ())
    with pytest.raises(burnish.RecipeError, match=r"h\.3\.attn has no linear whose outputs"):
        key_value_linears(anatomy, 3, "h.3.attn", "adaption_prompt")
