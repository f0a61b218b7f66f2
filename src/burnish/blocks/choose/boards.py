"""Pseudo-labels by leaderboards: of each class the few samples that are most like it.

The samples come in order. Each stands for the class of its largest probability, if that class has
room or its last entry is beaten (which then is out for good); else for the next class, in falling
order. A board is sorted at every insertion, so that its last entry is its worst.
"""

from __future__ import annotations

import bisect

from torch import Tensor

from ...core.errors import ConfigError


def boards(probabilities: Tensor, k: int) -> list[tuple[int, int]]:
    """(sample, class) of all that stand on a board of at most `k` entries, rising. Of equal
    probabilities the earlier sample, and the earlier class, is before the other.

    probabilities: (n, classes).
    """
    if probabilities.dim() != 2 or not bool(probabilities.isfinite().all()):
        raise ConfigError("pseudo-labels are read off finite probabilities (samples, classes), not "
                          f"{tuple(probabilities.shape)}")
    p = probabilities.detach().double().cpu()
    found: list[list[tuple[float, int]]] = [[] for _ in range(p.shape[1])]
    orders = p.argsort(dim=1, descending=True, stable=True).tolist()
    values = p.tolist()
    for sample, order in enumerate(orders if k > 0 else ()):
        for c in order:
            entry, board = (-values[sample][c], sample), found[c]
            if len(board) == k:
                if entry >= board[-1]:
                    continue                     # not better than its worst
                board.pop()
            bisect.insort(board, entry)
            break
    return sorted((sample, c) for c, board in enumerate(found) for _, sample in board)
