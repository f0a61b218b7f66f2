"""AlignGuard-LoRA: directions of safety, and penalties against plain float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.guarded import Collision, Guarded
from burnish.core.errors import CheckError, RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

BASE = "rank=3, alpha=9, directions=2"


class Scored(nn.Module):
    """A linear with a loss of its own."""

    def __init__(self, inp=12, out=9):
        super().__init__()
        self.layer = nn.Linear(inp, out)

    def forward(self, x, y=None):
        out = self.layer(x)
        return {"logits": out, "loss": None if y is None else (out - y).square().mean()}


def batches(n=3, inp=12, out=9):
    g = torch.Generator().manual_seed(4)
    scale = torch.logspace(0, -2, out, dtype=torch.float64)
    return [{"x": torch.randn(5, inp, generator=g).double(),
             "y": torch.randn(5, out, generator=g).double() * scale} for _ in range(n)]


def made(settings=BASE, data=None):
    torch.manual_seed(0)
    net = Scored().double()
    tuned = burnish.tune(net, f"alignguard({settings})", head=False, targets="layer",
                         calibration=batches() if data is None else data)
    (_, term), = tuned.terms(Guarded)
    return net, tuned, term


def covariance(data):
    torch.manual_seed(0)
    net = Scored().double()
    F = torch.zeros(9, 9, dtype=torch.float64)
    for b in data:
        G, = torch.autograd.grad(net(**b)["loss"], net.layer.weight)
        F += G @ G.t()
    return F


def test_the_directions_are_those_of_the_gradients_on_safety_data():
    _, _, term = made()
    values, vectors = torch.linalg.eigh(covariance(batches()))
    U = vectors.flip(1)[:, :2]
    got = term.U.double()
    torch.testing.assert_close(got @ got.t(), U @ U.t(), rtol=0, atol=1e-5)
    want = (values.flip(0)[:2] / values[-1]).float()
    torch.testing.assert_close(term.mu, want, rtol=1e-4, atol=1e-6)
    assert term.mu[0] == 1 and not term.U.requires_grad
    one = made(f"{BASE}, samples=5")[2]
    _, vectors = torch.linalg.eigh(covariance(batches()[:1]))
    U, got = vectors.flip(1)[:, :2], one.U.double()
    torch.testing.assert_close(got @ got.t(), U @ U.t(), rtol=0, atol=1e-5)


def test_outputs_and_gradients_are_loras():
    net, tuned, term = made()
    net.layer.burnish.double()
    W, b = net.layer.weight.detach().clone(), net.layer.bias.detach().clone()
    stir(tuned, size=1.0)
    x = torch.randn(4, 12).double().requires_grad_()
    A, B = (t.detach().clone().requires_grad_() for t in (term.A, term.B))
    got, want = net(x)["logits"], F.linear(x, W + 3.0 * B @ A, b)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, (x, term.A, term.B), g),
                          torch.autograd.grad(want, (x, A, B), g), strict=True):
        torch.testing.assert_close(one, other)


def dense(term, W, lam_a, lam_t, lam_c, beta, tau, A, B):
    """The penalties with P as a matrix and everything dense."""
    D = term.scale * B @ A
    U, mu = term.U.double(), term.mu.double()
    P = U @ U.t()
    DA, DT = P @ D, D - P @ D
    eta = 1 + beta / (1 + torch.exp(-((W + D).abs() - tau)))
    root = U @ torch.diag(mu.sqrt()) @ U.t()
    return lam_a * (root @ DA).square().sum() + lam_t * DT.square().sum() \
        + lam_c * (eta * (DA * DT).abs()).sum()


@pytest.mark.parametrize("panel", [1 << 22, 9 * 5])
def test_penalties_and_their_gradients_are_the_dense_ones(panel):
    net, tuned, term = made(f"{BASE}, align=0.7, task=0.3, collision=0.9, emphasis=2, large=0.1")
    net.layer.burnish.double()
    stir(tuned, size=1.0)
    W = net.layer.weight.detach()
    with torch.no_grad():                                  # orthonormal to the last bit of float64
        term.U.copy_(torch.linalg.qr(term.U).Q)
    terms = list(tuned.recipe.named("alignguard").objective(tuned, None))
    assert len(terms) == 3 and isinstance(terms[2].value.__self__, Collision)
    terms[2].value.__self__.panel = panel
    A, B = (t.detach().clone().requires_grad_() for t in (term.A, term.B))
    want = dense(term, W, 0.7, 0.3, 0.9, 2.0, 0.1, A, B)
    torch.testing.assert_close(sum(t.value() for t in terms), want)
    got = [sum(g) for g in zip(*(t.gradients() for t in terms), strict=True)]
    for a, b in zip(got, torch.autograd.grad(want, (A, B)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.enable_grad():
        by_value = torch.autograd.grad(terms[2].value(), (term.A, term.B))
    for a, b in zip(terms[2].gradients(), by_value, strict=True):
        torch.testing.assert_close(a, b)


def test_each_part_alone():
    for settings, args in (("align=0.7, task=0, collision=0", (0.7, 0, 0)),
                           ("align=0, task=0.3, collision=0", (0, 0.3, 0)),
                           ("align=0, task=0, collision=0.9", (0, 0, 0.9))):
        net, tuned, term = made(f"{BASE}, {settings}")
        net.layer.burnish.double()
        stir(tuned, size=1.0)
        (only,) = tuned.recipe.named("alignguard").objective(tuned, None)
        W = net.layer.weight.detach()
        torch.testing.assert_close(only.value(), dense(term, W, *args, 1.0, 0.0, term.A, term.B))


def test_the_parts_add_up_and_the_geodesic_term_would_be_nothing():
    net, tuned, term = made()
    net.layer.burnish.double()
    stir(tuned, size=1.0)
    D, P = term.dense().detach(), term.U @ term.U.t()
    torch.testing.assert_close(P @ D + (D - P @ D), D)
    inner = (P @ D * (D - P @ D)).sum()
    assert float(inner**2) < 1e-10 * float((P @ D).square().sum() * (D - P @ D).square().sum())


def test_without_strengths_it_is_lora():
    ends = []
    for recipe in ("lora(rank=3, alpha=9)",
                   f"alignguard({BASE}, align=0, task=0, collision=0)"):
        torch.manual_seed(0)
        net = Scored()
        data = [{k: v.float() for k, v in b.items()} for b in batches()]
        tuned = burnish.tune(net, recipe, head=False, targets="layer", calibration=data, seed=3)
        tuned.optimizer(lr=1e-2)
        for b in data:
            tuned.step(b)
        ends.append([p.detach().clone() for p in tuned.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_holds_the_critical_part_back():
    sizes = {}
    for align in (0.0, 50.0):
        net, tuned, term = made(f"{BASE}, align={align}, task=0, collision=0")
        tuned.optimizer(lr=1e-2)
        for b in batches() * 20:
            tuned.step(b)
        sizes[align] = float(term.critical().detach())
    assert sizes[50.0] < 0.2 * sizes[0.0]


def test_start_count_cost_and_defaults(tmp_path):
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "alignguard(directions=4)", head=False, calibration=[batch])
    assert torch.equal(net(**batch).logits, want)
    assert sum(float(t.value()) for t in
               tuned.recipe.named("alignguard").objective(tuned, None)) == 0
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}
    stir(tuned)
    tuned.save(tmp_path / "a")
    other, _ = tiny("vit")
    again = burnish.load(other, tmp_path / "a")                # without data
    terms = [dict(t.terms(Guarded)) for t in (tuned, again)]
    assert all(torch.equal(terms[0][n].U, t.U) and torch.equal(terms[0][n].mu, t.mu)
               for n, t in terms[1].items())
    (method,) = parse("alignguard")
    place = Place("l", "weight", "linear", 24, 16)
    assert (method.count(place), method.per_token(place)) == (8 * 40, 8)
    assert keeps_what_it_says("alignguard", "vit") is None
    assert method.settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "directions": 128, "align": 0.25, "task": 0.5,
        "collision": 0.05, "emphasis": 1.0, "large": 0.0, "samples": 100}


@pytest.mark.parametrize("settings", ["align=-1", "task=-1", "collision=-1", "emphasis=-1",
                                      "directions=0", "samples=0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^alignguard"):
        parse(f"alignguard({settings})")


def test_refusals():
    assert parse("alignguard(emphasis=0, directions=1, samples=1)")
    with pytest.raises(RankError, match="directions=9: layer.weight has 9 outputs"):
        made("rank=3, directions=9")
    made("rank=3, directions=8")
    with pytest.raises(RankError, match="rank 10 does not fit"):
        made("rank=10, directions=2")
    with pytest.raises(burnish.ConfigError, match="alignguard reads data before it starts"):
        burnish.tune(Scored(), "alignguard(directions=2)", head=False, targets="layer")
    bad = batches(1)
    bad[0]["x"][0, 0] = float("nan")
    with pytest.raises(CheckError):
        made(data=bad)
    none = [{k: torch.zeros_like(v) for k, v in b.items()} for b in batches(1)]
    with torch.no_grad():
        assert not made(data=none)[2].mu[1:].isnan().any()


@pytest.mark.parametrize("panel, want", [(None, [(0, 12)]), (36, [(0, 4), (4, 8), (8, 12)]),
                                         (1, [(k, k + 1) for k in range(12)])])
def test_collisions_are_looked_at_by_runs_of_columns(panel, want):
    term = made()[2]                                 # 12 inputs, 9 outputs
    few = {} if panel is None else {"panel": panel}
    one = Collision(term, lambda: torch.zeros(9, 12), 1.0, 1.0, 0.0, **few)
    assert one.runs() == want and (panel or one.panel == 1 << 22), "16 MiB in fp32"
