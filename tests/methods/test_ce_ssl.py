"""CE-SSL: layers that rest at random and their mean, ranks from one look at data, the merge."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.thinned import FactorGradient, Thinned
from burnish.core.errors import RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.models import tiny


def one_linear(settings="", **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    tuned = burnish.tune(model, f"ce_ssl(rank=3, score='none', scale=0.7, {settings})", head=False,
                         targets="0", **kw)
    (_, term), = tuned.terms(Thinned)
    term.double()
    stir(tuned, size=0.5)
    return model, tuned, term


def test_outputs_gradients_and_the_merge_are_those_of_the_equation():
    """Outside training W + (1 - p) s B A, and so the merge."""
    model, tuned, term = one_linear("deactivation=0.3")
    model.eval()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()

    def equation(x, A, B):
        return x @ (W + 0.7 * 0.7 * B @ A).T + b

    follows(tuned, equation, [term.A, term.B], (5, 3, 12), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mean_over_z_is_what_is_merged(mode):
    """p W x + (1 - p) (W + s B A) x, over what passes really answer; to 1e-5, whatever the mode."""
    p = 0.3
    model, tuned, term = one_linear(f"deactivation={p}")
    model.train()
    tuned.optimizer(lr=0.0)
    x, h = torch.randn(4, 12, dtype=torch.float64), handler(tuned)
    seen = {}
    for k in range(20):
        rests = bool(h.drawn(k, 0))

        def hook(m, args, out, rests=rests):
            seen.setdefault(rests, out.detach())

        handle = model[0].register_forward_hook(hook)
        tuned.step((x, x[:, :9]), loss=lambda out, batch: (out - batch[1]).square().mean())
        handle.remove()
        if rests:                                    # all do: the loss still has a graph
            assert max(term.A.grad.abs().max(), term.B.grad.abs().max()) < 1e-36
    assert set(seen) == {True, False}
    torch.testing.assert_close(seen[True], F.linear(x, model[0].weight, model[0].bias).detach())
    mean = p * seen[True] + (1 - p) * seen[False]
    model.train(mode)
    torch.testing.assert_close(tuned.merge()(x), mean, rtol=1e-5, atol=1e-5)


def test_in_evaluation_mode_nobody_rests():
    """Its mean answers there already."""
    model, tuned, term = one_linear("deactivation=0.9")
    model.eval()
    tuned.optimizer(lr=0.0)
    x, seen = torch.randn(4, 12, dtype=torch.float64), []
    model[0].register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    for _ in range(6):
        tuned.step((x, x[:, :9]), loss=lambda out, batch: (out - batch[1]).square().mean())
        assert float(term.A.grad.abs().max()) > 1e-6
    want = F.linear(x, model[0].weight + 0.1 * 0.7 * term.B @ term.A, model[0].bias).detach()
    for y in seen:
        torch.testing.assert_close(y, want)
    assert len(seen) == 6 and any(handler(tuned).drawn(k, 0) for k in range(6))


def handler(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "ce_ssl")


def test_draws_have_the_probability_and_are_of_each_layer_and_pass_alone():
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "ce_ssl(rank=2, score='none')", head=False)
    tuned.optimizer(lr=1e-3)
    h = handler(tuned)
    draws = [frozenset(h.drawn(k, n)) for k in range(1000) for n in range(2)]
    seen = Counter(p for d in draws for p in d)
    assert len(seen) == len(h.layers) == 12
    assert all(abs(c / 2000 - 0.2) < 0.04 for c in seen.values())
    assert len(set(draws)) > 200 and draws[0::2] != draws[1::2]
    assert [frozenset(h.drawn(k, 0)) for k in range(9)] == draws[0:18:2]


def test_a_layer_that_rests_keeps_nothing_and_has_a_gradient_of_zero(kept):
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net.train(), "ce_ssl(rank=2, score='none', deactivation=0.5)",
                         head=False)
    stir(tuned)
    tuned.optimizer(lr=1e-3)
    h = handler(tuned)
    off = h.drawn(0, 0)
    assert off and set(off) != set(h.layers)
    tuned.backward(batch)
    for path, params in h.layers.items():
        assert all(p.grad is not None for p in params)
        assert all(p.grad.any() for p in params) == (path not in off), path
    whole = kept(tuned, batch)
    from burnish.engine.around import damped
    with damped(tuned, list(h.layers)[6:], 0.0):
        assert kept(tuned, batch) < whole
    h.rehearse(0)
    tuned.backward(batch)
    assert all(p.grad.any() for ps in h.layers.values() for p in ps), "nobody rests in a rehearsal"


def three(p=0.5):
    torch.manual_seed(0)
    model = Scalar(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))).double()
    tuned = burnish.tune(model, f"ce_ssl(rank=2, score='none', deactivation={p})", head=False,
                         targets="all")
    for _, t in tuned.terms(Thinned):
        t.double()
    stir(tuned)
    tuned.optimizer(lr=1e-3)
    return tuned, torch.randn(4, 8, dtype=torch.float64)


def passes(tuned, x, per_update, updates=2):
    """(update, number within it) that each pass is drawn for."""
    h, asked = handler(tuned), []
    drawn = h.drawn
    h.drawn = lambda *at: (asked.append(at), drawn(*at))[1]
    for _ in range(updates):
        for _ in range(per_update):
            tuned.backward(x)
        tuned.current_optimizer.step()
        tuned.current_optimizer.zero_grad()
    return asked


def test_each_micro_batch_is_drawn_for_also_after_a_resume():
    tuned, x = three()
    assert passes(tuned, x, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    first, _ = three()
    passes(first, x, 1, 1)
    again, _ = three()
    again.timeline.load(first.timeline.state())
    assert passes(again, x, 2, 1) == [(1, 0), (1, 1)]


def test_what_a_layer_has_gathered_stays_while_it_rests():
    """Gradients of the micro-batches of an update add up; of who rests nothing is added."""
    tuned, x = three()
    h = handler(tuned)
    update = next(k for k in range(99) if not h.drawn(k, 0) and 0 < len(h.drawn(k, 1)) < 3)
    passes(tuned, x, 1, update)
    off = h.drawn(update, 1)
    tuned.backward(x)
    first = {path: [p.grad.clone() for p in params] for path, params in h.layers.items()}
    tuned.backward(x)
    for path, params in h.layers.items():
        same = [torch.equal(p.grad, g) for p, g in zip(params, first[path], strict=True)]
        assert all(same) if path in off else not any(same), path


def test_of_layers_that_all_rest_one_gives_the_loss_its_graph():
    tuned, x = three(0.9)
    h = handler(tuned)
    update = next(k for k in range(99) if len(h.drawn(k, 0)) == 3)
    passes(tuned, x, 1, update)
    tuned.backward(x)
    sizes = [max(float(p.grad.abs().max()) for p in params) for params in h.layers.values()]
    assert sizes[:2] == [0, 0] and 0 < sizes[2] < 1e-36


def test_after_a_rehearsal_layers_rest_again():
    tuned, x = three()
    h = handler(tuned)
    update = next(k for k in range(99) if h.drawn(k, 0))
    passes(tuned, x, 1, update)
    h.rehearse(update)
    h.step_end(update)
    tuned.backward(x)
    for path in h.drawn(update, 0):
        assert max(float(p.grad.abs().max()) for p in h.layers[path]) < 1e-36


class Deep(nn.Module):
    """Ten linears; what the last ones do to the loss is larger."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = x + (k + 1) * torch.tanh(layer(x)) / 10
        return x.square().mean()


@pytest.mark.parametrize("score, best", [("taylor", "layers.7"), ("fisher", "layers.9")])
def test_ranks_follow_one_look_at_the_data(score, best):
    """I = mean over batches of mean((W * s (dL/dB A))^2), B = 0; the lowest 90 % get half."""
    torch.manual_seed(0)
    net = Deep().double()
    with torch.no_grad():
        net.layers[9].weight.mul_(0.01)
    xs = [torch.randn(4, 8, dtype=torch.float64) for _ in range(3)]
    paths = [f"layers.{k}" for k in range(10)]
    m = parse(f"ce_ssl(rank=8, score={score!r})")[0]
    want = dict.fromkeys(paths, 0.0)
    for x in xs:
        Bs = {}
        for path in paths:
            layer = net.get_submodule(path)
            A = m.observe(Place(path, "weight", "linear", 8, 8)).A.double()
            Bs[path] = (torch.zeros(8, 8, dtype=torch.float64, requires_grad=True), A)
            layer.forward = lambda h, layer=layer, B=Bs[path][0], A=A: F.linear(
                h, layer.weight + B @ A, layer.bias)
        grads = torch.autograd.grad(net(x), [B for B, _ in Bs.values()])
        for path, g in zip(paths, grads, strict=True):
            X = g @ Bs[path][1]
            X = X * net.get_submodule(path).weight if score == "taylor" else X
            want[path] += float(X.detach().square().mean()) / 3
    for layer in net.layers:
        del layer.forward
    tuned = burnish.tune(net, m, calibration=xs, targets=",".join(paths), head=False)
    ranks = {n.removesuffix(".weight"): v["rank"]
             for n, v in tuned.adapters["default"].settled["ce_ssl"].items()}
    assert max(want, key=want.get) == best
    assert Counter(ranks.values()) == {4: 9, 8: 1} and ranks[best] == 8
    assert {n: t.A.shape[0] for n, t in tuned.terms(Thinned)} == \
        {f"{n}.weight": r for n, r in ranks.items()}


def test_what_is_looked_through_is_drawn_for_each_place_and_seed():
    place = [Place(n, "weight", "linear", 30, 400) for n in "ab"]
    A = [parse(f"ce_ssl(seed={seed})")[0].observe(p).A for seed in (0, 1) for p in place]
    assert all(a.shape == (16, 400) for a in A)
    assert all(float(a.std()) == pytest.approx(0.02, rel=0.03) and a.abs().max() < 0.12 for a in A)
    assert len({float(a[0, 0]) for a in A}) == 4
    assert torch.equal(A[0], parse("ce_ssl")[0].observe(place[0]).A)


def test_layers_too_narrow_for_the_rank_have_no_say():
    """Left alone where nobody names them, and half of the others get half; else refused."""
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 8))

    xs = [torch.randn(4, 8)]
    for score in ("'taylor', low=0.5", "'none'"):
        one = Scalar(net())
        tuned = burnish.tune(one, f"ce_ssl(rank=8, score={score})", calibration=xs, head=False)
        want = [4, 8] if "taylor" in score else [8, 8]
        assert sorted(t.A.shape[0] for _, t in tuned.terms(Thinned)) == want
        with pytest.raises(RankError, match="rank 8 does not fit net.2"):
            burnish.tune(Scalar(net()), f"ce_ssl(rank=8, score={score})", calibration=xs,
                         targets="net.0,net.2", head=False)


class Scalar(nn.Module):
    """What a network makes, as one number."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).square().mean()


def test_the_statistic_is_the_equation():
    torch.manual_seed(0)
    A, W = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    s = FactorGradient(A, 0.5, weighted=True)
    s.weigh(W)
    Gs = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    for G in Gs:
        s.pull(G)
    want = sum(float((W * (0.5 * G @ A.T @ A)).square().mean()) for G in Gs) / 3
    assert s.value == pytest.approx(want, rel=1e-12) and s.nbytes == A.nbytes


@pytest.mark.parametrize("rank, half", [(16, 8), (8, 4), (6, 2), (3, 1), (1, 1)])
def test_half_a_rank_is_even(rank, half):
    m = parse(f"ce_ssl(rank={rank}, low=0.5)")[0]
    places = [Place(f"l{k}", "weight", "linear", 40, 40) for k in range(4)]

    class Seen:
        def __init__(self, value):
            self.value = value

    ranks = m.settle({p: Seen(v) for p, v in zip(places, (3.0, 1.0, 2.0, 1.0), strict=True)})
    assert [ranks[p]["rank"] for p in places] == [rank, half, rank, half]


def test_the_file_knows_the_ranks_and_answers_the_same(tmp_path):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "ce_ssl(rank=8, low=0.75) + bitfit", calibration=[batch], head=False)
    assert Counter(t.A.shape[0] for _, t in tuned.terms(Thinned)) == {4: 9, 8: 3}
    stir(tuned)
    want = net.eval()(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert torch.equal(again.model.eval()(**batch).logits, want)
    again.model.train()
    torch.testing.assert_close(again.merge().eval()(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_defaults_counts_and_refusals():
    m = parse("ce_ssl")[0]
    assert (m.rank, m.scale, m.deactivation, m.score, m.low, m.seed) == \
        (16, 1.0, 0.2, "taylor", 0.9, 0)
    place = Place("x", "weight", "linear", 40, 24)
    assert m.count(place) == 16 * 64 and m.count(place, rank=8) == 8 * 64 == 64 * m.per_token(
        place, rank=8)
    assert m.per_token(place) == 16
    term = Thinned(place, 16, 1.0, 0.2)
    assert float(term.A.detach().std()) == pytest.approx(0.02, rel=0.1) and not term.B.any()
    for settings, why in (("deactivation=1.0", "deactivation"), ("low=1.5", "low"),
                          ("rank=0", "rank")):
        with pytest.raises(burnish.RecipeError, match=why):
            parse(f"ce_ssl({settings})")
    for settings, what in (("low=0.5", "low say"), ("samples=3", "samples say"),
                           ("low=0.5, samples=3", "low and samples say")):
        with pytest.raises(burnish.RecipeError, match=f"ce_ssl: {what}.*'taylor' or 'fisher'"):
            parse(f"ce_ssl(score='none', {settings})")
        parse(f"ce_ssl(score='fisher', {settings})")
    with pytest.raises(burnish.BurnishError, match="calibration"):
        burnish.tune(tiny("vit")[0], "ce_ssl(rank=2)")
    assert parse("ce_ssl(deactivation=0.0)")[0].controller(None) is None
