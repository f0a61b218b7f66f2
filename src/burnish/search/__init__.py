"""Which recipe of a space is best, by more than one measure: trials that end in a front.

    space = Space.of("houlsby(bottleneck=0|4|16|64) + prefix(length=0|8|32) + lean")
    front = search(space, score, folder)          # score: recipe -> Score

(AutoPEFT, 2023, arXiv:2301.12132, whose objectives are accuracy and parameters; the peak of memory,
which is simulated, is one here.)
"""

from __future__ import annotations

from .space import Space
from .study import Front, Score, Trial, search

__all__ = ["Front", "Score", "Space", "Trial", "search"]
