"""What is read is read or refused in one line, by the reader's own error (findings 4.6)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.core.errors import BurnishError, ConfigError, DataError, FormatError, RecipeError
from burnish.core.reading import parse_json, plain, read_text, reading, regular, sane
from burnish.core.recipe import parse


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x\ny"),
        KeyError("k"),
        RecursionError(),
        OSError(5, "E"),
        MemoryError(),
        UnicodeError("u"),
        RuntimeError("\ud800"),
        ZeroDivisionError(),
        StopIteration(),
        TypeError("é" * 9999),
        ValueError(10**5000),
        AssertionError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_any_failure_inside_is_our_error_in_one_line(error):
    with (
        pytest.raises(DataError, match="rows.csv") as caught,
        reading("rows.csv", DataError, "look at it"),
    ):
        raise error
    text = str(caught.value)
    assert text.isprintable() and len(text) < 450 and text.endswith("look at it")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_failure_passes(error):
    with pytest.raises(error), reading("x"):
        raise error


def test_our_own_errors_pass_as_they_are():
    with pytest.raises(RecipeError, match="^said$"), reading("x"):
        raise RecipeError("said")


@pytest.mark.parametrize(
    "text,words",
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 80 + "]" * 80, "nested too deeply; at most 64"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("1" * 5000, "too many digits"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        ("NaN", "finite number"),
        ("[1e999]", "finite number"),
        ("-Infinity", "finite number"),
        ("", "not JSON"),
        ("{", "not JSON: .* line 1"),
        ("[1,]", "not JSON"),
        ("'a'", "not JSON"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b'{"a": "\xff"}', "byte 0xff in line 1"),
        ('{"a": 1}x', "not JSON"),
        ("\0", "not JSON"),
    ],
)
def test_json_is_what_it_says_or_refused(text, words):
    with pytest.raises(FormatError, match=words) as caught:
        parse_json(text, "f.json", finite=True)
    assert str(caught.value).startswith("f.json") and str(caught.value).isprintable()


def test_plain_json_is_itself():
    for text, value in (
        ("[]", []),
        (
            '{"a": [1, 2.5, null, true, "é\\u00e9\\ud83d\\ude00"]}',
            {"a": [1, 2.5, None, True, "éé😀"]},
        ),
        (b"\xef\xbb\xbf[1]", [1]),
    ):
        assert parse_json(text, "x", finite=True) == value
    assert parse_json("[NaN]", "x")[0] != parse_json("[NaN]", "x")[0]


def test_a_tree_that_holds_itself_or_grows_without_end_is_refused():
    a: list = []
    a.append(a)
    with pytest.raises(ConfigError, match="nested too deeply"):
        sane(a, "x", ConfigError)
    b: list = ["lol"]
    for _ in range(30):
        b = [b, b]
    with pytest.raises(ConfigError, match="too large when written out"):
        sane(b, "x", ConfigError)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("pipe", "is a pipe"),
        ("loop", "cannot read|no such"),
        (".", "is a folder"),
        ("none", "no such file"),
        ("x" * 300, "cannot read"),
        ("a\0b", "cannot"),
    ):
        with pytest.raises(DataError, match=words):
            regular(tmp_path / name, DataError)
    with pytest.raises(DataError, match="is a device"):
        regular("/dev/zero", DataError)
    (tmp_path / "latin").write_bytes("a\nbé".encode("latin-1"))
    with pytest.raises(DataError, match="byte 0xe9 in line 2; save it as UTF-8"):
        read_text(tmp_path / "latin", DataError)


def test_a_line_for_people_is_printable_and_short():
    assert plain("a\n\tb") == "a b" and plain("x\ud800\0") == "x\\xd800\\x00"
    assert len(plain("é" * 9999)) == 300 and plain(10**5000) == "a int"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000,
        "lora(" * 3000,
        "lora+" * 3000 + "lora",
        "+".join(["lora"] * 3000),
        "-" * 9000 + "1",
        "lora(rank=" + "9" * 5000 + ")",
        "lora(rank=1e400)",
        "lora(alpha=1e999)",
        "lora(alpha=-1e999)",
        "lora(rank=99999999999999999999)",
        "lora(rank=8, rank=9)",
        "lora(targets='\\ud800')",
        "lora(targets='\\0')",
        "lora(rank={[]: 1})",
        "lora(rank=[[[[]]]])",
        "lora\0",
        "\ud800",
        "lora(rank=True)",
        "lora(rank='8')",
        "lora(rank=8.0)",
        "lora(**{})",
        "lora(8)",
        "f''",
        "lambda: 0",
        "lora(dropout=1e308*10)",
        "__import__('os')",
        "lora.x()",
        "lora[0]",
        "x" * 200_000,
        "# lora",
        "+",
        "lora(rank=1_0_)",
        "lora(\nrank=8",
        "await x",
        "lora(alpha=1j)",
        "lora(scaling=True)",
        "",
        " ",
        "\\",
        "'" * 99,
        "{" * 300,
    ],
    ids=lambda t: plain(t, 20),
)
def test_a_recipe_that_is_none_is_refused_by_its_own_error(text):
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_every_error_is_ours():
    for error in (ConfigError, DataError, FormatError, RecipeError):
        assert issubclass(error, BurnishError)


def test_what_stands_beside_a_path_or_nothing_where_nobody_may_look(tmp_path, monkeypatch):
    from burnish.core.reading import beside

    (tmp_path / "adapter").mkdir()
    assert beside(tmp_path / "adaptor") == ["adapter"]
    monkeypatch.chdir(tmp_path)
    assert beside(Path("none/at/all")) == ["adapter"]

    def closed(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", closed)
    assert beside(tmp_path / "adaptor") == []
