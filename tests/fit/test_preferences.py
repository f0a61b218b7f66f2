"""Preferences: rows in every layout, losses from their equations, a base that is asked once."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from burnish.core.batches import call
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for
from burnish.fit.tasks.preferences import BETAS, preference


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


PLAIN = [{"prompt": f"say {w}:", "chosen": f" {w}", "rejected": " no"} for w in ("ab", "cd", "e")]


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("row", [
    {"prompt": [turn("user", "a?")], "chosen": [turn("assistant", "b")],
     "rejected": [turn("assistant", "c")]},
    {"prompt": [turn("user", "a?")], "chosen": "b", "rejected": "c"},
    {"prompt": "a?", "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]},
    {"prompt": "a?", "chosen": [turn("user", "a?"), turn("assistant", "b")],
     "rejected": [turn("user", "a?"), turn("assistant", "c")]},
    {"chosen": [turn("user", "a?"), turn("assistant", "b")],
     "rejected": [turn("user", "a?"), turn("assistant", "c")]},
    {"prompt": [turn("user", "a?")], "chosen": [turn("user", "a?"), turn("assistant", "b")],
     "rejected": [turn("user", "a?"), turn("assistant", "c")]}])
def test_every_way_to_write_a_preference(tmp_path, row):
    data = read(lines(tmp_path / "x.jsonl", [row] * 4), validation=0)
    assert data.task == "preference-tuning" and data.form == "messages"
    assert data.train[0] == {"chosen": [turn("user", "a?"), turn("assistant", "b")],
                             "rejected": [turn("user", "a?"), turn("assistant", "c")]}


def test_a_prompt_under_another_name(tmp_path):
    rows = [{"question": "a", "chosen": "b", "rejected": "c"}] * 3
    data = read(lines(tmp_path / "x.jsonl", rows), prompt="question", validation=0)
    assert data.task == "preference-tuning" and data.train[0]["prompt"] == "a"


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "field 'prompt': expected text"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected': expected text"),
    ({"chosen": [turn("user", "a"), turn("assistant", "b")], "rejected": [
        turn("user", "x"), turn("assistant", "c")]}, "answer different turns"),
    ({"chosen": [turn("user", "a")], "rejected": [turn("user", "b")]}, "the last turn is user's")])
def test_what_prefers_nothing_is_named(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read(lines(tmp_path / "x.jsonl", [row] * 3), task="preference-tuning")


# -- losses ----------------------------------------------------------------------------------------
def by_hand(kind, c, r, bc, br, nc, nr, beta, gamma):
    def less(x):                                           # -log sigma(x)
        return math.log1p(math.exp(-x))

    def odds(x):
        return math.log(math.exp(x) / (1 - math.exp(x)))

    if kind == "dpo":
        return less(beta * ((c - bc) - (r - br)))
    if kind == "ipo":
        return ((c - bc) / nc - (r - br) / nr - 1 / (2 * beta))**2
    if kind == "hinge":
        return max(0.0, 1 - beta * ((c - bc) - (r - br)))
    if kind == "orpo":
        return -c / nc + beta * less(odds(c / nc) - odds(r / nr))
    return less(beta * (c / nc - r / nr) - gamma)


@pytest.mark.parametrize("kind", BETAS)
def test_losses_are_their_equations(kind):
    g = torch.Generator().manual_seed(0)
    said, base = (-torch.rand(6, 2, generator=g, dtype=torch.float64) * 9 for _ in range(2))
    n, beta, gamma = torch.randint(1, 9, (6, 2), generator=g), 0.3, 0.7
    loss, reward = preference(kind, said, n, base, beta, gamma)
    for i in range(6):
        (c, r), (bc, br), (nc, nr) = said[i].tolist(), base[i].tolist(), n[i].tolist()
        wanted = by_hand(kind, c, r, bc, br, nc, nr, beta, gamma)
        assert loss[i].item() == pytest.approx(wanted, rel=1e-9)
    if kind in ("dpo", "ipo", "hinge"):
        assert torch.allclose(reward, beta * (said - base))


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


def test_the_log_probability_of_an_answer_is_that_of_its_tokens(made, tokenizer):
    task, model = made()
    rows = task.rows("train")
    batch = task.together([rows[i] for i in range(3)])
    assert batch["input_ids"].shape[:2] == (3, 2)
    said, counts = task.spoken(call(model, task.feed(batch)).logits, batch["labels"])
    for i, row in enumerate(PLAIN):
        for k, key in enumerate(("chosen", "rejected")):
            ids = torch.tensor([[1, *tokenizer(row["prompt"] + row[key])["input_ids"], 2]])
            n = len(row[key]) + 1                                    # and the stop
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            wanted = logp.gather(1, ids[0, 1:, None])[-n:].sum()
            assert said[i, k].item() == pytest.approx(wanted.item(), abs=1e-5)
            assert counts[i, k] == n


def test_the_base_is_asked_once_with_the_adapter_off(made):
    import burnish

    task, model = made()
    tuned = burnish.tune(model, "lora(rank=2)")
    with torch.no_grad():
        for _, p in tuned.named_parameters():
            p.add_(torch.randn_like(p) * 0.3)
    task.ready(tuned, "cpu", 2)
    rows = task.rows("train")
    with tuned.disabled(), torch.no_grad():
        batch = task.together([rows[i] for i in range(3)])
        base = task.spoken(call(tuned.model, task.feed(batch)).logits, batch["labels"])[0]
    assert torch.allclose(batch["reference"], base, atol=1e-5)
    with tuned.disabled(), torch.no_grad():                          # nothing apart: log 2 each
        figures = evaluate(tuned.model, task, "train", 2)
    assert figures["loss"] == pytest.approx(0.693147, abs=1e-4) and figures["margin"] == \
        pytest.approx(0, abs=1e-5)
    before = rows.reference
    task.ready(tuned, "cpu", 2)
    assert rows.reference is before


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "norms"])
def test_a_run_that_goes_on_from_another_is_compared_with_that(made, tmp_path, tokenizer, recipe,
                                                               capsys):
    """Instructions first, then preferences: the reference is the instructed model, not the base."""
    import burnish
    from burnish.cli import main
    from burnish.fit.finished import Finished

    task, model = made()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = lines(tmp_path / "sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]}
                                           for r in PLAIN] * 4)
    then = lines(tmp_path / "dpo.jsonl", PLAIN * 4)
    words = {"quiet": True, "report": False, "measure": False, "validation": 0, "batch_size": 4,
             "max_steps": 3}
    burnish.fit(str(tmp_path / "base"), str(first), recipe, output=tmp_path / "sft", lr=0.3,
                **words)
    instructed = Finished.open(tmp_path / "sft").tuned.model
    rows = task.rows("train")
    batch = task.together([rows[i] for i in range(3)])
    with torch.no_grad():
        wanted = task.spoken(call(instructed, task.feed(batch)).logits, batch["labels"])[0]
    run = burnish.fit(str(tmp_path / "base"), str(then), recipe, output=tmp_path / "dpo", lr=0.1,
                      init_from=str(tmp_path / "sft"), **words)
    held = tmp_path / "sft" / "adapter_model.safetensors"
    assert run.facts["task"] == {"reference_from": str((tmp_path / "sft").resolve()),
                                 "reference_is": hashlib.sha256(held.read_bytes()).hexdigest()}
    finished = Finished.open(tmp_path / "dpo")              # with values that have gone on
    finished.task.data = task.data
    before = {n: t.clone() for n, t in finished.tuned.tensors().items()}
    finished.task.ready(finished.tuned, "cpu", 2)
    assert torch.allclose(finished.task.rows("train").reference, wanted, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in finished.tuned.tensors().items())
    assert main(["evaluate", str(tmp_path / "dpo"), str(then), "--split", "train", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tuned"]
    assert told["margin"] != 0
    burnish.fit(str(tmp_path / "base"), str(first), recipe, output=tmp_path / "sft", lr=0.2,
                overwrite=True, **words)     # the run it began from, made anew
    asked = ["evaluate", str(tmp_path / "dpo"), str(then), "--split", "train"]
    assert main(asked) == 2 and "has changed since this run began from" in capsys.readouterr().err
    (tmp_path / "sft").rename(tmp_path / "moved")
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "no such folder" in said and "task.reference_from" in said


def test_a_key_of_a_pair_is_that_of_both_answers(made):
    task, _ = made()
    rows = task.rows("train")
    batch = task.together([rows[i] for i in range(3)]) | {"task": torch.tensor([4, 5, 6])}
    assert task.feed(batch)["task"].tolist() == [4, 4, 5, 5, 6, 6]


def test_what_looks_at_one_text_is_refused(made, tmp_path, tokenizer):
    import burnish

    _, model = made()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = str(lines(tmp_path / "rows.jsonl", PLAIN))
    for how, words in (({"recipe": "lora(rank=2) + dp(epsilon=8)"}, "dp looks at each sample"),
                       ({"memory": "8GB"}, "which no plan divides")):
        with pytest.raises(ConfigError, match=words):
            burnish.fit(str(tmp_path / "base"), path, output=tmp_path / "out", quiet=True, **how)


def test_a_task_says_which_settings_are_its_own(made, tmp_path, tokenizer):
    for how, words in (({"loss_type": "dop"}, "did you mean 'dpo'"), ({"beta": 0.0}, "beta=0.0"),
                       ({"gamma": 0.5}, "gamma is a margin that simpo asks for")):
        with pytest.raises(ConfigError, match=words):
            made(**how)
    with pytest.raises(ConfigError, match="beta=0.1 is a setting of preference-tuning"):
        made([{"prompt": "a", "completion": "b"}] * 3, beta=0.1)


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"loss_type": "orpo"}, {"loss_type": "simpo"},
                                 {"loss_type": "ipo"}])
def test_a_run_learns_what_is_preferred(made, tmp_path, tokenizer, how, capsys):
    import burnish
    from burnish.cli import main

    _, model = made()
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": f"{a}{b}:", "chosen": " yes", "rejected": " no"} for a in "abcdefgh"
            for b in "abcd"]
    path = lines(tmp_path / "rows.jsonl", rows)
    run = burnish.fit(str(folder), str(path), "lora(rank=4)", output=tmp_path / "out", lr=3e-3,
                      epochs=4, batch_size=4, quiet=True, **how)
    assert run.metrics["validation"]["accuracy"] == 1.0
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moments = run.facts["memory"]["moments"]["evaluate"]
    assert moments["promised"] == moments["measured"]
    assert run.facts["recipe"] == "lora(rank=4) + chunked_loss"
    assert main(["evaluate", str(tmp_path / "out"), str(path), "--split", "validation",
                 "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tuned"]
    assert found == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["predict", str(tmp_path / "out"), "aa:", "--tokens", "3"]) == 0
