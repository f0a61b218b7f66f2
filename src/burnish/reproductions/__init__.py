"""The world's published memory figures, held against the simulator: ``burnish reproduce``.

Each ``published/<topic>/<laboratory><year>_<what>.yaml`` says a source and its rows: the figure
as printed, what it counts, every setting, a tolerance, and why a row is missed where it is.
"""

from __future__ import annotations

from .rows import Outcome, Row, names, page, read, run, table

__all__ = ["Outcome", "Row", "names", "page", "read", "run", "table"]
