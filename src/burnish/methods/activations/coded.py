from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.tape.coded import Coded as Policy
from ...blocks.tape.coded import Steps
from ...blocks.tape.running import Sites
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Coded(Method):
    """Coded activations: what backward keeps, in a few bits chosen by what backward does with it.

    Outputs and loss are exact. Per number that is kept, of 8 b bits in full:

    * inputs of linears and convolutions, factors of products: `bits`. In groups of `group` values
      with least value z and step s, ``q = floor((x - z) / s + u)``, u uniform in [0, 1), and
      ``x^ = z + s q``. E[x^] = x and the gradient is linear in x^, so it is right in the mean.
      With `mean_bits` a group has 1, 2 or 4 bits, so many in the mean over a tensor and as
      ``sum r^2 / (2^b - 1)^2`` over its groups of range r is least; 8 bits a group say which;
    * LayerNorm, RMSNorm: ``x^ = (x - mean) / std`` in `norm_bits` the same way, 1 / std exactly;
      linears behind it read ``x^ w + b`` and keep nothing. Its own dx holds x^ twice, which leaves
      a bias below s^2 / (4 D) of dx;
    * GELU, SiLU: the number of one of 2^derivative_bits intervals of the derivative, whose levels
      minimise the integral of (f' - level)^2 (GELU in 4 bits: at most 0.07 off): the one part that
      is off in the mean too. ReLU: one bit, exact. Dropout: a generator state, exact.

    * softmax, with softmax_bits: probabilities on levels from 0 to the row's largest, rounded the
      same way, and a gradient that is right in the mean though it holds them twice (attention that
      is written out; a fused one keeps none).

    Each range costs 64 / group bits more. With `running` none does (Mesa): a run of `group`
    channels has one range for all tokens, ``lo <- d lo + (1 - d) min`` and hi so with max, once a
    step, beginning at those of the first; values are cut to it, which is off in the mean. It
    belongs to a block and the how-manieth tensor that this keeps, and goes into a run's
    checkpoints. Probabilities have their row's range all the same.

    Weights are never coded; what has another role (fused attention, losses) is kept as it is, and
    what is kept as it is anyway is not coded again.
    A pre-norm block with LoRA on all linears keeps 5.5 hidden-size units in fp32 and 7 in bf16
    where the lean tape keeps 10. 0 bits leave a role as the tape keeps it.

    Rounding draws from a generator of its own, seeded by the recipe's seed and the step, so masks
    of dropout are those of a run without it. It joins the lean tape, `checkpoint` (codes live while
    a block is run again) and `offload` (codes wait elsewhere). Inside somebody else's checkpointing
    nothing is coded; a model that is compiled runs uncompiled, and says so.

    Departures: the tables come from dynamic programming (the shipped ones of Few-Bit are not
    optimal); bits are allocated within each tensor, over its samples and tokens, and all layers
    have the same mean, so what is kept does not depend on the data (ActNN weighs samples and layers
    by gradients of steps before too); Mesa's ranges are of the normed state in a norm, of runs of
    channels and not of heads, and rounded into at random.
    """

    paper: ClassVar[str] = ("Few-Bit Backward (2022), arXiv:2202.00441; ActNN (2021), "
                            "arXiv:2104.14129; Mesa (2021), arXiv:2111.11124")
    tier: ClassVar[str] = "checked against an independent equation"
    exact: ClassVar[bool] = False

    bits: Literal[0, 1, 2, 4, 8] = setting(4, "bits of linear inputs")
    norm_bits: Literal[0, 2, 4, 8] = setting(8, "bits of the normed state in a norm")
    derivative_bits: Literal[0, 1, 2, 4] = setting(4, "bits of the derivative of GELU and SiLU")
    softmax_bits: Literal[0, 2, 4, 8] = setting(
        0, "bits of probabilities in a softmax", unseen="attention is fused in the suite's models: "
                                                       "tests/methods/test_coded.py")
    mean_bits: float = setting(0.0, "bits of linear inputs in the mean, more of them for groups of "
                                    "a wide range; 0: `bits` each", other=(2.5,))
    group: Literal[64, 128, 256, 512, 1024] = setting(256, "values that share a range")
    running: float = setting(0.0, "how slowly ranges move that steps share, one for `group` "
                                  "channels of all tokens; 0: each group has its own", other=(0.9,))

    def __post_init__(self) -> None:
        if self.mean_bits and not 1 < self.mean_bits < 4:
            raise RecipeError(f"coded(mean_bits={self.mean_bits}): a group has 1, 2 or 4 bits, so "
                              "expected a mean between 1 and 4, or 0 for the same `bits` each")
        if self.mean_bits and self.bits != Coded.bits:
            raise RecipeError(f"coded(bits={self.bits}, mean_bits={self.mean_bits}): both say how "
                              "many bits linear inputs have; leave one out")
        if self.softmax_bits and not self.bits:
            raise RecipeError("coded(bits=0): the product behind a softmax keeps its probabilities "
                              "as they are, so that a code of them saves nothing; take bits=4, or "
                              "softmax_bits=0")
        if not 0 <= self.running < 1:
            raise RecipeError(f"coded(running={self.running}): a share of the range before that "
                              "stays, so expected 0 or more and less than 1 (0.9)")
        if self.running and self.mean_bits:
            raise RecipeError(f"coded(mean_bits={self.mean_bits}, running={self.running}): bits go "
                              "by a group's own range, and running ranges are shared; leave one "
                              "out")

    def claims(self) -> tuple[str, ...]:
        return ("the form of kept tensors",)

    def activations(self, anatomy: Anatomy) -> CodedSwitch:
        return CodedSwitch(self, ("", *(b.path for b in anatomy.blocks)))

    def controller(self, tuned: Tuned) -> Steps:
        return Steps(tuned)


@dataclass(frozen=True)
class CodedSwitch:
    method: Coded
    runs: tuple[str, ...]                            # the model, and its blocks

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        attacher.state.tape.keep(Policy(m.bits, m.norm_bits, m.derivative_bits, m.group,
                                        attacher.adapter.seed, m.softmax_bits, m.mean_bits,
                                        m.running))
        for path in self.runs if m.running else ():
            Sites(attacher.state, attacher.adapter.name, path).listen(attacher.slot(path), m.name)
