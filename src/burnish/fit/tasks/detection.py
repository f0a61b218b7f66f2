"""Objects in boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError, DataError
from ..boxes import assigned, average_precision, corners, overlap
from ..from_files import Kept, picture
from ..kinds import DETECTORS, FOCAL
from ..pictures import Picture, picture_of
from ..rows import Rows
from .base import Batch
from .named import Named

#: a picture's objects end here
NOTHING = -100
#: answers to people are at least so sure
SURE = 0.5
#: of the focal loss in a pairing: the weight of what is right, and what keeps a log finite
ALPHA, TINY = 0.25, 1e-8


class Found(Kept):
    """``pixel_values`` (C, H, W), ``labels`` and ``boxes``: middles and sizes over the picture's
    own, cut off at its edges."""

    def __init__(self, rows: Any, processor: Picture, most: int, where: Any):
        super().__init__(rows, where)
        self.processor, self.kinds, self.boxes = processor, rows["classes"][:], rows["boxes"][:]
        for i, kinds in enumerate(self.kinds):
            if len(kinds) > most:
                raise DataError(f"{self.where(i)}: {len(kinds)} objects, and the model tells "
                                f"{most} in a picture at most")

    def length(self, i: int) -> int:
        return len(self.kinds[i])

    def read(self, i: int) -> dict[str, Any]:
        image = picture(self.opened(i)["image"], self.where(i))
        wide, high = image.size
        x, y, w, h = torch.tensor(self.boxes[i], dtype=torch.float64).view(-1, 4).unbind(-1)
        ends = [x.clamp(0, wide) / wide, y.clamp(0, high) / high, (x + w).clamp(0, wide) / wide,
                (y + h).clamp(0, high) / high]
        if bool(((ends[2] <= ends[0]) | (ends[3] <= ends[1])).any()):
            raise DataError(f"{self.where(i)}: a box lies outside of the picture, which is {wide} "
                            f"x {high}")
        boxes = torch.stack([(ends[0] + ends[2]) / 2, (ends[1] + ends[3]) / 2, ends[2] - ends[0],
                             ends[3] - ends[1]], -1)
        return {"pixel_values": self.processor(image), "boxes": boxes.float(),
                "labels": torch.tensor(self.kinds[i], dtype=torch.long)}


class ObjectDetection(Named):
    """``pixel_values`` (B, C, H, W); ``labels`` (B, N), -100 behind a picture's objects, and
    ``boxes`` (B, N, 4), their middles and sizes over the picture's.

    A picture is squeezed into the model's size, or `resolution` each way, which no box minds that
    is told by shares of it.
    The loss is DETR's (Carion et al., 2020), with the weights of the model's config: every object
    has one of the model's queries, so that the costs of all are least (:func:`assigned`);
    cross-entropy over classes and "no object", the distance and the generalised overlap of boxes.
    Deformable and conditional DETR have each class by itself instead, under the focal loss
    (Lin et al., 2017), and its price in the pairing (Zhu et al., 2021).
    """

    metric = "map"
    greater_is_better = True
    smooths = False
    own_loss = True
    takes = ("image",)
    truth = ("labels", "boxes")
    settings = ("resolution",)

    def prepare(self) -> None:
        p = self.processor
        if not isinstance(p, Picture) and hasattr(p, "to_dict"):
            p = self.processor = picture_of(p.to_dict())
        if not isinstance(p, Picture):
            raise ConfigError(f"{type(p).__name__} is no image processor; give processor=")
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length} counts tokens, and a picture has none")

    # -- the model -----------------------------------------------------------------------------
    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        queries = getattr(config, "num_detection_tokens", getattr(config, "num_queries", None))
        if queries is None or getattr(config, "model_type", "") not in DETECTORS:
            raise ConfigError(f"{type(model).__name__} tells no boxes by queries; object detection "
                              "is served for YOLOS and DETR (also table, conditional and "
                              "deformable ones)")
        if getattr(config, "auxiliary_loss", False):
            config.auxiliary_loss = False
            self.notes.append("the config's auxiliary_loss is put to false: the last layer's loss "
                              "is learnt")
        self.config, self.queries = config, queries
        self.focal = config.model_type in FOCAL
        size = self.how.get("resolution") or getattr(config, "image_size", None) or (
            self.processor.height, self.processor.width)
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        self.processor = replace(self.processor, height=high, width=wide, crop=None)

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        return Found(self.data.splits[split], self.processor, self.queries,
                     self.data.where.get(split))

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]),
                "labels": pad_sequence([r["labels"] for r in rows], batch_first=True,
                                       padding_value=NOTHING),
                "boxes": pad_sequence([r["boxes"] for r in rows], batch_first=True)}

    def input(self, batch: Batch) -> Tensor:
        return batch["pixel_values"]

    # -- loss and figures ----------------------------------------------------------------------
    def logits(self, outputs: Any) -> Tensor:
        """(B, Q, C + 1 + 4): scores of the classes and of "no object", the box."""
        if isinstance(outputs, Tensor):
            return outputs
        return torch.cat([outputs["logits"], outputs["pred_boxes"]], -1).float()

    def right(self, truth: Any) -> Tensor:
        """(B, N, 5): the box and its class."""
        labels, boxes = (truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        return torch.cat([torch.as_tensor(boxes), torch.as_tensor(labels).unsqueeze(-1)], -1)

    def compared(self, told: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """(B, 5) of each picture: the weighted cross-entropy of its queries and their weights, the
        distances and the lacking overlaps of its boxes, and how many they are."""
        scores, said, c = told[..., :-4], told[..., -4:], self.config
        many, queries, there = labels.shape[1], told.shape[1], labels != NOTHING
        classes = labels.clamp(min=0)
        with torch.no_grad():
            far = (said.unsqueeze(2) - boxes.unsqueeze(1)).abs().sum(-1)
            near = overlap(corners(said).unsqueeze(2), corners(boxes).unsqueeze(1))[1]
            price = self.price(scores).gather(2, classes.unsqueeze(1).expand(-1, queries, -1))
            cost = c.bbox_cost * far + c.class_cost * price - c.giou_cost * near
            which = assigned(cost, there.sum(-1))
        wanted = torch.full((len(told), queries + 1), self.nothing, device=told.device)
        wanted = wanted.scatter(1, which, classes)[:, :queries]
        lost, weight = self.mistaken(scores, wanted)
        own = said.gather(1, which.clamp(max=queries - 1).unsqueeze(-1).expand(-1, many, 4))
        far = ((own - boxes).abs().sum(-1) * there).sum(-1)
        lacks = ((1 - overlap(corners(own), corners(boxes))[1]) * there).sum(-1)
        count = there.sum(-1).float()
        return torch.stack([lost, count if weight is None else weight, far, lacks, count], -1)

    @property
    def nothing(self) -> int:
        """The class of a query that has no object."""
        return len(self.names)

    def price(self, scores: Tensor) -> Tensor:
        """(B, Q, C), what it costs that a query has an object of a class."""
        if not self.focal:
            return -scores.softmax(-1)
        p = scores.sigmoid()
        return (ALPHA * (1 - p) ** 2 * -(p + TINY).log()
                - (1 - ALPHA) * p ** 2 * -(1 - p + TINY).log())

    def mistaken(self, scores: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,) the loss of the classes, and what it is divided by; None: by the objects."""
        c = self.config
        if not self.focal:
            weight = torch.where(wanted == self.nothing, float(c.eos_coefficient), 1.0)
            lost = F.cross_entropy(scores.transpose(1, 2), wanted, reduction="none") * weight
            return lost.sum(-1), weight.sum(-1)
        target = F.one_hot(wanted, self.nothing + 1)[..., :-1].to(scores.dtype)
        p = scores.sigmoid()
        off = p + target - 2 * p * target                   # 1 - p of what is right
        share = 1 - c.focal_alpha + (2 * c.focal_alpha - 1) * target
        lost = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        return (share * off ** 2 * lost).sum((1, 2)), None

    def total(self, sums: Tensor) -> Tensor:
        lost, weight, far, lacks, many = sums.sum(0).unbind()
        c, many = self.config, many.clamp(min=1)
        weight = many if self.focal else weight
        return lost / weight + (c.bbox_loss_coefficient * far
                                + c.giou_loss_coefficient * lacks) / many

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        return self.total(self.compared(self.logits(outputs), *labels))

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        """((B, Q, 6) corners, score and class of every query; (B, 5) as :meth:`compared`)."""
        labels, boxes = (truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        told = self.logits(outputs)
        return self.sorted(told), self.compared(told, labels, boxes)

    def sorted(self, told: Tensor) -> Tensor:
        scores = told[..., :-4]
        best = (scores.sigmoid() if self.focal else scores.softmax(-1)[..., :-1]).max(-1)
        return torch.cat([corners(told[..., -4:]), best.values.unsqueeze(-1),
                          best.indices.unsqueeze(-1)], -1)

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """COCO's average precision over the split: at half overlap, and the mean over overlaps from
        a half to 0.95."""
        said, right = list(torch.as_tensor(answers).double()), torch.as_tensor(labels).double()
        true = [torch.cat([corners(r[:, :4]), r[:, 4:]], -1) for r in
                (r[r[:, 4] >= 0] for r in right)]
        found = average_precision(said, true, len(self.names))
        return {"loss": float(self.total(torch.as_tensor(losses).double())),
                "map": sum(found.values()) / len(found), "map_50": found[0.5]}

    # -- answers to people ---------------------------------------------------------------------
    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed({"pixel_values": self.processor(row["image"])[None]})

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """objects: what is at least half sure, the surest first, with x, y, width and height in the
        picture's own pixels."""
        found = self.sorted(self.logits(model(**self.encode(row))))[0].cpu()
        wide, high = row["image"].size
        out = []
        for i in found[:, 4].argsort(descending=True, stable=True).tolist():
            x, y, right, below, score, kind = found[i].tolist()
            if score >= SURE:
                x, right = (min(max(v, 0.0), 1.0) * wide for v in (x, right))
                y, below = (min(max(v, 0.0), 1.0) * high for v in (y, below))
                out.append({"label": self.names[int(kind)], "score": score,
                            "box": [x, y, right - x, below - y]})
        return {"objects": out}

    def said(self, answer: Mapping[str, Any]) -> str:
        return "; ".join(f"{o['label']} ({o['score']:.3f}) at " + ", ".join(
            f"{v:.0f}" for v in o["box"]) for o in answer["objects"]) or "nothing"
