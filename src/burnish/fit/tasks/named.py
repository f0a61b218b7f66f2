"""What tasks have in common whose head tells classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...core.errors import ConfigError
from .base import Task


class Named(Task):
    """A head as wide as there are names, which the model's config keeps."""

    @property
    def names(self) -> Sequence[str]:
        return self.data.labels or ()

    def head(self) -> dict[str, Any]:
        names = dict(enumerate(self.names))
        return {"num_labels": len(names), "id2label": names,
                "label2id": {v: k for k, v in names.items()}, "ignore_mismatched_sizes": True}

    def fit_head(self, model: nn.Module) -> nn.Module:
        """A module of somebody's own must be as wide; it is told the names."""
        has = getattr(getattr(model, "config", None), "num_labels", None)
        if has != len(self.names):
            raise ConfigError(f"{type(model).__name__} has {has} classes and the data "
                              f"{len(self.names)}; give the model by its folder, or with "
                              f"num_labels={len(self.names)}")
        model.config.id2label = dict(enumerate(self.names))
        model.config.label2id = {v: k for k, v in enumerate(self.names)}
        return model
