"""A small model and rows of every task that `fit` serves, drawn at random, in folders."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

Folders = tuple[Path, Path, dict[str, Any]]

CONTEXT = "the glaze is fired at 1060 degrees and the clay at 950 before it"


def characters(**special: Any) -> Any:
    """A tokenizer of one token a character, with what opens, ends, fills and hides."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    known = {t: i for i, t in enumerate([*names, *sorted(string.printable)])}
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
             "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**marks, **special})


#: task -> rows of texts
TEXTS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{"text": t, "label": "xy"[i % 2]} for i, t in enumerate("abcdef")],
    "text-multi-label": [{"text": t, "label": list(y)} for t, y in zip(
        "abcde", ("x", "", "xy", "z", "yz"), strict=True)],
    "text-regression": [{"text": t, "label": i * 0.3 + 0.1} for i, t in enumerate("abcdef")],
    "token-classification": [{"tokens": ["ab", "c"], "tags": ["B-x", "O"]},
                             {"tokens": ["c"], "tags": ["B-y"]},
                             {"tokens": ["d", "e"], "tags": ["B-y", "I-y"]}] * 2,
    "question-answering": [{"question": "hot", "context": CONTEXT, "answers": a} for a in (
        "1060 degrees", "950", "the clay", "the glaze")],
    "language-modelling": [{"text": CONTEXT} for _ in range(4)],
    "masked-language-modelling": [{"text": CONTEXT} for _ in range(4)],
    "instruction-tuning": [{"prompt": f"{a} comes before", "completion": f" {b}"}
                           for a, b in zip("abcd", "bcde", strict=True)],
    "masked-instruction-tuning": [{"prompt": f"{a} comes before", "completion": b}
                                  for a, b in zip("abcd", "bcde", strict=True)],
    "sequence-to-sequence": [{"prompt": f"{a} comes before", "completion": f" {b}"}
                             for a, b in zip("abcd", "bcde", strict=True)],
    "embedding": [{"anchor": a, "positive": a.upper()} for a in "abcdef"],
    "preference-tuning": [{"prompt": a, "chosen": a, "rejected": "no"} for a in "abcd"],
    "unpaired-preference-tuning": [{"prompt": a, "completion": a, "label": a in "ac"}
                                   for a in "abcd"],
}
#: what a row of one column of text may also be read as
ASKED = {"masked-language-modelling", "masked-instruction-tuning", "sequence-to-sequence"}


def texts(task: str) -> Any:
    """A small model for a task of texts."""
    import torch
    import transformers as t

    tokenizer = characters()
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 96,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if task == "sequence-to-sequence":
        return t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)), tokenizer
    if task in ("language-modelling", "instruction-tuning", "preference-tuning",
                "unpaired-preference-tuning"):
        return t.LlamaForCausalLM(t.LlamaConfig(**size)), tokenizer
    return t.BertForMaskedLM(t.BertConfig(**size)), tokenizer


def _worded(task: str, folder: Path, each: int) -> Folders:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in TEXTS[task] * each))
    how: dict[str, Any] = {"task": task} if task in ASKED else {}
    return kept(folder, *texts(task)), path, how


def kept(folder: Path, *parts: Any) -> Path:
    """A model, and what reads its rows, in one folder."""
    for part in parts:
        part.save_pretrained(folder / "base")
    return folder / "base"


def _glyphs(task: str, folder: Path, each: int) -> Folders:
    import transformers as t

    from ..fit.pictures import Picture
    from . import pipelines

    data = pipelines.shapes(folder / "data", 2 * each)
    model = t.ViTForImageClassification(t.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4))
    base = kept(folder, model, Picture(8, 8, (0.5,) * 3, (0.5,) * 3))
    if task == "image-embedding":
        return base, data, {"task": task, "batch_size": 4}
    return base, data, _labelled(data, "png", task)


def _labelled(data: Path, ending: str, task: str) -> dict[str, Any]:
    """Files in folders of classes get numbers, or two marks each, where the task is of those."""
    if task.endswith("-classification"):
        return {}
    lines = ["file_name,label" if task.endswith("regression") else "file_name,a,b"]
    for i, path in enumerate(sorted(data.rglob(f"*.{ending}"))):
        said = f"{i * 0.3 + 0.1:.1f}" if task.endswith("regression") else f"{i % 2},{i // 2 % 2}"
        lines.append(f"{path.relative_to(data)},{said}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    return {} if task.endswith("regression") else {"label": "a,b"}


def _heard(task: str, folder: Path, each: int) -> Folders:
    from . import sounds

    data = sounds.tones(folder / "data", 2 * each)
    return kept(folder, *sounds.made(sounds.AST)), data, _labelled(data, "wav", task)


def _spoken(task: str, folder: Path, each: int) -> Folders:
    from . import sounds

    data = sounds.spelt(folder / "data", 6 * each, among=("a", "bc", "ca b"))
    if task == "speech-recognition":
        return kept(folder, *sounds.made(sounds.CTC, vocab_size=8)), data, {}
    return kept(folder, *sounds.made(sounds.WRITES), sounds.letters()), data, {
        "language": "english"}


def _captioned(task: str, folder: Path, each: int) -> Folders:
    from . import captions

    kind = captions.WRITES if task == "image-captioning" else captions.CLIP
    return kept(folder, *captions.made(kind)), captions.captioned(folder / "data", each), {}


def _named(task: str, folder: Path, each: int) -> Folders:
    from . import captions

    return kept(folder, *captions.made(captions.DRAWS)), captions.named(
        folder / "data", 4 * each), {}


def _generated(task: str, folder: Path, each: int) -> Folders:
    from . import pipelines

    base = kept(folder, pipelines.pipeline(pipelines.CLASSES))
    return base, pipelines.shapes(folder / "data", 2 * each), {}


def _prompted(task: str, folder: Path, each: int) -> Folders:
    from . import pipelines

    base = kept(folder, pipelines.prompted())
    return base, pipelines.described(folder / "data", 2 * each), {}


def _pixels(task: str, folder: Path, each: int) -> Folders:
    from . import scenes

    return kept(folder, *scenes.segformer()), scenes.shapes(folder / "data", 6 * each), {}


def _boxed(task: str, folder: Path, each: int) -> Folders:
    from . import boxes

    return kept(folder, *boxes.made()), boxes.shapes(folder / "data", 6 * each), {}


def _timed(task: str, folder: Path, each: int) -> Folders:
    from . import series

    folder.mkdir(parents=True, exist_ok=True)
    return kept(folder, series.made()), series.written(folder / "series.csv", 150 * each), {}


def _pointed(task: str, folder: Path, each: int) -> Folders:
    from . import own

    ends = (".xyz",)
    data = own.clouds(folder / "data", 3 * each, ends=ends)
    how = {"trust_remote_code": True, "points": 32, **_labelled(data, "xyz", task)}
    return kept(folder, own.made("cloud")), data, how


def _graphed(task: str, folder: Path, each: int) -> Folders:
    from . import own

    rows = own.rows_of_graphs(8 * each)
    for i, row in enumerate(rows):
        if task != "graph-classification":
            number = task == "graph-regression"
            row["y"] = i * 0.3 + 0.1 if number else ["a", "b"][:i % 3]
    path = folder / "graphs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return kept(folder, own.made("graph")), path, {"trust_remote_code": True}


#: how a task's rows and model are made, by the first part of its name, or the whole
_MADE: dict[str, Callable[[str, Path, int], Folders]] = {
    "image-text-contrastive": _captioned, "image-captioning": _captioned,
    "text-to-image": _prompted, "image-generation": _generated,
    "semantic-segmentation": _pixels, "text-segmentation": _named, "object-detection": _boxed,
    "time-series-forecasting": _timed, "image": _glyphs, "audio": _heard, "speech": _spoken,
    "cloud": _pointed, "graph": _graphed}


def posed(task: str, folder: Path, each: int = 1) -> Folders:
    """(the model's folder, the data, what else `fit` is to be told) of a task, in `folder`.

    each: how many times as many rows as the fewest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if task in TEXTS:
        return _worded(task, folder, each)
    return _MADE.get(task, _MADE.get(task.split("-", 1)[0], _glyphs))(task, folder, each)
