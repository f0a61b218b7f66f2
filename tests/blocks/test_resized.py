"""A tensor that was resized after a step is refused before the next one, by every optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.testing.models import tiny

OPTIMIZERS = ["adamw", "sgd(momentum=0.9)", "sgd", "lion", "adafactor", "adamw(state='bf16')",
              "adam8bit", "adam4bit", "galore(rank=2)", "apollo(rank=2)", "fira(rank=2)",
              "step_in_backward", "mezo + master_weights", "kahan"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_embedding_resized_after_a_step(optimizer):
    net, batch = tiny("bert")                                         # findings 2.7
    if "mezo" in optimizer or "kahan" in optimizer:
        net.to(torch.bfloat16)
    tuned = burnish.tune(net, f"full + {optimizer}", head=False)
    opt = tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    stateless = not any(opt.state.values())
    w = net.get_input_embeddings().weight
    w.data = torch.cat([w.data, w.data[:5] * 0])                      # as a resize does it
    w.grad = None
    def again():                                                      # in anybody's loop
        loss = net(**batch).loss
        if "mezo" in optimizer:
            opt.step(lambda: loss.detach().float())
        else:
            loss.backward()
            opt.step()

    if stateless:                                                     # nothing of the old shape
        again()
        return
    with pytest.raises(burnish.BurnishError, match=r"word_embeddings.*\(69, 32\).*\(64, 32\)"):
        again()


def test_a_state_that_was_saved_for_another_shape():
    a, b = nn.Linear(4, 4), nn.Linear(4, 7)
    first = burnish.tune(nn.Sequential(a), "full", head=False)
    opt = first.optimizer(lr=1e-3)
    first.step(torch.ones(2, 4), loss=lambda y, _: y.sum())
    second = burnish.tune(nn.Sequential(b), "full", head=False)
    other = second.optimizer(lr=1e-3)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(burnish.BurnishError, match="optimizer state was made for"):
        second.step(torch.ones(2, 4), loss=lambda y, _: y.sum())
