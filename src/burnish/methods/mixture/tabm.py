from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.state.members import Apart, Ensemble, Shared, multipliers
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.site import Place, Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher


@dataclass(frozen=True, kw_only=True)
class TabM(Method):
    """TabM: k implicit MLPs that share their matrices, trained side by side as an ensemble.

    ``l_i(x) = s_i * W (r_i * x) + b_i``, i = 1..k, which is an MLP of ``W_i = W . s_i r_i^T``; r
    (k, in), s (k, out), b (k, out) on every linear but the last, in whose place each member has its
    own. The base is any plain torch MLP: linears in the order in which they are registered, norms
    and tables beside them. mode="mini": of these r on the first linear and the heads alone, biases
    stay shared; "packed": every linear is each member's own, nothing is shared.

    The loss is the mean of the members' losses, not the loss of their mean: in training a tensor
    that the model returns has k rows a sample (``loss(model(x), y.repeat_interleave(k))``);
    ``tuned.step``, ``tuned.loss`` and ``burnish.fit`` repeat the batch themselves, and a model that
    makes its loss is given its labels k times. Losses are means over samples. In evaluation the
    answer is the mean of the members', or of their probabilities, as logits. A member by itself is
    a plain MLP (:meth:`lifecycle`); :meth:`pruned` leaves out members that do not help.

    Start: s = 1, b the linear's bias, r of the first linear random signs and 1 elsewhere, heads
    drawn within 1 / sqrt(in): another function. init="ones", head_start="copied": the pre-trained
    function, and k members that learn the same. Trains k (in + 2 out) per linear and k out (in + 1)
    for heads; with `rest` what all share too: W, norms, tables. Kept for backward: the states, k
    times. No weight decay on r, s, b. Regression targets are to be standardised. Refused: parts
    that read each forward's outputs (distill), and whatever would train a tensor that members have
    for themselves.
    """

    paper: ClassVar[str] = ("TabM: Advancing Tabular Deep Learning with Parameter-Efficient "
                            "Ensembling, ICLR 2025, arXiv:2410.24210")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"plain mlp"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    takes_head: ClassVar[bool] = False
    #: drawn heads are as good, but a kink of so small a model's ReLU is then passed in bf16
    small: ClassVar[dict[str, Any]] = {"k": 4, "head_start": "copied"}

    k: int = setting(32, "members", other=(3,))
    mode: Literal["tabm", "mini", "packed"] = setting("tabm", "what members have for themselves")
    init: Literal["signs", "normal", "ones"] = setting("signs", "of r on the first linear")
    block: int = setting(1, "inputs of one feature, which share a draw of r", other=(4,))
    head_start: Literal["drawn", "copied"] = setting("drawn", "start of what each member has whole")
    average: Literal["outputs", "probabilities"] = setting(
        "outputs", "what the answer is the mean of: probabilities for classes")
    rest: bool = setting(True, "what members share trains too")

    def __post_init__(self) -> None:
        if self.k < 1 or self.block < 1:
            raise RecipeError(f"{self}: expected k and block of at least 1")
        if self.mode == "packed" and (self.init != "signs" or self.block != 1):
            raise RecipeError("tabm(mode='packed') has no r, so init and block do nothing")
        if self.init == "ones" and self.block != 1:
            raise RecipeError("tabm(init='ones') draws nothing, so block does nothing")

    def claims(self) -> tuple[str, ...]:
        return ("how many answers a sample has",)

    def select(self, anatomy: Anatomy) -> Iterator[Selection]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        own = self.own(anatomy)
        for name, _ in anatomy.model.named_parameters():
            if self.rest and name not in own and ".burnish." not in f".{name}":
                yield Selection(name)

    def mixture(self, anatomy: Anatomy) -> Iterable[Any]:
        return [self]

    def own(self, anatomy: Anatomy) -> set[str]:
        """Parameters of the base in whose place members have their own."""
        *hidden, last = _linears(anatomy)
        whole = [*hidden, last] if self.mode == "packed" else [last]
        biases = hidden if self.mode == "tabm" else []
        return {f"{p.path}.{leaf}" for p in whole for leaf in ("weight", "bias")} \
            | {f"{p.path}.bias" for p in biases}

    def install(self, attacher: Attacher, part: Method) -> None:
        adapter, own = attacher.adapter, self.own(attacher.anatomy)
        if lost := sorted(own & set(adapter.selected)):
            raise RecipeError(f"tabm: {lost[0]} is to train, and every member has its own in its "
                              "place; leave it to tabm (head=False)")
        if seen := [m.name for m in adapter.recipe if m.sees_run]:
            raise RecipeError(f"{seen[0]} reads one answer of each sample, and tabm gives {self.k}")
        places = _linears(attacher.anatomy)
        for n, place in enumerate(places):
            slot, module = attacher.slot(place.path), attacher.model.get_submodule(place.path)
            listener: Any = None
            if self.mode == "packed" or n == len(places) - 1:
                if slot.beside(place):
                    raise RecipeError(f"tabm: every member has its own weight in the place of "
                                      f"{place.name}; what is added there would do nothing")
                listener = Apart(attacher.state, adapter.name, self.k, module,
                                 self.head_start == "copied")
            elif self.mode == "tabm" or not n:
                listener = Shared(attacher.state, adapter.name, *self._start(place, module, n))
            if listener is not None:
                listener.to(attacher.device(place.path)).listen(slot, part.name)
        Ensemble(attacher.state, adapter.name, self.k, self.average == "probabilities").to(
            attacher.device("")).listen(attacher.slot(""), f"{part.name}_all")

    def _start(self, place: Place, module: Any, n: int) -> tuple[Any, Any, Any]:
        """r, s and b of one linear."""
        r = torch.ones(self.k, place.inp) if n else \
            multipliers(self.k, place.inp, self.init, self.block)
        if self.mode == "mini":
            return r, None, None
        b = None if module.bias is None else module.bias.detach().expand(self.k, -1).clone()
        return r, torch.ones(self.k, place.out), b

    def lifecycle(self, tuned: Any, member: int) -> dict[str, Tensor]:
        """One member as a plain MLP: the tensors of the base model's ``load_state_dict``. Raises
        RecipeError for one that is none, and where other parts add to its weights."""
        if not 0 <= member < self.k:
            raise RecipeError(f"tabm has members 0 to {self.k - 1}, not {member}")
        out = {n: t.detach().clone() for n, t in tuned.model.state_dict().items()
               if ".burnish." not in f".{n}"}
        for place in _linears(tuned.anatomy):
            slot = tuned.model.get_submodule(place.path)._modules.get("burnish")
            if slot is not None and slot.beside(place):
                raise RecipeError(f"tabm: another part adds to {place.name}, and a member alone is "
                                  "made of its weight: take tabm by itself")
            for m in slot.listeners if slot is not None else ():
                if isinstance(m, Shared | Apart) and m.adapter == tuned.training:
                    W, b = m.member(member, tuned.weight(place), out.get(f"{place.path}.bias"))
                    out[f"{place.path}.weight"] = W
                    out.update({} if b is None else {f"{place.path}.bias": b})
        return out

    def pruned(self, tuned: Any, score: Callable[[], float]) -> list[int]:
        """Leave out, one by one, members without whom the held-out score is no lower (higher is
        better); those that stay. `score` evaluates ``tuned.model`` as it stands."""
        return next(m for m in tuned.model.modules() if isinstance(m, Ensemble)
                    and m.adapter == tuned.training).prune(score)

    def count(self, place: Place, last: bool = False) -> int:
        """Trainable parameters of a linear with a bias, of the last one or of another, with what
        members share."""
        shared = place.out * (place.inp + (self.mode == "mini")) if self.rest else 0
        if last or self.mode == "packed":
            return self.k * place.out * (place.inp + 1)
        return shared + (0 if self.mode == "mini" else self.k * (place.inp + 2 * place.out))


def _linears(anatomy: Anatomy) -> list[Place]:
    """In the order in which they are registered, the last one the head."""
    found = [p for p in anatomy.places if p.kind == "linear"]
    head = [p for p in found if anatomy.in_head(p)][-1:] or found[-1:]
    return [p for p in found if p not in head] + head
