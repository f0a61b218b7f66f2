from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.state.pattention import Pattention as Layer
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place
from ...core.targets import match
from ..mixture._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Pattention(Method):
    """Pattention adapter: beside a linear, tokens attend to a few parameters.

    ``y = W x + b + s gelu(A tau / sqrt(sum_k A_k^2)) V``, A = x K^T, K (tokens, in), V (tokens,
    out): the nonlinearity of TokenFormer, with no exponential and no 1/sqrt(d). The norm runs over
    the parameters, in fp32, and 1e-8 inside the root keeps an input of zeros finite. tau is the
    root of `tokens`, or what `size` says.

    It grows: keys of zero and any values change no answer while tau stays as it is.
    :meth:`lifecycle` makes an adapter with more tokens so.

    Start: K normal of deviation 0.02, V = 0: the pre-trained function exactly. Trains tokens (in +
    out) per matrix. Kept for backward: x; the rest is made again there. Not mergeable: it is no
    linear function of x. An adapter made of the paper's layer (the paper builds whole networks of
    it); the start of V is ours.
    """

    paper: ClassVar[str] = ("TokenFormer: Rethinking Transformer Scaling with Tokenized Model "
                            "Parameters (2024), arXiv:2410.23168")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False

    tokens: int = setting(8, "parameters that a token attends to")
    scale: float = setting(1.0, "s, what the branch is multiplied by")
    size: float | None = setting(None, "tau, of the normalised scores; None: the root of tokens",
                                 other=(1.0,))

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise RecipeError(f"pattention(tokens={self.tokens}): expected at least 1")
        if self.size is not None and not self.size > 0:
            raise RecipeError(f"pattention(size={self.size}): a norm; expected a number above 0")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        places = match(anatomy) if asked is None else asked
        for place, rows, out in linears(anatomy, self, places, anywhere=True):
            yield Branch(place.path, Layer(
                place.inp, out, self.tokens, self.norm, self.scale, rows),
                read=(place.path, "input"))

    @property
    def norm(self) -> float:
        """tau."""
        return math.sqrt(self.tokens) if self.size is None else self.size

    def lifecycle(self, tuned: Any, tokens: int, name: str) -> None:
        """Grow: an adapter `name` with so many tokens beside the one in use (which must train this
        method), and use that. It answers as the old one does. RecipeError for no more tokens."""
        if tokens <= self.tokens:
            raise RecipeError(f"pattention has {self.tokens} tokens and grows to more, not to "
                              f"{tokens}")
        made = {path: m.grown(tokens) for path, m in tuned.branches(Layer)}
        beside(tuned, self, name, [(replace(self, tokens=tokens, size=self.norm), made)])

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.tokens * (place.inp + place.out)
