"""Every registered method on every small architecture where it applies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.testing import conformance
from burnish.testing.models import NAMES

GOLDEN = Path(__file__).parents[1] / "golden" / "applies.json"
METHODS = conformance.methods()


@pytest.mark.slow
@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_method(method, model):
    """All checks; or a refusal with a reason that says what to do, exactly where it is expected."""
    refused = json.loads(GOLDEN.read_text())["refused"].get(method, [])
    reason = conformance.refusal(method, model)
    assert (reason is not None) == (model in refused), reason
    if reason is not None:
        assert len(reason) > 30 and "\n" not in reason
        return
    for check in conformance.CHECKS:
        check(method, model)


@pytest.mark.parametrize("method", ["lora", "snella", "full", "checkpoint"])
def test_method_on_vit(method):
    """A quick look at four of them for `make check`."""
    conformance.check(method, "vit")


def test_enough_methods_conform():
    """The catalogue is broad: at least thirty methods, most of them on most models."""
    refused = json.loads(GOLDEN.read_text())["refused"]
    assert len(METHODS) >= 30
    assert set(refused) <= set(METHODS)
    broad = [m for m in METHODS if len(refused.get(m, [])) <= len(NAMES) // 2]
    assert len(broad) >= 28
