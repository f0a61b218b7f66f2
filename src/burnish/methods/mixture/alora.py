from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.weight.invoked import Invocation, Invoked
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.site import Branch, Place
from ...core.targets import match
from ..branch._sites import samples_first
from ..delta.lowrank.lora import check_dropout
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Alora(Method):
    """aLoRA: a low-rank update that counts from the tokens on that call for it.

    ``y_t = W x_t + b + s B A drop(x_t)`` for t at or behind the start of the last occurrence of
    `invocation` in ``input_ids``, ``W x_t + b`` before; A (rank, in), B (out, rank), s = alpha /
    rank. A sample that does not have the tokens is answered by the base. The text before them has
    the base's keys and values: a cache that the base has filled, for any number of such adapters,
    serves as it is. With a cache a sample that counted goes on counting, token after token; another
    begins where a later piece of text has the tokens, all of them in one piece: several that the
    model writes one by one call for nothing, as in PEFT. (A single one does, written or read.)

    invocation: token ids, ``tokenizer.encode("...", add_special_tokens=False)``; end a prompt with
    them, in training as in use.

    Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly. Trains rank (in +
    out) per matrix. Kept for backward: x; the rest is made again there. Not mergeable (it follows
    the text); a ``lora`` counts everywhere and merges. No weight decay. Goes to PEFT as LoRA with
    `alora_invocation_tokens`. Refused: models that do not write on by themselves, and
    ``inputs_embeds``. The paper takes a larger rank than LoRA's, 32: keys and values of the prompt
    are not its own.
    """

    paper: ClassVar[str] = ("Activated LoRA: Fine-tuned LLMs for Intrinsics (2025), "
                            "arXiv:2504.12397")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"writes on", "one width", "linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"rank": 4, "invocation": (57,)}

    invocation: tuple[int, ...] = setting((), "token ids that call for it",
                                          alias=("alora_invocation_tokens",), other=((52,), (46,)))
    rank: int = setting(32, "rank of the update", alias=("r",))
    alpha: float = setting(32.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("alora", self.dropout)
        if not all(type(i) is int and i >= 0 for i in self.invocation):
            raise RecipeError(f"alora: invocation={self.invocation!r:.60}: expected token ids, as "
                              "in alora(invocation=(27, 91))")

    def mixture(self, anatomy: Anatomy) -> Iterator[Any]:
        if not self.invocation:
            raise RecipeError("alora needs the token ids that call for it: "
                              "alora(invocation=(27, 91))")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        asked = wanted(anatomy, self)
        found = linears(anatomy, self, match(anatomy) if asked is None else asked, samples=True,
                        rank=self.rank)
        yield self                               # hears the text
        for place, rows, out in found:
            yield Branch(place.path, Invoked(place.inp, out, self.rank, self.alpha / self.rank,
                                             self.dropout, rows), read=(place.path, "input"))

    def install(self, attacher: Any, part: Method) -> None:
        Invocation(attacher.state, attacher.adapter.name, self.invocation).listen(
            attacher.slot(""), f"{part.name}_text")

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.inp + place.out)
