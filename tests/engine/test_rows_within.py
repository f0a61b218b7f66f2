"""A fused projection that is tuned as a whole and by its rows at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.within import Within
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

ROWS = "lora(rank=2, targets='q,v')"
WHOLE = {"timm_qkv": "attn.qkv", "gpt2": "c_attn"}


def stirred(model, recipe):
    net, batch = tiny(model)
    net, batch = net.double(), {k: v.double() if v.is_floating_point() else v
                                for k, v in batch.items()}
    tuned = burnish.tune(net, recipe, head=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64) * 0.3
    return tuned, batch


def terms(tuned, path):
    """(place, term) of everything added to one module."""
    return [(p.place, slot.module_of(p)) for at, _, slot in slots(tuned.model) if at == path
            for p in slot.parts]


def fused(tuned, model):
    """(the first fused module, its weight as (out, in), the update written out, its leaves)."""
    (path, layer), = [(n, m) for n, m in tuned.model.named_modules()
                      if n.endswith(WHOLE[model])][:1]
    W = (layer.weight if model == "timm_qkv" else layer.weight.t()).detach().clone()
    leaves, delta = {}, torch.zeros_like(W)
    for place, term in terms(tuned, path):
        own = {n: p.detach().clone().requires_grad_() for n, p in term.named_parameters()}
        leaves |= {p: own[n] for n, p in term.named_parameters()}
        if isinstance(term, Chain):
            part = term.scale * own["B"] @ own["A"]
        else:
            part = torch.zeros(term.out * term.inp, dtype=W.dtype).index_put(
                (term.index.long(),), own["values"]).view(term.out, term.inp)
        a, b = place.rows or (0, W.shape[0])
        delta = delta + F.pad(part, (0, 0, a, W.shape[0] - b))
    return layer, W, delta, leaves


@pytest.mark.parametrize("model", WHOLE)
@pytest.mark.parametrize("other", ["shira(rank=1, targets='{}')", "lora(rank=3, targets='{}')"])
@pytest.mark.parametrize("first", [True, False])
def test_both_act_with_the_gradients_of_the_sum(model, other, first):     # findings 3.5
    parts = [ROWS, other.format(WHOLE[model])]
    tuned, _ = stirred(model, " + ".join(parts if first else parts[::-1]))
    layer, W, delta, leaves = fused(tuned, model)
    x = torch.randn(2, 5, W.shape[1], dtype=torch.float64, requires_grad=True)
    x2, g = x.detach().clone().requires_grad_(), torch.randn(2, 5, W.shape[0]).double()
    got, want = layer(x), F.linear(x2, W + delta, layer.bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, [x, *leaves], g),
                    torch.autograd.grad(want, [x2, *leaves.values()], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    x0 = x.detach()
    torch.testing.assert_close(tuned.merge() and layer(x0), want.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropping", ["q,v", "attn.qkv"])
def test_dropout_acts_on_either(dropping):
    """Rows and the whole each drop their own input; nothing is refused."""
    recipe = " + ".join(f"lora(rank=2, dropout={0.5 if t == dropping else 0.0}, targets='{t}')"
                        for t in ("q,v", "attn.qkv"))
    tuned, batch = stirred("timm_qkv", recipe)
    tuned.model.train()
    torch.manual_seed(0)
    one = tuned.loss(batch)
    torch.manual_seed(0)
    assert torch.equal(tuned.loss(batch), one)
    assert not torch.equal(tuned.loss(batch), one)
    one.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())


def test_dropout_of_the_rows_is_that_of_a_mask_in_forward_and_backward():
    torch.manual_seed(0)
    tuned, _ = stirred("timm_qkv", "lora(rank=2, dropout=0.5, targets='q') + "
                                   "lora(rank=2, targets='attn.qkv')")
    layer = tuned.model.get_submodule("blocks.0.attn.qkv")
    here = {p.rows: t for p, t in terms(tuned, "blocks.0.attn.qkv")}
    (a, b), = [r for r in here if r]
    q, every = here[a, b], here[None]
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    g = torch.randn(7, layer.out_features, dtype=torch.float64)
    layer.train()
    torch.manual_seed(3)
    got = layer(x)
    grads = torch.autograd.grad(got, [q.A, q.B], g)
    A, B = (t.detach().clone().requires_grad_() for t in (q.A, q.B))
    torch.manual_seed(3)
    part = q.scale * F.linear(F.linear(F.dropout(x, 0.5, True), A), B)
    want = F.linear(x, layer.weight + every.dense(), layer.bias) + \
        F.pad(part, (a, layer.out_features - b))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, two in zip(grads, torch.autograd.grad(want, [A, B], g), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_a_function_of_the_whole_stands_over_the_rows():
    """DoRA of the fused weight has the length of V = W + B A + the rows' updates."""
    tuned, _ = stirred("timm_qkv", f"{ROWS} + dora(rank=2, targets='attn.qkv')")
    layer = tuned.model.get_submodule("blocks.0.attn.qkv")
    V, m = layer.weight.detach().clone(), None
    for place, term in terms(tuned, "blocks.0.attn.qkv"):
        if hasattr(term, "m"):
            m = term.m.detach()
        else:
            V[slice(*(place.rows or (0, None)))] += (term.scale * term.B @ term.A).detach()
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    want = x @ ((m / V.norm(dim=1)).unsqueeze(1) * V).t() + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows_first", [True, False])
def test_a_function_of_rows_beside_an_update_of_the_whole_is_refused_beforehand(rows_first):
    parts = ["dora(rank=2, targets='q')", "lora(rank=2, targets='attn.qkv')"]
    net, _ = tiny("timm_qkv")
    before = {n: type(m) for n, m in net.named_modules()}
    with pytest.raises(RecipeError, match="function of W stands over one weight alone"):
        burnish.tune(net, " + ".join(parts if rows_first else parts[::-1]), head=False)
    assert {n: type(m) for n, m in net.named_modules()} == before


def test_rows_of_an_update_pull_from_panels_and_from_tokens_alike():
    torch.manual_seed(0)
    inner = Chain(Place("", "weight", "linear", 3, 6), rank=2, scale=0.5).double()
    nn.init.normal_(inner.B)
    term = Within(inner, (2, 5), 8)
    assert term.theta() == inner.theta()
    want = torch.zeros(8, 6, dtype=torch.float64)
    want[2:5] = 0.5 * inner.B @ inner.A
    assert torch.equal(term.dense(), want)
    assert torch.equal(term.tile(1, 4, None), want[:, 1:4])
    x, g = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    grads = [None, None]
    assert torch.equal(term.pull(0, 6, g.t() @ x, None, grads), want)
    dx = torch.zeros(4, 6, dtype=torch.float64)
    y = torch.zeros(4, 8, dtype=torch.float64)
    kept = term.forward_(x, y, 2.0)
    torch.testing.assert_close(y, 2 * x @ want.t())
    back = term.backward_(g, x, kept, dx, 1.0)
    torch.testing.assert_close(dx, g @ want)
    for a, b in zip(grads, back, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(term.plain(x), x @ want.t())


@pytest.mark.parametrize("model", ["gpt2", "timm_qkv"])
def test_rows_that_nothing_is_added_to_are_decoded_again_too(model):
    """Of a fused weight that a storage holds nothing decoded waits for backward; gradients are
    those of the decoded weight."""
    grads, decoded = [], {}
    for storage in ("nf4(targets='qkv') + ", ""):
        net, batch = tiny(model)
        with torch.no_grad():
            for n, W in decoded.items():                 # the same values, held plainly
                net.get_parameter(n).copy_(W)
        tuned = stir(burnish.tune(net, f"{storage}{ROWS}", head=False))
        kept = []
        tuned.state.tape.pack = lambda t, kept=kept: kept.append(t) or t
        tuned.state.tape.unpack = lambda t: t
        tuned.loss(batch).backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
        if storage:
            decoded = {f"{p.path}.weight": net.get_submodule(p.path).weight.detach()
                       for p in tuned.anatomy.places if p.role == "qkv"}
            stored = {t.untyped_storage().data_ptr() for t in net.parameters() if t.numel()}
            assert not [t.shape for t in kept if t.shape in ((32, 32), (32, 96), (96, 32))
                        and t.untyped_storage().data_ptr() not in stored]
    assert len(decoded) == 2
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-6)
