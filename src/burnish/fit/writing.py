"""What a model writes, token by token, the likeliest each time, for many rows at once.

The same loop answers people and makes the figures of an evaluation, whose memory is promised: its
longest answer is rehearsed as the first and the last of its steps, between which states of tokens
only gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: what stands behind the end of an answer
NOTHING = -100


@dataclass(frozen=True)
class Pen:
    """How answers are written.

    most: tokens of the longest one, its end among them. end: the token that ends it. never: tokens
    that are not written, and first: not as the first. ids: what the model calls the tokens so far.
    after: what it takes, instead of what it has seen, once it has answered.  states: what keeps the
    states of tokens, where the model does not make it itself.
    """

    most: int
    end: int
    never: Sequence[int] = ()
    first: Sequence[int] = ()
    ids: str = "decoder_input_ids"
    after: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] = field(
        default=lambda out, seen: seen)
    states: Callable[[], Any] = lambda: None


@torch.no_grad()
def written(model: Any, seen: Mapping[str, Any], start: Tensor, pen: Pen, longest: bool = False
            ) -> Tensor:
    """(B, most) tokens behind `start` (B, P), NOTHING from their end on.

    seen: what the model is called with beside the tokens.  longest: nothing is written: the first
    step, and the last of an answer that does not end.
    """
    given, states, ids = dict(seen), pen.states(), start
    out = torch.full((len(start), pen.most), NOTHING, dtype=torch.long, device=start.device)
    done = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for at in range(pen.most):
        if longest and 0 < at < pen.most - 1:
            continue
        if longest and at > 1:
            _lengthen(states, at - 1)
        made = model(**given, **{pen.ids: ids}, past_key_values=states, use_cache=True)
        given, states = dict(pen.after(made, given)), made.get("past_key_values", states)
        scores = made["logits"][:, -1].float()
        if never := [*pen.never, *(pen.first if at == 0 else ())]:
            scores[:, never] = float("-inf")
        found = scores.argmax(-1)
        done = done | (found == pen.end)
        out[:, at] = torch.where(done, NOTHING, found)
        ids = torch.where(done, pen.end, found).unsqueeze(1)
        if not longest and bool(done.all()):
            break
    return out


def _lengthen(states: Any, many: int) -> None:
    """As if so many tokens more had been read."""
    own = getattr(states, "self_attention_cache", states)
    for number, layer in enumerate(own.layers):
        k, v = (t[:, :, :1].expand(-1, -1, many, -1) for t in (layer.keys, layer.values))
        own.update(k, v, number)


def after_encoder(out: Any, seen: Mapping[str, Any]) -> Mapping[str, Any]:
    """An encoder-decoder looks at its input once."""
    from transformers.modeling_outputs import BaseModelOutput

    kept = {k: v for k, v in seen.items() if k in ("attention_mask", "encoder_outputs")}
    return {"encoder_outputs": BaseModelOutput(
        last_hidden_state=out["encoder_last_hidden_state"])} | kept


def after_picture(out: Any, seen: Mapping[str, Any], begun: int) -> Mapping[str, Any]:
    """A decoder of text and patches in one sequence has the picture among its states; texts count
    their places by themselves. begun: tokens of the prompt."""
    at = seen.get("position_ids")
    return {"position_ids": torch.full((1, 1), begun, device=out["logits"].device)
            if at is None else at + 1}


@contextmanager
def seen_once(encoder: nn.Module) -> Iterator[None]:
    """Inside, an encoder answers the first call, and every other with the same: for models whose
    forward looks at the picture again for each token."""
    own, beside = encoder.forward, "forward" in vars(encoder)
    kept: list[Any] = []

    def forward(*args: Any, past_key_values: Any = None, use_cache: Any = None, **kw: Any) -> Any:
        if not kept:
            kept.append(own(*args, **kw))
        return kept[0]

    encoder.forward = forward                            # type: ignore[method-assign]
    try:
        yield
    finally:
        if beside:
            encoder.forward = own                        # type: ignore[method-assign]
        else:
            del encoder.forward
