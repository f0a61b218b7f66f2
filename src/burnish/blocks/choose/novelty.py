"""How much an answer says, and how far it is from answers that were seen.

    ||Z||_* = sum of singular values of Z (L, V)            through the smaller Gram matrix, in fp64
    e = Re (S_L F_L D_L) Z (D_V F_V S_V)                    (r1, r2), a two-sided sketch

D a random sign for each row or column, F the Fourier transform and S some of its frequencies. The
signs make ``E ||e||^2 = ||Z||_F^2`` with the scale here, ``sqrt(2 / (r1 r2))``, and so distances of
sketches those of answers. Frequencies over L are those of `PERIOD` rows: rows behind it fold onto
the first with signs of their own, so that answers of any length have sketches to compare. Nothing
of the size of V^2 exists, and of Z one run of columns at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: columns that are taken at once
STRIP = 4096
#: rows of which the frequencies over L are those
PERIOD = 512


def nuclear(z: Tensor) -> Tensor:
    """The sum of the singular values of z (L, V), in fp64."""
    z = z if z.shape[0] <= z.shape[1] else z.t()
    gram = z.new_zeros(z.shape[0], z.shape[0], dtype=torch.float64)
    for part in z.split(STRIP, 1):
        wide = part.double()
        gram.addmm_(wide, wide.t())
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()


class Sketch:
    """rows, columns: r1 and r2, frequencies over L and over V.  seed: of signs and frequencies."""

    def __init__(self, rows: int, columns: int, seed: int):
        self.rows, self.columns, self.seed = rows, columns, seed

    @property
    def size(self) -> int:
        """Numbers of a sketch."""
        return self.rows * self.columns

    def of(self, z: Tensor) -> Tensor:
        """(size,), of z (L, V); fp32."""
        length, width = z.shape
        draw = torch.Generator().manual_seed(self.seed)
        over_l = torch.randint(PERIOD, (self.rows,), generator=draw)
        signs_l = torch.cat([_signs(PERIOD, draw) for _ in range(0, length, PERIOD)])[:length]
        draw.manual_seed(self.seed + 1)
        over_v = torch.randint(width, (self.columns,), generator=draw)
        signs_v = _signs(width, draw)
        real, imaginary = (z.new_zeros(length, self.columns, dtype=torch.float32) for _ in "ri")
        for start in range(0, width, STRIP):
            some = slice(start, min(start + STRIP, width))
            cos, sin = _waves(some, over_v, width, signs_v[some].to(z.device))
            part = z[:, some].float()
            real.addmm_(part, cos)
            imaginary.addmm_(part, sin)
        cos, sin = _waves(slice(0, length), over_l, PERIOD, signs_l.to(z.device))
        return (cos.t() @ real - sin.t() @ imaginary).flatten() * math.sqrt(2 / self.size)


def _signs(n: int, draw: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=draw).float() * 2 - 1


def _waves(at: slice, over: Tensor, period: int, signs: Tensor) -> tuple[Tensor, Tensor]:
    """(n, frequencies) cosines and sines of these places, each row with its sign."""
    places = torch.arange(at.start, at.stop, device=signs.device)
    turns = places.unsqueeze(1) * over.to(signs.device) % period       # whole numbers: no rounding
    angle = turns.double() * (2 * math.pi / period)
    return angle.cos().float() * signs.unsqueeze(1), angle.sin().float() * signs.unsqueeze(1)


def looked_at(logits: Tensor, counts: Tensor | None, sketch: Sketch) -> tuple[Tensor, Tensor]:
    """(n,) nuclear norms and (n, size) sketches of logits (n, L, V) or (n, V), sample by sample.
    counts: mask (n, L) of the rows that count."""
    sizes, sketches = [], []
    for i, z in enumerate(logits):
        z = z.unsqueeze(0) if z.dim() == 1 else z
        if counts is not None:
            z = z.masked_fill(~counts[i].to(z.device).unsqueeze(-1), 0)
        sizes.append(nuclear(z))
        sketches.append(sketch.of(z))
    return torch.stack(sizes), torch.stack(sketches)


class Recent:
    """The last `room` vectors that were put in, and how far others are from them on average."""

    def __init__(self, room: int):
        self.room, self.put = room, 0
        self.held: Tensor | None = None

    def __len__(self) -> int:
        return min(self.put, self.room)

    def far(self, e: Tensor) -> Tensor:
        """(n,) mean Euclidean distance of each row of e (n, d) to what is held; 0 to nothing."""
        if self.held is None or not len(self):
            return e.new_zeros(len(e))
        return torch.cdist(e, self.held[:len(self)].to(e.device),
                           compute_mode="donot_use_mm_for_euclid_dist").mean(1)

    def add(self, e: Tensor) -> None:
        """Hold the rows of e, in place of the oldest."""
        if self.held is None:
            self.held = e.new_zeros(self.room, e.shape[1])
        self.held = self.held.to(e.device)
        for row in e:
            self.held[self.put % self.room] = row
            self.put += 1

    def state(self) -> dict[str, object]:
        """Plain values and a tensor."""
        return {"held": None if self.held is None else self.held[:len(self)].clone(),
                "put": self.put}

    def load(self, state: dict[str, object]) -> None:
        held = state["held"]
        self.put, self.held = int(state["put"]), None          # type: ignore[call-overload]
        if isinstance(held, Tensor):
            self.held = held.new_zeros(self.room, held.shape[1])
            self.held[:len(held)] = held
