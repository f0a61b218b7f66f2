"""Scales that follow the sample: the rows that are read, and what waits for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.state.banks import Bank, Conditioned
from burnish.core.call import Call, resume


def called(module, h, **keys):
    with resume(Call(given=keys)):
        return module(h)


@pytest.mark.parametrize("make", [
    lambda axis: Bank("c", 2, 6, shift=True, axis=axis),
    lambda axis: Conditioned("c", nn.Embedding(3, 4), 6, shift=True, axis=axis, owns=True)])
@pytest.mark.parametrize("shape, axis", [((4, 5, 6), -1), ((4, 6), -1), ((4, 6, 3, 2), 1),
                                         ((4, 6, 3), 1), ((4, 3, 2, 6), -1)])
def test_every_sample_has_its_own_channels(make, shape, axis):
    module = make(axis).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    c, h = torch.tensor([2, 0, 1, 2]), torch.randn(shape, dtype=torch.float64)
    whole = called(module, h, c=c)
    for i in range(4):
        own = module.plain(int(c[i]))
        last = h[i].movedim(0, -1) if axis == 1 else h[i]
        want = last * own["gain"] + own["shift"]
        torch.testing.assert_close(whole[i], want.movedim(-1, 0) if axis == 1 else want)
        torch.testing.assert_close(called(module, h[i:i + 1], c=int(c[i]))[0], whole[i])
    torch.testing.assert_close(called(module, h, c=1), called(module, h, c=torch.ones(4).long()))
    one = called(module, h, c=torch.tensor([1]))
    torch.testing.assert_close(one, called(module, h, c=1))


def test_samples_of_a_flattened_batch_keep_their_rows():
    bank = Bank("c", 1, 3, shift=False, axis=-1)
    with torch.no_grad():
        bank.gain.fill_(2.0)
    y = called(bank, torch.ones(6, 3), c=torch.tensor([1, 0]))
    assert y[:3].eq(2).all() and y[3:].eq(1).all()
    assert list(bank.plain(1)) == ["gain"]


@pytest.mark.parametrize("make", [
    lambda: Bank("c", 2, 8, shift=True, axis=-1),
    lambda: Conditioned("c", nn.Embedding(3, 4), 8, shift=True, axis=-1, owns=True)])
def test_nothing_but_the_state_waits_token_by_token(make):
    found = []
    for tokens in (64, 128):
        module, kept = make(), {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            called(module, torch.randn(2 * tokens, 8), c=torch.tensor([1, 2]))
        found.append(sum(kept.values()))
    assert found[1] - found[0] == 2 * 64 * 8 * 4


def test_a_borrowed_table_is_said():
    z = nn.Embedding(2, 3)
    owner = Conditioned("c", z, 4, shift=True, axis=-1, owns=True)
    other = Conditioned("c", z, 4, shift=True, axis=-1)
    assert owner.borrowed == () and other.borrowed == (z.weight,)
    assert "z.weight" not in dict(other.named_parameters())


def test_decay_leaves_a_bank_alone():
    assert all(p.burnish_decay is False for p in Bank("c", 1, 2, shift=True, axis=-1).parameters())


def test_half_precision_states_keep_their_precision():
    module = Conditioned("c", nn.Embedding(2, 3), 4, shift=True, axis=-1, owns=True)
    h = torch.randn(2, 4, dtype=torch.bfloat16)
    assert called(module, h, c=0).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert module.rows(torch.tensor([0]))[0].dtype == torch.float32
