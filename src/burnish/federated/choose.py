"""What each client trains, by what it has: FedPipe's choice of matrices, precision, batch and rank.

    1. importance of a matrix: sum |w dL/dw| over its entries, averaged over a few batches, over the
       clients by their rows; the first ones stay until the trainable budget is spent
    2. the base's precision (16: as it is, 8: ``rtn(bits=8)``, 4: ``nf4``): the highest at which
       anything fits; then the largest batch, and then the largest rank, that fit

Every step is simulated (``burnish.simulate``) on a client's largest rows, so a choice is a promise
about the peak. Clients with the same memory, batch and largest rows have the same choice, and more
memory never lowers the precision.

(Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models, 2024,
arXiv:2404.06448. (unconfirmed: the order of the second step, and the lists.))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn

from ..core.anatomy import Anatomy
from ..core.batches import cut, moved, tensors
from ..core.errors import ConfigError, NoPlanError
from ..core.recipe import Recipe, parse
from ..core.targets import match
from ..engine.tune import tune
from ..memory import parse_bytes, simulate
from ..memory.units import format_bytes
from .client import Client, Training, batch_of, batches, device_of, private, recipe_of

#: bits of the base -> the part of a recipe that holds it so
PRECISIONS = {16: "", 8: "rtn(bits=8)", 4: "nf4"}


@dataclass(frozen=True)
class Choice:
    """needs: the peak that was simulated, bytes.  bits: of the base, 16 where it stays as it is."""

    recipe: str
    batch: int
    needs: int
    bits: int
    rank: int | None


def importance(model: nn.Module, clients: Sequence[Client], training: Training, count: int = 4
               ) -> dict[str, float]:
    """name of a place -> ``sum |w dL/dw|``, averaged over `count` batches of each client, and over
    the clients by their rows; largest first. It takes the gradients of all weights once.

    Raises ConfigError where a client's rows are protected: scores would tell of them.
    """
    found: dict[str, float] = {}
    total = sum(len(c.rows) for c in clients)
    places = match(Anatomy.of(model), training.targets)
    for client in sorted(clients, key=lambda c: c.name):
        if private(recipe_of(client, training)):
            raise ConfigError(f"client {client.name!r} protects its rows, and scores of matrices "
                              "read them unprotected; name targets instead")
        tuned = tune(model, "full", head=False, seed=training.seed)
        try:
            some = list(islice(batches(client, training, 0), count))
            for batch in some:
                grads = tuned.probe(moved(batch, device_of(model)), training.loss).grads
                for place in places:
                    stored = place.stored(model.get_submodule(place.path))
                    name = next(n for n, p in model.named_parameters() if p is stored)
                    if name not in grads:
                        continue
                    score = (place.view(stored.detach()) * place.view(grads[name])).abs().sum()
                    share = len(client.rows) / total / len(some)
                    found[place.name] = found.get(place.name, 0.0) + share * float(score)
        finally:
            tuned.detach()
    return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def fitted(model: nn.Module, clients: Sequence[Client], training: Training, *,
           ranks: Sequence[int] = (), bits: Sequence[int] = (16, 8, 4),
           trainable: int | None = None) -> tuple[list[Client], dict[str, Choice]]:
    """The clients with recipes and batches that fit their memory, and what was chosen for each;
    those without a memory stay as they are (but for `trainable`).

    ranks: that may be chosen; none: the recipe's own, for rules that need the same of all.
    trainable: values that a client may train in matrices; which, by their importance.

    Raises NoPlanError where nothing fits a client, with what the least of it takes.
    """
    if odd := [b for b in bits if b not in PRECISIONS]:
        raise ConfigError(f"bits={odd[0]}: expected some of {', '.join(map(str, PRECISIONS))}")
    order = None
    if trainable is not None:
        order = importance(model, clients, training)
    made, told, known = [], dict[str, Choice](), dict[Any, Choice]()
    for client in clients:
        recipe, size = recipe_of(client, training), batch_of(client, training)
        if client.memory is None and order is None:
            made.append(client)
            continue
        budget = None if client.memory is None else parse_bytes(client.memory)
        example = _largest(client, size)
        key = (recipe, size, budget, len(client.rows) if private(recipe) else None,
               tuple(t.shape for t in tensors(example)))
        if key not in known:
            known[key] = _choice(model, client, training, example, size, budget,
                                 sorted(ranks, reverse=True) or [None],
                                 sorted(set(bits), reverse=True), order, trainable)
        told[client.name] = known[key]
        made.append(replace(client, recipe=known[key].recipe, batch=known[key].batch))
    return made, told


def _largest(client: Client, size: int) -> Any:
    """A batch of the client's largest rows, the largest first: none of its batches takes more."""
    sizes = [sum(t.numel() for t in tensors(client.collate([client.rows[i]])))
             for i in range(len(client.rows))]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:size]
    return client.collate([client.rows[i] for i in order])


def _choice(model: nn.Module, client: Client, training: Training, example: Any, size: int,
            budget: int | None, ranks: Sequence[int | None], bits: Sequence[int],
            order: dict[str, float] | None, trainable: int | None) -> Choice:
    recipe = parse(recipe_of(client, training))
    places = {p.name: p for p in match(Anatomy.of(model), training.targets)}
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    if any("storage" in m.axes() for m in recipe):
        bits = [16]                                  # the recipe has said in what form
    least: int | None = None

    def tried(width: int, rank: int | None, batch: int) -> Choice | None:
        nonlocal least
        text = _recipe(recipe, PRECISIONS[width], rank, places, order, trainable)
        peak = simulate(model, text, cut(example, batch), targets=training.targets,
                        head=training.head, loss=training.loss, lr=training.lr).peak_bytes
        least = peak if least is None else min(least, peak)
        fits = budget is None or peak <= budget
        return Choice(text, batch, peak, width, rank) if fits else None

    for width in bits:
        if (found := tried(width, ranks[-1], 1)) is None:
            continue
        for batch in sizes:                          # the largest at which the least rank fits
            if batch > 1 and (larger := tried(width, ranks[-1], batch)) is not None:
                found = larger
                break
        for rank in ranks[:-1]:
            if (more := tried(width, rank, found.batch)) is not None:
                return more
        return found
    raise NoPlanError(f"nothing fits the {format_bytes(budget or 0)} of client {client.name!r}: "
                      f"the least of {recipe} takes {format_bytes(least or 0)}")


def _recipe(recipe: Recipe, storage: str, rank: int | None, places: dict[str, Any],
            order: dict[str, float] | None, trainable: int | None) -> str:
    """The recipe with a storage in front, a rank, and the matrices that the budget pays for."""
    parts = []
    ranked = [m for m in recipe if "delta" in m.axes() and hasattr(m, "rank")]
    if (rank is not None or order is not None) and len(ranked) != 1:
        raise ConfigError(f"{recipe} has {len(ranked)} parts of a rank, and one is expected for a "
                          "rank, or matrices, to be chosen; give clients recipes of their own")
    for part in recipe:
        if part in ranked and rank is not None:
            part = replace(part, rank=rank)
        if part in ranked and order is not None:
            left, names = int(trainable or 0), []
            for name in order:
                if (n := part.count(places[name])) <= left:
                    left, names = left - n, [*names, name]
            if not names:
                raise ConfigError(f"trainable={trainable} pays for no matrix of {part}")
            part = replace(part, targets=",".join(sorted(names)))
        parts.append(part)
    text = str(Recipe(parts))
    return f"{storage} + {text}" if storage else text
