"""Models of sound, from a folder of recordings to a merged model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.testing.sounds import AST, KINDS, WAV2VEC2, WHISPER, made, tones

pytestmark = pytest.mark.slow

HOW = {"lr": 3e-3, "batch_size": 8, "quiet": True}
EPOCHS = {WAV2VEC2: 6, AST: 6, WHISPER: 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a model's folder, and "tones", the recordings."""
    root = tmp_path_factory.mktemp("sounds")
    for kind in KINDS:
        for part in made(kind):
            part.save_pretrained(root / kind)
    tones(root / "tones")
    return root


@pytest.fixture(scope="module")
def runs(folders):
    done = {}

    def run(kind, recipe="full"):
        if (kind, recipe) not in done:
            done[kind, recipe] = burnish.fit(
                str(folders / kind), str(folders / "tones"), recipe, epochs=EPOCHS[kind],
                output=folders / f"out-{kind}-{recipe[:4]}", **HOW)
        return done[kind, recipe]
    return run


@pytest.mark.parametrize("kind, recipe", [(k, "full") for k in KINDS] + [(AST, "lora(rank=4)"),
                                                                       (WAV2VEC2, "lora(rank=4)")])
def test_a_pitch_is_learnt_within_the_promise(runs, kind, recipe):
    run = runs(kind, recipe)
    assert run.facts["data"]["task"] == "audio-classification"
    assert run.metrics["validation"]["accuracy"] >= (0.8 if recipe == "full" else 0.5)
    assert run.promise.peak_bytes == run.truth.peak_bytes
    for name in ("evaluate", "load"):
        moment = run.facts["memory"]["moments"][name]
        assert moment["promised"] == moment["measured"], name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_opened_again_answers_and_merges(runs, folders, kind, capsys, tmp_path):
    run, low = runs(kind), str(folders / "tones" / "low")
    assert main(["predict", str(run.folder), low, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 30 and sum(a["label"] == "low" for a in answers) > 20
    assert main(["evaluate", str(run.folder), str(folders / "tones"), "--json",
                 "--batch", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"]["accuracy"] == run.metrics["validation"]["accuracy"]
    assert found["tuned"]["loss"] == pytest.approx(run.metrics["validation"]["loss"], abs=1e-6)
    assert main(["merge", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    merged = AutoModelForAudioClassification.from_pretrained(tmp_path / "merged").eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "merged")
    from burnish.fit.sounds import heard

    x = heard(f"{low}/0.wav", 16000)
    with torch.no_grad():
        said = merged(**extractor(x, sampling_rate=16000, return_tensors="pt")).logits.softmax(-1)
    first = next(a for a in answers if a["input"].endswith("low/0.wav"))
    assert merged.config.id2label[int(said.argmax())] == first["label"]
    assert float(said.max()) == pytest.approx(first["probability"], abs=1e-5)


def test_what_is_no_sound_is_named(runs, capsys, tmp_path):
    run = runs(AST)
    assert main(["predict", str(run.folder), str(tmp_path / "nowhere.wav")]) == 2
    assert "there is no sound at" in capsys.readouterr().err
    (tmp_path / "words.wav").write_bytes(b"words")
    assert main(["predict", str(run.folder), str(tmp_path / "words.wav")]) == 2
    assert "words.wav: the sound cannot be read" in capsys.readouterr().err


def test_a_run_goes_on_bit_for_bit_with_masks_and_dropout(folders, tmp_path):
    """numpy draws the masks of wav2vec2, torch its dropout: both go on where they stood."""
    how = HOW | {"max_steps": 8, "save_steps": 4, "measure": False, "report": False,
                 "save_total_limit": 5}
    model, data = str(folders / WAV2VEC2), str(folders / "tones")
    whole = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "a", **how)
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    again = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "b", resume=True, **how)
    for (n, a), (_, b) in zip(whole.tuned.model.named_parameters(),
                              again.tuned.model.named_parameters(), strict=True):
        assert torch.equal(a, b), n
