"""Bone: blocks of the weight, each turned and moved by the block of its row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.memory.ledger import Ledger
from burnish.methods.delta.ofw.bone import Guide
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

R = 4


def written_out(W: Tensor, D: Tensor) -> Tensor:
    """``W'_pq = W_pq (I + D_p) + D_p``, block by block."""
    r, eye = D.shape[-1], torch.eye(D.shape[-1], dtype=W.dtype)
    rows = []
    for p in range(W.shape[0] // r):
        row = []
        for q in range(W.shape[1] // r):
            block = W[p * r : (p + 1) * r, q * r : (q + 1) * r]
            row.append(block @ (eye + D[p]) + D[p])
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


def tuned_layer(recipe: str = f"bone(rank={R})", out: int = 12, inp: int = 8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    W, b = (t.detach().clone() for t in (model[0].weight, model[0].bias))
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(Guide)
    term.double()
    nn.init.normal_(term.D, std=0.5)
    return tuned, term, W, b


def test_outputs_and_gradients_are_those_of_the_loop():
    tuned, term, W, b = tuned_layer()
    D = term.D.detach().clone().requires_grad_()
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    got, want = tuned.model(x), x2 @ written_out(W, D).t() + b
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(got)
    for a, c in zip(torch.autograd.grad(got, [x, term.D], g),
                    torch.autograd.grad(want, [x2, D], g), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    update = written_out(W, D.detach()) - W
    assert int(torch.linalg.matrix_rank(update)) == 8        # R per block, and yet full
    x0 = torch.randn(2, 8, dtype=torch.float64)
    before = tuned.model(x0)
    merged = tuned.merge()
    torch.testing.assert_close(merged[0].weight, written_out(W, D.detach()), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged(x0), before, rtol=1e-12, atol=1e-12)


def test_it_acts_on_what_others_add_and_on_stored_weights():
    tuned, term, W, b = tuned_layer(f"lora(rank=2, alpha=2) + bone(rank={R})")
    lora = {n.rsplit(".", 1)[-1]: p for n, p in tuned.named_parameters()}
    with torch.no_grad():
        lora["B"].normal_()
    V = W + lora["B"].detach().double() @ lora["A"].detach().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(tuned.model(x), x @ written_out(V, term.D.detach()).t() + b,
                               rtol=1e-6, atol=1e-6)


def test_the_start_is_the_base_to_the_last_bit():
    model = nn.Sequential(nn.Linear(8, 12))
    x = torch.randn(3, 8)
    before = model(x)
    burnish.tune(model, f"bone(rank={R})", head=False, targets="0")
    assert torch.equal(model(x), before)


def test_no_weight_waits_for_backward():
    tuned, _, W, _ = tuned_layer(out=256, inp=256)
    x = torch.randn(2, 256, dtype=torch.float64)
    ledger = Ledger(tuned.model)
    ledger.watch("activations", [x])
    with ledger:
        y = tuned.model(x)
        waiting = [e.bytes for e in ledger.entries
                   if e.death is None and e.category not in ("weights", "activations")]
        y.sum().backward()
    assert sum(waiting) < W.numel()              # 8 bytes each: not an eighth of a copy


def test_what_changed_since_the_forward_is_refused():
    for change in ("D", "base"):
        tuned, term, *_ = tuned_layer()
        y = tuned.model(torch.randn(3, 8, dtype=torch.float64)).sum()
        with torch.no_grad():
            (term.D if change == "D" else tuned.model[0].weight).add_(1)
        with pytest.raises(RuntimeError, match="modified"):
            y.backward()


def test_a_weight_that_trains_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12)).double()
    tuned = burnish.tune(model, f"full + bone(rank={R})", head=False)
    (_, term), = tuned.terms(Guide)
    term.double()
    nn.init.normal_(term.D, std=0.5)
    W, D = (t.detach().clone().requires_grad_() for t in (model[0].weight, term.D))
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    (x @ written_out(W, D).t() + model[0].bias.detach()).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, W.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(term.D.grad, D.grad, rtol=1e-11, atol=1e-11)


def test_count_on_llama_7b():
    dims = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    places = match(Anatomy.of(tiny("llama", meta=True, **dims)[0]), None)
    assert sum(parse("bone(rank=64)")[0].count(p) for p in places) == 87_031_808


@pytest.mark.parametrize("out, inp", [(12, 10), (10, 12)])
def test_blocks_that_do_not_tile_are_refused(out, inp):
    with pytest.raises(RankError, match="must divide both"):
        burnish.tune(nn.Sequential(nn.Linear(inp, out)), f"bone(rank={R})", head=False,
                     targets="0")


def test_decay_leaves_it_alone():
    tuned, *_ = tuned_layer()
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


def test_it_keeps_what_it_says():
    assert keeps_what_it_says("bone", "vit") is None


def test_two_on_different_weights_and_the_smallest_and_largest_block():
    assert burnish.parse("bone")[0].rank == 64               # the authors'
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    tuned = burnish.tune(net, "bone(rank=4, targets='0') + bone(rank=2, targets='1')", head=False)
    assert [t.rank for _, t in tuned.terms(Guide)] == [4, 2]
    tuned.detach()
    for rank in (0, 16):
        with pytest.raises(RankError, match=f"rank {rank} does not fit 0.weight"):
            burnish.tune(net, f"bone(rank={rank})", targets="0", head=False)
