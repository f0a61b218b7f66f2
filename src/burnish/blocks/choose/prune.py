"""Which entries of a matrix stay, by a score of each: within rows, the matrix, or runs of inputs.

A score is (..., out, in) and not negative; the answer is a mask of truth values of that shape. Of
equal scores the first go, on every device alike. Rows are taken a panel at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.errors import RecipeError
from .lowest import lowest

#: entries handled at once, where entries of a row compete
PANEL = 1 << 22


def pattern(mask: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", where n of m inputs in a row stay; None of "row" and "matrix".

    RecipeError for anything else.
    """
    if mask in ("row", "matrix"):
        return None
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", mask)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise RecipeError(f"mask={mask!r}: expected 'row', 'matrix', or such as '2:4': how many "
                          "stay of how many inputs in a row")
    return n, m


def panels(rows: int, width: int) -> Iterator[slice]:
    """Runs of rows of about PANEL entries."""
    step = max(1, PANEL // max(1, width))
    return (slice(i, i + step) for i in range(0, rows, step))


@torch.no_grad()
def kept(score: Tensor, mask: str, ratio: float) -> Tensor:
    """Which entries stay when ``floor(ratio n)`` of the n that compete go, or by an "n:m" pattern.

    mask: "row", all inputs of an output compete; "matrix", all entries; "n:m", n stay of every m
        inputs in a row, whatever the ratio.
    """
    parts = pattern(mask)
    if mask == "matrix":
        flat = score.flatten(-2)
        return ~lowest(flat, _share(ratio, flat.shape[-1])).view(score.shape)
    rows = score.flatten(0, -2)
    out = torch.empty_like(rows, dtype=torch.bool)
    for at in panels(*rows.shape):
        part = rows[at]
        out[at] = lowest(part, _share(ratio, part.shape[-1])) if parts is None else \
            lowest(part.unflatten(-1, (-1, parts[1])), parts[1] - parts[0]).flatten(-2)
    return out.logical_not_().view(score.shape)


def _share(ratio: float, n: int) -> int:
    return int(ratio * n + 1e-9)                     # 0.3 of 10 are three


def grown_and_pruned(V: Tensor, score: Tensor, keep: Tensor, variance: Tensor, tolerance: float,
                     cycles: int, m: int = 0) -> Tensor:
    """A mask (rows, in) in which entries have changed places so that what a row has lost on
    average, ``e = sum of V over what is pruned``, comes nearer to zero.

    V: what an entry brings on average, ``W_j E[x_j]``. In a cycle every row takes back the pruned
    entry with the largest ``sign(e) V_j / Var(x_j)``, if that is above zero, and gives up, of those
    it keeps whose V has the other sign, the one of the lowest score; with m, of all that it keeps
    in the same run of m inputs. A row stops where nothing is left to exchange, where |e| is at most
    `tolerance`, and before e would change its sign.
    """
    keep = keep.clone()
    for at in panels(*V.shape):
        _exchange(V[at], score[at], keep[at], variance, tolerance, cycles, m)
    return keep


def _exchange(V: Tensor, score: Tensor, keep: Tensor, variance: Tensor, tolerance: float,
              cycles: int, m: int) -> None:
    lost = V.masked_fill(keep, 0).sum(1)
    going = lost.abs() > tolerance
    steady = V / variance.clamp(min=1e-12)           # an input that never moves is sure, not inf
    rows, inf = torch.arange(len(V), device=V.device), float("inf")
    for _ in range(cycles):
        if not bool(going.any()):
            return
        sign = lost.sign().unsqueeze(1)
        best, back = (sign * steady).masked_fill(keep, -inf).max(1)
        if m:
            other = torch.arange(V.shape[1], device=V.device) // m != (back // m).unsqueeze(1)
        else:
            other = sign * V >= 0
        worst, off = score.masked_fill(~keep | other, inf).min(1)
        then = lost - V[rows, back] + V[rows, off]
        going &= (best > 0) & worst.isfinite() & (then * sign.squeeze(1) >= 0)
        keep[rows[going], back[going]] = True
        keep[rows[going], off[going]] = False
        lost = torch.where(going, then, lost)
        going &= lost.abs() > tolerance
