"""Masks in bits, and weights with zeros."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight.pruned import Chosen, Masked, Pruned, packed, unpacked


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (2, 3, 7), (1, 1)])
def test_masks_in_bits(shape):
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, mask.shape), mask)
    first = torch.zeros(9, dtype=torch.bool)
    first[1] = first[8] = True
    assert packed(first).tolist() == [2, 1]


def test_a_pruned_weight_is_held_in_its_own_bytes():
    W = torch.randn(4, 6, dtype=torch.bfloat16)
    W[0, 0] = -1.0
    keep = torch.rand(4, 6) > 0.5
    keep[0, 0] = False
    p = Pruned(W, keep)
    assert torch.equal(p.weight(), W * keep) and p.nbytes == 48 and p.dtype == torch.bfloat16
    assert not p.weight()[0, 0].signbit(), "zero, not minus zero"
    assert p.half().dtype == torch.float16 and p.weight().dtype == torch.float16
    assert "pruned, (4, 6)" in repr(p)
    whole = Pruned(W)
    assert torch.equal(whole.weight(), W) and whole.weight().data_ptr() != W.data_ptr()


def test_a_file_brings_the_mask_in_bits():
    W, keep = torch.randn(3, 5), torch.rand(3, 5) > 0.5
    a, b = Chosen(W, keep), Chosen(W)
    b.remade(W.double(), a.get_extra_state())
    assert torch.equal(a.weight(), b.weight()) and b.dtype == torch.float32
    b.load_state_dict(Chosen(W, ~keep).state_dict())
    assert torch.equal(b.weight(), W * ~keep)


def test_a_mask_over_updates_looks_again_where_the_base_has_changed():
    W = torch.randn(3, 5)
    W[1, 2] = 0
    m, V = Masked(W), torch.randn(3, 5)
    assert torch.equal(m.of(V), V.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.)))
    W[0, 0] = 0
    m.restart(W)
    assert m.of(V)[0, 0] == 0 and m.of(V)[1, 2] == 0 and m.of(V).count_nonzero() == 13
