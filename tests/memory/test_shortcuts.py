"""What a simulation leaves out of a step changes nothing that a report says."""

from __future__ import annotations

import contextlib
import math
from importlib import import_module

import pytest
import torch
from torch import nn

from burnish.memory import simulate

module = import_module("burnish.memory.simulate")


@pytest.mark.parametrize("recipe", ["snella(rank=4)", "snell(rank=4)", "dora(rank=2)",
                                    "full + adam8bit", "full + galore(rank=4)",
                                    "full + galore(rank=4) + adam8bit"])
def test_panels_and_strips_that_are_not_run_cost_what_the_second_did(recipe, monkeypatch):
    """Many panels of which the last is narrower: the same peak, bytes and time."""
    monkeypatch.setattr("burnish.blocks.update.composed.strip", lambda device: 64)
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
