"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from burnish.cli import config
from burnish.fit.arguments import sort_out

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Examples import what lies beside them, as they do when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(capsys):
    load("own_loop").main()
    before, after = capsys.readouterr().out.splitlines()[-2].split(": ")[-1].split(" -> ")
    assert float(before) < 0.1 and float(after) > 0.7


def test_trainer():
    assert load("trainer").main(steps=40) > 0.6


def test_before():
    peaks = load("before").main(batch=2)
    assert peaks["lora(rank=8) + checkpoint"] < peaks["lora(rank=8)"] < peaks["full"]


def test_near():
    before, after = load("near").main(count=320, epochs=1)
    assert after > before > 0.2


def test_searching():
    found = load("searching").main(count=160, epochs=1)
    assert found["ranking"] > found["classifier, pooled"] > 0.2
    assert min(found[k] for k in ("base", "triplet", "barlow")) > 0.2
    assert 0 < found["reranker on the best"] <= 1


def test_mixture():
    found = load("mixture").main(count=320, trials=8, longer=2)
    assert found["chosen"] < found["equal"] < 6
    assert found["share_of_definitions"] < 1 / 3


def test_outside():
    found = load("outside").main()
    assert found["after"] > max(found["before"], 0.8)


def test_decoder():
    found = load("decoder").main(many=512, first=4, epochs=6)
    taught = found["as taught"][1]
    assert found["light decoder"][0] < found["linear probe"][0] < 1
    assert found["light decoder"][1] == found["linear probe"][1] == taught
    assert found["everything"][0] < found["light decoder"][0] and found["everything"][1] > taught


def test_tags():
    assert load("tags").main(count=240, epochs=5, max_length=40)["f1"] > 0.1


#: (a file of several tasks, task): how much shorter, and a figure with the least of it
SEVERAL = {
    ("docstrings", "text-classification"): ({"count": 160, "epochs": 2}, "accuracy", 0.2),
    ("docstrings", "text-multi-label"): ({"count": 96, "epochs": 1}, "f1", 0.3),
    ("docstrings", "text-regression"): (
        {"count": 320, "epochs": 2, "lr": 2e-3}, "spearman", 0.1),
    ("docstrings", "pairs"): ({"count": 160, "epochs": 3}, "accuracy", 0.65),
    ("docstrings", "question-answering"): ({"count": 96, "epochs": 1}, "f1", 0.05),
    ("digits", "image-classification"): ({"count": 240, "epochs": 4}, "accuracy", 0.6),
    ("digits", "image-multi-label"): ({"count": 200, "epochs": 4}, "f1", 0.7),
    ("digits", "image-regression"): ({"count": 300, "epochs": 4}, "spearman", 0.6),
    ("digits", "image-embedding"): ({"count": 240, "epochs": 4}, "map_at_r", 0.5),
    ("numerals", "instruction-tuning"): ({"count": 320, "epochs": 10}, "token_accuracy", 0.6),
    ("numerals", "preference-tuning"): ({"count": 160, "epochs": 8}, "accuracy", 0.7),
    ("numerals", "sequence-to-sequence"): ({"count": 320, "epochs": 10}, "token_accuracy", 0.6),
    ("numerals", "masked-instruction-tuning"): (
        {"count": 320, "epochs": 10}, "token_accuracy", 0.25),
    ("numerals", "masked-language-modelling"): (
        {"count": 320, "epochs": 10}, "token_accuracy", 0.1),
    ("measured", "audio-multi-label"): ({"count": 160, "epochs": 6}, "f1", 0.6),
    ("measured", "audio-regression"): ({"count": 160, "epochs": 6}, "spearman", 0.8),
    ("measured", "cloud-multi-label"): ({"count": 160, "epochs": 8}, "f1", 0.6),
    ("measured", "cloud-regression"): ({"count": 160, "epochs": 8}, "spearman", 0.8),
    ("measured", "graph-multi-label"): ({"count": 240, "epochs": 8}, "f1", 0.6),
    ("measured", "graph-regression"): ({"count": 240, "epochs": 8}, "spearman", 0.5),
}


@pytest.mark.parametrize("name, task", SEVERAL)
def test_a_task_of_several(name, task):
    how, figure, least = SEVERAL[name, task]
    assert load(name).main(task, **how)[figure] > least


def test_passages():
    found = load("passages").main(first=400, then=160, epochs=2)
    assert found["perplexity"] < found["base_perplexity"]


def test_dictation():
    assert load("dictation").main(each=140, epochs=16)["wer"] < 0.4


def test_matching():
    assert load("matching").main(each=12, epochs=8)["text_recall_at_1"] > 0.4


def test_shapes():
    assert load("shapes").main(each=24, epochs=8)["loss"] < 0.6


def test_telling():
    assert load("telling").main(each=16, epochs=10)["rouge_l"] > 0.6


def test_marked():
    before, after = load("marked").main(first=20, then=5)
    assert after > before + 0.1


def test_objects():
    assert load("objects").main(each=160, epochs=24)["map_50"] > 0.15


def test_forecast():
    assert load("forecast").main(steps=300, epochs=16)["mae_to_naive"] < 0.5


def test_named():
    assert load("named").main(pictures=50)["dice"] > 0.4


def test_solids():
    assert load("solids").main(each=40, epochs=20)["accuracy"] > 0.6


def test_bonds():
    assert load("bonds").main(many=240, epochs=25)["accuracy"] > 0.8


def test_cells():
    found = load("cells").main(epochs=10)
    assert min(found.values()) > 0.85 and found["lora(rank=4)"] > 0.9


def test_series():
    found = load("series").main(many=1024, few=96, epochs=3, first=2)
    assert max(found.values()) < 1 and found["lora(rank=8)"] < found["linear_probe"]


def test_states():
    module = load("states")
    module.LONG = 24                                 # the scan is a loop of Python's
    found = module.main(first=120, few=64, held=24, epochs=2, files=30)
    assert found["lora(rank=8)"] < found["linear_probe"] < 8


def test_captions():
    found = load("captions").main(each=60, few=6, epochs=3, first=3)
    assert found["lora(rank=8)"] > 1 / 18 and set(found) == set(load("captions").RECIPES)


def test_strokes():
    found = load("strokes").main(many=600, few=75, epochs=3, first=2)
    assert found["lora(rank=8)"] < found["linear_probe"] < 1


def test_penmanship(tmp_path, capsys):
    """Too short to write well: what it learns of scans it must tell, and what diffusers draws with
    what was exported is another picture."""
    found = load("penmanship").main(many=100, steps=30, few=40, epochs=15, each=1,
                                    picture=str(tmp_path / "sheet.png"))
    assert found["error"] < 0.99
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"), np.float32)
    assert sheet.shape == (3 * 64, 10 * 64)
    printed, before, after = np.split(sheet, 3)
    assert abs(before - after).max() > 10 and abs(before - printed).max() > 0
    said = capsys.readouterr().out
    promised, measured = re.search(r"a step: ([0-9,]+) bytes promised, ([0-9,]+)", said).groups()
    assert promised == measured


def test_the_configuration_names_only_known_settings():
    settings = config.read(EXAMPLES / "handwriting.yaml")
    own = {k: settings.pop(k) for k in ("data", "recipe", "output")}
    assert own["data"] == "digits"
    _, args, _ = sort_out(settings)
    assert args["learning_rate"] == 3e-3 and args["num_train_epochs"] == 5


def test_surfaces():
    """A filter on what is known of other surfaces tells more than chance."""
    module = load("surfaces")
    found = module.main(many=70, first=6, epochs=20)
    assert set(found) == set(module.RECIPES)
    assert min(found.values()) > 0.3 and found["point_gst(rank=16, local=8)"] > 0.4


def test_molecules():
    """What changes the blocks tells more than a probe of them."""
    probe, *others = load("molecules").main(many=1200, epochs=40).values()
    assert max(others) > probe > 0.55

