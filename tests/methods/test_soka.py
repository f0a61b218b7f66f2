"""SoKA: the principal Kronecker products of a weight, against blocks cut by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.kronecker_sum import LessKronecker, rearranged
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def decaying(out, inp, outer, values):
    """A weight whose Kronecker spectrum is `values`."""
    m, n = outer
    torch.manual_seed(0)
    k = len(values)
    U = torch.linalg.qr(torch.randn(m * n, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(out // m * (inp // n), k, dtype=torch.float64)).Q
    return sum(s * torch.kron(U[:, i].view(m, n), V[:, i].view(out // m, inp // n))
               for i, s in enumerate(values))


def made(inp, out, recipe, W=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    if W is not None:
        model[0].weight.data.copy_(W)
    W = model[0].weight.detach().clone()
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(LessKronecker)
    return tuned, W, term.double()


def added(A, sigma, B):
    return sum(s * torch.kron(a, b) for a, s, b in zip(A, sigma, B, strict=True))


@pytest.mark.parametrize("recipe, inp, out", [
    ("soka(rank=3)", 12, 20), ("soka(rank=2, factor=2)", 12, 20), ("soka(rank=1)", 7, 20)])
def test_outputs_and_gradients_are_those_of_the_equation(recipe, inp, out):
    tuned, W, term = made(inp, out, recipe)
    bias = tuned.model[0].bias.detach().clone()
    theta = [term.A, term.sigma, term.B]
    rest = W - added(*(t.detach().clone() for t in theta))
    stir(tuned, size=0.3)
    follows(tuned, lambda x, *p: F.linear(x, rest + added(*p), bias), theta, (5, 3, inp),
            rtol=1e-6, atol=1e-6)


def test_rows_of_the_rearrangement_are_the_blocks():
    W = torch.arange(6 * 8).view(6, 8)
    R = rearranged(W, (2, 4))
    for i in range(2):
        for j in range(4):
            assert torch.equal(R[i * 4 + j], W[3 * i : 3 * i + 3, 2 * j : 2 * j + 2].flatten())


def test_all_products_are_the_weight_and_what_is_cut_is_the_rest_of_the_spectrum():
    _, W, term = made(12, 20, "soka(rank=12)")           # 4 x 3 and 5 x 4
    theta = [t.detach() for t in (term.A, term.sigma, term.B)]
    assert term.A.shape == (12, 4, 3) and term.B.shape == (12, 5, 4)
    torch.testing.assert_close(added(*theta), W, rtol=1e-5, atol=1e-5)
    S = torch.linalg.svdvals(rearranged(W, (4, 3)))
    torch.testing.assert_close(term.sigma.detach(), S, rtol=1e-5, atol=1e-6)
    for r in (1, 4, 9):
        _, _, cut = made(12, 20, f"soka(rank={r})")
        left = W - added(*(t.detach() for t in (cut.A, cut.sigma, cut.B)))
        torch.testing.assert_close(left.square().sum(), S[r:].square().sum(), rtol=1e-4, atol=1e-6)


def test_the_start_is_the_base():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "soka(rank=2)")
    assert torch.equal(net(**batch).logits, want)


SPECTRUM = [8.0, 4.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


@pytest.mark.parametrize("settings, rank", [
    ("energy=0.7, elbow=False", 1), ("energy=0.93, elbow=False", 2),
    ("energy=0.96, elbow=False", 3), ("energy=1.0, elbow=False, max_rank=5", 5),
    ("energy=1.0, max_rank=8", 3), ("energy=0.93", 2), ("energy=0.7", 1),
    ("energy=1.0, max_rank=2", 2), ("max_rank=1", 1)])
def test_the_rank_is_read_off_the_spectrum(settings, rank):
    W = decaying(16, 16, (4, 4), SPECTRUM)
    tuned, _, term = made(16, 16, f"soka({settings})", W)
    assert term.sigma.numel() == rank, term.sigma
    torch.testing.assert_close(term.sigma.detach(), torch.tensor(SPECTRUM[:rank]).double(),
                               rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in tuned.parameters()) == rank * 33
    assert tuned.recipe[0].count(Place("0", "weight", "linear", 16, 16), rank=rank) == rank * 33


def test_the_rank_rises_with_the_energy():
    W = decaying(16, 16, (4, 4), SPECTRUM)
    ranks = [made(16, 16, f"soka(energy={e})", W)[2].sigma.numel()
             for e in (0.1, 0.5, 0.8, 0.95, 0.99, 1.0)]
    assert ranks == sorted(ranks) and ranks[0] == 1 and ranks[-1] == 3


def test_the_decomposition_is_truncated(monkeypatch):
    """No full decomposition where the matrix is large beside what is looked at."""
    W = decaying(1024, 1024, (32, 32), [5.0, 2.0, 1.0])
    sizes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd",
                        lambda M, **kw: sizes.append(min(M.shape)) or svd(M, **kw))
    _, _, term = made(1024, 1024, "soka(max_rank=4, energy=1.0, elbow=False)", W)
    assert max(sizes) < 20
    torch.testing.assert_close(term.sigma.detach()[:3], torch.tensor([5.0, 2.0, 1.0]).double(),
                               rtol=1e-4, atol=1e-4)


def test_a_file_says_the_ranks(tmp_path):
    import json

    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net.eval(), "soka(max_rank=6, energy=0.5, elbow=False)"))
    ranks = {n: t.sigma.numel() for n, t in tuned.terms(LessKronecker)}
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama", seed=5)
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "burnish" not in k})
    again = burnish.load(other.eval(), tmp_path / "a")
    assert {n: t.sigma.numel() for n, t in again.terms(LessKronecker)} == ranks
    assert torch.equal(other(**batch).logits, want)
    where = tmp_path / "a" / "adapter_config.json"
    if not where.exists():
        where = next(p for p in (tmp_path / "a").glob("*.json") if "rank" in p.read_text())
    text = json.loads(where.read_text())

    def spoil(x):
        if isinstance(x, dict):
            return {k: 7 if k == "rank" else spoil(v) for k, v in x.items()}
        return [spoil(v) for v in x] if isinstance(x, list) else x

    where.write_text(json.dumps(spoil(text)))
    with pytest.raises(burnish.BurnishError, match="rank 7 of .*recipe allows 6"):
        burnish.load(tiny("llama")[0], tmp_path / "a")


def test_a_file_of_one_product(tmp_path):
    net = nn.Sequential(nn.Linear(12, 20))
    base = copy.deepcopy(net)
    tuned = stir(burnish.tune(net, "soka(max_rank=3, energy=0.01)", head=False, targets="0"))
    assert next(t for _, t in tuned.terms(LessKronecker)).sigma.numel() == 1
    tuned.save(tmp_path / "a")
    burnish.load(base, tmp_path / "a")
    x = torch.randn(3, 12)
    assert torch.equal(base(x), net(x))


@pytest.mark.parametrize("storage", ["nf4", "bf16"])
def test_a_storage_holds_the_rest(storage):
    """The stored form codes W - start, so what trains is exact beside it; off, W is there again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    W = model[0].weight.detach().clone()
    tuned = burnish.tune(model, f"{storage} + soka(rank=4)", head=False, targets="0")
    (_, term), = tuned.terms(LessKronecker)
    start = added(term.A.detach(), term.sigma.detach(), term.B.detach())
    eye = torch.eye(64)
    held = model[0].weight.detach()
    rough = 0.15 if storage == "nf4" else 0.004
    assert term.folded and float((held - (W - start)).norm() / (W - start).norm()) < rough
    got = (model(eye) - model[0].bias).t()
    torch.testing.assert_close(got, held + start, rtol=1e-5, atol=1e-5)
    with tuned.disabled():
        torch.testing.assert_close((model(eye) - model[0].bias).t(), held + start, rtol=1e-5,
                                   atol=1e-5)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)])
def test_a_storage_holds_the_rest_of_a_kernel(conv):
    model = nn.Sequential(copy.deepcopy(conv))
    tuned = burnish.tune(model, "bf16 + soka(rank=2)", head=False, targets="0")
    (_, term), = tuned.terms(LessKronecker)
    start = added(term.A.detach(), term.sigma.detach(), term.B.detach())
    turned = isinstance(conv, nn.ConvTranspose2d)
    W = conv.weight.detach().transpose(0, 1) if turned else conv.weight.detach()
    held = model[0].weight.detach()
    held = (held.transpose(0, 1) if turned else held).flatten(1)
    torch.testing.assert_close(held, W.flatten(1) - start, rtol=0.01, atol=1e-4)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), conv(x), rtol=0, atol=0.02)
    with tuned.disabled():
        torch.testing.assert_close(model(x), conv(x), rtol=0, atol=0.02)


def test_on_a_convolution_it_is_the_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    stock = copy.deepcopy(model[0])
    tuned = burnish.tune(model, "soka(rank=2)", head=False, targets="0")
    (_, term), = tuned.terms(LessKronecker)
    theta = [t for t in (term.double().A, term.sigma, term.B)]
    rest = stock.weight.detach().flatten(1) - added(*(t.detach().clone() for t in theta))
    stir(tuned, size=0.3)
    follows(tuned, lambda x, *p: F.conv2d(x, (rest + added(*p)).view(6, 4, 3, 3), stock.bias),
            theta, (2, 4, 5, 5), rtol=1e-6, atol=1e-6)


def test_counts():
    (method,) = burnish.parse("soka(rank=1)")
    place = Place("a", "weight", "linear", 4096, 4096)
    assert method.count(place) == 8_193
    assert burnish.parse("soka")[0].count(place) == 32 * 8_193
    assert burnish.parse("soka")[0].count(place, rank=3) == 3 * 8_193
    assert method.per_token(place) == 0


def test_what_cannot_act_is_refused():
    def on(inp, out, settings=""):
        return burnish.tune(nn.Sequential(nn.Linear(inp, out)), f"soka({settings})", head=False,
                            targets="0")

    on(16, 7, "rank=1")
    on(4, 4, "rank=4"), on(4, 4, "max_rank=99")
    with pytest.raises(RankError, match="soka: rank 5 does not fit 0.weight, .* 4 Kronecker"):
        on(4, 4, "rank=5")
    with pytest.raises(RecipeError, match="no sides to split"):
        on(7, 5)
    with pytest.raises(RecipeError, match="no sides to split"):
        on(16, 8, "factor=1")
    for settings in ("energy=0", "energy=1.1", "max_rank=0", "rank=0", "factor=0", "factor=-2"):
        with pytest.raises(RecipeError, match="^soka: .*(expected|at least 1)"):
            burnish.parse(f"soka({settings})")
    for settings in ("energy=1.0", "max_rank=1", "rank=1", "factor=-1", "factor=1"):
        burnish.parse(f"soka({settings})")
    for settings, word in (("energy=0.5", "energy"), ("max_rank=3", "max_rank"),
                           ("elbow=False", "elbow")):
        with pytest.raises(RecipeError, match=f"soka: {word} does nothing where rank=2 is given"):
            burnish.parse(f"soka(rank=2, {settings})")


def test_defaults_decay_and_cost():
    assert burnish.parse("soka")[0].settings() == {
        "targets": None, "rank": None, "energy": 0.9, "max_rank": 32, "elbow": True, "factor": -1}
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "soka", targets="0", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}
    assert keeps_what_it_says("soka", "vit") is None
