"""What a recipe's tests share: bytes that wait for backward, models of published shapes."""

from __future__ import annotations

import pytest
import torch

from burnish.memory import Ledger


@pytest.fixture
def kept():
    """kept(tuned, batch): bytes alive between forward and backward, weights left out."""

    def measure(tuned, batch):
        with Ledger(tuned.model) as ledger:
            for value in batch.values():
                ledger.watch("weights", [value])
            loss = tuned.loss(batch)
            alive = sum(e.bytes for e in ledger.entries
                        if e.death is None and ledger.category(e) != "weights")
        del loss
        return alive

    return measure


@pytest.fixture
def published():
    """published(config class, model class, **settings): (anatomy, config) without any memory."""

    def build(config, model, **settings):
        import transformers
        from transformers import initialization

        from burnish.core.anatomy import Anatomy

        made = getattr(transformers, config)(**settings)
        with torch.device("meta"), initialization.meta_device_safe_creation_ops():
            return Anatomy.of(getattr(transformers, model)._from_config(made)), made

    return build
