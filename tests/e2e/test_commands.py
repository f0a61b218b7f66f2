"""One road per task, from the command line: fit, predict, evaluate, merge, export, and the files
opened by other libraries. What a run says after training, its folder says again."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from burnish.cli import main

pytestmark = pytest.mark.slow

PETS = ["the cat sat on the mat", "a dog ran in the park", "my dog and my cat play"]
MONEY = ["stocks fell as rates rose", "the bank cut its rates", "markets rose on bank news"]
SHORT = ["--max_steps", "16", "--batch_size", "8", "--lr", "2e-2", "--recipe", "lora(rank=4)"]


def burnish(capsys, *argv):
    """The command's JSON document. A failure shows what it said."""
    code = main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def mails(path, n=20):
    rows = [(t, k) for i in range(n) for k, many in (("pets", PETS), ("money", MONEY))
            for t in [many[i % 3]]]
    if path.suffix == ".csv":
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([("text", "label"), *rows])
        return path
    return lines(path, [{"text": t, "label": k} for t, k in rows])


def talks(path):
    return lines(path, [{"messages": [{"role": "user", "content": w},
                                      {"role": "assistant", "content": f"{w} it is"}]}
                        for w in (PETS + MONEY) * 4])


def prose(path):
    path.write_text("\n\n".join((PETS + MONEY) * 12))
    return path


def scans(path):
    rng = np.random.default_rng(0)
    for k, low in (("dark", 0), ("light", 160)):
        (path / k).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(low, low + 90, (20, 24, 3), dtype=np.uint8)).save(
                path / k / f"{i}.png")
    return path


def text_batch(folder, texts=("a cat in the bank",)):
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder)(list(texts), return_tensors="pt"))


def picture_batch(folder):
    from transformers import AutoImageProcessor

    image = Image.fromarray(np.full((20, 24, 3), 120, dtype=np.uint8))
    return dict(AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt"))


@torch.no_grad()
def outputs(model, batch):
    return model.eval()(**batch).logits


def agree(plain, merged):
    """A decoder that classifies finds the last token by the tokenizer's pad."""
    if hasattr(plain.config, "pad_token_id"):
        plain.config.pad_token_id = merged.config.pad_token_id


ROADS = {
    "csv": ("bert", lambda d: mails(d / "mails.csv"), "AutoModelForSequenceClassification",
            text_batch, ["my cat sat", "bank rates"]),
    "jsonl": ("bert", lambda d: mails(d / "mails.jsonl"), "AutoModelForSequenceClassification",
              text_batch, ["my cat sat", "bank rates"]),
    "decoder": ("qwen", lambda d: mails(d / "mails.csv"), "AutoModelForSequenceClassification",
                text_batch, ["my cat sat", "bank rates"]),
    "prose": ("qwen", lambda d: prose(d / "prose.txt"), "AutoModelForCausalLM", text_batch,
              ["the cat"]),
    "chat": ("qwen", lambda d: talks(d / "talks.jsonl"), "AutoModelForCausalLM", text_batch,
             ["the cat sat on the mat"]),
    "pictures": ("vit", lambda d: scans(d / "scans"), "AutoModelForImageClassification",
                 picture_batch, None),
}


@pytest.mark.parametrize("road", ROADS)
def test_a_run_is_used_merged_and_exported_from_the_command_line(
        capsys, request, tmp_path, road):  # newcomer A1
    import peft
    import transformers

    import burnish as library
    from burnish.fit.finished import Finished

    base, write, auto, batch_of, asked = ROADS[road]
    base, data, run = request.getfixturevalue(base), write(tmp_path), tmp_path / "run"
    fitted = burnish(capsys, "fit", "--model", base, "--data", data, "--output", run, *SHORT)

    inputs = asked or [data / "dark" / "0.png", data / "light" / "0.png"]
    answers = burnish(capsys, "predict", run, *inputs)["answers"]
    assert [a["input"] for a in answers] == [str(i) for i in inputs]
    assert burnish(capsys, "predict", run, *inputs)["answers"] == answers

    found = burnish(capsys, "evaluate", run, data)
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert found["rows"] == fitted["data"]["rows"]["validation"]
    for name, value in fitted["metrics"]["validation"].items():
        assert found["tuned"][name] == pytest.approx(value, rel=1e-4), name

    batch = batch_of(run)
    tuned = outputs(Finished.open(run).tuned.model, batch)

    done = burnish(capsys, "merge", run, "--output", tmp_path / "merged")
    assert done["drift"] < 1e-4
    merged = getattr(transformers, auto).from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(merged, batch_of(tmp_path / "merged")), tuned, atol=1e-5)
    if asked is None or "label" in answers[0]:
        assert set(merged.config.label2id) == set(fitted["data"]["labels"])

    burnish(capsys, "export", run, "--output", tmp_path / "peft")
    labels = fitted["data"]["labels"]
    head = {"num_labels": len(labels), "ignore_mismatched_sizes": True} if labels else {}
    plain = getattr(transformers, auto).from_pretrained(base, **head)
    agree(plain, merged)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft"))
    assert torch.allclose(outputs(opened, batch), tuned, atol=1e-5)

    plain = getattr(transformers, auto).from_pretrained(base, **head)   # and through our own door
    agree(plain, merged)
    assert torch.equal(outputs(library.load(plain, run).model, batch), tuned)


def test_the_same_in_processes_of_their_own(bert, tmp_path):
    source = str(Path(__file__).resolve().parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source}

    def call(*argv):
        return subprocess.run([sys.executable, "-m", "burnish", *map(str, argv)], env=env,
                              capture_output=True, text=True, cwd=tmp_path, timeout=300)

    mails(tmp_path / "mails.csv")
    done = call("fit", "--model", bert, "--data", "mails.csv", "--output", "run", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "promise:" in done.stdout and "written to run" in done.stdout
    done = call("predict", "run", "the cat", "bank rates")
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr
