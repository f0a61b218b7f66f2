"""The promise and the truth are the same number, on every small architecture."""

from __future__ import annotations

import pytest

import burnish
from burnish.memory import measure, simulate
from burnish.testing.models import NAMES, tiny


@pytest.mark.parametrize("name", NAMES)
def test_simulated_is_measured(name):
    model, batch = tiny(name)
    promised = simulate(model, "lora", batch)
    measured = measure(burnish.tune(model, "lora"), batch)
    assert promised.peak_bytes == measured.peak_bytes
    assert promised.by_category == measured.by_category
    assert promised.by_module == measured.by_module
    assert promised.peak_at == measured.peak_at
