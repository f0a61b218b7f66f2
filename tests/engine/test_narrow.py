"""Rows and columns that leave a matrix, and what its module says of itself afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from burnish.engine.narrow import cut

GONE, KEEP = torch.tensor([1, 3]), [0, 2, 4, 5]


def taken_out(module, side):
    said = {}

    def put(m, name, value):
        assert m is module and name not in said
        said[name] = value
        setattr(m, name, value)

    cut(module, side, GONE, put)
    return said


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [0, 1])
def test_a_linear(side, bias):
    m = nn.Linear(6, 6, bias=bias)
    W, b = m.weight.detach().clone(), m.bias.detach().clone() if bias else None
    said = taken_out(m, side)
    assert torch.equal(m.weight, W[KEEP] if side == 0 else W[:, KEEP])
    assert (m.out_features, m.in_features) == ((4, 6) if side == 0 else (6, 4))
    if bias:
        assert torch.equal(m.bias, b[KEEP] if side == 0 else b)
    assert set(said) == {"weight", "in_features"} if side else \
        set(said) == {"weight", "out_features", *["bias"] * bias}
    assert not m.weight.requires_grad and m.weight.is_contiguous()
    assert isinstance(m.weight, nn.Parameter)


@pytest.mark.parametrize("side", [0, 1])
def test_a_matrix_that_is_stored_across(side):
    m = Conv1D(6, 6)                                         # stores (in, out)
    W, b = m.weight.detach().clone(), m.bias.detach().normal_().clone()
    said = taken_out(m, side)
    assert torch.equal(m.weight, W[:, KEEP] if side == 0 else W[KEEP])
    assert torch.equal(m.bias, b[KEEP] if side == 0 else b)
    assert (m.nf, m.nx) == ((4, 6) if side == 0 else (6, 4))
    assert set(said) == ({"weight", "nx"} if side else {"weight", "bias", "nf"})
    assert m(torch.ones(2, m.nx)).shape == (2, m.nf)


def test_a_table():
    m = nn.Embedding(6, 6)
    W = m.weight.detach().clone()
    assert set(taken_out(m, 1)) == {"weight", "embedding_dim"}
    assert torch.equal(m.weight, W[:, KEEP]) and m.embedding_dim == 4
