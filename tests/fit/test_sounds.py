"""Recordings: read as they stand, prepared as the model's own extractor does."""

from __future__ import annotations

import io
import json
import struct
import wave

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile

from burnish.core.errors import ConfigError, DataError
from burnish.fit import sounds
from burnish.fit.data import read
from burnish.fit.places import check_served
from burnish.fit.readings import AmbiguousError
from burnish.fit.tasks import task_for
from burnish.testing.sounds import AST, WAV2VEC2, WHISPER, made


def tone(rate, seconds=0.25, pitch=440.0):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def folder(root, classes=("low", "high"), seconds=(0.2, 0.25, 0.3), rate=16000):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, s in enumerate(seconds):
            wavfile.write(root / name / f"{i}.wav", rate,
                          np.int16(32767 * tone(rate, s, 220 * (k + 1))))
    return root


def data_of(tmp_path, **how):
    return read(folder(tmp_path / "data", **how), validation=0)


# -- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, step", [("uint8", 2**-7), ("int16", 2**-15), ("int24", 2**-23),
                                        ("int32", 2**-23), ("float32", 2**-23),
                                        ("float64", 2**-23)])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_is_what_was_written_in_any_form(tmp_path, kind, step, channels):
    x, path = tone(8000), tmp_path / "x.wav"
    x = x if channels == 1 else np.stack([x, 0.5 * x], 1)
    if kind == "int24":
        with wave.open(str(path), "wb") as out:
            out.setparams((channels, 3, 8000, 0, "NONE", ""))
            whole = np.int32(np.round(x * (2**23 - 1))).reshape(-1)
            out.writeframes(b"".join(struct.pack("<i", v)[:3] for v in whole))
    elif kind == "uint8":
        wavfile.write(path, 8000, np.uint8(np.round(x * 127) + 128))
    elif kind.startswith("int"):
        wavfile.write(path, 8000, np.round(x * (np.iinfo(kind).max)).astype(kind))
    else:
        wavfile.write(path, 8000, x.astype(kind))
    got = sounds.heard(path, 8000)
    assert got.dtype == np.float32 and got.shape == (2000,)
    assert np.abs(got - (x if channels == 1 else x.mean(1))).max() <= step
    assert sounds.size(path) == sounds.size({"bytes": path.read_bytes(), "path": None}) == (2000,
                                                                                           8000)


@pytest.mark.parametrize("own", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_is_changed_to_the_models(tmp_path, own):
    wavfile.write(tmp_path / "x.wav", own, np.float32(tone(own)))
    got = sounds.heard(tmp_path / "x.wav", 16000)
    assert len(got) == sounds.length(*sounds.size(tmp_path / "x.wav"), 16000)
    inner = slice(400, 3600)                              # a filter knows no sound before the first
    assert np.abs(got[inner] - tone(16000)[inner]).max() < 2e-3
    short = sounds.heard(tmp_path / "x.wav", 16000, 0.1)
    assert len(short) == sounds.length(*sounds.size(tmp_path / "x.wav"), 16000, 0.1)
    assert abs(len(short) - 1600) <= 1


def test_what_cannot_be_heard_is_named_before_a_model_is_loaded(tmp_path):
    good = folder(tmp_path / "data")
    for name, written, said in (("empty.wav", b"", "high/empty.wav"),
                                ("text.wav", b"these are words", "soundfile|no plain WAV"),
                                ("x.mp3", b"ID3" + bytes(64), "high/x.mp3")):
        (good / "high" / name).write_bytes(written)
        with pytest.raises(DataError, match=said):
            read(good, validation=0)
        (good / "high" / name).unlink()
    wavfile.write(good / "high" / "none.wav", 8000, np.zeros(0, np.int16))
    with pytest.raises(DataError, match="none.wav"):
        task = task_for(read(good, validation=0), "", processor=made(WAV2VEC2)[1])
        for i in range(len(task.rows("train"))):
            task.rows("train")[i]


@pytest.mark.parametrize("rate", [0, 2**30])
def test_a_head_with_an_impossible_rate_is_refused(tmp_path, rate):
    root = folder(tmp_path / "data")
    whole = bytearray((root / "high" / "0.wav").read_bytes())
    whole[24:32] = struct.pack("<II", rate, 2 * rate)        # and bytes a second, two a sample
    (root / "high" / "0.wav").write_bytes(bytes(whole))
    with pytest.raises(DataError, match=f"0.wav cannot be read: its head says {rate} samples a"):
        read(root, validation=0)
    with pytest.raises(ValueError, match=f"its head says {rate} samples a second"):
        sounds.heard(root / "high" / "0.wav", 16000)


def test_a_recording_that_breaks_off_is_refused(tmp_path):
    """Half of it would be learnt for the whole. A stream's head names no length."""
    root = folder(tmp_path / "data")
    path = root / "high" / "0.wav"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match="0.wav cannot be read: it breaks off: its head says"):
        read(root, validation=0)
    with pytest.raises(ValueError, match="it breaks off"):
        sounds.heard(path, 16000)
    path.write_bytes(whole[:40] + b"\xff\xff\xff\xff" + whole[44:])
    assert sounds.size(path) == (3200, 16000)
    assert len(sounds.heard(path, 16000)) == 3200


def test_a_recording_of_nothing_is_refused_before_it_is_learnt(tmp_path):
    root = folder(tmp_path / "data")
    wavfile.write(root / "high" / "none.wav", 8000, np.zeros(0, np.int16))
    with pytest.raises(DataError, match="none.wav cannot be read: it holds no sample"):
        read(root, validation=0)


def test_without_soundfile_other_forms_are_refused_with_what_reads_them(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    path = tmp_path / "x.flac"
    path.write_bytes(b"fLaC" + bytes(100))
    with pytest.raises(ValueError, match=r"pip install 'burnish\[audio\]'"):
        sounds.heard(path, 16000)


def test_a_sound_that_is_not_finite_is_refused_with_its_row(tmp_path):
    root = folder(tmp_path / "data")
    wavfile.write(root / "high" / "9.wav", 16000, np.float32([0.0] * 4000 + [np.nan]))
    task = task_for(read(root, validation=0), "", processor=made(WAV2VEC2)[1])
    with pytest.raises(DataError, match="9.wav: the sound cannot be read: it holds numbers"):
        for i in range(len(task.rows("train"))):
            task.rows("train")[i]


# -- layouts ---------------------------------------------------------------------------------------
def test_class_folders_and_metadata_are_read(tmp_path):
    data = data_of(tmp_path)
    assert (data.task, data.labels, data.layout) == ("audio-classification", ("high", "low"),
                                                     "audio folder")
    assert data.samples(1) == ["audio=0.wav  label='high'"]
    rows = "\n".join(f"{c}/{i}.wav,{k + 0.25 * i}" for k, c in enumerate(("high", "low"))
                     for i in range(3))
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,label\n{rows}\n")
    number = read(tmp_path / "data", validation=0)
    assert (number.task, number.layout) == ("audio-regression", "sounds with metadata")
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,label\n{rows}\nx.png,1.5\n")
    with pytest.raises(DataError, match="line 8, field 'file_name': 'x.png' is no sound"):
        read(tmp_path / "data")


def test_a_table_names_files_or_holds_them(tmp_path):
    import datasets

    root = folder(tmp_path / "data")
    paths = [str(root / c / f"{i}.wav") for c in ("high", "low") for i in range(3)]
    rows = [{"audio": p, "label": ["a"] if i % 2 else ["a", "b"]} for i, p in enumerate(paths)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "x.jsonl", validation=0).task == "audio-multi-label"
    rows[2]["audio"] = "nowhere.wav"
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="line 3, field 'audio': there is no sound at nowhere.wav"):
        read(tmp_path / "x.jsonl")
    held = datasets.Dataset.from_dict(
        {"clip": [{"bytes": open(p, "rb").read(), "path": None} for p in paths],
         "label": list("ababab")},
        features=datasets.Features({"clip": {"bytes": datasets.Value("binary"), "path":
                                             datasets.Value("string")},
                                    "label": datasets.Value("string")}))
    found = read(held.cast_column("clip", datasets.Audio()), audio="clip", validation=0)
    assert found.task == "audio-classification"
    task = task_for(found, "", processor=made(WAV2VEC2)[1])
    assert task.rows("train")[0]["input_values"].shape == (3200,)


def test_a_folder_of_pictures_and_sounds_is_refused_with_both_readings(tmp_path):
    from PIL import Image

    root = folder(tmp_path / "data")
    for name in ("low", "high"):
        Image.new("RGB", (8, 8)).save(root / name / "spectrum.png")
    with pytest.raises(AmbiguousError, match="pictures and sounds") as said:
        read(root)
    assert [r.flags for r in said.value.readings] == [(("task", "image-classification"),),
                                                      (("task", "audio-classification"),)]
    assert len(read(root, task="audio-classification", validation=0).train) == 6
    assert len(read(root, task="image-classification", validation=0).train) == 2


# -- as the model's own extractor does -------------------------------------------------------------
@pytest.mark.parametrize("kind", [WAV2VEC2, AST, WHISPER])
def test_a_row_is_what_the_extractor_makes_of_the_recording(tmp_path, kind):
    extractor = made(kind)[1]
    task = task_for(data_of(tmp_path), "", processor=extractor)
    rows = task.rows("train")
    for i in range(len(rows)):
        x = tone(16000, (0.2, 0.25, 0.3)[i % 3], 440 if i < 3 else 220)
        x = np.float32(np.int16(32767 * x) / 32768)
        want = extractor(x, sampling_rate=16000, return_tensors="pt")
        got = {k: v for k, v in rows[i].items() if k != "labels"}
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k][0]) for k in want)


def test_rows_are_padded_and_masked_by_the_extractor(tmp_path):
    task = task_for(data_of(tmp_path), "", processor=made(WAV2VEC2)[1])
    rows = task.rows("train")
    batch = task.collate([rows[0], rows[2]])
    assert batch["input_values"].shape == batch["attention_mask"].shape == (2, 4800)
    assert batch["attention_mask"].sum(1).tolist() == [3200, 4800]
    assert torch.equal(batch["input_values"][0, :3200], rows[0]["input_values"])
    assert (batch["input_values"][0, 3200:] == 0).all()
    assert task.example(2)["attention_mask"].sum(1).tolist() == [4800, 4800]


def test_an_extractor_without_a_mask_is_noted(tmp_path):
    plain = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    task = task_for(data_of(tmp_path), "", processor=plain)
    batch = task.example(3)
    assert "attention_mask" not in batch
    assert any("filled up with silence that the model hears" in n for n in task.notes)


@pytest.mark.parametrize("kind, seconds", [(AST, 0.655), (WHISPER, 1.0), (WAV2VEC2, 0.5)])
def test_what_is_longer_than_is_heard_is_told(tmp_path, kind, seconds):
    data = data_of(tmp_path, seconds=(0.2, 0.4, 2.0))
    how = {"max_seconds": 0.5} if kind is WAV2VEC2 else {}
    extractor = made(kind)[1]
    task = task_for(data, "", processor=extractor, **how)
    rows = task.rows("train")
    assert rows.notes == [f"2 of 6 sounds are longer than {seconds:g} s, and are heard up to there"]
    x = np.float32(np.int16(32767 * tone(16000, 2.0, 440)) / 32768)
    want = extractor(x[:8000] if kind is WAV2VEC2 else x, sampling_rate=16000, return_tensors="pt")
    name = extractor.model_input_names[0]
    assert torch.equal(rows[2][name], want[name][0])


# -- a model and its extractor ---------------------------------------------------------------------
def test_what_does_not_belong_together_is_told(tmp_path):
    data = data_of(tmp_path)
    with pytest.raises(ConfigError, match="ForSequenceClassification reads input_values"):
        task_for(data, "", processor=made(WHISPER)[1]).settle(made(WAV2VEC2)[0])
    with pytest.raises(ConfigError, match="reads 16 mel bands, and ASTFeatureExtractor makes 128"):
        task_for(data, "", processor=transformers.ASTFeatureExtractor()).settle(made(AST)[0])
    with pytest.raises(ConfigError, match="reads 64 frames, and ASTFeatureExtractor makes 1024"):
        task_for(data, "", processor=transformers.ASTFeatureExtractor(
            num_mel_bins=16)).settle(made(AST)[0])
    with pytest.raises(ConfigError, match="reads 100 frames, and WhisperFeatureExtractor makes"):
        task_for(data, "", processor=transformers.WhisperFeatureExtractor(
            feature_size=16)).settle(made(WHISPER)[0])
    with pytest.raises(ConfigError, match="max_length=9 counts tokens.*max_seconds="):
        task_for(data, "", processor=made(AST)[1], max_length=9)
    with pytest.raises(ConfigError, match="max_seconds=0"):
        task_for(data, "", processor=made(AST)[1], max_seconds=0)
    with pytest.raises(ConfigError, match="max_seconds=inf: expected a finite"):
        task_for(data, "", processor=made(AST)[1], max_seconds=float("inf"))
    with pytest.raises(ConfigError, match="no feature extractor of sound"):
        task_for(data, "", processor=transformers.ViTImageProcessorPil())


def test_a_model_of_sound_asked_for_words_is_told_what_it_can_learn(tmp_path):
    made(WAV2VEC2)[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="wav2vec2, for which transformers has no model") as said:
        check_served("text-classification", str(tmp_path))
    text = str(said.value)
    assert "audio-classification" in text and "embedding" not in text


def test_a_model_without_an_extractor_is_told_to_bring_one(tmp_path):
    made(WAV2VEC2)[0].save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="no feature extractor could be loaded from.*processor="):
        task_for(data_of(tmp_path), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="needs the model's feature extractor: give the model by"):
        task_for(data_of(tmp_path / "again"), made(WAV2VEC2)[0])


def test_layers_and_stretches_that_chance_leaves_out(tmp_path):
    model, extractor = made(WAV2VEC2, layerdrop=0.2)
    task = task_for(data_of(tmp_path, seconds=(0.04, 0.25, 0.3)), "", processor=extractor)
    task.settle(model)
    task.check(model)
    assert model.config.layerdrop == 0 and model.config.mask_time_prob == 0
    assert "layerdrop=0.2 is put to 0" in " ".join(task.notes)
    assert "stretches of 10 frames are not masked" in " ".join(task.notes)
    short = task_for(read(folder(tmp_path / "short", seconds=(0.0005, 0.2)), validation=0), "",
                     processor=extractor)
    with pytest.raises(DataError, match="0.wav: the sound has 8 samples, too few"):
        short.check(model)


@pytest.mark.parametrize("features", [0.0, 0.3])
def test_what_is_masked_in_training_is_what_transformers_masks(tmp_path, features):
    model, extractor = made(WAV2VEC2, mask_time_prob=0.3, mask_feature_prob=features,
                            mask_feature_length=4)
    task = task_for(data_of(tmp_path), "", processor=extractor)
    inner = model.wav2vec2.train()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 60, 32, generator=g)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, 40:] = 0
    np.random.seed(0)
    want = inner._mask_hidden_states(hidden.clone(), attention_mask=mask)
    task.settle(model)
    np.random.seed(0)
    got = inner._mask_hidden_states(hidden.clone(), attention_mask=mask)
    assert torch.equal(got, want) and not torch.equal(got, hidden)
    assert torch.equal(inner.eval()._mask_hidden_states(hidden, attention_mask=mask), hidden)


# -- losses ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["audio-classification", "audio-multi-label", "audio-regression"])
def test_the_loss_of_each_reading(tmp_path, task):
    root = folder(tmp_path / "data")
    labels = {"audio-classification": list("ababab"),
              "audio-regression": [0.1, 0.4, 0.7, 1.0, 1.3, 1.6],
              "audio-multi-label": [["a"], ["a", "b"], [], ["b"], ["a"], ["b"]]}[task]
    rows = [{"audio": str(root / c / f"{i}.wav"), "label": labels[i + 3 * k]}
            for k, c in enumerate(("high", "low")) for i in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(tmp_path / "x.jsonl", validation=0)
    assert data.task == task
    model, extractor = made(AST)
    served = task_for(data, "", processor=extractor)
    served.fit_head(model).eval()
    assert served.names == ("value",) if task == "audio-regression" else ("a", "b")
    batch = served.example(6)
    feed, loss = served.call(batch, False)
    with torch.no_grad():
        logits = model(input_values=batch["input_values"]).logits
        got = loss(model(**feed[0]), feed) if loss else model(**feed).loss
    y = batch["labels"]
    want = {"audio-classification": lambda: torch.nn.functional.cross_entropy(logits, y),
            "audio-regression": lambda: (logits[:, 0] - y).square().mean(),
            "audio-multi-label": lambda:
                torch.nn.functional.binary_cross_entropy_with_logits(logits, y)}[task]()
    assert torch.allclose(got, want)


@pytest.mark.parametrize("kind, order", [("int16", "<"), ("float32", "<"), ("int16", ">")])
def test_a_wav_that_ends_anywhere_is_refused_in_our_words(kind, order):
    """Every beginning of a file, from nothing to all but its last byte."""
    whole = io.BytesIO()
    wavfile.write(whole, 8000, np.array([1, -2, 3, 4], f"{order}{np.dtype(kind).str[1:]}"))
    coded = whole.getvalue()
    assert sounds.size(coded) == (4, 8000) and len(sounds.heard(coded, 8000)) == 4
    words = "breaks off within its head|breaks off: its head says|no whole WAV|no plain WAV|no samp"
    for many in range(1, len(coded)):
        for made_of in (sounds.size, lambda x: sounds.heard(x, 8000)):
            with pytest.raises(ValueError, match=words):
                made_of(coded[:many])
