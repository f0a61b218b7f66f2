"""What the methods that choose rows have in common."""

from __future__ import annotations

from typing import ClassVar


class Chooses:
    """A method whose ``lifecycle(tuned, points, rows, wanted)`` gives rows scores, of which
    ``chosen(scores)`` takes the best. at_points: it reads a warm-up's checkpoints."""

    chooses: ClassVar[bool] = True
    at_points: ClassVar[bool] = False
