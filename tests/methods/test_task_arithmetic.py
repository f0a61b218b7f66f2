"""Task arithmetic against the equation, in fp64 and bit for bit."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight.taskvector import TaskVector, combine
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.formats.safe import Tensors, save_file, save_stream
from burnish.methods.lifecycle.task_arithmetic import best_scale, task_arithmetic


def checkpoint(seed, dtype=torch.float32, near=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)}
    if near is None:
        return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    return {n: t + 0.01 * torch.randn(t.shape, generator=g).to(dtype) for n, t in near.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_task_with_weight_one_is_that_model_bit_for_bit(dtype):
    base = checkpoint(0, dtype)
    for tuned in (checkpoint(1, dtype), checkpoint(2, dtype, near=base)):
        merged = dict(task_arithmetic(base, [tuned], 1.0))
        assert all(torch.equal(merged[n], tuned[n]) for n in base)
        nothing = dict(task_arithmetic(base, [tuned], 0.0))
        assert all(torch.equal(nothing[n], base[n]) for n in base)


def test_a_task_and_its_opposite_cancel():
    base, tuned = checkpoint(0), checkpoint(1)
    merged = dict(task_arithmetic(base, [tuned, tuned], [0.7, -0.7]))
    assert all(torch.equal(merged[n], base[n]) for n in base)


def test_sums_equal_the_equation_in_any_order():
    base = checkpoint(0)
    tasks = [checkpoint(i, near=base) for i in (1, 2, 3)]
    weights = [0.3, 0.5, -0.2]
    merged = dict(task_arithmetic(base, tasks, weights))
    turned = dict(task_arithmetic(base, tasks[::-1], weights[::-1]))
    for n in base:
        want = base[n].double() + sum(w * (t[n].double() - base[n].double())
                                      for w, t in zip(weights, tasks, strict=True))
        assert torch.equal(merged[n], want.float())
        assert torch.allclose(merged[n], turned[n], rtol=1e-6, atol=0)


def test_bf16_checkpoints_are_not_subtracted_in_bf16():
    base = {"w": torch.full((4,), 1.0).bfloat16()}
    tasks = [{"w": torch.full((4,), 1.0078125).bfloat16()}] * 3
    assert (dict(task_arithmetic(base, tasks, 1 / 3))["w"] == 1.0078125).all()


def test_the_scale_is_chosen_on_held_out_data():
    base = {"w": torch.zeros(3)}
    tuned = [{"w": torch.ones(3)}]
    scale, scores = best_scale(base, tuned, lambda m: -float((m["w"] - 0.35).abs().sum()))
    assert scale == 0.35 and len(scores) == 21
    assert best_scale(base, tuned, lambda m: 1.0)[0] == 0.0
    with pytest.raises(ConfigError, match="2 weights"):
        dict(task_arithmetic(base, tuned, [1.0, 2.0]))


def test_from_file_to_file_one_tensor_at_a_time(tmp_path):
    base = {**checkpoint(0), "n": torch.arange(3), "e": torch.empty(0, 2)}
    tasks = [checkpoint(i, near=checkpoint(0)) for i in (1, 2)]
    save_file(base, tmp_path / "base.safetensors")
    for i, t in enumerate(tasks):
        save_file({**t, "n": base["n"], "e": base["e"]}, tmp_path / f"{i}.safetensors")
    lazy = Tensors(tmp_path / "base.safetensors")
    parts = task_arithmetic(lazy, [Tensors(tmp_path / f"{i}.safetensors") for i in (0, 1)], 0.5)
    save_stream(parts, lazy, tmp_path / "merged.safetensors")
    back = Tensors(tmp_path / "merged.safetensors")
    want = dict(task_arithmetic(base, tasks, 0.5))
    assert set(back) == set(base) and all(torch.equal(back[n], want[n]) for n in want)


def test_the_method_answers_lifecycle_alone():
    (method,) = parse("task_arithmetic(scale=1.0)")
    assert method.axes() == ("lifecycle",) and parse("task_arithmetic")[0].scale == 0.4
    base, tuned = checkpoint(0), checkpoint(1)
    merged = method.lifecycle(base, tuned)
    assert all(torch.equal(merged[n], tuned[n]) for n in base)
    forty = dict(task_arithmetic(base, [tuned]))
    for n in base:
        want = base[n].double() + 0.4 * (tuned[n].double() - base[n].double())
        assert torch.equal(forty[n], want.float())
    tasks = [TaskVector(base, tuned), TaskVector(base, checkpoint(2))]
    summed = dict(combine(base, tasks, parse("task_arithmetic(scale=0.3)")[0].rule(tasks)))
    want = dict(task_arithmetic(base, [tuned, checkpoint(2)], 0.3))
    for n in base:                                       # as a rule among others
        torch.testing.assert_close(summed[n], want[n])
    with pytest.raises(ConfigError, match="at least one tuned"):
        method.lifecycle(base)


def test_equal_scores_take_the_smallest_scale_and_every_score_is_told():
    base, tuned = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}]
    scale, scores = best_scale(base, tuned, lambda m: float(m["w"][0] > 0.2), grid=(0.1, 0.5, 0.3))
    assert scale == 0.3 and scores == {0.1: 0.0, 0.5: 1.0, 0.3: 1.0}
    assert sorted(best_scale(base, tuned, lambda m: 0.0)[1]) == [k / 20 for k in range(21)]
