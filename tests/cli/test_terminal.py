"""What a terminal of eighty columns, a pipe and a person with a typing error see of every verb.

That no command shows bars, codes or lines beyond eighty columns, whatever it does, is heard over
all tests of this folder (conftest.py).
"""

from __future__ import annotations

import json
import re
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cli.conftest import complaints, parser_of_all

from burnish.cli import main
from burnish.cli.screen import WIDTH, table

COMMANDS = parser_of_all().commands
VERBS = sorted(COMMANDS)


def words(parameter, value):
    """A parameter on the command line."""
    return [value] if parameter.param_type_name == "argument" else [
        max(parameter.opts, key=len), value]


def named(verb, left_out=None):
    """All that `verb` cannot be without, so that what is there is nowhere."""
    options, arguments = [], []
    for p in COMMANDS[verb].params:
        if p is not left_out and (p.required or p.name in ("model", "data", "output")) \
                and not getattr(p, "is_flag", False):
            value = "3" if p.type_descriptor.annotation is int else "nowhere/at-all"
            (arguments if p.param_type_name == "argument" else options).append(words(p, value))
    return [w for part in (*options, *arguments) for w in part]


def refused(capsys, argv):
    """What is wrong with how a call was refused."""
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    if code not in (1, 2, 3) or err.count("\n") != 1 or not err.startswith("burnish: "):
        return f"{' '.join(argv)}: code {code}, {err!r}, {out[-80:]!r}"
    if re.match(r"burnish: [A-Z]\w*: ", err) and not err.startswith("burnish: YAML"):
        return f"{' '.join(argv)}: the words of another: {err!r}"
    return None


#: verbs that go by themselves
ALONE = {"demo", "doctor", "methods", "ui", "bench", "reproduce"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_path_or_value_is_refused_in_one_line(capsys, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    wrong = [refused(capsys, [verb, "--no-such-option", "1"])]
    if verb not in ALONE:
        wrong.append(refused(capsys, [verb, *named(verb)]))
    for p in COMMANDS[verb].params:
        if getattr(p, "is_flag", False) or p.name in ("help", "from_yaml"):
            continue
        if verb in ALONE and p.name in ("output", "page", "root", "host", "port", "seeds"):
            continue                                 # any is as good as another, or would run
        argument = p.param_type_name == "argument"
        rest = named(verb, p)
        wrong.append(refused(capsys, [verb, *(() if argument else words(p, "?!")), *rest,
                                      *(words(p, "?!") if argument else ())]))
    wrong = [w for w in wrong if w]
    assert not wrong, "\n".join(wrong)


def test_no_folder_to_serve_and_no_port_are_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not refused(capsys, ["ui", "nowhere", "--no-browser"])
    assert not refused(capsys, ["ui", ".", "--port", "many", "--no-browser"])


LINES = st.text(st.sampled_from("abc   "), max_size=70)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(
    st.lists(LINES, min_size=n, max_size=n),
    st.lists(st.lists(LINES, min_size=n, max_size=n), max_size=4),
    st.sets(st.integers(0, n - 1)))))
def test_tables_fit_and_lose_no_word(drawn):
    head, rows, right = drawn
    right = {i for i in right if all(len(r[i]) <= 30 for r in (head, *rows))}
    text = table(head, rows, right)
    longest = max((len(w) for row in (head, *rows) for cell in row for w in cell.split()),
                  default=0)
    fits = longest <= 30 and len(head[0]) <= 30 and all(len(r[0]) <= 30 for r in rows)
    assert not fits or all(len(line) <= WIDTH for line in text.splitlines())
    said = text.split()
    for row in (head, *rows):
        for cell in row:
            for word in cell.split():
                assert word in said


def test_a_table_that_fits_is_as_it_was():
    assert table(("a", "size"), [("x y", 1), ("z", 20)], (1,)) == (
        "a    size\n---  ----\nx y     1\nz      20")


def test_a_table_too_wide_wraps_its_words_and_puts_columns_below():
    head = ("recipe", "one", "two")
    told = table(head, [("nf4 + lora(rank=8) + checkpoint + chunked_loss(chunk=1024) + adamw",
                         "1" * 30, "2" * 30)], (1, 2))
    assert all(len(line) <= WIDTH for line in told.splitlines())
    first, second = told.split("\n\n")
    assert "one" in first and "two" not in first and "two" in second
    assert first.splitlines()[2].startswith("nf4 + lora(rank=8)") and "recipe" in second


def test_what_is_said_is_set_in_below_and_a_page_stays_whole(capsys):
    from burnish.cli.screen import say

    row, long = f"| {'word ' * 20}|", " ".join(["word"] * 20)
    say(f"  {long}\n{row}\nshort")
    first, second, whole, short = capsys.readouterr().out.splitlines()
    assert len(first) <= WIDTH and first.startswith("  word") and second.startswith("    word")
    assert (whole, short) == (row, "short") and f"{first} {second}".split() == long.split()


@given(st.lists(st.text(st.sampled_from("ab -'\"\\$"), max_size=60), min_size=1, max_size=8))
def test_a_command_shown_is_what_a_shell_reads(words):
    from burnish.cli.screen import folded
    from burnish.formats.served import shell

    told = folded("\n".join(["go on:", *shell(shlex.join(["burnish", *words])), "short"]))
    first, *command, last = told.splitlines()
    assert (first, last) == ("go on:", "short")
    assert shlex.split("\n".join(command).replace("\\\n", "")) == ["burnish", *words]


def test_the_ear_hears():
    for text in ("Writing model shards: 100%|##| 1/1 [00:00, 9.1it/s]", "a\rb", "\x1b[1mbold",
                 "word " * 20):
        assert complaints(text, "")
    assert not complaints(json.dumps({"a": "word " * 30}), "") and not complaints("short", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert main([verb, "--help"]) == 0
    assert not [s for s in capsys.readouterr().out.splitlines() if len(s) > WIDTH]


def test_every_method_is_told_within_eighty_columns():
    from burnish.core import registry

    for name in (*registry.names(extra=False), *registry.presets()):
        assert main(["methods", name]) == 0          # the rest is heard by conftest.py


def test_prose_is_filled_and_what_is_set_in_stays():
    from burnish.cli.screen import fitted

    assert fitted("short\n\n  y = x") == "short\n\n  y = x"
    long = " ".join(["word"] * 30)
    told = fitted(f"{long}\nthe end\n\n    {long}\n  y")
    assert all(len(line) <= WIDTH for line in told.splitlines())
    first, second = told.split("\n\n")
    assert first.endswith("the end") and first.split() == [*["word"] * 30, "the", "end"]
    assert second.splitlines()[1].startswith("    word") and second.endswith("\n  y")


@pytest.mark.parametrize("on", [True, False])
def test_models_are_written_without_a_bar_and_the_bars_stay_as_they_were(tmp_path, on):
    from transformers.utils import logging

    from burnish.formats import staged

    (logging.enable_progress_bar if on else logging.disable_progress_bar)()
    try:
        with staged.replace(tmp_path / "model", "model"):
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == on
        with pytest.raises(ZeroDivisionError), staged.replace(tmp_path / "other", "model"):
            1 / 0                                    # noqa: B018
        assert logging.is_progress_bar_enabled() == on
    finally:
        logging.disable_progress_bar()
