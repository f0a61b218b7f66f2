"""What a simulation says of one of several processes, beside what arithmetic says."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import burnish
from burnish.memory import simulate
from burnish.testing.models import tiny

from .blocks import D, Net


def matrices(model):
    return sum(p.nbytes for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("world", [2, 8])
def test_a_process_holds_its_share_of_the_base_and_all_of_what_is_added(world):
    """In a forward alone the base's shares, the first block gathered and what stands outside the
    blocks; without gradients nothing else is weights."""
    model, batch = tiny("llama")
    one = simulate(model, "lora(rank=2)", batch)
    each = simulate(model, "lora(rank=2)", batch, world_size=world, shard="fsdp2")
    block = matrices(model.model.layers[0])
    outside = matrices(model) - 2 * block
    # every matrix of this model divides by 8, so that no row is padded
    shares = matrices(model) // world
    less = matrices(model) - shares
    held = one.by_category["weights"] - less
    assert each.by_category["weights"] - held in (outside + block, outside + 2 * block)
    assert (each.trainable, each.adapter_bytes) == (one.trainable, one.adapter_bytes)
    assert (each.world_size, each.shard) == (world, "fsdp2")


def test_moments_of_matrices_that_train_are_shares():
    model, batch = tiny("llama")
    one = simulate(model, "full", batch).by_category["optimizer"]
    each = simulate(model, "full", batch, world_size=4, shard="fsdp2").by_category["optimizer"]
    assert one - each == 2 * matrices(model) * 3 // 4


def test_data_parallel_adds_a_bucket_for_each_gradient():
    model, batch = tiny("llama")
    one = simulate(model, "full", batch, whole=True)
    each = simulate(model, "full", batch, world_size=2)
    grads = sum(p.nbytes for p in model.parameters())
    notes = 2 * 4 * len(list(model.parameters()))          # the reducer's own integers
    assert each.shard == "ddp"
    assert each.peak_bytes - one.peak_bytes == grads + notes


def test_a_tensor_that_the_batch_does_not_reach_waits_for_nobody():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(D, D)

    batch = dict(x=torch.randn(4, 8, D), labels=torch.zeros(4, dtype=torch.long))
    for shard in ("ddp", "fsdp2"):
        report = simulate(Idle(), "full", batch, world_size=2, shard=shard)
        assert any("idle" in note for note in report.notes)


def test_shares_on_the_host_are_not_on_the_device():
    model, batch = tiny("llama")
    how = dict(device="cuda", world_size=4, shard="fsdp2")
    on = simulate(model, "full", batch, **how)
    off = simulate(model, "full", batch, shard_offload=True, **how)
    # shares, their gradients and both moments wait there; the device keeps vectors
    assert off.other_devices["cpu"] == 4 * matrices(model) // 4
    assert on.by_category["optimizer"] - off.by_category["optimizer"] >= 2 * matrices(model) // 4
    assert not on.other_devices


def test_a_forward_alone_gathers_too():
    model, batch = tiny("llama")
    one = simulate(model, "lora(rank=2)", batch, evaluate=True)
    each = simulate(model, "lora(rank=2)", batch, evaluate=True, world_size=8, shard="fsdp2")
    assert each.by_category["weights"] < one.by_category["weights"]


def test_what_is_told_says_of_how_many():
    model, batch = tiny("llama")
    report = simulate(model, "lora", batch, world_size=2, shard="fsdp2")
    assert "in each of 2 processes (fsdp2)" in str(report)
    assert burnish.MemoryReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("recipe, words", [
    ("nf4 + lora", "holds the frozen weights as codes"),
    ("full + step_in_backward", "before 3 processes have shared its gradient"),
    ("full + lion", "take adamw or sgd"), ("full + sam", "sam reads whole tensors")])
def test_what_cannot_be_sharded_is_refused_as_it_is_by_shard(recipe, words):
    model, batch = tiny("llama")
    with pytest.raises(burnish.BurnishError, match=words):
        simulate(model, recipe, batch, world_size=3, shard="fsdp2")


@pytest.mark.parametrize("words, how", [
    ("world_size=0: expected a number of processes", dict(world_size=0)),
    ("world_size=True", dict(world_size=True)), ("world_size=2.0", dict(world_size=2.0)),
    ("did you mean 'fsdp2'", dict(world_size=2, shard="fsdp")),
    ("there is one: give world_size=2", dict(shard="fsdp2")),
    ("there is one: give world_size=2", dict(shard="ddp")),
    ("give both", dict(world_size=2, shard_offload=True)),
    ("several, which would train different", dict(world_size=2, recipe="greentrainer")),
    ("before 2 processes", dict(world_size=2, recipe="full + step_in_backward")),
    ("is not simulated for shares", dict(world_size=2, shard="fsdp2", during="merge"))])
def test_what_cannot_act_is_refused(words, how):
    model, batch = tiny("llama")
    with pytest.raises(burnish.BurnishError, match=words):
        simulate(model, how.pop("recipe", "lora"), batch, **how)


def test_nothing_of_the_world_is_left_behind():
    model, batch = tiny("llama")
    hook, resize = sys.excepthook, torch.UntypedStorage.resize_
    for recipe in ("lora", "nf4 + lora"):                     # the second is refused
        for shard in ("fsdp2", "ddp"):
            try:
                simulate(model, recipe, batch, world_size=2, shard=shard)
            except burnish.RecipeError:
                assert recipe.startswith("nf4")
    assert not torch.distributed.is_initialized()
    assert sys.excepthook is hook and torch.UntypedStorage.resize_ is resize
    burnish.tune(model, "lora").step(batch)


def test_real_processes_are_where_they_were(tmp_path):
    """A group that stands (one process will do) goes on, with its own names and sizes."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = tiny("llama")
        report = simulate(model, "lora", batch, world_size=4, shard="fsdp2")
        assert report.world_size == 4
        assert dist.get_world_size() == 1 and dist.get_backend() == "gloo"
        x = torch.ones(3)
        dist.all_reduce(x)
        dist.new_group([0])
        assert x.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
