"""The largest batch and the longest sequence that fit, by few simulations.

Memory grows with either, nearly along a line. A line through the nearest two simulations guesses
the border, the guess is simulated, and so on until one fits and the next does not: both were
simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: guesses by a line before the rest of the interval is halved
BY_LINE = 8
#: nobody asks for more samples at once
MOST = 1 << 20


@dataclass(frozen=True)
class Limit:
    """most: the largest number that fits, 0 if none; needs: what it takes; above: what one more
    takes, None where one more is not possible for another reason, which is `why`."""

    most: int
    needs: int
    above: int | None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"most": self.most, "needs": self.needs, "above": self.above, "why": self.why}


def largest(needs: Callable[[int], int], budget: int, start: int, most: int = MOST,
            why: str = "") -> Limit:
    """The largest n up to `most` with ``needs(n) <= budget``, where needs grows with n.

    start: where to look first. why: what forbids more than `most`.
    """
    known: dict[int, int] = {}
    low, high, tries = 0, most + 1, 0
    guess = min(max(1, start), most)
    while high - low > 1:
        known[guess] = needs(guess)
        low, high = (guess, high) if known[guess] <= budget else (low, guess)
        tries += 1
        guess = _next(known, budget, low, high) if tries < BY_LINE else (low + high) // 2
        guess = min(max(low + 1, guess), high - 1)
    return Limit(low, known.get(low, 0), known.get(high), why if high > most else "")


def _next(known: dict[int, int], budget: int, low: int, high: int) -> int:
    """Where the line through the two nearest simulations meets the budget."""
    if len(known) < 2:
        n = next(iter(known))
        return 2 * n if n == low else n // 2
    a, b = sorted(sorted(known, key=lambda n: abs(known[n] - budget))[:2])
    if known[b] <= known[a]:
        return (low + high) // 2
    return int(a + (budget - known[a]) * (b - a) / (known[b] - known[a]))


def positions(model: Any) -> int | None:
    """The longest sequence that the model's config allows; None where it does not say."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_source_positions", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
