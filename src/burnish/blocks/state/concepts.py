"""Classes of a model of two towers without their texts: vectors in the place of what a text tower
would make of them.

    y = s normalised(f(x)) normalised(C)^T

f are the model's own features of pictures, s its scale, C (classes, P) begins as the features of
texts: then y are the model's own logits. The text tower is no part of the new model.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.errors import RecipeError
from ...core.needs import Towers, towers


class Cosine(nn.Linear):
    """``x normalised(W)^T``, W (classes, P)."""

    def __init__(self, rows: Tensor):
        super().__init__(rows.shape[1], rows.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(rows)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=-1).to(x.dtype))


class Concepts(nn.Module):
    """A classifier of pictures: the half of `model` that reads them, and one vector for each class
    (`rows`, (classes, P)). It shares that half's modules with the model it is made of."""

    def __init__(self, model: nn.Module, two: Towers, rows: Tensor):
        super().__init__()
        gone = {two.text[0].stack.split(".")[0],
                *(n for n, m in model.named_children()
                  if isinstance(m, nn.Linear) and n != two.image)}
        self.body = copy.copy(model)
        self.body._modules = {n: m for n, m in model._modules.items() if n not in gone}
        self.scale, self.classifier = two.scale or "", Cosine(rows)
        self.config = getattr(model, "config", None)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = F.normalize(features(self.body.get_image_features(pixel_values)), dim=-1)
        logits = self.body.get_parameter(self.scale).exp() * self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def features(out: Any) -> Tensor:
    """What a tower answers, (rows, P)."""
    return out if isinstance(out, Tensor) else out.pooler_output


def concepts(model: nn.Module, texts: dict[str, Tensor], init: str) -> Concepts:
    """The model whose classes are these texts, one row each, or (init="normal") as many vectors of
    random direction."""
    two = towers(Anatomy.of(model))
    if two is None or two.scale is None or "." in two.image:
        raise RecipeError(f"cones takes the text tower's place, and {type(model).__name__} is no "
                          "model that matches images and texts")
    was, _ = model.training, model.eval()
    try:
        with torch.no_grad():
            rows = F.normalize(features(model.get_text_features(**texts)), dim=-1)
    finally:
        model.train(was)
    if init == "normal":
        rows = F.normalize(torch.randn_like(rows), dim=-1)
    return Concepts(model, two, rows.clone()).train(was)
