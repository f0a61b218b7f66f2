"""simulate, compare and plan from a configuration alone."""

from __future__ import annotations

import importlib
import json

import pytest

import burnish
from burnish.cli import main


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                intermediate_size=64, vocab_size=128, max_position_embeddings=64,
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    return code, *capsys.readouterr()


def test_simulate_says_what_the_library_says(capsys, llama, tmp_path):
    from transformers import AutoConfig

    argv = ["simulate", llama, "--recipe", "lora(rank=2)", "--batch", "3", "--length", "16"]
    code, out, err = run(capsys, *argv, "--json")
    own = burnish.simulate(AutoConfig.from_pretrained(llama), "lora(rank=2)", (3, 16))
    assert code == 0 and err == ""
    assert json.loads(out)["peak_bytes"] == own.peak_bytes
    code, text, _ = run(capsys, *argv, "--picture", str(tmp_path / "step.svg"))
    assert code == 0 and "simulated peak" in text
    assert (tmp_path / "step.svg").stat().st_size > 1000


def test_the_config_file_itself_will_do(capsys, llama):
    code, out, _ = run(capsys, "simulate", f"{llama}/config.json", "--length", "16", "--json")
    assert code == 0 and json.loads(out)["recipe"] == "full"


def test_compare_puts_recipes_side_by_side(capsys, llama):
    argv = ["compare", llama, "full", "lora(rank=2)", "--batch", "2", "--length", "16"]
    code, out, _ = run(capsys, *argv, "--json")
    full, lora = json.loads(out)["reports"]
    assert code == 0 and lora["by_category"]["optimizer"] < full["by_category"]["optimizer"]
    code, text, _ = run(capsys, *argv)
    assert [line.split("  ")[0] for line in text.splitlines()][2:] == ["full", "lora(rank=2)"]


def test_plan_ranks_what_fits(capsys, llama, monkeypatch):
    module = importlib.import_module("burnish.memory.plan")      # the name is also a function's
    monkeypatch.setattr(module, "shipped", lambda: [["full"], ["lora(rank=2)"]])
    argv = ["plan", llama, "--batch", "2", "--length", "16"]
    code, out, _ = run(capsys, *argv, "--memory", "8MB", "--json")
    plans = json.loads(out)
    assert code == 0 and len(plans["fits"]) == 2
    assert all(p["needs"] <= 8_000_000 for p in plans["fits"])
    code, out, err = run(capsys, *argv, "--memory", "1kB")
    assert code == 3 and "nothing fits" in out and err.count("\n") == 1
    assert run(capsys, *argv, "--memory", "lots")[0] == 2
