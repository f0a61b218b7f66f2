"""simulate, compare and plan from a configuration alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

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


def test_simulate_says_the_peak_of_every_moment(capsys, llama):
    argv = ["simulate", llama, "--recipe", "nf4 + lora(rank=2)", "--length", "16", "--moments"]
    code, out, _ = run(capsys, *argv, "--json")
    told = json.loads(out)
    assert code == 0 and told["moments"]["train"] == told["peak_bytes"]
    assert list(told["moments"]) == ["load", "train", "evaluate", "save", "merge"]
    assert told["moments"]["load"] > told["moments"]["save"]         # dense weights, then codes
    code, text, _ = run(capsys, *argv)
    assert code == 0 and "peak of every moment" in text
    assert len({len(line) for line in text.splitlines()[-5:]}) == 1      # one column


def test_the_config_file_itself_will_do_whatever_its_name(capsys, llama, tmp_path):
    other = tmp_path / "llama-8b.json"
    other.write_bytes(Path(llama, "config.json").read_bytes())
    for name in (f"{llama}/config.json", other):
        code, out, _ = run(capsys, "simulate", str(name), "--length", "16", "--json")
        assert code == 0 and json.loads(out)["recipe"] == "full"
    notes = tmp_path / "notes.txt"
    notes.write_text("{}")
    code, _, said = run(capsys, "simulate", str(notes))
    assert code == 2 and "is a file; expected a model folder, a config as JSON" in said


def test_compare_puts_recipes_side_by_side(capsys, llama):
    argv = ["compare", llama, "full", "lora(rank=2)", "--batch", "2", "--length", "16"]
    code, out, _ = run(capsys, *argv, "--json")
    full, lora = json.loads(out)["reports"]
    assert code == 0 and lora["by_category"]["optimizer"] < full["by_category"]["optimizer"]
    code, text, _ = run(capsys, *argv)
    for part in text.strip().split("\n\n"):                  # of what finds no room beside, below
        assert [line.split("  ")[0] for line in part.splitlines()][2:] == ["full", "lora(rank=2)"]


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


def test_plan_counts_rows_and_knows_cards(capsys, llama, monkeypatch, tmp_path):
    module = importlib.import_module("burnish.memory.plan")
    monkeypatch.setattr(module, "shipped", lambda: [["lora(rank=2)"]])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(50)))
    argv = ["plan", llama, "--gpu", "nvidia rtx4090", "--batch", "2", "--length", "16"]
    code, out, _ = run(capsys, *argv, "--data", str(rows), "--epochs", "2", "--json")
    told = json.loads(out)
    assert code == 0 and told["gpu"] == "RTX 4090 (24 GB)" and told["device"] == "cuda"
    assert (told["rows"], told["updates"]) == (45, 46)      # fit sets a tenth aside
    code, out, _ = run(capsys, *argv, "--rows", "52000", "--epochs", "3")
    assert code == 0 and "52,000 rows x 3 epochs" in out
    assert max(map(len, out.splitlines())) <= 80
    for wrong, says in ((["--epochs", "-1", "--rows", "5"], "--epochs"),
                        (["--memory", "80GB"], "more than RTX 4090"),
                        (["--data", str(rows), "--rows", "5"], "--data counts")):
        code, _, err = run(capsys, *argv, *wrong)
        assert code == 2 and says in err
    code, _, err = run(capsys, "plan", llama)
    assert code == 2 and "--gpu" in err


def test_simulate_says_how_long_a_step_takes_and_by_whose_rates(capsys, llama):
    argv = ["simulate", llama, "--length", "16"]
    code, out, _ = run(capsys, *argv, "--json")
    low, high = json.loads(out)["step_seconds"]
    assert code == 0 and 0 < low < high and json.loads(out)["rates"]["source"]
    assert "a step takes" in run(capsys, *argv)[1]


def test_several_processes_are_said_by_flags(capsys, llama):
    argv = ["simulate", llama, "--recipe", "lora(rank=2)", "--length", "8", "--world-size", "4"]
    code, out, _ = run(capsys, *argv, "--shard", "fsdp2", "--json")
    report = json.loads(out)
    assert code == 0 and (report["world_size"], report["shard"]) == (4, "fsdp2")
    code, _, err = run(capsys, *argv, "--shard", "fspd2")
    assert code == 2 and "did you mean 'fsdp2'" in err


def test_plans_of_a_process_refuse_what_cannot_be_sharded(llama):
    from transformers import AutoConfig

    plans = burnish.plan(AutoConfig.from_pretrained(llama), "1MB", (1, 8), workers=1, cache=False,
                         candidates=["lora(rank=2)", "nf4 + lora(rank=2)"], world_size=4,
                         shard="fsdp2")
    assert [p.recipe for p in plans] == ["lora(rank=2)"] and plans.best.report.world_size == 4
    assert "codes" in plans.refused["nf4 + lora(rank=2)"]
    with pytest.raises(burnish.ConfigError, match="there is one"):
        burnish.plan(AutoConfig.from_pretrained(llama), "1MB", (1, 8), shard="fsdp2")
    with pytest.raises(burnish.ConfigError, match="hours are told for one process"):
        burnish.plan(AutoConfig.from_pretrained(llama), "1MB", (1, 8), world_size=2, rows=9)
