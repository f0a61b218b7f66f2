"""MOS: one merge an update and none in a forward, features apart, adapters found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.continual.plane import plane

import burnish
from burnish.continual import Training, run
from burnish.continual.bank import Gaussians
from burnish.continual.learners.model_surgery import ModelSurgery
from burnish.core.errors import ConfigError, RecipeError
from burnish.testing.models import tiny


class Look(ModelSurgery):
    name = "look"
    box: list = []

    def begin(self, study):
        super().begin(study)
        Look.box[:] = [self]


def through(stream=None, recipe="lora(rank=2)", cls=Look, **settings):
    found = run(stream or plane(), recipe, cls(**settings))
    return Look.box[0], found


def every(one):
    return {n: p.detach().clone() for n, p in one.tuned.model.named_parameters()}


def test_evaluation_leaves_adapters_bitwise_unchanged():
    one, _ = through()
    held = [{n: p.detach().clone() for n, p in one.adapter(b).items()} for b in (1, 2, 3)]
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(6, dtype=torch.bool)
    first = one.scores(x, allowed, None)
    for _ in range(3):
        assert torch.equal(one.scores(x, allowed, None), first)
    for b, before in enumerate(held, 1):
        assert all(torch.equal(p.detach(), before[n]) for n, p in one.adapter(b).items())


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_one_merge_an_update_is_the_formula(alpha):
    """Beside the same training without a merge, update by update: A <- (1 - a) A + a mean."""
    checked = []

    class Merging(Look):
        def merge(self):
            b = self.known + 1
            before = {n: p.detach().double() for n, p in self.adapter(b).items()}
            old = [{n: p.detach().double() for n, p in self.adapter(k).items()}
                   for k in range(1, b)]
            super().merge()
            for n, p in self.adapter(b).items():
                mean = sum(o[n] for o in old) / len(old)
                want = (1 - alpha) * before[n] + alpha * mean
                torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-7)
            checked.append(b)

    through(cls=Merging, alpha=alpha)
    assert checked == [2] * 24 + [3] * 24            # once an update: 6 epochs of 4 batches


def test_an_adapter_begins_from_the_one_before_and_earlier_ones_stay():
    starts, ends = {}, {}

    class Begin(Look):
        def _begin_from(self, b):
            super()._begin_from(b)
            starts[b + 1] = {n: p.detach().clone() for n, p in self.adapter(b + 1).items()}
            head = self.tuned.model[4]
            assert torch.equal(head.weight.detach(), self.linear.weight.detach())

        def learn(self, t):
            super().learn(t)
            ends[t + 1] = {n: p.detach().clone() for n, p in self.adapter(t + 1).items()}
            for b in range(1, t + 1):
                for n, p in self.adapter(b).items():
                    assert torch.equal(p.detach(), ends[b][n])

    through(cls=Begin)
    for b in (2, 3):
        assert all(torch.equal(v, ends[b - 1][n]) for n, v in starts[b].items())
        assert any(not torch.equal(v, ends[b][n]) for n, v in starts[b].items())


def test_features_are_pushed_from_all_others():
    one, _ = through()
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0),
                    requires_grad=True)
    means = [one.gaussians.mean[c] for c in sorted(one.gaussians.mean)]
    M = torch.cat([torch.stack(means), x])
    z = M @ M.t() / 0.8
    want = -(z - z.logsumexp(-1, keepdim=True)).diagonal().mean()
    torch.testing.assert_close(one.apart(x), want)
    a, = torch.autograd.grad(one.apart(x), x)
    b, = torch.autograd.grad(want, x)
    torch.testing.assert_close(a, b)
    one.gaussians.mean.clear()                       # the first task has its batch alone
    z = x @ x.t() / 0.8
    torch.testing.assert_close(one.apart(x), F.cross_entropy(z, torch.arange(5)))


def test_statistics_and_draws():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=g) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.1]]) + 5
    whole, diagonal = Gaussians(), Gaussians(diagonal=True)
    for one in (whole, diagonal):
        one.learn(4, x)
    want = torch.cov(x.double().t()) + 1e-4 * torch.eye(3)
    torch.testing.assert_close(whole.spread[4], want)
    torch.testing.assert_close(diagonal.spread[4], want.diagonal())
    drawn = whole.draw(4, 20_000, g)
    torch.testing.assert_close(drawn.mean(0).double(), whole.mean[4], rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.cov(drawn.double().t()), want, rtol=0.06, atol=0.06)
    alone = torch.cov(diagonal.draw(4, 20_000, g).double().t())
    torch.testing.assert_close(alone, torch.diag(want.diagonal()), rtol=0.06, atol=0.06)
    whole.learn(5, x[:1])                            # one row of a class
    assert whole.draw(5, 4, g).isfinite().all()
    assert sum(t.numel() for t in whole.tensors()) == 2 * 12
    assert sum(t.numel() for t in diagonal.tensors()) == 6


def test_retrieval_ends_at_a_fixed_point_or_the_cap():
    one, found = through(replace(plane(), training=Training(epochs=6, batch=8, rate=3e-3)))
    assert found.matrix.last > 0.9
    x = 3 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(6, dtype=torch.bool)
    logits, now, rounds = one.retrieve(x, allowed)
    assert 1 <= int(rounds.min()) and int(rounds.max()) <= 4
    of = {c: k for k, task in enumerate(one.study.stream.tasks) for c in task.classes}
    settled = torch.tensor([of[int(c)] for c in logits.argmax(-1)]) == now
    assert settled[rounds < 4].all()
    alone = 0
    for i in range(60):                              # row by row, as it is written
        cos = one.cosines(x[i:i + 1])
        if (top := cos[0].topk(2).values)[0] - top[1] < 1e-4:
            continue                                 # a tie, which rounding decides
        alone += 1
        task, n = of[int(cos.argmax())], 0
        while n < 4:
            n += 1
            one.tuned.use(f"task{task + 1}")
            z = one.linear(one.seen.of(one.tuned, x[i:i + 1]))[0]
            found = of[int(z.argmax())]
            if found == task:
                break
            task = found
        torch.testing.assert_close(logits[i], z, rtol=1e-4, atol=1e-5)
        assert int(rounds[i]) == n
        want = z.softmax(-1) + (3 * cos[0]).softmax(-1)
        torch.testing.assert_close(one.scores(x[i:i + 1], allowed, None)[0], want,
                                   rtol=1e-4, atol=1e-5)
    assert alone > 30
    one.rounds = 1
    assert int(one.retrieve(x, allowed)[2].max()) == 1


def test_prototypes_are_of_the_first_adapter_and_answers_of_classes_seen():
    one, _ = through()
    task = one.study.stream.tasks[2]
    c = task.classes[0]
    xs = torch.stack([x for x, y in task.train if y == c])
    for b, want in ((1, one.prototypes[c]), (3, one.gaussians.mean[c].float())):
        one.tuned.use(f"task{b}")
        torch.testing.assert_close(one.seen.of(one.tuned, xs).mean(0), want, rtol=1e-5, atol=1e-6)
    allowed = one.study.stream.classes(1)
    got = one.scores(xs, allowed, None)
    assert not got[:, ~allowed].any()


def test_the_head_is_aligned_from_the_second_task_on():
    heads = []

    class Align(Look):
        def _align(self, t):
            before = self.linear.weight.detach().clone()
            super()._align(t)
            moved = (self.linear.weight.detach() - before).abs().amax(1) > 1e-4
            heads.append((t, set(moved.nonzero().flatten().tolist())))

    one, _ = through(cls=Align)
    stream = plane()
    assert [t for t, _ in heads] == [1, 2]
    assert {c for k in stream.tasks[:2] for c in k.classes} <= heads[0][1]
    heads.clear()
    through(cls=Align, align=0)
    assert heads == []


def test_counts():
    """12 (2 x 16 x 768 + 16 + 768) on ViT-B/16; what is stored."""
    one = burnish.parse("parallel(bottleneck=16, scale=1.0)")[0]
    assert 12 * one.count(768) == 304_320
    _, found = through()
    statistics = 2 * (16 + 16 * 16 + 16)             # mean, covariance, prototype of two classes
    assert found.added == (100 + 102 + statistics, 100 + statistics, 100 + statistics)
    _, small = through(covariance="diagonal")
    assert found.added[2] - small.added[2] == 2 * (16 * 16 - 16)


def test_an_adapter_beside_the_mlp_of_a_transformer():
    def model():
        torch.manual_seed(0)
        return tiny("vit", num_labels=6)[0]

    g = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 3, 16, 16, generator=g)
    from burnish.continual import by_class
    rows = [(maps[y] + 0.3 * torch.randn(3, 16, 16, generator=g), y)
            for y in range(6) for _ in range(6)]
    stream = replace(plane(), model=model, tasks=by_class(rows[::2], rows[1::2], order=0),
                     collate=lambda xs: {"pixel_values": torch.stack(xs)})
    one, found = through(stream, "parallel(bottleneck=4, scale=1.0) + sgd(momentum=0.9)")
    assert len(one.adapter(2)) == 2 * 4 and found.matrix.tasks == 3


@pytest.mark.parametrize("make, why", [
    (lambda: through(plane("domain")), "of scenario 'class', not 'domain'"),
    (lambda: through(plane("task")), "of scenario 'class', not 'task'"),
    (lambda: through(recipe="lora(rank=2) + o_lora"), "divides a run over its tasks"),
    (lambda: through(recipe="linear_probe"), "trains weights of the base"),
    (lambda: through(recipe="bitfit"), "trains weights of the base"),
    (lambda: through(replace(plane(), head=False)), "head=False"),
    (lambda: through(alpha=1.5), "alpha from 0 to 1"), (lambda: through(rounds=0), "rounds of"),
    (lambda: through(temperature=0.0), "a temperature above 0")])
def test_what_cannot_be_is_refused(make, why):
    with pytest.raises((ConfigError, RecipeError), match=why):
        make()


def test_a_class_without_rows_to_train_has_no_statistics():
    stream = plane()
    task = stream.tasks[1]
    gone = task.classes[0]
    lean = replace(task, train=[r for r in task.train if r[1] != gone])
    one, found = through(replace(stream, tasks=(stream.tasks[0], lean, stream.tasks[2])))
    assert gone not in one.gaussians.mean and found.matrix.tasks == 3
