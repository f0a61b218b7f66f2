"""DSEE: a low-rank update and a few entries, on a backbone that may be pruned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.bilateral import remainder
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.sparse import Few, SparseDelta
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing import follows, stir, tiny
from burnish.testing.checks.cost import keeps_what_it_says

OUT, IN = 10, 24


def made(settings="", more="", out=OUT, inp=IN, **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, out)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"{more}dsee(rank=2, alpha=6, {settings})", head=False, targets="0",
                         **kw)
    ((_, chain),), ((_, few),) = tuned.terms(Chain), tuned.terms(Few)
    chain.double(), few.double()
    return tuned, W, chain, few


@pytest.mark.parametrize("settings", ["entries=5", "entries=6, mask='magnitude'",
                                      "entries=40, mask='random'", "entries=240"])
@pytest.mark.parametrize("pruned", [False, True])
def test_outputs_and_gradients_are_those_of_the_equation(settings, pruned):
    tuned, W, chain, few = made(settings, "magnitude + " if pruned else "")
    n = parse(f"dsee({settings})")[0].entries
    assert few.tokenwise == (n <= IN // 4) != few.tiled
    bias = tuned.model[0].bias.detach().clone()
    stir(tuned, size=0.5)
    M = torch.ones_like(W)
    if pruned:
        M = torch.stack([(row.abs() >= row.abs().sort().values[IN // 2]).double() for row in W])
        assert int(M.sum()) == W.numel() // 2
    assert not any(p.burnish_decay for p in (chain.A, chain.B, few.values))
    index = few.index.long()
    assert index.unique().numel() == n

    def equation(x, A, B, v):
        S = torch.zeros(OUT * IN, dtype=torch.float64).index_put((index,), v).view(OUT, IN)
        return F.linear(x, W * M + 3 * B @ A + S, bias)

    follows(tuned, equation, [chain.A, chain.B, few.values], (5, 3, IN))


def test_what_is_kept_is_x_and_the_narrow_product():
    for targets in ("llama", "bert"):
        assert keeps_what_it_says("dsee", targets) is None
    _, _, _, few = made("entries=6")
    assert few.keeps_input and few.tokenwise and few.columns.tolist() == sorted(
        {i % IN for i in few.index.tolist()})


def test_frozen_values_pass_the_gradient_on():
    tuned, W, chain, few = made("entries=6, mask='magnitude'")
    stir(tuned, size=0.5)
    for p in (chain.A, chain.B, few.values):
        p.requires_grad_(False)
    assert not few.keeps_input
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, OUT, dtype=torch.float64)
    (dx,) = torch.autograd.grad(tuned.model(x), [x], g)
    torch.testing.assert_close(dx, g @ (W + 3 * chain.B @ chain.A + few.dense()))


def test_which_entries():
    _, W, _, few = made("entries=6, mask='magnitude'")
    assert set(few.index.tolist()) == set(W.abs().flatten().topk(6).indices.tolist())
    draws = [set(made(f"entries=6, mask='random', seed={s}")[3].index.tolist()) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    _, W, _, few = made("entries=6, iterations=1, threshold=0.05")
    want = sketched(W.double(), 1, 0.05).abs().flatten().topk(6).indices
    assert set(few.index.tolist()) == set(want.tolist())


def sketched(W, rounds, cut):
    """The decomposition written out, with a whole QR each time."""
    V, S = torch.zeros(0, W.shape[1], dtype=W.dtype), torch.zeros_like(W)
    L = torch.zeros_like(W)
    for _ in range(rounds):
        if len(V) + 5 > min(W.shape):
            break
        V = torch.cat([V, torch.linalg.qr(W - L - S).R[:5]])
        for _ in range(2):
            U = torch.linalg.qr((W - S) @ V.t()).Q
            V = U.t() @ (W - S)
            L = U @ V
            S = (W - L) * ((W - L).abs() > cut)
    return W - L


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_the_decomposition_written_out(rounds):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(20, 16, generator=g, dtype=torch.float64)
    torch.testing.assert_close(remainder(W, rounds, 0.5), sketched(W, rounds, 0.5))
    torch.testing.assert_close(remainder(W.t(), rounds, 0.5), sketched(W.t(), rounds, 0.5))
    assert torch.equal(remainder(W, 9, 0.5), remainder(W, 3, 0.5)), "16 have room for 15 rows"


def test_the_decomposition_finds_planted_entries_in_a_matrix_of_low_rank():
    g = torch.Generator().manual_seed(0)
    low = torch.randn(60, 5, generator=g) @ torch.randn(5, 50, generator=g) / 8
    at = torch.randperm(3000, generator=g)[:20]
    planted = torch.zeros(3000).index_fill(0, at, 0.5).view(60, 50)
    found = remainder(low + planted, 2, 0.1).abs().flatten().topk(20).indices
    assert len(set(found.tolist()) & set(at.tolist())) >= 18
    largest = (low + planted).abs().flatten().topk(20).indices
    assert len(set(largest.tolist()) & set(at.tolist())) < 10, "size alone does not find them"


def test_nothing_left_ends_it():
    W = torch.randn(12, 1) @ torch.randn(1, 14)
    assert float(remainder(W, 100, 0.01).abs().max()) < 1e-5
    assert not remainder(torch.zeros(8, 8), 3, 0.1).any()


def test_a_bert_base_trains_so_many():
    net, _ = tiny("bert", meta=True, hidden_size=768, intermediate_size=3072,
                  num_hidden_layers=12, num_attention_heads=12)
    places = match(Anatomy.of(net), "q,v")
    (method,) = parse("dsee")
    assert len(places) == 24 and sum(method.count(p) for p in places) == 294_912 + 1_536
    assert {method.per_token(p) for p in places} == {8}
    assert method.settings() == {
        "targets": None, "rank": 8, "alpha": 32.0, "entries": 64, "mask": "decomposed",
        "iterations": 100, "threshold": 0.01, "seed": 0}


def test_the_pruned_backbone_is_untouched_by_training():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "magnitude + dsee(rank=2, entries=6, mask='magnitude')", head=False)
    name = "model.layers.0.mlp.up_proj"
    was = net.get_submodule(name).weight.detach().clone()
    assert int((was == 0).sum()) == was.numel() // 2
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    assert torch.equal(net.get_submodule(name).weight, was)
    assert all(t.values.all() for _, t in tuned.terms(Few))


@pytest.mark.parametrize("mask", ["decomposed", "magnitude", "random"])
def test_a_file_brings_the_entries_unless_they_are_drawn(mask, tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"dsee(rank=2, entries=6, mask='{mask}')", head=False)
    stir(tuned)
    tuned.save(tmp_path / "a")
    assert any(n.endswith("index") for n in tuned.tensors()) == (mask != "random")
    other, _ = tiny("llama")
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(dict(net.named_parameters()).get("", p))
    again = burnish.load(other, tmp_path / "a")
    for (_, a), (_, b) in zip(tuned.terms(Few), again.terms(Few), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.values, b.values)
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_entries_of_another_update_are_left_to_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT))
    for mask in ("decomposed", "magnitude", "random"):
        tuned = burnish.tune(nn.Sequential(nn.Linear(IN, OUT)),
                             f"shira(rank=2) + dsee(rank=2, entries=100, mask='{mask}')",
                             head=False, targets="0")
        (few,) = [t for _, t in tuned.terms(Few)]
        (shira,) = [t for _, t in tuned.terms(SparseDelta) if t is not few]
        assert not set(few.index.tolist()) & set(shira.index.tolist())
        assert "index" in few.state_dict(), "what is drawn beside others is in the file"
    with pytest.raises(RankError, match="200 entries are asked for, and 0.weight has 172"):
        burnish.tune(net, "shira(rank=2) + dsee(rank=2, entries=200)", head=False, targets="0")


def test_refusals():
    for text, why in (("entries=0", "at least 1"), ("iterations=0", "at least 1"),
                      ("threshold=0", "is positive"),
                      ("mask='random', threshold=0.1", "threshold does nothing"),
                      ("mask='magnitude', iterations=3", "iterations does nothing"),
                      ("seed=3", "seed does nothing beside mask='decomposed'")):
        with pytest.raises(RecipeError, match=f"^dsee: .*{why}"):
            parse(f"dsee({text})")
    assert parse("dsee(entries=1, iterations=1)")
    with pytest.raises(RankError, match="241 entries are asked for, and 0.weight has 240"):
        made("entries=241")
    with pytest.raises(RankError, match="rank"):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "dsee(entries=1)", head=False, targets="0")
    net = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError, match="not finite"):
        burnish.tune(net, "dsee(rank=2, entries=3)", head=False, targets="0")
    assert burnish.simulate(nn.Sequential(nn.Linear(IN, OUT)), "dsee(rank=2, entries=6)",
                            (torch.zeros(2, IN),), head=False).trainable == 2 * (IN + OUT) + 6
