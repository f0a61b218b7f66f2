"""Folders of models whose code comes with them, of clouds of points and of graphs, and such data.

The code that ``save_pretrained`` puts into such a folder is this file: a configuration, a model,
and ``register_for_auto_class``, which writes ``auto_map``. A model of one's own is laid out so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from burnish.testing.graphs import GraphNetwork, molecules
from burnish.testing.points import PointTransformer, surfaces


class CloudConfig(PretrainedConfig):
    model_type = "burnish-point-transformer"

    def __init__(self, width: int = 32, blocks: int = 2, groups: int = 8, neighbours: int = 6,
                 **rest: Any):
        super().__init__(**rest)
        self.width, self.blocks = width, blocks
        self.groups, self.neighbours = groups, neighbours


class CloudModel(PreTrainedModel):
    """points (B, P, 3) -> logits (B, classes)."""

    config_class = CloudConfig
    config: CloudConfig

    def __init__(self, config: CloudConfig):
        super().__init__(config)
        self.net = PointTransformer(width=config.width, blocks=config.blocks, groups=config.groups,
                                    neighbours=config.neighbours, classes=config.num_labels)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """As torch draws them: transformers' own are too small for so narrow a model."""
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.reset_parameters()

    def forward(self, points: torch.Tensor) -> Any:
        return self.net(points)


class GraphConfig(PretrainedConfig):
    model_type = "burnish-graph-network"

    def __init__(self, width: int = 32, blocks: int = 2, features: int = 4, **rest: Any):
        super().__init__(**rest)
        self.width, self.blocks, self.features = width, blocks, features


class GraphModel(PreTrainedModel):
    """nodes (B, N, F), adjacency (B, N, N) -> logits (B, classes)."""

    config_class = GraphConfig
    config: GraphConfig

    def __init__(self, config: GraphConfig):
        super().__init__(config)
        self.net = GraphNetwork(width=config.width, blocks=config.blocks, features=config.features,
                                classes=config.num_labels)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """As torch draws them: transformers' own are too small for so narrow a model."""
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.reset_parameters()

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor) -> Any:
        return self.net(nodes, adjacency)


def made(kind: str, seed: int = 0, **config: Any) -> Any:
    """A model of "cloud" or of "graph", drawn at random, that saves its code beside its weights."""
    of, model = (CloudConfig, CloudModel) if kind == "cloud" else (GraphConfig, GraphModel)
    of.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    torch.manual_seed(seed)
    return model(of(**config))


# -- clouds --------------------------------------------------------------------------------------
def written(path: Path, points: Any) -> Path:
    """(P, 3) points in the form that the name of a file ends with; of an .off, in threes, the
    corners of its faces."""
    import numpy as np

    x = np.asarray(points, dtype=np.float32)
    lines = [" ".join(f"{v:.6g}" for v in row) for row in x]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".xyz":
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".off":
        faces = [f"3 {k} {k + 1} {k + 2}" for k in range(0, len(x) - 2, 3)]
        path.write_text("\n".join(["OFF", f"{len(x)} {len(faces)} 0", *lines, *faces]) + "\n")
    else:
        head = "\n".join(["ply", "format binary_little_endian 1.0", f"element vertex {len(x)}",
                          "property float x", "property float y", "property float z",
                          "end_header"]) + "\n"
        path.write_bytes(head.encode() + b"".join(struct.pack("<3f", *row) for row in x))
    return path


def clouds(folder: Path, each: int, kinds: Sequence[str] = ("sphere", "saddle"), points: int = 64,
           seed: int = 0, ends: Sequence[str] = (".xyz", ".npy", ".ply")) -> Path:
    """A folder of clouds for each kind of surface, in several forms of file."""
    made, labels = surfaces(kinds, each, points, seed)
    for i, (x, label) in enumerate(zip(made, labels.tolist(), strict=True)):
        written(folder / kinds[label] / f"{i}{ends[i % len(ends)]}", x)
    return folder


# -- graphs --------------------------------------------------------------------------------------
def rows_of_graphs(count: int, seed: int = 0, question: str = "between") -> list[dict[str, Any]]:
    """Graphs as PyG and OGB name their parts; ``y``: whether an atom is bound to two kinds."""
    nodes, adjacency, said = molecules(count, seed)
    rows = []
    for x, a, told in zip(nodes, adjacency, said, strict=True):
        many = int(x.sum())
        rows.append({"edge_index": a[:many, :many].nonzero().T.tolist(),
                     "node_feat": x[:many].int().tolist(), "y": [min(told[question], 1)]})
    return rows


def graphs(path: Path, count: int, seed: int = 0) -> Path:
    """A file of JSON lines, a graph each."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows_of_graphs(count, seed)))
    return path


def tu(folder: Path, rows: Sequence[dict[str, Any]], name: str = "MOL") -> Path:
    """The same rows as a data set of the TU collection lies."""
    folder.mkdir(parents=True, exist_ok=True)
    edges, of, marks, first = [], [], [], 1
    for g, row in enumerate(rows, 1):
        edges += [f"{a + first}, {b + first}" for a, b in zip(*row["edge_index"], strict=True)]
        of += [str(g)] * len(row["node_feat"])
        marks += [str(x.index(1)) for x in row["node_feat"]]
        first += len(row["node_feat"])
    for what, lines in (("A", edges), ("graph_indicator", of), ("node_labels", marks),
                        ("graph_labels", [str(r["y"][0]) for r in rows])):
        (folder / f"{name}_{what}.txt").write_text("\n".join(lines) + "\n")
    return folder
