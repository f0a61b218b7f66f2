"""Prefix tuning: what a finished file holds, and a causal call with rows in front."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias

import burnish
from burnish.blocks.state import prompts
from burnish.blocks.state.prompts import KeysValues
from burnish.formats import safe
from burnish.testing import stir
from burnish.testing.models import tiny


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


def causal(q, k, v, L, scale=None):
    """Attention in which query t sees the L rows and keys 0..t, entry by entry."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    t, s = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2]).unsqueeze(0)
    return scores.masked_fill(s > t + L, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_a_causal_call_with_a_prefix_is_the_masked_reference(fused, extra, monkeypatch):
    """findings 3.8: value and gradients, in float64; where a kernel is causal from the lower right
    by itself (CUDA's) it is given that, no mask, in the forward and the backward."""
    L, heads, keys = 3, 4, 2 if extra.get("enable_gqa") else 4
    bank, given = KeysValues(None, "a", L, keys * 8), []
    bank.double()
    monkeypatch.setattr(prompts, "unmasked", lambda q: fused)
    monkeypatch.setattr(KeysValues, "here", SimpleNamespace(box={}))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, 8, generator=g, dtype=torch.float64, requires_grad=True)
               for h in (heads, keys, keys))

    def sdpa(*args, attn_mask=None, **kw):
        given.append(attn_mask)
        return F.scaled_dot_product_attention(*args, attn_mask=attn_mask, **kw)

    got = bank.attend(sdpa, (q, k, v), {"is_causal": True, **extra})
    assert isinstance(given[0], CausalBias) == fused
    P = [bank._heads(r, k) for r in bank.rows]
    wide = [torch.cat([p, x], 2).repeat_interleave(heads // keys, 1) for p, x in
            zip(P, (k, v), strict=True)]
    want = causal(q, *wide, L, extra.get("scale"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    to = [q, k, v, bank.rows]
    for a, b in zip(torch.autograd.grad(got.square().sum(), to),
                    torch.autograd.grad(want.square().sum(), to), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_causal_model_with_a_prefix_runs_on_the_fused_kernel():
    """findings 3.8: forward and backward with every other kernel forbidden."""
    net, batch = tiny("llama")
    burnish.tune(net, "prefix(length=3)")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        net(**batch).loss.backward()
    assert all(p.grad.any() for m in net.modules() if isinstance(m, KeysValues)
               for p in m.parameters())
