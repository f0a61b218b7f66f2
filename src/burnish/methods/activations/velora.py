from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.tape.projected import Projected
from ...blocks.tape.sampled import Taken
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Velora(Method):
    """VeLoRA: of what a linear reads, one number for each run of channels is kept.

    A token x (D,) is cut in `groups` sub-tokens of d = ceil(D / groups) channels. Outputs, loss and
    the gradients that go down are exact; a weight's own gradient is made of

        x^_g = scale (x_g v) v^T,    v (d,) of length 1

    in place of each sub-token x_g. init="mean": v is the mean of the sub-tokens of that very input,
    divided by its length; "random": drawn once for each d by the recipe's seed. What does not lie
    along v is lost, so gradients are estimates that are off in the mean as well: the more groups,
    the nearer (groups = D keeps the input as it is).

    Kept of an input: (tokens groups + d) numbers, once for all that read it. A ReLU in front of a
    linear keeps one bit a number, exactly. What is kept for another reader, or made again from what
    is, is not projected: the lean tape makes inputs behind norms and activations so, exactly and
    for nothing. It saves where inputs stand by themselves (eager attention, ReLU, plain chains),
    and with ``lean(on=False)`` where products may not be made twice. A run in which it had no input
    to keep says so, once. `wta_crs` is right in the mean for the same bytes.

    Joins `checkpoint` (numbers live while a block is run again) and `offload` (they wait
    elsewhere). Somebody else's checkpointing keeps all; a model that is compiled runs uncompiled,
    and says so. In PEFT it is `velora_config` of a LoRA: ``lora + velora + lean(on=False)``.

    Departures: the paper's v is the mean of the first batch, fixed from then on; of the input
    itself it needs no state and is the newer reading of PEFT ("batch_average"). Every linear whose
    weight trains is read so, not chosen ones.
    """

    paper: ClassVar[str] = ("VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections "
                            "(2024), arXiv:2405.17991")
    tier: ClassVar[str] = "checked against an independent equation"
    exact: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "full + lean(on=False)"
    small: ClassVar[dict[str, int]] = {"groups": 8}

    groups: int = setting(64, "sub-tokens of an input, a number each", alias=("num_groups",),
                          other=(4,))
    scale: float = setting(1.0, "what is made again is multiplied by it")
    init: Literal["mean", "random"] = setting("mean", "the direction: of the input, or drawn")

    def __post_init__(self) -> None:
        if self.groups < 1 or not 0 < self.scale < float("inf"):
            raise RecipeError(f"velora(groups={self.groups}, scale={self.scale}): 1 group or more "
                              "and a scale above 0 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the form of kept tensors",)

    def activations(self, anatomy: Anatomy) -> Velora:
        return self

    def install(self, attacher: Any, part: Method) -> None:
        attacher.state.tape.keep(Projected(self.groups, self.scale, self.init == "random",
                                           attacher.adapter.seed))

    def controller(self, tuned: Tuned) -> Taken:
        return Taken(tuned, self.name)

    def kept_bytes(self, tokens: int, width: int, itemsize: int) -> int:
        """What is kept of an input of so many tokens."""
        return min(tokens * self.groups + -(-width // self.groups), tokens * width) * itemsize
