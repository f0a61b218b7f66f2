from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...blocks.weight.arrows import Arrows
from ...blocks.weight.factor import Chain
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place
from ...core.targets import match
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: of one linear: A (rank, in), B (out, rank) and the scale
Update = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, kw_only=True)
class Arrow(Method):
    """Arrow: every token is answered by the LoRAs that read its direction most.

    ``y = W x + b + sum_n w_n s_n B_n A_n x``, w the softmax of the `k` largest of ``|v_n . x| /
    temperature``, 0 elsewhere; v_n the leading right singular vector of B_n A_n. Nothing of the
    routing is trained, so a library of adapters answers a new task as it is.

    :meth:`lifecycle` makes it of adapters of plain ``lora`` that are there, loaded one by one with
    ``load_peft(tuned, folder, name)`` or trained here; with `general` ones what these have in
    common, the mean of their A and of their B, is taken off every expert first (GenKnowSub). Until
    then, and in a recipe of its own, the directions v are drawn at random and stay.

    Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly; after lifecycle what
    it was made of. Trains experts rank (in + out) per matrix (the paper goes on training none).
    Kept for backward: x; the rest is made again there. Not mergeable: it follows the token. No
    weight decay. PEFT finds v by 15 steps of a power iteration, here it is exact.
    """

    paper: ClassVar[str] = ("Towards Modular LLMs by Building and Reusing a Library of LoRAs "
                            "(2024), arXiv:2405.11157; GenKnowSub (2025), ACL short 54")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"rank": 4, "experts": 4, "k": 2}
    excused: ClassVar[dict[str, str]] = {
        "bf16_is_near_fp32": "by chance: where two experts fit a token alike, rounding "
                             "decides; tests/methods/test_arrow.py has it for the same choice"}

    rank: int = setting(8, "of every expert", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    experts: int = setting(4, "adapters that tokens choose among", other=(3,))
    k: int = setting(3, "experts of a token", alias=("top_k",))
    temperature: float = setting(1.0, "of the softmax", alias=("router_temperature",))

    def __post_init__(self) -> None:
        if min(self.rank, self.k) < 1 or self.k > self.experts or self.temperature <= 0:
            raise RecipeError(f"arrow(rank={self.rank}, experts={self.experts}, k={self.k}, "
                              f"temperature={self.temperature:g}): expected a rank of 1 or more, k "
                              "from 1 to experts, and a temperature above 0")

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        asked = wanted(anatomy, self)
        for place, rows, out in linears(anatomy, self, match(anatomy) if asked is None else asked,
                                        anywhere=True, rank=self.rank):
            yield Branch(place.path, Arrows(
                place.inp, out, self.experts, self.rank, self.k, self.temperature,
                self.alpha / self.rank, rows), read=(place.path, "input"))

    def lifecycle(self, tuned: Any, name: str, sources: Sequence[str],
                  general: Sequence[str] = ()) -> None:
        """Add an adapter `name` that routes among the adapters `sources`, and use it; they stay.
        `experts`, `rank` and `targets` follow them, `k` is at most their number. Raises RecipeError
        for adapters that are anything but plain ``lora`` on the same whole linears, and for
        `general` ones of other ranks than the sources."""
        if not sources:
            raise RecipeError("arrow routes among adapters: name at least one of sources")
        found = [_updates(tuned, s) for s in (*sources, *general)]
        if odd := next((s for s, f in zip((*sources, *general), found, strict=True)
                        if f.keys() != found[0].keys()), None):
            raise RecipeError(f"arrow: {odd!r} updates other linears than {sources[0]!r}")
        made = {path: _without([f[path] for f in found], len(sources), path) for path in found[0]}
        rank = max(len(A) for ups in made.values() for A, _, _ in ups)
        part = replace(self, experts=len(sources), k=min(self.k, len(sources)), rank=rank,
                       alpha=float(rank), targets=list(made))
        tuned.add(name, part)
        try:
            for path, m in tuned.branches(Arrows, name):
                m.take(made[path])
            tuned.use(name)
        except BaseException:
            tuned.remove(name)
            raise

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.experts * self.rank * (place.inp + place.out)


def _updates(tuned: Any, source: str) -> Mapping[str, Update]:
    """path -> its update, of an adapter that is nothing but low-rank ones of whole linears."""
    tuned.adapters.known(source)
    adapter, chains = tuned.adapters[source], list(tuned.terms(Chain, source))
    kinds = {p.name: p.kind for p in tuned.anatomy.places}
    if adapter.selected or len(adapter.parts) != len(chains) or not chains or any(
            type(c) is not Chain or kinds.get(n) not in ("linear", "conv1d") for n, c in chains):
        raise RecipeError(f"arrow routes among plain updates of linears, and {source!r} is, or has "
                          "beside them, something else: expected a lora whose head stays")
    return {n.removesuffix(".weight"): (c.A.detach(), c.B.detach(), c.scale) for n, c in chains}


def _without(updates: list[Update], experts: int, path: str) -> list[Update]:
    """The first of them, without the mean factors of the others."""
    own, general = updates[:experts], updates[experts:]
    if not general:
        return own
    if len({A.shape for A, _, _ in updates}) > 1:
        raise RecipeError(f"arrow: general adapters are taken off factor by factor, and those of "
                          f"{path} have several ranks")
    A0, B0 = (sum(u[i] for u in general) / len(general) for i in (0, 1))
    return [(A - A0, B - B0, s) for A, B, s in own]
