"""MiSS: a LoRA whose A is the tiled identity, without a matrix product for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.weight.shards import Shards
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
OUT, N = 24, 6


def test_count_on_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    places = match(anatomy, None)
    assert sum(parse("miss(rank=64)")[0].count(p) for p in places) == 87_031_808
    assert parse("miss(rank=64, mini=32)")[0].count(places[0]) == 64 * 32


@pytest.mark.parametrize("mini", [0, 8], ids=["full", "mini"])
@pytest.mark.parametrize("inp, rank", [(20, 5), (20, 8), (17, 4), (8, 8), (9, 1)],
                         ids=lambda v: str(v))
def test_it_is_lora_with_a_tiled_identity(inp, rank, mini):
    """Output and gradients to 1e-15 of their size, the last shard cut short included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, OUT)).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, f"miss(rank={rank}, mini={mini})")
    ((_, term),) = tuned.terms(Shards)
    term.double()
    nn.init.normal_(term.D)
    A = torch.eye(rank, dtype=torch.float64).repeat(1, -(-inp // rank))[:, :inp]   # (rank, in)
    D = term.D.detach().clone().requires_grad_()
    B = D.repeat(1, OUT // mini if mini else 1).t()                                # (out, rank)
    x = torch.randn(N, inp, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    got = model(x)
    want = x2 @ (W + B @ A).t() + b
    g = torch.randn_like(got)
    pairs = [(got, want), *zip(torch.autograd.grad(got, [x, term.D], g),
                               torch.autograd.grad(want, [x2, D], g), strict=True)]
    for a, c in pairs:
        a, c = a.detach(), c.detach()
        assert float((a - c).abs().max()) <= 1e-15 * max(1.0, float(c.abs().max())) * inp
    assert int(torch.linalg.matrix_rank(term.dense().detach())) <= rank
    torch.testing.assert_close(term.dense(), B @ A, rtol=0, atol=0)
    merged = tuned.merge()(x)
    torch.testing.assert_close(merged, got, rtol=1e-13, atol=1e-13)


def test_rank_numbers_a_token_are_kept_and_no_input():
    model = nn.Sequential(nn.Linear(64, 32))
    tuned = burnish.tune(model, "miss(rank=4)")
    tuned.state.tape.lean, kept = False, []
    tuned.state.tape.pack = lambda t: kept.append(t) or t
    tuned.state.tape.unpack = lambda t: t
    model(torch.randn(16, 64, requires_grad=True))
    assert [tuple(t.shape) for t in kept if not isinstance(t, nn.Parameter)] == [(16, 4)]


def test_panels_and_effective_weights_agree():
    """On a convolution the update joins the weight: the same tiled identity over in x kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).double()
    tuned = burnish.tune(model, "miss(rank=4)", targets="conv")
    ((_, term),) = tuned.terms(Shards)
    term.double()
    nn.init.normal_(term.D)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = torch.nn.functional.conv2d(x, model[0].weight + term.dense().view(8, 3, 3, 3),
                                      model[0].bias)
    torch.testing.assert_close(model(x), want)
    (dD,) = torch.autograd.grad(model(x).square().sum(), term.D)
    (ref,) = torch.autograd.grad(want.square().sum(), term.D)
    torch.testing.assert_close(dD, ref)
    torch.testing.assert_close(term.tile(5, 20, None), term.dense()[:, 5:20])


@pytest.mark.parametrize("settings, word", [("rank=8, mini=7", "does not divide"),
                                            ("rank=21", "largest rank there is 20"),
                                            ("rank=4, mini=-2", "mini")])
def test_settings_that_do_not_fit(settings, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(nn.Sequential(nn.Linear(20, OUT)), f"miss({settings})")


@pytest.mark.parametrize("inp, rank", [(20, 5), (17, 4)])
def test_dropout_stands_before_the_shards(inp, rank):  # findings 3.9
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, OUT)).double()
    W, b = (t.detach().clone() for t in (model[0].weight, model[0].bias))
    tuned = burnish.tune(model, f"miss(rank={rank}, dropout=0.3)", head=False, targets="0")
    ((_, term),) = tuned.terms(Shards)
    term.double()
    nn.init.normal_(term.D)
    D = term.D.detach().clone().requires_grad_()
    x = torch.randn(N, inp, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    tuned.model.train()
    torch.manual_seed(7)
    got = tuned.model(x)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x2, 0.3, True)
    A = torch.eye(rank, dtype=torch.float64).repeat(1, -(-inp // rank))[:, :inp]
    want = x2 @ W.t() + b + dropped @ A.t() @ D
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    g = torch.randn_like(got)
    for a, c in zip(torch.autograd.grad(got, [x, term.D], g),
                    torch.autograd.grad(want, [x2, D], g), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    tuned.model.eval()
    torch.testing.assert_close(tuned.model(x), x @ (W + D.t() @ A).t() + b,
                               rtol=1e-13, atol=1e-13)


def test_it_keeps_what_it_says():
    assert keeps_what_it_says("miss", "vit") is None


def test_defaults_limits_and_decay():
    assert burnish.parse("miss")[0].rank == 64               # the authors'
    with pytest.raises(RecipeError, match="miss: dropout is a probability"):
        burnish.parse("miss(dropout=1.0)")
    tuned = burnish.tune(nn.Sequential(nn.Linear(8, 8)), "miss(rank=2)", head=False)
    assert [g["weight_decay"] for g in tuned.optimizer(weight_decay=0.1).param_groups] == [0.0]


def test_it_takes_as_many_operations_for_many_shards_as_for_few():  # findings 3.10
    def operations(shards: int, rest: int) -> int:
        inp = 4 * shards + rest
        term = Shards(Place("layer", "weight", "linear", OUT, inp), 4, OUT)
        x, y, g, dx = torch.randn(N, inp), torch.zeros(N, OUT), torch.randn(N, OUT), \
            torch.zeros(N, inp)
        with Counting() as counting, torch.no_grad():
            kept = term.forward_(x, y, 1.0)
            term.backward_(g, x, kept, dx, 1.0)
            term.tile(0, inp, None)
        return counting.n

    assert operations(100, 3) == operations(2, 3)
    assert operations(100, 0) == operations(2, 0)


class Counting(TorchDispatchMode):
    """How many operators run."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))
