"""QA-LoRA: an update that is one number for a group of inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import BurnishError
from burnish.core.site import Place
from burnish.methods.delta.lowrank.qa_lora import Summed
from burnish.testing import follows
from burnish.testing.models import tiny


def made(settings="rank=2, alpha=4, group=3", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"qa_lora({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Summed)
    term.double()
    return model, tuned, term


def test_outputs_and_gradients_are_those_of_the_equation():
    """Inputs are added up three by three, entry by entry."""
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.B.normal_()

    def y(x, A, B):
        pooled = torch.stack([x[..., 3 * i] + x[..., 3 * i + 1] + x[..., 3 * i + 2]
                              for i in range(4)], -1)
        return F.linear(x, W, bias) + 2.0 * pooled @ A.t() @ B.t()

    follows(tuned, y, [term.A, term.B], (5, 3, 12))
    A, B = term.pair()
    torch.testing.assert_close(B @ A, term.dense())


def on_a_grid(W, group, bits=4):
    """Each output's group on its own grid: a zero and a step. (codes, the weight again)"""
    w = W.unflatten(1, (-1, group))
    zero, top = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (top - zero) / (2**bits - 1)
    codes = ((w - zero) / step).round()
    return codes, (zero + step * codes).flatten(1)


def test_a_merged_weight_goes_back_on_its_grid_without_an_error():
    model, tuned, term = made()
    with torch.no_grad():
        codes, W = on_a_grid(model[0].weight, 3)
        model[0].weight.copy_(W)
        term.B.normal_()
        merged = tuned.merge()[0].weight
        again, same = on_a_grid(merged, 3)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, merged)
    assert (merged - W).abs().max() > 0.1


def test_groups_of_one_are_lora():
    net, batch = tiny("llama")
    ours = burnish.tune(net, "qa_lora(rank=4, group=1)", head=False)
    theirs = burnish.tune(tiny("llama")[0], "lora(rank=4)", head=False)
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        with torch.no_grad():
            b.copy_(torch.randn_like(b)), a.copy_(b)
    with torch.no_grad():
        for _, t in theirs.terms(nn.Module):
            t.scale = 4.0
        torch.testing.assert_close(net(**batch).logits, theirs.model(**batch).logits)


def test_start_counts_and_defaults(uniform):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "qa_lora(rank=4, group=8)", head=False)
    assert torch.equal(net(**batch).logits, want)
    for _, t in tuned.terms(Summed):
        uniform(t.A, t.A.shape[1] ** -0.5)
        assert not t.B.any()
    (m,) = burnish.parse("qa_lora")
    assert m.count(Place("a", "weight", "linear", 4096, 11008)) == 16 * (11008 // 32 + 4096)
    assert m.settings() == {"targets": None, "rank": 16, "alpha": 16.0, "group": 32,
                            "dropout": 0.0}


def test_the_least_and_the_largest_rank_fit():
    assert [made(f"rank={r}, group=3")[2].A.shape[0] for r in (1, 4)] == [1, 4]


@pytest.mark.parametrize("settings, words", [
    ("group=0", "1 is lora"), ("group=5", "does not divide the 12 inputs of 0.weight"),
    ("rank=5, group=3", "the largest rank there is 4"), ("rank=0, group=3", "there is 4"),
    ("dropout=1.0", "a probability")])
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(BurnishError, match=f"qa_lora.*{words}"):
        made(settings)
