"""How a server makes one thing of what its clients have trained.

A rule says what a client sends, what the server makes of it, and what becomes of that at every
client. Weights p_k of those who answered add up to 1.

    Mean    phi = sum_k p_k phi_k, tensor by tensor                        (FedAvg, FedPEFT)
    Stack   W += sum_k p_k s_k B_k A_k, exactly, whatever the ranks        (FLoRA)

``B A`` is no mean of factors: (sum p_k B_k)(sum p_k A_k) has cross terms. It is where A is one for
all (``lora(train_a=False)``), which the mean then gives exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..blocks.state.parted import averaged
from ..blocks.weight.factor_algebra import Factors, cat, inner, truncate
from ..core.errors import ConfigError, FormatError, nearest
from ..engine.updates import Added, updates
from ..formats.combined import add_to, besides
from .message import Content

if TYPE_CHECKING:
    from ..engine.tuned import Tuned

A, B = "::A", "::B"


class Rule(Protocol):
    """merges: what the server sends goes into every client's base, once, and an adapter begins
    anew each round; otherwise it is the adapter that all go on from."""

    name: ClassVar[str]
    merges: ClassVar[bool]

    def says(self, tuned: Tuned) -> Content:
        """What a client sends. ConfigError where the recipe does something this rule cannot sum."""

    def put(self, tuned: Tuned, content: Content) -> None:
        """A client begins a round."""

    def gather(self, said: Sequence[Content], samples: Sequence[int],
               base: Callable[[str], Tensor]) -> Content:
        """What is sent to all. base: the value of a parameter of the base."""

    def land(self, model: nn.Module, content: Content, places: Mapping[str, Any]) -> None:
        """Put what was sent into a base."""


@dataclass
class Mean:
    """FedAvg of what trains (FedPEFT): ``phi = sum_k n_k / n phi_k``, in fp64, cast once.

    Every client has the same tensors. Bytes of a client's round, each way: |phi|.

    (Exploring Parameter-Efficient Fine-Tuning to Enable Foundation Models in Federated Learning,
    2022, arXiv:2210.01708.)
    """

    name: ClassVar[str] = "mean"
    merges: ClassVar[bool] = False

    def says(self, tuned: Tuned) -> Content:
        return {n: p.detach().clone() for n, p in tuned.named_parameters()}

    @torch.no_grad()
    def put(self, tuned: Tuned, content: Content) -> None:
        mine = dict(tuned.named_parameters())
        if odd := sorted(mine.keys() ^ content.keys()):
            raise FormatError(f"the server and this client do not train the same: {odd[0]} is on "
                              "one side only")
        for name, p in mine.items():
            p.copy_(content[name])

    def gather(self, said: Sequence[Content], samples: Sequence[int],
               base: Callable[[str], Tensor]) -> Content:
        return averaged(said, samples)

    def land(self, model: nn.Module, content: Content, places: Mapping[str, Any]) -> None:
        pass


@dataclass
class Stack:
    """FLoRA: the weighted sum of the clients' updates, exact by stacking factors of any rank.

        A = vstack_k(p_k s_k A_k) (R, in), B = hstack_k(B_k) (out, R), R = sum r_k;  W <- W + B A

    Every round the clients begin a fresh adapter (A random, B zero) on the base with all sums in
    it. Where clients tune different matrices, one that leaves a matrix alone changes it by nothing,
    with its weight (FedPipe). What trains whole (heads, biases): ``w + sum_k p_k (w_k - w)``.

    rank: send the best approximation of that rank instead of the stack (download R -> rank);
    `errors` has ``|Delta - B A| / |Delta|`` over all matrices, of each round.

    Recipes: whatever is a product of factors on matrices (lora and its kin), beside parameters of
    the base. A base held in few bits is made of the summed base anew each round.

    (FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
    2024, arXiv:2409.05976.)
    """

    rank: int | None = None
    errors: list[float] = field(default_factory=list, repr=False)

    name: ClassVar[str] = "stack"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"stack: rank={self.rank}: expected at least 1, or None for the "
                              "whole stack")

    def says(self, tuned: Tuned) -> Content:
        if (odd := besides(tuned)) is not None:
            raise ConfigError(f"{tuned.recipe} trains {odd}, which is no part of any weight, so "
                              "there is nothing to stack; take the rule mean")
        out: Content = {}
        for update in updates(tuned):
            if not isinstance(update, Added):
                continue
            pair = update.pair()
            if pair is None:
                raise ConfigError(f"{tuned.recipe} changes {update.name} by no product of two "
                                  "factors, so there is nothing to stack; take lora, or the rule "
                                  "mean")
            if _shared(tuned.model, update.place):
                raise ConfigError(f"{update.name} is one parameter under several names, and a sum "
                                  "of updates of the one would change the other; leave it out of "
                                  "the targets")
            out |= {update.name + A: pair[0].detach().clone(),
                    update.name + B: pair[1].detach().clone()}
        return out | {n: p.detach().clone() for n, p in tuned.active.selected.items()}

    def put(self, tuned: Tuned, content: Content) -> None:
        pass                                         # it is in the base; the adapter is fresh

    def gather(self, said: Sequence[Content], samples: Sequence[int],
               base: Callable[[str], Tensor]) -> Content:
        n, out, lost, total = sum(samples), dict[str, Tensor](), 0.0, 0.0
        for name in dict.fromkeys(k for one in said for k in one):
            have = [(k / n, one) for k, one in zip(samples, said, strict=True) if name in one]
            like = have[0][1][name]
            if name.endswith(B):
                continue
            if not name.endswith(A):
                changed = sum((p * one[name].double() for p, one in have),
                              start=torch.zeros_like(like, dtype=torch.float64))
                if len(have) < len(said):            # of those who left it alone
                    rest = sum(k for k, one in zip(samples, said, strict=True) if name not in one)
                    changed += rest / n * base(name).detach().cpu().double()
                out[name] = changed.to(like.dtype)
                continue
            place = name.removesuffix(A)
            whole = cat([Factors(one[name].double(), one[place + B].double()) for _, one in have],
                        [p for p, _ in have])
            made = whole
            if self.rank is not None and self.rank < whole.rank:
                made = truncate(whole, self.rank)
                size = float(inner(whole, whole))
                lost, total = lost + max(0.0, size - float(inner(made, made))), total + size
            elif self.rank is not None:
                total += float(inner(whole, whole))
            out |= {name: made.A.to(like.dtype), place + B: made.B.to(like.dtype)}
        if self.rank is not None:
            self.errors.append((lost / max(total, 1e-300)) ** 0.5)
        return out

    @torch.no_grad()
    def land(self, model: nn.Module, content: Content, places: Mapping[str, Any]) -> None:
        for name, t in content.items():
            if name.endswith(A):
                place = name.removesuffix(A)
                change = content[place + B].cpu().double() @ t.cpu().double()
                add_to(model, place, places[place], change)
            elif not name.endswith(B):
                p = model.get_parameter(name)
                p.copy_(t.to(p.dtype))


def _shared(model: nn.Module, place: Any) -> bool:
    stored = place.stored(model.get_submodule(place.path))
    return sum(p is stored for _, p in model.named_parameters(remove_duplicate=False)) > 1


RULES: dict[str, type] = {"mean": Mean, "stack": Stack}


def rule_of(rule: str | Rule) -> Rule:
    """A rule by its name, with its defaults, or the object itself."""
    if not isinstance(rule, str):
        return rule
    if rule not in RULES:
        raise ConfigError(f"no rule {rule!r}{nearest(rule, RULES)}; there are {', '.join(RULES)}")
    return RULES[rule]()
