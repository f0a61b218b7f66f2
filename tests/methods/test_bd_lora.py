"""BD-LoRA: one factor of a LoRA is block-diagonal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.methods.delta.lowrank.bd_lora import Blockwise
from burnish.testing import follows
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}


def made(settings, inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"bd_lora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Blockwise)
    term.double()
    return model, tuned, term


def diagonal(t, n):
    """Blocks that stand one below the other, on a diagonal, entry by entry."""
    rows, width = len(t) // n, t.shape[1]
    out = t.new_zeros(len(t), width * n)
    for i in range(len(t)):
        at = i // rows * width
        out[i, at : at + width] = t[i]
    return out


@pytest.mark.parametrize("side", ["A", "B"])
def test_outputs_and_gradients_are_those_of_the_equation(side):
    model, tuned, term = made(f"rank=6, alpha=12, shards=3, sharded='{side}'")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()

    def y(x, A, B):
        A, B = (diagonal(A, 3), B) if side == "A" else (A, diagonal(B, 3))
        return F.linear(x, W + 2.0 * B @ A, bias)

    follows(tuned, y, [term.A, term.B], (5, 3, 12))
    assert term.A.shape == ((6, 4) if side == "A" else (6, 12))
    assert term.B.shape == ((9, 6) if side == "A" else (9, 2))
    A, B = term.pair()
    torch.testing.assert_close(B @ A, term.dense())


def test_one_block_is_lora():
    """The same draws too."""
    model, batch = tiny("llama")
    ours = burnish.tune(model, "bd_lora(rank=4, shards=1)", head=False)
    theirs = burnish.tune(tiny("llama")[0], "lora(rank=4)", head=False)
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.shape == b.shape
        with torch.no_grad():
            b.copy_(torch.randn_like(b)), a.copy_(b)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs.model(**batch).logits)


def test_a_shard_needs_its_own_block_alone():
    """Outputs of one device of B in blocks are made of its part of z."""
    _, _, term = made("rank=6, shards=3, sharded='B'")
    with torch.no_grad():
        term.B.normal_()
        x = torch.randn(4, 12, dtype=torch.float64)
        whole = term.product(x)
        for k in range(3):
            z = x @ term.A[2 * k : 2 * k + 2].t()
            torch.testing.assert_close(z @ term.B[3 * k : 3 * k + 3].t() * term.scale,
                                       whole[:, 3 * k : 3 * k + 3])


def test_sides_by_role_starts_and_counts(uniform):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "bd_lora(rank=4, shards=2)", head=False)
    assert torch.equal(net(**batch).logits, want)
    sides = {n.rpartition(".weight")[0].rpartition(".")[2]: t.cut
             for n, t in tuned.terms(Blockwise)}
    assert {k for k, s in sides.items() if s == "A"} == {"o_proj", "down_proj"}
    assert len(sides) == 7
    for _, t in tuned.terms(Blockwise):
        uniform(t.A, t.A.shape[1] ** -0.5)
        assert not t.B.any()
    (m,) = burnish.parse("bd_lora")
    big = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    assert sum(m.count(p) for p in match(big, "q,o")) == 32 * 2 * 16 * (4096 + 1024)
    assert m.count(Place("a", "weight", "linear", 4096, 11008, role="down")) \
        == 16 * (11008 // 4 + 4096)
    assert m.count(Place("a", "weight", "linear", 11008, 4096, role="up")) \
        == 16 * 4096 + 4 * 11008
    assert m.settings() == {"targets": None, "rank": 16, "alpha": 16.0, "shards": 4,
                            "sharded": "role", "dropout": 0.0}


def test_one_component_in_one_block_is_the_smallest():
    assert made("rank=1, shards=1")[2].A.shape == (1, 12)


@pytest.mark.parametrize("settings, words", [
    ("rank=5, shards=2", "which it must be a multiple of"), ("shards=0", "a multiple of"),
    ("rank=0", "a multiple of"), ("rank=16, shards=2", "the largest rank"),
    ("dropout=1.0", "a probability"),
    ("rank=5, shards=5, sharded='A'", "does not divide the 12 inputs of 0.weight, whose A is cut"),
    ("rank=4, shards=4, sharded='B'", "does not divide the 9 outputs of 0.weight, whose B is cut")])
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(RecipeError, match=f"bd_lora.*{words}"):
        made(settings)
