"""What to run: read off where it can be, tried where that is asked for, and said with why."""

from __future__ import annotations

import importlib
import json
import shlex

import pytest
import torch
from tests.cli.conftest import complaints

from burnish.cli import main
from burnish.core.errors import BurnishError, ConfigError, NoPlanError
from burnish.fit import advice
from burnish.fit.advice import RATES, UPDATES, advise
from burnish.memory.quality import quality_of

SAID = ("the cat sat on the mat", "stocks fell as rates rose")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    module = importlib.import_module("burnish.memory.plan")
    monkeypatch.setattr(module, "shipped", lambda: [["lora", "lora + lean(level=3)"], ["full"]])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    BertModel(BertConfig(
        vocab_size=wordpiece(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    from tests.e2e.conftest import bytelevel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen"
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=bytelevel(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=128,
        eos_token_id=0, bos_token_id=None, pad_token_id=None)).save_pretrained(folder)
    return folder


@pytest.fixture
def mails(tmp_path):
    path = tmp_path / "mails.csv"
    path.write_text("text,label\n" + "".join(
        f"{SAID[i % 2]} {i},{('pets', 'money')[i % 2]}\n" for i in range(40)))
    return path


def test_what_is_read_off_is_not_asked(bert, mails):
    found = advise(str(bert), str(mails))
    assert found.facts["task"] == "text-classification" and found.facts["classes"] == 2
    assert found.facts["rows"] == 36 and found.facts["longest"] >= found.facts["middle"] > 5
    assert found.facts["memory"] > 10**8 and found.facts["device"] in ("cpu", "cuda")
    assert len(found.lines) == 3 and found.test is None
    words = shlex.split(found.command)
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--recipe"] == found.recipe and quality_of(found.recipe, "text").known
    assert int(given["--batch_size"]) * found.accumulate * advice.LEAST <= found.epochs * 36 * 2
    assert "--memory" not in given and float(given["--learning_rate"]) == found.rate


def test_no_weights_are_read_without_a_test(bert, mails, monkeypatch):
    from burnish.fit.tasks.base import Task

    monkeypatch.setattr(Task, "load", lambda *a, **k: pytest.fail("weights were read"))
    advise(str(bert), str(mails), validation=0.5)


def test_a_smaller_memory_gets_a_leaner_recipe_and_none_is_said(bert, mails):
    full = advise(str(bert), str(mails), "1GB")
    tight = advise(str(bert), str(mails), "280kB")
    assert tight.recipe != full.recipe or tight.batch < full.batch
    assert shlex.split(tight.command)[-4:-2] == ["--memory", "280kB"]
    with pytest.raises(NoPlanError, match="comes closest"):
        advise(str(bert), str(mails), "1kB")


@pytest.mark.parametrize("odd", [{"resume": True}, {"lr": 1}, {"lora_rank": 4}, {"quiet": True}])
def test_settings_of_the_run_are_what_is_advised(bert, mails, odd):
    with pytest.raises(ConfigError, match=f"{next(iter(odd))} is a setting of the run"):
        advise(str(bert), str(mails), **odd)


def test_a_test_says_its_cost_tries_every_rate_and_leaves_no_trace(bert, mails, monkeypatch):
    from burnish.fit.tasks.base import Task

    seen, said = [], []
    load = Task.load

    def kept(self, *a, **k):
        model = load(self, *a, **k)
        seen.append((model, {n: t.clone() for n, t in model.state_dict().items()}))
        return model

    monkeypatch.setattr(Task, "load", kept)
    done = advise(str(bert), str(mails), test=True, say=said.append).test
    assert len(done.losses) == len(RATES) and done.best in done.losses
    cost = next(s for s in said if s.startswith("test:"))
    assert f"{done.updates} updates, at most about" in cost and done.seconds > 0
    assert done.updates == (1 + len(RATES)) * UPDATES + len(done.speeds) * advice.TIMED
    (model, before), = seen
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_same_start_and_rows_for_every_rate(bert, mails):
    one, two = (advise(str(bert), str(mails), test=True).test for _ in range(2))
    assert one.losses == two.losses and one.still == two.still


@pytest.mark.parametrize("losses, best", [
    ({1e-4: 0.9, 1e-3: 0.31, 1e-2: 0.3, 1e-1: None}, 1e-3),    # nine tenths of the fall
    ({1e-4: 0.9, 1e-3: 0.5, 1e-2: 0.3, 1e-1: None}, 1e-2),
    ({1e-4: 1.0, 1e-3: 1.1, 1e-2: 1.05}, 1e-3)])               # nothing fell: the middle one
def test_which_rate_is_taken(losses, best):
    assert advice._best(1.0, losses) == best


def test_no_rate_at_all_is_an_error():
    with pytest.raises(BurnishError, match="came apart at every rate"):
        advice._best(1.0, {1e-3: None, 1e-2: None})


def test_the_smallest_batch_that_is_as_fast():
    assert advice._smallest({1: 10.0, 2: 19.0, 4: 20.0, 8: 20.5}) == 2


@pytest.mark.parametrize("rows, many", [(100_000, (16, 1)), (5000, (16, 3)), (200, (8, 3)),
                                        (100, (4, 3)), (10, (4, 10))])
def test_few_rows_are_seen_more_often_in_smaller_batches(rows, many):
    assert advice.amount(rows) == many


def test_the_command_line_prints_it_within_eighty_columns(qwen, tmp_path, capsys):
    talks = tmp_path / "my talks.jsonl"
    talks.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": SAID[i % 2]}, {"role": "assistant", "content": f"{i} it is"}]})
        + "\n" for i in range(20)))
    assert main(["advise", str(qwen), str(talks), "--max_length", "64"]) == 0
    out = capsys.readouterr().out
    why, _, command = out.partition("\n\n")
    assert not complaints(why, "") and "--test" in why
    words = shlex.split(command.replace("\\\n", ""))
    assert words[words.index("--data") + 1] == str(talks)
    assert words[words.index("--max_length") + 1] == "64"
    assert "chunked_loss" not in command               # fit gives it by itself
    assert main(["advise", str(qwen), str(talks), "--lr", "1"]) == 2
    assert "what is advised" in capsys.readouterr().err


def test_a_model_on_no_device_is_what_the_task_trains(bert, mails):
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    task = task_for(read(str(mails)), str(bert))
    made = advice.blank(task, str(bert))
    real = task.load(str(bert))
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()}
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert made.config.num_labels == 2
