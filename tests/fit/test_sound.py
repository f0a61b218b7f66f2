"""Data, settings and workers: what cannot be meant is refused in one line (findings 4.5, 4.6)."""

from __future__ import annotations

import json
import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from burnish.cli import config
from burnish.core.errors import BurnishError, ConfigError, DataError
from burnish.fit.arguments import sort_out
from burnish.fit.data import read
from burnish.fit.pictures import Picture, processor_of
from burnish.fit.promise import workers_told


class Killed(Dataset):
    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.act(i)


def die(i):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(i):
    raise DataError(f"row {i}: the picture cannot be read")


def test_a_reading_process_that_dies_is_one_line_with_a_way_on(tmp_path):
    with (
        pytest.raises(BurnishError, match="reads rows died.*fewer workers=") as caught,
        workers_told(tmp_path),
    ):
        list(DataLoader(Killed(die), num_workers=1))
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(DataError, match="^row 0: the picture cannot be read$"),
        workers_told(tmp_path),
    ):
        list(DataLoader(Killed(fail), num_workers=1))
    for error in (RuntimeError("something else"), ConfigError("ours")):
        with pytest.raises(type(error), match=str(error)), workers_told(tmp_path):
            raise error


@pytest.mark.parametrize(
    "given,name,value",
    [
        ({"lr": "1e-3"}, "learning_rate", 1e-3),
        ({"lr": 1}, "learning_rate", 1.0),
        ({"epochs": "2"}, "num_train_epochs", 2.0),
        ({"seed": "7"}, "seed", 7),
        ({"batch_size": 4.0}, "per_device_train_batch_size", 4),
        ({"bf16": "true"}, "bf16", True),
        ({"eval_strategy": "steps"}, "eval_strategy", "steps"),
        ({"save_steps": 0.5}, "save_steps", 0.5),
    ],
)
def test_a_setting_is_read_in_its_type(given, name, value):
    found = sort_out(given)[1][name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "given,says",
    [
        ({"seed": "abc"}, "seed='abc': expected a whole number"),
        ({"batch_size": 0}, "expected 1 or more"),
        ({"seed": -1}, "expected 0 or more"),
        ({"seed": 2**40}, "expected 4.29497e.09 or less"),
        ({"lr": float("nan")}, "finite number"),
        ({"lr": "nan"}, "finite number"),
        ({"lr": -1}, "0 or more"),
        ({"lr": "fast"}, "lr='fast': expected a number"),
        ({"lr": True}, "expected a number"),
        ({"seed": 3.5}, "whole number"),
        ({"seed": [3]}, "whole number"),
        ({"seed": 10**5000}, "finite"),
        ({"overwrite": "yes"}, "true or false"),
        ({"max_length": 0}, "1 or more"),
        ({"text": 3}, "text"),
        ({"quiet": 1}, "true or false"),
        ({"batch_size": "9" * 5000}, "whole number"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_setting_that_cannot_be_meant_is_refused(given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        sort_out(given)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text,says",
    [
        (b"lr: \xff", "byte 0xff in line 1"),
        (b"a: !!python/object:os.system x", "is not YAML"),
        (b"lr: 1\nlr: 2", "line 2: lr stands twice"),
        (b"a-b: 1\na_b: 2", "a_b twice"),
        (b"a: !!int x", "cannot be read"),
        (b"a: &a [*a]", "nested too deeply"),
        (b"\xff\xfea\0", "UTF-16"),
        (b"a: " + b"[" * 3000, "nested too deeply|is not YAML"),
        (b"? [1]\n: 2", "is not YAML"),
        (
            b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (c + 1, c + 1, *[c] * 8)
                for c in range(97, 110)
            ),
            "too large when written out",
        ),
    ],
)
def test_yaml_is_read_or_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=says) as caught:
        config.read(tmp_path / "c.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_in_yaml_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nx: 2E+4\ny: .5e1\nz: 1e\nw: e5\nv: '1e-3'\n")
    assert config.read(tmp_path / "c.yaml") == {
        "lr": 1e-3,
        "x": 2e4,
        "y": 5.0,
        "z": "1e",
        "w": "e5",
        "v": "1e-3",
    }


@pytest.mark.parametrize(
    "name,raw,says",
    [
        ("x.csv", b"\xef\xbb\xbf", "no header"),
        ("x.csv", b"a,b\n\xff,1\n", "byte 0xff in line 2"),
        ("x.csv", b"\xff\xfea\0", "UTF-16"),
        ("x.jsonl", b'{"text": "\\ud800", "label": 1}', "line 1.*lone surr"),
        ("x.jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}", "line 1.*too many digits"),
        ("x.jsonl", b'{"text": "a"}\n' + b"[" * 9000, "line 2.*nested too deeply"),
        ("x.json", b"3", "a list of rows"),
        ("x.json", b'{"a": 1, "a": 2}', "'a' stands twice"),
        ("x.parquet", b"PAR1", "cannot be read|parquet"),
        ("x.txt", b"\x80", "byte 0x80 in line 1"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_row(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=says):
        read(str(tmp_path / name))


def test_a_parquet_file_that_claims_a_billion_rows_allocates_nothing(tmp_path):
    import pyarrow
    import pyarrow.parquet as pq

    one = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3_000_000, pyarrow.int8()), ["a"])
    pq.write_table(pyarrow.table({"text": one, "label": one}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 30_000
    with pytest.raises(DataError, match="says it holds 3000000 rows of 2 columns"):
        read(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("kind", ["pictures", "table", "column"])
def test_a_pipe_among_the_data_is_not_waited_for(tmp_path, kind):
    from PIL import Image

    place = tmp_path / "data" / "cat"
    place.mkdir(parents=True)
    Image.new("L", (4, 4)).save(place / "0.png")
    pipe = tmp_path / "x.csv" if kind == "table" else place / "1.png"
    os.mkfifo(pipe)
    given = {"pictures": tmp_path / "data", "table": pipe, "column": tmp_path / "rows.jsonl"}[kind]
    if kind == "column":
        given.write_text(
            "".join(
                json.dumps({"image": str(place / f"{i}.png"), "label": i}) + "\n" for i in range(2)
            )
        )
    with pytest.raises(DataError, match="is a pipe|no picture at"):
        read(str(given))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}x",
        "3",
        '{"size": "x"}',
        '{"size": {}}',
        '{"size": [1]}',
        '{"size": -4}',
        '{"size": 1e9}',
        '{"size": 4, "image_mean": "x"}',
        '{"size": 4, "image_std": [0, 0, 0]}',
        '{"size": 4, "resample": 99}',
        '{"size": 4, "rescale_factor": "x"}',
        '{"size": 4, "image_mean": [1, 2]}',
        '{"size": NaN}',
        '{"size": {"shortest_edge": 0}, "crop_size": 4}',
    ],
)
def test_a_picture_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        processor_of(str(tmp_path))
    assert "preprocessor_config.json" in str(caught.value)


def test_a_picture_configuration_comes_back(tmp_path):
    made = Picture(8, 12, (0.5,) * 3, (0.25,) * 3)
    made.save_pretrained(tmp_path)
    assert processor_of(str(tmp_path)) == made
