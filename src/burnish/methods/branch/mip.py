from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.state.hyper import KEY, HyperChain, Trunk
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.site import Branch, Place
from ...core.targets import match
from ..mixture._linears import linears
from ._sites import samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Mip(Method):
    """MIP: a hypernetwork makes every linear's update of a few numbers of the sample, and its
    answers do not grow with them.

    ``y = W x + b + s B A x``, A = A_0 + W_A e (rank, in), B = B_0 + W_B e (out, rank),
    e = leaky(W_2 leaky(W_1 E + b_1) + b_2), E = [cos(pi g / 2), sin(pi g / 2)]: a constant length
    for every g. The batch names ``gamma``, `inputs` numbers from 0 to 1 per sample (bring others
    to that range once for the data set). W_1 (hidden, 2 inputs) and W_2 (code, hidden) stand once
    for the whole model, the rest at every linear.

    Departures: low-rank factors are generated and not whole weights, whose output layers would be
    `code` times the model. Widths of 16 are ours (the authors' unconfirmed).

    Start: A_0 uniform in +-1/sqrt(in), W_A, W_1, W_2 Kaiming-normal by fan_out, B_0 = W_B = 0
    (ours): the pre-trained function exactly, for every g. Trains (code + 1) rank (in + out) per
    matrix and (2 inputs + 1) hidden + (hidden + 1) code. Kept for backward: x; the factors are
    generated again there. Not mergeable (it follows the sample); :meth:`lifecycle` makes one gamma
    a ``lora``, which merges. No weight decay on A_0 and B_0.
    """

    paper: ClassVar[str] = ("Magnitude Invariant Parametrizations Improve Hypernetwork Learning "
                            "(2023), arXiv:2304.07645")
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    context: ClassVar[Mapping[str, Key]] = {
        KEY: Key("what each sample's update is made of", real=True)}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"hidden": 5, "code": 6}

    inputs: int = setting(1, "numbers in gamma", other=(2,))
    rank: int = setting(4, "rank of every update", alias=("r",))
    scale: float = setting(1.0, "s, what the update is multiplied by")
    hidden: int = setting(16, "width inside the network")
    code: int = setting(16, "width of e, which all factors are generated from")

    def __post_init__(self) -> None:
        if min(self.inputs, self.hidden, self.code) < 1:
            raise RecipeError(f"{self}: expected inputs, hidden and code of at least 1")

    def keys(self) -> Mapping[str, Key]:
        if self.inputs == 1:
            return self.context
        return {KEY: Key(self.context[KEY].meaning, real=True, shape=(self.inputs,))}

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        samples_first(anatomy, self)
        asked = wanted(anatomy, self)
        trunk = Trunk(self.inputs, self.hidden, self.code)
        places = match(anatomy) if asked is None else asked
        for n, (place, rows, out) in enumerate(linears(anatomy, self, places, anywhere=True,
                                                       samples=True, rank=self.rank)):
            made = HyperChain(trunk, place.inp, out, self.rank, scale=self.scale, rows=rows,
                              owns=n == 0)
            yield Branch(place.path, made, read=(place.path, "input"))

    def lifecycle(self, tuned: Any, gamma: float | Sequence[float], name: str) -> None:
        """Settle one gamma: an adapter `name` beside the one in use (which must train this method),
        with a ``lora`` for it, and use that. It reads no key, merges and trains on. Raises
        RecipeError for numbers that are no gamma."""
        g = tuple(gamma) if isinstance(gamma, Sequence) else (gamma,)
        if len(g) != self.inputs or not all(0 <= x <= 1 for x in g):
            raise RecipeError(f"mip reads {self.inputs} numbers from 0 to 1, not {gamma}")
        made = {path: m.plain(g) for path, m in tuned.branches(HyperChain)}
        plain = make("lora", {"rank": self.rank, "alpha": float(self.rank), "targets": list(made)})
        beside(tuned, self, name, [(plain, made)])

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix; the network stands once."""
        return (self.code + 1) * self.rank * (place.inp + place.out)
