"""WaveFT: a few coefficients of a wavelet transform, against the transform written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.filters import LOW
from burnish.blocks.weight.wavelets import FAMILIES, Wavelets, bands, high
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

#: one of every length, and both of a length
SOME = ["db1", "db2", "db7", "sym4", "coif1", "coif3"]


def synthesis(d, h):
    """(d, m) for a filter: coefficients with zeros between them, convolved, the middle d."""
    m = -(-(d + len(h) - 2) // 2)
    columns = []
    for k in range(m):
        up = np.zeros(2 * m - 1)
        up[2 * k] = 1
        columns.append(np.convolve(up, h)[len(h) - 2 :][:d])
    return torch.tensor(np.stack(columns, 1))


def update(index, c, out, inp, family, alpha):
    """Four bands: low by low, then those whose detail is along outputs, inputs and both."""
    if family == "none":
        return alpha * torch.zeros(out * inp, dtype=c.dtype).index_put((index,), c).view(out, inp)
    h = np.array(LOW[family])
    g = np.array([(-1) ** j * h[len(h) - 1 - j] for j in range(len(h))])
    (lo_o, hi_o), (lo_i, hi_i) = (tuple(synthesis(d, f) for f in (h, g)) for d in (out, inp))
    m, n = lo_o.shape[1], lo_i.shape[1]
    at = ((index // inp) + (2 * m - out) // 2, (index % inp) + (2 * n - inp) // 2)
    grid = torch.zeros(2 * m, 2 * n, dtype=c.dtype).index_put(at, c)
    low, right, below, both = grid[:m, :n], grid[:m, n:], grid[m:, :n], grid[m:, n:]
    return alpha * (lo_o @ low @ lo_i.t() + hi_o @ right @ lo_i.t() + lo_o @ below @ hi_i.t()
                    + hi_o @ both @ hi_i.t())


def made(settings, inp=12, out=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, f"waveft({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Wavelets)
    term.double()
    return model, W, bias, tuned, term


@pytest.mark.parametrize("family", [*SOME, "none"])
@pytest.mark.parametrize("inp, out", [(12, 10), (7, 15)])
def test_outputs_and_gradients_are_those_of_the_transform(family, inp, out):
    _, W, bias, tuned, term = made(f"n=30, alpha=2.0, std=1.0, wavelet={family!r}", inp, out)
    follows(tuned, lambda x, c: F.linear(
        x, W + update(term.index, c, out, inp, family, 2.0), bias), [term.c], (5, 3, inp))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "none"])
def test_every_filter_is_of_an_orthonormal_wavelet(family):
    h = np.array(LOW[family])
    g, n = np.array(high(LOW[family])), int(family.strip("dbsymcoif"))
    assert len(h) == (6 if family[0] == "c" else 2) * n
    for k in range(len(h) // 2):
        a, b = slice(2 * k, None), slice(0, len(h) - 2 * k)
        assert h[a] @ h[b] == pytest.approx(float(k == 0), abs=2e-15)
        assert g[a] @ g[b] == pytest.approx(float(k == 0), abs=2e-15)
        assert abs(h[a] @ g[b]) < 2e-15 and abs(g[a] @ h[b]) < 2e-15
    assert h.sum() == pytest.approx(math.sqrt(2), abs=2e-15)
    i = np.arange(len(h)) / len(h)
    for m in range(2 * n if family[0] == "c" else n):
        assert abs(g @ i**m) < 1e-14
    if family[0] == "c":
        for m in range(1, 2 * n):
            assert abs(h @ (i - 2 * n / len(h)) ** m) < 1e-14


def test_symlets_are_the_most_symmetric_and_daubechies_lean_to_the_front():
    def lean(h):
        at = np.arange(len(h))
        return (np.array(h) ** 2 @ at) / (len(h) - 1)

    for n in range(4, 11):
        assert abs(lean(LOW[f"sym{n}"]) - 0.5) < 0.12 < 0.5 - lean(LOW[f"db{n}"])


def test_a_transform_that_fits_is_a_basis():
    """All coefficients of Haar's: an orthonormal basis of the matrices."""
    term = Wavelets(8, 6, torch.arange(48), 1.0, "db1", 0.0).double()
    basis = []
    for k in range(48):
        with torch.no_grad():
            term.c.copy_(torch.eye(48)[k])
        basis.append(term.dense().detach().flatten())
    gram = torch.stack(basis) @ torch.stack(basis).t()
    torch.testing.assert_close(gram, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", [*SOME, "none"])
def test_columns_are_those_of_the_whole(family):
    _, _, _, _, term = made(f"n=60, std=1.0, wavelet={family!r}", 24, 18)
    whole = term.dense()
    for a, b in ((0, 5), (5, 6), (6, 24), (23, 24)):
        torch.testing.assert_close(term.tile(a, b, None), whole[:, a:b], rtol=0, atol=1e-14)


def test_places_of_a_half():
    assert [bands(d, 2) for d in (7, 8)] == [4, 4] and [bands(d, 8) for d in (7, 8)] == [7, 7]


def test_positions_are_distinct_and_those_of_the_shape():
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    tuned = burnish.tune(net, "waveft(n=50)", head=False, targets="*")
    first, *equal = (t for _, t in tuned.terms(Wavelets))
    assert len(set(first.index.tolist())) == 50 and int(first.index.max()) < 16 * 12
    assert torch.equal(equal[0].index, equal[1].index)
    other = burnish.tune(nn.Sequential(nn.Linear(16, 12)), "waveft(n=50, seed=3)", head=False,
                         targets="0")
    assert not torch.equal(first.index, next(t for _, t in other.terms(Wavelets)).index)


def test_positions_of_torch_are_those_of_its_permutation():
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 5))
    tuned = burnish.tune(net, "waveft(n=50, seed=3, positions='torch')", head=False, targets="*")
    for (_, term), entries in zip(tuned.terms(Wavelets), (192, 60), strict=True):
        want = torch.randperm(entries, generator=torch.Generator().manual_seed(3))[:50]
        assert torch.equal(term.index, want)


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "waveft(n=40)")
    assert torch.equal(net(**batch).logits, want)
    _, _, _, tuned, term = made("n=4000, std=0.5", 100, 100)
    assert float(term.c.detach().std()) == pytest.approx(0.5, rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("positions", ["portable", "torch"])
def test_a_file_of_coefficients_alone_finds_its_positions(positions, tmp_path):
    from safetensors.torch import load_file

    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"waveft(n=20, positions={positions!r}, wavelet='db3')")
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"c"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_what_cannot_be_is_refused():
    with pytest.raises(RankError, match="n=13 coefficients, 0.weight has 12"):
        burnish.tune(nn.Sequential(nn.Linear(4, 3)), "waveft(n=13)", head=False, targets="0")
    burnish.tune(nn.Sequential(nn.Linear(4, 3)), "waveft(n=12)", head=False, targets="0")
    for settings, words in (("n=0", "n=0: expected at least 1"), ("std=-1.0", "std=-1.0: expected"),
                            ("wavelet='sim4'", "'sim4' is no family known here; did you mean"),
                            ("wavelet='db11'", "db1 to db10, sym2 to sym10, coif1 to coif3")):
        with pytest.raises(RecipeError, match=f"^waveft: .*{words}"):
            burnish.parse(f"waveft({settings})")


def test_defaults_counts_and_cost():
    (method,) = burnish.parse("waveft")
    assert method.settings() == {
        "targets": None, "n": 2592, "alpha": 25.0, "wavelet": "db1", "std": 0.0, "seed": 777,
        "positions": "portable"}
    assert burnish.parse("waveft(n=1)")
    place = Place("a", "weight", "linear", 768, 768)
    assert method.count(place) == 2592 and method.per_token(place) == 0
    assert keeps_what_it_says("waveft", "vit") is None
