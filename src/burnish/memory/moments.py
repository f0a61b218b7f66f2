"""The peak of every moment of a run (during.py), promised."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.dtypes import dtype_of
from ..core.errors import CheckError
from .during import MOMENTS
from .extend import Shallows
from .fakes import from_config
from .report import MemoryReport
from .simulate import simulate


def peaks(model: Any, recipe: Any = None, batch: Any = 1, *, evaluation: Any = None,
          **settings: Any) -> dict[str, MemoryReport]:
    """moment -> what it takes, in the order of MOMENTS; without "merge" where the recipe has no
    form as plain weights.

    evaluation: the batch of an evaluation, where it is not `batch`. settings: as for
    :func:`burnish.simulate`, which says what is raised.
    """
    if not isinstance(model, nn.Module):
        model = from_config(model, dtype_of(settings.get("dtype")))
    settings.setdefault("shallows", Shallows(model))
    out = {}
    for moment in MOMENTS:
        shape = evaluation if moment == "evaluate" and evaluation is not None else batch
        try:
            out[moment] = simulate(model, recipe, shape, during=moment, **settings)
        except CheckError:
            if moment != "merge":
                raise
    return out
