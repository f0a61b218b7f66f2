"""Pictures and texts in one space: those that belong together close to each other, others apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError
from .. import words
from ..captioned import Captions, pair
from ..kinds import SIGMOID
from ..rows import Rows, cut
from .base import Batch, Task

#: texts or pictures compared with all others at once
AT_ONCE = 1024


def contrast(scores: Tensor, same: Tensor, sigmoid: bool) -> Tensor:
    """(B,) losses of B pairs: scores (B, B) of text i with picture j; `same` (B, B): whether text j
    is text i, whose pictures are then no strangers to each other.

    The mean of ``-log softmax(scores_i,:)_i`` and ``-log softmax(scores_:,i)_i`` (CLIP: Radford et
    al., 2021); or ``-sum_j log s(z_ij scores_ij)``, z 1 where i = j and else -1 (SigLIP: Zhai et
    al., 2023), over the j that are i or no stranger's.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    hidden = same & ~own
    if sigmoid:
        apart = torch.where(own, 1.0, -1.0)
        return -F.logsigmoid(apart * scores).masked_fill(hidden, 0.0).sum(-1)
    scores = scores.masked_fill(hidden, float("-inf"))
    at = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, at, reduction="none")
            + F.cross_entropy(scores.t(), at, reduction="none")) / 2


class ImageTextContrastive(Task):
    """``pixel_values`` (B, C, H, W), ``input_ids`` (B, T) (and ``attention_mask``, where the
    tokenizer makes one), ``texts`` (B, T) the ids once more, by which equal texts are known.

    The loss is that of the model's kind (:func:`contrast`) over the pairs of a batch; the model's
    own scale (and bias) of the cosines is used, and learnt where the recipe lets it.
    """

    metric = "recall_at_1"
    greater_is_better = True
    unlike = True
    smooths = False
    own_loss = True
    alone = False                                # a pair is told apart from the others of its batch
    takes = ("image", "text")
    truth = ("texts",)

    def prepare(self) -> None:
        self.processor = pair(self.processor, self.data.task)
        t = self.processor.tokenizer
        if t.pad_token_id is None:
            raise ConfigError("the tokenizer has no padding token, so texts cannot be put "
                              "together; set tokenizer.pad_token")
        self.data.several("text")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        text = getattr(config, "text_config", None)
        if text is None or getattr(config, "model_type", None) is None:
            raise ConfigError(f"{type(model).__name__} is no pair of towers for pictures and "
                              "texts, such as CLIP or SigLIP")
        t = self.processor.tokenizer
        self.sigmoid = config.model_type in SIGMOID
        if len(t) > text.vocab_size:
            raise ConfigError(f"the tokenizer writes {len(t)} tokens and {type(model).__name__} "
                              f"knows {text.vocab_size}: they do not belong together")
        self.notes += words.agree(model, t)
        places = text.max_position_embeddings
        if self.max_length is not None and self.max_length > places:
            raise ConfigError(f"max_length={self.max_length} is more than the {places} positions "
                              f"that {type(model).__name__} has")
        if self.sigmoid and self.max_length not in (None, places):
            raise ConfigError(f"max_length={self.max_length}: {type(model).__name__} reads texts "
                              f"that are filled up to {places} tokens; leave it out")
        self.max_length = min(self.max_length or places, places)
        vision = getattr(config, "vision_config", None)
        side = getattr(vision, "image_size", None)
        made = self.processor.picture
        if isinstance(side, int) and (made.height, made.width) != (side, side):
            raise ConfigError(f"{type(model).__name__} reads pictures of {side} x {side}, and its "
                              f"processor makes them {made.width} x {made.height}; give the "
                              "processor= that belongs to the model")

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        self.data.several("text", split)
        rows = self.data.splits[split]
        coded = self.processor.tokenizer(rows["text"][:], truncation=True,
                                         max_length=self.max_length)
        self.notes += [f"{split}: {n}" for n in cut(coded, self.max_length, "texts")]
        return Captions(rows, self.processor, coded["input_ids"], self.data.where.get(split))

    def read(self, ids: Sequence[Sequence[int]]) -> Batch:
        """Texts side by side: SigLIP's filled up to all places, as it was trained."""
        t = self.processor.tokenizer
        rows = [torch.tensor(i) for i in ids]
        made = {"input_ids": pad_sequence(rows, batch_first=True, padding_value=t.pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(r) for r in rows],
                                               batch_first=True)}
        if self.sigmoid:
            more = int(self.max_length or 0) - made["input_ids"].shape[1]
            made = {"input_ids": F.pad(made["input_ids"], (0, more), value=t.pad_token_id)}
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        made = self.read([r["ids"] for r in rows])
        return made | {"pixel_values": torch.stack([r["pixel_values"] for r in rows]),
                       "texts": made["input_ids"].clone()}

    # -- loss and figures ----------------------------------------------------------------------
    def logits(self, outputs: Any) -> Tensor:
        """(B, B + 2 d): the scores of each text with every picture, the text's direction, the
        picture's."""
        if isinstance(outputs, Tensor):
            return outputs
        return torch.cat([outputs["logits_per_text"], outputs["text_embeds"],
                          outputs["image_embeds"]], 1).float()

    def right(self, truth: Any) -> Tensor:
        """A pair is right as it stands: there is nothing to say of it, 0 for each."""
        texts = truth["texts"] if isinstance(truth, Mapping) else \
            truth[0] if isinstance(truth, tuple | list) else truth
        return torch.zeros(len(texts))

    def compared(self, logits: Tensor, texts: Tensor) -> Tensor:
        same = (texts.unsqueeze(0) == texts.unsqueeze(1)).all(-1)
        return contrast(logits[:, :len(texts)], same, self.sigmoid)

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        texts = labels[0] if isinstance(labels, tuple | list) else labels
        return self.compared(self.logits(outputs), texts).mean()

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        texts = truth["texts"] if isinstance(truth, Mapping) else \
            truth[0] if isinstance(truth, tuple | list) else truth
        logits = self.logits(outputs)
        losses = self.compared(logits, texts)
        return logits[:, len(texts):].unflatten(1, (2, -1)), \
            torch.stack([losses, torch.ones_like(losses)], -1)

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """Among all of the split: how often a text of a picture is the nearest, or among the five
        nearest (``text_recall``), and a picture of a text (``image_recall``); equal texts are one,
        and all its pictures are right. ``recall_at_1`` is the mean of the two ways."""
        assert isinstance(rows, Captions)
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        e = torch.as_tensor(answers).float()
        numbers = {t: k for k, t in enumerate(dict.fromkeys(rows.texts))}
        which = torch.tensor([numbers[t] for t in rows.texts])
        first = torch.tensor([rows.texts.index(t) for t in numbers])
        texts = ranks(e[:, 1], e[first, 0], which, torch.arange(len(first)))
        pictures = ranks(e[first, 0], e[:, 1], torch.arange(len(first)), which)
        found = {f"{name}_recall_at_{k}": float((r <= k).double().mean())
                 for name, r in (("text", texts), ("image", pictures)) for k in (1, 5)}
        mean = (found["text_recall_at_1"] + found["image_recall_at_1"]) / 2
        return {"loss": total / max(count, 1.0), "recall_at_1": mean, **found}

    # -- answers to people ---------------------------------------------------------------------
    def directions(self, model: nn.Module, images: Sequence[Any], texts: Sequence[str]
                   ) -> tuple[Tensor, Tensor]:
        """(pictures (N, d), texts (M, d)), one at a time, so that no more is held than in a step
        of one row."""
        t, made = self.processor.tokenizer, ([], [])
        coded = t(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        for i in range(max(len(images), len(texts))):
            batch = self.read([coded[min(i, len(texts) - 1)]]) | {
                "pixel_values": self.processor.picture(images[min(i, len(images) - 1)])[None]}
            out = model(**self.agreed(batch))
            for here, key in zip(made, ("image_embeds", "text_embeds"), strict=True):
                here.append(out[key][0].float())
        return torch.stack(made[0][:len(images)]), torch.stack(made[1][:len(texts)])

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Of a picture the texts, of a text the pictures, the nearest first; of one of each their
        cosine. The others are in the row's ``among``: what each is called -> itself."""
        among = row.get("among")
        if among is None:
            pictures, texts = self.directions(model, [row["image"]], [row["text"]])
            return {"cosine": float(pictures[0] @ texts[0])}
        if "image" in row:
            pictures, texts = self.directions(model, [row["image"]], list(among.values()))
            cosines = texts @ pictures[0]
        else:
            opened = [v() for v in among.values()]
            pictures, texts = self.directions(model, opened, [row["text"]])
            cosines = pictures @ texts[0]
        names = list(among)
        order = cosines.argsort(descending=True, stable=True).tolist()
        return {"nearest": {names[i]: float(cosines[i]) for i in order}}

    def said(self, answer: Mapping[str, Any]) -> str:
        if "cosine" in answer:
            return f"{answer['cosine']:.4f}"
        return ", ".join(f"{n} ({v:.4f})" for n, v in list(answer["nearest"].items())[:5])


def ranks(asked: Tensor, among: Tensor, right: Tensor, whose: Tensor) -> Tensor:
    """(N,) the rank of the nearest right one, 1 the first: `asked` (N, d) of number `right`,
    `among` (M, d) of number `whose`. One that is as near as a wrong one stands behind it."""
    found = []
    for at in range(0, len(asked), AT_ONCE):
        cos = asked[at:at + AT_ONCE] @ among.t()
        good = right[at:at + AT_ONCE, None] == whose
        best = cos.masked_fill(~good, float("-inf")).amax(1, keepdim=True)
        ahead = (cos >= best - 1e-6) & ~good
        found.append(torch.where(best[:, 0].isfinite(), 1 + ahead.sum(1), len(among) + 1))
    return torch.cat(found)
