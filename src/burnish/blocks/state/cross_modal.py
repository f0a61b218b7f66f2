"""A language model that foretells series: a branch of series beside one of words, which teaches it.

Letters: B windows, T steps that are read, H that are foretold, M series (the tokens), D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Foretold:
    """loss: None where nothing true was given. prediction_outputs: (B, H, M)."""

    loss: Tensor | None
    prediction_outputs: Tensor


def principal_words(table_VD: Tensor, count: int) -> Tensor:
    """(count, D): the scores of the D columns of a table of words on its first principal directions
    over the vocabulary. Each row's largest entry is positive, so a table gives the same everywhere.
    """
    if table_VD.device.type == "meta":
        return table_VD.new_empty(count, table_VD.shape[1])
    X_VD = table_VD.double() - table_VD.double().mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(X_VD.T @ X_VD)               # X^T = U S V^T: scores U S
    scores = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :count].T
    top = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    return (scores * torch.where(top < 0, -1.0, 1.0)).to(table_VD.dtype)


def shared_copy(module: nn.Module, own: Iterable[nn.Parameter]) -> nn.Module:
    """Other modules with the same parameters, but for copies of `own`."""
    fresh = {id(p) for p in own}
    memo: dict[int, Any] = {id(p): p for p in module.parameters() if id(p) not in fresh}
    return copy.deepcopy(module, memo)


class SeriesModel(nn.Module):
    """Windows (B, T, M) to what follows them, (B, H, M), through the blocks of a language model.

    body: a transformer that takes ``inputs_embeds`` and answers with all its hidden states.
    positions, norms: names of its tables of positions and of its norms' tensors.
    words: E (W, D), what the textual branch attends to.
    factors: of the textual branch's answer, and of the states.  decay: of a state, per block below
    the last.

    In training mode, where ``future_values`` are given, the textual branch runs as well: the same
    frozen tensors in modules of its own, with norms that stay and positions that train.
    """

    words: Tensor

    def __init__(self, body: nn.Module, words: Tensor, past: int, ahead: int, heads: int, *,
                 positions: Sequence[str], norms: Sequence[str], dropout: float,
                 factors: tuple[float, float], decay: float):
        super().__init__()
        width, of = words.shape[1], words.dtype
        self.past, self.ahead, self.factors, self.decay = past, ahead, factors, decay
        self.body = body
        like = {"dtype": of, "device": words.device}
        self.embed = nn.Linear(past, width, **like)
        self.mix = nn.TransformerEncoderLayer(width, heads, dropout=dropout, batch_first=True,
                                              **like)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True, **like)
        self.out = nn.Linear(width, ahead, **like)
        config: Any = body.config
        many = config.num_hidden_layers + 1
        self.time_states, self.text_states = (nn.ModuleList(
            nn.Linear(width, width, bias=False, **like) for _ in range(many)) for _ in range(2))
        self.register_buffer("words", words, persistent=False)
        own = [body.get_parameter(n) for n in (*positions, *norms)]
        text = shared_copy(body, own)
        self.text_positions = nn.ParameterList(text.get_parameter(n) for n in positions)
        self.text_norms = nn.ParameterList(text.get_parameter(n) for n in norms)
        self._text = (text,)                     # no child: a recipe is not to reach into it

    def train(self, mode: bool = True) -> SeriesModel:
        self._text[0].train(mode)
        return super().train(mode)

    def trains(self) -> list[nn.Parameter]:
        """All that is new, and both branches' positions."""
        parts = (self.embed, self.mix, self.attend, self.out, self.time_states, self.text_states,
                 self.text_positions)
        return [p for part in parts for p in part.parameters()]

    def _through(self, body: nn.Module, x_BMD: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """((B, H, M) in units of a standard window, all hidden states)."""
        got = body(inputs_embeds=x_BMD, output_hidden_states=True, use_cache=False)
        return self.out(got.last_hidden_state + x_BMD).transpose(1, 2), got.hidden_states

    def forward(self, past_values: Tensor, future_values: Tensor | None = None) -> Foretold:
        mean = past_values.mean(1, keepdim=True).detach()
        std = (past_values.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        x_BMT = ((past_values - mean) / std).transpose(1, 2)
        time_BMD = self.mix(self.embed(x_BMT))
        said, states = self._through(self.body, time_BMD)
        said = said * std + mean
        if future_values is None:
            return Foretold(None, said)
        loss = F.l1_loss(said, future_values)
        if self.training:
            loss = loss + self._taught(time_BMD, said, states, mean, std)
        return Foretold(loss, said)

    def _taught(self, time_BMD: Tensor, said: Tensor, states: Sequence[Tensor], mean: Tensor,
                std: Tensor) -> Tensor:
        """``c L1(y_time, y_text) + f sum_l decay^(last - l) L1(P_l h_l, P'_l h'_l)``."""
        E = self.words.expand(len(time_BMD), -1, -1)
        text_BMD, _ = self.attend(time_BMD, E, E, need_weights=False)
        other, others = self._through(self._text[0], text_BMD)
        answer, feature = self.factors
        total = answer * F.l1_loss(said, other * std + mean)
        last = len(states) - 1
        for k, (a, b, P, Q) in enumerate(zip(states, others, self.time_states, self.text_states,
                                             strict=True)):
            total = total + feature * self.decay ** (last - k) * F.l1_loss(P(a), Q(b))
        return total
