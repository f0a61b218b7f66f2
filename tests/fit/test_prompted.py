"""Pictures of what a text says: conditions and noise from their equations, layouts, refusals, and
whole runs of a pipeline of each family."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import burnish
from burnish.cli import main
from burnish.core.errors import BurnishError, ConfigError, DataError, FormatError
from burnish.fit.data import read
from burnish.fit.schedules import Flow, Schedule
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.pipelines import (
    PROMPTED,
    SD,
    SD3,
    SDXL,
    STEPS,
    TOKENS,
    described,
    prompted,
    shapes,
)

LONG = "a very tall grey box beside a disc"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """kind -> the folder of a pipeline of it."""
    root = tmp_path_factory.mktemp("pipes")
    for kind in PROMPTED:
        prompted(kind).save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return described(tmp_path_factory.mktemp("data") / "rows", 3)


def made(pipe, data, validation=0, **how):
    task = task_for(read(data, task="text-to-image", validation=validation), str(pipe), **how)
    return task, task.load(str(pipe))


def refused(kind, text, *args, **how):
    with pytest.raises(kind, match=text):
        made(*args, **how)[0].rows("train")


# -- what is told of a text ------------------------------------------------------------------------
def spoken(pipe, text, layer, which=""):
    """A text encoder's states at a layer, and its pooled answer, of a text as it stands."""
    ids = [52, *_letters(text), 53]
    ids = torch.tensor([ids + [53] * (TOKENS - len(ids))])
    with torch.no_grad():
        out = getattr(pipe, f"text_encoder{which}")(ids, output_hidden_states=True)
    return (out.last_hidden_state if layer is None else out.hidden_states[layer])[0], out[0][0]


def _letters(text):
    """Letter by letter; the last of a word is another token."""
    out = []
    for word in text.split():
        codes = [ord(c) - ord("a") for c in word]
        out += codes[:-1] + [codes[-1] + 26]
    return out


@pytest.mark.parametrize("kind", PROMPTED)
def test_conditions_are_the_encoders_states(pipes, data, kind):
    task, _ = made(pipes / kind, data, proportion_empty_prompts=0.5)
    pipe, rows = prompted(kind), task.rows("train")
    task.conditions.ask(["a grey box", ""])
    for text in ("a grey box", ""):
        told = task.conditions.known[text]
        if kind == SD:
            want = {"encoder_hidden_states": spoken(pipe, text, None)[0]}
        else:
            (a, p), (b, q) = spoken(pipe, text, -2), spoken(pipe, text, -2, "_2")
            want = {"encoder_hidden_states": torch.cat([a, b], -1), "text_embeds": q}
            if kind == SD3:                  # side by side, then the places of a T5 that is none
                states = torch.zeros(TOKENS + 256, 48)
                states[:TOKENS] = want["encoder_hidden_states"]
                want = {"encoder_hidden_states": states, "pooled_projections": torch.cat([p, q])}
            elif text == "":                 # SDXL is told noughts where it is told nothing
                want = {k: torch.zeros_like(v) for k, v in want.items()}
        assert told.keys() == want.keys()
        for name, value in want.items():
            assert told[name].shape == value.shape
            assert torch.allclose(told[name], value, atol=1e-5), (text, name)
    # rows are told their own text, or nothing
    texts = task.data.train["text"]
    for i in range(40):
        states = rows[i]["encoder_hidden_states"]
        mine, nothing = (task.conditions.known[t]["encoder_hidden_states"]
                         for t in (texts[i % len(rows)], ""))
        assert states.equal(mine) or states.equal(nothing)


def test_texts_are_left_out_as_often_as_is_asked_and_never_in_evaluation(pipes, data):
    task, _ = made(pipes / SD, data, validation=4, proportion_empty_prompts=0.25)
    rows, held = task.rows("train"), task.rows("validation")
    nothing = task.conditions.known[""]["encoder_hidden_states"]
    gone = [rows[i]["encoder_hidden_states"].equal(nothing) for i in range(800)]
    assert 0.2 < sum(gone) / len(gone) < 0.3
    assert gone[:9] == [rows[i]["encoder_hidden_states"].equal(nothing) for i in range(9)]
    assert not any(held[i]["encoder_hidden_states"].equal(nothing) for i in range(len(held)))
    whole, _ = made(pipes / SD, data)
    assert not any(whole.rows("train")[i]["encoder_hidden_states"].equal(nothing)
                   for i in range(200))


def test_sdxl_is_told_how_large_a_picture_was_and_where_it_is_cut(pipes, tmp_path):
    Image.new("RGB", (40, 20), (90, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 36), (90, 0, 0)).save(tmp_path / "b.png")
    task, _ = made(pipes / SDXL, tmp_path, instance_prompt="a box")
    rows = task.rows("train")
    assert rows[0]["time_ids"].tolist() == [20, 40, 0, 8, 16, 16]      # 40 x 20 becomes 32 x 16
    assert rows[1]["time_ids"].tolist() == [36, 16, 10, 0, 16, 16]
    batch = task.collate([rows[0], rows[1]])
    given = task.feed(batch)["added_cond_kwargs"]
    assert set(given) == {"text_embeds", "time_ids"} and given["time_ids"].shape == (2, 6)


# -- the noise -------------------------------------------------------------------------------------
def test_a_flow_is_its_equation(pipes, data):
    task, model = made(pipes / SD3, data)
    rows, seen = task.rows("train"), set()
    latents = rows.drawn.__self__
    latents.spread = None                                    # the picture is its middle then
    for i in range(60):
        row = rows[i]
        time = float(row["timestep"])
        u = next(u / STEPS for u in range(1, STEPS + 1)       # shift 3 of a share u of the steps
                 if abs(STEPS * 3 * (u / STEPS) / (1 + 2 * u / STEPS) - time) < 1e-3)
        s = 3 * u / (1 + 2 * u)
        x = latents.middle[i % len(rows)]
        noise = (row["hidden_states"] - (1 - s) * x) / s
        assert torch.allclose(row["target"], noise - x, atol=1e-4) and row["weight"] == 1
        assert 0.7 < noise.std() < 1.3
        seen.add(time)
    assert len(seen) > 10
    coder = prompted(SD3).vae
    clean = torch.tensor(np.asarray(task.data.train[0]["image"], np.float32)).permute(2, 0, 1)
    with torch.no_grad():
        there = coder.encode(clean[None] / 127.5 - 1).latent_dist.mean[0]
    assert torch.allclose(latents.middle[0], (there - 0.06) * 1.5, atol=1e-5)


@pytest.mark.parametrize("tells", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_the_same_weight_of_the_pictures_error(tells):
    """Of every way of telling: a slip of the picture by d costs ``min(s, gamma) |d|^2``."""
    kept = torch.linspace(0.999, 0.001, 30, dtype=torch.float64)
    schedule, g = Schedule(kept, tells), torch.Generator().manual_seed(0)
    x, e, d = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    for t in range(30):
        a = float(kept[t])
        s = a / (1 - a)
        there, target, weight = schedule.at(x, e, t, 5.0)
        # what would be told by who takes x + d for the picture
        noise = (there - a ** 0.5 * (x + d)) / (1 - a) ** 0.5
        said = {"epsilon": noise, "sample": x + d,
                "v_prediction": a ** 0.5 * noise - (1 - a) ** 0.5 * (x + d)}[tells]
        cost = weight * (said - target).square().sum()
        assert cost.item() == pytest.approx(min(s, 5.0) * d.square().sum().item(), rel=1e-9)
    assert schedule.at(x, e, 3)[2] == (kept[3] / (1 - kept[3]) if tells == "sample" else 1)
    if tells == "epsilon":                       # pure noise: told as ever
        assert Schedule(torch.tensor([0.0]), tells).at(x, e, 0, 5.0)[2] == 1


def test_evaluation_is_of_plain_weights(pipes, data):
    task, model = made(pipes / SD, data, validation=4, snr_gamma=0.5)
    plain, _ = made(pipes / SD, data, validation=4)
    assert {float(task.rows("validation")[i]["weight"]) for i in range(16)} == {1.0}
    assert min(float(task.rows("train")[i]["weight"]) for i in range(40)) < 0.5
    assert evaluate(model, task, "validation") == evaluate(model, plain, "validation")


@pytest.mark.parametrize("kind", PROMPTED)
def test_the_loss_is_that_of_the_denoiser_told_by_hand(pipes, data, kind):
    task, model = made(pipes / kind, data)
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(4)])
    given, loss = task.call(batch, plain=True)
    pipe = prompted(kind)
    with torch.no_grad():
        mine = loss(model.eval()(**given[0]), given)
        if kind == SD3:
            said = pipe.transformer.eval()(
                hidden_states=batch["hidden_states"], timestep=batch["timestep"],
                encoder_hidden_states=batch["encoder_hidden_states"],
                pooled_projections=batch["pooled_projections"]).sample
        else:
            added = {"added_cond_kwargs": {k: batch[k] for k in ("text_embeds", "time_ids")}} \
                if kind == SDXL else {}
            said = pipe.unet.eval()(batch["sample"], batch["timestep"],
                                    batch["encoder_hidden_states"], **added).sample
    want = (said.double() - batch["target"].double()).square().flatten(1).mean(1).mean()
    assert mine.item() == pytest.approx(want.item(), rel=1e-6)
    other = batch | {"encoder_hidden_states": batch["encoder_hidden_states"] + 1}
    with torch.no_grad():
        assert not torch.isclose(loss(model(**task.feed(other)), given), mine, rtol=1e-4)


def test_the_time_of_a_step_is_not_rounded_with_the_model(pipes, data):
    task = task_for(read(data, task="text-to-image", validation=0), str(pipes / SD3))
    task.load(str(pipes / SD3), dtype="bf16")
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(4)])
    assert batch["hidden_states"].dtype == batch["encoder_hidden_states"].dtype == torch.bfloat16
    assert batch["timestep"].dtype == batch["target"].dtype == torch.float32


# -- layouts ---------------------------------------------------------------------------------------
def pictures(folder, names="abc"):
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        Image.new("RGB", (16, 16), (40 * k, 0, 0)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "description"])
def test_captions_stand_in_a_table_of_metadata(pipes, tmp_path, column):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        f"file_name,{column}\na.png,a box\nb.png,a disc\nc.png,a box\n")
    task, _ = made(pipes / SD, tmp_path)
    assert task.texts(task.data.train) == ["a box", "a disc", "a box"]
    assert set(task.rows("train") and task.conditions.known) == {"a box", "a disc", ""}


def test_captions_stand_beside_pictures_or_are_one_for_all(pipes, tmp_path):
    one = made(pipes / SD, pictures(tmp_path / "x"), instance_prompt="a photo of sks dog")[0]
    assert one.texts(one.data.train) == ["a photo of sks dog"] * 3
    assert one.posed({"image": None}) == {"text": "a photo of sks dog"}
    for name in "abc":
        (tmp_path / "x" / f"{name}.txt").write_text(f"a {name}\n")
    beside = made(pipes / SD, tmp_path / "x")[0]
    assert beside.texts(beside.data.train) == ["a a", "a b", "a c"]
    refused(ConfigError, "the data has a text for each; leave it out", pipes / SD, tmp_path / "x",
            instance_prompt="a dog")
    (tmp_path / "x" / "a.txt").unlink()
    refused(DataError, r"a.png has no a.txt beside it, and b.png has one", pipes / SD,
            tmp_path / "x")


def test_rows_that_cannot_be_learnt_are_named(pipes, tmp_path):
    folder, pipe = pictures(tmp_path / "x"), pipes / SD
    refused(ConfigError, "reads a text for each picture, and the train split has none", pipe,
            folder)
    refused(ConfigError, "instance_prompt is empty", pipe, folder, instance_prompt=" ")
    table = folder / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.png"}\n')
    refused(DataError, "metadata.jsonl, line 2, field 'text': expected text, it is missing", pipe,
            folder)
    table.write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.png", "text": ""}\n')
    refused(DataError, "line 2, field 'text': the text is empty", pipe, folder)
    table.write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "z.png", "text": "b"}\n')
    refused(DataError, "z.png", pipe, folder)
    table.write_text('{"file_name": "a.png", "text": "a"}\n{"file_name": "b.png", "text": "b"}\n')
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:len(whole) // 2])             # cut in the middle
    refused(DataError, "b.png.*cannot be read|line 2: the picture cannot be read", pipe, folder)


def test_a_text_that_is_cut_is_told(pipes, tmp_path):
    for kind in PROMPTED:
        task, _ = made(pipes / kind, pictures(tmp_path / kind), instance_prompt=LONG)
        task.rows("train")
        assert any(f"3 of 3 texts of the train split are longer than the {TOKENS} tokens" in n
                   and "such as 'a very tall" in n for n in task.notes), task.notes
    task, _ = made(pipes / SD, tmp_path / SD, instance_prompt="a box")
    task.rows("train")
    assert not any("longer" in n for n in task.notes)


# -- refusals --------------------------------------------------------------------------------------
def test_settings_that_cannot_act_are_refused(pipes, data):
    for kind, text, how in (
            (SD, "draws in 19 steps at most", {"num_inference_steps": 20}),
            (SD3, "draws in 20 steps at most", {"num_inference_steps": 21}),
            (SD, "sides are multiples of 4; the nearest is 16", {"resolution": 18}),
            (SD3, "has places for 8 x 8 patches, which would be 10 x 10", {"resolution": 40}),
            (SD3, "snr_gamma=5 weighs steps by signal over noise", {"snr_gamma": 5.0}),
            (SD, "max_length=5: text-to-image has no length", {"max_length": 5}),
            (SD, "shots=2 is a setting of instruction-tuning", {"shots": 2})):
        refused(ConfigError, text, pipes / kind, data, **how)
    task, model = made(pipes / SD, data, resolution=32)
    assert task.rows("train")[0]["sample"].shape == (4, 16, 16)
    with pytest.raises(ConfigError, match="proportion_empty_prompts=1.5: expected 1 or less"):
        burnish.fit(str(pipes / SD), str(data), proportion_empty_prompts=1.5)
    with pytest.raises(ConfigError, match="tokens='3' says how a picture is drawn"):
        task.draws(tokens="3")


def test_pipelines_that_are_not_whole_or_are_others_are_refused(pipes, data, tmp_path):
    pipe = shutil.copytree(pipes / SD, tmp_path / "pipe")
    index = pipe / "model_index.json"
    was = json.loads(index.read_text())

    def say(**more):
        index.write_text(json.dumps({**was, **more}))

    shutil.move(pipe / "tokenizer", tmp_path / "away")
    refused(ConfigError, r"lacks the folder tokenizer/ \(CLIPTokenizer\)", pipe, data)
    shutil.move(tmp_path / "away", pipe / "tokenizer")
    weights = pipe / "text_encoder" / "model.safetensors"
    weights.rename(pipe / "text_encoder" / "pytorch_model.bin")
    refused(FormatError, "pickled weights are not opened", pipe, data)
    (pipe / "text_encoder" / "pytorch_model.bin").rename(weights)
    say(text_encoder=["my_code", "Reader"])
    refused(ConfigError, "text_encoder is Reader of my_code; parts of diffusers and transformers",
            pipe, data)
    say(_class_name="PixArtAlphaPipeline")
    with pytest.raises(ConfigError, match="fit serves no task of it yet .of pipelines that read "
                                          "texts: StableDiffusionPipeline, "):
        burnish.fit(str(pipe), str(data), output=tmp_path / "out", quiet=True)
    say()
    config = pipe / "unet" / "config.json"
    kept = json.loads(config.read_text())
    config.write_text(json.dumps({**kept, "time_cond_proj_dim": 8}))
    with pytest.raises(BurnishError, match="time_cond_proj_dim"):
        task_for(read(data, task="text-to-image", validation=0), str(pipe)).blank(str(pipe))
    config.write_text(json.dumps({**kept, "in_channels": 9}))
    with pytest.raises(ConfigError, match="reads 9 channels and the vae makes 4"):
        task_for(read(data, task="text-to-image", validation=0), str(pipe)).blank(str(pipe))
    config.write_text(json.dumps(kept))
    scheduler = pipe / "scheduler" / "scheduler_config.json"
    say(scheduler=["diffusers", "EDMEulerScheduler"])
    scheduler.write_text("{}")
    refused(ConfigError, "EDMEulerScheduler has no variance-preserving schedule", pipe, data)
    say(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    scheduler.write_text('{"invert_sigmas": true}')
    refused(ConfigError, "invert_sigmas=True", pipe, data)
    with pytest.raises(ConfigError, match="image-generation is not for it; fit can train it for "
                                          "text-to-image"):
        burnish.fit(str(pipes / SD), str(data), task="image-generation", output=tmp_path / "out")


def test_a_pipeline_with_a_safety_checker_is_whole(data, tmp_path):
    """Its index names a module of diffusers for the checker; pickled, it is refused beforehand."""
    import transformers as t
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    from burnish.testing.pipelines import SIDE

    body = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(t.CLIPConfig(
        text_config=body, vision_config={**body, "image_size": SIDE, "patch_size": 8},
        projection_dim=8))
    checker.concept_embeds_weights.data.fill_(2.0)           # nothing is like anything
    checker.special_care_embeds_weights.data.fill_(2.0)
    pipe = prompted(SD)
    pipe.register_modules(safety_checker=checker, feature_extractor=t.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}))
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["safety_checker"][0] == "stable_diffusion"
    task, model = made(tmp_path / "pipe", data, num_inference_steps=2)
    task.folder = tmp_path
    drawn = Image.open(task.answer(model.eval(), {"text": "a box"}, 0)["picture"])
    assert np.asarray(drawn).max() > 0                         # it is black where one is found
    weights = tmp_path / "pipe" / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused(FormatError, "pickled weights are not opened", tmp_path / "pipe", data)


def test_a_flow_of_no_texts_is_learnt_too(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from burnish.testing.pipelines import PIXELS, pipeline

    pipe = pipeline(PIXELS)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
    pipe.register_modules(scheduler=pipe.scheduler)
    pipe.save_pretrained(tmp_path / "pipe")
    task = task_for(read(shapes(tmp_path / "data", 2), task="image-generation", validation=0),
                    str(tmp_path / "pipe"))
    assert isinstance(task.schedule, Flow)
    model = task.load(str(tmp_path / "pipe"))
    task.folder = tmp_path
    assert Image.open(task.answer(model.eval(), {"label": "3"}, 0)["picture"]).size == (16, 16)


# -- whole runs ------------------------------------------------------------------------------------
def channels(image):
    return torch.tensor(np.asarray(image.convert("RGB"), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPTED)
def test_texts_are_learnt_within_the_promise(pipes, tmp_path, kind, capsys):
    import transformers
    from diffusers import AutoencoderKL, DiffusionPipeline

    class Alone(transformers.TrainerCallback):
        """While it trains there is no part of the pipeline beside the denoiser."""

        def on_step_begin(self, args, state, control, **kw):
            if state.global_step in (0, 10):                 # before an evaluation, and after one
                gc.collect()
                seen.append(parts())

    def parts():
        kinds = (AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer,
                 transformers.CLIPTextModelWithProjection)
        return sum(type(o) in kinds for o in gc.get_objects())

    gc.collect()
    there, seen = parts(), []                                # what other tests hold
    data = described(tmp_path / "data", 8)
    run = burnish.fit(str(pipes / kind), str(data), "lora(rank=4)", output=tmp_path / "out",
                      lr=1e-2, epochs=5, batch_size=6, quiet=True, samples=2, eval_steps=10,
                      save_steps=10, eval_strategy="steps", save_strategy="steps",
                      proportion_empty_prompts=0.1, callbacks=[Alone()])
    assert run.facts["data"]["task"] == "text-to-image"
    assert seen == [there] * 2
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], rel=1e-4)
    assert found["tuned"]["loss"] < 0.95 * found["base"]["loss"]
    # what it drew before and after is on the page
    drawn = run.facts["drawn"]
    assert [d["asked"] for d in drawn] and all(d["asked"].startswith("a grey") for d in drawn)
    assert channels(Image.open(drawn[0]["base"])).ne(channels(Image.open(drawn[0]["tuned"]))).any()
    assert "What it draws, before and after" in (run.folder / "report.html").read_text()

    # the same picture by the pipeline itself with what was learnt
    asked = ["predict", str(run.folder), "a grey disc", "--seed", "7", "--guidance_scale", "40",
             "--num_inference_steps", "9", "--json"]
    assert main(asked) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    mine = Image.open(answer["picture"])
    pipe = DiffusionPipeline.from_pretrained(pipes / kind, **(
        {"text_encoder_3": None, "tokenizer_3": None} if kind == SD3 else {}))
    pipe.set_progress_bar_config(disable=True)
    burnish.load(pipe.components.get("unet") or pipe.components["transformer"], run.folder)
    how = {"prompt": "a grey disc", "height": 16, "width": 16}

    def theirs(seed=7, scale=40.0, steps=9):
        return channels(pipe(**how, guidance_scale=scale, num_inference_steps=steps,
                             generator=torch.Generator().manual_seed(seed)).images[0])

    assert mine.size == (16, 16) and (channels(mine) - theirs()).abs().max() <= 1
    for other in (theirs(seed=8), theirs(scale=1.0), theirs(steps=4)):
        assert (channels(mine) - other).abs().max() > 1
    assert main(["predict", str(run.folder), "a disc", "--num_inference_steps", "21"]) == 2
    assert "steps at most" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SD, SD3])
def test_a_run_goes_to_diffusers_as_a_lora_or_as_a_pipeline(pipes, data, tmp_path, capsys, kind):
    from diffusers import DiffusionPipeline

    run = burnish.fit(str(pipes / kind), str(data), "lora(rank=2)", output=tmp_path / "out",
                      max_steps=3, lr=0.1, batch_size=3, quiet=True, report=False, measure=False)
    (tmp_path / "pipe").mkdir()
    base = shutil.copytree(pipes / kind, tmp_path / "pipe" / "base")
    (base / "vae" / "old.bin").write_bytes(b"x")              # no pickle goes along
    out, whole, lora = (str(tmp_path / n) for n in ("out", "whole", "lora"))
    assert main(["merge", out, "--output", whole, "--base", str(base)]) == 0
    capsys.readouterr()
    assert main(["export", out, "--output", lora, "--for", "diffusers", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["commands"][1] == f"pipe.load_lora_weights({lora!r})" and told["rank"] == 2
    assert not (tmp_path / "whole" / "vae" / "old.bin").exists()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("path/to/this/folder")' in card
    assert "burnish.load" not in card
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == SD3 else {}

    def drawn(folder, *beside):
        pipe = DiffusionPipeline.from_pretrained(folder, **absent)
        pipe.set_progress_bar_config(disable=True)
        for one in beside:
            pipe.load_lora_weights(one)
        return torch.tensor(pipe("a grey box", num_inference_steps=5, output_type="np", height=16,
                                 width=16, generator=torch.Generator().manual_seed(2)).images[0])

    plain, by_lora = drawn(pipes / kind), drawn(pipes / kind, lora)
    assert (plain - by_lora).abs().max() > 0.01
    assert torch.allclose(drawn(whole), by_lora, atol=1e-3)
    assert main(["predict", str(run.folder), "a grey box", "--seed", "2", "--num_inference_steps",
                 "5", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    off = channels(Image.open(answer["picture"])) - by_lora * 255
    assert off.abs().max() < 1.1
    # a pipeline that was merged is one to begin from
    assert task_for(read(data, task="text-to-image", validation=0), whole).blank(whole) is not None
    assert main(["export", out, "--output", str(tmp_path / "served"), "--for", "vllm"]) == 2
    assert main(["export", out, "--output", whole, "--for", "diffusers"]) == 2


@pytest.mark.slow
def test_a_run_is_asked_by_its_own_settings_and_those_of_other_tasks_are_refused(
        pipes, data, tmp_path, capsys):
    run = burnish.fit(str(pipes / SD), str(data), "lora(rank=2)", output=tmp_path / "out",
                      max_steps=2, lr=0.1, batch_size=2, quiet=True, report=False, measure=False,
                      guidance_scale=2.0, num_inference_steps=3, resolution=24)
    assert run.facts["task"] == {"guidance_scale": 2.0, "num_inference_steps": 3, "resolution": 24}
    assert main(["predict", str(run.folder), '{"prompt": "a disc"}', "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert Image.open(answer["picture"]).size == (24, 24)
    from burnish.testing.tasks import posed

    base, rows, how = posed("text-classification", tmp_path / "texts")
    other = burnish.fit(str(base), str(rows), "lora(rank=2)", output=tmp_path / "o", max_steps=1,
                        batch_size=2, validation=0, quiet=True, report=False, measure=False, **how)
    assert main(["predict", str(other.folder), "a", "--seed", "3"]) == 2
    assert "says how a picture is drawn, and text-classification is not" in capsys.readouterr().err
