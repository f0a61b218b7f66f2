from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.attending import open_attentions
from ...blocks.state.scattered import Scattered
from ...blocks.update.noise import CounterNoise
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Tuned

SHORT = "sequences of the small models are shorter: tests/methods/test_scatterbrain.py"


@dataclass(frozen=True, kw_only=True)
class Scatterbrain(Method):
    """Scatterbrain: attention exact near a token and estimated, without bias, everywhere else.

    ``out_i = (sum_{j near} e^(t q_i k_j) v_j + phi(q_i) . sum_{j far} phi(k_j) v_j) / z_i``, z_i
    the same sums with v = 1, ``phi(x) = exp(+-O x sqrt(t) - t |x|^2 / 2) / sqrt(2 M)``, O (M, h)
    normal, t the scale of the attention, usually 1 / sqrt(h): ``E[phi(q) . phi(k)] = exp(t q k)``.
    Near are the `window` tokens of its own window and of those beside it; a causal attention sees
    its own and the one before, and estimates what lies before that by running sums.

    Put into a pre-trained model it is an approximation of it, exact where a sequence has two
    windows or fewer. Trains nothing. Kept for backward: what grows with tokens x (3 window + 2 M)
    per head and M h for each window, in place of tokens^2 where attention was not fused; a fused
    exact attention keeps less than this, and is what to compare with. In fp32 whatever the model
    is in. O is drawn again in every forward from `seed` and the attention's name, once for all, or
    with `redraw` anew in each update. Dropout of the attention acts on the exact part.

    Works wherever attention calls ``F.scaled_dot_product_attention`` with no mask but padding and
    order; other masks are refused. A cache, and attention to another sequence, stay exact.

    Departures: the exact part is a window, not clusters by hashing; estimates of what is near are
    never made instead of being subtracted, so no remainder can be below zero.
    """

    paper: ClassVar[str] = ("Scatterbrain: Unifying Sparse and Low-rank Attention Approximation, "
                            "NeurIPS 2021, arXiv:2110.15343")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    excused: ClassVar[dict[str, str]] = {"beside_a_partner_it_acts": SHORT}

    window: int = setting(64, "tokens of a window", unseen=SHORT)
    features: int = setting(0, "M, rows of O; 0: h ln h", alias=("nb_features",), unseen=SHORT)
    redraw: bool = setting(False, "another O in each update", unseen=SHORT)
    seed: int = setting(0, "of O", unseen=SHORT)

    def __post_init__(self) -> None:
        if self.window < 1 or self.features < 0:
            raise RecipeError(f"scatterbrain: window is at least 1 and features not negative, got "
                              f"{self.window} and {self.features}")

    def claims(self) -> tuple[str, ...]:
        return ("how attention is computed",)

    def activations(self, anatomy: Anatomy) -> Windows:
        return Windows(self, open_attentions(anatomy, self.name))

    def controller(self, tuned: Tuned) -> Redraw | None:
        return Redraw(tuned) if self.redraw else None


@dataclass(frozen=True)
class Windows:
    """These attentions are answered otherwise."""

    method: Scatterbrain
    paths: tuple[str, ...]

    def install(self, attacher: Attacher, part: Method) -> None:
        m = self.method
        for path in self.paths:
            noise = CounterNoise(m.seed, f"scatterbrain/{path}")
            Scattered(attacher.state, attacher.adapter.name, noise, m.features,
                      m.window).listen(attacher.slot(path), part.name)


class Redraw:
    """Another O in each update."""

    def __init__(self, tuned: Tuned):
        self.mine = [m for m in tuned.model.modules() if isinstance(m, Scattered)]

    def step_begin(self, step: int) -> None:
        for m in self.mine:
            m.turn = step

    def state_dict(self) -> Mapping[str, Any]:
        return {"turn": self.mine[0].turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step_begin(state["turn"])
