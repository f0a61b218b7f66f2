"""MoS: factors gathered from shared shards, against plain float64 and against LoRA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.pooled import Pooled, table
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError, TargetError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing import follows, stir
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32}


def made(settings="rank=4, budget=4, pieces=2, own_rows=2, alpha=8", layers=3, inp=12, out=8, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*((inp, out) if k % 2 == 0 else (out, inp)))
                            for k in range(layers))).double()
    tuned = burnish.tune(model, f"mos({settings})", head=False, targets="all", **kw)
    model.burnish.double()
    return model, tuned, dict(tuned.terms(Pooled))


def gathered(pool, index, pieces):
    """Rows of `pieces` shards each, one after another."""
    rows = [torch.cat([pool[int(i)] for i in index[k : k + pieces]])
            for k in range(0, len(index), pieces)]
    return torch.stack(rows)


def test_outputs_and_gradients_are_those_of_the_equation():
    """Two of three matrices share their pools: a shard's gradient sums over its users."""
    model, tuned, terms = made()
    stir(tuned, size=0.5)
    shared = model.burnish.default["mos_shared"]
    names = [n for n, _ in shared.named_parameters()]
    assert len(names) == 4                                 # two kinds: 8 x 12 twice, 12 x 8 once
    first, middle, last = terms.values()
    assert first.names == last.names != middle.names
    layers = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model]

    def equation(x, *pools):
        at = dict(zip(names, pools, strict=True))
        for (W, b), t in zip(layers, terms.values(), strict=True):
            A = gathered(at[t.names[0]], t.a, 2)
            B = gathered(at[t.names[1]], t.b, 2).t()
            x = F.linear(x, W + 2.0 * B @ A, b)
        return x

    follows(tuned, equation, list(shared.parameters()), (4, 3, 12))
    A, B = first.pair()
    assert A.shape == (4, 12) and B.shape == (8, 4)


def test_all_private_in_one_piece_it_is_lora():
    """Budget = private = rank, one piece: rows of the pools are the factors, layer by layer."""
    model, tuned, terms = made("rank=3, budget=3, own_rows=3, pieces=1, alpha=6")
    stir(tuned, size=0.5)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8)).double()
    lora = burnish.tune(other, "lora(rank=3, alpha=6)", head=False, targets="all")
    shared = model.burnish.default["mos_shared"]
    ordinal = {"0.weight": 0, "1.weight": 0, "2.weight": 1}
    for m in other:
        m.burnish.double()
    parts = [(t, m.burnish.default["lora"], slice(3 * ordinal[n], 3 * ordinal[n] + 3))
             for (n, t), m in zip(terms.items(), other, strict=True)]
    with torch.no_grad():
        for t, chain, rows in parts:
            chain.A.copy_(getattr(shared, t.names[0])[rows])
            chain.B.copy_(getattr(shared, t.names[1])[rows].t())
    x = torch.randn(5, 12).double()
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for t, chain, rows in parts:
        torch.testing.assert_close(getattr(shared, t.names[0]).grad[rows], chain.A.grad)
        torch.testing.assert_close(getattr(shared, t.names[1]).grad[rows], chain.B.grad.t())
    assert sum(p.numel() for p in tuned.parameters()) == sum(p.numel() for p in lora.parameters())


@pytest.mark.parametrize("budget, want", [(2, 4_997_120), (8, 19_988_480)])
def test_counts_on_published_shapes_whatever_the_rank(budget, want):
    places = [p for p in match(Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0]), "all-linear")
              if p.block is not None]
    assert len(places) == 224
    for rank in (8, 16):
        (method,) = parse(f"mos(rank={rank}, budget={budget}, pieces=8)")
        with torch.device("meta"):
            pools = method.shared(places)
        assert sum(t.numel() for t in pools.values()) == want and len(pools) == 14
        assert sum(method.count(p) for p in places) == 0
        assert method.per_token(places[0]) == method.rank
    assert parse("mos")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "budget": 2, "pieces": 4, "own_rows": 1,
        "seed": 0}
    assert parse("mos")[0].repeats() is None


def test_tables_draw_no_shard_twice_and_keep_the_private_ones_apart():
    seen = []
    for number in range(3):
        t = table(5, 4, 24, 2, number, f"0/{number}/A")
        public, own = t[: 3 * 4], t[3 * 4 :]
        assert len(t) == 20 and len(set(public.tolist())) == 12 and int(public.max()) < 24
        assert own.tolist() == list(range(24 + 8 * number, 32 + 8 * number))
        seen.append(public.tolist())
    assert seen[0] != seen[1] != seen[2]
    assert table(5, 4, 24, 2, 0, "x").equal(table(5, 4, 24, 2, 0, "x"))
    assert not table(5, 4, 24, 2, 0, "x").equal(table(5, 4, 24, 2, 0, "y"))
    assert table(2, 1, 7, 0, 3, "x").max() < 7


def test_every_private_shard_has_one_reader_and_factors_are_dissociated():
    _, _, terms = made(layers=5)
    public = (4 - 2) * 3 * 2
    users = [t for t in terms.values() if t.inp == 12]
    own = torch.cat([t.a[t.a >= public] for t in users])
    assert sorted(own.tolist()) == list(range(public, 4 * 3 * 2))
    assert all(torch.equal(t.a[t.a >= public], t.b[t.b >= public]) for t in users)
    assert any(not torch.equal(t.a, t.b) for t in users)
    assert any(not torch.equal(t.a[:4], users[0].a[:4]) for t in users[1:])


def test_start_and_spread():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    x = torch.randn(4, 400)
    want = model(x)
    tuned = burnish.tune(model, "mos(rank=3)", targets="all", head=False)
    assert torch.equal(model(x), want)
    pools = dict(model.burnish.default["mos_shared"].named_parameters())
    (A,) = [p.detach() for n, p in pools.items() if n.endswith("A")]
    (B,) = [p.detach() for n, p in pools.items() if n.endswith("B")]
    assert A.shape == B.shape == (2 * 2 * 4, 100) and not B.any()
    assert -400**-0.5 <= float(A.min()) < -0.049 and 0.049 < float(A.max()) <= 400**-0.5
    assert float(A.square().mean()) == pytest.approx(1 / 1200, rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_files_hold_the_pools_alone_and_a_load_draws_the_same_tables(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "mos(rank=4, budget=3, pieces=2, seed=7)", head=False)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(k.endswith(("_A", "_B")) and "mos_shared" in k for k in file)
    torch.manual_seed(99)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_checkpointing_gives_the_pools_their_gradients():
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("vit")
        tuned = stir(burnish.tune(net, "mos(rank=4, budget=3, pieces=2)" + extra, head=False))
        net.eval()
        net(**batch).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    assert all(torch.allclose(grads[1][n], g) and g.any() for n, g in grads[0].items())


@pytest.mark.parametrize("settings", ["pieces=0", "budget=0, own_rows=0", "own_rows=-1",
                                      "own_rows=3", "rank=1, own_rows=2"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^mos"):
        parse(f"mos({settings})")


def test_refusals():
    assert parse("mos(rank=1, budget=1, pieces=1, own_rows=1)") and parse("mos(own_rows=0)")
    with pytest.raises(TargetError, match=r"mos cuts .* into 5 pieces, which 0.weight \(8 x 12\)"):
        made("rank=2, pieces=5")
    with pytest.raises(TargetError, match="into 8 pieces"):
        made("rank=2, pieces=8")                           # 12 has no eighth
    with pytest.raises(burnish.RecipeError, match=r"rank 4 needs more .* the 2 like 0.weight.* 3$"):
        made("rank=4, budget=2, own_rows=1, pieces=2")
    made("rank=3, budget=2, own_rows=1, pieces=2", layers=4)
    with pytest.raises(RankError, match="rank 9 does not fit"):
        made("rank=9, budget=9, own_rows=9, pieces=1")
    with pytest.raises(RankError, match="rank 0 does not fit"):
        made("rank=0, own_rows=0")
    place = Place("l", "weight", "linear", 24, 16)
    assert parse("mos(rank=16, budget=16, own_rows=16)")[0].shared([place])


def test_matrices_too_small_for_the_rank_are_left_alone():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "mos(rank=20, budget=14, own_rows=8, pieces=2)", head=False)
    assert any("too small for its rank" in n for n in tuned.adapters["default"].notes)
    assert {min(t.out, t.inp) for _, t in tuned.terms(Pooled)} == {32}
