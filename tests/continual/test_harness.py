"""The protocol: what may be answered when, what is trained against what, and who may judge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.continual.plane import network, plane, points
from torch import nn

from burnish.continual import Stream, Task, Training, by_class, evaluate, run, search
from burnish.continual.learner import Learner, learner, names, said
from burnish.continual.learners.replay import Kept, Replay, halves
from burnish.continual.learners.sequential import Sequential
from burnish.continual.training import Given, batches, cross_entropy, masked
from burnish.core.errors import ConfigError, DataError, RecipeError


class Oracle(Learner):
    """Knows every answer, of classes that have not come too."""

    name = "oracle"
    seen: list

    def learn(self, t):
        self.truth = {tuple(x.tolist()): y for task in self.study.stream.tasks
                      for x, y in task.test}

    def scores(self, inputs, allowed, task):
        type(self).seen.append((allowed.tolist(), task))
        y = torch.tensor([getattr(self, "truth", {}).get(tuple(x.tolist()), 0) for x in inputs])
        return F.one_hot(y, self.study.stream.width).float()


def test_an_oracle_forgets_nothing_and_is_asked_among_what_has_been_seen():
    for scenario in ("class", "task", "domain"):
        Oracle.seen = []
        stream = plane(scenario)
        found = run(stream, "full", Oracle())
        assert found.matrix.forgetting == 0.0 and found.matrix.last == 1.0
        assert (found.matrix.forward is None) == (scenario == "class")
        for allowed, task in Oracle.seen:
            assert (task is not None) == (scenario == "task")
            if scenario == "task":
                assert {i for i, a in enumerate(allowed) if a} == set(stream.tasks[task].classes)
        many = [sum(a) for a, _ in Oracle.seen]
        assert set(many) == {"class": {2, 4, 6}, "task": {2}, "domain": {6}}[scenario]


def test_a_row_s_own_task_is_never_told_where_all_classes_compete():
    """The same scores: right where the row says its task, wrong among all classes."""
    class Blind(Oracle):
        def scores(self, inputs, allowed, task):
            out = super().scores(inputs, allowed, task)
            first = self.study.stream.tasks[0].classes[0]
            out[:, first] = 2.0
            return out

    Oracle.seen = []
    assert run(plane("task"), "full", Blind()).matrix.last > 0.8
    assert run(plane("class"), "full", Blind()).matrix.last == pytest.approx(1 / 6)


def test_classes_that_have_not_come_get_no_mass_and_no_gradient():
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([True, False, True, True, False, False])
    y = torch.tensor([0, 2, 3, 3, 0])
    loss = cross_entropy(z, y, allowed)
    loss.backward()
    some = [0, 2, 3]
    log_p = z.detach()[:, some].log_softmax(-1)
    want = -log_p[range(5), [some.index(i) for i in y.tolist()]].mean()
    torch.testing.assert_close(loss.detach(), want)
    assert not z.grad[:, ~allowed].any() and z.grad[:, allowed].any()
    assert masked(z.half(), allowed).dtype == torch.float32


def test_training_on_a_task_leaves_columns_of_classes_to_come():
    stream = plane()
    class Look(Sequential):
        name = "look"

        def learn(self, t):
            before = self.tuned.model[4].weight.detach().clone()
            super().learn(t)
            moved = (self.tuned.model[4].weight.detach() != before).any(1)
            allowed = stream.classes(t) if not self.current else \
                stream.mine(torch.tensor([stream.tasks[t].classes[0]]), t)[0]
            assert moved.tolist() == allowed.tolist()

    run(stream, "lora(rank=2)", Look())
    run(stream, "lora(rank=2)", Look(compete="current"))
    run(plane("task"), "lora(rank=2)", Look(compete="current"))


def test_forgetting_and_what_holds_against_it():
    stream = plane()
    naive, memory, joint = (run(stream, "full", how) for how in
                            ("sequential", "replay(memory=40)", "joint"))
    assert naive.matrix.forgetting > 0.5 > 0.2 > memory.matrix.forgetting
    assert joint.matrix.last >= memory.matrix.last > naive.matrix.last + 0.2
    assert joint.matrix.average is None and len(joint.stored) == 1
    assert [s.samples for s in memory.stored] == [32, 40, 40]
    assert memory.stored[-1].bytes == naive.stored[-1].bytes + 40 * 2 * 4


def test_what_is_stored_and_what_a_task_adds():
    one = run(plane(), "lora(rank=2)", "sequential")
    n = 2 * (2 + 16) + 2 * 32 + 16 * 6 + 6
    assert one.added == (n, 0, 0) and one.trained == n and one.stored[-1] == (n, 4 * n, 0)
    many = run(plane(), "lora(rank=2) + o_lora", "sequential")
    assert many.added == (n, n - 102, n - 102)
    whole = run(plane(), "full", "sequential")
    assert whole.added[0] == sum(p.numel() for p in network(6).parameters())


def test_equal_seeds_give_equal_runs_and_the_global_generator_stays():
    torch.manual_seed(5)
    stood = torch.get_rng_state()
    a, b = (run(plane(), "lora(rank=2, dropout=0.2)", "replay(memory=8)", seed=3) for _ in range(2))
    assert a.matrix == b.matrix and torch.equal(torch.get_rng_state(), stood)
    c = run(plane(), "lora(rank=2, dropout=0.2)", "replay(memory=8)", seed=4)
    assert c.matrix != a.matrix


@pytest.mark.parametrize("recipe", ["full", "bitfit", "lora(rank=2) + sgd(momentum=0.9)",
                                    "lora(rank=2) + l2_sp", "dora(rank=2)", "linear_probe",
                                    "adalora(rank=2)"])
def test_recipes_of_many_kinds(recipe):
    assert 0.2 < run(plane(), recipe, "replay(memory=12)").matrix.last <= 1


def test_o_lora_has_an_adapter_a_task_and_one_head():
    class Look(Sequential):
        name = "look"
        seen = []

        def learn(self, t):
            kept = {n: x.clone() for n, x in self.held().items() if "burnish" in n}
            super().learn(t)
            Look.seen.append((list(self.tuned.adapters), self.tuned.training))
            now = self.held()
            for n, x in kept.items():
                stays = f".burnish.task{t + 1}." not in n
                assert torch.equal(x, now[n]) == stays, n

    run(plane(), "lora(rank=2) + o_lora", Look())
    assert Look.seen == [(["task1"], "task1"), (["task1", "task2"], "task2"),
                         (["task1", "task2", "task3"], "task3")]


def test_i_lora_is_told_which_rows_are_of_the_memory():
    class Look(Replay):
        name = "look"
        seen = []

        def given(self, rows, t, replayed=0):
            out = super().given(rows, t, replayed)
            Look.seen.append((t, out.keys["replay"].tolist()))
            return out

    found = run(plane(), "i_lora(rank=2, ema=0.9)", Look(memory=5))
    assert all(sum(k) == 0 for t, k in Look.seen if t == 0)
    assert all(k == [0] * 8 + [1] * 5 for t, k in Look.seen if t > 0)
    assert found.stored[-1].parameters == 2 * (2 * (2 + 16) + 2 * 32) + 102
    assert run(plane(), "i_lora(rank=2)", "sequential").matrix.last > 0


def test_a_step_weighs_old_and_new_alike():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 4, dtype=torch.float64, generator=g)
    y = torch.tensor([0, 1, 0, 1, 0, 1, 2, 3])
    old = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    all_ = torch.ones(4, dtype=torch.bool)
    want = (F.cross_entropy(z[:6], y[:6]) + F.cross_entropy(z[6:], y[6:])) / 2
    torch.testing.assert_close(halves(z, Given(None, y, {"replay": old}), all_), want)
    none = Given(None, y, {"replay": 0 * old})
    torch.testing.assert_close(halves(z, none, all_), F.cross_entropy(z, y))


def test_with_a_cap_every_task_costs_the_same():
    class Look(Replay):
        name = "look"
        seen = []

        def learn(self, t):
            self.steps = 0
            super().learn(t)
            Look.seen.append((self.used[-1], self.steps))

        def given(self, rows, t, replayed=0):
            self.steps += 1
            assert len(self.kept.draw(0)) == 0
            out = super().given(rows, t, replayed)
            old = int(out.keys["replay"].sum())
            assert old == (0 if t == 0 else len(rows))            # new to old, 1 to 1
            return out

    stream = plane()
    wide = replace(stream, tasks=(stream.tasks[0], replace(
        stream.tasks[1], train=list(stream.tasks[1].train) * 3), stream.tasks[2]))
    run(wide, "lora(rank=2)", Look(memory=20, cap=16))
    assert Look.seen == [(16, 12)] * 3
    Look.seen.clear()
    run(wide, "lora(rank=2)", Look(memory=20))
    assert [n for n, _ in Look.seen] == [32, 96, 32]


def test_the_memory_holds_rows_of_the_past_each_as_likely():
    counts = torch.zeros(12)
    for seed in range(600):
        kept = Kept(4, seed)
        for i in range(0, 12, 3):
            kept.show([(torch.tensor([j]), j) for j in range(i, i + 3)])
        held = [y for _, y in kept.held()]
        assert len(set(held)) == 4 and {y for _, y in kept.draw(3)} <= set(held)
        counts[held] += 1
    assert (counts / 600 - 1 / 3).abs().max() < 0.08
    assert Kept(4, 0).draw(3) == []


def renamed(stream: Stream) -> Stream:
    """The same rows, their classes counted from the other end."""
    last = stream.width - 1

    def turned(rows):
        return [(x, last - y) for x, y in rows]

    return replace(stream, tasks=tuple(
        Task(t.name, tuple(last - c for c in t.classes), turned(t.train), turned(t.test))
        for t in stream.tasks))


# -- chosen here, shown there ------------------------------------------------------------
def test_settings_are_judged_on_another_data_set():
    some = [("lora(rank=2)", "sequential", Training(epochs=1, batch=8, rate=1e-6)),
            ("lora(rank=2)", "replay(memory=24)", Training(epochs=4, batch=8, rate=3e-2))]
    choice = search(lambda s: plane(seed=s), some, seeds=(0, 1))
    assert choice.value == some[1] and choice.scores[1] > choice.scores[0]
    for spent in (lambda s: plane(seed=s), lambda s: plane(seed=0, data="another name")):
        with pytest.raises(ConfigError, match="were chosen on plane"):
            evaluate(choice, spent, seeds=(0,))
    for spent in (lambda s: plane(seed=1, data="another name"),          # of the second seed
                  lambda s: renamed(plane(seed=0, data="another name"))):
        with pytest.raises(ConfigError, match="were chosen on plane"):
            evaluate(choice, spent, seeds=(0,))
    other = lambda s: plane(seed=10 + s, data="other")                       # noqa: E731
    found = evaluate(choice, other, seeds=(0, 1))
    assert [(r.seed, r.learner) for r in found] == [(s, "replay(memory=24)") for s in (0, 1)]
    for strange in ({"scenario": "task"}, {"increment": 3}):
        with pytest.raises(ConfigError, match="expected the same"):
            evaluate(choice, lambda s, k=strange: plane(**{"seed": 10, "data": "other", **k}))
    with pytest.raises(ConfigError, match="neither may be empty"):
        search(lambda s: plane(), [])
    with pytest.raises(ConfigError, match="at least one seed"):
        evaluate(choice, other, seeds=())


# -- streams --------------------------------------------------------------------------------------
def test_classes_come_in_the_customary_order():
    import numpy as np

    rows = points(10, 2, 0)
    tasks = by_class(rows, rows, base=4, increment=3)
    assert [len(t.classes) for t in tasks] == [4, 3, 3]
    assert [c for t in tasks for c in t.classes] == \
        np.random.RandomState(1993).permutation(10).tolist()
    assert [t.classes for t in by_class(rows, rows, increment=5, order=None)] == \
        [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    for order in (-1, 2**32):
        with pytest.raises(ConfigError, match="expected a seed from 0"):
            by_class(rows, rows, order=order)
    for words in ({"increment": 3}, {"base": 10}, {"increment": 0}, {"base": -1}):
        with pytest.raises(ConfigError, match="10 classes do not fall"):
            by_class(rows, rows, **words)


def test_batches_have_every_row_once_and_none_is_alone():
    for n in (1, 7, 8, 9, 16, 17):
        some = list(batches(list(range(n)), 8, 3))
        assert sorted(x for b in some for x in b) == list(range(n))
        assert n == 1 or min(map(len, some)) > 1


def two(**change) -> Stream:
    return replace(plane(), **change)


@pytest.mark.parametrize("make, error, why", [
    (lambda: two(scenario="clas"), ConfigError, "'class', 'domain' or 'task'"),
    (lambda: two(tasks=plane().tasks[:1]), ConfigError, "two tasks or more"),
    (lambda: two(tasks=plane().tasks[:1] * 2), ConfigError, "classes of their own"),
    (lambda: two(scenario="domain"), ConfigError, "domains have the same classes"),
    (lambda: Task("a", (0,), [], points(1, 1, 0)), DataError, "no rows to train"),
    (lambda: Task("a", (0,), points(2, 1, 0), points(1, 1, 0)), DataError, "rows of class 1"),
    (lambda: Training(epochs=0), ConfigError, "expected 1 or more"),
    (lambda: Training(rate=0.0), ConfigError, "rates above 0"),
    (lambda: Training(head_rate=-1.0), ConfigError, "rates above 0"),
    (lambda: Training(decay=-1.0), ConfigError, "expected 0 or more"),
    (lambda: Training(schedule="cosine"), ConfigError, "'linear' or 'constant'"),
    (lambda: learner("repla"), ConfigError, "did you mean 'replay'"),
    (lambda: learner("replay(memry=3)"), ConfigError, "did you mean 'memory'"),
    (lambda: learner("replay(memory=0)"), ConfigError, "at least 1 row"),
    (lambda: learner("replay(memory='a')"), ConfigError, "expected int"),
    (lambda: learner("replay +"), ConfigError, "cannot read"),
    (lambda: run(plane(), "poly(rank=1, tasks=3)"), RecipeError, "asks each row for its task"),
    (lambda: run(plane(), "lora(rank=2) + o_lora", "joint"), RecipeError, "all at once"),
    (lambda: run(two(model=lambda: network(4)), "full"), ConfigError, "a head of 6 classes"),
])
def test_what_cannot_be_is_refused(make, error, why):
    with pytest.raises(error, match=why):
        make()


def test_rows_that_say_their_task_are_told_to_parts_that_ask():
    found = run(plane("task"), "poly(rank=1, tasks=3, experts=2)")
    assert found.matrix.last > 0.5


def test_learners_are_said_as_they_are_read():
    assert {"sequential", "joint", "replay"} <= set(names())
    for text in ("sequential", "replay(memory=7)", "sequential(compete='current')"):
        assert said(learner(text)) == text
    assert all(learner(n).paper for n in names())
    learner("sequential")
    assert said(learner(Replay(memory=3))) == "replay(memory=3)"


def test_a_model_that_answers_a_mapping():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(2, 8), nn.Linear(8, 6)

        def forward(self, x):
            return {"logits": self.classifier(self.body(x).tanh())}

    stream = replace(plane(), model=Net, collate=lambda xs: {"x": torch.stack(xs)})
    assert run(stream, "lora(rank=2)", "replay(memory=12)").matrix.last > 0.4
    strange = replace(plane(), model=Net, logits=lambda out: out["logits"][:, 0],
                      collate=lambda xs: {"x": torch.stack(xs)})
    with pytest.raises(ConfigError, match="a head of 6 classes"):
        run(strange, "full")
