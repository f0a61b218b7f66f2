"""What the process beside the server finds out: data, lengths, costs, answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path

import pytest

from burnish.fit.assets import GLYPH_VIT
from burnish.fit.tasks import TASKS
from burnish.testing.tasks import posed
from burnish.ui import answers, desk
from burnish.ui.asking import Desk
from burnish.ui.places import Refused, confine

VIT = str(GLYPH_VIT)


def quietly(done, total):
    pass


def ask(what, **how):
    told = desk.answer(what, how, quietly)
    assert "error" not in told, told
    return told["answer"]


def test_a_model_is_what_its_configuration_says():
    told = ask("model", model=VIT)
    assert told["architecture"] == "ViTForImageClassification" and told["parameters"] == 680_606
    assert told["tasks"] == ["image-classification", "image-multi-label", "image-regression",
                             "image-embedding"]
    assert desk.answer("model", {"model": "/nowhere/at/all"}, quietly)["kind"] == "ConfigError"


def test_data_are_read_as_fit_reads_them():
    told = ask("data", data="digits", tops=[], model=VIT)
    assert told["task"] == "image-classification" and told["rows"]["train"] == 720
    assert sum(told["classes"].values()) == 720 and len(told["classes"]) == 10
    assert told["longest"] is None and told["alone"] and told["train"] == 720
    assert told["pictures"][0]["image"].startswith("data:image/png;base64,")
    assert json.dumps(told)


@pytest.mark.parametrize("task", TASKS)
def test_a_page_asks_for_what_fit_declares_of_a_task(task):
    from burnish.fit.arguments import Options

    told = desk.asked_of(task)                   # all that it reads and that `fit` takes
    assert {t["name"] for t in told} == {*TASKS[task].settings} & {*Options.__dataclass_fields__}
    for one in told:
        assert str(Options.__dataclass_fields__[one["name"]].type) == f"{one['kind']} | None"
        assert one["kind"] in ("str", "int", "float", "bool")


def test_what_a_task_is_told_acts_on_what_is_read_and_planned(tmp_path):
    base, data, _ = posed("cloud-classification", tmp_path)
    given = {"model": str(base), "data": str(data), "tops": [str(tmp_path)], "trust": True}
    assert {"name": "points", "kind": "int", "least": 1, "most": None} in ask(
        "data", **given)["settings"]
    given |= {"memory": "1 GB", "batch": 2, "candidates": ["lora(rank=2, targets='net.head')"]}
    few, many = (ask("plan", settings={"points": n}, **given)["recipes"][0]["peak"]
                 for n in (16, 64))
    assert few < many


def test_what_a_task_wants_to_be_told_is_said_beside_its_fields(tmp_path):
    base, data, _ = posed("text-to-image", tmp_path)
    for path in data.rglob("*"):
        if path.suffix in (".txt", ".csv", ".jsonl"):        # pictures alone
            path.unlink()
    given = {"model": str(base), "data": str(data), "tops": [str(tmp_path)],
             "how": {"task": "text-to-image"}}
    told, wanted = ask("data", **given), "instance_prompt"
    assert wanted in told["refused"] and wanted in [s["name"] for s in told["settings"]]
    assert "refused" not in ask("data", **given, settings={wanted: "a bowl"})


def test_lengths_are_of_the_model_s_tokens(tmp_path):
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertForMaskedLM

    model = tmp_path / "bert"
    BertForMaskedLM(BertConfig(
        vocab_size=wordpiece(model), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32)).save_pretrained(model)
    texts = ["the cat"] * 17 + ["the cat sat on the mat"] * 3
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": t, "label": k}) + "\n" for t in texts for k in ("x", "y")))
    told = ask("data", data=str(tmp_path / "a.jsonl"), tops=[str(tmp_path)], model=str(model))
    assert told["tokens"] == {"median": 4, "most": 8, "nine_in_ten": 8} and told["longest"] == 8
    assert told["samples"][0] == {"text": "the cat", "label": "x"}
    shorter = ask("data", data=str(tmp_path / "a.jsonl"), tops=[str(tmp_path)], model=str(model),
                  settings={"max_length": 5})
    assert shorter["longest"] == 5 and "longer than max_length=5" in shorter["notes"][0]


def test_a_choice_of_columns_comes_with_its_flags(tmp_path):
    (tmp_path / "a.csv").write_text("document,summary\n" + "a long text,short\n" * 4)
    told = desk.answer("data", {"data": str(tmp_path / "a.csv"), "tops": [str(tmp_path)]}, quietly)
    assert told["kind"] == "AmbiguousError"
    flags = told["readings"][0]["flags"]
    assert flags == {"prompt": "document", "completion": "summary"}
    found = ask("data", data=str(tmp_path / "a.csv"), tops=[str(tmp_path)], how=flags)
    assert found["task"] == "instruction-tuning"


@pytest.mark.parametrize("name", ["metadata.csv", "train.jsonl"])
def test_a_table_points_at_nothing_outside(tmp_path, name):
    """Pictures that a table names are read as its own; so it names them below the root."""
    top = tmp_path / "top"
    top.mkdir()
    kinds = itertools.cycle(("path", "bytes"))
    (top / "link.png").symlink_to(tmp_path / "secret.png")
    for bad in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png", "link.png",
                "a/../inside.png", "~/secret.png"):
        text = f"file_name,label\n{bad},a\n" if name.endswith("csv") else \
            json.dumps({"image": bad, "label": "a"}) + "\n"
        (top / name).write_text(text)
        for where in (top, top / name):
            with pytest.raises(Refused, match="outside"):
                confine(str(where), [str(top)])
        (top / name).write_text(json.dumps({"body": bad, "scan": {next(kinds): bad}}) + "\n" if
                                name.endswith("jsonl") else f"body,scan\n{bad},{bad}\n")
        confine(str(top), [str(top)])              # words, as far as anybody knows
        for column in ("body", "scan"):
            with pytest.raises(Refused, match="outside"):
                desk.data(quietly, str(top / name), [str(top)], how={"image": column})
    (top / name).write_text("file_name,label\ninside.png,a\n" if name.endswith("csv") else
                            '{"image": "inside.png", "label": "a"}\n')
    confine(str(top), [str(top)])


def test_a_plan_is_points_with_their_cost_and_its_parts():
    done = []
    told = desk.plan(lambda *n: done.append(n), VIT, "13 MB", 16, task="image-classification",
                     labels=[str(i) for i in range(10)], rows=720, epochs=2,
                     candidates=["full", "lora(rank=4)"])
    assert done[-1] == (2, 2) and told["budget"] == 13_000_000 and told["best"] == "lora(rank=4)"
    for p in told["recipes"]:
        assert p["fits"] == (p["needs"] <= told["budget"])
        assert sum(p["by"].values()) == p["peak"] and p["hours"][0] < p["hours"][1]
    assert json.dumps(told)


def test_what_the_plan_promises_is_what_fit_promises(tmp_path):
    import burnish

    classes = [str(i) for i in range(10)]
    told = desk.plan(quietly, VIT, "1 GB", 32, task="image-classification", labels=classes,
                     candidates=["lora(rank=4)"])
    run = burnish.fit(VIT, "digits", recipe="lora(rank=4)", batch_size=32, max_steps=1, quiet=True,
                      measure=False, report=False, test=False, output=tmp_path / "out")
    assert run.promise.peak_bytes == told["recipes"][0]["peak"]
    assert run.promise.by_category == told["recipes"][0]["by"]
    # and the run is asked: a picture and nothing else
    from PIL import Image

    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    said = ask("predict", run=str(tmp_path / "out"), file=str(tmp_path / "a.png"))
    assert said["label"] in classes and "(" in said["said"] and "(" in said["base"]
    told = desk.answer("predict", {"run": str(tmp_path / "out"), "text": str(tmp_path / "a.png")},
                       quietly)
    assert "answers pictures" in told["error"]


def test_a_recipe_of_one_s_own_is_completed_as_fit_does_it(tmp_path):
    from burnish.testing.models import config

    config("llama").save_pretrained(tmp_path)
    told = desk.plan(quietly, str(tmp_path), "1 GB", 2, 8, task="language-modelling",
                     candidates=["lora(rank=2)"])
    assert [p["recipe"] for p in told["recipes"]] == ["lora(rank=2) + chunked_loss"]


def test_what_no_number_of_tokens_says_is_planned_from_its_rows(tmp_path):
    """Sounds and masks: the promise is that of `fit`, as for all others."""
    import burnish
    from burnish.testing.scenes import segformer, shapes

    for part in segformer():
        part.save_pretrained(tmp_path / "model")
    model, data = str(tmp_path / "model"), str(shapes(tmp_path / "data", 24))
    (tmp_path / "data/classes.txt").write_text("floor\ndisc\nbox\n")
    read = ask("data", data=data, tops=[str(tmp_path)], model=model)
    assert read["task"] == "semantic-segmentation" and read["samples"]
    told = ask("plan", model=model, memory="1 GB", batch=4, task=read["task"],
               labels=read["labels"], data=data, tops=[str(tmp_path)],
               candidates=["lora(rank=2)"])
    run = burnish.fit(model, data, recipe="lora(rank=2)", batch_size=4, max_steps=1, quiet=True,
                      measure=False, report=False, test=False, output=tmp_path / "out", samples=1)
    assert run.promise.peak_bytes == told["recipes"][0]["peak"]
    line = json.loads((tmp_path / "out/answers.jsonl").read_text())
    assert line["answers"][0]["said"]


#: settings that the page has no field for
UNASKED = ("language", "points")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_planned_as_fit_promises_it(tmp_path, task):
    """From a folder to a point of the frontier: to the byte, whatever rows the task has; or it is
    said why there is no plan."""
    import burnish

    base, data, how = posed(task, tmp_path, 3)
    trust = how.pop("trust_remote_code", False)
    reading = {k: how.pop(k) for k in ("task", "label") if k in how}
    how.pop("batch_size", None)                  # (the page has its own)
    how = {k: v for k, v in how.items() if k not in UNASKED}
    assert not how
    given = {"model": str(base), "trust": trust}
    assert task in ask("model", **given)["tasks"]
    read = ask("data", data=str(data), tops=[str(tmp_path)], how=reading, **given)
    assert read["task"] == task
    body = given | {"memory": "1 GB", "batch": 2, "task": task, "labels": read["labels"],
                    "data": str(data), "tops": [str(tmp_path)], "how": reading,
                    "candidates": ["lora(rank=2)"]}
    if not read["alone"]:
        assert "which no plan divides" in desk.answer("plan", body, quietly)["error"]
        return
    point, = ask("plan", **body)["recipes"]
    run = burnish.fit(str(base), str(data), point["recipe"], output=tmp_path / "run", max_steps=1,
                      batch_size=2, quiet=True, report=False, measure=False, test=False,
                      validation=0, save_strategy="no", trust_remote_code=trust, **reading)
    assert run.promise.peak_bytes == point["peak"]


def test_a_json_document_points_at_nothing_outside(tmp_path):
    """COCO's objects are no table of rows: what they name is looked for at any depth."""
    from burnish.testing.boxes import shapes

    folder = shapes(tmp_path / "top", 3)
    confine(str(folder), [str(folder)])
    told = json.loads((folder / "annotations.json").read_text())
    for bad in ("../secret.png", str(tmp_path / "secret.png"), "~/secret.png"):
        told["images"][1]["file_name"] = bad
        (folder / "annotations.json").write_text(json.dumps(told))
        with pytest.raises(Refused, match="annotations.json, column 'file_name'.*outside"):
            confine(str(folder), [str(folder)])


def test_what_has_no_plan_is_said(tmp_path):
    told = desk.answer("plan", {"model": VIT, "memory": "1 GB", "batch": 2, "task": "embedding"},
                       quietly)
    assert told["kind"] == "ConfigError" and "no plan divides" in told["error"]
    assert desk.answer("plan", {"model": VIT, "memory": "much", "batch": 2},
                       quietly)["kind"] == "ConfigError"


def test_the_process_answers_in_turn_and_is_started_again():
    async def both():
        beside = Desk(idle=60)
        first = beside.ask("machine", {})
        told = [m async for m in first]
        assert told[-1]["answer"]["device"] in ("cpu", "cuda")
        process = beside._process
        assert (await beside.one("model", {"model": "/nowhere/at/all"}))["kind"] == "ConfigError"
        assert beside._process is process
        process.kill()
        await process.wait()
        beside._process = process                   # it died, and nobody has noticed
        assert "answer" in await beside.one("machine", {})
        assert beside._process is not process
        # who leaves before the answer keeps nobody waiting
        left = beside.ask("plan", {"model": VIT, "memory": "1 GB", "batch": 4,
                                   "candidates": ["lora(rank=2)"], "task": "image-classification"})
        assert "progress" in await anext(left)
        was = beside._process
        await left.aclose()
        assert beside._process is None and await was.wait() != 0
        assert "answer" in await beside.one("machine", {})
        await beside.end()
        assert beside._process is None

    asyncio.run(both())


def test_libraries_may_print_what_they_like(monkeypatch, capfd):
    """Answers have a line of their own, whatever is printed."""
    import io

    asked = "".join(json.dumps({"id": i, "ask": "loud", "with": {}}) + "\n" for i in (1, 2))
    code = ("import sys\nfrom burnish.ui import desk\n"
            "def loud(say):\n    print('noise'); say(1, 2); return {'a': 1}\n"
            "desk.ASKED['loud'] = loud\ndesk.main()")
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True)
    assert [json.loads(line) for line in io.StringIO(done.stdout)] == [
        m for i in (1, 2) for m in ({"id": i, "progress": [1, 2]}, {"id": i, "answer": {"a": 1}})]
    assert done.stderr.count("noise") == 2


# -- asking a run of every kind --------------------------------------------------------------------
@pytest.fixture
def finished(tmp_path):
    """task -> the folder of a small run of it, and its data."""
    import burnish
    from burnish.testing.tasks import posed

    def made(task):
        base, data, how = posed(task, tmp_path / task)
        burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / task / "out",
                    max_steps=2, batch_size=how.pop("batch_size", 2),
                    validation=0, lr=0.1, quiet=True, report=False,
                    measure=False, save_strategy="no", **how)
        return str(tmp_path / task / "out"), data
    return made


def refused(**how):
    return desk.answer("predict", how, quietly)["error"]


@pytest.mark.slow
def test_a_picture_is_compared_with_texts(finished, tmp_path):
    run, data = finished("image-text-contrastive")
    (tmp_path / "photos").mkdir()
    said = ask("predict", run=run, file=str(data / "0.png"), texts=["a red disc", str(data), " "])
    assert set(said["nearest"]) == {"a red disc", str(data)} and said["base"]   # never a folder
    for how in ({"text": "a red disc"}, {"file": str(data / "0.png")},
                {"texts": ["a"], "file": str(data / "metadata.csv")}):
        assert "give it a picture, and a text or more" in refused(run=run, **how)


@pytest.mark.slow
def test_a_series_is_foretold_and_rows_of_a_table_are_answered(finished, tmp_path):
    run, data = finished("time-series-forecasting")
    said = ask("predict", run=run, file=str(data))
    assert list(said["forecast"]) == ["heat", "flow"] and "the next 8 rows" in said["base"]
    assert "give it a table with the last rows" in refused(run=run, text="x")
    run, _ = finished("text-classification")
    table = tmp_path / "asked.csv"
    table.write_text("text\n" + "a\nb\n" * 60)
    said = ask("predict", run=run, file=str(table))
    assert len(said["rows"]) == answers.ROWS and said["rows"][1]["asked"] == "row 2"
    assert all(r["said"] and r["base"] for r in said["rows"])
    table.write_text("body\na\n")
    assert "there is no text" in refused(run=run, file=str(table))
    assert "give it a table" in refused(run=run, file=str(tmp_path / "x.png"))


@pytest.mark.slow
def test_pictures_that_a_run_makes_are_shown_and_not_kept(finished):
    import base64

    run, _ = finished("image-generation")
    said = ask("predict", run=run, text="disc")
    for key in ("picture", "said", "base"):
        assert base64.b64decode(said[key].removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert not list(Path(run, "pictures").iterdir())


def test_the_page_names_the_figure_of_every_task():
    from burnish.fit.tasks import TASKS
    from burnish.ui.app import _page

    text = _page("try.js").decode()
    order = text.partition("const ORDER = [")[2].partition("]")[0]
    for task, kind in TASKS.items():
        assert kind.metric == "loss" or f'"{kind.metric}"' in order, (task, kind.metric)
