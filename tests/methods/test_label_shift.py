"""Label shift: the head against its equation, g's learning step by step, shares that are found."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.prior_head import PriorHead, shares
from burnish.core.errors import CheckError, ConfigError, DataError, FormatError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.label_shift import LabelShift
from burnish.testing.models import tiny

D64 = torch.float64
SMALL = {"hidden": 8, "steps": 20, "per_update": 16, "step_rate": 0.02}


def source(model, key="pixel_values", classes=4, batches=3, rows=8, seed=5, shape=(3, 16, 16)):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(batches):
        y = torch.arange(rows) % classes
        x = torch.randn(rows, *shape, generator=g, dtype=D64) + 0.3 * y.view(-1, 1, 1, 1)
        out.append({key: x, "labels": y})
    return out


def classifier(name="vit", recipe=None, dtype=D64):
    torch.manual_seed(3)
    model, batch = tiny(name, dtype=dtype, dropout=0.2)
    key = next(k for k in ("pixel_values", "x") if k in batch)
    head = model.get_submodule("classifier" if hasattr(model, "classifier") else "head")
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    nn.init.normal_(head.weight, std=0.5)
    rows = source(model, key, head.out_features, shape=tuple(batch[key].shape[1:]))
    stream = [{key: torch.randn(5, *batch[key].shape[1:], dtype=D64) + 0.4} for _ in range(3)]
    tuned = model if recipe is None else burnish.tune(model, recipe, head=False)
    return tuned, head, rows, stream


def said(head, g, h, pi, tau):
    """z of the equation, sample by sample; the head as a plain linear."""
    K, D = head.weight.shape
    flat = g["w2"] @ (g["w1"] @ pi + g["b1"]).clamp_min(0) + g["b2"]
    dW, db = flat[: K * D].reshape(K, D), flat[K * D : K * D + K]
    gamma, beta = flat[K * D + K : K * D + K + D], flat[K * D + K + D :]
    return torch.stack([(head.weight + dW) @ ((1 + gamma) * row + beta) + head.bias + db
                        + tau * pi.log() for row in h])


def features(model, head, batch):
    kept = []
    hook = head.register_forward_pre_hook(lambda m, a: kept.append(a[0].detach()))
    was = model.training
    with torch.no_grad():
        model.eval()(**batch)
    model.train(was)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("name, recipe", [("vit", None), ("cnn", None), ("vit", "lora(rank=2)")])
def test_a_stream_is_answered_as_the_equation_says_and_no_weight_moves(name, recipe):
    tuned, head, rows, stream = classifier(name, recipe)
    model = tuned if recipe is None else tuned.model
    method = LabelShift(adjust=0.7, decay=0.6, **SMALL)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    adapted = method.lifecycle(tuned, rows)
    g = adapted.parts[0].g
    assert float(g["w2"].abs().max()) > 0.01
    pi = torch.full((head.out_features,), 1 / head.out_features, dtype=D64)
    with adapted:
        for batch in stream:
            h = features(model, head, batch)
            got = adapted(batch).logits
            pi = 0.6 * pi + 0.4 * said(head, g, h, pi, 0.7).softmax(-1).mean(0)
            torch.testing.assert_close(got, said(head, g, h, pi, 0.7), rtol=1e-9, atol=1e-10)
            assert not torch.allclose(got, F.linear(h, head.weight, head.bias), atol=1e-2)
            assert not got.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_of_untaught_g_and_uniform_shares_the_answers_are_the_sources_and_shapes_the_heads():
    torch.manual_seed(0)
    head, h = nn.Linear(5, 3), torch.randn(7, 5)
    part = PriorHead("it", head, h, 3, 6, 1.0, 0.9)
    uniform = part.prior
    assert torch.equal(uniform, torch.full((3,), 1 / 3))
    z = part.logits(h, uniform)
    torch.testing.assert_close(z.softmax(-1), head(h).softmax(-1))
    torch.testing.assert_close(z, head(h) + math.log(1 / 3))
    other = torch.tensor([0.7, 0.2, 0.1])
    torch.testing.assert_close(part.logits(h, other), head(h) + other.log())
    dW, db, gamma, beta = part.made(other)
    assert dW.shape == head.weight.shape and db.shape == head.bias.shape
    assert gamma.shape == beta.shape == (5,)
    K, D, H = 3, 5, 6
    assert sum(t.numel() for t in part.g.values()) == K * H + H + (H + 1) * (K * D + K + 2 * D)
    K, D, H = 1000, 2048, 100
    assert K * H + H + (H + 1) * (K * D + K + 2 * D) == 207_462_796
    assert "207,462,796" in LabelShift.__doc__


@pytest.mark.parametrize("drawn_order", [False, True])
def test_g_learns_as_autograd_and_adam_say(drawn_order):
    g = torch.Generator().manual_seed(1)
    h = torch.randn(30, 4, generator=g, dtype=D64)
    y = torch.tensor([2] * 15 + [0] * 5 + [1] * 10)
    y = y[torch.randperm(30, generator=g)]
    head = nn.Linear(4, 3, dtype=D64)
    part = PriorHead("it", head, h, 3, 5, 0.8, 0.9)
    mine = {k: v.clone().requires_grad_() for k, v in part.g.items()}
    torch.manual_seed(9)
    losses = part.learn(h, y, updates=12, rows=7, rate=0.03, imbalance=20.0,
                        drawn_order=drawn_order)
    torch.manual_seed(9)
    adam, kinds = torch.optim.Adam(list(mine.values()), 0.03), set()
    for step in range(12):
        order = torch.randperm(3).tolist() if drawn_order else [2, 1, 0]    # 15, 10 and 5 rows
        kind = int(torch.randint(3, ()))
        kinds.add(kind)
        weight = [1.0, 1.0, 1.0]
        for place, c in enumerate(order):
            weight[c] = 1.0 if kind == 1 else 20.0 ** (-(place if kind == 0 else 2 - place) / 2)
        pi = torch.tensor(weight, dtype=D64) / sum(weight)
        drawn = torch.multinomial(pi, 7, replacement=True)
        u = torch.rand(7, dtype=D64)
        picked = [(y == c).nonzero()[int(v * int((y == c).sum())), 0] for c, v in
                  zip(drawn.tolist(), u.tolist(), strict=True)]
        loss = F.cross_entropy(said(head, mine, h[torch.stack(picked)], pi, 0.8), drawn)
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-9)
        adam.zero_grad()
        loss.backward()
        adam.step()
        head.zero_grad()
    assert kinds == {0, 1, 2}
    for k, v in mine.items():
        torch.testing.assert_close(part.g[k], v.detach(), rtol=1e-8, atol=1e-10)
        assert not part.g[k].requires_grad


def test_shares():
    first = torch.tensor([2, 0, 1])
    long = shares("long-tailed", first, 100.0)
    torch.testing.assert_close(long, torch.tensor([0.1, 0.01, 1.0], dtype=D64) / 1.11)
    torch.testing.assert_close(shares("inverse", first, 100.0),
                               torch.tensor([0.1, 1.0, 0.01], dtype=D64) / 1.11)
    assert torch.equal(shares("uniform", first, 100.0), torch.full((3,), 1 / 3, dtype=D64))


# -- overlapping classes, whose shares change ------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def clouds(n, pi, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor(pi), n, replacement=True, generator=g)
    centre = torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1], [-0.5, -0.5, -0.5]])
    return centre[y] + 0.7 * torch.randn(n, 3, generator=g), y


EVEN, ODD = [0.25] * 4, [0.02, 0.08, 0.2, 0.7]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net, (x, y) = Net(), clouds(2000, EVEN, 1)
    adam = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(300):
        adam.zero_grad()
        F.cross_entropy(net(x), y).backward()
        adam.step()
    rows = [(x[i : i + 500], y[i : i + 500]) for i in range(0, 2000, 500)]
    return net.requires_grad_(False), rows


def right(answer, x, y):
    return float((answer(x).argmax(-1) == y).float().mean())


@pytest.mark.parametrize("settings", [{}, {"adjust": 0.0, "order": "drawn", "steps": 1500,
                                           "step_rate": 3e-3}])
def test_the_true_shares_raise_accuracy_on_shifted_source_data(trained, settings):
    net, rows = trained
    x, y = clouds(4000, ODD, 2)
    with LabelShift(**settings).lifecycle(net, rows, prior=torch.tensor(ODD)) as adapted:
        after = right(adapted, x, y)
        torch.testing.assert_close(adapted.parts[0].prior, torch.tensor(ODD))
    assert after > right(net, x, y) + 0.04


def test_shares_are_found_along_the_stream_and_the_block_forgets_them(trained):
    net, rows = trained
    x, y = clouds(6400, ODD, 3)
    with LabelShift().lifecycle(net, rows) as adapted:
        after = sum(right(adapted, x[i : i + 64], y[i : i + 64]) for i in range(0, 6400, 64)) / 100
        found = adapted.parts[0].prior
        plain = net(x).softmax(-1).mean(0)
        true = torch.tensor(ODD)
        assert float((found - true).abs().sum()) < 0.5 * float((plain - true).abs().sum())
        adapted.reset()
        assert torch.equal(adapted.parts[0].prior, torch.tensor(EVEN))
    assert after > right(net, x, y) + 0.04


def test_tent_supplies_the_features_and_its_loss_reads_what_is_answered():
    model, head, rows, stream = classifier("cnn")
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    method = LabelShift(under="tent(step_rate=0.05, updates=2)", decay=0.5, **SMALL)
    adapted = method.lifecycle(model, rows)
    g = adapted.parts[0].g
    with adapted:
        got = [adapted(batch).logits for batch in stream]
    params = []
    for m in twin.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.training, m.track_running_stats = True, False
            m.running_mean = m.running_var = None
            params += list(m.requires_grad_(True).parameters())
    plain = next(m for n, m in twin.named_modules() if n in ("classifier", "head"))
    kept = []
    plain.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    adam = torch.optim.Adam(params, 0.05)
    pi = torch.full((head.out_features,), 1 / head.out_features, dtype=D64)
    for batch, want in zip(stream, got, strict=True):
        start = pi
        for _ in range(2):
            twin(**batch)
            h = kept[-1]
            pi = 0.5 * start + 0.5 * said(plain, g, h, start, 1.0).softmax(-1).mean(0).detach()
            z = said(plain, g, h, pi, 1.0)
            adam.zero_grad()
            (-(z.softmax(-1) * z.log_softmax(-1)).sum(-1)).mean().backward()
            adam.step()
        torch.testing.assert_close(want, z.detach(), rtol=1e-7, atol=1e-8)


def test_answers_of_lame_are_of_the_heads_that_follow():
    model, _, rows, stream = classifier("vit")
    with LabelShift(**SMALL).lifecycle(model, rows) as adapted:
        plain = adapted(stream[0]).logits
    with LabelShift(under="lame(neighbours=2)", **SMALL).lifecycle(model, rows) as adapted:
        got = adapted(stream[0]).logits
    head = model.classifier
    f = F.normalize(features(model, head, stream[0]), dim=1)
    near = torch.cdist(f, f)
    near.fill_diagonal_(9)
    W = torch.zeros(5, 5, dtype=D64).scatter_(1, near.topk(2, largest=False).indices, 1.0)
    z = q = plain.softmax(-1)
    for _ in range(200):
        z = (torch.log(q + 1e-10) + W @ z).softmax(-1)
    torch.testing.assert_close(got.exp(), z, rtol=1e-4, atol=1e-6)


def test_a_stream_goes_on_from_its_state_and_a_refused_batch_leaves_it():
    model, _, rows, stream = classifier("vit")
    with LabelShift(seed=1, **SMALL).lifecycle(model, rows) as adapted:
        adapted(stream[0])
        state = adapted.state()
        want = adapted(stream[1]).logits
    with LabelShift(seed=2, **SMALL).lifecycle(model, rows) as other:
        assert not torch.equal(other.parts[0].g["w1"], state["part.0.w1"])
        other.restore(state)
        assert torch.equal(other(stream[1]).logits, want)
        prior = other.parts[0].prior.clone()
        with pytest.raises(CheckError, match="not finite"):
            other({k: v * math.nan for k, v in stream[2].items()})
        assert torch.equal(other.parts[0].prior, prior)
        with pytest.raises(FormatError, match="another stream"):
            other.restore({k: v for k, v in state.items() if k != "part.0.prior"})
    same = [LabelShift(seed=1, **SMALL).lifecycle(model, rows).parts[0].g["w2"] for _ in range(2)]
    assert torch.equal(*same) and torch.equal(same[0], state["part.0.w2"])


def test_a_batch_that_is_refused_after_its_forward_has_no_say():
    model, _, rows, stream = classifier("vit")
    with LabelShift(**SMALL).lifecycle(model, rows) as adapted:
        before = adapted.parts[0].prior.clone()

        def fails(out):
            raise ConfigError("no")

        adapted.finish = fails
        with pytest.raises(ConfigError):
            adapted(stream[0])
        assert torch.equal(adapted.parts[0].prior, before)
    assert not model.classifier._forward_hooks


def test_half_precision_keeps_its_form():
    model, _, rows, stream = classifier("vit")
    model.bfloat16()
    rows = [{k: v.bfloat16() if k != "labels" else v for k, v in b.items()} for b in rows]
    with torch.inference_mode(), LabelShift(**SMALL).lifecycle(model, rows) as adapted:
        got = adapted({k: v.bfloat16() for k, v in stream[0].items()}).logits
        assert got.dtype == torch.bfloat16 and adapted.parts[0].g["w1"].dtype == torch.float32


@pytest.mark.parametrize("order", ["source", "drawn"])
def test_rows_are_drawn_as_the_setting_says(monkeypatch, order):
    from burnish.methods.lifecycle import label_shift as module

    told = []
    monkeypatch.setattr(module.PriorHead, "learn", lambda self, *a, **k: told.append(k))
    model, head = classifier()[:2]
    made = burnish.parse(f"label_shift(order='{order}', tail=1.5)")[0]
    made.lifecycle(model, source(model, classes=3))
    assert told[0]["drawn_order"] is (order == "drawn") and told[0]["imbalance"] == 1.5


def test_its_settings():
    made = parse("label_shift")[0]
    assert (made.hidden, made.decay, made.adjust, made.steps, made.per_update, made.step_rate,
            made.tail, made.order, made.under, made.seed) == \
        (100, 0.9, 1.0, 1000, 64, 1e-3, 100.0, "source", None, 0)
    least = {"hidden": 1, "steps": 1, "per_update": 1, "decay": 0.0, "adjust": 0.0}
    assert LabelShift(**least).changed() == least
    assert LabelShift.adapts and LabelShift.learns and not parse("tent")[0].learns


@pytest.mark.parametrize("settings, match", [
    ({"hidden": 0}, "at least 1"), ({"steps": 0}, "at least 1"), ({"per_update": 0}, "at least 1"),
    ({"step_rate": 0.0}, "positive"), ({"decay": 1.0}, "from 0 up to 1"),
    ({"decay": -0.1}, "from 0 up to 1"), ({"adjust": -1.0}, "at least 0"),
    ({"tail": 1.0}, "above 1"), ({"order": "class"}, "expected source or drawn"),
    ({"under": "lora"}, "one method that adapts"), ({"under": "label_shift"}, "one method"),
    ({"under": "tent + lame"}, "one method"), ({"targets": "q"}, "it is the head"),
])
def test_settings_that_cannot_act_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        LabelShift(**settings)


def test_data_and_models_that_cannot_act_are_refused(trained):
    net, rows = trained
    x, y = rows[0]
    it = LabelShift(**SMALL)
    for given, error, match in (
            ([], DataError, "no batch"), ([x], DataError, "batches with labels"),
            ([(x, y.float())], DataError, "batches with labels"),
            ([(x, y + 1)], DataError, "labels from 1 to 4"),
            ([(x, y - 1)], DataError, "labels from -1"),
            ([(x[y != 2], y[y != 2])], ConfigError, "no row of class 2"),
            ([(x * math.inf, y)], CheckError, "not finite")):
        with pytest.raises(error, match=match):
            it.lifecycle(net, given)
    for prior in ([0.5, 0.5], [0.5, 0.6, -0.1, 0.0], [0.25, 0.25, 0.25, 0.2],
                  [0.25, 0.25, 0.25, 0.25015]):
        with pytest.raises(ConfigError, match="4 shares that add up to 1"):
            it.lifecycle(net, rows, prior=torch.tensor(prior))
    with pytest.raises(ConfigError, match="no linear head"):
        it.lifecycle(tiny("llama")[0], rows)
    with pytest.raises(ConfigError, match="a row for each sample"):
        it.lifecycle(net, [(x[:, None], y)])
    with it.lifecycle(net, rows) as adapted, pytest.raises(ConfigError, match="reads .4, 1, 6."):
        adapted(x[:4, None])
    assert not net.head._forward_hooks
