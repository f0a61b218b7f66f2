"""Folders to mix: models and adapters of one base, and finished runs; what commands say of them."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import burnish as library
from burnish.cli import main
from burnish.testing import stir
from burnish.testing.models import tiny


def run(capsys, *argv):
    capsys.readouterr()                              # of what made the folders
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def done(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def weights(folder):
    return load_file(folder / "model.safetensors")


def logits(folder, batch):
    from transformers import BertForSequenceClassification

    net, found = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        return net.eval()(**batch).logits


def rows(path, n=40):
    path.write_text("text,label\n" + "".join(
        f"{('the cat sat', 'stocks fell')[i % 2]} {i},{('pets', 'money')[i % 2]}\n"
        for i in range(n)))
    return path


def answer(base, adapter, batch):
    from transformers import BertForSequenceClassification

    tuned = library.load(BertForSequenceClassification.from_pretrained(base), adapter)
    with torch.no_grad():
        return tuned, tuned.model.eval()(**batch).logits


@pytest.fixture
def models(tmp_path):
    """base, a and b: BERT classifiers, b with another head; plain folders of transformers."""
    from transformers import BertForSequenceClassification

    net, _ = tiny("bert")
    folders = {}
    for k, name in enumerate(("base", "a", "b", "other head")):
        config = net.config if name != "other head" else type(net.config).from_dict(
            {**net.config.to_dict(), "num_labels": 7, "id2label": None, "label2id": None})
        made = BertForSequenceClassification(config)
        made.load_state_dict({n: t for n, t in net.state_dict().items()
                              if made.state_dict()[n].shape == t.shape}, strict=False)
        torch.manual_seed(k)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape) * 0.05 * bool(k))
        made.save_pretrained(tmp_path / "models" / name)
        folders[name] = tmp_path / "models" / name
    return folders


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Two classifiers that were fine-tuned well, one that was spoilt; adapters and whole models."""
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertForSequenceClassification

    at = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=wordpiece(at / "base"), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32, num_labels=2,
        id2label={0: "money", 1: "pets"}, label2id={"money": 0, "pets": 1})
    ).save_pretrained(at / "base")
    for name, lr in (("good", "2e-2"), ("fine", "1e-2"), ("bad", "0")):
        code = main(["fit", "--model", str(at / "base"), "--data", str(rows(at / "d.csv")),
                     "--recipe", "lora(rank=2)", "--max_steps", "30", "--batch_size", "8", "--lr",
                     lr, "--output", str(at / name), "--measure", "false", "--report", "false",
                     "--json"])
        assert code == 0
    for name in ("good", "fine", "bad"):
        assert main(["merge", str(at / name), "--output", str(at / f"{name}-model")]) == 0
    return at


@pytest.fixture
def adapters(tmp_path):
    """Two LoRA adapters of one base, of unlike rank and scale, with heads; and their answers."""
    from transformers import BertForSequenceClassification

    net, batch = tiny("bert")
    net.save_pretrained(tmp_path / "base")
    batch = {k: v for k, v in batch.items() if k != "labels"}
    out = {"base": tmp_path / "base", "batch": batch}
    for k, (name, recipe) in enumerate((("a", "lora(rank=2, alpha=6)"),
                                        ("b", "lora(rank=3, scaling='rs')"))):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        tuned = library.tune(model, recipe, seed=k)
        stir(tuned, size=0.3, seed=k)
        tuned.save(tmp_path / name)
        out[name] = tmp_path / name
        out[f"{name} merged"] = tmp_path / f"{name}-model"
        tuned.merge().save_pretrained(out[f"{name} merged"])
    return out


class Heard:
    """A stream that keeps what goes through it."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def write(self, text):
        self.text += text
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


#: words that no line is broken within: a path, a name, a recipe without a space
LONGEST = re.compile(r"\S{40,}")


def complaints(out, err):
    """What should not be on a screen that is none: bars, codes, lines of more than 80 columns."""
    found = [f"{what} in {text!r}" for text in (out, err) for what, mark in
             (("a carriage return", "\r"), ("an escape code", "\x1b"), ("a bar", "it/s]"),
              ("a traceback", "Traceback (most")) if mark in text]
    if not out.lstrip().startswith(("{", "[")):                 # JSON is for programs
        found += [f"{len(line)} columns: {line!r}" for line in out.splitlines()
                  if len(line) > 80 and not LONGEST.search(line)]
    return found


@functools.cache
def parser_of_all():
    from burnish.cli.app import command

    return command()


@pytest.fixture(autouse=True)
def off_a_terminal(monkeypatch):
    """Whatever these tests call is heard as a program hears it: each command starts with the bars
    of transformers on, as it does in a process of its own, and shows none."""
    from burnish.cli import app

    parser, found = parser_of_all(), []

    class Watched:
        def __getattr__(self, name):
            return getattr(parser, name)

        def main(self, *args, **kw):
            if "transformers" in sys.modules:
                sys.modules["transformers"].utils.logging.enable_progress_bar()
            out, err = Heard(sys.stdout), Heard(sys.stderr)
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    return parser.main(*args, **kw)
            finally:
                found.extend(complaints(out.text, err.text))

    monkeypatch.setattr(app, "command", Watched)
    yield
    assert not found, "\n".join(found)
