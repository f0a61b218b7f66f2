"""Who is switched off among equals is told by place, whatever a device's sort makes of ties."""

from __future__ import annotations

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.choose.ranks import Falling, Shrinking
from burnish.blocks.choose.units import switch_off


class Restless(TorchDispatchMode):
    """A device whose sort turns the order of equals round, but where a stable one is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        if func is aten.sort.default:
            dim, down = (*args[1:], -1, False)[:2] if len(args) > 2 else (-1, False)
        elif func is aten.sort.stable and not kwargs.get("stable"):
            dim, down = kwargs.get("dim", -1), kwargs.get("descending", False)
        else:
            return func(*args, **kwargs)
        values, at = aten.sort.stable(args[0].flip(0), stable=True, dim=dim, descending=down)
        return values, len(at) - 1 - at


@pytest.mark.parametrize("share, off", [(0.0, 0), (0.5, 2), (0.8, 4), (1.0, 4)])
def test_of_units_that_matter_alike_the_first_go(share, off):
    mask = types.SimpleNamespace(alive=torch.zeros(5, dtype=torch.bool))
    with Restless():
        assert torch.ones(3).argsort().tolist() == [2, 1, 0]
        switch_off(mask, torch.ones(5), share)
    assert mask.alive.tolist() == [False] * off + [True] * (5 - off)


def test_of_components_that_matter_alike_the_first_stay():
    terms = {n: types.SimpleNamespace(theta=lambda: ()) for n in "ab"}
    ranks = Shrinking(terms, None, Falling(3, 1, 0.0, 0.0), 1, lambda: torch.ones(3), None)
    with Restless():
        told = ranks.pattern(4)
    assert all(m.dtype == torch.bool for m in told.values())
    assert [m.tolist() for m in told.values()] == [[True] * 3, [True, False, False]]
