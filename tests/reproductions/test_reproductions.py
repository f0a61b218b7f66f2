"""Published memory figures: read whole, run from settings alone, met within what each row says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from burnish.cli import main
from burnish.core.errors import ConfigError
from burnish.memory import measure
from burnish.reproductions import names, read, rows, run
from burnish.reproductions.graphs import Decoder, LowFused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "reproductions.md"
QUICK = ["losses/liger2024_linear_cross_entropy/4096_tokens", "norms/liger2024_rms_norm/1024_wide"]


@pytest.mark.parametrize("name", QUICK)
def test_a_kernel_is_met_to_the_last_printed_digit_and_the_page_is_current(name):
    done = run(name)
    assert done.kept and abs(done.ours - done.row.published) < 0.02      # MiB
    assert rows.line(done) in PAGE.read_text("utf-8").splitlines()


@pytest.mark.slow
def test_every_published_figure_is_met_within_its_tolerance_and_stands_on_the_page():
    text = PAGE.read_text("utf-8").splitlines()
    done = [run(n) for n in names()]
    missed = [f"{o.row.name}: {o.ours:.3f} for {o.row.published}" for o in done if not o.kept]
    assert not missed
    assert not [o.row.name for o in done if rows.line(o) not in text]


def test_the_page_has_every_row_once_and_every_reason():
    text = PAGE.read_text("utf-8")
    for name, row in read().items():
        assert text.count(f"| {name} |") == 1
        assert row.why in text


def test_a_row_that_may_miss_by_more_than_three_per_cent_says_why():
    assert len(read()) >= 30
    for row in read().values():
        assert row.why or row.allowed <= rows.EXPLAINED, row.name
        assert row.url.startswith("https://") and len(row.source) > 20


@pytest.mark.parametrize(("change", "says"), [
    ({"tolerance": 0.2}, "says no why"), ({"counts": "used"}, "counts 'used'"),
    ({"publshed": 1}, "published"), ({"graph": "decoder"}, "one of operation, graph, config")])
def test_a_row_that_is_not_whole_is_refused(change, says):
    row = read()[QUICK[0]]
    with pytest.raises(ConfigError, match=says):
        rows._checked(rows.Row("a/b/c", "source", "url", {**row.facts, **change}))


def test_names_are_rows_files_or_topics():
    assert names([QUICK[0]]) == QUICK[:1]
    for word in ("losses", "losses/liger2024_linear_cross_entropy"):
        assert QUICK[0] in names([word])
    assert not set(names(["losses"])) & set(names(["norms"])) and names() == list(read())
    with pytest.raises(ConfigError, match="did you mean 'losses'"):
        names(["loses"])


def test_a_difference_and_a_ratio_of_two_runs_are_figures(monkeypatch):
    facts = read()[QUICK[0]].facts
    less = {**facts, "published": 3070.03, "less": {"settings": {"tokens": 4096}},
            "settings": {**facts["settings"], "tokens": 8192}}
    over = {**facts, "published": 9162.31 / 6092.28, "tolerance": 1e-4,
            "over": less["less"], "settings": less["settings"]}
    found = {"less": rows.Row("less", "s", "u", less), "over": rows.Row("over", "s", "u", over)}
    monkeypatch.setattr(rows, "read", lambda: found)
    assert run("less").ours == pytest.approx(3070.03, abs=0.02)
    assert run("over").kept and run("over").row.unit == "x"


def test_the_command_prints_a_table_or_json_and_fails_where_a_figure_is_missed(capsys, monkeypatch):
    assert main(["reproduce", *QUICK]) == 0
    assert "6092.28 MiB" in capsys.readouterr().out
    assert main(["reproduce", QUICK[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)[0]
    assert told["kept"] and told["published"] == 6092.28 and told["settings"]["words"] == 128256
    row = read()[QUICK[0]]
    wrong = rows.Row(row.name, row.source, row.url, {**row.facts, "published": 6000.0})
    monkeypatch.setattr(rows, "read", lambda: {row.name: wrong})
    assert main(["reproduce"]) == 4
    assert "missed" in capsys.readouterr().err


# -- the graphs -----------------------------------------------------------------------------------
SMALL = {"words": 50, "width": 32, "layers": 2, "heads": 4, "inner": 48, "length": 8}


def made(**shape) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(**{**SMALL, **shape})
    for p in (*model.parameters(), *model.buffers()):
        if p.is_floating_point():
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("shape", [{}, {"shift": "labels", "norm": "rms32_back"}, {
    "groups": 2, "norm": "rms32", "tied": True}, {
    "norm": "layer", "gated": False, "act": "gelu", "bias": True, "head_bias": True,
    "parallel": True, "shared_norm": True, "rotary": 0.5}])
def test_pieces_of_the_head_give_the_same_loss(shape):
    ids = torch.randint(0, 50, (2, 8))
    whole, parts = made(**shape), made(**shape, chunk=3, single=True, held=True)
    torch.testing.assert_close(parts(ids, ids), whole(ids, ids))


@pytest.mark.parametrize(("on", "rows_"), [("qv", (32, 32, 32)), ("qv", (32, 16, 16)),
                                           ("qkv", (32, 16, 16)), ("k", (32, 16, 16))])
@pytest.mark.parametrize("copies", [False, True])
def test_lora_on_some_rows_of_a_fused_weight_is_the_sum_of_its_parts(on, rows_, copies):
    torch.manual_seed(0)
    base = torch.nn.Linear(32, sum(rows_))
    low = LowFused(base, 4, 0.0, rows_, tuple(w in on for w in "qkv"), copies)
    torch.nn.init.normal_(low.a)
    torch.nn.init.normal_(low.b)
    x = torch.randn(2, 5, 32)
    update, a, b = torch.zeros(sum(rows_), 32), iter(low.a.split(4)), iter(low.b.split(low.some))
    for start, n, w in zip((0, rows_[0], rows_[0] + rows_[1]), rows_, "qkv", strict=True):
        if w in on:
            update[start : start + n] = next(b) @ next(a)
    torch.testing.assert_close(low(x), base(x) + 0.5 * F.linear(x, update))


def test_a_graph_trains_its_adapters_alone_and_as_many_as_published():
    with torch.device("meta"):
        model = Decoder(words=32000, width=4096, layers=32, heads=32, inner=11008, length=8,
                        lora={"rank": 8, "dropout": 0.05, "on": "qv"})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_194_304


def test_a_graph_is_simulated_as_it_is_measured():
    import burnish

    ids = torch.randint(0, 50, (2, 8))
    shape = {"lora": {"rank": 2, "dropout": 0.0, "on": "qvomlp"}, "chunk": 4, "held": True}
    batch = {"input_ids": ids, "labels": ids.clone()}
    recipe = "as_is + lean(on=False)"
    promised = burnish.simulate(made(**shape), recipe, batch)
    tuned = burnish.tune(made(**shape), recipe)
    measured = measure(tuned, batch, loss=lambda out, batch: out)
    assert promised.peak_bytes == measured.peak_bytes
