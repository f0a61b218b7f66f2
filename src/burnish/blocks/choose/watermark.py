"""How much of a message is left in what a model makes, and how likely that is by chance.

    share = right / bits                     false alarm = P(X >= right),  X ~ Binomial(bits, 1/2)

exactly, by whole numbers: a picture without a mark says each bit by a toss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError, DataError


def false_alarm(right: int, bits: int) -> float:
    """The chance that a message of `bits` tosses has so many or more right."""
    if bits < 1 or not 0 <= right <= bits:
        raise ConfigError(f"{right} of {bits} bits right: expected from none to all of at least 1")
    return sum(math.comb(bits, k) for k in range(right, bits + 1)) / 2**bits


def least_right(bits: int, rate: float) -> int:
    """The fewest right bits whose false alarm is at most `rate`; ConfigError where no number is."""
    found = next((k for k in range(bits + 1) if false_alarm(k, bits) <= rate), None)
    if found is None:
        raise ConfigError(f"all of {bits} bits are right by chance in one of {2**bits} pictures, "
                          f"more often than {rate:g}: a longer message, or a larger rate")
    return found


@dataclass(frozen=True)
class Read:
    """What was read of pictures. right: (pictures,) right bits of each.  bits: of the message.
    least: from which a picture counts as marked."""

    right: tuple[int, ...]
    bits: int
    least: int

    @property
    def share(self) -> float:
        """Of all bits, the right ones."""
        return sum(self.right) / (self.bits * len(self.right))

    @property
    def found(self) -> float:
        """Of the pictures, those that count as marked."""
        return sum(r >= self.least for r in self.right) / len(self.right)

    @property
    def alarm(self) -> float:
        """The chance of so many right bits in all pictures together without a mark."""
        return false_alarm(sum(self.right), self.bits * len(self.right))


@dataclass(frozen=True)
class Retention:
    """What was read before a tuning and after it."""

    before: Read
    after: Read

    @property
    def kept(self) -> float:
        """Of what was above chance before, how much is after: 1 all, 0 none."""
        if self.before.share <= 0.5:
            raise DataError(f"{self.before.share:.1%} of the bits were right before: there was no "
                            "mark to keep")
        return (self.after.share - 0.5) / (self.before.share - 0.5)


def bits(name: str, t: Tensor, dims: int) -> Tensor:
    """`t`, when it is 0 and 1 (or false and true) in so many dimensions; DataError otherwise."""
    if t.dim() != dims or not t.numel() or not bool(((t == 0) | (t == 1)).all()):
        raise DataError(f"the {name}: expected 0 and 1 in {dims} dimension{'s' * (dims > 1)}, "
                        f"got {tuple(t.shape)} of {t.dtype}")
    return t


def read_bits(found: Tensor, message: Tensor, rate: float) -> Read:
    """found: (pictures, bits), 0 and 1 or true and false; message: (bits,)."""
    bits("message", message, 1)
    bits("bits that were read", found, 2)
    if found.shape[1] != len(message):
        raise DataError(f"{found.shape[1]} bits were read, and the message has {len(message)}")
    right = (found.to(torch.int64) == message.to(found.device, torch.int64)).sum(1)
    return Read(tuple(right.tolist()), len(message), least_right(len(message), rate))
