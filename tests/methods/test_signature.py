"""Robust weight signatures against their equation, as a change before a rule and as a file."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.weight import taskvector
from burnish.blocks.weight.taskvector import TaskVector, merged
from burnish.core.errors import ConfigError, FormatError
from burnish.methods.lifecycle import signature
from burnish.methods.lifecycle.signature import Signature
from burnish.methods.lifecycle.task_arithmetic import TaskArithmetic

SHAPES = {"embed.weight": (40, 30), "blocks.0.w": (31, 40), "blocks.1.w": (31, 31),
          "blocks.10.w": (9, 31), "norm.weight": (31,), "head.weight": (3, 31)}


@pytest.fixture
def models():
    g = torch.Generator().manual_seed(0)
    clean = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return clean, [{n: 1.01 * t + 0.05 * torch.randn(t.shape, generator=g)
                    for n, t in clean.items()} for _ in range(2)]


def away(robust, clean):
    k, c = robust.double().flatten(), clean.double().flatten()
    return (k - (k @ c) / (c @ c) * c).view(clean.shape)


def stepped(R, bits):
    step = R.abs().max() / (2 ** (bits - 1) - 1)
    return step * (R / step).round()


@pytest.mark.parametrize("piece", [1 << 20, 57])
def test_patches_add_up_and_point_away_from_the_weights(models, monkeypatch, piece):
    monkeypatch.setattr(signature, "PIECE", piece)
    monkeypatch.setattr(taskvector.pieces_of, "__defaults__", (piece,))
    clean, robust = models
    how = Signature(bits=32, strength=0.7)
    got = how.lifecycle(clean, *robust)
    for n, t in clean.items():
        R = [away(r[n], t) for r in robust]
        torch.testing.assert_close(got[n].double(), t.double() + 0.7 * (R[0] + R[1]),
                                   rtol=0, atol=1e-6)
        for r in R:
            assert abs(float((r * t.double()).sum())) < 1e-6 * float(r.norm() * t.norm())
    one = dict(merged(clean, robust, [how, TaskArithmetic(scale=1.0)]))
    assert all(torch.equal(one[n], got[n]) for n in clean)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_the_file_is_the_change_and_off_by_half_a_step(models, bits):
    clean, (robust, _) = models
    how, task = Signature(bits=bits), TaskVector(clean, robust)
    coded = how.encode(task)
    back, change = how.decode(coded, task.shapes), how.change(task, 0)
    for n, t in clean.items():
        R = away(robust[n], t)
        got = back.tensor(n, torch.float64)
        torch.testing.assert_close(got, stepped(R, bits), rtol=0, atol=1e-9)
        torch.testing.assert_close(change.tensor(n, torch.float64), got, rtol=0, atol=1e-12)
        step = float(R.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((got - R).abs().max()) <= step / 2 + 1e-12
    wide = {2: 2, 3: 4, 4: 4, 7: 8, 8: 8}[bits]
    assert coded.tensors["payload/blocks.0.w"].numel() == math.ceil(31 * 40 * wide / 8)


def test_only_the_first_layers_are_patched(models):
    clean, (robust, _) = models
    for layers, moved in ((2, {"embed.weight", "blocks.0.w", "blocks.1.w"}),
                          (0, {"embed.weight"}), (None, set(SHAPES)),
                          (11, set(SHAPES) - {"norm.weight", "head.weight"})):
        got = Signature(layers=layers).lifecycle(clean, robust)
        assert {n for n in clean if not torch.equal(got[n], clean[n])} == moved
        coded = Signature(layers=layers).encode(TaskVector(clean, robust))
        assert {n.removeprefix("payload/") for n in coded.tensors if n[0] == "p"} == moved


def test_a_file_of_32_bits_is_the_change_itself(models):
    clean, (robust, _) = models
    how, task = Signature(bits=32, strength=0.5, layers=2), TaskVector(clean, robust)
    coded = how.encode(task)
    back = how.decode(coded, task.shapes)
    for n, t in clean.items():
        want = 0.5 * away(robust[n], t) if n in ("embed.weight", "blocks.0.w", "blocks.1.w") \
            else torch.zeros(t.shape, dtype=torch.float64)
        torch.testing.assert_close(back.tensor(n, torch.float64), want, rtol=0, atol=1e-7)
        torch.testing.assert_close(how.change(task, 0).tensor(n, torch.float64), want, rtol=0,
                                   atol=1e-8)
    assert coded.tensors["payload/embed.weight"].dtype == torch.float32
    assert not any(n.startswith("scale") for n in coded.tensors)


def test_what_did_not_change_or_is_empty_comes_back(models):
    clean = {"blocks.0.w": torch.randn(5, 5), "blocks.0.none": torch.zeros(0, 4),
             "blocks.0.b": torch.zeros(4)}
    robust = {**clean, "blocks.0.b": torch.arange(4.0)}
    for how in (Signature(), Signature(bits=32)):
        task = TaskVector(clean, robust)
        back = how.decode(how.encode(task), task.shapes)
        assert not back.tensor("blocks.0.w").any() and back.tensor("blocks.0.none").shape == (0, 4)
        torch.testing.assert_close(back.tensor("blocks.0.b"), torch.arange(4.0), rtol=0, atol=0.02)
        out = how.lifecycle(clean, robust)
        assert torch.equal(out["blocks.0.w"], clean["blocks.0.w"])


def test_a_quarter_of_the_layers_in_8_bits_is_13_times_smaller():
    g = torch.Generator().manual_seed(0)
    clean = {f"blocks.{i}.w": torch.randn(128, 128, generator=g) for i in range(16)}
    robust = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in clean.items()}
    coded = Signature(layers=4).encode(TaskVector(clean, robust))
    assert sum(t.nbytes for t in clean.values()) / coded.nbytes > 13


def test_what_is_refused(models):
    assert (Signature().bits, Signature().layers, Signature().strength) == (8, None, 1.0)
    for right in ({"bits": 2}, {"bits": 32}, {"layers": 0}):
        assert Signature(**right).changed() == right
    for wrong in ({"bits": 1}, {"bits": 9}, {"bits": 16}, {"bits": 31}, {"bits": 33},
                  {"layers": -1}):
        with pytest.raises(ConfigError, match="bits"):
            Signature(**wrong)
    clean, (robust, _) = models
    task = TaskVector(clean, robust)
    coded = Signature().encode(task)
    for shapes in ({**task.shapes, "other": torch.Size((2,))},
                   {**task.shapes, "embed.weight": torch.Size((41, 30))}):
        with pytest.raises(FormatError, match="patch holds nothing"):
            list(Signature().decode(coded, shapes).pieces())
    robust["norm.weight"][0] = math.nan
    with pytest.raises(ConfigError, match="inf or nan"):
        Signature().encode(task)
    zero = {"blocks.0.w": torch.zeros(3, 3)}                     # no direction to point away from
    tau = {"blocks.0.w": torch.eye(3)}
    assert torch.allclose(Signature().lifecycle(zero, tau)["blocks.0.w"], torch.eye(3))
    same = Signature().lifecycle(clean, clean)
    assert all(torch.equal(same[n], clean[n]) for n in clean)
