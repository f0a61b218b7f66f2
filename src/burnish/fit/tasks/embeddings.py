"""Texts as directions: those that belong together close to each other, others apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...blocks.state.supervised import per_anchor
from ...blocks.state.twins import barlow
from ...core.errors import ConfigError, nearest
from ..places import config_of
from ..rows import Neighbours, Rows
from .base import Batch, flat
from .directions import Directions
from .textual import Textual

POOLINGS = ("mean", "cls", "last")
LOSSES = ("ranking", "triplet", "barlow", "supcon")
#: of barlow: lambda, and what is added to each variance
REDUNDANCY, EPS = 0.0051, 1e-5
#: anchors compared with all others at once
AT_ONCE = 1024


def pooled(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """(n, d) of length one, from the states (n, T, d) of tokens that count (n, T)."""
    if how == "mean":
        m = mask.unsqueeze(-1).to(states.dtype)
        found = (states * m).sum(1) / m.sum(1).clamp(min=1)
    else:
        places = torch.arange(mask.shape[1], device=mask.device) * mask
        at = mask.argmax(1) if how == "cls" else places.argmax(1)
        found = states[torch.arange(len(states), device=states.device), at]
    return F.normalize(found.float(), dim=-1)


def ranking(e: Tensor, scale: float, same: Tensor) -> Tensor:
    """(B,) losses of B anchors e_:,0 whose neighbours are e_:,1 and strangers e_:,2 where they are
    there: ``-log softmax(scale cos(a_i, .))_i`` over the neighbours and strangers of the batch
    (InfoNCE: van den Oord et al., 2018; multiple negatives ranking: Henderson et al., 2017).
    same (B, B): neighbours that are one text, and no stranger to each other's anchor."""
    others = e[:, 1:].transpose(0, 1).flatten(0, 1)                    # neighbours, then strangers
    scores = scale * e[:, 0] @ others.t()
    own = torch.arange(len(e), device=e.device)
    hidden = same.clone()
    hidden[own, own] = False
    scores[:, :len(e)] = scores[:, :len(e)].masked_fill(hidden, float("-inf"))
    return F.cross_entropy(scores, own, reduction="none")


def triplet(e: Tensor, margin: float, same: Tensor) -> Tensor:
    """(B,) losses ``max(|a - p|^2 - |a - n|^2 + margin, 0)`` of directions of length one (FaceNet:
    Schroff et al., 2015). n is e_:,2 where it is there, else the stranger among the batch's
    neighbours that is nearest to the anchor (Hermans et al., 2017); an anchor without one has
    nothing to lose."""
    near = 2 - 2 * (e[:, 0] * e[:, 1]).sum(-1)
    if e.shape[1] > 2:
        far = 2 - 2 * (e[:, 0] * e[:, 2]).sum(-1)
    else:
        own = torch.eye(len(e), dtype=torch.bool, device=e.device)
        apart = 2 - 2 * e[:, 0] @ e[:, 1].t()
        far = apart.masked_fill(same | own, float("inf")).amin(1)
    return (near - far + margin).clamp_min(0)


def twins(e: Tensor) -> Tensor:
    """(B,) times the loss of the batch, anchor and neighbour being two views of one thing:
    :func:`burnish.blocks.state.twins.barlow` over the width of an embedding. A row by itself, of
    which there is no correlation, has none."""
    if len(e) < 2:
        return 0 * e.sum((1, 2))
    return (barlow(e[:, 0], e[:, 1], REDUNDANCY, EPS) / e.shape[-1]).expand(len(e))


def classed(e: Tensor, scale: float, same: Tensor) -> Tensor:
    """(B,) the means of anchor's and neighbour's losses over all 2 B texts of a batch, where rows
    of one neighbour are a class (:func:`burnish.blocks.state.supervised.per_anchor`, L_out)."""
    first = same.to(torch.uint8).argmax(1)                  # the first row with this neighbour
    z = e[:, :2].transpose(0, 1).flatten(0, 1)
    return per_anchor(z, first.repeat(2), 1 / scale)[0].view(2, -1).mean(0)


class Embedding(Directions, Textual):
    """``input_ids``, ``attention_mask`` (B, K, T) of K texts a row, ``counted`` (B, K T) the mask,
    ``labels`` (B,) how near two are (1 where nobody says).

    Two texts, or three: the neighbours of a batch are ranked for each anchor (:func:`ranking`);
    `loss_type` "triplet", "barlow" or "supcon": :func:`triplet`, :func:`twins`, :func:`classed`.
    With a score: the square of ``cos - score``.
    """

    losses_known = LOSSES
    takes = ("text", "pair")
    truth = ("labels", "counted", "texts")
    settings = ("pooling", "scale", "loss_type", "gamma")

    def prepare(self) -> None:
        super().prepare()
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}"
                              f"{nearest(str(self.pooling), POOLINGS)}")
        if self.kind in ("barlow", "supcon") and any(
                "negative" in rows.column_names for rows in self.data.splits.values()):
            raise ConfigError(f"loss_type={self.kind!r} looks at two texts of one thing, and these "
                              "rows have a third text, negative, that it would not read")
        for split in self.data.splits:
            self.told_apart(split)

    def told_apart(self, split: str) -> None:
        """Raises DataError where rows without scores or strangers have one neighbour for all."""
        if not {"label", "negative"} & set(self.data.splits[split].column_names):
            self.data.several("pair", split)

    def unread(self) -> str:
        return "rows with a score learn the square of its distance from a cosine" if self.scored \
            else ""

    @property
    def pooling(self) -> str:
        return self.how.get("pooling", "mean")

    @property
    def scored(self) -> bool:
        return any("label" in rows.column_names for rows in self.data.splits.values())

    def load(self, name: str, trust_remote_code: bool = False, unread: bool = False, **kw: Any
             ) -> nn.Module:
        """The model without a pooler of its own, which nothing would read."""
        import transformers

        config = config_of(name, self.data.task, trust_remote_code)
        found = transformers.AutoModel._model_mapping.get(type(config), None)
        if found is not None and "add_pooling_layer" in inspect.signature(found).parameters:
            kw["add_pooling_layer"] = False
        return super().load(name, trust_remote_code, unread, **kw)

    def make(self, split: str) -> Rows:
        self.told_apart(split)
        made = Neighbours(self.data.splits[split], self.processor, self.max_length)
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        texts = [torch.tensor(t) for r in rows for t in r["texts"]]
        ids = pad_sequence(texts, batch_first=True, padding_value=self.processor.pad_token_id)
        mask = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        n, k = len(rows), len(rows[0]["texts"])
        return {"input_ids": ids.view(n, k, -1), "attention_mask": mask.view(n, k, -1),
                "labels": torch.tensor([float(r["labels"]) for r in rows]),
                "counted": mask.view(n, -1).clone(), "texts": ids.view(n, -1).clone()}

    def feed(self, batch: Batch) -> Batch:
        return flat(batch, batch["input_ids"].shape[1], self.truth)

    def logits(self, outputs: Any) -> Tensor:
        """The states of the tokens."""
        if isinstance(outputs, Tensor):
            return outputs
        return outputs[0] if isinstance(outputs, tuple) else outputs["last_hidden_state"]

    def right(self, truth: Any) -> Tensor:
        return torch.as_tensor(truth["labels"] if isinstance(truth, Mapping) else truth[0])

    def compared(self, states: Tensor, labels: Tensor, counted: Tensor, texts: Tensor
                 ) -> tuple[Tensor, Tensor]:
        """(embeddings (B, K, d), the loss of each row)."""
        n, T = len(labels), states.shape[1]
        e = pooled(states, counted.view(-1, T), self.pooling).view(n, -1, states.shape[-1])
        if self.scored:
            return e, ((e[:, 0] * e[:, 1]).sum(-1) - labels).square()
        near = texts.view(n, -1, T)[:, 1]
        same = (near.unsqueeze(0) == near.unsqueeze(1)).all(-1)
        if self.kind == "triplet":
            return e, triplet(e, self.margin, same)
        if self.kind == "barlow":
            return e, twins(e)
        made = classed if self.kind == "supcon" else ranking
        return e, made(e, self.scale, same)

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        return self.compared(self.logits(outputs), *labels)[1].mean()

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        truth = tuple(truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        e, losses = self.compared(self.logits(outputs), *truth)
        counts = torch.full_like(losses, float(self.kind != "barlow" or len(losses) > 1))
        return e, torch.stack([losses, counts], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """With scores, what regression tells of cosines and them; else, among all neighbours of the
        split, how often an anchor's own is the nearest, and the mean of one over its rank."""
        e = torch.as_tensor(answers)
        if self.scored:
            from .classes import regression

            return regression((e[:, 0] * e[:, 1]).sum(-1), torch.as_tensor(labels))
        ranks = []
        for start in range(0, len(e), AT_ONCE):
            cos = e[start:start + AT_ONCE, 0] @ e[:, 1].t()
            own = cos[torch.arange(len(cos)), torch.arange(start, start + len(cos))]
            near = (cos - own.unsqueeze(1)).abs() <= 1e-6
            better = (cos > own.unsqueeze(1)) & ~near
            rank = 1.0 + better.sum(1) + (near.sum(1) - 1) / 2        # of equal ones the middle
            ranks.append(torch.where(own.isfinite(), rank, float("inf")))
        rank = torch.cat(ranks).double()
        return {"recall_at_1": float((rank == 1).double().mean()), "mrr": float((1 / rank).mean())}

    # -- answers to people -------------------------------------------------------------------
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A text's direction, or how near two texts are."""
        coded = [self.processor(row[k], truncation=self.max_length is not None,
                                max_length=self.max_length)["input_ids"]
                 for k in self.takes if k in row]
        batch = self.together([{"texts": coded, "labels": 1.0}])
        states = self.logits(model(**self.feed(batch)))
        e = pooled(states, batch["counted"].view(len(coded), -1), self.pooling)
        return self.told_of(e)
