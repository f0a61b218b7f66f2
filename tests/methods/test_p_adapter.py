"""p-Adapter: pairwise differences written out in float64, outputs and all gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.laplacian import messages, probabilities, weighed
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

E = 1e-8
#: (attention, its last linear, what the MLP reads) of each block
PLACES = {"vit": ("vit.layers.{}.attention", "vit.layers.{}.attention.o_proj", "vit.layers.{}.mlp"),
          "timm_qkv": ("blocks.{}.attn", "blocks.{}.attn.proj", "blocks.{}.mlp"),
          "bert": ("bert.encoder.layer.{}.attention",
                   "bert.encoder.layer.{}.attention.output.dense",
                   "bert.encoder.layer.{}.intermediate.dense"),
          "llama": ("model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj",
                    "model.layers.{}.mlp")}


def softmax(q, k, mask, causal, scale):
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        s = s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    e = (s - s.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def pairwise(A, F_N, F_K, p, own=None):
    """Abar from the differences themselves; of a node with itself e alone is left."""
    d = F_N.unsqueeze(-2) - F_K.unsqueeze(-3)
    N, K, M = d.shape[-3:]
    same = torch.zeros(N, K, dtype=torch.bool)
    if own is not None:
        same[torch.arange(N), torch.arange(N) + K - N] = True
    inside = (A + E).sqrt().unsqueeze(-1) * d + E
    inside = torch.where(same.unsqueeze(-1), torch.full_like(inside, E), inside)
    g = inside.square().sum(-1) ** ((p - 2) / 2)
    return (A * g).masked_fill(same, 0) if own == "exclude" else A * g


def sent(A, F_N, F_K, p, mu, own):
    Abar = pairwise(A, F_N, F_K, p, own)
    alpha = 1 / (Abar.sum(-1) + 2 * mu / p)
    made = torch.einsum("...n,...nk,...km->...nm", alpha, Abar, F_K)
    return made if own is None else made + (alpha * 2 * mu / p).unsqueeze(-1) * F_N


def heads(t, H):
    return t.view(*t.shape[:2], H, -1).transpose(1, 2)


LEAVES = ("down.weight", "down.bias", "gate.weight", "gate.bias", "up.weight", "up.bias", "p", "m")


def stock(one, model, monkeypatch, own, ffn=True):
    """Logits of the base with the equation behind its attentions, block by block."""
    seen = []

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        seen.append((softmax(q, k, attn_mask, is_causal, scale), v))
        return seen[-1][0] @ v

    for i in range(2):
        attn, end, mlp = (t.format(i) for t in PLACES[model])
        D, d, G, g, U, u, p, m = (one.theta[end, n] for n in LEAVES)
        o = one.base.get_submodule(end)

        def behind(module, args, out, o=o, D=D, d=d, G=G, g=g, U=U, u=u, p=p, m=m):
            A, v = seen.pop()
            nodes = v.transpose(1, 2).flatten(2) @ o.weight.t()
            nodes = heads((nodes if o.bias is None else nodes + o.bias) @ D.t() + d, A.shape[1])
            mu = 0.2 + 0.1 * torch.tanh(m)
            made = sent(A, nodes, nodes, p.clamp(1.001, 2), mu, own).transpose(1, 2).flatten(2)
            return out + (F.gelu(out @ G.t() + g) * made) @ U.t() + u

        o.register_forward_hook(behind)
        if ffn:
            D, d, U, u = (one.theta[mlp, n] for n in
                          ("down.weight", "down.bias", "up.weight", "up.bias"))
            one.base.get_submodule(mlp).register_forward_pre_hook(
                lambda module, args, D=D, d=d, U=U, u=u:
                    (args[0] + F.gelu(args[0] @ D.t() + d) @ U.t() + u, *args[1:]))
    with monkeypatch.context() as mp:
        mp.setattr(F, "scaled_dot_product_attention", sdpa)
        return one.base(**one.batch).logits


@pytest.mark.parametrize("own", ["code", "exclude"])
@pytest.mark.parametrize("model", list(PLACES))
def test_the_equation_written_out(beside, monkeypatch, model, own):
    """Fused projections, grouped queries, causal and padded attention."""
    # nearer to 1 all that is not itself is nothing to "code", and m and p have no gradient
    p = 1.8 if own == "code" else 1.25
    one = beside(model, f"p_adapter(reduction=4, self_loop={own!r}, power={p})", size=0.1)
    if model in ("bert", "llama"):
        one.batch["input_ids"] = torch.arange(16).view(2, 8) + 3       # no two tokens alike
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        if model == "bert":
            one.batch["attention_mask"][1, -2:] = 0
    one.agree(stock(one, model, monkeypatch, own))


def test_gradients_of_the_messages_on_a_graph_of_two_sides():
    g = torch.Generator().manual_seed(0)
    A = torch.softmax(torch.randn(2, 3, 5, 7, generator=g, dtype=torch.float64), -1)
    drawn = [A, torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64),
             torch.randn(2, 3, 7, 4, generator=g, dtype=torch.float64),
             torch.tensor(1.4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)]
    ends = []
    for f in (messages, lambda *t: sent(*t, None)):
        leaves = [t.clone().requires_grad_() for t in drawn]
        out = f(*leaves)
        ends.append((out, *torch.autograd.grad(out, leaves, torch.cos(out).detach())))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_lengths_from_products_are_the_pairwise_ones_off_the_diagonal(dtype, rtol):
    g = torch.Generator().manual_seed(0)
    nodes = torch.randn(2, 3, 9, 12, generator=g, dtype=torch.float64)
    A = torch.softmax(torch.randn(2, 3, 9, 9, generator=g, dtype=torch.float64), -1)
    p = torch.tensor(1.25, dtype=torch.float64)
    off = ~torch.eye(9, dtype=torch.bool)
    got = weighed(A.to(dtype), nodes.to(dtype), nodes.to(dtype), p.to(dtype)).double()
    want = pairwise(A, nodes, nodes, p)
    torch.testing.assert_close(got[..., off], want[..., off], rtol=rtol, atol=1e-12)
    # with itself: e sqrt(M), whatever the precision
    loop = A.diagonal(dim1=-2, dim2=-1) * (E * math.sqrt(12)) ** -0.75
    torch.testing.assert_close(got.diagonal(dim1=-2, dim2=-1), loop, rtol=1e-5, atol=0)


def test_at_two_it_is_attention_with_some_of_itself():
    g = torch.Generator().manual_seed(0)
    nodes = torch.randn(1, 2, 6, 4, generator=g, dtype=torch.float64)
    A = torch.softmax(torch.randn(1, 2, 6, 6, generator=g, dtype=torch.float64), -1)
    p, mu = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    want = (A @ nodes + 0.2 * nodes) / 1.2
    torch.testing.assert_close(messages(A, nodes, nodes, p, mu, own="code"), want)


@pytest.mark.parametrize("own", ["code", "exclude"])
def test_what_a_token_is_made_of_sums_to_one(own):
    g = torch.Generator().manual_seed(0)
    A = torch.softmax(torch.randn(1, 1, 6, 6, generator=g, dtype=torch.float64), -1)
    nodes = torch.randn(1, 1, 6, 3, generator=g, dtype=torch.float64)
    p, mu = torch.tensor(1.25, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    # features that move together by c: no difference moves, a mean moves by c
    moved = messages(A, nodes + 3, nodes + 3, p, mu, own=own)
    still = messages(A, nodes, nodes, p, mu, own=own)
    torch.testing.assert_close(moved - still, torch.full_like(still, 3.0), rtol=1e-6, atol=1e-6)


def test_as_published_a_token_hears_itself_and_hardly_others():
    g = torch.Generator().manual_seed(0)
    A = torch.softmax(torch.randn(1, 1, 6, 6, generator=g, dtype=torch.float64), -1)
    nodes = torch.randn(1, 1, 6, 3, generator=g, dtype=torch.float64)
    p, mu = torch.tensor(1.25, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    assert (messages(A, nodes, nodes, p, mu, own="code") - nodes).abs().max() < 1e-3
    assert (messages(A, nodes, nodes, p, mu, own="exclude") - nodes).abs().max() > 0.1


def test_equal_tokens_are_told_by_no_rounding():
    """Two tokens alike in fp32 meet as one does with itself; gradients are numbers."""
    nodes = torch.randn(1, 1, 6, 8)
    nodes[..., 3, :] = nodes[..., 1, :]
    nodes.requires_grad_()
    A = torch.full((1, 1, 6, 6), 1 / 6)
    Abar = weighed(A, nodes, nodes, torch.tensor(1.25))
    torch.testing.assert_close(Abar[0, 0, 1, 3], Abar[0, 0, 1, 1])
    assert torch.autograd.grad(Abar.log().sum(), nodes)[0].isfinite().all()


def test_cross_attention_reads_means_of_the_other_sequence(beside, monkeypatch):
    """Whisper's decoder: queries and `pooled` means of values are the nodes."""
    one = beside("whisper", "p_adapter(reduction=4, pooled=2, ffn=False, power=1.8)",
                 size=0.3)
    seen = []

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        seen.append((softmax(q, k, attn_mask, is_causal, scale), q, v))
        return seen[-1][0] @ v

    def means(t):                                        # (..., K) -> (..., 2)
        half = t.shape[-1] // 2
        assert t.shape[-1] == 2 * half
        return torch.stack([t[..., :half].mean(-1), t[..., half:].mean(-1)], -1)

    for end in {path for path, _ in one.theta}:
        D, d, G, g, U, u, p, m = (one.theta[end, n] for n in LEAVES)
        o = one.base.get_submodule(end)

        def behind(module, args, out, o=o, D=D, d=d, G=G, g=g, U=U, u=u, p=p, m=m,
                   cross="encoder_attn" in end):
            A, q, v = seen.pop()
            q, v = (heads((t.transpose(1, 2).flatten(2) @ o.weight.t() + o.bias) @ D.t() + d, 4)
                    for t in (q, v))
            mu = 0.2 + 0.1 * torch.tanh(m)
            if cross:
                made = sent(means(A), q, means(v.mT).mT, p, mu, None)
            else:
                made = sent(A, v, v, p, mu, "exclude")
            return out + (F.gelu(out @ G.t() + g) * made.transpose(1, 2).flatten(2)) @ U.t() + u

        o.register_forward_hook(behind)
    with monkeypatch.context() as mp:
        mp.setattr(F, "scaled_dot_product_attention", sdpa)
        want = one.base(**one.batch).logits
    assert sum("encoder_attn" in path for path, n in one.theta if n == "p") == 2
    one.agree(want)


def test_a_text_written_word_by_word_is_the_whole_one():
    net, batch = tiny("llama", dtype=torch.float64)
    stir(burnish.tune(net, "p_adapter(reduction=4)"), size=0.3)
    net.eval()
    ids = torch.arange(7).unsqueeze(0) + 3
    whole = net(input_ids=ids).logits
    first = net(input_ids=ids[:, :4], use_cache=True)
    rest = net(input_ids=ids[:, 4:5], past_key_values=first.past_key_values, use_cache=True)
    last = net(input_ids=ids[:, 5:], past_key_values=rest.past_key_values, use_cache=True)
    got = torch.cat([first.logits, rest.logits, last.logits], 1)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-8)


def test_a_cache_of_a_fixed_size_is_refused():
    from transformers import StaticCache

    net, _ = tiny("llama")
    burnish.tune(net, "p_adapter(reduction=4)")
    cache = StaticCache(config=net.config, max_cache_len=12)
    with torch.no_grad():
        net.eval()(input_ids=torch.arange(4).unsqueeze(0), past_key_values=cache, use_cache=True)
        with pytest.raises(burnish.RecipeError, match="fixed size"):
            net(input_ids=torch.arange(1).unsqueeze(0), past_key_values=cache, use_cache=True)


def test_one_token_behind_padding_is_that_of_the_whole_text():
    """There a model of few keys hands the heads of its query over as queries."""
    net, _ = tiny("llama", dtype=torch.float64)
    stir(burnish.tune(net, "p_adapter(reduction=4)"), size=0.3)
    net.eval()
    ids, mask = torch.arange(14).view(2, 7) + 3, torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    whole = net(input_ids=ids, attention_mask=mask).logits
    first = net(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    last = net(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(last.logits, whole[:, 6:], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("first", [True, False])
def test_another_branch_at_the_same_linear_is_not_disturbed(first):
    """One that reads the attention's input reads it once."""
    net, batch = tiny("vit", dtype=torch.float64)
    parts = ["p_adapter(reduction=4)", "parallel(bottleneck=4, placement='attention')"]
    tuned = burnish.tune(net, " + ".join(parts if first else parts[::-1]))
    stir(tuned, size=0.2)
    tuned.loss(batch).backward()
    assert all(p.grad.any() for p in tuned.parameters())


def test_counts_of_the_published_shape():
    """222,146 numbers behind an attention of width 768 at reduction 8, 148,320 before an MLP."""
    m = parse("p_adapter")[0]
    assert (m.count(768), m.count(768, mlp=True)) == (222_146, 148_320)
    sizes = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12,
             "intermediate_size": 3072}
    net, _ = tiny("bert", **sizes)
    tuned = burnish.tune(net, "p_adapter", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * (222_146 + 148_320)


def test_the_start():
    net, batch = tiny("vit")
    before = net.eval()(**batch).logits
    burnish.tune(net, "p_adapter(reduction=4, init='zero')")
    assert torch.equal(net.eval()(**batch).logits, before)
    net, batch = tiny("vit")
    burnish.tune(net, "p_adapter(reduction=4)")
    gap = (net.eval()(**batch).logits - before).abs().max()
    assert 0 < gap < 0.1


def test_powers_are_kept_below_two_and_above_one():
    A = probabilities(torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3), 0.5, None, False)
    nodes, mu = torch.randn(1, 1, 4, 3), torch.tensor(0.2)
    at = [messages(A, nodes, nodes, torch.tensor(p), mu, own="exclude") for p in (2.0, 3.0)]
    assert torch.equal(*at)
    at = [messages(A, nodes, nodes, torch.tensor(p), mu, own="exclude") for p in (1.001, 0.2)]
    assert torch.equal(*at)


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "p_adapter(power=1.0)", "above 1"), ("vit", "p_adapter(power=2.5)", "at most 2"),
    ("vit", "p_adapter(reduction=0)", "at least 1"), ("vit", "p_adapter(inertia=0.0)", "above 0"),
    ("vit", "p_adapter(reduction=5)", "does not divide"),
    ("vit", "p_adapter(reduction=16)", "4 heads"),
    ("vit", "p_adapter(reduction=4) + pq_attention", "exact attention.s prob"),
    ("mamba", "p_adapter(reduction=4)", "no attention"),
    ("encoder", "p_adapter(reduction=4)", "queries and keys"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_defaults():
    m = parse("p_adapter")[0]
    assert (m.reduction, m.power, m.inertia, m.self_loop, m.pooled, m.ffn, m.init) == \
        (8, 1.25, 0.1, "exclude", 16, True, "bert")
