"""Runs in stages, and one adapter that trains beside others."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError, DataError
from burnish.core.stage import Stage
from burnish.testing.models import tiny


def two(head=False):
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2)", head=False, name="old")
    for _ in range(2):
        tuned.step(batch)
    tuned.add("new", "lora(rank=3)", seed=1, head=head)
    return net, batch, tuned


def test_only_the_named_one_trains_and_all_answer():
    net, batch, tuned = two()
    tuned.use({"old": 0.5, "new": 1.0}, train="new")
    assert tuned.training == "new" and all(".new." in n for n, _ in tuned.named_parameters())
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".new." in n for n in moved)
    net.eval()
    mixed = net(**batch).logits
    tuned.use({"old": 0.5, "new": 1.0})
    assert tuned.training is None and not list(tuned.parameters())
    assert torch.equal(net(**batch).logits, mixed)
    tuned.use("new")
    assert tuned.training == "new"


@pytest.mark.parametrize("which, train, words", [
    ({"old": 1.0, "new": 1.0}, "newer", "not among those used: old, new; did you mean 'new'"),
    ({"old": 1.0, "new": 0.5}, "new", "trains at weight 1, not 0.5"),
    ("old", "new", "not among those used: old"),
    (["old", "new"], "new", "not among those used"),
])
def test_what_cannot_train_is_refused(which, train, words):
    net, batch, tuned = two()
    with pytest.raises(ConfigError, match=words):
        tuned.use(which, train=train)
    assert tuned.training == "old" and dict(tuned.state.active) == {"old": 1.0}


def test_a_head_of_its_own_cannot_train_beside_others():
    net, batch, tuned = two(head=True)
    with pytest.raises(ConfigError, match="of the base, which the others"):
        tuned.use({"old": 1.0, "new": 1.0}, train="new")


def test_who_trains_is_in_the_file(tmp_path):
    net, batch, tuned = two()
    tuned.use({"old": 1.0, "new": 1.0}, train="new")
    tuned.save(tmp_path / "a")
    other, _ = tiny("bert")
    again = burnish.load(other, tmp_path / "a")
    assert again.training == "new" and dict(again.state.active) == {"old": 1.0, "new": 1.0}


def test_stages_end_and_say_what_is_missing():
    net, batch, tuned = two()
    done = []
    plan = [Stage("old", until=2, then=lambda t: done.append(t.training)),
            Stage("third", "lora(rank=1)", {"old": 1.0}, until=1,
                  then=lambda t: done.append(t.training))]
    steps = [(s.trains, n) for s, n, _ in tuned.run(plan, lambda s: [batch] * 9, lr=1e-3)]
    assert steps == [("old", 0), ("old", 1), ("third", 0)] and done == ["old", "third"]
    with pytest.raises(DataError, match="'old' ended after 1 updates of 5"):
        list(tuned.run([Stage("old", until=5)], lambda s: [batch]))
    with pytest.raises(ConfigError, match="'none' , which|'none', which is no adapter yet"):
        list(tuned.run([Stage("none")], lambda s: [batch]))
