"""What a classifier takes for what, and the rows it is furthest off on."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kinds import pictured

if TYPE_CHECKING:
    from .data import Data
    from .tasks import Task

#: classes of which all are counted against all; rows and pairs that are kept; letters of a text
WHOLE, KEPT, LETTERS = 30, 12, 240


def mistaken(said: Tensor, true: Tensor, lost: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Of rows (N,): the class that was said, the right one, and the loss. ``counts``: how many rows
    of a class (line) were taken for one (column), of up to :data:`WHOLE` classes; ``pairs``: the
    commonest mistakes; ``rows``: the wrong ones, the largest loss first."""
    n = len(names)
    each = torch.bincount(true * n + said, minlength=n * n).view(n, n)
    off = each.clone().fill_diagonal_(0).flatten()
    common = off.argsort(descending=True, stable=True)[:KEPT]
    wrong = (said != true).nonzero().flatten()
    worst = wrong[lost[wrong].argsort(descending=True, stable=True)][:KEPT]
    return {
        "classes": list(names) if n <= WHOLE else [],
        "counts": each.tolist() if n <= WHOLE else [],
        "wrong": len(wrong), "of": len(true),
        "pairs": [{"right": names[int(k) // n], "said": names[int(k) % n], "count": int(off[k])}
                  for k in common if off[k]],
        "rows": [{"row": int(i), "right": names[int(true[i])], "said": names[int(said[i])],
                  "loss": float(lost[i])} for i in worst]}


def in_words(task: Task, split: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the rows of the data, with what each reads, where that is a text."""
    rows = task.data.splits[split]

    def text(i: int) -> str:
        row = rows[i]
        words = "  ".join(str(row[k]) for k in ("text", "pair") if row.get(k) is not None)
        return words if len(words) <= LETTERS else words[:LETTERS - 1] + "…"

    spoken, at = "text" in rows.column_names, task.rows(split).source
    return {**found, "split": split, "rows": [
        {**r, "row": at(r["row"])} | ({"text": text(at(r["row"]))} if spoken else {})
        for r in found["rows"]]}


def shown(data: Data | None, found: Mapping[str, Any], side: int = 72) -> list[tuple[str, str]]:
    """(picture as a data URI, what it is and what was said) of the worst rows; of several tasks
    none, for `data` is of one."""
    if data is None or not pictured(data.task) or not found or "task" in found:
        return []
    return [(coded(data.row(found["split"], r["row"])["image"], side),
             f"{r['right']}, said {r['said']}") for r in found["rows"]]


def coded(image: Any, side: int) -> str:
    """A picture as a data URI, `side` wide; small ones with their pixels as they are."""
    image = image.convert("RGB")
    image = image.resize((side, max(1, round(side * image.height / image.width))), 0
                         if image.width < side else 2)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
