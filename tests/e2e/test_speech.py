"""Speech recognition, from recordings and a metadata.csv to a merged model that spells."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.testing.sounds import CTC, made, spelt

pytestmark = pytest.mark.slow

HOW = {"lr": 6e-3, "batch_size": 16, "quiet": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    for part in made(CTC):
        part.save_pretrained(root / "model")
    spelt(root / "data", 120)
    return root


@pytest.fixture(scope="module")
def run(folders):
    return burnish.fit(str(folders / "model"), str(folders / "data"), "full", epochs=14,
                       output=folders / "out", **HOW)


def test_letters_are_learnt_within_the_promise(run):
    assert run.facts["data"]["task"] == "speech-recognition"
    assert run.metrics["validation"]["wer"] < 0.3 and run.metrics["validation"]["cer"] < 0.1
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert "vocab_size=8, ignore_mismatched_sizes=True" in (run.folder / "README.md").read_text()


def test_a_run_is_opened_again_writes_and_merges(run, folders, capsys, tmp_path):
    data = folders / "data"
    with open(data / "metadata.csv") as f:
        said = {r["file_name"]: r["transcription"] for r in csv.DictReader(f)}
    assert main(["predict", str(run.folder), str(data), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    right = sum(a["text"] == said[a["input"].rpartition("/")[2]] for a in answers)
    assert len(answers) == 120 and right > 100
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["merge", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

    from burnish.fit.sounds import heard

    merged = AutoModelForCTC.from_pretrained(tmp_path / "merged").eval()
    extractor, tokenizer = (k.from_pretrained(tmp_path / "merged")
                            for k in (AutoFeatureExtractor, AutoTokenizer))
    with torch.no_grad():
        x = heard(data / "0.wav", 16000)
        logits = merged(**extractor(x, sampling_rate=16000, return_tensors="pt")).logits
    first = next(a for a in answers if a["input"].endswith("/0.wav"))
    assert tokenizer.decode(logits[0].argmax(-1).tolist()).strip() == first["text"]


def test_a_run_goes_on_bit_for_bit(folders, tmp_path):
    how = HOW | {"max_steps": 4, "save_steps": 2, "measure": False, "report": False,
                 "save_total_limit": 5}
    model, data = str(folders / "model"), str(folders / "data")
    whole = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "a", **how)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "b", resume=True, **how)
    for (n, a), (_, b) in zip(whole.tuned.model.named_parameters(),
                              again.tuned.model.named_parameters(), strict=True):
        assert torch.equal(a, b), n
