"""What tasks have in common that learn directions: those of one kind close to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.supervised import beside
from ...core.errors import ConfigError, nearest
from .base import Task

#: what a cosine is multiplied by where nobody says: of supcon 1 / 0.1, its temperature
SCALES = {"ranking": 20.0, "supcon": 10.0}
#: of triplets, in squares of distances
MARGIN = 0.2
#: cosines that are held at once, and the part of one below which two of them are equal
AT_ONCE, EQUAL = 2**23, 1e-6
#: among how many of the nearest one of the class is looked for
NEAREST = (1, 2, 4, 8)


class Directions(Task):
    """A loss of a whole batch, by `loss_type`, and answers that are numbers or a cosine."""

    smooths = False
    own_loss = True
    alone = False
    #: values of `loss_type`, the one that is meant where nobody says first
    losses_known: ClassVar[tuple[str, ...]] = ()

    def prepare(self) -> None:
        super().prepare()
        known = self.losses_known
        if self.kind not in known:
            raise ConfigError(f"loss_type={self.kind!r} is not one of {', '.join(known)}"
                              f"{nearest(str(self.kind), known)}")
        scaled = tuple(k for k in SCALES if k in known)
        for name, of in (("scale", scaled), ("gamma", ("triplet",)), ("loss_type", (self.kind,))):
            why = self.unread()
            if name in self.how and (why or self.kind not in of):
                raise ConfigError(f"{name}={self.how[name]!r} does nothing: " + (
                    why or f"it is of loss_type={' or '.join(map(repr, of))}, and this is "
                           f"{self.kind!r}"))
        for name in ("scale", "gamma"):
            value = self.how.get(name, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name}={value!r}: expected a number above 0")

    def unread(self) -> str:
        """Why no setting of the loss says anything; nothing: they do."""
        return ""

    @property
    def kind(self) -> str:
        return self.how.get("loss_type", self.losses_known[0])

    @property
    def scale(self) -> float:
        return float(self.how.get("scale", SCALES.get(self.kind, 1.0)))

    @property
    def margin(self) -> float:
        return float(self.how.get("gamma", MARGIN))

    def told_of(self, e: Tensor) -> dict[str, Any]:
        """What is answered of one direction, or of two."""
        if len(e) > 1:
            return {"cosine": float(e[0] @ e[1])}
        return {"embedding": e[0].tolist()}

    def said(self, answer: Mapping[str, Any]) -> str:
        if "cosine" in answer:
            return f"{answer['cosine']:.4f}"
        first = ", ".join(f"{x:.4f}" for x in answer["embedding"][:4])
        return f"[{first}, ...] ({len(answer['embedding'])} numbers)"


def pieces(count: int) -> Iterator[slice]:
    """All rows, in stretches of which each is compared with all at once."""
    step = max(1, AT_ONCE // max(count, 1))
    yield from (slice(k, k + step) for k in range(0, count, step))


def retrieval(e_ND: Tensor, classes_N: Tensor, among: tuple[int, ...] = NEAREST
              ) -> dict[str, float]:
    """Each row looked for among all others, where another is of its class.

    ``recall_at_k``: how often one of its class is among the k nearest. ``map_at_r``: with R others
    of its class, ``1/R sum_{i <= R} [the i-th nearest is of its class] P(i)``, P(i) the share of
    the i nearest that are (Musgrave et al., 2020), and the mean of that. Cosines within a millionth
    are equal, and of equal ones strangers come first: one direction for all finds nothing.
    """
    first, precise = [], []
    for rows in pieces(len(e_ND)):
        cos, own, near = beside(e_ND, classes_N, rows)
        grid = cos.double().div(EQUAL).round().nan_to_num(-3 / EQUAL, posinf=0, neginf=-3 / EQUAL)
        order = (2 * grid - near.double()).masked_fill(own, float("-inf"))
        many = near.sum(-1)
        most = min(max(*among, int(many.max())), len(e_ND) - 1)
        hit = near.gather(1, order.topk(most, -1).indices)[many > 0]
        R = many[many > 0].unsqueeze(1)
        place = torch.arange(1, most + 1, device=hit.device)
        first.append(torch.where(hit.any(-1), hit.to(torch.uint8).argmax(-1) + 1, most + 1))
        share = hit.cumsum(-1).double() / place
        precise.append((share * (hit & (place <= R))).sum(-1) / R[:, 0])
    rank, found = torch.cat(first), torch.cat(precise)
    if not len(rank):
        return {**{f"recall_at_{k}": 0.0 for k in among}, "map_at_r": 0.0}
    return {**{f"recall_at_{k}": float((rank <= k).double().mean()) for k in among},
            "map_at_r": float(found.mean())}
