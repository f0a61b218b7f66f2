"""Answers marked good or bad: rows, KTO's loss from its equation, a base that is asked once."""

from __future__ import annotations

import json
import math

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.batches import call
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.readings import AmbiguousError
from burnish.fit.tasks import evaluate, task_for
from burnish.fit.tasks.marks import distance, kto

PLAIN = [{"prompt": f"say {w}:", "completion": f" {w}", "label": k} for w, k in (
    ("ab", True), ("cd", False), ("e", True))]


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def test_every_way_to_write_a_mark(tmp_path):
    for yes, no in ((True, False), ("true", "False")):
        rows = [{"prompt": "a", "completion": "b", "label": yes},
                {"prompt": "a", "completion": "c", "label": no}]
        data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
        assert data.task == "unpaired-preference-tuning" and data.form == "completion"
        assert data.train["good"][:] == [True, False]
    rows = [{"prompt": [turn("user", "a?")], "completion": [turn("assistant", "b")], "label": k}
            for k in (True, False)]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    assert data.form == "messages" and data.train[0]["messages"] == [turn("user", "a?"),
                                                                     turn("assistant", "b")]
    rows = [{"ask": "a", "say": "b", "fine": k} for k in (1, 0)]
    data = read(lines(tmp_path / "x.jsonl", rows), task="unpaired-preference-tuning", prompt="ask",
                completion="say", label="fine", validation=0)
    assert data.train["good"][:] == [True, False]
    (tmp_path / "x.csv").write_text("prompt,completion,label\na,b,true\nc,d,false\n")
    assert read(tmp_path / "x.csv", validation=0).train["good"][:] == [True, False]
    for wrong in (None, [1], "yes", -1):
        rows = [{"prompt": "a", "completion": "b", "label": k} for k in (True, wrong)]
        with pytest.raises(DataError, match="field 'label': expected true or false, it is"):
            read(lines(tmp_path / "x.jsonl", rows), task="unpaired-preference-tuning")


def test_ones_and_noughts_are_asked_about(tmp_path):
    """They may be classes: the way to learn them as marks is offered first, and works."""
    for yes, no in ((1, 0), ("1", "0")):
        rows = [{"prompt": "a", "completion": f"b{i}", "label": (yes, no)[i % 2]} for i in range(6)]
        with pytest.raises(AmbiguousError, match="task='unpaired-preference-tuning'") as found:
            read(lines(tmp_path / "x.jsonl", rows))
        first, *others = found.value.readings
        data = read(tmp_path / "x.jsonl", validation=0, **dict(first.flags))
        assert data.train["good"][:] == [True, False] * 3
        assert (("prompt", "prompt"), ("completion", "completion")) in [r.flags for r in others]
    rows = [{**r, "label": i % 3} for i, r in enumerate(rows)]
    with pytest.raises(AmbiguousError) as found:
        read(lines(tmp_path / "x.jsonl", rows))
    assert "unpaired" not in str(found.value)


def test_the_loss_is_its_equation():
    g = torch.Generator().manual_seed(0)
    apart, strange = (torch.randn(6, generator=g, dtype=torch.float64) * 9 for _ in range(2))
    good = torch.tensor([True, False, True, True, False, False])
    kl = max(0.0, sum(strange.tolist()) / 6)
    assert distance(strange).item() == pytest.approx(kl) and distance(-strange.abs()) == 0
    found = kto(apart, torch.tensor(kl, dtype=torch.float64), good, 0.3, 1.5, 0.7)
    for a, is_good, loss in zip(apart.tolist(), good.tolist(), found.tolist(), strict=True):
        away = 0.3 * (a - kl) * (1 if is_good else -1)
        wanted = (1.5 if is_good else 0.7) * (1 - 1 / (1 + math.exp(-away)))
        assert loss == pytest.approx(wanted, rel=1e-9)


@pytest.fixture
def made(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2))

    def build(rows=PLAIN, **how):
        data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
        return task_for(data, "", processor=tokenizer, **how), model
    return build


def said(model, tokenizer, prompt, answer):
    ids = torch.tensor([[1, *tokenizer(prompt + answer)["input_ids"], 2]])
    logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[-len(answer) - 1:].sum().item()


def test_an_answer_stands_beside_the_next_rows(made, tokenizer):
    task, model = made()
    rows = task.rows("train")
    batch = task.together([rows[i] for i in range(3)])
    assert batch["input_ids"].shape[:2] == (3, 2) and batch["good"].tolist() == [True, False, True]
    with torch.no_grad():
        logits = call(model, task.feed(batch)).logits
        found = task.apart(logits, batch["labels"], batch["reference"])
        for i, row in enumerate(PLAIN):
            other = PLAIN[(i + 1) % 3]["completion"]
            for k, answer in enumerate((row["completion"], other)):
                assert found[i, k].item() == pytest.approx(
                    said(model, tokenizer, row["prompt"], answer), abs=1e-4)


def test_figures_are_of_the_split_however_rows_are_batched(made, tokenizer):
    task, model = made(beta=0.5, desirable_weight=2.0)
    tuned = burnish.tune(model, "lora(rank=2)")
    with torch.no_grad():
        before = [[said(tuned.model, tokenizer, r["prompt"], PLAIN[j % 3]["completion"])
                   for j in (i, i + 1)] for i, r in enumerate(PLAIN)]
        task.ready(tuned, "cpu", 2)
        for _, p in tuned.named_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        after = [[said(tuned.model, tokenizer, r["prompt"], PLAIN[j % 3]["completion"])
                  for j in (i, i + 1)] for i, r in enumerate(PLAIN)]
    apart = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    kl = max(0.0, apart[:, 1].mean().item())
    wanted, right = 0.0, 0
    for a, row in zip(apart[:, 0].tolist(), PLAIN, strict=True):
        away = 0.5 * (a - kl)
        wanted += 2 / (1 + math.exp(away)) if row["label"] else 1 / (1 + math.exp(-away))
        right += (a > kl) == row["label"]
    for size in (1, 2, 3):
        found = evaluate(tuned.model, task, "train", size)
        assert found["loss"] == pytest.approx(wanted / 3, abs=1e-4)
        assert (found["kl"], found["accuracy"]) == (pytest.approx(kl, abs=1e-4), right / 3)
        assert found["margin"] == pytest.approx(
            0.5 * ((apart[0, 0] + apart[2, 0]) / 2 - apart[1, 0]).item(), abs=1e-4)


def test_no_gradient_passes_through_the_distance(made):
    task, model = made()
    rows = task.rows("train")
    batch = task.together([rows[i] for i in range(3)])
    logits = call(model, task.feed(batch)).logits.detach().requires_grad_()
    task.loss(logits, tuple(batch[k] for k in task.truth)).backward()
    grad = logits.grad.view(3, 2, -1)
    assert grad[:, 0].abs().sum() > 0 and grad[:, 1].abs().sum() == 0


def test_what_tells_nothing_apart_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="every answer is marked good; nothing is told apart"):
        made([{**r, "label": True} for r in PLAIN])
    for how, text in (({"loss_type": "dpo"}, "kto is for them"), ({"beta": 0.0}, "beta=0.0"),
                      ({"undesirable_weight": -1.0}, "undesirable_weight=-1.0"),
                      ({"gamma": 1.0}, "gamma=1.0 is a setting of .*preference-tuning")):
        with pytest.raises(ConfigError, match=text):
            made(**how)
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    with pytest.raises(ConfigError, match="rows of prompt, completion and label"):
        made(pairs, loss_type="kto")


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_learns_what_is_marked(made, tmp_path, tokenizer, capsys):
    _, model = made()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{a}{b}:", "completion": word, "label": word == " yes"} for a in "abcdefgh"
            for b in "abcd" for word in (" yes", " no")]
    path = lines(tmp_path / "rows.jsonl", rows)
    run = burnish.fit(str(tmp_path / "base"), str(path), "lora(rank=4)", output=tmp_path / "out",
                      lr=3e-3, epochs=6, batch_size=8, quiet=True)
    assert run.metrics["validation"]["accuracy"] > 0.9
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(tmp_path / "out"), str(path), "--split", "validation",
                 "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tuned"]
    assert found == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["predict", str(tmp_path / "out"), "aa:", "--tokens", "3"]) == 0
