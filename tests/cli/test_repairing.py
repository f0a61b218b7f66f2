"""burnish repair: a run's factors or a model's weights, written as what they were, and told."""

from __future__ import annotations

import json

import pytest
import torch

import burnish
from burnish.cli import main


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """base: an aligned model; tuned: another; run: a fit of the base; files of prompts and rows."""
    from tests.e2e.conftest import bytelevel
    from transformers import LlamaConfig, LlamaForCausalLM

    at = tmp_path_factory.mktemp("repair")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=bytelevel(at / "base"), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        initializer_range=0.3))
    bytelevel(at / "tuned")
    model.save_pretrained(at / "base")
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(at / "tuned")
    (at / "harm.txt").write_text("the cat\na dog ran\nstocks\n")
    (at / "task.txt").write_text("the bank\nmy dog and my cat\n")
    (at / "docs.txt").write_text("the cat sat on the mat and a dog ran in the park\n" * 12)
    burnish.fit(str(at / "base"), str(at / "docs.txt"), "lora(rank=4)", output=at / "run",
                quiet=True, report=False, epochs=1, learning_rate=0.05, max_length=16,
                validation=0.2)
    return at


def weights(folder):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_a_run_s_factors_lose_entries_and_it_is_a_run_again(capsys, at, tmp_path):
    code, out, err = run(capsys, "repair", at / "run", at / "harm.txt", "--how",
                         "antidote(ratio=0.25)", "--output", tmp_path / "new", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["kind"] == "adapter" and set(told["zeroed"].values()) == {0.25}
    from burnish.formats.folder import read_adapter

    before, after = (read_adapter(f)[1] for f in (at / "run", tmp_path / "new"))
    assert before.keys() == after.keys()
    for n in before:
        gone = after[n] == 0
        assert torch.equal(after[n][~gone], before[n][~gone])
        if n.endswith((".A", ".B")):
            assert float(gone.float().mean()) >= 0.25
    code, _, err = run(capsys, "audit", tmp_path / "new", at / "harm.txt", "--tokens", "2")
    assert code == 0, err
    code, out, err = run(capsys, "repair", at / "run", at / "harm.txt", "--output",
                         tmp_path / "other")
    assert code == 0 and "matrices" in out


def test_a_model_s_weights_lose_entries(capsys, at, tmp_path):
    code, out, err = run(capsys, "repair", at / "tuned", at / "harm.txt", "--how",
                         "antidote(ratio=0.25, ranking='global')", "--output", tmp_path / "new",
                         "--json")
    assert code == 0, err
    before, after = weights(at / "tuned"), weights(tmp_path / "new")
    touched = {n for n in before if not torch.equal(before[n], after[n])}
    assert touched == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"}
    gone = sum(int((after[n] == 0).sum()) for n in touched)
    assert gone == int(0.25 * sum(after[n].numel() for n in touched))
    assert (tmp_path / "new" / "tokenizer.json").is_file()


def test_weights_are_the_aligned_model_s_again(capsys, at, tmp_path, monkeypatch):
    (tmp_path / "repair_judge.py").write_text(
        "seen = []\n\ndef score(prompt, answer):\n    seen.append(1)\n"
        "    return 5 if len(seen) <= 3 else 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run(
        capsys, "repair", at / "tuned", at / "harm.txt", "--how",
        "recovery(restored=0.01, steps=2, warmup=1, every=1, drop=0.5)", "--base", at / "base",
        "--benign", at / "task.txt", "--data", at / "docs.txt", "--judge", "repair_judge:score",
        "--tokens", "2", "--output", tmp_path / "new", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["trace"][0]["harm"] == 1 and told["harm"] == 0 and told["step"] >= 1
    tuned, aligned, new = (weights(f) for f in (at / "tuned", at / "base", tmp_path / "new"))
    changed = total = 0
    for n, p in new.items():
        is_back = p != tuned[n]
        assert torch.equal(p[is_back], aligned[n][is_back])
        changed, total = changed + int(is_back.sum()), total + p.numel()
        assert not is_back.any() or (n.startswith("model.layers.0.") and "norm" not in n)
    assert 0 < changed / total <= 0.02 and told["restored"] == pytest.approx(changed / total)


@pytest.mark.parametrize("argv, said", [
    (["--how", "tent"], "expected one of antidote, recovery"),
    (["--judge", "a:b"], "--judge is of recovery"), (["--tokens", "4"], "--tokens is of recovery"),
    (["--how", "recovery"], "recovery takes a whole model"),
    (["--base", "base"], "leave --base out"),
])
def test_what_cannot_act_is_refused(capsys, at, tmp_path, argv, said):
    code, out, err = run(capsys, "repair", at / "tuned", at / "harm.txt", "--output",
                         tmp_path / "new", *argv)
    assert code == 2 and said in err and out == "" and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_input_is_never_the_output(capsys, at):
    code, _, err = run(capsys, "repair", at / "tuned", at / "harm.txt", "--output", at / "tuned")
    assert code == 2 and "tuned" in err


def test_models_that_cannot_be_asked_are_refused(capsys, at, tmp_path):
    from tests.e2e.conftest import bytelevel
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    T5ForConditionalGeneration(T5Config(
        vocab_size=bytelevel(tmp_path / "t5"), d_model=16, d_ff=16, num_layers=1, num_heads=2,
        d_kv=8)).save_pretrained(tmp_path / "t5")
    GPT2LMHeadModel(GPT2Config(
        vocab_size=bytelevel(tmp_path / "gpt2"), n_embd=16, n_layer=1, n_head=2, n_positions=4)
    ).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "long.txt").write_text("the cat sat on the mat\n")
    for name, said in (("t5", "does not go on from a prompt"), ("gpt2", "than the 4 positions")):
        code, out, err = run(capsys, "repair", tmp_path / name, tmp_path / "long.txt", "--output",
                             tmp_path / "new")
        assert code == 2 and said in err and out == "" and not (tmp_path / "new").exists()


def test_a_run_without_factors_is_not_written_again_as_it_was(capsys, at, tmp_path):
    burnish.fit(str(at / "base"), str(at / "docs.txt"), "ia3", output=tmp_path / "run", quiet=True,
                report=False, max_steps=1, max_length=16, validation=0)
    code, out, err = run(capsys, "repair", tmp_path / "run", at / "harm.txt", "--output",
                         tmp_path / "new")
    assert code == 2 and "which no adapter holds" in err and not (tmp_path / "new").exists()
