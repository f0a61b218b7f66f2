"""A class for every pixel."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...core.errors import ConfigError, DataError
from .. import masks
from ..from_files import Scenes
from ..masks import IGNORED, NOTHING
from ..rows import Rows
from .base import Batch
from .named import Named


class SemanticSegmentation(Named):
    """``pixel_values`` (B, C, H, W), and ``labels`` (B, H, W), 255 where a pixel is not counted.

    Picture and mask go through the model's own image processor, the mask to the nearest pixel. With
    label reduction, the processor's own or ``reduce_labels``, number 0 of a mask is not counted and
    class k is number k + 1. Logits are brought to the size of the labels, bilinearly, as the models
    do it for their own loss.
    """

    metric = "mean_iou"
    greater_is_better = True
    smooths = False
    heavy = True
    takes = ("image",)
    settings = ("reduce_labels",)

    def prepare(self) -> None:
        p = self.processor
        known = inspect.signature(p.preprocess).parameters if hasattr(p, "preprocess") else {}
        if "segmentation_maps" not in known:
            raise ConfigError(f"{type(p).__name__} prepares no masks; give processor= with the "
                              "image processor of a model for semantic segmentation")
        asked = self.how.get("reduce_labels")
        if asked is not None:
            if not hasattr(p, "do_reduce_labels") and asked:
                raise ConfigError(f"reduce_labels=True: {type(p).__name__} reduces no labels")
            p.do_reduce_labels = asked
        names = self.names
        if self.reduced and names and names[0].lower() in NOTHING:
            raise ConfigError(f"labels are reduced, so that number 0 of a mask is not counted, and "
                              f"the first class is called {names[0]!r}; leave it out of the names, "
                              "or give reduce_labels=False")
        if len(names) > IGNORED:
            raise ConfigError(f"{len(names)} classes, and a mask numbers {IGNORED} at most")
        if len(names) < 2:
            raise DataError(f"{self.data.source}: {len(names)} class is left to be told apart from "
                            "others; segmentation needs two or more")
        top = max((h for h in self.data.held if h != IGNORED), default=0) - self.reduced
        if top >= len(names):
            tail = "" if self.reduced or top > len(names) else \
                "; where number 0 is no class, reduce_labels=True leaves it out"
            raise DataError(f"{self.data.source}: the masks hold number {top + self.reduced}, and "
                            f"there are names of {len(names)} classes{tail}")
        self.mixes = self._mixes()

    @property
    def reduced(self) -> bool:
        return bool(getattr(self.processor, "do_reduce_labels", False))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes that are learnt: numbers that nobody has named begin at 1 where 0 is not
        counted."""
        names = self.data.labels or ()
        counted = names == tuple(str(i) for i in range(len(names)))
        return names[1:] if self.reduced and counted else names

    def _mixes(self) -> bool:
        """Whether the processor makes numbers of a mask that are not in it, as one does that
        resizes masks as it does pictures."""
        from PIL import Image

        half = np.zeros((37, 53), np.uint8)
        half[:, 26:] = 9
        made = self.processor(images=self._seen(Image.new("RGB", (53, 37))),
                              segmentation_maps=Image.fromarray(half),
                              return_tensors="np")["labels"]
        return bool(set(np.unique(made).tolist()) - {0, 8, 9, IGNORED})

    # -- the model -----------------------------------------------------------------------------
    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
            was = getattr(config, name, None)
            if was is not None and was != IGNORED:
                setattr(config, name, IGNORED)
                self.notes.append(f"the config's {name}={was} is put to {IGNORED}, the number of "
                                  "pixels that are not counted in masks")

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        return Scenes(self.data.splits[split], self._read, self.data.where.get(split))

    def _read(self, image: Any, mask: Any) -> dict[str, torch.Tensor]:
        numbers = masks.numbers(mask)
        if numbers.shape != image.size[::-1]:
            raise ValueError(f"the mask is {mask.width} x {mask.height}, and its picture "
                             f"{image.width} x {image.height}")
        how = {"images": self._seen(image), "segmentation_maps": numbers, "return_tensors": "pt"}
        made = self.processor(**how)
        labels = made["labels"][0]
        if self.mixes:
            labels = self.processor(**how, resample=0)["labels"][0]           # to the nearest
        top = int(torch.where(labels == IGNORED, -1, labels).max())
        if top >= len(self.names):
            raise ValueError(f"the mask holds class {top}, and there are {len(self.names)}: "
                             f"{', '.join(self.names[:8])}")
        return {"pixel_values": made["pixel_values"][0], "labels": labels}

    def _seen(self, image: Any) -> Any:
        mean = getattr(self.processor, "image_mean", None)
        return image.convert("L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB")

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        sizes = {tuple(r["pixel_values"].shape[-2:]) for r in rows}
        if len(sizes) > 1:
            raise DataError(f"{type(self.processor).__name__} leaves pictures at unlike sizes "
                            f"({', '.join('x'.join(map(str, s)) for s in sorted(sizes)[:3])}), "
                            "which make no batch; let it resize to one height and width, or give "
                            "batch_size=1")
        return super().together(rows)

    def input(self, batch: Batch) -> torch.Tensor:
        return batch["pixel_values"]

    # -- loss and figures ----------------------------------------------------------------------
    def sized(self, logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return F.cross_entropy(self.sized(self.logits(outputs), labels.shape[-2:]), labels,
                               ignore_index=IGNORED)

    def kept(self, outputs: Any, truth: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, 3, C) of each class's pixels: hit, said, true; (B, 2) of the losses)."""
        right = self.right(truth)
        logits = self.sized(self.logits(outputs), right.shape[-2:])
        counted = (right != IGNORED).flatten(1)
        sums = F.cross_entropy(logits, right, ignore_index=IGNORED, reduction="none")
        said = logits.argmax(1).flatten(1)
        true = torch.where(counted, right.flatten(1), 0)
        rows = [torch.zeros(len(right), logits.shape[1], dtype=torch.long, device=right.device)
                .scatter_add_(1, which, which_count.long())
                for which, which_count in ((true, counted & (said == true)), (said, counted),
                                           (true, counted))]
        return torch.stack(rows, 1), torch.stack([sums.flatten(1).sum(-1), counted.sum(-1).float()],
                                                 -1)

    def told(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,): the masks themselves would fill the memory, and figures are of counts."""
        return (labels != IGNORED).flatten(1).sum(-1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """Over all pixels of a split together: intersection over union and accuracy, each averaged
        over the classes that occur, and the pixels that are right."""
        hit, said, true = torch.as_tensor(answers).double().sum(0)
        union = said + true - hit
        there, asked = union > 0, true > 0
        return {"mean_iou": float((hit / union)[there].mean()) if there.any() else 0.0,
                "mean_accuracy": float((hit / true)[asked].mean()) if asked.any() else 0.0,
                "overall_accuracy": float(hit.sum() / true.sum().clamp(min=1))}

    # -- answers to people ---------------------------------------------------------------------
    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed({"pixel_values": self.processor(
            images=self._seen(row["image"]), return_tensors="pt")["pixel_values"]})

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """shares: of what is seen of the picture, the largest first; mask: a PNG of the picture's
        own size, in base64, of the numbers that `labels` names, 255 where a processor that cuts
        the margin off shows the model nothing."""
        from PIL import Image

        encoded, image = self.encode(row), row["image"]
        logits = self.logits(model(**encoded))
        if getattr(self.processor, "do_center_crop", False):
            whole = self.processor(images=self._seen(image), do_center_crop=False,
                                   return_tensors="pt")["pixel_values"].shape[-2:]
            found = self.sized(logits, encoded["pixel_values"].shape[-2:])[0].argmax(0).cpu()
            found = _around(found, whole, image.size[::-1])
        else:
            found = self.sized(logits, image.size[::-1])[0].argmax(0).cpu()
        seen = found[found != IGNORED]
        share = torch.bincount(seen, minlength=len(self.names)).double() / max(1, seen.numel())
        order = [int(i) for i in share.argsort(descending=True, stable=True) if share[i] > 0]
        buffer = io.BytesIO()
        Image.fromarray(found.numpy().astype(np.uint8)).save(buffer, "png")
        return {"shares": {self.names[i]: float(share[i]) for i in order},
                "labels": list(self.names), "mask": base64.b64encode(buffer.getvalue()).decode()}

    def said(self, answer: Mapping[str, Any]) -> str:
        return ", ".join(f"{n} {v:.3f}" for n, v in answer["shares"].items())


def _around(middle: torch.Tensor, whole: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """(H, W) of `size`: the numbers of the middle that was cut out of a picture of `whole` pixels
    (or of what it was set into, where it is larger), IGNORED around it, to the nearest pixel."""
    canvas = torch.full(tuple(whole), IGNORED)
    here, there = [], []
    for inner, outer in zip(middle.shape, whole, strict=True):
        at = (outer - inner) // 2 if outer >= inner else -((inner - outer + 1) // 2)
        here.append(slice(max(0, at), min(outer, at + inner)))
        there.append(slice(max(0, -at), max(0, -at) + here[-1].stop - here[-1].start))
    canvas[tuple(here)] = middle[tuple(there)]
    return F.interpolate(canvas[None, None].double(), size=tuple(size), mode="nearest-exact"
                         )[0, 0].long()
