"""fit, and what is done with what it leaves: evaluate, predict, merge, export."""

from __future__ import annotations

import json

import pytest
import torch

from burnish.cli import main
from burnish.fit.assets import GLYPH_VIT

pytestmark = pytest.mark.slow


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run from a configuration file, with overrides."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "c.yaml").write_text(
        f"model: {GLYPH_VIT}\ndata: digits\nrecipe: lora(rank=4)\nmax-steps: 99\nlr: 2.0e-3\n")
    code = main(["fit", str(folder / "c.yaml"), "--max_steps", "12", "--batch-size=32",
                 "--measure", "false", "--report", "false", "--output", str(folder / "out"),
                 "--json"])
    assert code == 0
    return folder / "out"


def test_a_run_leaves_its_facts(finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["recipe"] == "lora(rank=4)" and facts["training"]["max_steps"] == 12
    assert facts["training"]["learning_rate"] == 2e-3


def test_evaluate_beside_the_base(capsys, finished):
    code, out, _ = run(capsys, "evaluate", finished, "digits", "--split", "validation", "--json")
    found = json.loads(out)
    recorded = json.loads((finished / "run.json").read_text())["metrics"]["validation"]
    assert code == 0
    assert found["tuned"]["accuracy"] == pytest.approx(recorded["accuracy"], abs=1e-9)
    assert found["tuned"]["accuracy"] > found["base"]["accuracy"]


def test_an_adapter_that_does_nothing_is_noticed(capsys, finished, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("burnish.Tuned.disabled", lambda self: nullcontext())
    code, _, err = run(capsys, "evaluate", finished, "digits", "--split", "validation")
    assert code == 4 and "changes nothing" in err


def test_predict_pictures(capsys, finished, tmp_path):
    from burnish.fit.data import read

    rows = read("digits", validation=0).train
    for i in range(3):
        rows[i]["image"].save(tmp_path / f"{i}.png")
    code, out, _ = run(capsys, "predict", finished, tmp_path, "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and [a["input"][-5:] for a in answers] == ["0.png", "1.png", "2.png"]
    assert all(a["label"] in "0123456789" and 0 < a["probability"] <= 1 for a in answers)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, out, err = run(capsys, "predict", finished, tmp_path / "bad.png")
    assert code == 2 and "bad.png" in err


def test_merge_proves_itself(capsys, finished, tmp_path):
    from transformers import AutoModelForImageClassification

    from burnish.cli.files import attached, probe

    code, out, _ = run(capsys, "merge", finished, "--output", tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["drift"] < 1e-5
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    tuned, _ = attached(finished, None)
    assert torch.allclose(probe(plain), probe(tuned.model), atol=1e-5)
    code, _, err = run(capsys, "merge", finished, "--output", tmp_path / "n", "--tolerance", "-1")
    assert code == 4 and not (tmp_path / "n").exists() and "nothing was written" in err


def test_inspect_says_what_was_changed_and_draws_it(capsys, finished, tmp_path):
    from burnish.cli.files import attached
    from burnish.engine.updates import updates

    code, out, _ = run(capsys, "inspect", finished, "--json", "--intruders", "--leading", 5,
                       "--likeness", 0.6, "--picture", tmp_path / "i.svg")
    told = json.loads(out)
    tuned, _ = attached(finished, None)
    found = {u.name: u for u in updates(tuned)}
    assert code == 0 and told["weights"].keys() == found.keys() and len(found) > 3
    name, row = next(iter(told["weights"].items()))
    delta, W = found[name].delta().double(), found[name].base().double()
    assert row["change"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-4)
    s = torch.linalg.svdvals(delta)
    assert row["values"] == pytest.approx(s[: len(row["values"])].tolist(), rel=1e-3, abs=1e-6)
    U0, U1 = (torch.linalg.svd(M)[0] for M in (W, W + delta))
    assert row["intruders"] == int(((U0.t() @ U1[:, :5]).abs().amax(0) < 0.6).sum())
    assert told["intruders"] == sum(r["intruders"] for r in told["weights"].values())
    assert (tmp_path / "i.svg").read_text().startswith("<svg")
    code, out, _ = run(capsys, "inspect", finished, "--picture", tmp_path / "s.svg")
    assert code == 0 and name in out and "effective rank" in out and "intruder" not in out
    assert "effective rank" in (tmp_path / "s.svg").read_text()[:400]
    for more, words in ((["--leading", "3"], "add --intruders"),
                        (["--picture", "x.png"], "are SVG"),
                        (["--intruders", "--leading", "0"], "leading >= 1")):
        code, _, err = run(capsys, "inspect", finished, *more)
        assert code == 2 and words in err


def test_dimension_trains_everything_and_then_sizes(capsys, monkeypatch, tmp_path):
    from types import SimpleNamespace

    asked = []

    def fit(**kw):
        asked.append(kw)
        return SimpleNamespace(metrics={"validation": {"loss": 2.0 if len(asked) == 2 else 1.0}},
                               facts={"data": {"task": "image-classification"}})

    monkeypatch.setattr("burnish.fit", fit)
    code, out, _ = run(capsys, "dimension", "--model", GLYPH_VIT, "--data", "digits", "--output",
                       tmp_path / "d", "--least", 4, "--most", 64, "--times", 4, "--share", 0.8,
                       "--beyond", 0, "--halvings", 1, "--metric", "loss", "--picture",
                       tmp_path / "d.svg", "--max_steps", 3, "--batch-size=32", "--json")
    told = json.loads(out)
    assert code == 0 and told == {"dimension": 8, "below": 4, "share": 0.8, "full": -1.0,
                                  "bar": -1.2, "curve": [[4, -2.0], [8, -1.0], [16, -1.0]]}
    names = [("full", "full"), ("said(dimension=4)", "d4"), ("said(dimension=16)", "d16"),
             ("said(dimension=8)", "d8")]
    assert asked == [{"model": str(GLYPH_VIT), "data": "digits", "recipe": recipe, "quiet": True,
                      "output": tmp_path / "d" / name, "max_steps": 3, "batch_size": 32}
                     for recipe, name in names]
    assert (tmp_path / "d.svg").read_text().startswith("<svg")
    code, _, err = run(capsys, "dimension", "--model", GLYPH_VIT, "--data", "digits", "--output",
                       tmp_path / "e", "--picture", "x.png")
    assert code == 2 and "are SVG" in err and len(asked) == 4


@pytest.mark.parametrize("points, last", [
    ([(8, 0.1), (16, 0.9)], "the intrinsic dimension at 90 % is at most 16, and above 8"),
    ([(8, 0.95)], "the intrinsic dimension at 90 % is 8 or less"),
    ([(8, 0.1)], "the intrinsic dimension at 90 % is above 8, the largest size tried")])
def test_dimension_says_what_was_found(points, last, capsys, monkeypatch, tmp_path):
    from types import SimpleNamespace

    scores = {f"said(dimension={d})": p for d, p in points} | {"full": 1.0}
    monkeypatch.setattr("burnish.fit", lambda **kw: SimpleNamespace(
        metrics={"validation": {"accuracy": scores[kw["recipe"]]}},
        facts={"data": {"task": "image-classification"}}))
    code, out, _ = run(capsys, "dimension", "--model", "m", "--data", "d", "--output", tmp_path,
                       "--least", points[0][0], "--most", points[-1][0], "--beyond", 0)
    assert code == 0 and out.rstrip().splitlines()[-1] == last
    assert "all" in out and f"{points[0][1]:.4g}" in out
    monkeypatch.setattr("burnish.fit", lambda **kw: SimpleNamespace(metrics={}))
    code, _, err = run(capsys, "dimension", "--model", "m", "--data", "d", "--output", tmp_path)
    assert code == 2 and "no validation rows" in err


def test_export_opens_in_peft(capsys, finished, tmp_path):
    import peft
    from transformers import AutoModelForImageClassification

    code, out, _ = run(capsys, "export", finished, "--output", tmp_path / "p", "--json")
    assert code == 0
    base = AutoModelForImageClassification.from_pretrained(GLYPH_VIT, num_labels=10,
                                                           ignore_mismatched_sizes=True)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "p")).eval()
    from burnish.cli.files import attached

    pixels = torch.randn(2, 1, 32, 32)
    pixels = pixels.expand(2, base.config.num_channels, 32, 32)
    tuned, _ = attached(finished, None)
    size = base.config.image_size
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size))
    with torch.no_grad():
        assert torch.allclose(model(pixel_values=pixels).logits,
                              tuned.model(pixel_values=pixels).logits, atol=1e-5)


def test_what_is_no_run_is_refused(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv in (["evaluate", tmp_path / "empty", "digits"], ["predict", tmp_path / "no", "x"],
                 ["merge", tmp_path / "empty", "--output", tmp_path / "o"]):
        code, _, err = run(capsys, *argv)
        assert code == 2 and err.count("\n") == 1


def test_an_interrupted_fit_says_what_is_left(capsys, monkeypatch):
    def stop(*args, **kw):
        raise KeyboardInterrupt("stopped after step 3; go on with resume=True")

    monkeypatch.setattr("burnish.fit.run.fit", stop)
    code, _, err = run(capsys, "fit", "--model", "m", "--data", "digits")
    assert code == 130 and "stopped after step 3" in err
