"""Denoisers: the noise from its equation, layouts, refusals, and whole runs of a pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError
from burnish.fit.data import read
from burnish.fit.pipelines import Pipeline
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.pipelines import CLASSES, DIT, PIXELS, STEPS, pipeline, shapes


def made(folder, kind=CLASSES, tells="epsilon", each=2, validation=0, **how):
    pipeline(kind, tells).save_pretrained(folder / "pipe")
    data = read(shapes(folder / "shapes", each), task="image-generation", validation=validation)
    task = task_for(data, str(folder / "pipe"), **how)
    return task, task.load(str(folder / "pipe"))


def channels(image):
    return torch.tensor(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1)


# -- the noise -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tells", ["epsilon", "v_prediction", "sample"])
def test_what_is_told_is_its_equation(tmp_path, tells):
    task, model = made(tmp_path, tells=tells)
    betas = torch.linspace(0.005, 0.3, STEPS, dtype=torch.float64)
    rows, seen = task.rows("train"), set()
    for i in range(3 * len(rows)):
        row = rows[i]
        t = int(row["timestep"])
        a = float(torch.prod(1 - betas[:t + 1]))
        image = task.data.train[i % len(rows)]["image"]
        x = channels(image) / 127.5 - 1
        noise = (row["sample"] - a ** 0.5 * x) / (1 - a) ** 0.5
        assert abs(noise.mean()) < 0.2 and 0.85 < noise.std() < 1.15
        want, weight = {"epsilon": (noise, 1.0), "sample": (x, a / (1 - a)),
                        "v_prediction": (a ** 0.5 * noise - (1 - a) ** 0.5 * x, 1.0)}[tells]
        assert torch.allclose(row["target"], want, atol=1e-4)
        assert row["weight"].item() == pytest.approx(weight, rel=1e-4)
        seen.add(t)
    assert len(seen) > 8
    batch = task.collate([rows[i] for i in range(4)])
    with torch.no_grad():
        out = model.eval()(**task.feed(batch))
        off = (out.sample - batch["target"]).square().mean((1, 2, 3))
    assert task.loss(out, (batch["target"], batch["weight"])).item() == pytest.approx(
        (off * batch["weight"]).mean().item(), rel=1e-5)


def test_training_draws_anew_and_evaluation_looks_at_the_same(tmp_path):
    task, model = made(tmp_path, each=4, validation=0.25)
    rows = task.rows("train")
    assert rows.redrawn and not torch.equal(rows[0]["sample"], rows[len(rows)]["sample"])
    assert torch.equal(rows[0]["sample"], rows[0]["sample"])
    held = task.rows("validation")
    assert len(held) == 4 * len(task.data.validation)
    assert [int(held[i]["timestep"]) // (STEPS // 4) for i in range(8)] == [0, 1, 2, 3] * 2
    first = evaluate(model, task, "validation", 5)
    again = task.on(task.data, model)
    assert evaluate(model, again, "validation", 12) == pytest.approx(first, rel=1e-5)
    assert first["loss"] == pytest.approx(sum(first[f"loss_{k}_of_4"] for k in range(1, 5)) / 4)


def test_latents_are_the_coders_own(tmp_path):
    from diffusers import AutoencoderKL

    task, _ = made(tmp_path, DIT)
    coder = AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    clean = channels(task.data.train[1]["image"])[None]
    with torch.no_grad():
        there = coder.encode(clean / 127.5 - 1).latent_dist
    found = task.rows("train").drawn.__self__
    assert torch.allclose(found.middle[1], there.mean[0] * coder.config.scaling_factor, atol=1e-5)
    assert torch.allclose(found.spread[1], there.std[0] * coder.config.scaling_factor, atol=1e-5)
    assert task.rows("train")[0]["hidden_states"].shape == (4, 8, 8)


# -- layouts and refusals --------------------------------------------------------------------------
def test_classes_are_the_pipelines_or_in_order(tmp_path):
    task, _ = made(tmp_path, DIT)
    assert task.numbers == [0, 1, 2] and task.data.labels == ("box", "cross", "disc")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()),
                                 "id2label": {"2": "box, case", "0": "cross", "1": "disc"}}))
    task = task_for(task.data, str(tmp_path / "pipe"))
    task.load(str(tmp_path / "pipe"))
    assert task.numbers == [2, 0, 1]
    assert task.rows("train")[0]["class_labels"].item() == 2


def test_a_bare_folder_of_pictures_is_learnt_without_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = read(tmp_path, task="image-generation", validation=0)
    assert data.train.column_names == ["image"] and data.layout == "pictures"


def test_what_cannot_be_learnt_is_refused(tmp_path):
    made(tmp_path)
    pipe, photos = tmp_path / "pipe", tmp_path / "flat"
    photos.mkdir()
    for k in range(12):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(photos / f"{k}.png")
    how = {"output": tmp_path / "out", "quiet": True}

    def refused(text, data=tmp_path / "shapes", **more):
        with pytest.raises(ConfigError, match=text):
            burnish.fit(str(pipe), str(data), "lora(rank=2)", **how, **more)

    refused("makes pictures of 3 classes, and the data has none: put the pictures", photos)
    refused("is a pipeline of diffusers with a unet, and image-classification is not for it; fit "
            "can train it for image-generation", task="image-classification")
    index = pipe / "model_index.json"
    kept = index.read_text()
    index.write_text(json.dumps({**json.loads(kept), "text_encoder": ["transformers", "T"]}))
    refused("fit serves no task of it yet")
    index.write_text(kept)
    config = pipe / "scheduler" / "scheduler_config.json"
    was = config.read_text()
    config.write_text(json.dumps({**json.loads(was), "prediction_type": "flow_prediction"}))
    refused("DDPMScheduler has prediction_type 'flow_prediction'; fit learns epsilon, v_pred")
    index.write_text(json.dumps({**json.loads(kept), "scheduler": [
        "diffusers", "KarrasVeScheduler"]}))
    config.write_text("{}")
    refused("KarrasVeScheduler says no prediction_type")
    config.write_text(was)
    index.write_text(json.dumps({k: v for k, v in json.loads(kept).items() if k != "unet"}))
    refused("DDPMPipeline without a denoiser: expected unet or transformer")
    with pytest.raises(ConfigError, match="takes the folder of a pipeline of diffusers"):
        task_for(read(photos, task="image-generation", validation=0), "somebody/model")


def test_diffusers_is_asked_for_where_it_lacks(tmp_path, monkeypatch):
    import sys

    made(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="pip install diffusers"):
        Pipeline(tmp_path / "pipe").schedule()


# -- whole runs ------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", [PIXELS, CLASSES, DIT])
def test_pictures_are_learnt_within_the_promise(tmp_path, kind, capsys):
    from diffusers import DiffusionPipeline

    pipeline(kind).save_pretrained(tmp_path / "pipe")
    data = shapes(tmp_path / "shapes", 8)
    run = burnish.fit(str(tmp_path / "pipe"), str(data), "lora(rank=4)", output=tmp_path / "out",
                      lr=1e-2, epochs=10, batch_size=6, quiet=True, samples=1)
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], rel=1e-4)
    assert found["tuned"]["loss"] < 0.9 * found["base"]["loss"]
    asked = "3" if kind == PIXELS else "disc"
    assert main(["predict", str(run.folder), asked, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    drawn = Image.open(answer["picture"])
    assert drawn.size == (16, 16) and (run.folder / "pictures").is_dir()
    assert main(["predict", str(run.folder), "a zebra"]) == 2

    # the same picture by the pipeline's own sampler with what was learnt
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.components.get("unet") or pipe.components["transformer"]
    burnish.load(denoiser, run.folder)
    g = torch.Generator().manual_seed(3 if kind == PIXELS else 42)
    if kind == CLASSES:
        x = torch.randn((1, 3, 16, 16), generator=g)
        pipe.scheduler.set_timesteps(STEPS)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                told = denoiser(x, t, class_labels=torch.tensor([2])).sample
                x = pipe.scheduler.step(told, t, x, generator=g).prev_sample
        made = pipe.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())[0]
    else:
        how = {} if kind == PIXELS else {"class_labels": [2], "guidance_scale": 1.0}
        made = pipe(**how, num_inference_steps=STEPS, generator=g).images[0]
    off = channels(made) - channels(drawn)
    assert off.abs().max() <= 1
