"""Places of few entries among many, and their signs, in the fewest bits: Golomb codes of the gaps.

A gap g (zeros before the next entry) is ``g >> b`` in unary and b bits; the unary parts, and the
bits with the sign, are two streams, so both are packed and unpacked in whole pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

#: entries coded at once; bytes of the unary stream decoded at once
CODED, READ = 1 << 18, 1 << 16


def parameter(density: float) -> int:
    """b*, the best b for entries that are there with probability `density`:
    ``1 + floor(log2(ln(phi - 1) / ln(1 - density)))``, phi the golden ratio; 0 at least."""
    if not 0 < density < 1:
        return 0
    phi = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log1p(-density))))


def bits_per_gap(density: float) -> float:
    """What a gap takes on average: ``b + 1 / (1 - (1 - density)^(2^b))``."""
    b = parameter(density)
    return b + 1 / (1 - (1 - density) ** (2**b))


def entropy(density: float) -> float:
    """Bits per parameter that no code of signs at such places can go below."""
    if not 0 < density < 1:
        return density
    return -((1 - density) * math.log2(1 - density) + density * math.log2(density / 2))


def encode(pieces: Iterable[Tensor], b: int) -> tuple[Tensor, Tensor, int]:
    """(unary stream, stream of b bits and a sign, number of entries) of what is not 0 in a vector
    that comes in pieces; both streams are bytes, filled up with zeros."""
    unary, rest = _Bits(), _Bits()
    past, before, count = 0, -1, 0               # entries passed; the last one's place
    for piece in pieces:
        flat = piece.detach().cpu()
        at = flat.nonzero().squeeze(1).numpy()
        signs = (flat.numpy()[at] < 0).astype(np.uint8)
        at = at + past
        past, count = past + flat.numel(), count + len(at)
        for i in range(0, len(at), CODED):
            here = at[i:i + CODED]
            gaps = np.diff(here, prepend=before) - 1
            before = int(here[-1])
            ends = np.cumsum((gaps >> b) + 1)
            ones = np.zeros(int(ends[-1]), np.uint8)
            ones[ends - 1] = 1
            unary.put(ones)
            low = (gaps[:, None] >> np.arange(b)) & 1
            rest.put(np.concatenate([low.astype(np.uint8), signs[i:i + CODED, None]], 1).ravel())
    return unary.tensor(), rest.tensor(), count


def decode(unary: Tensor, rest: Tensor, b: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(places, signs as 1 and -1) in pieces, ascending. Raises ValueError where the streams do not
    hold `count` entries."""
    first, second = unary.numpy(), rest.numpy()
    place, bit, done = -1, -1, 0                 # of the last entry; of the last 1 in the stream
    for i in range(0, len(first), READ):
        ones = np.flatnonzero(np.unpackbits(first[i:i + READ])) + 8 * i
        if not len(ones):
            continue
        high = np.diff(ones, prepend=bit) - 1
        bit = int(ones[-1])
        start, stop = done * (b + 1), (done + len(ones)) * (b + 1)
        words = np.unpackbits(second[start // 8:-(-stop // 8)])[start % 8:]
        if len(words) < stop - start:
            break
        words = words[:stop - start].reshape(-1, b + 1).astype(np.int64)
        gaps = (high << b) + (words[:, :b] << np.arange(b)).sum(1)
        places = place + np.cumsum(gaps + 1)
        place, done = int(places[-1]), done + len(ones)
        yield torch.from_numpy(places), torch.from_numpy(1 - 2 * words[:, b])
    if done != count:
        raise ValueError(f"{done} entries of {count}")


class _Bits:
    """Bits that come in pieces, packed."""

    def __init__(self) -> None:
        self.packed: list[np.ndarray] = []
        self.left = np.empty(0, np.uint8)

    def put(self, bits: np.ndarray) -> None:
        bits = np.concatenate([self.left, bits])
        whole = len(bits) // 8 * 8
        self.packed.append(np.packbits(bits[:whole]))
        self.left = bits[whole:]

    def tensor(self) -> Tensor:
        return torch.from_numpy(np.concatenate([*self.packed, np.packbits(self.left)]))
