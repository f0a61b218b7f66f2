"""Series: which columns are what, windows, figures, refusals, what comes next, a whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.readings import AmbiguousError
from burnish.fit.series import following
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.series import AHEAD, PAST, made, written

SERIES = "time-series-forecasting"


def table(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def counted(path, steps=60, header="time,a,b"):
    """time, a and b: the step, the step and minus its square."""
    return table(path, header, [f"{t},{t},{-t * t}" for t in range(steps)])


def learnt(data, model, **how):
    task = task_for(data, model, **how)
    task.settle(model)
    return task


# -- columns -----------------------------------------------------------------------------------
def test_a_time_and_numbers_are_a_series_and_validation_is_its_end(tmp_path):
    data = read(counted(tmp_path / "x.csv"))
    assert data.task == SERIES and data.roles == {"time": "time", "channels": ["a", "b"]}
    assert data.sizes() == {"train": 54, "validation": 6} and "54 train, 6 validation" in str(data)
    train, late = data.train[0], data.validation[0]
    assert [v[0] for v in train["values"]] == list(range(54)) and train["begin"] == 0
    assert [v[0] for v in late["values"]] == list(range(60)) and late["begin"] == 54
    assert read(counted(tmp_path / "x.csv"), validation=20).sizes()["validation"] == 20
    bare = read(counted(tmp_path / "y.csv", header="n,a,b"), task=SERIES, label="b,a")
    assert bare.roles == {"channels": ["b", "a"]} and bare.train[0]["values"][3] == [-9, 3]


def test_rows_of_several_series_are_told_apart(tmp_path):
    rows = [f"{t},{of},{t + 100 * k}" for t in range(20) for k, of in enumerate("uv")]
    data = read(table(tmp_path / "x.csv", "ds,unique_id,y", rows), validation=0.25)
    assert [r["series"] for r in data.train] == ["u", "v"] and data.sizes()["train"] == 30
    assert data.validation[1]["values"][-1] == [119.0] and data.validation[1]["begin"] == 15
    short = read(table(tmp_path / "y.csv", "ds,unique_id,y", [*rows, "1,w,5"]), validation=4)
    assert len(short.train) == 3 and len(short.validation) == 2      # one row stays where it is


@pytest.mark.parametrize("rows, words", [
    (["1,2", "2,n/a", "3,4"], "line 3, field 'a': 'n/a' is no number; leave the column out"),
    (["1,2", "2,", "3,4"], "line 3, field 'a': the value is missing; fill it in"),
    (["1,2", "2,inf", "3,4"], "line 3, field 'a': 'inf' is no number"),
    (["1,2", "3,2", "2,4"], "line 4, field 'time': 2 is before 3, of the row above; sort"),
    (["2024-01-02,2", "2024-01-02,2"], "is the time of the row above too; .*series_id")])
def test_what_is_no_series_is_named(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        read(table(tmp_path / "x.csv", "time,a", rows))


def test_a_column_of_words_is_named_and_can_be_left_out(tmp_path):
    path = table(tmp_path / "x.csv", "time,place,a", [f"{t},north,{t}" for t in range(9)])
    with pytest.raises(DataError, match="line 2, field 'place': 'north' is no number.*label="):
        read(path, task=SERIES)
    data = read(path, task=SERIES, label="a")
    assert data.roles["channels"] == ["a"] and "not read: place" in str(data)
    with pytest.raises(DataError, match="label names 'aa', which is no column.*'a'"):
        read(path, task=SERIES, label="aa,a")


@pytest.mark.parametrize("header", ["height,width", "height,width,class", "id,height,target"])
def test_a_table_of_numbers_is_told_how_it_is_tuned(tmp_path, header):
    many = header.count(",") + 1
    path = table(tmp_path / "x.csv", header, [",".join(["1.5"] * (many - 1) + [str(t % 2)])
                                              for t in range(8)])
    with pytest.raises(AmbiguousError, match="columns are numbers.*burnish.tune and a loop of "
                                             "one's own, as examples/cells.py shows; "
                                             "task='time-series-forecasting'") as error:
        read(path)
    assert [r.flags for r in error.value.readings] == [(("task", SERIES),)]


def test_keys_of_a_recipe_are_of_no_window(tmp_path):
    from burnish.core.keys import keys_of
    from burnish.core.recipe import parse

    path = table(tmp_path / "x.csv", "time,a,task", [f"{t},{t},0" for t in range(9)])
    with pytest.raises(DataError, match="a forecast is of many rows, none of which has a 'task'"):
        read(path, keys=keys_of(parse("hyperformer")))


# -- windows -----------------------------------------------------------------------------------
def test_windows_are_every_stretch_and_validation_foretells_only_its_own(tmp_path):
    data = read(counted(tmp_path / "x.csv"), validation=10)
    task = learnt(data, made())
    rows = task.rows("train")
    assert len(rows) == 50 - PAST - AHEAD + 1
    for i in (0, len(rows) - 1):
        assert rows[i]["past_values"][:, 0].tolist() == list(range(i, i + PAST))
        assert rows[i]["future_values"][:, 1].tolist() == [
            -t * t for t in range(i + PAST, i + PAST + AHEAD)]
    held = task.rows("validation")
    assert len(held) == 10 - AHEAD + 1
    assert min(held[i]["future_values"][0, 0] for i in range(len(held))) == 50
    assert held[0]["past_values"][0, 0] == 50 - PAST


def test_too_few_rows_are_refused_and_short_series_left_out(tmp_path):
    with pytest.raises(DataError, match="train: 39 rows are fewer than one window, 32 that the "
                                        "model reads and 8 that it foretells"):
        learnt(read(counted(tmp_path / "x.csv", 39), validation=0), made()).rows("train")
    data = read(counted(tmp_path / "y.csv"))
    with pytest.raises(DataError, match="validation: 6 rows are set aside, fewer than the 8 .*"
                                        "validation=8 or more"):
        learnt(data, made()).rows("validation")
    rows = [f"{of},{t},{t}" for of, n in (("u", 45), ("v", 12)) for t in range(n)]
    path = table(tmp_path / "z.csv", "series_id,time,a", rows)
    task = learnt(read(path, validation=0), made(channels=1))
    assert len(task.rows("train")) == 6 and "1 of 2 series have fewer rows" in task.notes[-1]


# -- loss and figures --------------------------------------------------------------------------
@pytest.mark.parametrize("kind, config", [
    ("PatchTST", {}), ("PatchTSMixer", {}), ("PatchTSMixer", {"prediction_channel_indices": [1]})])
def test_figures_are_what_the_equations_say(tmp_path, kind, config):
    model = made(kind, **config).eval()
    data = read(str(written(tmp_path / "x.csv", 60)), validation=0)
    task = learnt(data, model)
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        out = model(**batch)
        values = np.array(data.train[0]["values"])
        said, which = out.prediction_outputs.double().numpy(), config.get(
            "prediction_channel_indices", [0, 1])
        true = np.stack([values[i + PAST:i + PAST + AHEAD] for i in range(len(rows))])[..., which]
        last = np.stack([values[i + PAST - 1:i + PAST] for i in range(len(rows))])[..., which]
        for size in (1, 7):                                # however rows are batched
            found = evaluate(model, task, "train", size)
            assert found["loss"] == found["mse"] == pytest.approx(out.loss.item(), rel=1e-5)
            assert found["mse"] == pytest.approx(((said - true) ** 2).mean(), rel=1e-5)
            assert found["mae"] == pytest.approx(abs(said - true).mean(), rel=1e-5)
            assert found["mae_to_naive"] == pytest.approx(
                (abs(said - true).sum((0, 1)) / abs(last - true).sum((0, 1))).mean(), rel=1e-5)


def test_a_channel_that_stands_still_has_no_naive_error(tmp_path):
    path = table(tmp_path / "x.csv", "time,a,b", [f"{t},{t % 5},7" for t in range(50)])
    model = made().eval()
    task = learnt(read(path, validation=0), model)
    assert task.rows("train").unmoved()[1] == 0
    assert np.isfinite(evaluate(model, task, "train")["mae_to_naive"])
    still = table(tmp_path / "y.csv", "time,a,b", [f"{t},1,7" for t in range(50)])
    assert "mae_to_naive" not in evaluate(model, learnt(read(still, validation=0), model), "train")


# -- refusals ----------------------------------------------------------------------------------
def test_another_number_of_channels_is_refused_with_how_to_make_one(tmp_path):
    data = read(str(written(tmp_path / "x.csv", 60)))
    with pytest.raises(ConfigError, match=r"reads 3 channels and the data have 2 \(heat, flow\): "
                                          r"name 3 of them.*num_input_channels=2\)") as error:
        learnt(data, made(channels=3))
    assert "its weights are the same for any number" in str(error.value)
    own, other = made(channels=3), tmp_path / "other"      # as it says
    own.save_pretrained(tmp_path / "own")
    type(own).from_pretrained(tmp_path / "own", num_input_channels=2).save_pretrained(other)
    fits = type(own).from_pretrained(other)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), fits.parameters(), strict=True))
    learnt(data, fits)
    for model in (made("PatchTSMixer", channels=3), made(channels=1, share_embedding=False)):
        with pytest.raises(ConfigError, match=r"Config\(num_input_channels=2, context_length=32, "
                                              r"prediction_length=8, loss='mse'\)"):
            learnt(data, model)


@pytest.mark.parametrize("kind", ["PatchTST", "PatchTSMixer"])
@pytest.mark.parametrize("recipe", ["lora(rank=4)", "full"])
def test_a_step_is_promised_to_the_byte(kind, recipe):
    model = made(kind)
    batch = {"past_values": torch.randn(4, PAST, 2), "future_values": torch.randn(4, AHEAD, 2)}
    promised = burnish.simulate(model, recipe, batch).peak_bytes
    assert burnish.measure(burnish.tune(model, recipe), batch).peak_bytes == promised


def test_other_models_and_settings_are_refused(tmp_path):
    import transformers

    path = str(written(tmp_path / "x.csv", 60))
    with pytest.raises(ConfigError, match="loss='nll' in its config, and foretells a distribution"):
        learnt(read(path), made(loss="nll"))
    with pytest.raises(ConfigError, match="PatchTSTModel foretells no series.*PatchTSTForPredict"):
        learnt(read(path), transformers.PatchTSTModel(made().config))
    with pytest.raises(ConfigError, match="max_length=9 counts tokens.*context_length"):
        task_for(read(path), made(), max_length=9)
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="is vit, no forecaster such as PatchTST"):
        burnish.fit(str(tmp_path / "vit"), path, "lora(rank=2)", quiet=True, output=tmp_path / "o")
    made().config.save_pretrained(tmp_path / "m")
    lines = table(tmp_path / "t.csv", "text,label", ["a,b", "c,d", "e,b"])
    with pytest.raises(ConfigError, match="fit can train it for time-series-forecasting"):
        burnish.fit(str(tmp_path / "m"), lines, "lora(rank=2)", quiet=True, output=tmp_path / "o")


# -- what comes next ---------------------------------------------------------------------------
@pytest.mark.parametrize("times, after", [
    (["2024-01-30", "2024-01-31", "2024-02-01"], ["2024-02-02", "2024-02-03"]),
    (["2024-01-01 22:30", "2024-01-01 23:00", "2024-01-01 23:30"],
     ["2024-01-02 00:00", "2024-01-02 00:30"]),
    (["2024-01-01T22:00:00", "2024-01-01T23:00:00", "2024-01-02T00:00:00"],
     ["2024-01-02T01:00:00", "2024-01-02T02:00:00"]),
    ([4, 6.5, 9], ["11.5", "14"]), (["4", "5", "6"], ["7", "8"]),
    (["2024-01-31", "2024-02-29", "2024-03-31"], None), (["Monday", "Tuesday", "Wednesday"], None),
    ([1, 2], None), ([], None)])
def test_times_go_on_where_they_are_evenly_apart(times, after):
    assert following(times, 2) == after


# -- a whole run -------------------------------------------------------------------------------
@pytest.mark.slow
def test_series_are_foretold_within_the_promise(tmp_path, capsys):
    made().save_pretrained(tmp_path / "model")
    data = written(tmp_path / "x.csv", 300)
    out = tmp_path / "out"
    run = burnish.fit(str(tmp_path / "model"), str(data), "lora(rank=4)", output=out, lr=3e-3,
                      epochs=6, batch_size=16, quiet=True, samples=1)
    assert run.metrics["validation"]["mae_to_naive"] < 0.6
    assert run.promise.peak_bytes == run.truth.peak_bytes
    for moment in ("evaluate", "save"):
        found = run.facts["memory"]["moments"][moment]
        assert found["promised"] == found["measured"]
    assert main(["evaluate", str(out), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], rel=1e-4)
    assert found["base"]["mse"] > found["tuned"]["mse"] and found["rows"] == 30

    turned = written(tmp_path / "y.csv", 60, 9)
    lines = [line.split(",") for line in turned.read_text().splitlines()]
    turned.write_text("\n".join(",".join([*r[:-2], r[-1], r[-2]]) for r in lines))   # flow,heat
    plain = written(tmp_path / "z.csv", 60, 9)
    answers = []
    for path in (turned, plain):                           # columns go by their names
        assert main(["predict", str(out), str(path), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answers"])
    assert [a["forecast"] for a in answers[0]] == [a["forecast"] for a in answers[1]]
    one = answers[1][-1]
    assert len(answers[1]) == 1 and list(one["forecast"]) == ["heat", "flow"]
    assert one["time"][0] == "2024-01-03 12:00" and len(one["forecast"]["heat"]) == AHEAD
    rows = one["said"].splitlines()
    assert rows[:2] == ["the next 8 rows", "time,heat,flow"] and len(rows) == 2 + AHEAD
    with pytest.raises(DataError, match="20 rows, and the model reads 32"):
        from burnish.fit.finished import Finished

        list(Finished.open(out).predict([str(written(tmp_path / "w.csv", 20))]))

    drawn = run.facts["forecast"]["channels"]
    assert [c["name"] for c in drawn] == ["heat", "flow"] and len(drawn[0]["forecast"]) == AHEAD
    true = read(str(data)).validation[-1]["values"][-AHEAD:]
    assert drawn[0]["truth"] == pytest.approx([v[0] for v in true])
    assert "Forecast beside what came" in (out / "report.html").read_text()
    assert "from transformers import PatchTSTForPrediction" in (out / "README.md").read_text()
    said = json.loads((out / "answers.jsonl").read_text().splitlines()[-1])["answers"][0]
    assert said["right"].startswith("the next 8 rows\nahead,heat,flow\n1,")
