"""What a subspace covers is read off the model's blocks, said, and refused where it is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.testing.models import tiny


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Named(nn.Module):
    """Blocks whose names have no number of their own, as in torchvision's encoders."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential()
        for k in range(3):
            self.layers.add_module(f"encoder_layer_{k}", Block(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layers(x))


def projected(tuned):
    opt = tuned.optimizer(lr=1e-3)
    return {n for g in opt.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)
            if opt._projected(p)}


@pytest.mark.parametrize("method", ["galore", "apollo", "fira"])
def test_blocks_are_those_of_the_anatomy(method):
    tuned = burnish.tune(Named(), f"full + {method}(rank=4)", head=False)        # findings 2.5
    assert projected(tuned) == {f"layers.encoder_layer_{k}.fc{i}.weight"
                                for k in range(3) for i in (1, 2)}
    (note,) = [n for n in tuned.summary()["notes"] if n.startswith(f"{method} projects")]
    assert "6 of 14 trained tensors to rank 4" in note and "encoder_layer_0.fc1" in note


@pytest.mark.parametrize("method", ["galore", "apollo", "fira"])
def test_projecting_nothing_is_refused_with_the_rank_that_would(method):
    with pytest.raises(burnish.RecipeError, match=f"{method}.rank=16. projects nothing.*16.*below"):
        burnish.tune(Named(), f"full + {method}(rank=16)", head=False)           # findings 2.5
    model, _ = tiny("bert")
    with pytest.raises(burnish.RecipeError, match="projects nothing.*matrix inside"):
        burnish.tune(model, f"norms + {method}(rank=4)", head=False)
    assert not any(".burnish" in n for n, _ in model.named_modules()), "left as it was"


def test_targets_name_other_weights():
    tuned = burnish.tune(Named(), "full + galore(rank=2, targets='head')", head=False)
    assert projected(tuned) == {"head.weight"}


def test_embeddings_and_heads_are_stepped_directly():
    tuned = burnish.tune(tiny("llama")[0], "full + galore(rank=4)", head=False)
    names = projected(tuned)
    assert names and all(".layers." in n and "norm" not in n for n in names)


def test_without_repeated_blocks_every_matrix_outside_the_head_is_projected():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("inner", nn.Linear(8, 8))
    model.add_module("outer", nn.Linear(8, 3))
    tuned = burnish.tune(model, "full + galore(rank=2)", head=False)
    assert projected(tuned) == {"inner.weight", "outer.weight"} - {
        f"{h}.weight" for h in tuned.anatomy.head}
    tuned = burnish.tune(tiny("mha")[0], "full + galore(rank=4)", head=False)
    assert projected(tuned)
