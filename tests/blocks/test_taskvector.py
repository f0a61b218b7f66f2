"""Task vectors, arithmetic and soups against the flat, dense, obvious computation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.formats.safe import Tensors, save_file, save_stream
from burnish.methods.lifecycle._taskvector import TaskVector, combine, kth_largest, threshold
from burnish.methods.lifecycle.soup import (
    Mean,
    alpha_gradient,
    greedy,
    learned,
    mixture,
    uniform,
)
from burnish.methods.lifecycle.task_arithmetic import best_scale, task_arithmetic


def checkpoint(seed, dtype=torch.float32, near=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)}
    if near is None:
        return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    return {n: t + 0.01 * torch.randn(t.shape, generator=g).to(dtype) for n, t in near.items()}


def flat(tv):
    return torch.cat(list(tv.pieces()))


# -- order statistics -----------------------------------------------------------------------
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_kth_largest_is_exact(values, data):
    x = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    got = kth_largest(lambda: [x[:cut], x[cut:]], k)
    assert got == x.abs().sort(descending=True).values[k - 1].item()


def test_threshold_keeps_exactly_the_fraction():
    tv = TaskVector(checkpoint(0), checkpoint(1))
    for keep in (0.0, 0.01, 0.2, 0.5, 0.999, 1.0):
        kept = int((flat(tv).abs() >= tv.threshold(keep)).sum())
        assert kept == math.ceil(keep * tv.numel)
    ties = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert threshold(lambda: [ties], 5, 0.4) == 1.0          # >= keeps all that tie
    with pytest.raises(ConfigError, match="fraction"):
        tv.threshold(20)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_threshold_of_inf_or_nan(bad):
    with pytest.raises(ConfigError, match="inf or nan"):
        kth_largest(lambda: [torch.tensor([1.0, bad])], 1)
    with pytest.raises(ConfigError, match="entry 3 of a stream that has 2"):
        kth_largest(lambda: [torch.ones(2)], 3)


def test_moments_and_pieces_equal_the_flat_vector():
    base, tuned = checkpoint(0), checkpoint(1)
    tv = TaskVector(base, tuned)
    whole = torch.cat([(tuned[n].double() - base[n].double()).flatten() for n in base])
    assert tv.numel == whole.numel() and torch.equal(flat(tv), whole.float())
    assert torch.equal(torch.cat(list(tv.pieces(piece=5))), flat(tv))
    assert tv.std() == pytest.approx(whole.float().double().std(correction=0).item(), rel=1e-12)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation allocated."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, out.numel())
        return out


def test_no_more_than_a_piece_is_allocated():
    base = {f"w{i}": torch.zeros(1 << 16) for i in range(4)}
    tuned = {n: torch.rand_like(t) for n, t in base.items()}
    tv = TaskVector(base, tuned)
    with Largest() as seen:
        threshold(lambda: tv.pieces(1 << 12), tv.numel, 0.3)
        for _ in combine(base, [tv, tv], lambda taus, *_: taus.sum(0), piece=1 << 12):
            pass
    assert seen.entries == 1 << 16                           # one output tensor, nothing larger
    with Largest() as seen:
        threshold(lambda: tv.pieces(1 << 12), tv.numel, 0.3)
    assert seen.entries == 1 << 12


# -- what is merged -------------------------------------------------------------------------
def test_what_cannot_be_averaged_is_left_to_the_base():
    base = {**checkpoint(0), "head.weight": torch.zeros(3, 4), "ids": torch.arange(3),
            "bn.running_mean": torch.zeros(2), "only": torch.ones(1)}
    tuned = {**checkpoint(1), "head.weight": torch.ones(5, 4), "ids": torch.arange(3) + 1,
             "bn.running_mean": torch.ones(2), "new": torch.ones(1)}
    tv = TaskVector(base, tuned)
    assert set(tv.skipped) == {"head.weight", "ids", "bn.running_mean", "only", "new"}
    assert tv.skipped["head.weight"] == "[5, 4] beside [3, 4]"
    merged = dict(task_arithmetic(base, [tuned], 1.0))
    assert merged.keys() == base.keys()
    for n in ("head.weight", "ids", "bn.running_mean", "only"):
        assert torch.equal(merged[n], base[n])


def test_tied_tensors_are_subtracted_once():
    base, tuned = checkpoint(0), checkpoint(1)
    base["head.weight"], tuned["head.weight"] = base["embed.weight"], tuned["embed.weight"]
    tv = TaskVector(base, tuned)
    assert tv.tied == {"head.weight": "embed.weight"}
    assert tv.numel == sum(base[n].numel() for n in checkpoint(0))
    merged = dict(task_arithmetic(base, [tuned], 0.5))
    assert merged["head.weight"] is merged["embed.weight"]
    untied = {**tuned, "head.weight": tuned["head.weight"] + 1}
    assert TaskVector(base, untied).tied == {}


# -- task arithmetic ------------------------------------------------------------------------
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


def test_the_rule_sees_every_entry_once_and_in_place():
    base, tuned = checkpoint(0), checkpoint(1)
    seen = []

    def rule(taus, name, start):
        seen.append((name, start, taus.shape))
        return torch.zeros(taus.shape[1], dtype=taus.dtype)

    out = dict(combine(base, [TaskVector(base, tuned)] * 2, rule, piece=16))
    assert all(torch.equal(out[n], base[n]) for n in base)
    assert [s for n, s, _ in seen if n == "embed.weight"] == [0, 16, 32, 48, 64]
    assert seen[0][2] == (2, 16)


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


def test_equal_small_tensors_read_from_a_file_are_not_taken_for_tied(tmp_path):
    base = {f"b{i}": torch.full((4,), float(i)) for i in range(6)}
    save_file(base, tmp_path / "b.safetensors")
    save_file({n: torch.zeros(4) for n in base}, tmp_path / "t.safetensors")
    tv = TaskVector(Tensors(tmp_path / "b.safetensors"), Tensors(tmp_path / "t.safetensors"))
    assert tv.tied == {} and len(tv.names) == 6


# -- soups ----------------------------------------------------------------------------------
def test_running_sum_equals_the_direct_mean():
    models = [checkpoint(i) for i in range(7)]
    soup = uniform(models)
    for n in soup:
        want = torch.stack([m[n] for m in models]).double().mean(0)
        assert (soup[n] - want).abs().max() < 1e-6


def test_greedy_keeps_what_does_not_hurt():
    target = checkpoint(0)
    good = [{n: t + 0.1 * s for n, t in target.items()} for s in (1, -1)]
    bad = {n: t + 5 for n, t in target.items()}

    def score(m):
        return -sum(float((m[n] - target[n]).square().sum()) for n in target)

    models = [bad, *good]
    soup, chosen, best = greedy(models, score)
    assert sorted(chosen) == [1, 2] and best == score(soup)
    assert best >= max(score(m) for m in models)
    calls = []
    again, _, _ = greedy(models, lambda m: calls.append(1) or score(m),
                         scores=[score(m) for m in models])
    assert len(calls) == 2 and all(torch.equal(again[n], soup[n]) for n in soup)


def test_equals_count_as_no_worse():
    models = [checkpoint(i) for i in range(3)]
    _, chosen, _ = greedy(models, lambda m: 1.0)
    assert chosen == [0, 1, 2]


def test_soups_refuse_other_architectures_and_copy_integers():
    with pytest.raises(ConfigError, match=r"a.bias is \[3\] beside \[7\]"):
        uniform([checkpoint(0), {**checkpoint(1), "a.bias": torch.zeros(3)}])
    with pytest.raises(ConfigError, match="b.weight is not in all"):
        uniform([checkpoint(0), {n: t for n, t in checkpoint(1).items() if n != "b.weight"}])
    with pytest.raises(ConfigError, match="at least one"):
        uniform([])
    steps = [{"n": torch.tensor(4)}, {"n": torch.tensor(6)}]
    assert uniform(steps)["n"] == 4
    halves = uniform([{"w": torch.full((2,), 1.0).bfloat16()}, {"w": torch.zeros(2).bfloat16()}])
    assert halves["w"].dtype == torch.bfloat16 and (halves["w"] == 0.5).all()
    assert Mean().count == 0


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradient_of_the_weights_equals_autograd_through_the_mixture(per_layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    models = [{n: torch.randn_like(t) for n, t in net.state_dict().items()} for _ in range(3)]
    x, y = torch.randn(10, 5).double(), torch.randint(3, (10,))
    layer = (lambda n: n.partition(".")[0]) if per_layer else (lambda n: "")
    alpha = {k: torch.rand(3).softmax(0).double().requires_grad_() for k in {"", "0", "2"}}
    beta = torch.tensor(1.3, requires_grad=True)
    explicit = {n: sum(alpha[layer(n)][i] * m[n] for i, m in enumerate(models)) for n in models[0]}
    value = nn.functional.cross_entropy(beta * torch.func.functional_call(net, explicit, (x,)), y)
    value.backward()
    da, db = alpha_gradient(net, models, lambda n: alpha[layer(n)].detach(), x, y,
                            nn.functional.cross_entropy, 1.3, layer)
    assert da.keys() == ({"0", "2"} if per_layer else {""})
    for k, g in da.items():
        assert torch.allclose(g.double(), alpha[k].grad, rtol=1e-5, atol=1e-7)
    assert db.item() == pytest.approx(beta.grad.item(), rel=1e-5)


def test_learned_weights_find_the_good_model():
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    truth = {n: t.clone() for n, t in net.state_dict().items()}
    models = [{n: torch.randn_like(t) for n, t in truth.items()},
              {n: 3 * t for n, t in truth.items()},
              {n: torch.randn_like(t) for n, t in truth.items()}]
    x = torch.randn(256, 4)
    y = (x @ truth["weight"].T + truth["bias"]).argmax(1)
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
    soup, alpha, beta = learned(net, models, batches, epochs=12)
    assert alpha[""].argmax() == 1 and alpha[""].sum() == pytest.approx(1) and beta > 0

    def accuracy(m):
        return float(((x @ m["weight"].T + m["bias"]).argmax(1) == y).float().mean())

    assert accuracy(soup) > accuracy(uniform(models))
    mixed = mixture(models, lambda n: alpha[""])
    assert all(torch.equal(mixed[n], soup[n]) for n in soup)


def test_the_methods_answer_lifecycle_alone():
    (arithmetic,), (soup,) = parse("task_arithmetic(scale=1.0)"), parse("soup")
    assert arithmetic.axes() == soup.axes() == ("lifecycle",)
    base, tuned = checkpoint(0), checkpoint(1)
    merged = arithmetic.lifecycle(base, tuned)
    assert all(torch.equal(merged[n], tuned[n]) for n in base)
    with pytest.raises(ConfigError, match="needs score="):
        soup.lifecycle(base, tuned)
    (plain,) = parse("soup(kind='uniform')")
    assert torch.equal(plain.lifecycle(base, tuned)["a.bias"], uniform([base, tuned])["a.bias"])
