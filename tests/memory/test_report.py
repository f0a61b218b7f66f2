"""Sizes for people, the report's forms, the picture."""

from __future__ import annotations

import json

import pytest
import torch

from burnish.core.errors import ConfigError, FormatError
from burnish.memory import Ledger, MemoryReport, format_bytes, parse_bytes
from burnish.memory.report import POINTS
from burnish.testing import tiny

from .blocks import D, Net


@pytest.mark.parametrize(("text", "size"), [
    ("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), ("900MB", 900 * 10**6), ("1.5g", 1.5 * 2**30),
    ("16384", 16384), (4096, 4096), ("1,500 kB", 15e5), ("16,000,000", 16e6),
    ("1_000", 1000), ("0.5 tib", 2**39), ("7b", 7)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


def test_a_decimal_comma_is_not_taken_for_thousands():
    """findings 4.7"""
    for text, near in (("7,5GB", "7.5gb"), ("1,50 GiB", "1.50 gib"), ("7,5", "7.5")):
        with pytest.raises(ConfigError, match=f"decimal is written with a point: '{near}'"):
            parse_bytes(text)


@pytest.mark.parametrize("text", ["1e400GB", "9" * 5000, "9" * 50_000 + "x", 1e300, float("inf"),
                                  float("nan"), 10**5000, -(10**5000), "1" + "_1" * 40_000, "8\0GB",
                                  "\ud800", "8GB" * 9, "1e99999999", "8,00GB", "1,0000", ",", "_",
                                  "1__0", "0.1", "1e-400"], ids=lambda v: type(v).__name__)
def test_no_number_is_too_odd_to_be_refused_in_a_line(text):
    """findings 4.5, 4.6"""
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "lots", "8 bananas", "GB", "-3GB", "0GB", "8GB 2", None,
                                  True, [8]])
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="8GB"):
        parse_bytes(text)


@pytest.mark.parametrize(("size", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 * 1024, "1.50 MiB"),
    (8 * 2**30, "8.00 GiB"), (123.4 * 2**30, "123 GiB"), (-2048, "-2.00 KiB"),
    (5 * 2**50, "5,120 TiB")])
def test_sizes_are_written(size, text):
    assert format_bytes(size) == text


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    net = Net(blocks=2)
    x, y = torch.randn(2, 16, D), torch.zeros(2, dtype=torch.long)
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    with Ledger(net) as ledger:
        ledger.watch("activations", [x, y])
        for _ in range(2):
            since = ledger.now + 1
            opt.zero_grad()
            net(x, y)["loss"].backward()
            opt.step()
    return MemoryReport.of(ledger, since=since, recipe="full", batch="2")


def test_categories_and_modules_add_up_to_the_peak(report):
    assert sum(report.by_category.values()) == report.peak_bytes
    assert sum(report.by_module.values()) == report.peak_bytes
    highest = max(sum(parts.values()) for _, parts in report.timeline)
    assert highest == report.peak_bytes
    assert len(report.timeline) <= POINTS + 2


def test_report_survives_json(report):
    again = MemoryReport.from_dict(json.loads(report.json()))
    assert again == report
    assert again.text() == report.text()


def test_text_names_every_category_and_the_moment(report):
    text = report.text()
    for word in ("weights", "gradients", "optimizer", "activations", "temporary",
                 format_bytes(report.peak_bytes), report.peak_at[0]):
        assert word in text


def test_a_foreign_file_is_no_report():
    with pytest.raises(FormatError, match="not a memory report"):
        MemoryReport.from_dict({"peak": 3})


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_drawn(report, tmp_path, ending):
    file = report.picture(tmp_path / "deep" / f"step.{ending}")
    assert file.stat().st_size > 5000
    if ending == "svg":
        drawn = file.read_text()
        assert "<svg" in drawn and drawn.count("<path") > 10


def test_a_picture_takes_the_place_of_none_but_our_own(report, tmp_path):
    """findings 4.1"""
    for ending in ("png", "svg", "pdf"):
        file = report.picture(tmp_path / f"step.{ending}")
        report.picture(file)                                # ours
        file.write_bytes(b"mine")
        with pytest.raises(ConfigError, match="no picture of burnish"):
            report.picture(file)
        assert file.read_bytes() == b"mine"
    with pytest.raises(ConfigError, match="a picture is png, svg, pdf"):
        report.picture(tmp_path / "config.json")



def test_nothing_to_draw_is_said(report, tmp_path):
    empty = MemoryReport.from_dict({**report.to_dict(), "timeline": []})
    with pytest.raises(ConfigError, match="no timeline"):
        empty.picture(tmp_path / "x.png")


def test_what_is_shown_of_a_report_or_a_plan_is_a_line_or_two():
    import burnish

    model, batch = tiny("vit")
    plans = burnish.plan(model, "2MB", batch, candidates=["lora", "full"], workers=1)
    for thing in (plans, plans.best, plans.best.report):
        assert len(repr(thing)) < 600 and repr(thing).startswith(f"{type(thing).__name__}(")
