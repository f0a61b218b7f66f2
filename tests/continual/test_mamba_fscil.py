"""Mamba-FSCIL: scans of a map against the recurrence written out, a head that never trains, and a
branch that changes nothing until it trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.continual.plane import plane
from torch import nn

from burnish.blocks.state.map_projector import Projector, class_sensitive
from burnish.blocks.state.scanned import FourWays, Scanned, selective_scan
from burnish.blocks.state.simplex import aligned, dot_regression, simplex
from burnish.continual import Training, by_class, run
from burnish.continual.learner import Study
from burnish.continual.learners.mamba_fscil import MambaFscil
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

SMALL = {"width": 16, "state": 3, "rank": 2, "step_rate": 0.1, "updates": 40}


def written_out(x, delta, A, B, C, D):
    """y_t = sum_{s <= t} C_t . (exp(A sum_{s < r <= t} Delta_r) Delta_s B_s x_s) + D x_t."""
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(x.shape[2]):
                y = D[i] * x[n, t, i]
                for s in range(t + 1):
                    fade = (A[i] * delta[n, s + 1:t + 1, i].sum()).exp()
                    y = y + (C[n, t] * fade * delta[n, s, i] * B[n, s]).sum() * x[n, s, i]
                out[n, t, i] = out[n, t, i] + y
    return out


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_a_scan_and_its_gradients_are_those_of_the_recurrence(n, length, width, state):
    from burnish.blocks.state import scanned
    g = torch.Generator().manual_seed(0)
    shapes = [(n, length, width), (n, length, width), (width, state), (n, length, state),
              (n, length, state), (width,)]
    args = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    was, scanned.SLICE = scanned.SLICE, 2                # several slices of channels
    try:
        one = selective_scan(args[0], F.softplus(args[1]), -args[2].exp(), *args[3:])
        two = written_out(args[0], F.softplus(args[1]), -args[2].exp(), *args[3:])
        weigh = torch.randn(one.shape, generator=g, dtype=torch.float64)
        ours = torch.autograd.grad((one * weigh).sum(), args)
        theirs = torch.autograd.grad((two * weigh).sum(), args)
    finally:
        scanned.SLICE = was
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(ours, theirs)


def test_four_ways_are_rows_columns_and_both_backwards():
    torch.manual_seed(0)
    h, w, width, state, rank = 2, 3, 4, 3, 2
    four = FourWays(width, state, rank).double()
    x = torch.randn(2, h, w, width, dtype=torch.float64)
    got = four(x)
    u, gate = F.linear(x, four.into.weight).chunk(2, -1)
    u = F.silu(u)
    across = [(i, j) for i in range(h) for j in range(w)]
    down = [(i, j) for j in range(w) for i in range(h)]
    total = torch.zeros(2, h, w, width, dtype=torch.float64)
    for k, way in enumerate([across, down, across[::-1], down[::-1]]):
        seq = torch.stack([u[:, i, j] for i, j in way], 1)
        read = seq @ four.read[k].T
        delta = F.softplus(read[..., :rank] @ four.step[k].T + four.step_bias[k])
        B, C = read[..., rank:rank + state], read[..., rank + state:]
        y = written_out(seq, delta, -four.log_a[k].exp(), B, C, four.skip[k])
        torch.testing.assert_close(got.delta[:, k], delta)
        torch.testing.assert_close(got.B[:, k], B)
        torch.testing.assert_close(got.C[:, k], C)
        for at, (i, j) in enumerate(way):
            total[:, i, j] += y[:, at]
    torch.testing.assert_close(got.z, total.flatten(1, 2))
    torch.testing.assert_close(got.y, (total * F.silu(gate)).flatten(1, 2))
    steps = F.softplus(four.step_bias.detach())
    assert 1e-3 - 1e-6 < float(steps.min()) < float(steps.max()) < 0.1 + 1e-6
    count = 2 * width**2 + 4 * (width * (rank + 2 * state) + rank * width + width
                                + width * state + width)
    assert sum(p.numel() for p in four.parameters()) == count


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 12), st.integers(0, 6))
def test_vertices_are_as_far_apart_as_can_be(classes, more):
    M = simplex(classes + more, classes, torch.Generator().manual_seed(3)).double()
    want = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64)
    torch.testing.assert_close(M.T @ M, want.fill_diagonal_(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="a width of at least as many"):
        simplex(classes - 1, classes, torch.Generator())


def test_dot_regression():
    f = torch.randn(5, 8, dtype=torch.float64)
    M = simplex(8, 4, torch.Generator().manual_seed(0)).double()
    y = torch.tensor([0, 3, 1, 2, 2])
    want = [0.5 * (1 - M[:, c] @ f[i] / f[i].norm()) ** 2 for i, c in enumerate(y.tolist())]
    torch.testing.assert_close(dot_regression(aligned(f, M), y), torch.stack(want))


def projector(grown: bool = True):
    torch.manual_seed(0)
    one = Projector((3, 2, 3), 8, 2, 2).double()
    if grown:
        one.grow()
    return one


def test_a_branch_that_is_added_changes_no_answer_and_can_learn():
    one = projector(False)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    before = one(x)[0]
    one.grow()
    after, seen = one(x)
    assert torch.equal(after, before) and len(seen) == 2 and seen[1].z.any()
    assert sum(isinstance(m, nn.LayerNorm) for m in one.later.modules()) == 2
    after.sum().backward()
    gate = one.later.scan.into.weight.grad[8:]
    assert gate.any() and not one.later.scan.into.weight.grad[:8].any()


def test_features_are_the_branches_and_the_pooled_map():
    one = projector()
    nn.init.normal_(one.later.scan.into.weight)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    f, _ = one(x)
    want = x.mean((2, 3)) @ one.pooled.weight.T
    for branch, stages in ((one.first, 1), (one.later, 2)):
        h, parts = x, list(branch.widen)
        for i in range(stages):
            conv, norm = parts[3 * i], parts[3 * i + 1]
            h = torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], h) + \
                conv.bias.view(1, -1, 1, 1)
            flat = h.flatten(1)
            h = ((flat - flat.mean(1, keepdim=True))
                 / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()).view_as(h)
            h = h * norm.weight + norm.bias
            h = torch.where(h > 0, h, 0.1 * h)
        h = torch.einsum("oc,nchw->nhwo", parts[-1].weight[:, :, 0, 0], h) + branch.position
        want = want + branch.scan(h).y.mean(1)
    torch.testing.assert_close(f, want)
    ours = torch.autograd.grad(f.sum(), x, retain_graph=True)[0]
    alone = one.first(x)[0] + one.pooled(x.mean((2, 3)))     # the branch that came hands F nothing
    torch.testing.assert_close(ours, torch.autograd.grad(alone.sum(), x)[0])


def scans(n: int, size: float = 1.0) -> Scanned:
    g = torch.Generator().manual_seed(n)

    def some(*shape):
        return size * torch.randn(n, *shape, generator=g, dtype=torch.float64)

    return Scanned(some(4, 5), some(4, 5), some(4, 4, 5), some(4, 4, 2), some(4, 4, 2))


def test_class_sensitive_terms():
    seen, novel = [scans(6), scans(6)], torch.tensor([0, 1, 1, 0, 1, 0]).bool()
    z = seen[1].z
    want = 100 * z[~novel].square().sum().sqrt() / (3 * 20) - \
        10 * z[novel].square().sum().sqrt() / (3 * 20)
    for one in seen:
        for t in (one.delta, one.B, one.C):
            a, b = (t[m].mean(0).flatten() for m in (~novel, novel))
            S = torch.stack([a, b]) @ torch.stack([a, b]).T
            S = S / torch.outer(S.diagonal().sqrt(), S.diagonal().sqrt())
            want = want + 0.5 * (torch.eye(2) - S).abs().mean()
    torch.testing.assert_close(class_sensitive(seen, novel, (100, 10, 0.5), cap=9.0), want)
    for one_side in (torch.ones(6).bool(), torch.zeros(6).bool()):
        assert float(class_sensitive(seen, one_side, (100, 10, 0.5))) == 0.0
    large = [scans(6, 1e6)]
    loud = class_sensitive(large, novel, (0, 10, 0.0))   # it has a bound, and no gradient beyond
    assert float(loud) == pytest.approx(-10 / 60**0.5)


# -- a stream -----------------------------------------------------------------------------------
def network():
    return nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 8))


def pictures(model=network, **more):
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 3, 8, 8, generator=g)
    rows = [(maps[y] + 0.5 * torch.randn(3, 8, 8, generator=g), y)
            for y in range(8) for _ in range(16)]
    return replace(plane(classes=8), model=model, collate=torch.stack,
                   tasks=by_class(rows[::2], rows[1::2], base=4, increment=2, order=0),
                   training=Training(epochs=10, batch=8, rate=1e-2), **more)


class Look(MambaFscil):
    name = "look"
    box: list = []

    def begin(self, study):
        super().begin(study)
        Look.box[:] = [self]
        self.heads, self.bodies = [self.M.clone()], []
        self.start = {n: p.detach().clone() for n, p in self.tuned.model.named_parameters()}

    def learn(self, t):
        super().learn(t)
        self.heads.append(self.M.clone())
        self.bodies.append({n: p.detach().clone() for n, p in [
            *self.tuned.model.named_parameters(), *self.projector.named_parameters()]})


def through(stream=None, recipe="full + sgd(momentum=0.9)", **settings):
    found = run(stream or pictures(), recipe, Look(**(SMALL | settings)))
    return Look.box[0], found


@pytest.fixture(scope="module")
def learnt():
    return through()


def test_new_classes_are_learnt_while_head_and_backbone_stay(learnt):
    one, found = learnt
    assert all(torch.equal(M, one.heads[0]) for M in one.heads) and not one.M.requires_grad
    first, second, third = one.bodies
    assert all(not torch.equal(first[n], one.start[n]) for n in ("0.weight", "0.bias"))
    for n, p in first.items():
        if n.startswith("first."):
            assert not torch.equal(second[n], p), n          # goes on, slowly
        else:
            assert torch.equal(second[n], p) and torch.equal(third[n], p), n
    assert any(not torch.equal(second[n], third[n]) for n in second if n.startswith("later."))
    assert found.matrix.rows[0][0] > 0.9 and found.matrix.last > 0.35     # of eight: 0.125
    assert found.matrix.rows[1][1] > 0.5
    assert not any(s.samples for s in found.stored)
    assert found.added[2] == 2 * 16 * 4 * 4                  # a map a class


def test_memory_holds_means_of_maps(learnt):
    one, _ = learnt
    task = one.study.stream.tasks[1]
    c = task.classes[0]
    x = torch.stack([x for x, y in task.train if y == c])
    net = one.tuned.model.eval()
    torch.testing.assert_close(one.memory[c], net[:2](x).mean(0), rtol=1e-4, atol=1e-6)
    assert sorted(one.memory) == list(range(8))


def test_a_later_objective_is_fit_and_terms(learnt):
    from random import Random
    one, _ = learnt
    one.mix = 0.0
    x, y = torch.stack([one.memory[c] for c in range(8)]), torch.arange(8)
    novel = torch.tensor([c not in one.study.stream.tasks[0].classes for c in range(8)])
    f, seen = one.projector(x)
    want = dot_regression(aligned(f, one.M), y).mean() + \
        class_sensitive(seen, novel, (100, 10, 1e-3))
    torch.testing.assert_close(one.objective(x, y, novel, Random(0)), want)
    one.mix, one.quiet, one.loud, one.apart = 0.5, 0.0, 0.0, 0.0
    draw = Random(0)
    share = draw.betavariate(0.5, 0.5)
    other = torch.arange(8)
    for side in (novel, ~novel):
        at = side.nonzero().flatten()
        other[at] = at[draw.sample(range(len(at)), len(at))]
    f, _ = one.projector(share * x + (1 - share) * x[other])
    z = aligned(f, one.M)
    want = (share * dot_regression(z, y) + (1 - share) * dot_regression(z, y[other])).mean()
    torch.testing.assert_close(one.objective(x, y, novel, Random(0)), want)
    assert bool((novel[other] == novel).all())


def test_tokens_of_a_transformer_are_a_map():
    def model():
        torch.manual_seed(0)
        return tiny("vit", num_labels=8)[0]

    stream = pictures(model)
    rows = [replace(t, train=[(F.interpolate(x[None], size=16)[0], y) for x, y in t.train],
                    test=[(F.interpolate(x[None], size=16)[0], y) for x, y in t.test])
            for t in stream.tasks]
    one, found = through(replace(stream, tasks=tuple(rows),
                                 collate=lambda xs: {"pixel_values": torch.stack(xs)}),
                         "lora(rank=2)", updates=3)
    assert one.maps.shape[1] == one.maps.shape[2] > 1 and found.matrix.tasks == 3
    seen = {}
    inputs = one.given(list(rows[0].train[:2]), 0).inputs
    handle = one.maps.module.register_forward_hook(lambda m, a, out: seen.update(out=out))
    got = one.maps.of(inputs)
    handle.remove()
    side = one.maps.shape[1]
    for k in range(side * side):                             # places in the order of patches
        torch.testing.assert_close(got[:, :, k // side, k % side],
                                   seen["out"][:, k - side * side])


def test_defaults_are_the_paper_s():
    one = MambaFscil()
    assert (one.step_rate, one.later_rate, one.behind, one.updates) == (0.2, 0.05, 0.2, 200)
    assert (one.quiet, one.loud, one.apart, one.mix) == (100.0, 10.0, 1e-3, 0.5)
    stream = pictures()
    one.begin(Study(stream, parse("full"), stream.training, 0))
    assert one.M.shape == (32, 8)                            # twice the channels, the classes
    assert one.projector.first.scan.state == one.projector.first.scan.rank == 8


@pytest.mark.parametrize("make, why", [
    (lambda: through(plane()), "reads none"),
    (lambda: through(plane("domain")), "of scenario 'class', not 'domain'"),
    (lambda: through(recipe="lora(rank=2) + o_lora"), "divides a run over its tasks"),
    (lambda: through(recipe="lora + sam"), "sam counts on all that trains"),
    (lambda: through(width=7), "a width of at least as many"),
    (lambda: through(state=0), "state=0: expected above 0"),
    (lambda: through(behind=-1.0), "behind"),
    (lambda: through(updates=0), "updates of at least 1")])
def test_what_cannot_be_is_refused(make, why):
    with pytest.raises((ConfigError, RecipeError), match=why):
        make()
