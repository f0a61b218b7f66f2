"""BiBERT: signs of everything, written out with plain torch in float64; products by counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight.signed import OneBit, Signed, bits_of, counted, of_rows, row_bits, signs
from burnish.core.errors import CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing.models import tiny

F64 = torch.float64


class Through(torch.autograd.Function):
    """Some values, and the gradient of what they are of where that is inside (-1, 1)."""

    @staticmethod
    def forward(ctx, x, values):
        ctx.save_for_backward(x)
        return values

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1), None


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def equation(x, W, bias):
    centred = W - W.mean(1, keepdim=True)
    alpha = W.detach().abs().mean(1, keepdim=True)
    return F.linear(Through.apply(x, sign(x)), Through.apply(centred, alpha * sign(centred)), bias)


@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
@pytest.mark.parametrize("inp", [12, 16, 5])
def test_outputs_and_gradients_are_those_of_the_equation(inp, recipe, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, 7) if kind == "linear" else Conv1D(7, inp)).double()
    nn.init.normal_(net[0].weight)
    tuned = burnish.tune(net, f"{recipe} + bibert(attention=False)", targets="0", head=False)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.1 * torch.randn_like(p.data, dtype=F64)
    own = [p.detach().clone().requires_grad_() for p in tuned.parameters()]
    if recipe == "full":
        W, = [q for q, p in zip(own, tuned.parameters(), strict=True) if p is net[0].weight]
        W = W if kind == "linear" else W.t()
    else:
        (term,) = [t for _, t in tuned.terms(nn.Module) if hasattr(t, "A")]
        W = net[0].weight.detach()
        W = (W if kind == "linear" else W.t()) + term.scale * own[1] @ own[0]
    x = torch.randn(3, 4, inp, dtype=F64)
    x[0, 0, 0] = 0.0                                         # its sign is 1
    y = x.clone().requires_grad_()
    x.requires_grad_()
    got, want = net(x), equation(y, W, net[0].bias.detach())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    assert 0 < int((x.grad == 0).sum()) < x.numel()
    for p, ref in zip(tuned.parameters(), own, strict=True):
        if ref.grad is not None:
            torch.testing.assert_close(p.grad, ref.grad, rtol=1e-8, atol=1e-8)


def attention(q, k, v, mask=None, causal=False, keep=None, dropout=0.0):
    """Written out with scores of tokens by tokens."""
    q, k, v = (Through.apply(t, sign(t)) for t in (q, k, v))
    S = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        S = S.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else S + mask
    if causal:
        S = S.masked_fill(torch.ones(S.shape[-2:]).triu(1).bool(), float("-inf"))
    if keep is not None:
        S = torch.where(keep, S / (1 - dropout), torch.zeros_like(S))
    P = Through.apply(S, (S > 0).to(S.dtype))
    return P @ v


@pytest.mark.parametrize("how", ["plain", "bool", "added", "causal", "grouped"])
def test_attention_is_that_of_the_equation(how):
    torch.manual_seed(1)
    kv = 2 if how == "grouped" else 4
    q = torch.randn(2, 4, 6, 9, dtype=F64, requires_grad=True)
    k, v = (torch.randn(2, kv, 6, 9, dtype=F64, requires_grad=True) for _ in range(2))
    given = {}
    if how == "bool":
        given["attn_mask"] = torch.rand(2, 1, 6, 6) > 0.3
    if how == "added":
        given["attn_mask"] = torch.where(torch.rand(2, 1, 6, 6) > 0.3, 0.0, -10000.0).double()
    if how == "causal":
        given["is_causal"] = True
    own = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    wide = [own[0], *(t.repeat_interleave(4 // kv, 1) for t in own[1:])]
    want = attention(*wide, given.get("attn_mask"), how == "causal")
    got = OneBit.attend(None, None, None, (q, k, v), given)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for a, b in zip((q, k, v), own, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
        assert a.grad.abs().sum() > 0


def test_a_score_that_is_dropped_is_zero(monkeypatch):
    torch.manual_seed(2)
    drawn = torch.rand(2, 4, 6, 6)
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: drawn)
    q, k, v = (torch.randn(2, 4, 6, 9, dtype=F64, requires_grad=True) for _ in range(3))
    own = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    got = OneBit.attend(None, None, None, (q, k, v), {"dropout_p": 0.25})
    want = attention(*own, keep=drawn >= 0.25, dropout=0.25)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for a, b in zip((q, k, v), own, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_a_masked_token_is_seen_by_nobody():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 3] = -10000.0
    out = OneBit.attend(None, None, None, (q, k, v), {"attn_mask": mask})
    v[..., 3, :] *= -1
    assert torch.equal(out, OneBit.attend(None, None, None, (q, k, v), {"attn_mask": mask}))


def test_sites_hold_two_values_and_products_are_counts():
    """Outputs of sites are +-1 and +-alpha; the float product is the count of differing bits."""
    torch.manual_seed(0)
    x, W = torch.randn(6, 21), torch.randn(4, 21)
    term = Signed(21)
    X = term.opened(term.code(x), torch.float32)
    V, _ = term.rounded(term.ready(W), W)
    assert set(X.flatten().tolist()) == {-1.0, 1.0}
    assert all(len(set(row.abs().tolist())) == 1 for row in V)
    a, b = row_bits(x >= 0), row_bits(term.ready(W) >= 0)
    count = counted(a, b, 21)
    assert torch.equal(count.float(), X @ V.sign().t()) and count.dtype == torch.int64
    torch.testing.assert_close(count * V.abs()[:, 0], X @ V.t())


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16])
def test_bits_of_rows(n):
    mask = torch.rand(3, 2, n) > 0.5
    assert row_bits(mask).shape == (3, 2, -(-n // 8)) and torch.equal(of_rows(row_bits(mask), n),
                                                                      mask)
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 0.5, -2.0]])
    sign_bits, inside = bits_of(x)
    assert signs(sign_bits, 6, F64).tolist() == [[1, 1, 1, -1, 1, -1]]
    assert of_rows(inside, 6).tolist() == [[True, True, False, False, True, False]]


def test_a_table_has_a_scale_and_a_mean_per_token():
    net = nn.Sequential(nn.Embedding(11, 6))
    W = net[0].weight.detach().clone().double()
    burnish.tune(net, "full + bibert(attention=False, targets='0')", head=False)
    centred = W - W.mean(1, keepdim=True)
    want = W.abs().mean(1, keepdim=True) * sign(centred)
    got = net(torch.arange(11))
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    assert float(net[0].weight.grad.abs().sum()) > 0


def test_backward_keeps_two_bits_of_what_is_read():
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    burnish.tune(net, "full + bibert(attention=False)", targets="0", head=False)
    x = torch.randn(10, 64)
    with Ledger(net) as ledger:
        ledger.watch("weights", [x])
        y = net(x)
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert alive - y.nbytes == 10 * 2 * 64 // 8


def test_on_a_model_attention_is_on_signs_and_the_latent_weights_train():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "full + bibert", head=False)
    with torch.no_grad():
        net.eval()
        on = net(**batch).logits
    off = burnish.tune(tiny("bert")[0].eval(), "full + bibert(attention=False)", head=False)
    with torch.no_grad():
        assert float((off.model(**batch).logits - on).abs().max()) > 1e-3
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0]
    with pytest.raises(CheckError, match="merge"):
        tuned.merge()


def test_one_says_how_attention_is_computed():
    parse("bibert(targets='q') + bibert(targets='v', attention=False)")
    with pytest.raises(RecipeError, match="how attention is computed"):
        parse("bibert(targets='q') + bibert(targets='v')")


def test_settings_and_refusals():
    assert parse("bibert")[0].settings() == {"targets": None, "attention": True}
    with pytest.raises(RecipeError, match="attention"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "full + bibert", targets="0", head=False)
    head = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    tuned = burnish.tune(head, "lora(rank=2) + bibert(attention=False)", targets="all", head=False)
    assert [n for n, _ in tuned.terms(Signed)] == ["body.weight"]
    q = torch.randn(2, 1, 4, 8)
    with pytest.raises(RecipeError, match="attention on signs has no form"):
        torch.func.vmap(lambda t: OneBit.attend(None, None, None, (t, t, t), {}))(q)
