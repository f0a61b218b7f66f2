"""Hebbian orthogonal projection: the rule, the subspace it finds, and answers that stay."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests.continual.plane import plane
from torch import nn

from burnish.blocks.choose.hebbian import Lateral
from burnish.continual import Stream, Training, by_class, by_domain, run
from burnish.continual.learner import Study
from burnish.continual.learners.hlop import Hlop
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse


def spread(n=400, inp=6, seed=0):
    """Inputs whose principal directions are told apart, turned."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(inp, inp, generator=g, dtype=torch.float64))
    scale = torch.tensor([4.0, 3.0, 1.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    return torch.randn(n, inp, generator=g, dtype=torch.float64) * scale @ Q.T


def leading(x, a, b):
    """Projector onto the a-th to b-th principal directions of the second moments."""
    _, V = torch.linalg.eigh(x.T @ x)
    V = V.flip(1)[:, a:b]
    return V @ V.T


def test_one_step_is_the_rule():
    x = spread(5)
    one = Lateral(6, x)
    g = torch.Generator().manual_seed(1)
    one.grow(2, g)
    one.grow(3, g)
    before = one.H.clone()
    assert one.settled == 2 and one.H.shape == (5, 6)
    old, new = before[:2], before[2:]
    size = 0.0
    for v in x:
        rest = v - sum((h @ v) * h for h in old)
        size += float(rest @ rest) / 5
    want = new.clone()
    for v in x / size ** 0.5:
        y = [h @ v for h in before]
        rest = v - sum(a * h for a, h in zip(y, before, strict=True))
        for k in range(3):
            want[k] += 0.3 / 5 * y[2 + k] * rest
    one.learn(x, 0.3)
    torch.testing.assert_close(one.H[2:], want, rtol=1e-10, atol=1e-12)
    assert torch.equal(one.H[:2], old)


def test_neurons_find_the_principal_subspace_and_then_what_is_left():
    x = spread()
    one, g = Lateral(6, x), torch.Generator().manual_seed(0)
    one.grow(2, g)
    for _ in range(400):
        one.learn(x, 0.5)
    torch.testing.assert_close(one.H.T @ one.H, leading(x, 0, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.H @ one.H.T, torch.eye(2).double(), atol=1e-6, rtol=0)
    one.grow(1, g)
    for _ in range(400):
        one.learn(x, 0.5)
    torch.testing.assert_close(one.H.T @ one.H, leading(x, 0, 3), atol=1e-5, rtol=0)
    D = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(one.off(D), D - D @ leading(x, 0, 3), atol=1e-4, rtol=0)


def test_no_more_neurons_than_inputs():
    one, g = Lateral(3, torch.zeros(1)), torch.Generator().manual_seed(0)
    one.grow(2, g)
    one.grow(5, g)
    one.grow(5, g)
    assert one.H.shape == (3, 3) and one.settled == 3
    one.learn(torch.zeros(4, 3), 0.5)
    assert torch.isfinite(one.H).all()


# -- in a stream -----------------------------------------------------------------------------------
def apart(seed=0, width=8):
    """Two tasks whose inputs lie in different coordinates, and three layers of one width."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for y in range(4):
        at = torch.zeros(width)
        at[2 * y:2 * y + 2] = torch.tensor([2.0, -1.0])
        mask = (torch.arange(width) // 4 == y // 2).float()
        rows += [(at + 0.5 * torch.randn(width, generator=g) * mask, y) for _ in range(24)]

    def network():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 4))

    tasks = by_class(rows[::2], rows[1::2], increment=2, order=None)
    return Stream("apart", "apart", "class", tasks,
                  network, torch.stack, training=Training(epochs=8, batch=8, rate=1e-2))


def test_answers_to_the_first_task_stay():
    """All directions of its inputs are the neurons': with the second task nothing moves there."""
    one = Hlop(neurons=0.5, passes=500)
    stream = apart()
    one.begin(Study(stream, parse("full"), stream.training, 0))
    start = {n: p.detach().clone() for n, p in one.tuned.named_parameters()}
    one.learn(0)
    assert all(not torch.equal(p, start[n]) for n, p in one.tuned.named_parameters())
    x = torch.stack([x for x, _ in stream.tasks[0].train])
    place, lateral = one.lateral["0.weight"]
    assert lateral.H.shape == (4, 8)
    left = lateral.off(x)
    assert left.norm() < 1e-3 * x.norm()
    before = one.logits(x, None), {n: p.detach().clone() for n, p in one.tuned.named_parameters()}
    one.learn(1)
    W = dict(one.tuned.named_parameters())
    assert not torch.equal(W["0.weight"], before[1]["0.weight"])
    assert torch.equal(W["0.bias"], before[1]["0.bias"])
    moved = (W["0.weight"] - before[1]["0.weight"]).detach()
    assert (x @ moved.T).norm() < 1e-3 * moved.norm() * x.norm()
    assert (one.logits(x, None) - before[0]).abs().max() < 0.05      # the hidden layer has 32 of 64
    assert lateral.H.shape == (8, 8) and lateral.settled == 4
    found = one.stored()
    assert found.samples == 0 and found.parameters == 8 * 64 + 64 + 4 * 64 + 4 + 64 + 64 * 64


class Watched(Hlop):
    """Writes down what it is trained on, and what the first layer hears afterwards."""

    def begin(self, study):
        super().begin(study)
        self.steps, self.heard, self.hearing = [], [], False
        self.tuned.model[0].register_forward_pre_hook(self.write)

    def write(self, layer, args):
        if self.hearing:
            assert not any(m.training for m in self.tuned.model.modules())
            self.heard.append(args[0].clone())

    def loss(self, z, given, t):
        self.steps.append((given.inputs, given.labels, self.allowed(given, t)))
        return super().loss(z, given, t)

    def _hear(self, rows, t):
        self.hearing = True
        super()._hear(rows, t)
        self.hearing = False


def wide(stream, *more):
    """The same in float64, with what more a network has behind its first layer."""
    def network():
        first, *rest = stream.model()
        return nn.Sequential(first, *more, *rest).double()

    return dataclasses.replace(stream, model=network,
                               collate=lambda rows: torch.stack(rows).double())


def test_training_of_a_second_task_is_the_equation():
    """Update for update, with neurons that are no basis yet: W + dW - dW H^T H."""
    stream, one = wide(apart()), Watched(neurons=0.5, passes=2)
    one.begin(Study(stream, parse("full"), stream.training, 0))
    one.learn(0)
    assert one.last == {}                            # no copy of the model outlives a task
    net = stream.model()
    net.load_state_dict(dict(one.tuned.named_parameters()))
    H = {n: lateral.H.clone() for n, (_, lateral) in one.lateral.items()}
    assert set(H) == {"0.weight", "2.weight"}
    assert all((h @ h.T - torch.eye(len(h))).abs().max() > 0.05 for h in H.values())
    one.steps.clear()
    one.learn(1)
    rate = stream.training.rate
    rule = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0)
    for i, (x, y, allowed) in enumerate(one.steps):
        rule.param_groups[0]["lr"] = rate * (1 - i / len(one.steps))
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        rule.zero_grad()
        F.cross_entropy(net(x).masked_fill(~allowed, -torch.inf), y).backward()
        rule.step()
        with torch.no_grad():
            for n, p in net.named_parameters():
                dW = p - before[n]
                p.copy_(before[n] + dW - dW @ H[n].T @ H[n] if n in H else before[n])
    for n, p in one.tuned.named_parameters():
        torch.testing.assert_close(p, dict(net.named_parameters())[n], rtol=1e-6, atol=1e-8)


def test_neurons_hear_each_row_in_every_pass_and_in_orders_that_differ():
    """What the model is given in evaluation, each task anew; afterwards they hear nothing."""
    stream = wide(apart(), nn.Dropout(0.5))
    orders = []
    for seed in (0, 1):
        one = Watched(neurons=0.25, passes=3, rate=0.3)
        one.begin(Study(stream, parse("full"), stream.training, seed))
        draw = torch.Generator().manual_seed(seed)
        want = {n: Lateral(place.inp, torch.zeros(1).double())
                for n, (place, _) in one.lateral.items()}
        for t in range(2):
            one.heard.clear()
            one.learn(t)
            for lateral in want.values():
                lateral.grow(lateral.H.shape[1] // 4, draw)
            rows = torch.stack([x for x, _ in stream.tasks[t].train]).double()
            passes = torch.cat(one.heard).split(len(rows))
            assert len(passes) == 3
            for heard in passes:
                assert torch.equal(heard.unique(dim=0), rows.unique(dim=0))
            orders += passes if t == 0 else ()
            for x in one.heard:
                want["0.weight"].learn(x, 0.3)
            torch.testing.assert_close(one.lateral["0.weight"][1].H, want["0.weight"].H)
            one.logits(rows, None)
            torch.testing.assert_close(one.lateral["0.weight"][1].H, want["0.weight"].H)
    assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


class Pooled(nn.Module):
    """A layer over places, and one over the mean of those that count."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, attention_mask):
        counts = attention_mask.unsqueeze(-1)
        return self.head((torch.tanh(self.each(x)) * counts).sum(1) / counts.sum(1))


def test_what_a_mask_hides_changes_nothing():
    """Two streams that are one but for what lies under the padding."""
    plain, found = apart(), []
    for filling in (0.0, 50.0):
        def collate(rows, filling=filling):
            x = torch.stack(rows)
            mask = torch.tensor([1, 0]).expand(len(rows), 2)
            return {"x": torch.stack([x, torch.full_like(x, filling)], 1), "attention_mask": mask}

        def network():
            torch.manual_seed(0)
            return Pooled()

        stream = dataclasses.replace(plain, model=network, collate=collate,
                                     training=Training(epochs=1, batch=8))
        one = Hlop(neurons=0.5)
        one.begin(Study(stream, parse("full"), stream.training, 0))
        one.learn(0)
        found.append(one.lateral["each.weight"][1].H)
    assert found[0].norm() > 0.5
    torch.testing.assert_close(*found)


def test_a_model_that_is_one_layer():
    stream = dataclasses.replace(apart(), model=lambda: nn.Linear(8, 4), head=False)
    one = Hlop(neurons=0.5, passes=1)
    one.begin(Study(stream, parse("full"), stream.training, 0))
    one.learn(0)
    assert set(one.lateral) == {"weight"} and one.lateral["weight"][1].H.shape == (4, 8)


def opposed(seed=0):
    """The second task's rows carry the first one's cue turned round, beside one of their own."""
    g = torch.Generator().manual_seed(seed)

    def rows(first, second):
        made = []
        for i in range(48):
            y = i % 2
            x = torch.zeros(8)
            x[:2], x[4:6] = first * (2 * y - 1), second * (2 * y - 1)
            made.append((x + 0.3 * torch.randn(8, generator=g) * (torch.arange(8) % 4 < 3), y))
            if not second:
                made[-1][0][4:] = 0
        return made[::2] + made[1::4], made[1::2]

    def network():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))

    return Stream("opposed", "opposed", "domain", by_domain({"a": rows(1.0, 0.0),
                                                             "b": rows(-1.0, 1.0)}),
                  network, torch.stack, training=Training(epochs=12, batch=8, rate=1e-2))


def test_it_forgets_less_than_nothing_against_it():
    kept = run(opposed(), "full", "hlop(neurons=0.4, passes=100)").matrix
    plain = run(opposed(), "full", "sequential").matrix
    assert plain.forgetting > 0.4 and kept.forgetting < 0.1, (plain.rows, kept.rows)
    assert kept.rows[1][1] > 0.8


def test_runs_repeat_and_tasks_compete_as_asked():
    stream = plane()
    a, b = (run(stream, "full", "hlop(compete='current')").matrix for _ in range(2))
    assert a.figures() == b.figures()
    assert a.figures() != run(stream, "full", "hlop").matrix.figures()


def test_defaults_and_bounds():
    one = Hlop()
    assert (one.neurons, one.rate, one.passes, one.compete) == (0.1, 0.5, 5, "seen")
    assert not one.current and Hlop(compete="current").current
    assert Hlop(neurons=1.0, rate=1.0, passes=1)


def test_a_task_has_one_neuron_of_a_layer_at_least():
    stream, one = apart(), Hlop(neurons=0.01, passes=1)
    one.begin(Study(stream, parse("full"), stream.training, 0))
    one.learn(0)
    assert {lateral.H.shape[0] for _, lateral in one.lateral.values()} == {1}


@pytest.mark.parametrize("shape", [(4, 3), (3,)])
def test_padding_teaches_nothing(shape):
    """Of what a mask is of, the rows that count; what it is not of counts whole."""
    stream, one = apart(), Hlop()
    one.begin(Study(stream, parse("full"), stream.training, 0))
    for _, lateral in one.lateral.values():
        lateral.grow(2, one.draw)
    _, lateral = one.lateral["0.weight"]
    want = copy.deepcopy(lateral)
    x, mask = torch.randn(4, 3, 8), torch.ones(shape).long()
    mask[..., 2] = 0
    with one._listening(mask), torch.no_grad():
        one.tuned.model(x)
    want.learn(x[mask.bool()] if len(shape) == 2 else x.reshape(-1, 8), one.rate)
    torch.testing.assert_close(lateral.H, want.H)


def test_what_cannot_be_projected_is_refused():
    for recipe in ("lora(rank=2)", "linear_probe", "bitfit",
                   "full(targets='0') + lora(rank=2, targets='2')"):
        with pytest.raises(RecipeError, match="linear weights that train whole"):
            run(plane(), recipe, "hlop")
    with pytest.raises(RecipeError, match="o_lora has its own way through tasks, and so has hlop"):
        run(plane(), "o_lora", "hlop")
    with pytest.raises(RecipeError, match="mpt asks each row for its task"):
        run(plane(), "mpt(tasks=3)", "hlop")
    for bad in ("neurons=0.0", "neurons=2.0", "rate=0.0", "rate=1.5", "passes=0", "compete='all'"):
        with pytest.raises(ConfigError, match="neurons and rate above 0|one of 'seen'"):
            run(plane(), "full", f"hlop({bad})")
