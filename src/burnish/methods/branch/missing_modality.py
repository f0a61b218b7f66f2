from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.state.banks import Bank
from ...blocks.state.gates import takes_shift
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.site import Branch
from ._sites import channel_axis, samples_first, scaled

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class MissingModality(Method):
    """Missing-modality modulation: a scale and a shift for every combination of inputs that lacks
    some of them.

    ``h <- gamma^m h + beta^m`` per channel behind every linear, convolution and norm, where m says
    which of the modalities a sample lacks: the batch names ``missing``, a number per sample whose
    bit i is set where modality i is missing (of three, 5 lacks the first and the third). There are
    2^modalities - 2 sets; with all there (0) the model is the pre-trained one, bit by bit, and a
    sample that lacks all of them is refused. A norm that has no shift (RMSNorm) gets the scale
    only. `targets` narrows it, say to the encoders that are left and to what joins them.

    (The paper tries a LoRA or biases per combination too; not offered.)

    What stands in for a missing input is the data's: the paper gives zeros. Biases make an encoder
    answer zeros with something, so feeding zeros and leaving the encoder out are not the same.

    Start: gamma = 1, beta = 0: the pre-trained function exactly. Trains 2 channels per site and
    set, of which a sample's own moves: ViT-B/16 205,824 per set. Kept for backward: h of every
    site. Not mergeable (it follows the sample); :meth:`lifecycle` makes one combination an ``ssf``,
    which merges. No weight decay. A model that puts tokens before samples
    (``batch_first=False``) is refused.
    """

    paper: ClassVar[str] = ("Robust Multimodal Learning with Missing Modalities via "
                            "Parameter-Efficient Adaptation (2023), arXiv:2310.03986")
    tier: ClassVar[str] = "checked against an independent equation"
    context: ClassVar[Mapping[str, Key]] = {
        "missing": Key("the modalities a sample lacks: 1, 2, 4, .. added up", below="combinations")}
    merges: ClassVar[bool] = False

    modalities: int = setting(2, "how many modalities a sample may have")

    def __post_init__(self) -> None:
        if not 2 <= self.modalities <= 16:
            raise RecipeError(f"missing_modality(modalities={self.modalities}): there is a set for "
                              "every combination; expected 2 to 16 modalities")

    @property
    def combinations(self) -> int:
        """What may be there, with all and without none: entries of the key."""
        return 2**self.modalities - 1

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        samples_first(anatomy, self)
        for path, channels, module in scaled(anatomy, self, rows=True):
            yield Branch(path, Bank("missing", self.combinations - 1, channels,
                                    shift=takes_shift(module), axis=channel_axis(module)),
                         compose="replace")

    def lifecycle(self, tuned: Any, missing: int, name: str) -> None:
        """Settle one combination: an adapter `name` beside the one in use (which must train this
        method), with an ``ssf`` for it, and use that. It reads no key, merges and trains on.
        Raises RecipeError for a combination that has no set."""
        if not 0 < missing < self.combinations:
            raise RecipeError(f"missing_modality has sets for 1 to {self.combinations - 1}, not "
                              f"{missing}; with nothing missing the model is the base")
        made = {path: m.plain(missing) for path, m in tuned.branches(Bank)}
        plain = make("ssf", {"targets": [f"{p}.weight" if p else "weight" for p in made]})
        beside(tuned, self, name, [(plain, made)])

    def count(self, channels: int, shift: bool = True) -> int:
        """Trainable parameters of one site."""
        return (self.combinations - 1) * (1 + shift) * channels
