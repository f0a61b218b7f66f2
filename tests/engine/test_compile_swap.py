"""Adapters exchanged under a compiled model: none of one shape is compiled twice."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.testing import stir
from burnish.testing.models import tiny


class Compiled:
    """A model compiled whole, and how many graphs that has taken so far."""

    def __init__(self, recipe, model="llama", names="abc", other=None):
        torch._dynamo.reset()
        self.net, self.batch = tiny(model)
        self.tuned = burnish.tune(self.net.eval(), recipe, head=False, name=names[0])
        for i, name in enumerate(names[1:]):
            self.tuned.add(name, recipe.removeprefix("nf4 + "), seed=i + 1)
        for name, recipe in (other or {}).items():
            self.tuned.add(name, recipe)
        for i, name in enumerate(self.tuned.adapters):
            stir(self.tuned, i, 0.2, adapter=name)
        self.net.eval()
        self.graphs = 0
        self.fast = torch.compile(self.net, backend=self._backend, fullgraph=True)

    def _backend(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def answers(self):
        """The compiled model's answer, which is eager's."""
        with torch.no_grad():
            want, got = self.net(**self.batch).logits, self.fast(**self.batch).logits
        torch.testing.assert_close(got, want)
        return got

    def learns(self):
        """The gradients of what is active, which are eager's."""
        trained = list(self.tuned.parameters())
        want = torch.autograd.grad(self.net(**self.batch).loss, trained)
        got = torch.autograd.grad(self.fast(**self.batch).loss, trained)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recipe, model", [
    ("lora(rank=2)", "llama"), ("nf4 + lora(rank=2)", "llama"),
    *(pytest.param(r, m, marks=pytest.mark.slow) for r, m in (
        ("dora(rank=2)", "llama"), ("lora(rank=2, targets='q,v')", "vit"),
        ("houlsby(width=4)", "bert"), ("ia3", "llama")))])
def test_adapters_of_one_shape_share_a_graph(recipe, model):
    on = Compiled(recipe, model)
    first = on.answers()
    assert on.graphs == 1
    seen = [first]
    for name in "bcab":
        on.tuned.use(name)
        seen.append(on.answers())
    assert on.graphs == 1
    torch.testing.assert_close(seen[3], first)
    assert not torch.allclose(seen[1], first) and not torch.allclose(seen[1], seen[2])


def test_one_that_is_joined_later_needs_no_graph_of_its_own():
    on = Compiled("lora(rank=2)", names="ab")
    before = on.answers()
    on.tuned.add("late", "lora(rank=2)")
    stir(on.tuned, 7, 0.2, adapter="late")
    on.net.eval()
    on.tuned.use("late")
    assert not torch.allclose(on.answers(), before)
    on.tuned.use("a")
    on.tuned.adapters.remove("late")
    torch.testing.assert_close(on.answers(), before)
    assert on.graphs == 1


@pytest.mark.parametrize("recipe", ["lora(rank=2)", pytest.param(
    "lora(rank=2) + checkpoint", marks=pytest.mark.slow)])
def test_each_trains_by_the_same_graph(recipe):
    on = Compiled(recipe, names="ab")
    on.learns()
    graphs = on.graphs
    for name in "ba":
        on.tuned.use(name)
        on.learns()
    assert on.graphs == graphs


@pytest.mark.parametrize("other", ["lora(rank=5)", "lora(rank=2, targets='q,v')", "dora(rank=2)"])
def test_others_are_compiled_once_and_right(other):
    on = Compiled("lora(rank=2)", names="ab", other={"c": other})
    on.answers()
    on.tuned.use("c")
    on.answers()
    graphs = on.graphs
    assert graphs <= 2
    for name in "abcacb":
        on.tuned.use(name)
        on.answers()
    assert on.graphs == graphs


def test_mixtures_and_a_model_that_was_merged_meanwhile():
    on = Compiled("lora(rank=2)", names="ab")
    one = on.answers()
    on.tuned.use({"a": 0.7, "b": 0.3})
    assert not torch.allclose(on.answers(), one)
    on.tuned.use("b")
    other = on.answers()
    on.tuned.merge()
    torch.testing.assert_close(on.answers(), other)
    on.tuned.unmerge()
    torch.testing.assert_close(on.answers(), other)
    on.tuned.use("a")
    torch.testing.assert_close(on.answers(), one)


@pytest.mark.slow
def test_with_inductor():
    on = Compiled("lora(rank=2)", names="ab")
    on.fast = torch.compile(on.net, backend="inductor", fullgraph=True)
    on.answers()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in "ba":
        on.tuned.use(name)
        on.answers()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
