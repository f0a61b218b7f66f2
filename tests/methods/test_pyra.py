"""PYRA and ToMe: merging written out token by token, on blocks written out in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import burnish
from burnish.blocks.state.merging import Modulated, pairs
from burnish.core.recipe import parse
from burnish.methods.branch.pyra import SCHEDULES
from burnish.testing import stir
from burnish.testing.models import tiny


def merge(x, s, key, r, protected, theta=None):
    """Sample by sample, edge by edge: (x, s) with N - r tokens; class tokens stay in front."""
    if not r:
        return x, s
    xs, ss = [], []
    for b in range(len(x)):
        m = key[b].detach()
        m = m / m.norm(dim=-1, keepdim=True)
        N = len(m)
        even, odd = list(range(0, N, 2)), list(range(1, N, 2))
        edges = []
        for i in even:
            if i >= protected:
                score, j = max((float(m[i] @ m[j]), -n) for n, j in enumerate(odd)
                               if j >= protected)
                edges.append((score, i, odd[-j]))
        edges = sorted(edges, key=lambda e: -e[0])[: min(r, (N - protected) // 2)]
        X = [x[b, n] * s[b, n] for n in range(N)]
        size = [s[b, n] for n in range(N)]
        if edges:
            src = torch.stack([X[i] for _, i, _ in edges])
            if theta is not None:
                a, w, g, h = theta
                z = src + torch.stack([X[j] for _, _, j in edges])
                z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True)
                                                      + 1e-5).sqrt() * g + h
                d_D = 2 / (1 + torch.exp(-(a[: len(edges)].t() @ z)))
                d_T = 2 / (1 + torch.exp(-(z @ w.t()))) - 1
                src = src + (src * d_D) * d_T
            for n, (_, i, j) in enumerate(edges):
                X[j] = X[j] + src[n]
                size[j] = size[j] + s[b, i]
        gone = {i for _, i, _ in edges}
        order = [n for n in range(protected)] + \
            [n for n in even if n not in gone and n >= protected] + \
            [n for n in odd if n >= protected]
        xs.append(torch.stack([X[n] / size[n] for n in order]))
        ss.append(torch.stack([size[n] for n in order]))
    return torch.stack(xs), torch.stack(ss)


def attention(attn, z, s, proportional):
    B, N, D = z.shape
    q, k, v = attn.qkv(z).view(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if proportional:
        scores = scores + s.log().view(B, 1, 1, N)
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D)), k.mean(1)


def written(net, x, rs, theta=None, proportional=True):
    """Logits of the timm-like model, and how many tokens are left."""
    x = net.patch_embed(x)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed
    s = torch.ones_like(x[..., :1])
    for i, (b, r) in enumerate(zip(net.blocks, rs, strict=True)):
        y, key = attention(b.attn, b.norm1(x), s, proportional)
        x, s = merge(x + y, s, key, r, 1, None if theta is None else theta[i])
        x = x + b.mlp(b.norm2(x))
    return net.head(net.norm(x)[:, 0]), x.shape[1]


NAMES = ("change.a", "change.b", "change.norm.weight", "change.norm.bias")


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("r", [3, 8])
def test_the_equation_written_out(beside, r, proportional):
    one = beside("timm_qkv", f"pyra(merged=({r}, 0), proportional={proportional})", size=0.5)
    theta = [[one.theta["blocks.0", n] for n in NAMES], None]
    want, left = written(one.base, one.batch["x"], (r, 0), theta, proportional)
    assert left == 17 - r
    one.agree(want)


def hf(base, batch, rs, theta, proportional=True):
    """The same on a ViT of transformers."""
    x = base.vit.embeddings(batch["pixel_values"])
    s = torch.ones_like(x[..., :1])
    for layer, r, t in zip(base.vit.layers, rs, theta, strict=True):
        a, z = layer.attention, layer.layernorm_before(x)
        q, k, v = (p(z).view(*z.shape[:2], 4, -1).transpose(1, 2)
                   for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = q @ k.mT / math.sqrt(8) + s.log().mT.unsqueeze(1)
        y = a.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x, s = merge(x + y, s, k.mean(1), r, 1, t)
        x = x + layer.mlp(layer.layernorm_after(x))
    return base.classifier(base.vit.layernorm(x)[:, 0]), x.shape[1]


@pytest.mark.parametrize("rs, left", [((4, 3, 0), 10), ((8, 7, 0), 5), ((0, 5, 0), 12)])
def test_the_same_on_a_model_of_transformers(beside, rs, left):
    """17 tokens; the second block is asked for more pairs than there are, or nothing merges in the
    first."""
    one = beside("vit", f"pyra(merged={rs})", size=0.5, num_hidden_layers=3)
    theta = [[one.theta[f"vit.layers.{i}", n] for n in NAMES] if r else None
             for i, r in enumerate(rs)]
    assert len(one.theta) == 4 * sum(r > 0 for r in rs)
    if rs == (8, 7, 0):                              # three of seven rows are never read
        for own in (one.own, one.theta):
            own["vit.layers.1", "change.a"].data[4:] = 5.0
    want, n = hf(one.base, one.batch, rs, theta)
    assert n == left
    one.agree(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_start_it_is_tome_to_the_bit(dtype):
    made = []
    for settings in ("merged=4", "merged=4, modulate=False"):
        net, batch = tiny("timm_qkv", dtype=dtype)
        tuned = burnish.tune(net, f"pyra({settings})")
        made.append(net.eval()(**batch).logits)
    assert torch.equal(*made)
    base, batch = tiny("timm_qkv", dtype=dtype)
    want, _ = written(base, batch["x"], (4, 4))
    torch.testing.assert_close(made[0], want, rtol=1e-5, atol=1e-6)
    assert all(n.startswith("head") for n, _ in tuned.named_parameters())       # ToMe trains none


@pytest.mark.parametrize("protected", [0, 1, 2, 3])
def test_what_is_protected_stays_in_front_and_means_are_kept(protected):
    g = torch.Generator().manual_seed(protected)
    x = torch.randn(2, 11, 6, generator=g, dtype=torch.float64)
    s = torch.randint(1, 5, (2, 11, 1), generator=g).double()
    key = torch.randn(2, 11, 4, generator=g, dtype=torch.float64)
    found = pairs(key, 3, protected)
    X, sizes = found.merged(x * s), found.merged(s)
    want, want_s = merge(x, s, key, 3, protected)
    assert X.shape[1] == 8
    torch.testing.assert_close(X / sizes, want)
    torch.testing.assert_close(sizes, want_s)
    assert torch.equal((X / sizes)[:, :protected], x[:, :protected] * s[:, :protected]
                       / s[:, :protected])
    torch.testing.assert_close(X.sum(1), (x * s).sum(1))            # the weighted sum, and so mean
    assert torch.equal(sizes.sum(1), s.sum(1))


def test_tokens_that_are_left():
    """N - (r_1 + .. + r_l) behind block l."""
    net, batch = tiny("vit", num_hidden_layers=3)
    burnish.tune(net, "pyra(merged=(5, 3, 2))")
    seen = []
    for layer in net.vit.layers:
        layer.register_forward_hook(
            lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).shape[1]))
    net.eval()(**batch)
    assert seen == [12, 9, 7]


def test_the_work_falls_by_what_the_formula_says():
    """Products counted by torch: attention of N_l tokens, MLP of N_(l+1)."""
    d, h, L, r = 32, 64, 4, 3
    flops = []
    for recipe in (None, f"pyra(merged={r}, modulate=False)"):
        net, batch = tiny("vit", num_hidden_layers=L)
        if recipe:
            burnish.tune(net, recipe)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), \
                sdpa_kernel(SDPBackend.MATH):        # others count nothing on a CPU
            net.eval()(pixel_values=batch["pixel_values"][:1])
        flops.append(counter.get_total_flops())
    tokens = [17 - r * i for i in range(L + 1)]

    def work(n, m):                          # in attention, in the MLP
        return 2 * 4 * n * d * d + 2 * 2 * n * n * d + 2 * 2 * m * d * h

    saved = L * work(17, 17) - sum(work(n, m) for n, m in zip(tokens, tokens[1:], strict=False))
    looking = sum(2 * ((n + 1) // 2) * (n // 2) * d // 4 for n in tokens[:L])
    assert flops[0] - flops[1] == saved - looking
    assert flops[1] < 0.8 * flops[0]


def test_counts_and_schedules_of_the_paper():
    """ViT-B "low": 186 pairs and 186 + 12 * 2304 = 27,834 numbers."""
    m = parse("pyra")[0]
    rs = m.pairs(12)
    assert sum(rs) == 186 and sum(m.count(768, r) for r in rs) == 27_834
    assert sum(SCHEDULES["high", 12]) == 192 and len(SCHEDULES["high", 24]) == 24
    assert sum(parse("pyra(merged='high')")[0].pairs(24)) == sum(SCHEDULES["high", 24])
    assert sum(m.pairs(24)) == 190
    net, _ = tiny("vit", num_hidden_layers=12, image_size=56)
    tuned = burnish.tune(net, "pyra", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 186 + 12 * 3 * 32
    assert Modulated(4, 6).norm.weight.numel() == 6


def test_beside_lora_both_train_and_an_mlp_runs_once():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=2, targets='q,k,v') + pyra(merged=(3, 0)) + "
                              "parallel(bottleneck=4)")
    stir(tuned)
    runs = []
    for layer in net.vit.layers:
        for m in (layer.mlp.fc1, layer.attention.q_proj):
            m.register_forward_hook(lambda *_: runs.append(1))
    tuned.loss(batch).backward()
    assert len(runs) == 4 and all(p.grad.any() for p in tuned.parameters())


def test_switched_off_nothing_merges():
    net, batch = tiny("vit")
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "pyra(merged=3)")
    assert not torch.allclose(net.eval()(**batch).logits, before)
    with tuned.disabled():
        assert torch.equal(net(**batch).logits, before)



def test_blocks_that_somebody_else_runs_again_are_refused():
    """They would not know what their tokens stand for."""
    net, batch = tiny("vit")
    net.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = burnish.tune(net, "lora(rank=2) + pyra(merged=3)")
    with pytest.raises(burnish.RecipeError, match="drop the checkpointing"):
        tuned.loss(batch).backward()


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "pyra", "is not of 2 blocks"), ("vit", "pyra(merged=(3, 2, 1))", "is not of 2 blocks"),
    ("vit", "pyra(merged=-1)", "expected 'low'"), ("vit", "pyra(merged='some')", "expected 'low'"),
    ("vit", "pyra(merged=3, targets='mlp')", "takes no targets"),
    ("vit", "pyra(merged=3) + checkpoint", "mode of the blocks"),
    ("vit", "pyra(merged=3) + lora(rank=2) + pq_attention", "how attention is computed"),
    ("vit", "pyra(merged=3) + vpt(length=2)", "by their places"),
    ("bert", "pyra(merged=3)", "pictures|patches"), ("swin", "pyra(merged=3)", "patches"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_defaults():
    m = parse("pyra")[0]
    assert (m.merged, m.modulate, m.proportional) == ("low", True, True)
