"""PST: a mask of low-rank scores over a weight with a low-rank update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.formats.placed import put
from burnish.methods.delta.sparse.pst import Pruned
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}
SMALL = "rank=3, score_rank=2"


def test_counts_on_a_base_size_encoder():
    """Rank 8 and 8: 17 (in + out), 26,112 on 768 x 768, 2,820,096 on six matrices of 12 blocks."""
    net = tiny("bert", meta=True, vocab_size=30522, max_position_embeddings=512, **BERT_BASE)[0]
    places = match(Anatomy.of(net), None)
    (method,) = parse("pst")
    assert sum(method.count(p) for p in places) == 2_820_096 and len(places) == 72
    assert round(100 * 2_820_096 / sum(p.numel() for p in net.parameters()), 1) == 2.6
    assert {method.count(p) for p in places if p.out == p.inp} == {26_112}
    assert parse("pst(rank=3, score_rank=5)")[0].count(places[0]) == 9 * 1536


def start(settings=SMALL, total=10, lr=1e-2):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    tuned = burnish.tune(net, f"pst({settings})", targets="0,2", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=lr)
    return tuned


def terms(tuned):
    return [t for _, t in tuned.terms(Pruned)]


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 12, generator=g), torch.randn(16, 8, generator=g)
    return tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())


class Through(torch.autograd.Function):
    """A mask, and the identity on the way back."""

    @staticmethod
    def forward(ctx, S, share):
        order = S.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros_like(S).flatten()
        mask[order[: S.numel() - round(share * S.numel())]] = 1
        return mask.view(S.shape)

    @staticmethod
    def backward(ctx, g):
        return g, None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_equation_with_a_dense_mask_straight_through(share):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16)).double()
    tuned = burnish.tune(net, "pst(rank=3, score_rank=2, scale=0.7, alpha=0.4, lines=0.3)",
                         head=False)
    (term,) = terms(tuned)
    term.double().share = share
    stir(tuned, size=0.3)
    W0, b = net[0].weight.detach().clone(), net[0].bias.detach().clone()

    def equation(x, U, Z, A, B, R, C):
        W = W0 + 0.7 * (U @ Z)
        S = W.abs() + 0.4 * (A @ B) + 0.3 * (R[:, None] + C[None, :])
        return x @ (Through.apply(S, share) * W).t() + b

    follows(tuned, equation, [term.U, term.Z, term.A, term.B, term.R, term.C], (5, 12))
    zeros = int((tuned.merge()[0].weight == 0).sum())
    assert zeros == round(share * 12 * 16), "the share of zeros is exact"


def test_it_starts_at_the_base_and_as_published():
    tuned = start(total=None)
    base = copy.deepcopy(tuned.model)
    x = torch.randn(3, 12)
    with tuned.disabled():
        want = tuned.model(x)
    assert torch.equal(tuned.model(x), want) and base is not tuned.model
    for t in terms(tuned):
        assert not any(p.any() for p in (t.Z, t.B, t.R, t.C)) and t.share == 0
        drawn = torch.cat([t.U.flatten(), t.A.flatten()]).detach()
        assert 0.7 < float(drawn.std()) < 1.4 and abs(float(drawn.mean())) < 0.5


def test_a_cubic_rises_to_the_target():
    """Of 10 updates none before the second, the target from the eighth on."""
    tuned = start(f"{SMALL}, ratio=0.8, warmup=0.2, cooldown=0.3", total=10)
    seen = []
    for k in range(11):
        step(tuned, k)
        seen.append([t.share for t in terms(tuned)])        # of the update that comes
    want = [0.0, 0.0, *[0.8 * (1 - (1 - (t - 2) / 5) ** 3) for t in range(3, 7)], *[0.8] * 5]
    assert all(a == b for a, b in seen)
    assert [a for a, _ in seen] == pytest.approx(want)


def test_the_mask_is_chosen_in_every_forward():
    tuned = start(f"{SMALL}, ratio=0.5, warmup=0, cooldown=1", total=4)
    dead = []
    for k in range(4):
        step(tuned, k)
        dead.append(torch.cat([(tuned.model[n].burnish is not None and t.of(
            tuned.model[n].weight) == 0).flatten() for n, t in zip((0, 2), terms(tuned),
                                                                   strict=True)]))
        assert int(dead[-1].sum()) == 96 + 64
    assert not torch.equal(dead[0], dead[-1]), "who is out may come back"


def test_without_a_known_length_nothing_is_pruned():
    tuned = start(total=None)
    for k in range(3):
        step(tuned, k)
    assert all(t.share == 0 for t in terms(tuned))


def test_a_promise_is_of_the_target():
    tuned = start(f"{SMALL}, ratio=0.6")
    handler = tuned.timeline.handlers[0][1]
    handler.rehearse(0)
    assert [t.share for t in terms(tuned)] == [0.6, 0.6]


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    ends = []
    for cut in (None, 3):
        tuned = start(total=6)
        for k in range(6):
            if k == cut:
                saved = copy.deepcopy((tuned.timeline.state(), tuned.tensors(),
                                       tuned.current_optimizer.state_dict()))
                assert 0 < saved[0]["handlers"]["pst"]["share"] < 0.9
                tuned = start(total=None)
                put(tuned, saved[1], "memory")
                tuned.current_optimizer.load_state_dict(saved[2])
                for t in terms(tuned):
                    t.share = 0.0                            # the run knows it, too
                tuned.timeline.load(saved[0])
            step(tuned, k)
        ends.append(tuned.tensors())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_a_saved_adapter_knows_its_share(tmp_path):
    tuned = start(total=2)
    for k in range(2):
        step(tuned, k)
    tuned.save(tmp_path / "a")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    again = burnish.load(base, tmp_path / "a")
    x = torch.randn(3, 12)
    assert [t.share for t in terms(again)] == [0.9, 0.9]
    assert torch.equal(again.model(x), tuned.model(x))


def test_what_is_added_beside_it_is_pruned_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16)).double()
    tuned = burnish.tune(net, f"lora(rank=2) + pst({SMALL})", head=False)
    (term,) = terms(tuned)
    term.share = 0.5
    stir(tuned, size=0.3)
    assert int((tuned.merge()[0].weight == 0).sum()) == 96


def test_in_half_precision_scores_stay_wide():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16)).bfloat16()
    tuned = burnish.tune(net, f"pst({SMALL})", head=False)
    (term,) = terms(tuned)
    term.share = 0.5
    stir(tuned, size=0.01)
    W = net[0].weight.detach()
    wide = W.float() + term.U @ term.Z
    S = wide.abs() + term.A @ term.B + term.R[:, None] + term.C
    live = S.flatten().argsort(descending=True)[:96]
    want = torch.zeros(192).index_put((live,), wide.flatten()[live]).view(16, 12).bfloat16()
    got = term.of(W)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_kept_for_backward_is_the_input_alone():
    assert keeps_what_it_says("pst", "llama") is None


def test_the_defaults():
    assert parse("pst")[0].settings() == {
        "targets": None, "rank": 8, "score_rank": 8, "ratio": 0.9, "scale": 1.0, "alpha": 1.0,
        "lines": 1.0, "warmup": 0.1, "cooldown": 0.1}


@pytest.mark.parametrize("settings", ["ratio=0", "ratio=1", "scale=0", "alpha=0", "lines=0",
                                      "warmup=-0.1", "cooldown=-0.1", "warmup=0.6, cooldown=0.5"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(RecipeError, match="^pst: "):
        parse(f"pst({settings})")


@pytest.mark.parametrize("settings", ["ratio=0.01", "ratio=0.99", "scale=-1", "warmup=0",
                                      "warmup=0.5, cooldown=0.5"])
def test_settings_at_their_bounds_are_taken(settings):
    assert parse(f"pst({settings})")


@pytest.mark.parametrize("settings", ["rank=13", "score_rank=13", "rank=0", "score_rank=0"])
def test_a_rank_that_no_matrix_has_is_refused(settings):
    with pytest.raises((RankError, RecipeError), match="rank"):
        burnish.tune(nn.Sequential(nn.Linear(12, 16)), f"pst({settings})", targets="0",
                     head=False)


def test_two_functions_of_one_weight_are_refused():
    with pytest.raises(RecipeError, match="the function of W"):
        parse("pst + dora")
