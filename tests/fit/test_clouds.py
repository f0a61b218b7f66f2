"""Clouds of points: what files hold, which points are drawn, layouts, refusals, whole runs."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from torch import nn

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.clouds import cloud, looked, sampled
from burnish.fit.data import read
from burnish.fit.tasks import task_for
from burnish.testing.own import CloudModel, clouds, made, written
from burnish.testing.points import PointTransformer

POINTS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1.5], [-1, 0.5, 0.25]])


# -- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", [".xyz", ".ply", ".npy", ".off"])
def test_every_form_of_file_holds_the_same_points(tmp_path, end):
    found = cloud(written(tmp_path / f"a{end}", POINTS))
    assert np.array_equal(found.points, POINTS)
    assert (found.faces is None) == (end != ".off")
    looked(str(tmp_path / f"a{end}"))


def ply(path, order, rows=POINTS, before="", body=b"", extra=""):
    head = f"ply\nformat {order} 1.0\ncomment of somebody\n{before}element vertex {len(rows)}\n" \
           f"property double nx\nproperty float x\nproperty float y\n{extra}property float z\n" \
           "end_header\n"
    if order == "ascii":
        text = "".join(f"9 {x:g} {y:g} {z:g}\n" for x, y, z in rows)
        path.write_bytes(head.encode() + body + text.encode())
    else:
        sign = "<" if "little" in order else ">"
        path.write_bytes(head.encode() + body + b"".join(
            struct.pack(f"{sign}dfff", 9, *row) for row in rows))
    return path


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_a_ply_has_its_points_wherever_they_stand(tmp_path, order):
    """Behind another element, and among other properties."""
    body = b"1\n2\n" if order == "ascii" else b"\x01\x00\x00\x02\x00\x00"[:2 * 3]
    before = "element camera 2\nproperty uchar a\n" if order == "ascii" else \
        "element camera 2\nproperty uchar a\nproperty short b\n"
    assert np.array_equal(cloud(ply(tmp_path / "a.ply", order, before=before, body=body)).points,
                          POINTS)


def test_text_is_read_as_people_write_it(tmp_path):
    (tmp_path / "a.xyz").write_text("# x y z\n0,0,0\n\n1 0 0 255 0 0\n0\t2\t0 # a corner\n")
    assert np.array_equal(cloud(tmp_path / "a.xyz").points, POINTS[:3])
    glued = "OFF4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"      # as ModelNet has some
    (tmp_path / "a.off").write_text(glued)
    assert cloud(tmp_path / "a.off").faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    (tmp_path / "b.off").write_text("COFF\n3 1 0\n0 0 0 9 9 9 9\n1 0 0 9 9 9 9\n0 2 0 9 9 9 9\n"
                                    "3 0 1 2\n")
    assert np.array_equal(cloud(tmp_path / "b.off").points, POINTS[:3])


BROKEN = {
    "a.xyz": (b"0 0 0\n1 0\n", r"a.xyz, line 2: expected three numbers, found '1 0'"),
    "b.xyz": (b"", "holds no points"), "c.xyz": (b"0 0 0\n1 nan 0\n", "point 2 is not finite"),
    "d.xyz": (b"1 2 3\n1 2 3\n", "all 2 points are one place"),
    "e.xyz": (b"0 0 0\nx y z\n", "line 2: expected three numbers"),
    "f.xyz": (b"\xff\xfe0", "UTF-16"), "g.off": (b"PLY\n", "is no OFF: its first line is 'PLY'"),
    "h.off": (b"OFF\n3 9 0\n0 0 0\n1 0 0\n0 2 0\n", "breaks off: it says 3 points and 9 faces"),
    "i.off": (b"OFF\n2 1 0\n0 0 0\n1 0 0\n3 0 1 7\n", "line 5: a face names points from 0 to 1"),
    "j.off": (b"OFF\n2 1 0\n0 0 0\n1 0 0\n3 0 1\n", "line 5: expected a face"),
    "k.off": (b"OFF\nmany 1 0\n", "line 2: expected numbers of points and faces"),
    "l.npy": (b"\x93NUMPY\x01\x00", "cannot be read as .npy"),
    "m.ply": (b"ply\nformat ascii 1.0\n", "is no PLY: it lacks end_header"),
    "n.ply": (b"ply\nformat odd 1.0\nend_header\n", "its format is none of ascii, binary_little"),
    "o.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n0\n",
              "no element vertex has x, y and z"),
    "p.ply": (b"ply\nformat ascii 1.0\nelement face 1\nproperty list uchar int v\n"
              b"element vertex 1\nproperty float x\nend_header\n", "in or before the vertices"),
    "q.ply": (b"ply\nformat ascii 1.0\nelement vertex 9999999999\nproperty float x\n"
              b"property float y\nproperty float z\nend_header\n0 0 0\n",
              "breaks off: it says 9999999999 points, and 1 are there"),
    "r.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
              b"property float z\nend_header\n0 0\n", "line 8: expected 3 numbers, found '0 0'"),
    "s.ply": (b"ply\nformat ascii 1.0\nelement vertex some\nend_header\n", "no number of elements"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    data, words = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as told:
        cloud(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


@pytest.mark.parametrize("end", [".ply", ".npy", ".off"])
def test_a_file_cut_in_half_is_told_before_anything_is_loaded(tmp_path, end):
    root = clouds(tmp_path / "data", 2, ends=(end,))
    half = next(root.rglob(f"1{end}"))
    half.write_bytes(half.read_bytes()[:len(half.read_bytes()) // 2])
    with pytest.raises(DataError, match=f"{half.name}.*(breaks off|cannot be read)"):
        read(str(root))


def test_a_last_line_that_is_cut_is_told_before_anything_is_loaded(tmp_path):
    root = clouds(tmp_path / "data", 2, ends=(".xyz",))
    half = next(root.rglob("1.xyz"))
    text = half.read_text().rstrip().rsplit(" ", 1)[0]
    half.write_text(text)
    with pytest.raises(DataError, match="1.xyz, line 64: expected three numbers"):
        read(str(root))


def test_what_is_pickled_never_runs(tmp_path):
    ran = tmp_path / "ran"

    class Opens:
        def __reduce__(self):
            return open, (str(ran), "w")

    np.save(tmp_path / "a.npy", np.array([Opens()] * 3, dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Opens()))
    for name in ("a.npy", "b.npy"):
        for read_ in (cloud, lambda p: looked(str(p))):
            with pytest.raises(DataError, match=f"{name} cannot be read as .npy"):
                read_(tmp_path / name)
    assert not ran.exists()
    np.save(tmp_path / "c.npy", np.zeros((4, 2)))
    with pytest.raises(DataError, match=r"expected \(points, 3\) numbers, found \(4, 2\)"):
        cloud(tmp_path / "c.npy")


# -- points --------------------------------------------------------------------------------------
def test_points_are_each_drawn_once_about_their_mean_in_the_unit_ball(tmp_path):
    found = cloud(written(tmp_path / "a.npy", POINTS))
    x = sampled(found, 6, (0, 0, 0)).astype(np.float64)
    want = POINTS - POINTS.mean(0)
    want = want / np.linalg.norm(want, axis=1).max()
    assert np.abs(np.sort(x, 0) - np.sort(want, 0)).max() < 1e-6
    assert x.dtype == np.float64 and abs(np.linalg.norm(x, axis=1).max() - 1) < 1e-6
    assert abs(x.mean(0)).max() < 1e-6
    some = sampled(found, 4, (0, 0, 0))
    assert len(np.unique(some, axis=0)) == 4
    more = sampled(found, 9, (0, 0, 0))                       # all, and three of them again
    assert len(more) == 9 and len(np.unique(more, axis=0)) == 6
    assert np.array_equal(some, sampled(found, 4, (0, 0, 0)))
    assert not np.array_equal(some, sampled(found, 4, (0, 1, 0)))


def test_points_of_a_mesh_lie_on_it_and_each_stretch_of_it_has_its_share(tmp_path):
    """A square of two triangles, and one far smaller above it."""
    corners = "0 0 0\n4 0 0\n4 4 0\n0 4 0\n0 0 8\n1 0 8\n0 1 8\n"
    text = f"OFF\n7 3 0\n{corners}3 0 1 2\n3 0 2 3\n3 4 5 6\n"
    (tmp_path / "a.off").write_text(text)
    many = 40_000
    x = sampled(cloud(tmp_path / "a.off"), many, (1, 0, 0)).astype(np.float64)
    low = x[:, 2] < x[:, 2].mean() + 0.1
    high = x[~low]
    assert abs(len(high) / many - 0.5 / 16.5) < 4 * np.sqrt(0.03 / many)
    flat = x[low]
    assert np.ptp(flat[:, 2]) < 1e-6
    side = np.ptp(flat[:, 0])
    u = (flat[:, :2] - flat[:, :2].min(0)) / side
    cells = np.histogram2d(u[:, 0], u[:, 1], 4, [[0, 1], [0, 1]])[0] / len(flat)
    assert np.abs(cells - 1 / 16).max() < 6 * np.sqrt(1 / 16 / len(flat))
    v = (high[:, :2] - high[:, :2].min(0)) / np.ptp(high[:, 0])     # below the diagonal, evenly
    assert (v.sum(1) < 1.02).all() and abs((v.sum(1) < 0.5).mean() - 0.25) < 0.05


def test_a_mesh_without_area_is_named(tmp_path):
    (tmp_path / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n")
    with pytest.raises(DataError, match="b.off: the faces of the mesh have no area"):
        sampled(cloud(tmp_path / "a.off"), 4, (0,), "b.off")


def test_each_pass_draws_others_and_evaluation_the_same(tmp_path):
    data = read(str(clouds(tmp_path / "d", 6)), validation=2)
    model = made("cloud")
    task = task_for(data, model, points=16)
    task.settle(model)
    rows, held = task.rows("train"), task.rows("validation")
    assert rows.redrawn and not held.redrawn
    assert torch.equal(rows[0]["points"], task.rows("train")[0]["points"])
    assert not torch.equal(rows[0]["points"], rows[len(rows)]["points"])
    assert rows[0]["labels"] == rows[len(rows)]["labels"]


# -- layouts -------------------------------------------------------------------------------------
def test_folders_of_classes_may_have_their_splits_inside_as_modelnet_has(tmp_path):
    root = tmp_path / "ModelNet"
    for kind, many in (("chair", 3), ("table", 1)):
        for split, some in (("train", many), ("test", 2)):
            for k in range(some):
                written(root / kind / split / f"{kind}_{k}.off", POINTS + k)
    data = read(str(root), validation=0)
    assert data.task == "cloud-classification" and data.labels == ("chair", "table")
    assert data.sizes() == {"train": 4, "test": 4}
    assert sorted(data.train["label"][:]) == [0, 0, 0, 1]
    (root / "table" / "train" / "table_0.off").unlink()
    with pytest.raises(DataError, match="table has no cloud in a folder train"):
        read(str(root))


def test_a_class_of_one_cloud_stays_where_it_trains(tmp_path):
    root = clouds(tmp_path / "d", 9, ("sphere",))
    written(root / "saddle" / "only.xyz", POINTS)
    data = read(str(root))
    assert data.labels == ("saddle", "sphere")
    assert data.train["label"][:].count(0) == 1 and data.validation["label"][:] == [1]


def test_tables_and_split_folders_name_clouds(tmp_path):
    root = clouds(tmp_path / "d", 2)
    lines = [f"{p.relative_to(root)},{i % 2}.5{i}" for i, p in enumerate(sorted(root.rglob("*.*")))]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    assert read(str(root), validation=0).task == "cloud-regression"
    for split in ("train", "test"):
        clouds(tmp_path / "s" / split, 2)
    assert read(str(tmp_path / "s"), validation=0).sizes() == {"train": 4, "test": 4}
    (root / "metadata.csv").write_text("file_name,label\nsphere/none.xyz,1.5\n")
    with pytest.raises(DataError, match="no such file"):
        read(str(root))
    (root / "metadata.csv").unlink()
    (root / "saddle" / "x.txt").write_text("of no matter")
    written(root / "empty" / "a.xyz", POINTS).unlink()
    with pytest.raises(DataError, match="empty is empty: it holds no cloud"):
        read(str(root))


def test_clouds_may_be_of_several_classes_or_have_a_number(tmp_path):
    """Tasks cloud-multi-label and cloud-regression: what is learnt, and its loss."""
    root = clouds(tmp_path / "d", 3)
    paths = sorted(p.relative_to(root) for p in root.rglob("*.*"))
    (root / "metadata.csv").write_text("\n".join(
        ["file_name,a,b", *(f"{p},{i % 2},{i // 2 % 2}" for i, p in enumerate(paths))]) + "\n")
    data = read(str(root), label="a,b", validation=0)
    assert data.task == "cloud-multi-label" and data.labels == ("a", "b")
    model = made("cloud")
    task = task_for(data, model, points=8)
    task.settle(model)
    batch = task.example(4)
    assert batch["labels"].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    logits = torch.tensor([[0.3, -1.0]] * 4)
    want = -(batch["labels"] * logits.sigmoid().log()
             + (1 - batch["labels"]) * (1 - logits.sigmoid()).log()).mean()
    assert torch.allclose(task.loss(logits, batch["labels"]), want)
    (root / "metadata.csv").write_text("\n".join(
        ["file_name,label", *(f"{p},{i + 0.25}" for i, p in enumerate(paths))]) + "\n")
    number = task_for(read(str(root), validation=0), model, points=8)
    number.settle(model)
    labels = number.example(2)["labels"]
    assert number.data.task == "cloud-regression" and labels.tolist() == [0.25, 1.25]
    assert float(number.loss(torch.tensor([[1.0], [3.0]]), labels)) == pytest.approx(
        (0.75**2 + 1.75**2) / 2)


def test_pictures_beside_clouds_stay_what_is_learnt_unless_it_is_said(tmp_path):
    from PIL import Image

    root = clouds(tmp_path / "d", 2)
    for kind in ("sphere", "saddle"):
        Image.new("RGB", (8, 8)).save(root / kind / "shown.png")
    assert read(str(root), validation=0).task == "image-classification"
    assert read(str(root), task="cloud-classification", validation=0).sizes() == {"train": 4}


# -- models --------------------------------------------------------------------------------------
def refused(model, data, words, tmp_path, **how):
    with pytest.raises(ConfigError, match=words):
        burnish.fit(model, str(data), "full", output=tmp_path / "out", points=16, quiet=True,
                    max_steps=1, **how)


def test_a_model_that_does_not_fit_is_told_with_the_reason(tmp_path):
    import transformers as t

    data = clouds(tmp_path / "d", 4)
    t.BertModel(t.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=8, vocab_size=9)).save_pretrained(tmp_path / "bert")
    refused(str(tmp_path / "bert"), data, "is bert, a model of transformers, which has none of "
            "clouds of points; cloud-classification takes a folder whose code comes with it",
            tmp_path)
    made("cloud").save_pretrained(tmp_path / "own")
    refused(str(tmp_path / "own"), data, "trust_remote_code", tmp_path)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, points):
            return self.head(points).mean(1)

    refused(Wide(), data, r"Wide does not take points \(2, 16, 3\): .*shapes cannot be mult",
            tmp_path)

    class Each(Wide):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, points):
            return self.head(points)

    refused(Each(), data, r"Each answers 2 rows with \(2, 16, 2\); expected logits \(2, 2\)",
            tmp_path)
    refused(made("cloud"), data, "clouds of points need no processor", tmp_path,
            processor=object())
    refused(made("cloud"), data, "max_length=9 counts tokens, and clouds of points have none",
            tmp_path, max_length=9)


def test_the_first_argument_is_what_a_model_calls_its_points(tmp_path):
    class Pts(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, pts, extra=None):
            return {"logits": self.head(pts).amax(1)}

    task = task_for(read(str(clouds(tmp_path / "d", 4)), validation=0), Pts(), points=5)
    task.settle(Pts())
    batch = task.example(3)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"pts": (3, 5, 3), "labels": (3,)}


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)", "point_gst(rank=4, local=4) + nf4"])
def test_a_module_is_trained_and_its_memory_is_as_promised(tmp_path, recipe):
    torch.manual_seed(0)
    run = burnish.fit(PointTransformer(classes=5), str(clouds(tmp_path / "d", 12)), recipe,
                      output=tmp_path / "out", points=32, max_steps=4, batch_size=4, quiet=True)
    assert run.tuned.model.head.out_features == 2
    assert run.truth.peak_bytes == run.promise.peak_bytes > 0
    assert set(run.metrics["validation"]) == {"loss", "accuracy", "f1"}


def test_a_folder_with_its_code_is_fitted_asked_and_judged(tmp_path, capsys):
    data = clouds(tmp_path / "data", 40)
    made("cloud").save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "own.py").is_file()
    out, trust = str(tmp_path / "out"), ["--trust_remote_code", "true"]
    assert main(["fit", "--model", str(tmp_path / "m"), "--data", str(data), "--recipe", "full",
                 "--output", out, "--points", "64", "--epochs", "20", "--lr", "2e-3", "--json",
                 *trust]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data"]["task"] == "cloud-classification"
    assert told["metrics"]["validation"]["accuracy"] > 0.8
    assert told["memory"]["difference"] == 0
    one = next(data.rglob("*.ply"))
    assert main(["predict", out, str(one), "--json", "--trust_remote_code"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert answer["label"] in ("sphere", "saddle") and 0.5 <= answer["probability"] <= 1
    assert main(["evaluate", out, str(data), "--json", "--trust_remote_code"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"]["accuracy"] == told["metrics"]["validation"]["accuracy"]
    assert main(["predict", out, str(one)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert issubclass(CloudModel, nn.Module)
