"""What a simulation leaves out of a step changes nothing that a report says."""

from __future__ import annotations

import contextlib
import math
from importlib import import_module

import pytest
import torch
from torch import nn

import burnish
from burnish.memory import measure, simulate
from burnish.memory.simulate import SimulationError

module = import_module("burnish.memory.simulate")


@pytest.mark.parametrize("recipe", ["snella(rank=4)", "snell(rank=4)", "dora(rank=2)",
                                    "full + adam8bit", "full + galore(rank=4)",
                                    "full + galore(rank=4) + adam8bit",
                                    "full + mezo", "full + mezo(mode='in_place')",
                                    "full + zo(rule='adam')", "full + mezo_svrg"])
def test_panels_and_strips_that_are_not_run_cost_what_the_second_did(recipe, monkeypatch):
    """Many panels of which the last is narrower: the same peak, bytes and time."""
    monkeypatch.setattr("burnish.blocks.update.composed.strip", lambda device: 64)
    monkeypatch.setattr("burnish.blocks.update.scratch.strip", lambda device: 64)
    monkeypatch.setattr("burnish.blocks.weight.panels.PANEL", 3 * 24)
    monkeypatch.setattr("burnish.blocks.weight.tiled.PANEL", 3 * 24)
    model = nn.Sequential(nn.Linear(35, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 2))

    def report():
        return simulate(model, recipe, {"input": torch.zeros(5, 35)}, count=True, whole=True,
                        loss=lambda out, _: out.sum())

    quick = report()
    for name in ("quick_runs", "quick_distances"):
        monkeypatch.setattr(module, name, lambda ledger: contextlib.nullcontext())
    slow = report()
    assert quick.peak_bytes == slow.peak_bytes
    assert quick.by_category == slow.by_category and quick.by_module == slow.by_module
    for figure in ("flops", "traffic", "seconds"):
        for phase, value in getattr(slow, figure).items():
            assert math.isclose(getattr(quick, figure)[phase], value, rel_tol=1e-9), figure


def test_a_remembered_answer_is_the_tensor_that_the_mode_would_make():
    """The quick way to a fake tensor leaves out none of what its constructor says."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from burnish.memory.remembered import _faked

    mode, device = FakeTensorMode(), torch.device("cpu")
    bare = torch.empty(3, 4, device="meta")
    slow = FakeTensor(mode, bare, device)
    for _ in range(2):                        # the second time by the quick way
        quick = _faked(mode, bare, device)
        assert type(quick) is FakeTensor and quick.__dict__ == slow.__dict__
        assert quick.device == device and quick.untyped_storage()._cdata == \
            bare.untyped_storage()._cdata
        assert torch._C._dispatch_keys(quick) == torch._C._dispatch_keys(slow)
        assert not quick.requires_grad and quick.fake_mode is mode


def test_chunks_of_a_loss_that_are_not_run_cost_what_the_second_did(monkeypatch):
    """Eleven chunks of rows, of which the last has fewer: the same peak, bytes and time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=32, vocab_size=96)
    model = LlamaForCausalLM(config)

    def report(recipe):
        return simulate(model, recipe, (3, 14), count=True, whole=True)

    for recipe in ("lora(rank=2) + chunked_loss(chunk=4)", "full + chunked_loss(chunk=4)"):
        with monkeypatch.context() as undo:
            quick = report(recipe)
            undo.setattr(module, "quick_runs", lambda ledger: contextlib.nullcontext())
            slow = report(recipe)
        assert quick.phases[-1][1] < slow.phases[-1][1]
        assert quick.peak_bytes == slow.peak_bytes
        assert quick.by_category == slow.by_category and quick.by_module == slow.by_module
        for figure in ("flops", "traffic", "seconds"):
            for phase, value in getattr(slow, figure).items():
                assert math.isclose(getattr(quick, figure)[phase], value, rel_tol=1e-9), figure


class Asks(nn.Module):
    """Branches on whether its states are numbers, of more than are followed one by one."""

    def __init__(self, wrong=None):
        super().__init__()
        self.a, self.b, self.wrong = nn.Linear(256, 256), nn.Linear(256, 256), wrong

    def forward(self, x):
        h = self.a(x)
        seen = torch.ones(*x.shape[:2], 256, device=x.device)
        asked = (not torch.isfinite(h).all(), torch.isnan(h).any(), (h != h).any(),
                 torch.isinf(h).any(), (h.abs() == math.inf).any(),
                 not (seen.clone().bool() & torch.isfinite(h)).all())
        if any(asked) or self.wrong:
            h = h.exp() * h
        return self.b(h)


def test_a_step_is_promised_whose_numbers_are_finite():
    x = torch.randn(4, 300, 256)
    batch = (x, x.clone())
    promised = [simulate(Asks(wrong), "full", batch, loss=lambda out, b: out.sum()).peak_bytes
                for wrong in (False, True)]
    tuned = burnish.tune(Asks(), "full", head=False)
    truth = measure(tuned, batch, loss=lambda out, b: out.sum()).peak_bytes
    assert promised[0] == truth < promised[1]


def test_one_number_all_over_is_known_until_it_is_written_into():
    """What is written in place is nobody's business any more, and views of it with it."""
    class Masked(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.a, self.cut = nn.Linear(8, 8), cut

        def forward(self, x):
            seen = torch.isfinite(self.a(x))
            part = seen[:, :2]
            if self.cut:
                seen[:, 0] = False
            return self.a(x) if part.all() else self.a(x).exp()

    x = torch.randn(4, 8)
    whole = simulate(Masked(False), "full", (x, x.clone()), loss=lambda out, b: out.sum())
    tuned = burnish.tune(Masked(False), "full", head=False)
    assert whole.peak_bytes == measure(tuned, (x, x.clone()),
                                       loss=lambda out, b: out.sum()).peak_bytes
    with pytest.raises(SimulationError, match="values that only a real step has"):
        simulate(Masked(True), "full", (x, x.clone()), loss=lambda out, b: out.sum())
