from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.choose.watermark import Retention, bits, least_right, read_bits
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class SleeperMark(Method):
    """SleeperMark: is a watermark that a trigger wakes still there after tuning?

        share = right bits / bits              false alarm = P(Binomial(bits, 1/2) >= right)

    The check of the paper's mark, for a model that has one already: generate under the trigger,
    decode, compare with the message, before and after::

        check = burnish.parse("sleepermark")[0]
        found = check.lifecycle(tuned, read, message)      # read(model) -> (pictures, bits) of 0, 1
        found.before.share, found.after.share, found.after.found, found.kept

    `read` generates and decodes; use the same seeds in it each time. before: the model as it is
    without the adapter, or another one by ``before=``. A picture counts as marked from the fewest
    right bits whose false alarm is at most `false_alarms`: 41 of 48. Trains nothing; the mode of
    every module is what it was.

    Planting a mark (stage 1, an encoder and a decoder of 48 bits in latents; stage 2, a backbone
    tuned so that only prompts with the trigger carry it) is not done here (unconfirmed in its
    formulas). When: you tune a marked model and have to keep its mark. When not: a mark without its
    decoder or message, which nothing can be read of.
    """

    paper: ClassVar[str] = ("SleeperMark: Towards Robust Watermark against Fine-Tuning Text-to-"
                            "image Diffusion Models (2024), arXiv:2412.04852")
    tier: ClassVar[str] = "from the text"

    false_alarms: float = setting(1e-6, "share of unmarked pictures that may count as marked")

    def __post_init__(self) -> None:
        if not 0 < self.false_alarms < 1:
            raise ConfigError("sleepermark: false_alarms is between 0 and 1, got "
                              f"{self.false_alarms:g}")

    def lifecycle(self, tuned: Any, read: Callable[[nn.Module], Tensor], message: Tensor, *,
                  before: nn.Module | None = None) -> Retention:
        """What of the message is read of the model without and with what was tuned."""
        message = bits("message", torch.as_tensor(message), 1)
        least_right(len(message), self.false_alarms)                 # refused before any picture
        plain = isinstance(tuned, nn.Module)
        if plain and before is None:
            raise ConfigError("sleepermark: of a plain model it takes the one it was tuned from, "
                              "before=, or what burnish.tune returned")
        after = tuned if plain else tuned.model
        if before is not None:
            first = self._read(before, read, message)
        else:
            with tuned.disabled():
                first = self._read(after, read, message)
        return Retention(first, self._read(after, read, message))

    def _read(self, model: nn.Module, read: Callable[[nn.Module], Tensor], message: Tensor) -> Any:
        with evaluating([m for m in model.modules() if m.training]), torch.no_grad():
            return read_bits(torch.as_tensor(read(model)), message, self.false_alarms)
