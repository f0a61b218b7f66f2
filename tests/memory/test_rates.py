"""Seconds from counts: bounds that hold operator by operator, and rates that are kept."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from burnish.memory import MemoryReport, doctor
from burnish.memory.gpus import gpu
from burnish.memory.rates import PUBLISHED, Rates, rates

#: (operations, in 16 bits?, bytes), of a forward's operators
OPERATORS = [(8e9, False, 2e6), (4e9, True, 9e8), (0, False, 3e8), (0, True, 5e5)]


def report(update: float = 0.0) -> MemoryReport:
    def of(value):
        return {"forward": sum(map(value, OPERATORS)), "update": 0.0}

    found = MemoryReport(0, {}, {}, [], ("", ""))
    found.flops, found.traffic = of(lambda o: o[0]), of(lambda o: o[2])
    found.half = of(lambda o: o[0] if o[1] else 0)
    found.swept, found.launches = of(lambda o: 0 if o[0] else o[2]), of(lambda o: 1)
    found.traffic["update"] = found.swept["update"] = update
    return found


def exact(single, half, bandwidth, launch):
    return sum(max(f / (half if short else single), moved / bandwidth) + launch
               for f, short, moved in OPERATORS)


@pytest.mark.parametrize("machine", [(1e12, 2e12, 1e11, 1e-6), (1e9, 1e9, 1e12, 0.0),
                                     (1e14, 1e14, 1e9, 1e-3), (1e13, 1e14, 1e12, 0.5)])
def test_the_time_of_a_roofline_lies_within_the_range(machine):
    speed = Rates("m", *machine, (1.0, 1.0), (1.0, 1.0), "")
    low, high = speed.seconds(report())
    # a device may send the next operator off while it works, so launches may hide
    assert low <= exact(*machine) <= high * (1 + 1e-12)


def test_a_range_of_what_is_reached_widens_it_by_just_that():
    sharp = Rates("m", 1e12, 1e12, 1e11, 0.0, (1.0, 1.0), (1.0, 1.0), "").seconds(report())
    wide = Rates("m", 1e12, 1e12, 1e11, 0.0, (0.5, 1.0), (0.5, 1.0), "").seconds(report())
    assert wide == pytest.approx((sharp[0], 2 * sharp[1]))


def test_accumulated_batches_share_one_update():
    speed = Rates("m", 1e12, 1e12, 1e9, 0.0, (1.0, 1.0), (1.0, 1.0), "")
    once, four = speed.seconds(report(2e9)), speed.seconds(report(2e9), 4)
    assert four == pytest.approx([4 * (t - 2.0) + 2.0 for t in once])


def test_a_makers_rates_are_said_to_be_that():
    card = gpu("RTX 4090")
    found = rates("cuda", card)
    assert (found.half, found.bandwidth) == (card.half, card.bandwidth)
    assert found.products == PUBLISHED[0] and "published rates of RTX 4090" in found.source
    assert "35%" in found.source


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path))
    return tmp_path


def test_measured_rates_are_kept_and_used_and_narrower(cache):
    assert doctor.kept("cpu") is None
    unknown = rates("cpu")
    assert not unknown.known and "burnish doctor" in unknown.source
    first = doctor.measured("cpu", moment=1e-4)
    assert all(first[f] > 0 for f in doctor.FIGURES) and first["torch"] == torch.__version__
    assert doctor.kept("cpu") == first == doctor.measured("cpu")
    told = rates("cpu")
    assert told.known and told.single == first["single"] and first["date"] in told.source

    def width(r):
        low, high = r.seconds(report())
        return high / low

    assert width(told) < width(unknown)


@pytest.mark.parametrize("damage", [
    {"torch": "1.0"}, {"name": "another"}, {"single": 0.0}, {"bandwidth": "fast"}, None])
def test_rates_of_another_machine_or_a_damaged_file_are_not_used(cache, damage):
    data = doctor.measured("cpu", moment=1e-4)
    path, = (cache / "machine").iterdir()
    path.write_text("{" if damage is None else json.dumps(data | damage))
    assert doctor.kept("cpu") is None and not rates("cpu").known


def test_a_cards_measured_rates_go_before_its_makers(cache, monkeypatch):
    kept = {"name": "NVIDIA GeForce RTX 4090", "single": 5e13, "half": 1.5e14, "bandwidth": 9e11,
            "launch": 3e-6, "date": "2026-01-01"}
    module = importlib.import_module("burnish.memory.doctor")
    monkeypatch.setattr(module, "kept", lambda kind: kept if kind == "cuda" else None)
    assert rates("cuda", gpu("RTX 4090")).half == 1.5e14
    assert rates("cuda", gpu("RTX 3090")).half == gpu("RTX 3090").half
