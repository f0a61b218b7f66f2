"""Graphs as they lie on disk, and as tensors.

Rows have the names of PyG and OGB: ``edge_index``, two lists of one length, an edge from the node
in the first to the node in the second; ``node_feat`` (or ``x``), numbers for each node;
``num_nodes``, where nothing else says how many there are; ``y``, what is learnt. A folder of the TU
collection (``MUTAG_A.txt``, ``MUTAG_graph_indicator.txt``, ``MUTAG_graph_labels.txt``) becomes the
same rows: the label of a node is one of so many marks, before its attributes. Nodes of which
nothing is said have a 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.reading import plain, read_text
from .table import Table

if TYPE_CHECKING:
    from torch import Tensor

EDGES = "edge_index"
NODES = ("node_feat", "x")
#: different labels of nodes that become a mark each
MOST_MARKS = 1024

Edge = tuple[int, int]


def recognised(names: Sequence[str]) -> bool:
    return EDGES in names


def node_column(names: Sequence[str]) -> str | None:
    return next((n for n in NODES if n in names), None)


def unwrapped(table: Table, label: str | None) -> Table:
    """The same rows, with a ``y`` of one entry as that entry. Raises DataError for several numbers,
    of which a graph has one here."""
    if label is None or label not in table.columns:
        return table
    made = []
    for i, value in enumerate(table.columns[label]):
        while isinstance(value, list) and len(value) == 1 and not isinstance(value[0], str):
            value = value[0]
        if isinstance(value, list) and value and not all(isinstance(v, str) for v in value):
            raise DataError(f"{table.where(i)}, field {label!r}: {len(value)} numbers, and a graph "
                            "is learnt one here; name a column of one with label=")
        made.append(value)
    table.columns[label] = made
    return table


# -- rows ----------------------------------------------------------------------------------------
def canonical(table: Table) -> dict[str, list[Any]]:
    """``edge_index`` and ``node_feat`` of every row. Raises DataError with row and field."""
    of, width = node_column(list(table.columns)), None
    edges, nodes = [], []
    for i, row in enumerate(table.rows()):
        e, x = one(row, table.where(i), of)
        if width is not None and len(x[0]) != width:
            raise DataError(f"{table.where(i)}, field {of!r}: {len(x[0])} numbers for a node, and "
                            f"the first graph has {width}")
        width = len(x[0])
        edges.append(e)
        nodes.append(x)
    return {EDGES: edges, NODES[0]: nodes}


def one(row: dict[str, Any], where: str, of: str | None = None
        ) -> tuple[list[list[int]], list[list[float]]]:
    """(edges, numbers of each node) of one graph."""
    of = of or node_column([k for k, v in row.items() if v is not None])
    edges = _edges(row.get(EDGES), where)
    nodes = _nodes(row.get(of), f"{where}, field {of!r}") if of else None
    told = row.get("num_nodes")
    if told is not None and (isinstance(told, bool) or not isinstance(told, int) or told < 1):
        raise DataError(f"{where}, field 'num_nodes': expected a whole number from 1, found "
                        f"{plain(told, 40)}")
    most = max(itertools.chain(*edges), default=-1) + 1
    if nodes is None:
        nodes = [[1.0] for _ in range(told or most)]
    if not nodes:
        raise DataError(f"{where}: the graph has no node; leave it out")
    if told is not None and told != len(nodes):
        raise DataError(f"{where}: num_nodes is {told}, and {of} has {len(nodes)} nodes")
    if most > len(nodes):
        raise DataError(f"{where}, field {EDGES!r}: an edge names node {most - 1}, and there are "
                        f"{len(nodes)}, from 0 on")
    return edges, nodes


def _edges(given: Any, where: str) -> list[list[int]]:
    at = f"{where}, field {EDGES!r}"
    if not isinstance(given, list) or len(given) != 2 or not all(
            isinstance(g, list) for g in given):
        raise DataError(f"{at}: expected two lists, where edges begin and where they end, found "
                        f"{_kind(given)}")
    if len(given[0]) != len(given[1]):
        raise DataError(f"{at}: {len(given[0])} edges begin and {len(given[1])} end")
    for n in itertools.chain(*given):
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**31:
            raise DataError(f"{at}: a node is a whole number from 0, found {plain(n, 40)}")
    return [list(given[0]), list(given[1])]


def _nodes(given: Any, at: str) -> list[list[float]]:
    if not isinstance(given, list):
        raise DataError(f"{at}: expected a list of numbers for each node, found {_kind(given)}")
    rows = [v if isinstance(v, list) else [v] for v in given]
    for k, row in enumerate(rows):
        if not row or len(row) != len(rows[0]):
            raise DataError(f"{at}: node {k} has {len(row)} numbers, and node 0 {len(rows[0])}")
        for v in row:
            if isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) < math.inf:
                raise DataError(f"{at}: node {k} has {plain(v, 40)}; expected a finite number")
    try:
        return [[float(v) for v in row] for row in rows]
    except OverflowError:
        raise DataError(f"{at}: a number is too large") from None


def _kind(given: Any) -> str:
    return "nothing" if given is None else f"a list of {len(given)}" if isinstance(given, list) \
        else f"a {type(given).__name__}"


def tensors(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(nodes (N, F), adjacency (N, N)): one where an edge goes from the row's node to the
    column's."""
    import torch

    x = torch.tensor(row[NODES[0]], dtype=torch.float32)
    adjacency = torch.zeros(len(x), len(x))
    begin, end = (torch.tensor(e, dtype=torch.long) for e in row[EDGES])
    adjacency[begin, end] = 1
    return x, adjacency


# -- TU ------------------------------------------------------------------------------------------
def graph_folder(path: Path) -> Table | None:
    """A folder of the TU collection; None for another. Raises DataError for a file that is missing
    or does not agree with the others."""
    found = sorted({p.name.removesuffix(end) for end in ("_A.txt", "_graph_indicator.txt")
                    for p in path.glob(f"*{end}")})
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{path} holds {len(found)} sets of graphs, {', '.join(found[:4])}; put "
                        "each into a folder of its own")
    return _Tu(path, found[0]).table()


class _Tu:
    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name}_{what}.txt"

    def lines(self, what: str) -> list[list[str]]:
        """The fields of each line. Raises DataError where the file is missing."""
        path = self.file(what)
        if not path.is_file():
            raise DataError(f"{self.folder} lacks {path.name}, which a TU data set has beside "
                            f"{self.name}_A.txt")
        text = read_text(path, DataError)
        return [line.replace(",", " ").split() for line in text.rstrip().split("\n")]

    def numbers(self, what: str, each: int | None, kind: type = float) -> list[list[Any]]:
        """Every line as so many numbers (as many as the first has, where None)."""
        path, made = self.file(what), []
        for n, fields in enumerate(self.lines(what), 1):
            try:
                row = [kind(f) for f in fields]
                if not row or len(row) != (each or len(made[0] if made else row)) or not all(
                        abs(v) < math.inf for v in row):
                    raise ValueError
            except ValueError:
                many = each or (len(made[0]) if made else "some")
                word = "whole number" if kind is int else "number"
                raise DataError(f"{path}, line {n}: expected {many} {word}{'s' * (many != 1)}, "
                                f"found {plain(' '.join(fields), 60)!r}") from None
            made.append(row)
        return made

    def table(self) -> Table:
        of = [row[0] for row in self.numbers("graph_indicator", 1, int)]
        count = max(of)
        if of[0] != 1 or any(b - a not in (0, 1) for a, b in itertools.pairwise(of)):
            raise DataError(f"{self.file('graph_indicator')}: graphs are numbered from 1 on, each "
                            "with its nodes one after the other, and these are not")
        labels = self.labels(count)
        first = [0] * (count + 1)
        for g in of:
            first[g] += 1
        first = list(itertools.accumulate(first))
        nodes = self.nodes(len(of))
        edges: list[list[list[int]]] = [[[], []] for _ in range(count)]
        for n, (a, b) in enumerate(self.numbers("A", 2, int), 1):
            if not (1 <= a <= len(of) and 1 <= b <= len(of)) or of[a - 1] != of[b - 1]:
                raise DataError(f"{self.file('A')}, line {n}: nodes are numbered from 1 to "
                                f"{len(of)} and an edge stays in its graph, found {a}, {b}")
            g = of[a - 1] - 1
            edges[g][0].append(a - 1 - first[g])
            edges[g][1].append(b - 1 - first[g])
        columns = {EDGES: edges, "node_feat": [nodes[first[g]:first[g + 1]] for g in range(count)],
                   "label": labels}
        return Table(columns, lambda i: f"{self.file('A')}, graph {i + 1}", "TU graphs")

    def labels(self, count: int) -> list[Any]:
        """A class for each graph, or a number, where there are no classes."""
        what = "graph_labels"
        if not self.file(what).is_file() and self.file("graph_attributes").is_file():
            what = "graph_attributes"
        rows = self.lines(what)
        for n, row in enumerate(rows, 1):
            if len(row) != 1:
                raise DataError(f"{self.file(what)}, line {n}: expected one entry for a graph, "
                                f"found {plain(' '.join(row), 60)!r}")
        self._agree(what, len(rows), count, "graphs")
        return [row[0] for row in rows]

    def nodes(self, count: int) -> list[list[float]]:
        made: list[list[float]] = [[] for _ in range(count)]
        if self.file("node_labels").is_file():
            marks = self.numbers("node_labels", None, int)
            self._agree("node_labels", len(marks), count, "nodes")
            for k in range(len(marks[0])):
                kinds = {v: n for n, v in enumerate(sorted({row[k] for row in marks}))}
                if len(kinds) > MOST_MARKS:
                    raise DataError(f"{self.file('node_labels')}: {len(kinds)} different labels "
                                    f"are more than {MOST_MARKS}, a mark for each; give them as "
                                    "attributes")
                for x, row in zip(made, marks, strict=True):
                    x += [float(n == kinds[row[k]]) for n in range(len(kinds))]
        if self.file("node_attributes").is_file():
            numbers = self.numbers("node_attributes", None)
            self._agree("node_attributes", len(numbers), count, "nodes")
            for x, row in zip(made, numbers, strict=True):
                x += row
        return made if made[0] else [[1.0] for _ in made]

    def _agree(self, what: str, has: int, count: int, of: str) -> None:
        if has != count:
            raise DataError(f"{self.file(what)} has {has} lines, and {self.name}_graph_"
                            f"indicator.txt {count} {of}; is one of them cut off?")
