"""SVFit: singular values that train between singular vectors that stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.between import Diagonal
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(inp=12, out=9, rank=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"svfit(rank={rank})", head=False, targets="0")
    (_, term), = tuned.terms(Diagonal)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    with torch.no_grad():
        term.z.add_(torch.randn_like(term.z))
    follows(tuned, lambda x, z: F.linear(
        x, W + U[:, :4] @ torch.diag(z - term.z0) @ Vt[:4], bias), [term.z], (5, 3, 12),
        rtol=1e-5, atol=1e-6)                                          # vectors are held in fp32
    torch.testing.assert_close(term.z0, S[:4], rtol=1e-6, atol=0)


def test_the_gradient_is_that_of_the_weight_seen_by_its_vectors():
    """d sigma_i = u_i^T dW v_i."""
    model, _, term = made(rank=9)
    x = torch.randn(6, 12, dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    (got,) = torch.autograd.grad(model(x).square().sum(), term.z)
    W = model[0].weight.detach().clone().requires_grad_()
    (dW,) = torch.autograd.grad(F.linear(x, W, model[0].bias.detach()).square().sum(), W)
    U, _, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
    torch.testing.assert_close(got, torch.einsum("oi,ok,ki->k", dW, U, Vt), rtol=1e-5, atol=1e-5)


def test_the_start_and_the_file(tmp_path):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "svfit(rank=8)")
    assert torch.equal(net(**batch).logits, want)
    net.train()
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"z", "z0", "L", "R"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_counts_and_cost():
    (method,) = burnish.parse("svfit(rank=768)")
    place = Place("a", "weight", "linear", 768, 768)
    assert 24 * method.count(place) == 18_432 and method.per_token(place) == 768
    assert 24 * burnish.parse("lora(rank=8)")[0].count(place) == 16 * 18_432
    assert type(method).keeps_input is False and keeps_what_it_says("svfit", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_what_has_no_such_values_is_refused():
    with pytest.raises(RankError, match="^svfit: rank 10"):
        made(rank=10)
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError, match=r"0\.weight"):
        burnish.tune(model, "svfit(rank=2)", head=False, targets="0")
    assert burnish.parse("svfit")[0].settings() == {"targets": None, "rank": 256}
