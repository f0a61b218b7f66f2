"""The mask of what a text names."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError, DataError
from .. import masks, words
from ..captioned import Captioned, pair
from ..from_files import Kept, picture
from ..rows import Rows, cut
from .base import Batch, Task


def wanted(mask: Any) -> np.ndarray:
    """(H, W) of 0 and 255: what is not nought is what the text names. Raises ValueError for a mask
    of more than one number beside nought."""
    found = masks.numbers(mask)
    if len(kinds := sorted(set(np.unique(found).tolist()) - {0})) > 1:
        raise ValueError(f"its mask holds {', '.join(map(str, kinds[:4]))} beside 0, and one text "
                         "names one thing: save a mask for each text, or learn classes with "
                         "task='semantic-segmentation'")
    return ((found > 0) * 255).astype(np.uint8)


class Named(Kept):
    """``pixel_values`` (C, H, W), ``labels`` (H, W) of 0 and 1, ``ids``, the tokens of a text."""

    def __init__(self, rows: Any, processor: Captioned, ids: Sequence[Sequence[int]],
                 where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.processor, self.ids = processor, ids

    def length(self, i: int) -> int:
        return len(self.ids[i])

    def read(self, i: int) -> dict[str, Any]:
        from PIL import Image

        row, at, reads = self.opened(i), self.where(i), self.processor.picture
        image, mask = picture(row["image"], at), picture(row["mask"], at)
        if mask.size != image.size:
            raise DataError(f"{at}: the mask is {mask.width} x {mask.height}, and its picture "
                            f"{image.width} x {image.height}")
        try:
            made = Image.fromarray(wanted(mask))
        except ValueError as e:
            raise DataError(f"{at}: {e}") from None
        near = np.array(reads.placed(made, 0))                          # to the nearest pixel
        return {"pixel_values": reads(image), "ids": self.ids[i],
                "labels": torch.from_numpy((near > 0).astype(np.float32))}


class TextSegmentation(Task):
    """``pixel_values`` (B, C, H, W), ``input_ids`` and ``attention_mask`` (B, T), ``labels``
    (B, H, W), 1 where the picture shows what the text names. The loss is the model's own, the mean
    binary cross-entropy of the pixels; what a recipe adds to it (`tunevlseg`'s Dice) comes on top.
    """

    metric = "dice"
    greater_is_better = True
    unlike = True
    smooths = False
    heavy = True
    takes = ("image", "text")

    def prepare(self) -> None:
        self.processor = pair(self.processor, self.data.task)
        if self.processor.tokenizer.pad_token_id is None:
            raise ConfigError("the tokenizer has no padding token, so texts cannot be put "
                              "together; set tokenizer.pad_token")
        if self.processor.picture.crop is not None:
            raise ConfigError("the image processor cuts the margins of a picture off, and a mask "
                              "is of all of it; give processor= with one that resizes only")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        name, config = type(model).__name__, getattr(model, "config", None)
        if name != "CLIPSegForImageSegmentation":
            raise ConfigError(f"{name} draws no mask of what a text names; text segmentation is "
                              "served for CLIPSegForImageSegmentation")
        text, patch, t = config.text_config, config.vision_config.patch_size, \
            self.processor.tokenizer
        if len(t) > text.vocab_size:
            raise ConfigError(f"the tokenizer writes {len(t)} tokens and {name} knows "
                              f"{text.vocab_size}: they do not belong together")
        self.notes += words.agree(model, t)
        places, made = text.max_position_embeddings, self.processor.picture
        if self.max_length is not None and self.max_length > places:
            raise ConfigError(f"max_length={self.max_length} is more than the {places} positions "
                              f"that {name} has")
        self.max_length = min(self.max_length or places, places)
        if made.height != made.width or made.height % patch:
            raise ConfigError(f"{name} draws squares of a multiple of {patch}, and its processor "
                              f"makes pictures of {made.width} x {made.height}")

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        coded = self.processor.tokenizer(rows["text"][:], truncation=True,
                                         max_length=self.max_length)
        self.notes += [f"{split}: {n}" for n in cut(coded, self.max_length, "texts")]
        return Named(rows, self.processor, coded["input_ids"], self.data.where.get(split))

    def read(self, ids: Sequence[Sequence[int]]) -> Batch:
        rows = [torch.tensor(i) for i in ids]
        pad = self.processor.tokenizer.pad_token_id
        return {"input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence([torch.ones_like(r) for r in rows],
                                               batch_first=True)}

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.read([r["ids"] for r in rows]) | {
            k: torch.stack([r[k] for r in rows]) for k in ("pixel_values", "labels")}

    # -- loss and figures ----------------------------------------------------------------------
    def loss(self, outputs: Any, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logits(outputs), labels)

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        """((B, 3) pixels that are hit, said, true; (B, 2) the losses and how many)."""
        right, logits = self.right(truth), self.logits(outputs).float()
        sums = F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
        said, true = (logits > 0).flatten(1), (right > 0.5).flatten(1)
        rows = torch.stack([(said & true).sum(-1), said.sum(-1), true.sum(-1)], -1)
        sums = sums.flatten(1).sum(-1)
        return rows, torch.stack([sums, torch.full_like(sums, float(said.shape[1]))], -1)

    def told(self, labels: Tensor) -> Tensor:
        """(B,): the masks themselves would fill the memory, and figures are of counts."""
        return labels.flatten(1).sum(-1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """``dice``: 2 hit / (said + true) of a row, 1 where neither is anything, the mean of rows;
        ``iou``: hit / (said or true), over the pixels of all rows together."""
        hit, said, true = torch.as_tensor(answers).double().unbind(-1)
        both = said + true
        dice = torch.where(both > 0, 2 * hit / both.clamp(min=1), 1.0)
        return {"dice": float(dice.mean()),
                "iou": float(hit.sum() / (both - hit).sum().clamp(min=1))}

    # -- answers to people ---------------------------------------------------------------------
    def encode(self, row: Mapping[str, Any]) -> Batch:
        t = self.processor.tokenizer
        ids = t([row["text"]], truncation=True, max_length=self.max_length)["input_ids"]
        return self.agreed(self.read(ids) | {
            "pixel_values": self.processor.picture(row["image"])[None]})

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """shares: of the picture that is what the text names; mask: a PNG of the picture's size,
        in base64, 1 there and else 0."""
        from PIL import Image

        image = row["image"]
        logits = self.logits(model(**self.encode(row))).float()
        found = F.interpolate(logits[:, None], size=image.size[::-1], mode="bilinear",
                              align_corners=False)[0, 0] > 0
        buffer = io.BytesIO()
        Image.fromarray(found.cpu().numpy().astype(np.uint8)).save(buffer, "png")
        return {"shares": {row["text"]: float(found.double().mean())},
                "labels": ["", row["text"]],
                "mask": base64.b64encode(buffer.getvalue()).decode()}

    def said(self, answer: Mapping[str, Any]) -> str:
        return ", ".join(f"{share:.3f} of the picture" for share in answer["shares"].values())

    def parted(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
        share = float((wanted(row["mask"]) > 0).mean())
        return ({"image": row["image"], "text": row["text"]}, row["text"],
                self.said({"shares": {row["text"]: share}}))
