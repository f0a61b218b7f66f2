"""Speech to text: prompts, what a model writes, the figures of that."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError
from burnish.fit.alphabet import Spoken
from burnish.fit.data import read
from burnish.fit.places import suited
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.sounds import CTC, WRITES, letters, made, spelt

SAID = ("a", "bc", "ca b", "bb", "acc")


def learnt(tmp_path, model=None, tokenizer=None, extractor=None, **how):
    own, ears = made(WRITES)
    data = read(spelt(tmp_path / "clips", 6, among=SAID), validation=0).as_task("speech-to-text")
    task = task_for(data, "", processor=Spoken(extractor or ears, tokenizer or letters()), **how)
    task.settle(model or own)
    return task, model or own


def test_the_model_says_how_recordings_are_learnt(tmp_path):
    data = read(spelt(tmp_path / "clips", 6), validation=0)
    assert suited(data, made(WRITES)[0]).task == "speech-to-text"
    assert suited(data, made(CTC)[0]).task == "speech-recognition"
    said = read(tmp_path / "clips", task="speech-recognition", validation=0)
    assert suited(said, made(WRITES)[0]).task == "speech-recognition"
    for part in (*made(WRITES), letters()):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="served for models with a CTC head; .*speech-to-text"):
        burnish.fit(str(tmp_path / "model"), str(tmp_path / "clips"), task="speech-recognition",
                    output=tmp_path / "out", quiet=True)


def test_a_text_stands_behind_its_prompt(tmp_path):
    task, _ = learnt(tmp_path, language="en")
    t = task.processor.tokenizer
    rows = task.rows("train")
    i = rows.texts.index("ca b") if "ca b" in rows.texts else 0
    batch = task.collate([rows[i]])
    names = t.convert_ids_to_tokens(batch["decoder_input_ids"][0])
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert names[:4] == prompt
    text = t(" " + rows.texts[i], add_special_tokens=False)["input_ids"]
    assert batch["decoder_input_ids"][0, 4:].tolist() == text
    assert batch["labels"][0].tolist() == [-100] * 3 + text + [t.eos_token_id]
    task, _ = learnt(tmp_path / "b", language="chinese", translate=True)
    assert t.convert_ids_to_tokens(task.prompt)[1:3] == ["<|zh|>", "<|translate|>"]


def test_what_is_written_is_what_generate_writes(tmp_path):
    """For many rows at once, of unlike length, with tokens that are never written."""
    from burnish.fit.writing import Pen, after_encoder, written

    model, ears = made(WRITES, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5)
    model.eval()
    x = torch.randn(4, 16, 100, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([[1, 6]]).expand(4, -1)
    for never, first in (((), ()), ((0, 9), (8,))):
        pen = Pen(9, 7, never, first, after=after_encoder)
        ours = written(model, {"input_features": x}, start, pen)
        for row, said in zip(x, ours, strict=True):
            ids = start[:1]
            for k in range(9):                       # one at a time, from the beginning each time
                scores = model(input_features=row[None], decoder_input_ids=ids).logits[0, -1]
                scores[[*never, *(first if k == 0 else ())]] = -torch.inf
                ids = torch.cat([ids, scores.argmax().view(1, 1)], 1)
                if ids[0, -1] == 7:
                    break
            told = [i for i in ids[0, 2:].tolist() if i != 7]
            assert said.tolist() == told + [-100] * (9 - len(told))


def test_a_rehearsal_ends_with_the_longest_step():
    from burnish.fit.writing import Pen, after_encoder, written

    model, _ = made(WRITES)
    seen, real = [], model.forward

    def watched(**kw):
        states = kw["past_key_values"]
        seen.append(0 if states is None else states.get_seq_length())
        return real(**kw)

    model.forward = watched
    x = {"input_features": torch.zeros(2, 16, 100)}
    start = torch.ones(2, 4, dtype=torch.long)
    written(model, x, start, Pen(7, 99, after=after_encoder))
    whole, seen[:] = list(seen), []
    written(model, x, start, Pen(7, 99, after=after_encoder), longest=True)
    assert whole == [0, 4, 5, 6, 7, 8, 9] and seen == [0, 9]


def test_what_does_not_belong_together_is_refused(tmp_path):
    number = itertools.count()

    def refused(words, **how):
        with pytest.raises(ConfigError, match=words):
            learnt(tmp_path / str(next(number)), **how)

    refused("language='klingon' is none that", language="klingon")
    refused("language='de': the tokenizer lacks a token", language="de")
    refused("the tokenizer writes 11 tokens and .* knows 9", model=made(WRITES, vocab_size=9)[0])
    refused("reads input_features, and .* makes input_values", extractor=made(CTC)[1])
    many = made(WRITES)[0]
    many.generation_config.is_multilingual = True
    refused("language= says which is learnt", model=many)
    from burnish.fit.alphabet import drawn_from

    refused("begins with no language", tokenizer=drawn_from(["a"]), language="en")
    data = read(tmp_path / "0" / "clips", validation=0).as_task("speech-to-text")
    with pytest.raises(ConfigError, match="with the model's tokenizer, and there is none"):
        task_for(data, "", processor=made(WRITES)[1])
    with pytest.raises(ConfigError, match="no decoder that reads the text so far"):
        task, _ = learnt(tmp_path / "x")
        task.processor.extractor = made(CTC)[1]
        task.settle(made(CTC)[0])


def test_texts_without_room_are_left_out(tmp_path):
    g = np.random.default_rng(0)
    rows = []
    for i, text in enumerate(("a", "ab" * 20)):
        wavfile.write(tmp_path / f"{i}.wav", 16000, np.float32(g.standard_normal(4000) * 0.1))
        rows.append({"audio": str(tmp_path / f"{i}.wav"), "text": text})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(tmp_path / "x.jsonl", validation=0).as_task("speech-to-text")
    own, ears = made(WRITES)
    task = task_for(data, "", processor=Spoken(ears, letters()), language="en")
    task.settle(own)
    assert task.rows("train").texts == ["a"]
    assert "1 of 2 texts have more than the 20 tokens" in " ".join(task.notes)


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_words_are_learnt_within_the_promise(tmp_path, capsys):
    for part in (*made(WRITES), letters()):
        part.save_pretrained(tmp_path / "model")
    data = spelt(tmp_path / "clips", 140, among=SAID)
    run = burnish.fit(str(tmp_path / "model"), str(data), "full", output=tmp_path / "out", lr=5e-3,
                      epochs=16, batch_size=16, language="en", quiet=True)
    assert run.metrics["validation"]["wer"] < 0.4
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert run.facts["task"] == {"language": "en", "max_answer": 8}
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["predict", str(run.folder), str(data), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert sum(a["text"] in SAID for a in answers) > 100
    assert main(["merge", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

    from burnish.fit.sounds import heard

    merged = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "merged").eval()
    ears, words = (k.from_pretrained(tmp_path / "merged")
                   for k in (AutoFeatureExtractor, AutoTokenizer))
    x = ears(heard(data / "0.wav", 16000), sampling_rate=16000, return_tensors="pt")
    ids = torch.tensor([[1, 2, 4, 6]])
    for _ in range(8):
        ids = torch.cat([ids, merged(**x, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 0:
            break
    first = next(a for a in answers if a["input"].endswith("/0.wav"))
    assert words.decode(ids[0, 4:], skip_special_tokens=True).strip() == first["text"]


def test_figures_are_of_what_is_written(tmp_path):
    task, model = learnt(tmp_path, language="en")
    with torch.no_grad():
        found = evaluate(model, task, "train", 4)
    said = [task.answer(model, {"audio": task.data.train[i]["audio"]}, task.longest)["text"]
            for i in range(6)]
    from torchmetrics.functional.text import word_error_rate

    assert found["wer"] == pytest.approx(float(word_error_rate(said, task.rows("train").texts)))
