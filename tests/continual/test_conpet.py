"""ConPET: an adapter a task, one that chooses, and a cost that does not grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.continual.plane import plane

from burnish.continual import run
from burnish.continual.bank import nearest_to_centres
from burnish.continual.learners.conpet import Conpet
from burnish.continual.training import Given, cross_entropy
from burnish.core.errors import ConfigError, RecipeError


class Look(Conpet):
    name = "look"
    box: list = []

    def begin(self, study):
        super().begin(study)
        Look.box[:] = [self]


def through(stream=None, **settings):
    found = run(stream or plane(), "lora(rank=2)", Look(**settings))
    return Look.box[0], found


def test_an_oracle_that_chooses_is_separate_models():
    """Each row under its own task's adapter: bit for bit what that adapter alone answers."""
    one, _ = through()
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(12) % 3
    got = one.under(x, truth[:, None])
    for t, task in enumerate(one.study.stream.tasks):
        one.tuned.use(f"task{t + 1}")
        with torch.no_grad():
            z = one.tuned.model.eval()(x)
        own, rows = list(task.classes), truth == t
        assert torch.equal(got[rows][:, own], z[rows][:, own])
        rest = [c for c in range(6) if c not in own]
        assert (got[rows][:, rest] == -torch.inf).all()
    told = plane("task")
    by_oracle, found = through(told)
    for j, task in enumerate(told.tasks):            # rows that say their task have the oracle
        xs = told.collate([x for x, _ in task.test])
        z = by_oracle.scores(xs, told.classes(2, j), j)
        want = by_oracle.under(xs, torch.full((len(xs), 1), j))
        own = list(task.classes)
        assert torch.equal(z[:, own], want[:, own])
    assert found.matrix.forgetting == 0.0


def test_all_tasks_that_run_are_the_full_concatenation():
    one, _ = through(top=3)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    got = one.scores(x, torch.ones(6, dtype=torch.bool), None)
    want = torch.empty(9, 6)
    for t, task in enumerate(one.study.stream.tasks):
        one.tuned.use(f"task{t + 1}")
        with torch.no_grad():
            want[:, list(task.classes)] = one.tuned.model.eval()(x)[:, list(task.classes)]
    assert torch.equal(got, want)
    one.top = 7                                      # more than there are: all of them
    assert torch.equal(one.scores(x, torch.ones(6, dtype=torch.bool), None), want)
    one.top = 1
    p = one.choose(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(9))
    few = one.scores(x, torch.ones(6, dtype=torch.bool), None)
    assert ((few > -torch.inf).sum(-1) == 2).all()
    for row, k in zip(few, p.argmax(-1).tolist(), strict=True):
        assert set((row > -torch.inf).nonzero().flatten().tolist()) == \
            set(one.study.stream.tasks[k].classes)


def test_a_task_costs_the_same_however_many_came_before():
    one, _ = through(cap=20, memory=16)
    assert one.used == [(20, 20)] * 3
    one, _ = through(cap=2500, memory=4)
    assert one.used == [(32, 32), (32, 36), (32, 40)]


def test_earlier_tasks_stay_as_they_are():
    kept = {}

    class Stay(Conpet):
        name = "look"

        def learn(self, t):
            super().learn(t)
            now = {n: x.clone() for n, x in self.held().items()}
            for n, x in kept.items():
                if ".selector." not in n and "@selector" not in n:
                    assert torch.equal(x, now[n]), n
            kept.update({n: x for n, x in now.items() if n not in kept})

    run(plane(), "lora(rank=2)", Stay())
    assert any(n.endswith("@task3") for n in kept) and any(".task3." in n for n in kept)


def test_the_selector_weighs_every_task_alike():
    one, _ = through(memory=4)
    one.choosing, one.many = True, torch.tensor([4, 4, 24])
    g = torch.Generator().manual_seed(2)
    z = torch.randn(32, 6, generator=g)
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 24)
    got = one.loss(z, Given(None, labels, {}), 2)
    each = F.cross_entropy(z[:, :3], labels, reduction="none")
    want = 0.1 * torch.stack([each[labels == t].mean() for t in range(3)]).mean()
    torch.testing.assert_close(got, want)
    one.choosing = False
    y = torch.tensor([one.study.stream.tasks[2].classes[0]] * 32)
    torch.testing.assert_close(
        one.loss(z, Given(None, y, {}), 2),
        cross_entropy(z, y, torch.tensor([c in one.study.stream.tasks[2].classes
                                          for c in range(6)])))


def test_what_is_stored():
    _, found = through(memory=3)
    n = 100 + 102                                    # an adapter and its head
    assert found.added == (2 * n, n, n)              # the selector comes with the first
    assert [s.samples for s in found.stored] == [3, 6, 9]
    assert found.stored[-1].bytes == 4 * 4 * n + 9 * 2 * 4


def test_rows_near_the_centres_are_kept():
    g = torch.Generator().manual_seed(0)
    far = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([far, far.repeat_interleave(20, 0) + torch.randn(60, 2, generator=g)])
    kept = nearest_to_centres(x, 3, torch.Generator().manual_seed(1))
    assert len(set(kept)) == 3
    assert nearest_to_centres(x[:2], 3, g) == [0, 1]
    same = nearest_to_centres(torch.zeros(6, 2), 4, torch.Generator().manual_seed(0))
    assert len(set(same)) == 4                       # none twice, where all are alike too


@pytest.mark.parametrize("make, why", [
    (lambda: run(plane("domain"), "lora(rank=2)", "conpet"), "have the same"),
    (lambda: run(plane(), "lora(rank=2) + o_lora", "conpet"), "divides a run over its tasks"),
    (lambda: run(plane(), "lora(rank=2) + nf4", "conpet"), "holds the base's weights"),
    (lambda: run(replace(plane(), head=False), "lora(rank=2)", "conpet"), "head=False"),
    (lambda: run(plane(), "lora(rank=2)", "conpet(top=0)"), "top and memory of at least 1"),
    (lambda: run(plane(), "lora(rank=2)", "conpet(cap=1)"), "cap of at least 2"),
    (lambda: run(plane(), "lora(rank=2)", "conpet(weight=0.0)"), "a weight above 0")])
def test_what_cannot_be_is_refused(make, why):
    with pytest.raises((ConfigError, RecipeError), match=why):
        make()
