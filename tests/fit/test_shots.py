"""Several examples of one task in a sequence, of which every answer is learnt."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for

WORDS = ["kiln", "clay", "glaze", "slip", "wheel", "cone", "bisque", "grog", "ash"]


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def turned(word, how):
    return {"prompt": f"{how} {word} = ", "completion": word[::-1] if how == "turn" else
            word.upper()}


ROWS = [{**turned(w, how), "kind": how} for w in WORDS for how in ("turn", "shout")]
CHATS = [{"messages": [{"role": "system", "content": system},
                       {"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}]}
         for w in WORDS for system in ("Be brief.", "Be kind.")]


@pytest.fixture
def learnt(tmp_path, tokenizer):
    def build(rows=ROWS, max_length=None, group=None, **how):
        found = read(lines(tmp_path / "x.jsonl", rows), validation=0, group=group)
        return task_for(found, "", processor=tokenizer, max_length=max_length, seed=7, **how)
    return build


def model_of(tokenizer, length=256, double=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, pad_token_id=0, bos_token_id=1,
        eos_token_id=2)).eval()
    return made.double() if double else made


def answers(tokenizer, labels):
    """What is learnt of a row, answer by answer."""
    said = tokenizer.decode([y for y in labels if y != -100])
    return said.split("</s>")[:-1]


def stretches(labels):
    """(first token, one past the last) of each answer."""
    ends = [i + 1 for i, y in enumerate(labels) if y == 2]
    out, start = [], 0
    for end in ends:
        first = next(i for i in range(start, end) if labels[i] != -100)
        out.append((first, end))
        start = end
    return out


def test_one_pass_has_the_loss_of_as_many_passes_over_its_beginnings(learnt, tokenizer):
    """L = - sum_i log p(y_i | x_1 y_1 ... x_i), in float64, each term by a pass of its own."""
    task, model = learnt(shots=4, group="kind"), model_of(tokenizer)
    row = task.rows("train")[0]
    spans = stretches(row["labels"])
    assert len(spans) == 4
    with torch.no_grad():
        one = model(**task.collate([row])).loss
        total = tokens = cost = 0
        for first, end in spans:
            ids = torch.tensor([row["input_ids"][:end]])
            said = model(input_ids=ids).logits[0].log_softmax(-1)
            total -= sum(said[t - 1, ids[0, t]] for t in range(first, end))
            tokens, cost = tokens + end - first, cost + end
    assert one.item() == pytest.approx((total / tokens).item(), abs=1e-6)    # its own is float32
    assert len(row["input_ids"]) / cost == pytest.approx(2 / 5, abs=0.05)


@pytest.mark.parametrize("shots", [2, 4, 8])
def test_a_pass_over_equal_examples_costs_two_over_n_plus_one(learnt, shots):
    task = learnt([turned(f"{i:04d}", "turn") for i in range(shots)], shots=shots)
    row = task.rows("train")[0]
    beginnings = sum(end - 1 for _, end in stretches(row["labels"]))     # without the opening token
    assert (len(row["input_ids"]) - 1) / beginnings == pytest.approx(2 / (shots + 1))


def test_one_shot_is_tuning_on_single_answers(learnt):
    plain, one = learnt(), learnt(shots=1)
    rows = [[task.rows("train")[i] for i in range(len(ROWS))] for task in (plain, one)]
    assert rows[0] == rows[1]
    dealt = learnt(CHATS, shots=3).rows("train")          # and the first of several is the same
    single = learnt(CHATS).rows("train")
    for i in range(len(dealt)):
        hand, row = dealt.hands(0)[i], dealt[i]
        alone = single[hand[0]]
        end = stretches(row["labels"])[0][1]
        assert row["labels"][:end] == alone["labels"][:end]
        assert row["input_ids"][:end] == alone["input_ids"][:end]


def test_rows_of_a_batch_do_not_see_each_other(learnt, tokenizer):
    task, model = learnt(shots=3, group="kind"), model_of(tokenizer)
    rows = [task.rows("train")[i] for i in range(3)]
    with torch.no_grad():
        together = model(**task.feed(task.collate(rows))).logits
        for k, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            assert torch.allclose(together[k, :len(alone)], alone, atol=1e-12)


@pytest.mark.parametrize("rows, group, tell", [
    (ROWS, "kind", lambda text: "turn" if "turn" in text else "shout"),
    (CHATS, None, lambda text: "brief" if "brief" in text else "kind")])
def test_tasks_share_no_sequence(learnt, tokenizer, rows, group, tell):
    dealt = learnt(rows, shots=4, group=group).rows("train")
    for i in range(3 * len(dealt)):                             # in every pass
        said = tokenizer.decode(dealt[i]["input_ids"])
        kinds = {tell(part) for part in said.split("</s>") if "=" in part} if group else {
            "brief" in said and "kind" in said}
        assert len(kinds) == 1 and kinds != {True}
        assert said.count("Be ") <= 1                           # the system speaks once
    assert len(dealt) == 2 * 3                                  # nine of each kind, four in a row


def test_each_pass_deals_anew_and_the_same_again(learnt, tokenizer):
    task = learnt(shots=4)
    dealt, n = task.rows("train"), len(task.rows("train"))
    passes = [[tuple(answers(tokenizer, dealt[i + k * n]["labels"])) for i in range(n)]
              for k in range(3)]
    for made in passes:                                         # each example once in a pass
        assert Counter(a for row in made for a in row) == Counter(
            r["completion"] for r in ROWS)
    assert passes[0] != passes[1] != passes[2]
    again = learnt(shots=4).rows("train")
    assert [again[i + n] for i in range(n)] == [dealt[i + n] for i in range(n)]
    assert dealt.redrawn
    task.data.splits["validation"] = task.data.splits["train"]
    assert not task.rows("validation").redrawn


@pytest.mark.parametrize("most", [14, 20, 45, 70, 1000])
def test_no_row_is_longer_than_was_promised(learnt, tokenizer, most):
    dealt = learnt(shots=6, max_length=most).rows("train")
    promised = len(dealt.longest(2)[1]["input_ids"])
    long = [len(dealt[i]["input_ids"]) for i in range(5 * len(dealt))]
    assert max(long) <= promised <= most
    assert promised > most - 1 or most == 1000                  # full, where there is enough
    for i in range(5 * len(dealt)):                             # examples are whole
        row = dealt[i]
        assert row["labels"][-1] == 2 or len(row["labels"]) == most
        assert len(row["labels"]) <= dealt.length(i)
    assert any("sequences" in n for n in dealt.notes)
    if most > 40:                                               # and none is left out of a pass
        said = [a for i in range(len(dealt)) for a in answers(tokenizer, dealt[i]["labels"])]
        assert Counter(said) == Counter(r["completion"] for r in ROWS)


def test_examples_that_a_recipe_tells_apart_share_no_sequence(learnt):
    from datasets import Dataset

    task = learnt(shots=4)
    rows = task.data.train.add_column("task", [i % 3 for i in range(len(ROWS))])
    task.data.splits["train"], task.data.keys = rows, ("task",)
    dealt = task.rows("train")
    assert isinstance(rows, Dataset)
    for turn in range(3):
        for i, hand in enumerate(dealt.hands(turn)):
            assert {k % 3 for k in hand} == {dealt[i + turn * len(dealt)]["task"]}
    assert "task" in task.collate(dealt.longest(2))


def test_a_run_with_shots_goes_from_rows_to_answers_and_on(tmp_path, tokenizer):
    model_of(tokenizer, double=False).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    data = lines(tmp_path / "x.jsonl", ROWS)
    how = {"recipe": "lora(rank=2)", "shots": 3, "group": "kind", "batch_size": 2, "lr": 1e-3,
           "quiet": True, "report": False, "save_steps": 2, "eval_steps": 2, "validation": 4,
           "scheduler": "constant", "warmup_steps": 0}
    run = burnish.fit(str(tmp_path / "m"), str(data), output=tmp_path / "a", max_steps=6, **how)
    assert run.facts["task"] == {"shots": 3}
    assert run.facts["data"]["reading"]["group"] == "kind"
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.1)
    burnish.fit(str(tmp_path / "m"), str(data), output=tmp_path / "b", max_steps=4, **how)
    # the same six updates where the run was stopped after four
    (tmp_path / "b" / "run.json").unlink()
    on = burnish.fit(str(tmp_path / "m"), str(data), output=tmp_path / "b", max_steps=6,
                     resume=True, **how)
    for name, value in run.tuned.named_parameters():
        assert value.equal(dict(on.tuned.named_parameters())[name]), name

    from burnish.fit.finished import Finished

    found = Finished.open(tmp_path / "a").evaluate(str(data))
    assert found["these"] == "held out by this run"
    assert found["tuned"]["loss"] == pytest.approx(run.metrics["validation"]["loss"], rel=1e-4)


def test_what_cannot_be_dealt_is_refused(tmp_path, tokenizer, learnt):
    model_of(tokenizer, double=False).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")

    def refused(error, words, rows=ROWS, **how):
        with pytest.raises(error, match=words):
            burnish.fit(str(tmp_path / "m"), str(lines(tmp_path / "y.jsonl", rows)),
                        output=tmp_path / "o", quiet=True, **{"recipe": "lora(rank=2)", **how})

    refused(ConfigError, "shots=0: expected 1 or more", shots=0)
    refused(ConfigError, "shots='many': expected a whole number", shots="many")
    refused(ConfigError, "group= says which examples may share", group="kind")
    refused(DataError, "group='kin' is no column of the data; .*did you mean 'kind'", group="kin",
            shots=2)
    refused(DataError, "field 'kind': expected a word or a number, it is missing", shots=2,
            rows=[*ROWS, {**ROWS[0], "kind": None}], group="kind")
    refused(ConfigError, "shots=2 is a setting of instruction-tuning, and the data are for",
            shots=2, rows=[{"text": "a b"}] * 3)
    refused(ConfigError, "group='kind' says which task an example of instruction-tuning is of",
            group="kind", rows=[{"text": "a b", "label": y, "kind": 1} for y in "xyxyxy"])
    refused(ConfigError, "dp protects a sample, and with shots=2 a sample is several rows",
            shots=2, recipe="lora(rank=2) + dp(epsilon=8.0)")


def test_figures_count_every_answer(learnt, tokenizer):
    """The loss of an evaluation is per token of all answers, however rows are batched."""
    task, model = learnt(shots=4, group="kind"), model_of(tokenizer)
    rows = task.rows("train")
    total = count = 0
    with torch.no_grad():
        for i in range(len(rows)):
            ids, labels = (torch.tensor([rows[i][k]]) for k in ("input_ids", "labels"))
            said = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            asked = labels[0, 1:] != -100
            total -= said[asked].gather(1, labels[0, 1:][asked, None]).sum()
            count += int(asked.sum())
    assert evaluate(model, task, "train", 3)["loss"] == pytest.approx((total / count).item())
