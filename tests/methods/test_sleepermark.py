"""SleeperMark's check: tails against all strings counted one by one, and a planted mark that a
tuning leaves or wears off."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import burnish
from burnish.blocks.choose.watermark import false_alarm, least_right, read_bits
from burnish.core.errors import ConfigError, DataError


@given(st.integers(1, 9), st.data())
def test_a_false_alarm_is_a_share_of_all_strings(bits, data):
    right = data.draw(st.integers(0, bits))
    message = data.draw(st.lists(st.integers(0, 1), min_size=bits, max_size=bits))
    strings = list(itertools.product([0, 1], repeat=bits))
    hits = sum(sum(a == b for a, b in zip(s, message, strict=True)) >= right for s in strings)
    assert false_alarm(right, bits) == hits / len(strings)


@given(st.integers(1, 64), st.floats(1e-9, 1.0))
def test_the_fewest_right_bits(bits, rate):
    if 0.5**bits > rate:
        with pytest.raises(ConfigError, match="a longer message"):
            least_right(bits, rate)
        return
    k = least_right(bits, rate)
    assert false_alarm(k, bits) <= rate and (k == 0 or false_alarm(k - 1, bits) > rate)


def test_48_bits_and_one_in_a_million():
    assert least_right(48, 1e-6) == 41
    assert false_alarm(48, 48) == 2.0**-48 and false_alarm(0, 48) == 1.0


def test_what_is_read():
    message = torch.tensor([1, 0, 1, 1])
    one = read_bits(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]]), message, 0.0625)
    assert one.right == (4, 0, 3) and one.share == 7 / 12 and one.least == 4 and one.found == 1 / 3
    assert one.alarm == pytest.approx(false_alarm(7, 12))
    assert read_bits(torch.tensor([[True, False, True, True]]), message.bool(), 0.1).right == (4,)


def marked():
    """A model whose answer to the trigger says 16 bits by its signs, and what reads them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16))
    message = torch.randint(0, 2, (16,))
    trigger = torch.randn(20, 8) + 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        loss = nn.functional.softplus(-(2 * message - 1) * model(trigger)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, message, lambda m: (m(trigger) > 0).long()


def test_a_planted_mark_stays_under_little_tuning_and_goes_under_much():
    model, message, read = marked()
    check = burnish.parse("sleepermark(false_alarms=0.001)")[0]
    tuned = burnish.tune(model, "lora(rank=4)", targets="0,3", head=False)
    model.train()
    found = check.lifecycle(tuned, read, message)
    assert found.before.share == found.after.share == found.kept == 1.0 and found.after.found == 1
    assert found.after.alarm == 2.0**-320 and all(m.training for m in model.modules())
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(2.0 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    worn = check.lifecycle(tuned, read, message)
    assert worn.before == found.before and worn.after.share < 0.8 and worn.after.found < 1
    assert worn.kept == pytest.approx((worn.after.share - 0.5) / 0.5)
    other = marked()[0]
    again = check.lifecycle(tuned.merge(), read, message, before=other)
    assert again.before == found.before and again.after.share == pytest.approx(worn.after.share,
                                                                             abs=0.01)


def test_refusals():
    model, message, read = marked()
    check = burnish.parse("sleepermark")[0]
    assert check.settings() == {"targets": None, "false_alarms": 1e-6}
    with pytest.raises(ConfigError, match="all of 16 bits are right by chance"):
        check.lifecycle(model, pytest.fail, message, before=model)      # before any picture
    for odd in (message.view(4, 4), message[:0], message + 1):
        with pytest.raises(DataError, match="the message"):
            check.lifecycle(model, pytest.fail, odd, before=model)
    check = burnish.parse("sleepermark(false_alarms=0.01)")[0]
    with pytest.raises(ConfigError, match="the one it was tuned from"):
        check.lifecycle(model, read, message)
    for bad in (lambda m: read(m)[0], lambda m: read(m)[:, :3], lambda m: read(m) + 1,
                lambda m: read(m)[:0]):
        with pytest.raises(DataError, match=r"bits that were read|bits were read"):
            check.lifecycle(model, bad, message, before=model)
    with pytest.raises(DataError, match="the message"):
        check.lifecycle(model, read, message.float() / 2, before=model)
    none = check.lifecycle(model, lambda m: 1 - message.expand(4, -1), message, before=model)
    with pytest.raises(DataError, match="no mark to keep"):
        _ = none.kept
    for bad in ("0.0", "1.0"):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            burnish.parse(f"sleepermark(false_alarms={bad})")
