"""Compacter: hypercomplex adapters, against matrices put together from Kronecker products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.hypercomplex import Hypercomplex, HypercomplexAdapter, Slow
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny

SITES = [f"vit.layers.{b}.{part}" for b in (0, 1) for part in ("attention.o_proj", "mlp.fc2")]


def made(recipe, model="vit", size=0.3, **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    tuned = burnish.tune(net, recipe, head=False)
    for _, m in tuned.branches(HypercomplexAdapter):
        m.double()
    return stir(tuned, size=size), batch


def matrix(A, s, t):
    """H (d_in, d_out) = sum_i A_i (x) (s_i t_i^T)."""
    return sum(torch.kron(a, u @ v.t()) for a, u, v in zip(A, s, t, strict=True))


def gelu_new(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def adapted(h, A, own):
    z = h @ matrix(A, own["down.s"], own["down.t"]) + own["down.bias"]
    return h + gelu_new(z) @ matrix(A, own["up.s"], own["up.t"]) + own["up.bias"]


@pytest.mark.parametrize("settings, sites", [
    ("reduction=4, norms=False", SITES), ("reduction=8, phm_dim=2, rank=3, norms=False", SITES),
    ("reduction=4, norms=False, placement='mlp'", SITES[1::2])])
def test_loss_and_gradients_are_those_of_the_equation(settings, sites):
    """The shared factors get the sum over all adapters, down and up."""
    tuned, batch = made(f"compacter({settings})")
    own = {site: {n.partition(".compacter.")[2]: p for n, p in tuned.named_parameters()
                  if n.startswith(site)} for site in SITES}
    assert [s for s in SITES if own[s]] == sites
    A = own[sites[0]]["slow.A"]
    assert sum(n == "slow.A" for s in SITES for n in own[s]) == 1, "it stands once"
    base = tiny("vit", dtype=torch.float64)[0]
    for site in sites:
        base.get_submodule(site).register_forward_hook(
            lambda m, a, out, site=site: adapted(out, A, own[site]))
    want, got = base(**batch).loss, tuned.loss(batch)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, a, b in zip(names, torch.autograd.grad(got, params), torch.autograd.grad(want, params),
                       strict=True):
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13, msg=lambda m, n=n: f"{n}: {m}")
    first, *others = (m for _, m in tuned.branches(HypercomplexAdapter))
    assert first.borrowed == () and all(m.borrowed[0] is A and len(m.borrowed) == 1
                                        for m in others)
    assert sum(p is A for g in tuned.optimizer().param_groups for p in g["params"]) == 1


def test_a_layer_is_its_matrix_and_of_low_rank():
    torch.manual_seed(0)
    layer, A = Hypercomplex(768, 24, 4, 1).double(), torch.randn(4, 4, 4, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 768, dtype=torch.float64)
    H = matrix(A, layer.s, layer.t)
    torch.testing.assert_close(layer(x, A), x @ H + layer.bias)
    torch.testing.assert_close(layer(x[0, 0], A), x[0, 0] @ H + layer.bias)
    assert int(torch.linalg.matrix_rank(H)) == 16


def t5_base():
    return tiny("t5", meta=True, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12,
                num_decoder_layers=12, vocab_size=32128)[0]


@pytest.mark.parametrize("settings, total, share", [("", 161_728, 0.073),
                                                    ("placement='mlp'", 104_704, 0.047)])
def test_counts_on_t5_base(settings, total, share):
    """The shares of 222.9M parameters are those that the paper prints."""
    anatomy = Anatomy.of(t5_base())
    whole = sum(p.numel() for p in anatomy.model.parameters())
    assert round(whole / 1e6, 1) == 222.9 and round(100 * total / whole, 3) == share
    (method,) = burnish.parse(f"compacter({settings})")
    assert method.count(768) == 2_376
    adapters = [b.module for b in method.branch(anatomy)]
    norms = [anatomy.model.get_parameter(s.name) for s in method.select(anatomy)]
    assert len(adapters) == (24 if settings else 48) and len(norms) == 62
    assert sum(p.numel() for m in adapters for p in m.parameters()) + \
        sum(p.numel() for p in norms) == total
    assert len(adapters) * method.count(768) + 64 + 62 * 768 == total
    assert burnish.parse("compacter(rank=3)")[0].count(768) == 2 * 3 * 792 + 792


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    tuned = burnish.tune(net, "compacter(reduction=4)", head=False)
    with torch.no_grad():
        got = net(**batch).logits
        with tuned.disabled():
            base = net(**batch).logits
    assert 0 < (got - base).abs().max() < 0.05 * base.abs().max()
    burnish.tune(net2 := tiny("vit")[0].eval(), "compacter(reduction=4, init='zero')")
    with torch.no_grad():
        assert torch.equal(net2(**batch).logits, base)
    torch.manual_seed(0)
    layer = Hypercomplex(4000, 800, 4, 1)
    for p, d in ((layer.s, 1000), (layer.t, 200)):
        bound = math.sqrt(2) * math.sqrt(6 / (d + 1))
        scaled = p.detach() / bound
        assert p.shape == (4, d, 1) and -1 <= float(scaled.min()) < -0.98
        assert 0.98 < float(scaled.max()) <= 1
    assert not layer.bias.any()
    slow = next(m.slow for _, m in tuned.branches(HypercomplexAdapter))
    assert slow.A.shape == (4, 4, 4) and 0.005 < float(slow.A.detach().std()) < 0.015


@pytest.mark.parametrize("norms", [True, False])
def test_norms_train_where_they_are_to(norms):
    tuned, _ = made(f"compacter(reduction=4, norms={norms})")
    assert any("norm" in n for n, _ in tuned.named_parameters()) is norms


def test_between_forward_and_backward_a_site_keeps_its_input_alone():
    kept = []
    for rank in (1, 6):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8))
        adapter = HypercomplexAdapter(8, 4, Slow(4), rank, "relu", True, False)
        x = torch.randn(50, 8, requires_grad=True)
        with Ledger(net) as ledger:
            ledger.watch("weights", [x, *adapter.parameters()])
            out = adapter(x)
            total = out.sum()
            del out
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights"))
        total.backward()
        assert adapter.slow.A.grad is not None and x.grad is not None
    assert kept[0] == kept[1] < 50 * 4 * 4


def test_cross_attention_has_none_and_targets_narrow_it():
    tuned, _ = made("compacter(reduction=4, norms=False)", "t5")
    assert not any("EncDecAttention" in n for n, _ in tuned.named_parameters())
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "compacter(reduction=4, norms=False)", targets="fc2", head=False)
    assert len(list(tuned.branches(HypercomplexAdapter))) == 2


def test_what_cannot_act_is_refused():
    net, _ = tiny("vit")

    def on(settings):
        return burnish.tune(tiny("vit")[0], f"compacter({settings})", head=False)

    with pytest.raises(RecipeError, match="32 channels and a bottleneck of 1, no whole numbers of "
                                          "phm_dim=4 blocks; try reduction=8"):
        on("reduction=32")
    with pytest.raises(RecipeError, match="bottleneck of 6, .* phm_dim=4 .*; try reduction=4"):
        on("reduction=5")
    with pytest.raises(RecipeError, match="bottleneck of 0, .*phm_dim=1 .*try reduction=32"):
        on("reduction=33, phm_dim=1")
    with pytest.raises(RecipeError, match="32 channels .* phm_dim=3 blocks; try another phm_dim"):
        on("reduction=4, phm_dim=3")
    with pytest.raises(RecipeError, match="bottleneck of 16, .*phm_dim=32 .*try reduction=1$"):
        on("reduction=2, phm_dim=32")
    on("reduction=32, phm_dim=1"), on("reduction=1, phm_dim=32")
    for settings in ("reduction=0", "phm_dim=0", "rank=0"):
        with pytest.raises(RecipeError, match="compacter: reduction, phm_dim and rank"):
            burnish.parse(f"compacter({settings})")
    assert burnish.parse("compacter(reduction=1, phm_dim=1, rank=1)")
    with pytest.raises(ConfigError, match="unknown activation 'gelu_old'"):
        burnish.parse("compacter(act='gelu_old')")


def test_defaults():
    assert burnish.parse("compacter")[0].settings() == {
        "targets": None, "reduction": 32, "phm_dim": 4, "rank": 1, "placement": "both",
        "act": "gelu_new", "init": "paper", "norms": True}
