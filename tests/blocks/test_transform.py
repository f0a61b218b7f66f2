"""Gradient transforms: chained in written order, saved with the optimizer, refused where there is
no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.rules import SGD
from burnish.blocks.update.step import InBackward, Subspace, compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.blocks.update.transform import Transform
from burnish.blocks.update.zeroth import ZerothOrder
from burnish.core.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Times(Transform):
    by: float = 2.0
    name: str = "times"

    def apply(self, G, seen):
        return G * self.by


@dataclass(frozen=True, kw_only=True)
class Slow(Transform):
    """G + gamma a with a <- mu a + (1 - mu) G."""

    states: ClassVar[tuple[str, ...]] = ("slow",)
    name: str = "slow"

    def apply(self, G, seen):
        a = seen.state.setdefault("slow", torch.zeros_like(G))
        a.mul_(0.5).add_(G, alpha=0.5)
        return G + 2.0 * a


def run(answers, grads, p=None, opt=None):
    p = nn.Parameter(torch.zeros(4, 6)) if p is None else p
    opt = compose(answers, [("layers.0.w", p)], 0.1) if opt is None else opt
    for g in grads:
        p.grad = g.clone()
        opt.step()
    return p, opt


GRADS = [torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def test_they_chain_in_written_order():
    p, _ = run([Times(), Slow(), SGD()], GRADS)
    a, w = torch.zeros(4, 6), torch.zeros(4, 6)
    for g in GRADS:
        a = 0.5 * a + 0.5 * (2 * g)
        w = w - 0.1 * (2 * g + 2 * a)
    torch.testing.assert_close(p.detach(), w)
    q, _ = run([Slow(), Times(by=0.0), SGD()], GRADS)
    assert not q.any()


def test_a_subspace_sees_what_they_made():
    sub = Subspace(map=SubspaceMap(rank=2), where=lambda n, p: True)
    a, _ = run([Times(by=3.0), sub, SGD()], GRADS[:1])
    b, _ = run([sub, SGD()], [3.0 * GRADS[0]])
    torch.testing.assert_close(a, b)


def test_their_state_is_saved_by_name():
    whole, _ = run([Slow(), SGD()], GRADS)
    first, opt = run([Slow(), SGD()], GRADS[:2])
    second = nn.Parameter(first.detach().clone())
    again = compose([Slow(), SGD()], [("layers.0.w", second)], 0.1)
    tensors, rest = named_state(opt)
    assert "layers.0.w.slow" in tensors
    load_named_state(again, tensors, rest)
    run(None, GRADS[2:], second, again)
    assert torch.equal(whole, second)


def test_inside_backward_it_is_the_same_and_accumulation_is_refused():
    p = nn.Parameter(torch.zeros(4, 6))
    opt = compose([Slow(), InBackward(), SGD()], [("layers.0.w", p)], 0.1)
    for g in GRADS:
        (p * g).sum().backward()
        opt.step()
    assert torch.equal(p, run([Slow(), SGD()], GRADS)[0])
    with pytest.raises(RecipeError, match="step_in_backward and slow cannot be joined over 2"):
        compose([Slow(), InBackward(), SGD()], [("w", p)], 0.1, accumulation=2)


def test_a_step_of_evaluations_refuses_them():
    with pytest.raises(RecipeError, match="mezo and times cannot be joined.*could be changed"):
        compose([ZerothOrder(), Times()], [("w", nn.Parameter(torch.zeros(2)))], 0.1)
