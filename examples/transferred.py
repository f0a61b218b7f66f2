"""One pre-trained model, one small task, several recipes: the table that examples print.

    compare(fresh, batches, score, {"lora(rank=8)": 3e-3, "full": 1e-3})

Every recipe starts from the same weights, takes the same batches in the same order, and is scored
on rows that none has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import burnish

MB = 1e6


def compare(fresh: Callable[[], nn.Module], batches: Sequence[Any],
            score: Callable[[nn.Module], float], recipes: Mapping[str, float], *,
            loss: Any = None, epochs: int = 4, word: str = "accuracy", head: Any = "auto",
            targets: Any = None, seed: int = 0) -> dict[str, float]:
    """Scores by recipe, printed with what each trains and the most that a step took.

    fresh: the pre-trained model, anew each time. batches: of an epoch. score: of a model in
    evaluation mode. recipes: with the learning rate of each. loss, head, targets: as
    ``burnish.tune`` and ``tuned.step`` take them.
    """
    found: dict[str, float] = {}
    wide = max(map(len, recipes))
    print(f"{'recipe':{wide}}  {word:>9}  {'trains':>9}  {'peak of a step':>14}")
    for recipe, rate in recipes.items():
        torch.manual_seed(seed)
        model = fresh().train()
        tuned = burnish.tune(model, recipe, seed=seed, head=head, targets=targets)
        tuned.optimizer(rate, weight_decay=0.0)
        peak = burnish.measure(tuned, batches[0], loss=loss).peak_bytes
        for _ in range(epochs):
            for batch in batches:
                tuned.step(batch, loss=loss)
        with torch.no_grad():
            found[recipe] = score(model.eval())
        trains = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        print(f"{recipe:{wide}}  {found[recipe]:9.4f}  {trains:9,}  {peak / MB:11.2f} MB",
              flush=True)
    return found


def trained(model: nn.Module, batches: Sequence[Any], rate: float, epochs: int, loss: Any
            ) -> nn.Module:
    """Pre-training, in plain torch."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model


def split(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Numbers below `count` in batches of `size`, shuffled."""
    return list(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).split(size))
