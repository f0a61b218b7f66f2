"""What is said in recordings: layouts, alphabets, the loss and the figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile

from burnish.core.errors import ConfigError, DataError
from burnish.fit.alphabet import Spoken, Written, drawn_from
from burnish.fit.data import read
from burnish.fit.readings import AmbiguousError
from burnish.fit.shown import posed
from burnish.fit.tasks import evaluate, task_for
from burnish.memory import measure, simulate
from burnish.testing.sounds import CTC, WHISPER, made, spelt


def table(tmp_path, rows):
    """rows: (seconds, columns) of recordings of noise, as a JSONL file."""
    g, out = np.random.default_rng(0), []
    for i, (seconds, columns) in enumerate(rows):
        wavfile.write(tmp_path / f"{i}.wav", 16000,
                      np.float32(0.1 * g.standard_normal(round(16000 * seconds))))
        out.append({"audio": str(tmp_path / f"{i}.wav"), **columns})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, out)))
    return tmp_path / "rows.jsonl"


def learnt(data, model=None, tokenizer=None, **how):
    own, extractor = made(CTC, vocab_size=how.pop("vocab_size", 8))
    task = task_for(data, "", processor=Spoken(extractor, tokenizer), **how)
    task.settle(model or own)
    return task, (model or own)


# -- layouts ---------------------------------------------------------------------------------------
def test_a_transcription_beside_a_recording_is_learnt(tmp_path):
    data = read(spelt(tmp_path / "a", 6), validation=0)
    assert (data.task, data.layout) == ("speech-recognition", "sounds with metadata")
    assert data.columns == "text from 'transcription'"
    for name in ("sentence", "text"):
        rows = [(0.3, {name: "a b"}), (0.3, {name: "b"})]
        assert read(table(tmp_path, rows), validation=0).task == "speech-recognition"
    with pytest.raises(DataError, match="line 2, field 'text': the text is empty"):
        read(table(tmp_path, [(0.3, {"text": "a"}), (0.3, {"text": " "})]))


def test_a_label_beside_a_transcription_is_asked_for(tmp_path):
    path = table(tmp_path, [(0.3, {"text": "a b", "label": k}) for k in "xyxy"])
    with pytest.raises(AmbiguousError, match="have a label and a text") as said:
        read(path)
    assert [r.flags for r in said.value.readings] == [(("text", "text"),), (("label", "label"),)]
    assert read(path, text="text", validation=0).task == "speech-recognition"
    assert read(path, label="label", validation=0).task == "audio-classification"


# -- alphabets -------------------------------------------------------------------------------------
def test_a_model_without_a_tokenizer_gets_the_characters_of_the_texts(tmp_path):
    task, _ = learnt(read(table(tmp_path, [(0.5, {"text": "Añ b"}), (0.5, {"text": "b|c"})]),
                          validation=0), vocab_size=9)
    t = task.processor.tokenizer
    assert t.get_vocab() == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "b": 6,
                             "c": 7, "ñ": 8}
    assert task.rows("train")[0]["labels"] == [5, 8, 4, 6]
    assert task.rows("train").texts == ["Añ b", "bc"]
    assert "it gets the 4 characters of the training texts" in task.notes[0]
    assert "left out of texts: |" in " ".join(task.notes)
    task.processor.save_pretrained(tmp_path / "kept")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert again.get_vocab() == t.get_vocab()


def test_texts_are_brought_to_the_tokenizers_alphabet(tmp_path):
    own = drawn_from(["ABC"])
    data = read(table(tmp_path, [(0.5, {"text": "a  b, c"}), (0.5, {"text": "cab"})]), validation=0)
    task, _ = learnt(data, tokenizer=own)
    assert task.rows("train").texts == ["A B C", "CAB"]
    assert task.rows("train")[0]["labels"] == own("A B C")["input_ids"]
    notes = " ".join(task.notes)
    assert "measured in capitals" in notes and "left out of texts: ," in notes
    with pytest.raises(DataError, match="the tokenizer writes 'ABC', and the texts are written"):
        Written.by(own, ["wxyz"], "x")
    written = Written.by(own, ["abc"], "x")
    assert written("c, !a") == "C A"                 # what only a later split holds, too


def test_the_case_of_an_alphabet_is_the_same_whatever_is_read(tmp_path):
    """A later file must not be measured in another case than the model was taught to write."""
    for alphabet, text, said in (("abc", "Ab C", "ab c"), ("ABC", "Ab c", "AB C"),
                                 ("The kiln", "A kiln", "kiln"), ("straße", "Straße", "straße")):
        for others in ([], [text] * 9):
            written = Written.by(drawn_from([alphabet]), [alphabet * 9, *others], "x")
            assert written(text) == said
    met = Written.by(drawn_from(["STRASE"]), ["straße"], "x")
    assert met("straße") == "STRASSE" and not met.lacks
    assert not Written.by(drawn_from(["abc"]), ["a b"], "x").notes()


def test_a_trained_head_stays_where_only_ends_are_behind_its_last_token(tmp_path):
    """Many tokenizers have <s> and </s> behind the tokens of the model that they belong to."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3, "b": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    own = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), pad_token="[PAD]",
                                            unk_token="[UNK]")
    assert len(own) == 7
    model, extractor = made(CTC, vocab_size=5)
    for part in (model, extractor, own):
        part.save_pretrained(tmp_path / "model")
    data = read(table(tmp_path, [(0.5, {"text": "a b"})] * 2), validation=0)
    task = task_for(data, str(tmp_path / "model"))
    loaded = task.load(str(tmp_path / "model"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and not task.fresh
    assert task.fit_head(model) is model
    with pytest.raises(ConfigError, match="writes 4 tokens and the tokenizer has 7"):
        task.fit_head(made(CTC, vocab_size=4)[0])
    for filled, kept in ((8, True), (13, False)):               # up to a round number, or another
        model = made(CTC, vocab_size=filled)[0]
        model.save_pretrained(tmp_path / "model")
        task = task_for(data, str(tmp_path / "model"))
        loaded = task.load(str(tmp_path / "model"))
        assert (loaded.lm_head.out_features == filled) is kept is not bool(task.fresh)
        assert any("its head is drawn anew" in n for n in task.notes) is not kept
    assert task.read(torch.tensor([3, 3, 0, 7, 12, 2, 4])) == "a b", "what no token stands for"


def test_another_data_set_of_the_task_is_read_like_the_first(tmp_path):
    task, model = learnt(read(table(tmp_path, [(0.5, {"text": "abc"})] * 2), validation=0))
    other = task.on(task.data, model)
    assert other.rows("train").texts == ["abc", "abc"] and other.processor is task.processor
    assert torch.equal(other.example(1)["counted"], task.example(1)["counted"])


def test_what_was_said_is_shown_beside_what_is_written(tmp_path):
    task, _ = learnt(read(table(tmp_path, [(0.5, {"text": "abc"})] * 2), validation=0))
    shown = posed(task, task.data.train[0])
    assert (shown.asked, shown.right) == ("a recording", "abc")


def test_what_reads_no_sound_or_writes_no_text_is_refused(tmp_path, tokenizer):
    data = read(table(tmp_path, [(0.5, {"text": "a"})] * 2), validation=0)
    with pytest.raises(ConfigError, match="FeatureExtractor does not read sounds and write"):
        task_for(data, "", processor=made(CTC)[1])
    with pytest.raises(ConfigError, match="does not write letter by letter"):
        task_for(data, "", processor=Spoken(made(CTC)[1], tokenizer))
    pair = transformers.Wav2Vec2Processor(made(CTC)[1], drawn_from(["a"]))
    assert task_for(data, "", processor=pair).processor.tokenizer is pair.tokenizer
    with pytest.raises(ConfigError, match="writes 32 tokens and the tokenizer has 6"):
        task_for(data, "", processor=pair).fit_head(made(CTC)[0])
    with pytest.raises(ConfigError, match="served for wav2vec2 and its kin, without adapter"):
        task_for(data, "", processor=pair).settle(made(CTC, add_adapter=True)[0])
    assert WHISPER not in str(data)


# -- rows ------------------------------------------------------------------------------------------
def test_a_sound_too_short_for_its_text_is_left_out_and_said(tmp_path):
    rows = [(0.5, {"text": "abc"}), (0.05, {"text": "aabbcc"}), (0.5, {"text": "cab"})]
    task, model = learnt(read(table(tmp_path, rows), validation=0))
    made_ = task.rows("train")
    assert len(made_) == 2 and made_.texts == ["abc", "cab"] and made_.source(1) == 2
    assert "1 of 3 sounds have fewer frames than their text has letters" in " ".join(made_.notes)
    for n in (400, 5000, 16000, 70001):
        theirs = int(model._get_feat_extract_output_lengths(torch.tensor(n)))
        assert task.frames(n) == max(0, theirs)


def test_the_costliest_batch_has_the_longest_sound_and_the_longest_text(tmp_path):
    rows = [(0.9, {"text": "a"}), (0.5, {"text": "abcabc"}), (0.4, {"text": "ab"})]
    task, _ = learnt(read(table(tmp_path, rows), validation=0))
    batch = task.example(1)
    assert batch["input_values"].shape == (1, 14400) and batch["labels"].shape == (1, 6)


# -- loss and figures ------------------------------------------------------------------------------
def test_the_loss_is_transformers_own(tmp_path):
    rows = [(0.9, {"text": "a bca"}), (0.5, {"text": "aabb"}), (0.4, {"text": "ab"})]
    task, model = learnt(read(table(tmp_path, rows), validation=0))
    model.eval()
    for k, v in task.head().items():
        setattr(model.config, k, v)
    batch = task.collate([task.rows("train")[i] for i in range(3)])
    with torch.no_grad():
        want = model(**{k: v for k, v in batch.items() if k != "counted"}).loss
        feed, loss = task.call(batch, False)
        got = loss(model(**feed[0]), feed)
    assert torch.allclose(got, want, atol=1e-5)
    one = [task.collate([task.rows("train")[i]]) for i in range(3)]
    with torch.no_grad():
        each = [float(task.kept(model(**task.feed(b)), b)[1][0, 0]) for b in one]
    figures = evaluate(model, task, "train", 1)
    assert figures["loss"] == pytest.approx(sum(each) / sum(map(len, task.rows("train").texts)))


def test_frames_are_read_as_the_tokenizer_reads_them(tmp_path):
    task, _ = learnt(read(table(tmp_path, [(0.5, {"text": "abc"})] * 2), validation=0))
    t, g = task.processor.tokenizer, torch.Generator().manual_seed(0)
    for _ in range(20):
        frames = torch.tensor([0, 4, 5, 6, 7])[torch.randint(0, 5, (40,), generator=g)]
        assert task.read(frames) == t.decode(frames.tolist()).strip()
    assert task.read(torch.tensor([5, 5, 0, 5, 4, 4, 6, -100, -100])) == "aa b"


def test_errors_of_words_and_characters_are_counted(tmp_path):
    rows = [(0.5, {"text": "ab c"}), (0.5, {"text": "b a b"})]
    task, _ = learnt(read(table(tmp_path, rows), validation=0))
    rows = task.rows("train")
    said = [[5, 6, 4, 6], [6, 4, 5, -100]]                     # "ab b" and "b a"
    got = task.figures(torch.tensor(said), torch.tensor([[3.0, 4.0], [2.0, 5.0]]), None, rows)
    assert got["loss"] == pytest.approx(5 / 9)
    assert got["wer"] == pytest.approx(2 / 5) and got["cer"] == pytest.approx(3 / 9)


def test_a_step_is_promised_with_all_ways_to_spell(tmp_path):
    """The table of ways, (B, frames, 2 S + 1), is kept for backward; the one from behind is as
    large and is there while backward runs."""
    rows = [(0.9, {"text": "a bca"}), (0.5, {"text": "aabb"}), (0.4, {"text": "ab"})]
    task, model = learnt(read(table(tmp_path, rows), validation=0))
    batch, loss = task.call(task.example(3), False)
    promise = simulate(model.train(), "full", batch, loss=loss)
    import burnish

    assert promise.peak_bytes == measure(burnish.tune(model, "full"), batch, loss).peak_bytes
