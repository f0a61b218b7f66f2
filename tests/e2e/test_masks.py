"""Semantic segmentation, from folders of pictures and masks to a merged model."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import burnish
from burnish.cli import main
from burnish.testing.scenes import segformer, shapes

pytestmark = pytest.mark.slow

HOW = {"lr": 4e-3, "batch_size": 8, "quiet": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for part in segformer():
        part.save_pretrained(root / "model")
    shapes(root / "data", 48)
    (root / "data" / "classes.txt").write_text("floor\ndisc\nbox\n")
    return root


@pytest.fixture(scope="module")
def runs(folders):
    return {recipe: burnish.fit(str(folders / "model"), str(folders / "data"), recipe, epochs=6,
                                output=folders / f"out-{recipe[:4]}", **HOW)
            for recipe in ("full", "lora(rank=4)")}


@pytest.mark.parametrize("recipe", ["full", "lora(rank=4)"])
def test_shapes_are_learnt_within_the_promise(runs, recipe):
    run = runs[recipe]
    assert run.facts["data"]["task"] == "semantic-segmentation"
    assert run.metrics["validation"]["mean_iou"] > 0.7
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]


@pytest.mark.parametrize("recipe", ["full", "lora(rank=4)"])
def test_a_run_is_opened_again_and_answers_with_a_mask(runs, folders, recipe, capsys, tmp_path):
    run, data = runs[recipe], folders / "data"
    assert main(["predict", str(run.folder), str(data / "images" / "0.jpg"), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    said = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    true = np.asarray(Image.open(data / "masks" / "0.png"))
    assert said.shape == true.shape and (said == true)[true != 255].mean() > 0.9
    assert answer["labels"] == ["floor", "disc", "box"]
    assert answer["shares"]["floor"] == pytest.approx((said == 0).mean())
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["merge", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    merged = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    with torch.no_grad():
        out = merged(**processor(images=Image.open(data / "images" / "0.jpg"),
                                 return_tensors="pt"))
    (mask,) = processor.post_process_semantic_segmentation(out, target_sizes=[said.shape])
    assert (mask.numpy() == said).mean() > 0.999
    assert merged.config.id2label == {0: "floor", 1: "disc", 2: "box"}


def test_a_run_goes_on_bit_for_bit(folders, tmp_path):
    how = HOW | {"max_steps": 6, "save_steps": 3, "measure": False, "report": False,
                 "save_total_limit": 5}
    model, data = str(folders / "model"), str(folders / "data")
    whole = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "a", **how)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    again = burnish.fit(model, data, "lora(rank=4)", output=tmp_path / "b", resume=True, **how)
    for (n, a), (_, b) in zip(whole.tuned.model.state_dict().items(),
                              again.tuned.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), n
