"""WaRA: low-rank maps between wavelet bands, against Haar matrices written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.wavelet import Wavelet, halves, joined
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def haar(d):
    """One level for d features: rows of sums, then of differences; of an odd d the columns that
    it has of the next even one."""
    even = d + d % 2
    H = torch.zeros(even, even, dtype=torch.float64)
    for k in range(even // 2):
        H[k, 2 * k] = H[k, 2 * k + 1] = H[even // 2 + k, 2 * k] = 0.5**0.5
        H[even // 2 + k, 2 * k + 1] = -(0.5**0.5)
    return H[:, :d]


def update(mode, s, out, inp, A, B):
    blocks = [b @ a for a, b in zip(A, B, strict=True)]
    if mode == "shared_feature":
        M = torch.block_diag(blocks[0], blocks[0])
    else:
        M = torch.cat([torch.cat(blocks[:2], 1), torch.cat(blocks[2:], 1)])
    return s * haar(out).t() @ M @ haar(inp)


def made(inp, out, recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(Wavelet)
    term.double()
    return stir(tuned, size=0.3), term


@pytest.mark.parametrize("mode", ["shared_feature", "per_band_weight"])
@pytest.mark.parametrize("inp, out", [(12, 10), (7, 10), (12, 9), (5, 3)])
def test_outputs_and_gradients_are_those_of_the_equation(inp, out, mode):
    tuned, term = made(inp, out, f"wara(rank=2, alpha=3, mode={mode!r})")
    W, bias = (p.detach().clone() for p in (tuned.model[0].weight, tuned.model[0].bias))
    follows(tuned, lambda x, A, B: F.linear(x, W + update(mode, 1.5, out, inp, A, B), bias),
            [term.A, term.B], (5, 3, inp))


@pytest.mark.parametrize("d", [8, 7])
def test_the_transform_is_orthonormal_and_undone(d):
    x = torch.randn(3, 4, d, dtype=torch.float64)
    low, high = halves(x)
    torch.testing.assert_close(torch.cat([low, high], -1), x @ haar(d).t())
    torch.testing.assert_close(joined(low, high, d), x)
    torch.testing.assert_close(torch.cat([low, high], -1).square().sum(), x.square().sum())


def test_its_rank_is_twice_that_of_the_pair():
    _, term = made(32, 24, "wara(rank=3)")
    assert int(torch.linalg.matrix_rank(term.dense())) == 6
    _, term = made(32, 24, "wara(rank=2, mode='per_band_weight')")
    assert int(torch.linalg.matrix_rank(term.dense())) == 8


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "wara(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    tuned = burnish.tune(nn.Sequential(nn.Linear(800, 200)), "wara(rank=50)", head=False,
                         targets="0")
    (_, term), = tuned.terms(Wavelet)
    scaled = term.A.detach() * 20                        # 1 / sqrt(400)
    assert not term.B.any() and -1 <= float(scaled.min()) < -0.99 < 0.99 < float(scaled.max()) <= 1


@pytest.mark.parametrize("settings, count", [("", 32_768), ("mode='per_band_weight'", 131_072)])
def test_counts(settings, count):
    place = Place("a", "weight", "linear", 4096, 4096)
    (method,) = burnish.parse(f"wara({settings})")
    assert method.count(place) == count and method.per_token(place) == 0
    (lora,) = burnish.parse("lora(rank=8)")
    assert settings or method.count(place) * 2 == lora.count(place)
    tuned, _ = made(7, 10, f"wara(rank=3{', ' * bool(settings)}{settings})")
    assert sum(p.numel() for p in tuned.parameters()) == \
        tuned.recipe[0].count(Place("a", "weight", "linear", 10, 7)) == 27 * (4 if settings else 1)


def test_over_a_grid_one_linear_map_for_all_bands_is_lora_and_is_refused():
    """A transform over tokens commutes with a map of channels."""
    x, M = torch.randn(8, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    low, high = (t.t() for t in halves(x.t()))
    through = joined((low @ M.t()).t(), (high @ M.t()).t(), 8).t()
    torch.testing.assert_close(through, x @ M.t())
    with pytest.raises(RecipeError, match="commutes with it, which is lora; use lora"):
        burnish.parse("wara(mode='spatial')")


def test_what_cannot_act_is_refused():
    def on(settings):
        return burnish.tune(nn.Sequential(nn.Linear(9, 7)), f"wara({settings})", head=False,
                            targets="0")

    on("rank=4")
    with pytest.raises(RankError, match="wara: rank 5 does not fit 0.weight .* halves is 4"):
        on("rank=5")
    with pytest.raises(RankError, match="wara: rank 3 does not fit 0.weight .* halves is 2"):
        burnish.tune(nn.Sequential(nn.Linear(3, 20)), "wara(rank=3)", head=False, targets="0")
    with pytest.raises(RecipeError, match="wara: rank=0"):
        burnish.parse("wara(rank=0)")
    with pytest.raises(RecipeError, match="expected one of shared_feature, per_band_weight"):
        burnish.parse("wara(mode='bands')")
    assert burnish.parse("wara(rank=1)")


def test_defaults_decay_and_cost():
    assert burnish.parse("wara")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "mode": "shared_feature"}
    tuned, _ = made(8, 8, "wara(rank=2)")
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}
    assert keeps_what_it_says("wara", "vit") is None
