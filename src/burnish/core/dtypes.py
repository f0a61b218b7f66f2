"""The numbers that a model may be of, by the names that people have for them."""

from __future__ import annotations

import torch

from .errors import ConfigError, nearest

#: numbers that a model may be loaded as
PLAIN = ("float32", "bfloat16", "float16", "float64")
#: shorter names of them
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64",
         "half": "float16", "float": "float32", "double": "float64"}


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name or as it is: "bf16", "torch.bfloat16", torch.bfloat16; None and "auto"
    leave it to the model.

    Raises ConfigError for what is none that a model may be loaded as.
    """
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    found = SHORT.get(name, name)
    if found not in PLAIN:
        near = nearest(name, [*PLAIN, *SHORT])
        raise ConfigError(f"dtype={name[:40]!r}: expected one of {', '.join(PLAIN)} (or "
                          f"{', '.join(SHORT)}){near}; a recipe such as 'rtn(bits=8)' stores "
                          "weights in fewer bits")
    made = getattr(torch, found)
    assert isinstance(made, torch.dtype)
    return made
