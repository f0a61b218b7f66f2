"""A steering vector from pairs of answers, its strength by what held-out pairs say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocks.state.steered import Batch
from ..core.batches import moved
from ..core.errors import ConfigError
from ..engine.tune import tune
from .data import read
from .rows import Choices
from .tasks import task_for
from .tasks.language import pad_tokens
from .tasks.preferences import PreferenceTuning


@dataclass
class Steered:
    """`tuned` holds the vector at the best strength. tried: of each strength ``alignment``, how
    much likelier held-out answers with the trait are than those without (the mean of log p per
    token, less the other's), ``perplexity`` of both, and beside strength 0 ``gain``, a
    difference, and ``cost``, a quotient. best: the strength of most alignment whose
    perplexity has grown to no more than `cap` times that of strength 0."""

    tuned: Any
    task: PreferenceTuning
    vector: Tensor
    tried: list[dict[str, float]]
    best: float

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"model": str(self.tuned.model.name_or_path), "recipe": str(self.tuned.recipe),
                "max_length": self.task.max_length, "task": {}, "training": {"seed": 42},
                "data": self.task.data.summary(), "steering": self.tried}


def steer(model: str, pairs: str, *, layer: int | None = None, alphas: Sequence[float] = (1.0,),
          cap: float = 1.1, against: Sequence[str] = (), batch: int = 8,
          say: Callable[[str], None] = lambda line: None) -> Steered:
    """pairs: rows of prompt, chosen (much of the trait) and rejected (little of it); a tenth is
    held out where there is no validation split. against: the same of other traits, whose directions
    are taken out. Nothing trains."""
    if not alphas or cap < 1 or not all(map(math.isfinite, [*alphas, cap])):
        raise ConfigError(f"strengths as finite numbers and a cap of 1 or more are expected, got "
                          f"{', '.join(map(str, alphas)) or 'none'} and {cap:g}")
    task = _task(model, pairs)
    if not task.data.sizes().get("validation"):
        raise ConfigError(f"{pairs} leaves no pair to try strengths on; give more rows")
    net = task.load(model).eval()
    tuned = tune(net, f"steering(layer={layer})", head=False)
    part: Any = tuned.recipe[0]
    aside = []
    for where in against:
        other = _task(model, where)
        other.settle(net)
        aside.append(part.lifecycle(tuned, _batches(other, batch)))
    vector = part.lifecycle(tuned, _batches(task, batch), aside)
    (shift,) = tuned.parameters()
    tried: list[dict[str, float]] = []
    for alpha in [0.0, *(a for a in dict.fromkeys(map(float, alphas)) if a)]:
        with torch.no_grad():
            shift.copy_(alpha * vector.to(shift))
        aligned, confused = _figures(tuned.model, task, batch)
        first = tried[0] if tried else {"alignment": aligned, "perplexity": confused}
        tried.append({"alpha": alpha, "alignment": aligned, "perplexity": confused,
                      "gain": aligned - first["alignment"], "cost": confused / first["perplexity"]})
        say(f"strength {alpha:g}: alignment {aligned:.4f}, perplexity {confused:.4g}")
    kept = [t for t in tried[1:] if t["cost"] <= cap]
    if not kept:
        raise ConfigError(f"every strength raises the perplexity of held-out answers to more than "
                          f"{cap:g} times what it was ({min(t['cost'] for t in tried[1:]):.3g} at "
                          "least): try smaller ones, another layer, or a larger cap")
    best = max(kept, key=lambda t: t["alignment"])["alpha"]
    at = "" if layer is None else f"layer={layer}, "
    tuned.detach()
    done = tune(net, f"steering({at}alpha={best})", head=False)
    with torch.no_grad():
        next(iter(done.parameters())).copy_(vector.to(shift))
    return Steered(done, task, vector, tried, best)


def _task(model: str, pairs: str) -> PreferenceTuning:
    made = task_for(read(pairs, task="preference-tuning", seed=42), model)
    assert isinstance(made, PreferenceTuning)
    return made


def _batches(task: PreferenceTuning, batch: int) -> list[tuple[Batch, Batch]]:
    """The training pairs, as batches of the one side and of the other."""
    rows = task.rows("train")
    assert isinstance(rows, Choices)
    made = []
    for at in range(0, len(rows), batch):
        sides = list(zip(*rows.tokens[at:at + batch], strict=True))
        made.append(tuple(pad_tokens([{"input_ids": t.input_ids, "labels": t.labels}
                                      for t in side], task.processor.pad_token_id)
                          for side in sides))
    return made  # type: ignore[return-value]


@torch.no_grad()
def _figures(model: Any, task: PreferenceTuning, batch: int) -> tuple[float, float]:
    """(alignment, perplexity) on the held-out pairs."""
    apart, said, counts = 0.0, 0.0, 0
    device = next(model.parameters()).device
    for made in _held(task, batch):
        logits = task.logits(model(**moved(task.feed(made), device)))
        spoken, tokens = task.spoken(logits, made["labels"].to(device))
        mean = spoken / tokens
        apart += float((mean[:, 0] - mean[:, 1]).sum())
        said, counts = said + float(spoken.sum()), counts + int(tokens.sum())
    return apart / len(task.rows("validation")), math.exp(min(-said / counts, 700.0))


def _held(task: PreferenceTuning, batch: int) -> Iterator[dict[str, Any]]:
    rows = task.rows("validation")
    for at in range(0, len(rows), batch):
        yield task.together([rows.row(i) for i in range(at, min(at + batch, len(rows)))])
