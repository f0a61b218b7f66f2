"""Graphs: rows of PyG and OGB, folders of the TU collection, batches, refusals, whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.finished import Finished
from burnish.fit.tasks import task_for
from burnish.testing.graphs import GraphNetwork
from burnish.testing.own import graphs, made, rows_of_graphs, tu

PATH = {"edge_index": [[0, 1, 1, 2], [1, 0, 2, 1]], "node_feat": [[1, 0], [0, 1], [1, 0]], "y": [0]}
PAIR = {"edge_index": [[0, 1], [1, 0]], "node_feat": [[0, 2], [3, 1]], "y": [1]}


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# -- rows ----------------------------------------------------------------------------------------
def test_rows_are_read_by_the_names_of_pyg_and_ogb(tmp_path):
    data = read(lines(tmp_path / "a.jsonl", [PATH, PAIR] * 4), validation=0)
    assert data.task == "graph-classification" and data.labels == ("0", "1")
    assert data.train[1] == {"edge_index": [[0, 1], [1, 0]], "node_feat": [[0, 2], [3, 1]],
                             "label": 1}
    again = [{"edge_index": r["edge_index"], "x": r["node_feat"], "y": r["y"][0], "edge_attr": [1],
              "num_nodes": len(r["node_feat"])} for r in (PATH, PAIR)] * 4
    other = read(lines(tmp_path / "b.jsonl", again), validation=0)
    assert other.train[:] == data.train[:] and "not read: edge_attr" in str(other)
    bare = [{"edge_index": r["edge_index"], "num_nodes": 4, "y": k * 0.7} for k, r in enumerate(
        (PATH, PAIR, PATH, PAIR, PATH))]
    told = read(lines(tmp_path / "c.jsonl", bare), validation=0)
    assert told.task == "graph-regression" and told.train[0]["node_feat"] == [[1.0]] * 4


def test_graphs_may_be_of_several_classes(tmp_path):
    rows = [r | {"y": y} for r, y in zip([PATH, PAIR] * 2, (["a"], [], ["b", "a"], ["b"]),
                                         strict=True)]
    data = read(lines(tmp_path / "a.jsonl", rows), validation=0)
    assert data.task == "graph-multi-label" and data.labels == ("a", "b")
    task = task_for(data, GraphNetwork(classes=2))
    task.settle(GraphNetwork(classes=2))
    kept = [task.rows("train")[i] for i in range(4)]
    assert task.collate(kept)["labels"].tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("broken, words", [
    ({"edge_index": [[0, 1]]}, "'edge_index': expected two lists, .*found a list of 1"),
    ({"edge_index": [[0, 1], [1]]}, "2 edges begin and 1 end"),
    ({"edge_index": [[0, 5], [5, 0]]}, "an edge names node 5, and there are 2, from 0 on"),
    ({"edge_index": [[0, -1], [0, 0]]}, "a node is a whole number from 0, found -1"),
    ({"edge_index": [[0, 0.5], [0, 0]]}, "a node is a whole number from 0, found 0.5"),
    ({"edge_index": None}, "found nothing"),
    ({"node_feat": [[1, 2], [3]]}, "'node_feat': node 1 has 1 numbers, and node 0 2"),
    ({"node_feat": [[1, "a"], [3, 4]]}, "node 0 has a; expected a finite number"),
    ({"node_feat": [[1, 2, 3], [1, 2, 3]]}, "3 numbers for a node, and the first graph has 2"),
    ({"node_feat": "ab"}, "'node_feat': expected a list of numbers for each node, found a str"),
    ({"node_feat": []}, "the graph has no node"),
    ({"num_nodes": 7}, "num_nodes is 7, and node_feat has 2 nodes"),
    ({"num_nodes": "2"}, "'num_nodes': expected a whole number from 1, found 2"),
    ({"y": [0, 1]}, "'y': 2 numbers, and a graph is learnt one here"),
    ({"y": None}, "'y': the label is missing")])
def test_what_is_no_graph_is_named_with_its_row_and_field(tmp_path, broken, words):
    with pytest.raises(DataError, match=f"line 2.*{words}"):
        read(lines(tmp_path / "a.jsonl", [PATH, {**PAIR, **broken}, PATH]))


def test_a_file_cut_in_half_is_told(tmp_path):
    path = graphs(tmp_path / "a.jsonl", 6)
    path.write_text(path.read_text()[:700])
    with pytest.raises(DataError, match=r"a.jsonl, line \d+ is not JSON"):
        read(str(path))
    with pytest.raises(DataError, match="name what is learnt with label="):
        read(lines(tmp_path / "b.jsonl", [{k: v for k, v in PATH.items() if k != "y"}] * 3))


# -- TU ------------------------------------------------------------------------------------------
def test_a_folder_of_the_tu_collection_is_the_same_rows(tmp_path):
    rows = rows_of_graphs(12)
    found = read(str(tu(tmp_path / "MOL", rows)), validation=0)
    want = read(lines(tmp_path / "a.jsonl", rows), validation=0)
    assert found.train[:] == want.train[:] and found.labels == want.labels
    assert found.layout == "TU graphs" and found.where["train"](3).endswith("MOL_A.txt, graph 4")


def test_nodes_have_marks_before_attributes_or_a_one(tmp_path):
    root = tu(tmp_path / "MOL", [PATH | {"node_feat": [[1, 0], [0, 1], [1, 0]]},
                                 PAIR | {"node_feat": [[0, 1], [1, 0]]}])
    (root / "MOL_node_attributes.txt").write_text("\n".join(["0.5, 2"] * 5))
    assert read(str(root), validation=0).train[0]["node_feat"][1] == [0, 1, 0.5, 2]
    (root / "MOL_node_labels.txt").unlink()
    assert read(str(root), validation=0).train[0]["node_feat"][1] == [0.5, 2]
    (root / "MOL_node_attributes.txt").unlink()
    assert read(str(root), validation=0).train[0]["node_feat"] == [[1.0]] * 3
    (root / "MOL_graph_labels.txt").rename(root / "MOL_graph_attributes.txt")
    (root / "MOL_graph_attributes.txt").write_text("0.25\n-1.5\n")
    assert read(str(root), task="graph-regression", validation=0).train["label"][:] == [0.25, -1.5]


def removed(what):
    return lambda root: (root / f"MOL_{what}.txt").unlink()


def half(text):
    return text[:len(text) // 2]


def put(what, change):
    def made(root):
        path = root / f"MOL_{what}.txt"
        path.write_text(change(path.read_text()))
    return made


@pytest.mark.parametrize("broken, words", [
    (removed("A"), "lacks MOL_A.txt"), (removed("graph_indicator"), "lacks MOL_graph_indicator"),
    (removed("graph_labels"), "lacks MOL_graph_labels.txt, which a TU data set has beside MOL_A"),
    (put("graph_labels", half), r"graph_labels.txt has \d+ lines, and .*12 graphs"),
    (put("graph_indicator", half), "is one of them cut off|stays in its graph"),
    (put("node_labels", half), r"node_labels.txt has \d+ lines, and .*cut off"),
    (put("A", lambda t: t.rstrip()[:-3]), r"MOL_A.txt, line \d+: (expected 2 whole|nodes are)"),
    (put("A", lambda t: t + "1, 99999\n"), "an edge stays in its graph, found 1, 99999"),
    (put("A", lambda t: t + "0, 1\n"), "nodes are numbered from 1 to"),
    (put("graph_indicator", lambda t: "7\n" + t), "numbered from 1 on"),
    (put("graph_indicator", lambda t: "x\n" + t), "line 1: expected 1 whole number, found 'x'"),
    (put("graph_labels", lambda t: t.replace("\n", " 1\n", 1)), "line 1: expected one entry")])
def test_files_of_the_collection_that_do_not_agree_are_named(tmp_path, broken, words):
    root = tu(tmp_path / "MOL", rows_of_graphs(12))
    broken(root)
    with pytest.raises(DataError, match=words):
        read(str(root))


def test_two_collections_in_one_folder_are_told_apart(tmp_path):
    tu(tmp_path, rows_of_graphs(4), "A1")
    tu(tmp_path, rows_of_graphs(4), "B2")
    with pytest.raises(DataError, match="holds 2 sets of graphs, A1, B2"):
        read(str(tmp_path))


def test_a_class_of_one_graph_stays_where_it_trains(tmp_path):
    data = read(lines(tmp_path / "a.jsonl", [PATH] * 9 + [PAIR]))
    assert sorted(data.train["label"][:])[-1] == 1 and data.validation["label"][:] == [0]


# -- batches -------------------------------------------------------------------------------------
class Dense(nn.Module):
    """As PyG's dense layers are called: nodes, edges, which nodes are there."""

    def __init__(self, width=2, classes=2):
        super().__init__()
        self.up, self.head = nn.Linear(width, 8), nn.Linear(8, classes)

    def forward(self, x, adj, mask=None):
        h = torch.relu(self.up(x) + adj @ self.up(x))
        return self.head((h * mask.unsqueeze(-1)).sum(1))


def test_a_batch_is_filled_up_and_says_which_nodes_are_there(tmp_path):
    data = read(lines(tmp_path / "a.jsonl", [
        PAIR, {**PATH, "edge_index": [[0, 0], [1, 2]]}]), validation=0)
    task = task_for(data, Dense())
    task.settle(Dense())
    rows = task.rows("train")
    batch = task.collate([rows[0], rows[1]])
    assert batch["x"].tolist() == [[[0, 2], [3, 1], [0, 0]], [[1, 0], [0, 1], [1, 0]]]
    assert batch["mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["adj"].tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]],
                                     [[0, 1, 1], [0, 0, 0], [0, 0, 0]]]     # edges go one way
    assert batch["labels"].tolist() == [1, 0]
    assert tuple(task.example(1)["x"].shape) == (1, 3, 2)                   # the largest


def test_what_is_filled_up_says_nothing(tmp_path):
    """A graph is answered beside a larger one as it is by itself."""
    data = read(str(graphs(tmp_path / "a.jsonl", 12)), validation=0)
    model = GraphNetwork(classes=2).eval()
    task = task_for(data, model)
    task.settle(model)
    rows = task.rows("train")
    together = model(**task.feed(task.collate([rows[i] for i in range(12)]))).logits
    alone = torch.cat([model(**task.feed(task.collate([rows[i]]))).logits for i in range(12)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("names, words", [
    ("x, edge_index, batch", "takes edge_index, the edges of a whole batch in one list"),
    ("x", "has no argument for edges: expected one of adj, adjacency"),
    ("adj", "has no argument for nodes: expected one of x, node_feat"), ("self_", "for nodes")])
def test_a_model_that_takes_other_things_is_told_so(tmp_path, names, words):
    space: dict = {}
    exec(f"def forward(self, {names}): pass", space)
    model = type("Other", (nn.Linear,), {"forward": space["forward"]})(2, 2)
    with pytest.raises(ConfigError, match=words):
        burnish.fit(model, lines(tmp_path / "a.jsonl", [PATH, PAIR] * 4), "full", quiet=True,
                    output=tmp_path / "out")


def test_nodes_of_another_width_are_told_before_anything_trains(tmp_path):
    with pytest.raises(ConfigError, match=r"Dense does not take x \(2, 3, 2\), adj \(2, 3, 3\), "
                                          r"mask \(2, 3\): .*shapes"):
        burnish.fit(Dense(5), lines(tmp_path / "a.jsonl", [PATH, PAIR] * 4), "full", quiet=True,
                    validation=0, output=tmp_path / "out")


# -- whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2, targets='fc1,fc2') + adam8bit"])
def test_a_module_is_trained_and_its_memory_is_as_promised(tmp_path, recipe):
    run = burnish.fit(GraphNetwork(classes=5), str(graphs(tmp_path / "a.jsonl", 24)), recipe,
                      output=tmp_path / "out", max_steps=4, batch_size=4, quiet=True)
    assert run.tuned.model.head.out_features == 2
    assert run.truth.peak_bytes == run.promise.peak_bytes > 0


def test_a_folder_with_its_code_is_fitted_asked_and_judged(tmp_path, capsys):
    data = tu(tmp_path / "MOL", rows_of_graphs(240))
    made("graph").save_pretrained(tmp_path / "m")
    out, trust = str(tmp_path / "out"), ["--trust_remote_code", "true"]
    assert main(["fit", "--model", str(tmp_path / "m"), "--data", str(data), "--recipe", "full",
                 "--output", out, "--epochs", "25", "--lr", "3e-3", "--json", *trust]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["validation"]["accuracy"] > 0.7
    assert told["memory"]["difference"] == 0
    row = json.dumps(rows_of_graphs(1, seed=5)[0])
    assert main(["predict", out, row, str(data), "--json", "--trust_remote_code"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 241 and {a["label"] for a in answers} == {"0", "1"}
    assert main(["evaluate", out, str(data), "--json", "--trust_remote_code"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["these"] == "held out by this run"
    assert found["tuned"]["accuracy"] == told["metrics"]["validation"]["accuracy"]
    again = Finished.open(tmp_path / "out", trust=True)
    with pytest.raises(DataError, match="there is no table of graphs at nowhere"):
        list(again.predict(["nowhere"]))
    with pytest.raises(DataError, match="'edge_index': expected two lists"):
        list(again.predict(['{"node_feat": [[1]]}']))
