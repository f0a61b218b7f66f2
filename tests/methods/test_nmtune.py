"""NMTune against its equation in plain fp64 torch, and what its three terms are bound by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.remapped import Remapped, covarying, leading, pointing
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import measure, simulate
from burnish.testing.models import tiny


def terms(f, z):
    """As they are written."""
    first = sum((a / a.norm() - b / b.norm()).square().sum() for a, b in zip(f, z, strict=True))
    n, D = z.shape
    mean = z.mean(0)
    C = sum(torch.outer(a - mean, a - mean) for a in z) / (n - 1)
    second = sum(C[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D
    s = torch.linalg.svdvals(z)
    return first / n, second, -s[0] / s.sum()


def random(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n,d", [(6, 4), (4, 6), (5, 5)])
def test_the_terms_are_the_equations(n, d):
    f, z, w = random(n, d), random(n, d, 1).requires_grad_(), torch.ones(n, dtype=torch.float64)
    got = (pointing(f, z, w), covarying(z, w), leading(z))
    want = terms(f, z)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
        mine, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (a, b))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(Remapped.regulariser(f, z), sum(want), rtol=1e-5, atol=1e-10)


def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    f, z = random(12, 4).view(3, 4, 4), random(12, 4, 1).view(3, 4, 4)
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    got = Remapped.regulariser(f, z, valid)
    want = sum(terms(f[valid.bool()], z[valid.bool()]))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_leading_share_is_between_its_bounds(rank):
    for seed in range(20):
        z = random(8, rank, seed) @ random(rank, 6, seed + 50)
        assert -1 - 1e-6 <= float(leading(z)) <= -1 / rank + 1e-4
    q = torch.linalg.qr(random(8, rank))[0]
    assert float(leading(q)) == pytest.approx(-1 / rank, rel=1e-4)      # all alike
    assert float(leading(random(8, 1) @ random(1, 6, 1))) == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize("z", [torch.eye(4).double(), torch.zeros(3, 4).double(),
                               torch.ones(3, 4).double(), torch.eye(4).double()[:2]])
def test_equal_singular_values_have_a_gradient(z):
    z = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(leading(z), z)
    assert bool(g.isfinite().all())
    assert float(leading(z.detach())) <= 0


def test_features_that_stay_are_at_no_distance_and_a_single_row_varies_with_nothing():
    f, w = random(5, 4), torch.ones(5, dtype=torch.float64)
    assert float(pointing(f, f, w)) == 0.0
    assert float(pointing(f, 3 * f, w)) == pytest.approx(0, abs=1e-15)
    assert float(covarying(f[:1], w[:1])) == 0.0


# -- in a model -----------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


def start():
    torch.manual_seed(0)
    net = Net().double()
    g = torch.Generator().manual_seed(1)
    return net, [(torch.randn(7, 6, generator=g).double(), torch.randint(3, (7,), generator=g))
                 for _ in range(3)]


def said(out, batch):
    return nn.functional.cross_entropy(out, batch[1])


@pytest.mark.parametrize("weight,act", [(0.01, "relu"), (3.0, "gelu"), (0.0, "relu")])
def test_steps_are_the_equation(weight, act):
    net, batches = start()
    tuned = burnish.tune(net, f"nmtune(weight={weight}, hidden=4, act={act!r}) + sgd", head=True)
    for p in tuned.parameters():
        p.data = p.data.double()
    tuned.optimizer(0.1)
    names = [n for n, _ in tuned.named_parameters()]
    at = {leaf: next(n for n in names if n.endswith(leaf))
          for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")}
    theta = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}
    assert set(names) == {*at.values(), "head.weight", "head.bias"}
    for x, y in batches:
        with torch.no_grad():                            # evaluation mode, statistics as they are
            F = torch.tanh(nn.functional.batch_norm(
                net.body(x), torch.zeros(5).double(), torch.ones(5).double(), net.norm.weight,
                net.norm.bias))
        h = F @ theta[at["down.weight"]].t() + theta[at["down.bias"]]
        h = torch.relu(h) if act == "relu" else nn.functional.gelu(h)
        z = h @ theta[at["up.weight"]].t() + theta[at["up.bias"]]
        out = z @ theta["head.weight"].t() + theta["head.bias"]
        loss = nn.functional.cross_entropy(out, y) + weight * sum(terms(F, z))
        grads = torch.autograd.grad(loss, list(theta.values()))
        tuned.step((x, y), said)
        with torch.no_grad():
            for p, g in zip(theta.values(), grads, strict=True):
                p -= 0.1 * g
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p, theta[n], rtol=1e-5, atol=1e-8, msg=n)


def test_the_encoder_is_untouched():
    net, batches = start()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tuned = burnish.tune(net, "nmtune", head=True)
    for p in tuned.parameters():
        p.data = p.data.double()
    tuned.optimizer(0.1)
    for b in batches:
        tuned.step(b, said)
    now = net.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items() if not k.startswith("head."))
    assert not torch.equal(now["head.weight"], before["head.weight"])
    out = net.eval()(batches[0][0])
    with tuned.disabled():
        base = net(batches[0][0])
    assert not torch.equal(out, base)


def test_the_encoder_has_no_graph_and_the_promise_holds():
    net, batch = tiny("vit")
    net.float()
    tuned = burnish.tune(net, "nmtune")
    seen = []
    net.vit.register_forward_hook(lambda m, a, out: seen.append(out[0].requires_grad))
    tuned.loss(batch).backward()
    assert seen == [False]
    promised = simulate(tiny("vit")[0].float(), "nmtune", batch).peak_bytes
    assert measure(burnish.tune(tiny("vit")[0].float(), "nmtune"), batch).peak_bytes == \
        pytest.approx(promised, rel=0.01)


def test_count_refusals_and_defaults():
    assert parse("nmtune")[0].count(768) == 768 * 768 * 2 + 2 * 768
    assert parse("nmtune(hidden=10)")[0].count(768) == 768 * 10 * 2 + 10 + 768
    net, _ = start()
    tuned = burnish.tune(net, "nmtune(hidden=9)", head=True)
    assert sum(p.numel() for p in tuned.parameters()) == parse("nmtune(hidden=9)")[0].count(5) + 18
    assert parse("nmtune")[0].settings() == {"targets": None, "hidden": None, "act": "relu",
                                             "weight": 0.01}
    for wrong in ("hidden=0", "weight=-1", "act='no'"):
        with pytest.raises((RecipeError, ConfigError)):
            parse(f"nmtune({wrong})")
    with pytest.raises(RecipeError, match="nmtune needs a task head of one linear"):
        burnish.tune(tiny("llama")[0], "nmtune")
