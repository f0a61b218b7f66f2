"""What the command line says, and how soon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from burnish.cli import main
from burnish.cli.flags import flags
from burnish.cli.training import ask
from burnish.fit.processes import alone


@pytest.mark.parametrize("said, written", [
    ("name it with text=", "name it with --text"),
    ("resume=True goes on from checkpoint-6, overwrite=True removes them",
     "--resume goes on from checkpoint-6, --overwrite removes them"),
    ("task='language-modelling', text='a b' learns",
     "--task language-modelling --text 'a b' learns"),
    ("name them with text=, label= or image=", "name them with --text, --label or --image"),
    ("a smaller batch_size (or memory='8GB')", "a smaller batch_size (or --memory 8GB)"),
    ("lora(rank=8, dropout=0.1) needs memory=8GB", "lora(rank=8, dropout=0.1) needs --memory 8GB"),
    ("lora_rank= and r= are the same", "lora_rank= and r= are the same"),
    ("lr= and learning_rate= are the same", "--lr and --learning_rate are the same"),
    ("load(..., force=True) goes on", "--force goes on"),
    ("tuned.optimizer(lr=1)", "tuned.optimizer(lr=1)"),
    ("a = b and x=3", "a = b and x=3"),
])
def test_settings_are_said_as_flags_and_recipes_stay(said, written):  # newcomer C11
    assert flags(said) == written


def test_without_transformers_errors_are_still_said(monkeypatch):
    from burnish.cli import flags as module

    module.names.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert module.flags("give lr= and text=") == "give --lr and --text"
    module.names.cache_clear()


def test_an_error_of_fit_names_flags(capsys, tmp_path):
    (tmp_path / "x.csv").write_text("text,mood\na b,x\nc d,y\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    code = main(["fit", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "x.csv"),
                 "--task", "text-classification", "--output", str(tmp_path / "o")])
    err = capsys.readouterr().err
    assert code == 2 and "name it with --label" in err and "label=" not in err


def ambiguous(tmp_path):
    from burnish.fit.data import read
    from burnish.fit.readings import AmbiguousError

    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"document": f"a long text {i} of words",
                                        "summary": f"s {i}"}) + "\n" for i in range(9)))
    with pytest.raises(AmbiguousError) as e:
        read(path)
    return e.value


def test_the_person_at_a_terminal_is_asked(capsys, monkeypatch, tmp_path):  # newcomer A3
    question = ambiguous(tmp_path)
    monkeypatch.setattr("builtins.input", lambda words: "1")
    assert ask(question) == {"prompt": "document", "completion": "summary"}
    out = capsys.readouterr().out
    assert "1  --prompt document --completion summary learns to answer" in out
    monkeypatch.setattr("builtins.input", lambda words: "")
    with pytest.raises(type(question)):
        ask(question)


def test_elsewhere_the_two_readings_are_refused_with_their_flags(capsys, tmp_path):
    ambiguous(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    code = main(["fit", "--model", str(tmp_path / "m"), "--data", str(tmp_path / "x.jsonl"),
                 "--output", str(tmp_path / "o")])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1
    assert "--prompt document --completion summary" in err
    assert "--task language-modelling --text document" in err


LATE = """
import sys
sys.path.insert(0, {source!r})
from burnish.cli import main
code = main({argv!r})
heavy = [m for m in ("transformers.trainer", "transformers.training_args", "datasets", "accelerate")
         if m in sys.modules]
print(code, heavy)
"""


@pytest.mark.parametrize("wrong, words", [
    (["--recipe", "lorra(rank=8)"], "did you mean 'lora'"),
    (["--recipe", "lora(rnk=8)"], "rank"),
    (["--learnin_rate", "1"], "did you mean 'learning_rate'"),
    (["--memory", "eight"], "eight"),
    (["--model", "./nothing/here"], "there is no model at"),
    (["--data", "./nowhere.csv"], "there is nothing at"),
])
def test_what_is_misspelt_is_said_before_anything_heavy_is_imported(tmp_path, wrong, words):
    # newcomer B7
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,1\n")
    options = {"--model": str(tmp_path / "m"), "--data": str(tmp_path / "x.csv"),
               "--output": str(tmp_path / "o"), wrong[0]: wrong[1]}
    argv = ["fit", *(word for option in options.items() for word in option)]
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", LATE.format(source=source, argv=argv)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert words in done.stderr and done.stdout.strip() == "2 []", done.stdout + done.stderr


def test_the_settings_read_off_the_source_are_those_of_the_class():
    from dataclasses import fields

    from transformers import TrainingArguments

    from burnish.fit.arguments import training_names

    assert training_names() == {f.name for f in fields(TrainingArguments) if f.init}


def test_a_model_that_is_not_there_suggests_folders_here(tmp_path, monkeypatch):  # newcomer C11
    from burnish.core.errors import ConfigError
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "qwen3").mkdir(parents=True)
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(ConfigError, match="no such folder here.*did you mean 'm/qwen3'"):
        task_for(read("x.csv", validation=0), "m/qwen33")


def test_one_process_where_several_were_asked_for_is_noticed(monkeypatch):  # newcomer C12
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    stand_in = "import time; time.sleep(60)"
    for extra, found in ((["--num_processes", "2"], True), (["--num_processes=3"], True),
                         (["--num_processes", "1"], False), ([], False)):
        p = subprocess.Popen([sys.executable, "-c", stand_in, "accelerate", "launch", "--cpu",
                              *extra, "-m", "burnish", "fit"])
        try:
            line = Path(f"/proc/{p.pid}/cmdline")
            for _ in range(500):                        # until the program has replaced its copy
                if b"launch" in line.read_bytes():
                    break
                time.sleep(0.01)
            said = alone(p.pid)
        finally:
            p.kill()
            p.wait()
        assert (said is not None) == found
        if found:
            assert "started this one alone" in said and "torchrun" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert alone() is None


def test_the_bar_shows_what_counts_within_eighty_columns():  # newcomer C9
    from tqdm import tqdm

    from burnish.fit.watch import LINE

    text = tqdm.format_meter(n=120, total=1000, elapsed=40, ncols=80, unit=" steps",
                             bar_format=LINE, postfix="loss 0.3211, accuracy 0.9511")
    assert len(text) <= 80
    for part in ("120/1000", "steps/s", "left", "loss 0.3211"):
        assert part in text, text


@pytest.mark.parametrize("verb", [["plan", "m/qwen33", "--memory", "1GB"],
                                  ["simulate", "m/qwen33"],
                                  ["compare", "m/qwen33", "lora", "full"]])
def test_every_command_suggests_the_folder_that_was_meant(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "m" / "qwen3").mkdir(parents=True)
    assert main(verb) == 2
    said = capsys.readouterr().err
    assert "no such folder here" in said and "did you mean 'm/qwen3'?" in said
    assert "couldn't connect" not in said and said.count("\n") == 1


def test_what_a_run_says_stays_within_eighty_columns(capsys):  # newcomer C9
    from burnish.fit.processes import sayer

    row = "  text='" + 90 * "a" + "'"
    sayer(False)("note: " + 30 * "some words " + f"\n{row}\nshort")
    lines = capsys.readouterr().out.splitlines()
    assert row in lines and lines[-1] == "short"
    assert all(len(line) <= 80 for line in lines if line != row)
    assert lines[1].startswith("  words")
    sayer(True)("nothing")
    assert capsys.readouterr().out == ""
