from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.instance import Instance, Parted
from ...blocks.state.queries import Columns
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import head_linear, refuse, unmet
from ..branch._sites import samples_first
from ..side._beside import frozen, width
from ._stacks import states_as_they_were
from .vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Idpt(Method):
    """IDPT: before the last block a prompt of one token, which a sample's own tokens make.

    Of the tokens Y (G, d) that the blocks below have made, three layers of

        x_i <- max_{j near i} leaky(BN(W_l [x_j - x_i; x_i]))

    (near: the `neighbours` nearest by x, found again in each), then ``p = max_i leaky(BN(W [x^1_i;
    x^2_i; x^3_i]))``, whatever the order of the tokens. The last block reads ``[cls; p + e; Y]``, e
    (d,) a place of its own, and the head ``[cls; p; max Y]`` of what the last norm returns: it has
    further columns, ``y = head(cls) + V [p; max Y]``, V (classes, 2 d).

    Start: W_l, W as linears start, e N(0, 0.02^2), V = 0; never the pre-trained function, since p
    takes a share of the last attention. Trains 3 (2 d^2 + 2 d) + 3 d^2 + 2 d (1,330,176 at the
    paper's d = 384), d, and 2 d classes. Kept for backward: of the blocks below nothing, which run
    without a graph; of the last what a frozen block keeps; G neighbours d numbers a few times for
    each layer. Not mergeable.

    For tokens without a mask or positions to turn by: of points, of patches. What trains below the
    last block is refused, and tokens before samples. Departures: the columns are of one linear head
    (the authors' has three layers), and begin at zero.
    """

    paper: ClassVar[str] = ("Instance-aware Dynamic Prompt Tuning for Pre-trained Point Cloud "
                            "Models (2023), arXiv:2304.07221")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "states", "linear head"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"neighbours": 4}
    excused: ClassVar[dict[str, str]] = {
        "bf16_is_near_fp32 on timm_qkv": "rounding decides which tokens are nearest there; "
                                         "tests/methods/test_idpt.py takes all of them",
        "bf16_is_near_fp32 on points": "tokens that are nearly alike there: a batch norm magnifies "
                                       "their rounding"}

    neighbours: int = setting(20, "nearest tokens that one looks at")
    after: int | None = setting(None, "tokens before them; None counts class, distillation and "
                                      "register tokens", other=(0,))

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise RecipeError(f"idpt(neighbours={self.neighbours}): expected at least one")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def prompt(self, anatomy: Anatomy) -> Idpt:
        if self.targets is not None:
            raise RecipeError("idpt takes no targets: it stands before the last block")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        ((stack, blocks),) = anatomy.stacks().items()
        d, last = width(anatomy, part, [blocks]), blocks[-1].path
        end = anatomy.final_norms.get(stack) or last
        frozen(attacher, part, tuple(f"{p}." for p in (last, end, *anatomy.head)))
        after = special_tokens(attacher.model, stack) if self.after is None else self.after
        Instance(state, name, d, self.neighbours, after).to(attacher.device(last)).listen(
            attacher.slot(last), part.name)
        states_as_they_were(attacher, part, stack, 1, after)
        Parted(state, name, after).listen(attacher.slot(end), f"{part.name}_end")
        head: Any = head_linear(anatomy)
        Columns(state, name, 2 * d, head.out).to(attacher.device(head.path)).listen(
            attacher.slot(head.path), f"{part.name}_head")

    def count(self, d: int, classes: int) -> int:
        """Trainable parameters at width d, the model's own head left out."""
        return 9 * d * d + 8 * d + d + 2 * d * classes
