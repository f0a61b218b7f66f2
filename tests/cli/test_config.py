"""Configuration files and what overrides them."""

from __future__ import annotations

import json

import pytest

from burnish.cli import config
from burnish.core.errors import ConfigError

WHAT = {"model": "m", "learning_rate": 1e-4, "nested": {"a": [1, 2]}, "bf16": True}
FILES = {
    "c.yaml": "model: m\nlearning-rate: 1.0e-4\nnested: {a: [1, 2]}\nbf16: true\n",
    "c.yml": "model: m\nlearning_rate: 0.0001\nnested:\n  a: [1, 2]\nbf16: yes\n",
    "c.json": json.dumps(WHAT),
    "c.toml": 'model = "m"\nlearning_rate = 1e-4\nbf16 = true\n[nested]\na = [1, 2]\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert config.read(tmp_path / name) == WHAT


@pytest.mark.parametrize(("name", "text", "says"), [
    ("c.yaml", "a: [1", "c.yaml"), ("c.json", "{", "c.json"), ("c.toml", "a =", "c.toml"),
    ("c.yaml", "- 1\n- 2\n", "expected a mapping"), ("c.json", "3", "expected a mapping"),
    ("c.txt", "a: 1", "not a configuration file"),
])
def test_a_wrong_file_is_one_clear_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        config.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_in_its_place_is_told_where_it_belongs(tmp_path):
    with pytest.raises(ConfigError, match="not a configuration file.*--model, rows by --data"):
        config.read(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.read(tmp_path / "nothing")
    assert "--model" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        config.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(("word", "means"), [
    ("1e-4", 1e-4), ("3", 3), ("true", True), ("True", True), ("null", None), ("None", None),
    ("8GB", "8GB"), ("lora(rank=8)", "lora(rank=8)"), ("[1, 2]", [1, 2]), ("a-b", "a-b"), ("", ""),
])
def test_a_word_means_what_it_looks_like(word, means):
    assert config.value(word) == means and type(config.value(word)) is type(means)


def test_overrides_in_every_spelling():
    words = ["--learning-rate", "1e-4", "--epochs=3", "--bf16", "--note", "a b", "--seed", "-1"]
    assert config.overrides(words) == {"learning_rate": 1e-4, "epochs": 3, "bf16": True,
                                       "note": "a b", "seed": -1}


@pytest.mark.parametrize("words", [["stray"], ["--a", "1", "stray"], ["--"]])
def test_a_stray_word_is_refused(words):
    with pytest.raises(ConfigError, match="--key value"):
        config.overrides(words)
