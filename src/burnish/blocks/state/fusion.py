"""Plug-in fusion of two streams of as many tokens (audio and video) that a frozen network each has.

    a = P_a A,  v = P_v V                                    (T, h) each
    C = a W v^T                                              (T, T), rows of audio
    a~ = a^T softmax(C over audio) + a^T,   v~ = v^T softmax(C^T over video) + v^T     (h, T) each
    f = relu(LN(M [a~; v~]^T))                               (T, out)

A softmax runs over the tokens that are mixed, so that each of the others gets a mean of them.

Letters: B batch, T tokens, D width of a stream, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import DataError


class Fusion(nn.Module):
    """One layer of it: (B, T, out) of audio (B, T, D) and video (B, T, D').

    Projections as torch draws linears, W (hidden, hidden) Xavier-normal: (D + D' + 2) h + h^2 +
    2 h out + 3 out numbers, 492,224 at D = D' = 768. DataError for streams of unlike lengths.
    """

    def __init__(self, audio: int, video: int | None = None, *, hidden: int = 256, out: int = 64):
        super().__init__()
        self.audio, self.video = (nn.Linear(d, hidden) for d in (audio, video or audio))
        self.W = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, hidden)))
        self.mix, self.norm = nn.Linear(2 * hidden, out), nn.LayerNorm(out)

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        if audio.dim() != 3 or audio.shape[:2] != video.shape[:2]:
            raise DataError(f"two streams of {tuple(audio.shape)} and {tuple(video.shape)} are to "
                            "be fused; expected as many samples and tokens of both, (batch, "
                            "tokens, width)")
        a, v = self.audio(audio), self.video(video)
        C = a @ self.W @ v.mT
        of_a = C.softmax(-2).mT @ a + a                  # rows: what each token of video gets
        of_v = C.mT.softmax(-2).mT @ v + v
        return F.relu(self.norm(self.mix(torch.cat([of_a, of_v], -1))))


class Fused(nn.Module):
    """Several layers of it and a head: (B, classes), the mean over tokens of
    ``H drop(G [f_1; ..; f_L])``, G (out, L out), H (classes, out), with biases."""

    def __init__(self, layers: int, audio: int, video: int | None = None, *, classes: int = 2,
                 hidden: int = 256, out: int = 64, dropout: float = 0.5):
        super().__init__()
        self.layers = nn.ModuleList(Fusion(audio, video, hidden=hidden, out=out)
                                    for _ in range(layers))
        self.join, self.drop = nn.Linear(layers * out, out), nn.Dropout(dropout)
        self.head = nn.Linear(out, classes)

    def forward(self, audio: Sequence[Tensor], video: Sequence[Tensor]) -> Tensor:
        """Of the states of both streams, layer by layer."""
        if not len(audio) == len(video) == len(self.layers):
            raise DataError(f"{len(self.layers)} layers are to be fused, and {len(audio)} states of"
                            f" one stream and {len(video)} of the other are given")
        f = [layer(a, v) for layer, a, v in zip(self.layers, audio, video, strict=True)]
        logits: Tensor = self.head(self.drop(self.join(torch.cat(f, -1))))
        return logits.mean(1)
