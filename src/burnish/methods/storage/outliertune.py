from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...blocks.choose.inputs import ChannelRanges
from ...blocks.weight.migrated import PerChannel, PerToken
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Place, Site

#: linears that read what a norm gives, by role
BEHIND_NORMS = ("q", "k", "v", "qkv", "kv", "fc1", "gate", "up", "gate_up")


@dataclass(frozen=True, kw_only=True)
class Outliertune(Method):
    """OutlierTune: weights and inputs in whole numbers, the inputs on a grid for each channel.

        z_c = (max_c + min_c) / 2,   s_c = max|x_c - z_c| / (2^(input_bits-1) - 1)
        x^ = clip(round((x - z) / s)),   W^ = round(W diag(s)), one scale per output
        y = x^ W^T^ + W z + b

    of linears that read what a norm gives (queries, keys, values, the first of an MLP): z and s
    (in,) from calibration data (``tune(..., calibration=batches)``). The scale of a channel moves
    into the weight before that is rounded, so the product is one of whole numbers with a scale per
    output behind it; taking off z (`centred`) keeps the s of the channels, and with them the
    weight's columns, alike. Other linears read each token on a grid around zero of its own. W of
    `bits`, x of `input_bits`: W8A8, W6A6. Channels that never move get a scale of 2^-16 of the
    largest. Exact but for the roundings, whatever z and s.

    Holds: bits per weight, a scale per output, and on calibrated linears z, s and W z's rest.
    Trains: nothing. Step 0 is the rounded model. What trains on top (a LoRA, biases) reads and adds
    real numbers; backward goes straight through the rounding and is zero where a calibrated input
    was clipped: one bit a number is kept for it. Files have z and s: a load needs no data. The head
    stays as it is. No merge: a plain module does not round what it reads.

    Departures: z and s are folded into each linear's own reading, not into the norm's weight and
    bias: the same numbers, also behind an RMSNorm without a bias, and other readers of the norm are
    not touched. Products run in the model's precision on the whole numbers' values.
    """

    paper: ClassVar[str] = ("OutlierTune: Efficient Channel-Wise Quantization for Large Language "
                            "Models (2024), arXiv:2406.18832")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    bits: int = setting(8, "of a weight, 2 to 8")
    input_bits: int = setting(8, "of what a linear reads, 2 to 8", other=(4,))
    centred: bool = setting(True, "take the middle of a channel's range off first")
    samples: int = setting(128, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        for name in ("bits", "input_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise RecipeError(f"outliertune: {name}={getattr(self, name)}: expected 2 to 8")
        if self.samples < 1:
            raise RecipeError(f"outliertune: samples={self.samples}: expected at least 1")

    def observe(self, place: Place) -> ChannelRanges | None:
        return ChannelRanges(place.inp) if place.role in BEHIND_NORMS else None

    def storage(self, site: Site) -> PerToken | None:
        if site.place.role == "head":
            return None
        if site.place.role not in BEHIND_NORMS:
            return PerToken(site.weight, site.place, self.bits, self.input_bits)
        return PerChannel(site.weight, site.place, self.bits, self.input_bits,
                          None if site.seen is None else site.seen.value, self.centred)

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
