"""A tape is told what a model asks for, and nothing of what our own functions do inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import burnish
from burnish.blocks.tape.functions import unwatched
from burnish.blocks.tape.saved import Policy, Tape


class Told(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "snella(rank=2, s=0.5)", "dora(rank=2)",
                                    "nf4 + lora(rank=2)", "vera(rank=4)", "shira(rank=2)"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tuned_linear_tells_the_tape_little(recipe, grad, monkeypatch):
    """However many shapes, dtypes and products it takes: a tape asked in Python for each of them
    costs more than the product where tokens are few."""
    told = []
    kept = Tape.__torch_function__

    def counting(self, func, *rest):
        told.append(func)
        return kept(self, func, *rest)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    burnish.tune(model, recipe, targets="0,1", head=False)
    monkeypatch.setattr(Tape, "__torch_function__", counting)
    with torch.set_grad_enabled(grad):
        model(torch.randn(3, 64))
    assert len(told) < 20


def test_a_mode_entered_before_or_after_the_tape_stays():
    below, above, x = Told(), Told(), torch.ones(2)
    tape = Tape()
    with below, tape.recording():
        with unwatched():
            x + 1
        assert below.names.count("add") == 1
        with above:
            with unwatched():
                x + 1
            assert above.names.count("add") == 1
        x * 2                                                # and the tape is there again
        assert torch._C._get_function_stack_at(1) is tape
    assert torch._C._len_torch_function_stack() == 0


def test_an_error_inside_puts_the_tape_back():
    tape = Tape()
    with tape.recording():
        with pytest.raises(ZeroDivisionError), unwatched():
            raise ZeroDivisionError
        assert torch._C._get_function_stack_at(0) is tape


class Warned(Policy):
    """Notes what is about to change."""

    moves = True

    def __init__(self):
        self.changed: list[torch.Tensor] = []

    def changing(self, tensors):
        self.changed += tensors


@pytest.mark.parametrize("write", [
    lambda x: x.add_(1), lambda x: torch.add(x, 1, out=x), lambda x: F.relu(x, inplace=True),
    lambda x: F.relu(x, True), lambda x: x.__setitem__(0, 0.0), lambda x: x.numpy(),
    lambda x: torch.relu_(x)])
def test_what_writes_is_seen_however_often_it_was_asked(write):
    """The quick way past the tape is for what changes nothing."""
    policy = Warned()
    tape = Tape(policy=policy)
    for turn in range(1, 4):
        x = torch.ones(3)
        with tape.recording():
            x.shape, x + 1, F.relu(x), torch.add(x, 1)
            write(x)
        assert len(policy.changed) == turn and policy.changed[-1] is x
