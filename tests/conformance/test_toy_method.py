"""A method of one's own takes one file: this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.blocks.weight.provided import Term
from burnish.core.method import Method, setting
from burnish.core.registry import register
from burnish.testing import conformance


class RowScale(Term):
    """``Delta = diag(a) W``: one number per output."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(weight.shape[-2]))
        self.register_buffer("W", weight.detach().clone(), persistent=False)

    def dense(self) -> Tensor:
        return self.a.unsqueeze(-1) * self.W


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Toy: every output of a weight gets a gain, ``W' = (1 + strength a) W``; starts at a = 0."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    strength: float = setting(1.0, "unused here")

    def delta(self, site):
        return RowScale(site.weight)

    def count(self, place):
        return place.out


register(Toy, "toy")


@pytest.mark.parametrize("model", ["vit", "gpt2", "convnext", "mha"])
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda c: c.__name__)
def test_toy_conforms(check, model):
    result = conformance.one(check, "toy", model)
    assert result.state != "fail", result.reason


def test_it_is_a_word_of_recipes():
    recipe = burnish.parse("toy(strength=0.5) + checkpoint")
    assert str(recipe) == "toy(strength=0.5) + checkpoint"
    assert Toy.axes() == ("delta",)
    assert "toy" in [e.name for e in burnish.methods()]
