"""What a recipe may be expected to reach: the prior that the board's runs were made into.

A prior is a score in [0, 1], with a standard deviation, by the kind of task; of a kind that was
never run it is that of tasks in general, and less certain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from ..blocks.update.zeroth import ZerothOrder
from ..core.batches import tensors
from ..core.recipe import parse

OTHER = "other"
#: input of a model -> kind of its tasks
INPUTS = {"pixel_values": "image", "input_values": "sound", "input_features": "sound",
          "input_ids": "text"}


class Quality(NamedTuple):
    """score: in [0, 1]; spread: its standard deviation; source: where it comes from."""

    score: float
    spread: float
    source: str

    @property
    def known(self) -> bool:
        return not self.source.startswith("no measured")


@lru_cache(maxsize=1)
def priors() -> dict[str, dict[str, Any]]:
    """quality.json: recipe -> {"score": {kind: [score, spread]}, "source": text}."""
    file = files("burnish.memory").joinpath("quality.json")
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def quality_of(recipe: str, kind: str = OTHER) -> Quality:
    """Of a recipe: that of the longest one on the board which it contains."""
    known = {k: v for k, v in priors().items() if k != "_"}
    parts = parse(recipe)
    whole, names = {str(m) for m in parts}, {m.name for m in parts}
    none = f"no measured quality for {recipe}"
    if known and recipe not in known and any(isinstance(m.optimizer(), ZerothOrder) for m in parts
                                             if "optimizer" in m.axes()):
        low = min((_score(v, kind) for v in known.values()), key=lambda s: s[0])
        return Quality(*low, none)                          # not what its head reaches
    best: tuple[int, int, str] | None = None
    for key in known:
        wanted = [p.strip() for p in key.split("+")]
        exact = all(w in whole for w in wanted)
        if exact or all(w.partition("(")[0].strip() in names for w in wanted):
            rank = (len(wanted), exact, key)
            best = rank if best is None or rank[:2] > best[:2] else best
    if best is not None:
        found = known[best[2]]
        return Quality(*_score(found, kind), str(found.get("source", "")))
    all_ = [_score(v, kind) for v in known.values()]
    if not all_:
        return Quality(0.5, 0.5, none)
    middle = sum(s for s, _ in all_) / len(all_)
    return Quality(middle, (sum((s - middle) ** 2 for s, _ in all_) / len(all_)) ** 0.5, none)


def _score(found: Mapping[str, Any], kind: str) -> tuple[float, float]:
    score, spread = found["score"].get(kind) or found["score"][OTHER]
    return float(score), float(spread)


def kind_of(model: Any, batch: Any) -> str:
    """image, text, language, sound, table or other: what tasks of a model are, by what it is
    called with. model: a module or a config."""
    config = getattr(model, "config", model)
    wanted = [str(a) for a in getattr(config, "architectures", None) or [type(model).__name__]]
    speaks = any(a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
                 for a in wanted)
    taken = list(batch) if isinstance(batch, Mapping) else [getattr(model, "main_input_name", "")]
    for key, kind in INPUTS.items():
        if key in taken:
            return "language" if kind == "text" and speaks else kind
    first = next(tensors(batch), None) if isinstance(batch, tuple | Mapping) else None
    if first is not None and first.is_floating_point():
        return {2: "table", 4: "image"}.get(first.dim(), OTHER)
    if hasattr(config, "image_size") and hasattr(config, "patch_size"):
        return "image"
    if hasattr(config, "vocab_size"):
        return "language" if speaks else "text"
    return OTHER
