"""Graphs with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, nearest
from ..from_files import Kept
from ..graphs import tensors
from ..rows import Rows
from .base import Batch
from .classes import _Number, _Several, _Single
from .own import Own

#: what models call the three tensors of a batch of graphs, likeliest first
NODES = ("x", "node_feat", "nodes", "node_features", "features", "input_nodes")
EDGES = ("adj", "adjacency", "adjacency_matrix", "adjs")
THERE = ("mask", "node_mask", "attention_mask")


class Graphs(Kept):
    """``x`` (N, F), ``adj`` (N, N) and ``labels``."""

    def __init__(self, rows: Any, where: Any):
        super().__init__(rows, where)
        self.sizes = [len(x) for x in rows["node_feat"][:]]
        self.labels = rows["label"][:]

    def length(self, i: int) -> int:
        return self.sizes[i]

    def read(self, i: int) -> dict[str, Any]:
        x, adjacency = tensors(self.rows[i])
        return {"x": x, "adj": adjacency, "labels": self.labels[i]}


class _Graph(Own):
    """Nodes (B, N, F), adjacency (B, N, N) and, where the model takes it, which nodes are there
    (B, N), filled up to the largest graph of a batch with nodes of noughts and no edges. What they
    are called is what the model calls them; `PyG`'s dense layers say x, adj and mask."""

    takes = ("edge_index", "node_feat")
    unlike = True
    word = "a graph"
    reads_what = "graphs"
    entries: tuple[str, str, str | None] = ("x", "adj", "mask")

    def called_with(self, name: str, names: list[str]) -> None:
        if "edge_index" in names:
            raise ConfigError(
                f"{name} takes edge_index, the edges of a whole batch in one list, in which no "
                "graph stands by itself. fit serves models that take x (B, N, F) and adj (B, N, N)"
                " as torch_geometric's dense layers do; train this one with tuned.step")
        found = [next((n for n in known if n in names), None) for known in (NODES, EDGES, THERE)]
        if found[0] is None or found[1] is None:
            what, known = ("nodes", NODES) if found[0] is None else ("edges", EDGES)
            raise ConfigError(f"{name} has no argument for {what}: expected one of "
                              f"{', '.join(known)}, its forward takes {', '.join(names) or 'none'}"
                              f"{nearest(known[0], names)}")
        self.entries = (found[0], found[1], found[2])

    def make(self, split: str) -> Rows:
        return Graphs(self.data.splits[split], self.data.where.get(split))

    def joined(self, graphs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        most, width = max(len(x) for x, _ in graphs), graphs[0][0].shape[1]
        nodes = torch.zeros(len(graphs), most, width)
        edges = torch.zeros(len(graphs), most, most)
        there = torch.zeros(len(graphs), most, dtype=torch.bool)
        for k, (x, adjacency) in enumerate(graphs):
            nodes[k, :len(x)], edges[k, :len(x), :len(x)], there[k, :len(x)] = x, adjacency, True
        made = zip(self.entries, (nodes, edges, there), strict=True)
        return {name: value for name, value in made if name is not None}

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.joined([(r["x"], r["adj"]) for r in rows]) | {
            "labels": self.labels([r["labels"] for r in rows])}

    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed(self.joined([tensors(dict(row))]))

    def preview(self, n: int = 3) -> list[str]:
        said, rows = [], self.data.train
        for i in range(0, len(rows), max(1, len(rows) // n))[:n]:
            row = rows[i]
            label = row["label"] if self.data.labels is None else self.data.labels[row["label"]] \
                if isinstance(row["label"], int) else [self.data.labels[k] for k in row["label"]]
            said.append(f"{len(row['node_feat'])} nodes of {len(row['node_feat'][0])} numbers, "
                        f"{len(row['edge_index'][0])} edges  label={label!r}")
        return said

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        raise NotImplementedError


class GraphClassification(_Single, _Graph):
    """Graphs, each of one class."""


class GraphMultiLabel(_Several, _Graph):
    """Graphs, each of any number of classes."""


class GraphRegression(_Number, _Graph):
    """Graphs with a number each."""
