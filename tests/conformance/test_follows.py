"""A tuned model held against an equation: what is wrong is found, whichever half it is in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.testing import follows, stir


@pytest.fixture
def lora():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, "lora(rank=2, alpha=4)", head=False, targets="0")
    ((_, term),) = tuned.terms(Chain)
    term.double()
    return stir(tuned, size=1.0), term, W, b


def test_the_equation_is_followed_and_the_model_left_as_it_was(lora):
    tuned, term, W, b = lora
    x = torch.randn(4, 6, dtype=torch.float64)
    before = tuned.model(x)
    for _ in range(2):
        follows(tuned, lambda x, A, B: F.linear(x, W + 2 * B @ A, b), [term.A, term.B], x)
    assert torch.equal(tuned.model(x), before) and term.A.grad is None


@pytest.mark.parametrize(("equation", "why"), [
    (lambda x, A, B, W, b: F.linear(x, W + 2.001 * B @ A, b), "not close"),
    (lambda x, A, B, W, b: F.linear(2 * x - x.detach(), W + 2 * B @ A, b), "gradient of the input"),
    (lambda x, A, B, W, b: F.linear(x, W + 2 * B @ (2 * A - A.detach()), b), "gradient of letter"),
    (lambda x, A, B, W, b: F.linear(x, W + 2 * B.detach() @ A + 0 * B.sum(), b),
     "does not depend on letter 1"),
])
def test_what_differs_is_said(lora, equation, why):
    tuned, term, W, b = lora
    with pytest.raises(AssertionError, match=why):
        follows(tuned, lambda x, A, B: equation(x, A, B, W, b), [term.A, term.B], (4, 6))


def test_a_tensor_that_trains_is_a_letter(lora):
    tuned, term, W, b = lora
    with pytest.raises(AssertionError, match="1 tensors train that are no letter"):
        follows(tuned, lambda x, A: F.linear(x, W + 2 * term.B @ A, b), [term.A], (4, 6))


def test_a_merge_that_is_another_function_is_found(lora, monkeypatch):
    tuned, term, W, b = lora

    def equation(x, A, B):
        return F.linear(x, W + 2 * B @ A, b)

    monkeypatch.setattr(tuned, "merge", lambda: lambda x: F.linear(x, W, b))
    with pytest.raises(AssertionError, match="not close"):
        follows(tuned, equation, [term.A, term.B], (4, 6))
    follows(tuned, equation, [term.A, term.B], (4, 6), merged=False)
