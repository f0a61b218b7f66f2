"""What a finished run is asked about: tables that name pictures and sounds, or hold them."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import wavfile

from burnish.core.errors import DataError
from burnish.fit import asked, sounds
from burnish.fit.data import read
from burnish.fit.tasks import TASKS

SEEN, HEARD = TASKS["image-classification"], TASKS["audio-classification"]
BOTH = SimpleNamespace(takes=("image", "text"), paired=False,
                       data=SimpleNamespace(task="image-captioning"))


@pytest.fixture
def files(tmp_path):
    """A folder with x.png and y.png of unlike grey, and x.wav."""
    inside = tmp_path / "files"
    inside.mkdir()
    for name, grey in (("x", 10), ("y", 200)):
        Image.new("L", (3, 2), grey).save(inside / f"{name}.png")
    wavfile.write(inside / "x.wav", 8000, np.array([1, 2, 3], np.int16))
    return inside


def greys(rows):
    return [row["image"].getpixel((0, 0)) for _, row in rows]


@pytest.mark.parametrize("column, roles", [
    ("file_name", {}), ("image", {"image": "image"}), ("Photo", {}), ("seen", {"image": "seen"})])
def test_a_table_of_paths_is_asked_row_by_row(files, column, roles, monkeypatch):
    """From where the table stands, or from where one is; whatever else it has."""
    told = files / "asked.csv"
    told.write_text(f"id,{column}\n1,y.png\n2,{files / 'x.png'}\n3,y.png\n")
    got = list(asked.rows([str(told)], SEEN, roles))
    assert greys(got) == [200, 10, 200] and got[0][0] == str(files / "y.png")
    lines = files.parent / "asked.jsonl"
    lines.write_text(json.dumps({column: "files/x.png"}) + "\n")
    assert greys(asked.rows([str(lines), str(files / "y.png")], SEEN, roles)) == [10, 200]
    monkeypatch.chdir(files)
    (files.parent / "far.csv").write_text(f"{column}\nx.png\n")
    assert greys(asked.rows(["../far.csv"], SEEN, roles)) == [10]


def test_a_table_that_is_learnt_is_read_from_where_it_stands_too(files, monkeypatch):
    for name in ("file_name", "image"):
        told = files / "rows.csv"
        told.write_text(f"{name},label\nx.png,dark\n{files / 'y.png'},light\n")
        data = read(told, image=name, validation=0)
        assert [r["image"].getpixel((0, 0)) for r in data.train] == [10, 200]
    (files / "said.csv").write_text("audio,label\nx.wav,low\nx.wav,high\n")
    assert [sounds.size(r["audio"]) for r in read(files / "said.csv", validation=0).train] == [
        (3, 8000)] * 2
    monkeypatch.chdir(files)
    (files.parent / "far.csv").write_text("image,label\nx.png,dark\ny.png,light\n")
    assert len(read("../far.csv", validation=0).train) == 2              # or from here
    told.write_text("image,label\nx.png,dark\ngone.png,light\n")
    with pytest.raises(DataError, match="line 3, field 'image': there is no picture at gone.png"):
        read(told, validation=0)


def test_a_table_of_coded_files_is_asked(files):
    coded = {n: (files / n).read_bytes() for n in ("x.png", "y.png", "x.wav")}
    pq.write_table(pa.table({"image": [{"bytes": coded["y.png"], "path": None},
                                       {"bytes": coded["x.png"], "path": "gone.png"}]}),
                   files / "seen.parquet")
    assert greys(asked.rows([str(files / "seen.parquet")], SEEN, {})) == [200, 10]
    pq.write_table(pa.table({"audio": [coded["x.wav"]]}), files / "heard.parquet")
    ((at, row),) = asked.rows([str(files / "heard.parquet")], HEARD, {})
    assert sounds.size(row["audio"]) == (3, 8000) and "row 0" in at


def test_sounds_are_listed_by_a_table(files):
    (files / "asked.csv").write_text("file_name,label\nx.wav,low\n")
    ((at, row),) = asked.rows([str(files / "asked.csv")], HEARD, {})
    assert at == row["audio"] == str(files / "x.wav")


def test_pictures_and_texts_come_of_one_table_or_of_two(files):
    (files / "both.csv").write_text("file_name,caption\nx.png,dark\ny.png,light\n")
    (files / "seen.csv").write_text("file_name\nx.png\ny.png\n")
    (files / "said.csv").write_text("caption\ndark\nlight\n")
    for given in (["both.csv"], ["seen.csv", "said.csv"]):
        got = list(asked.rows([str(files / n) for n in given], BOTH, {}))
        assert [list(row["among"]) for _, row in got[:2]] == [["dark", "light"]] * 2
        assert greys(got[:2]) == [10, 200] and [row["text"] for _, row in got[2:]] == [
            "dark", "light"]
        assert greys([("", {"image": v()}) for v in got[2][1]["among"].values()]) == [10, 200]


@pytest.mark.parametrize("written, words", [
    ("file_name\ngone.png\n", "asked.csv, line 2, field 'file_name': there is no picture at gone"),
    ("name\nx.png\n", "no column holds pictures: expected image or file_name, it has name"),
    ("file_name\nx.wav\n", "x.wav: the picture cannot be read")])
def test_what_is_no_list_of_pictures_is_named(files, written, words):
    (files / "asked.csv").write_text(written)
    with pytest.raises(DataError, match=words):
        list(asked.rows([str(files / "asked.csv")], SEEN, {}))
    (files / "asked.jsonl").write_text('{"image": 3}\n')
    with pytest.raises(DataError, match="field 'image': expected a picture .*found int"):
        list(asked.rows([str(files / "asked.jsonl")], SEEN, {}))
    buffer = io.BytesIO()
    Image.new("L", (3, 2)).save(buffer, "png")
    pq.write_table(pa.table({"image": [buffer.getvalue()[:40]]}), files / "cut.parquet")
    with pytest.raises(DataError, match="row 0, field 'image': the picture cannot be read"):
        list(asked.rows([str(files / "cut.parquet")], SEEN, {}))
