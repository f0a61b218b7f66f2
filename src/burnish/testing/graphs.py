"""A small graph network, and graphs that look like molecules."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import CLASSES, Mlp

#: kinds of atoms, and bonds that each may have
VALENCE = (4, 3, 2, 1)


class Layer(nn.Module):
    """``h + mlp(norm((1 + eps) h + A h))``: what a node's neighbours say, added where there is a
    node."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, dropout)

    def forward(self, h: Tensor, adjacency: Tensor, there: Tensor) -> Tensor:
        return h + self.mlp(self.norm((1 + self.eps) * h + adjacency @ h)) * there


class GraphNetwork(nn.Module):
    """A graph isomorphism network over padded graphs: nodes (B, N, F), adjacency (B, N, N). A node
    of zeros is padding. The head reads the sum and the largest of the nodes that are there."""

    def __init__(self, dropout: float = 0.0, *, width: int = 32, blocks: int = 2,
                 features: int = len(VALENCE), classes: int = CLASSES):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, nodes: Tensor, adjacency: Tensor, labels: Tensor | None = None
                ) -> SimpleNamespace:
        there = nodes.abs().sum(-1, keepdim=True) > 0
        h = self.embed(nodes) * there
        for layer in self.layers:
            h = layer(h, adjacency, there)
        h = self.norm(h)
        whole = (h * there).sum(1)
        most = h.masked_fill(~there, torch.finfo(h.dtype).min).amax(1)
        logits = self.head(torch.cat([whole, most], -1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def example(self, samples: int) -> dict[str, Tensor]:
        """A seeded batch of molecules."""
        nodes, adjacency, _ = molecules(samples, largest=8)
        return {"nodes": nodes, "adjacency": adjacency, "labels": torch.arange(samples) % CLASSES}


# -- molecules --------------------------------------------------------------------------------
def _grown(atoms: int, rings: int, g: torch.Generator) -> tuple[list[int], list[set[int]]]:
    """Kinds and bonds: a tree whose atoms have no more bonds than they may, then some rings."""
    def any_of(options: list[int]) -> int:
        return options[int(torch.randint(len(options), (), generator=g))]

    kinds, bonds = [0], [set[int]()]
    while len(kinds) < atoms:
        at = any_of([i for i, k in enumerate(kinds) if len(bonds[i]) < VALENCE[k]])
        spare = sum(VALENCE[k] - len(b) for k, b in zip(kinds, bonds, strict=True))
        kinds.append(any_of([0, 0, 1, 2, 3] if spare > 2 else [0, 0, 1]))
        bonds.append({at})
        bonds[at].add(len(kinds) - 1)
    for _ in range(rings):
        free = [i for i, k in enumerate(kinds) if len(bonds[i]) < VALENCE[k]]
        pairs = [(i, j) for i in free for j in free if i < j and j not in bonds[i]]
        if pairs:
            i, j = pairs[int(torch.randint(len(pairs), (), generator=g))]
            bonds[i].add(j)
            bonds[j].add(i)
    return kinds, bonds


def molecules(count: int, seed: int = 0, largest: int = 16, rings: int = 3
              ) -> tuple[Tensor, Tensor, list[dict[str, int]]]:
    """(nodes (count, largest, 4), adjacency (count, largest, largest), what is in each): `rings`;
    `pairs`, bonds between atoms of the second and the third kind; `between`, atoms bound to both of
    them. From 6 atoms on; nodes are in a drawn order."""
    g = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(count, largest, len(VALENCE))
    adjacency, said = torch.zeros(count, largest, largest), []
    for n in range(count):
        atoms = int(torch.randint(6, largest + 1, (), generator=g))
        kinds, bonds = _grown(atoms, int(torch.randint(rings + 1, (), generator=g)), g)
        order = torch.randperm(atoms, generator=g).tolist()
        for i, kind in enumerate(kinds):
            nodes[n, order[i], kind] = 1
            for j in bonds[i]:
                adjacency[n, order[i], order[j]] = 1
        edges = [(kinds[i], kinds[j]) for i in range(atoms) for j in bonds[i] if i < j]
        said.append({"rings": len(edges) - atoms + 1,
                     "pairs": sum({a, b} == {1, 2} for a, b in edges),
                     "between": sum({1, 2} <= {kinds[j] for j in some} for some in bonds)})
    return nodes, adjacency, said
