"""What a recipe has added, part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..blocks.weight.term import Provider, Term
from .swap import ATTR

if TYPE_CHECKING:
    from .tuned import Tuned


def summary(tuned: Tuned) -> dict[str, Any]:
    """See :meth:`burnish.Tuned.summary`."""
    parts: dict[str, dict[str, int]] = {}

    def count(key: str, p: Tensor) -> None:
        row = parts.setdefault(key, {"tensors": 0, "trainable": 0, "bytes": 0})
        row["tensors"] += 1
        row["trainable"] += p.numel()
        row["bytes"] += p.numel() * p.element_size()

    names = {m.name for m in tuned.recipe}
    heads = tuple(tuned.anatomy.head)
    for name, p in tuned.named_parameters():
        _, mark, rest = f".{name}".partition(f".{ATTR}.")
        if mark:
            key = rest.split(".")[1]
            key = next((n for n in sorted(names, key=len, reverse=True)
                        if key == n or key.startswith(n + "_")), key)
        else:
            key = "head" if name.startswith(heads) and heads else "base weights"
        count(key, p)
    total = sum(p.numel() for p in tuned.model.parameters())
    return {"recipe": str(tuned.recipe), "parts": parts,
            "trainable": sum(r["trainable"] for r in parts.values()), "parameters": total,
            "notes": [*tuned.anatomy.notes, *tuned.active.notes], "kernels": kernels(tuned)}


def kernels(tuned: Tuned) -> dict[str, dict[str, int]]:
    """By which road runs what has two: of each class how many by "triton", and how many by torch's
    operators for which reason."""
    found: dict[str, dict[str, int]] = {}
    for m in tuned.model.modules():
        if isinstance(m, Provider | Term) and (why := m.road()) is not None:
            row = found.setdefault(type(m).__name__, {})
            road = f"torch: {why}" if why else "triton"
            row[road] = row.get(road, 0) + 1
    return found


def table(s: dict[str, Any]) -> str:
    """The summary for people."""
    rows = [f"  {k:<16} {r['tensors']:>5} tensors {r['trainable']:>13,} trainable "
            f"{r['bytes'] / 2**20:>9.2f} MiB" for k, r in s["parts"].items()]
    share = 100 * s["trainable"] / max(1, s["parameters"])
    return "\n".join([f"Tuned({s['recipe']!r}): {s['trainable']:,} of {s['parameters']:,} "
                      f"parameters train ({share:.2f} %)", *rows,
                      *[f"  kernels: {n} {what} by {road}" for what, row in s["kernels"].items()
                        for road, n in row.items() if not road.startswith("torch: on cpu")],
                      *[f"  note: {n}" for n in s["notes"]]])
