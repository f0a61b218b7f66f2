"""The closed form: what a transformer step keeps, written down instead of run.

Units are d*b bytes per token (d the width, b the bytes of an element), per block. Letters:
mu = mlp/width, g = key-value heads / heads, a = heads * keys / width (an attention matrix, which
only eager attention keeps). Statistics of the norms and the log-sum-exp of fused attention are
added in fp32. The forms describe stock PyTorch operators; `lean=True` is burnish's own tape, which
recomputes the outputs of norms and of the activation from inputs that are kept anyway.

They check the simulator, explain its figures, and stand in for it where a step cannot be simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, nearest


@dataclass(frozen=True)
class Block:
    """A pre-norm transformer block: norm, attention, residual, norm, MLP, residual.

    gated: SwiGLU with three matrices (eager: gate, its silu and up are kept), else two and a GELU.
    eager: attention that builds its matrix instead of a fused kernel.
    rms: RMSNorm (one statistic per token) instead of LayerNorm (two).
    """

    width: int
    mlp: int
    heads: int
    kv_heads: int | None = None
    gated: bool = False
    eager: bool = False
    rms: bool = False

    @property
    def mu(self) -> float:
        return self.mlp / self.width

    @property
    def g(self) -> float:
        return (self.kv_heads or self.heads) / self.heads

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of every linear: q, k, v, o and the MLP's."""
        d, m, kv = self.width, self.mlp, round(self.g * self.width)
        up = ((m, d),) * (2 if self.gated else 1)
        return ((d, d), (kv, d), (kv, d), (d, d), *up, (d, m))

    def frozen(self, keys: int) -> float:
        """Units kept when nothing in the block trains but gradients pass through it."""
        mlp = 3 * self.mu if self.gated else self.mu
        attention = self.heads * keys / self.width if self.eager else 1.0
        return 3 + 2 * self.g + attention + mlp

    def full(self, keys: int, lean: bool = False) -> float:
        """Units kept when every linear needs its input."""
        if lean:                              # norm outputs and the activation's are recomputed
            return self.frozen(keys) + (1 if self.eager else 0) - (self.mu if self.gated else 0)
        return self.frozen(keys) + 2 + self.mu + (1 if self.eager else 0)

    def statistics(self) -> float:
        """fp32 numbers per token: two norms, and the fused kernel's log-sum-exp."""
        return 2 * (1 if self.rms else 2) + (0 if self.eager else self.heads)


def _lora(b: Block, keys: int, s: dict[str, Any]) -> float:
    rank, lean = s.get("rank", 8), s.get("lean", False)
    which = s.get("on", "qkv")
    if which == "all" and s.get("dropout"):   # a dropped copy of every input, and its mask
        inputs = sum(i for _, i in b.matrices) / b.width
        return b.frozen(keys) + inputs * (1 + s.get("mask", 1.0)) + len(b.matrices) * rank / b.width
    if which == "all":
        return b.full(keys, lean) + len(b.matrices) * rank / b.width
    if which not in ("qkv", "qv", "q", "v"):
        raise ConfigError(f"no closed form for lora on {which!r}; known: qkv, qv, q, v, all")
    return b.frozen(keys) + (0 if lean else 1) + len(which) * rank / b.width


def _delta(b: Block, keys: int, s: dict[str, Any]) -> float:
    return b.full(keys, s.get("lean", False))


def _side(b: Block, keys: int, s: dict[str, Any]) -> float:
    r = s.get("reduction", 8)
    small = Block(b.width // r, b.mlp // r, b.heads, b.kv_heads, b.gated, b.eager, b.rms)
    tap = 1.0 if s.get("down", "trained") == "trained" else 0.0
    return tap + (small.full(keys) + 2) / r


def _adapters(b: Block, keys: int, s: dict[str, Any]) -> float:
    return b.frozen(keys) + s.get("count", 2) * (1 + s.get("rank", 8) / b.width)


#: row of the table -> units(block, keys, settings)
ROWS: dict[str, Callable[[Block, int, dict[str, Any]], float]] = {
    "below": lambda b, n, s: 0.0,
    "frozen": lambda b, n, s: b.frozen(n),
    "bitfit": lambda b, n, s: b.frozen(n),
    "full": lambda b, n, s: b.full(n, s.get("lean", False)),
    "lora": _lora,
    "lora_fa": lambda b, n, s: b.frozen(n) + len(b.matrices) * s.get("rank", 8) / b.width,
    "delta": _delta,
    "delta_naive": _delta,
    "adapters": _adapters,
    "parallel_adapter": lambda b, n, s: _adapters(b, n, {**s, "count": 1}),
    "vpt": lambda b, n, s: b.frozen(n + s.get("prompts", 10)) * (1 + s.get("prompts", 10) / n),
    "ia3": lambda b, n, s: b.frozen(n) + 2 * b.g + b.mu,
    "lst": _side,
    "meft": lambda b, n, s: 2 / s["anchors"] if s.get("anchors") else 0.0,
    "checkpoint": lambda b, n, s: 1.0,
    "offload": lambda b, n, s: 0.0,
    "few_bit": lambda b, n, s: b.frozen(n) - b.mu * (1 - s.get("bits", 4) / 8 / s["itemsize"]),
    "wta_crs": lambda b, n, s: b.frozen(n) + s.get("keep", 0.3) * (b.full(n) - b.frozen(n)),
}

#: rows whose own statistics are not those of a block on the tape
_NO_STATISTICS = frozenset({"below", "meft", "checkpoint", "offload"})


def kept_bytes(block: Block, row: str, tokens: int, keys: int, itemsize: int,
               **settings: Any) -> float:
    """Bytes one block keeps for backward over `tokens` tokens of `keys`-long sequences.

    row: a method of the table (:data:`ROWS`). settings: rank, on, reduction, prompts, lean, dropout
    (before every lora of on="all"; mask: bytes of its mask over those of an element)...
    """
    if row not in ROWS:
        raise ConfigError(f"no closed form for {row!r}{nearest(row, ROWS)}")
    units = ROWS[row](block, keys, {**settings, "itemsize": itemsize})
    total = tokens * units * block.width * itemsize
    if row not in _NO_STATISTICS:
        total += tokens * 4 * block.statistics()
    if row == "delta_naive":                  # the merged weights wait until backward
        total += itemsize * sum(o * i for o, i in block.matrices)
    return total


@dataclass(frozen=True)
class Prediction:
    """The closed form's peak and its parts, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float

    @property
    def peak(self) -> float:
        return (self.weights + self.gradients + self.optimizer + self.activations
                + self.temporary)


def predict(block: Block, blocks: int, row: str, *, parameters: int, trainable: int, batch: int,
            tokens: int, itemsize: int = 4, weight_bits: float | None = None,
            state_bytes: float | None = None, gradient_bytes: float | None = None,
            classes: int = 0, loss_tokens: int | None = None, checkpoint: bool = False,
            **settings: Any) -> Prediction:
    """Peak of a step by the closed form: weights + trainable * (gradient + state) + what the
    blocks keep + one live block + loss.

    parameters, trainable: entries of the whole model, and of those that train.
    batch, tokens: sequences, and tokens of each. itemsize: bytes of an element.
    weight_bits: bits per frozen weight as held (4.127 for NF4 with double quantisation).
    state_bytes, gradient_bytes: per trainable entry; AdamW keeps two more of the same dtype.
    classes: outputs of the head, at `loss_tokens` positions (default one per sequence).
    checkpoint: every block keeps its input only and is rebuilt in backward.
    """
    n = batch * (tokens + (settings.get("prompts", 10) if row == "vpt" else 0))
    held = parameters - trainable
    weights = held * (weight_bits / 8 if weight_bits else itemsize) + trainable * itemsize
    one = kept_bytes(block, row, batch * tokens, tokens, itemsize, **settings)
    kept = n * block.width * itemsize if checkpoint else one
    positions = batch if loss_tokens is None else loss_tokens
    loss = positions * classes * (2 * itemsize + 8)
    transient = (2 * block.mu + 2) * block.width * itemsize * n
    return Prediction(
        weights=weights,
        gradients=trainable * (itemsize if gradient_bytes is None else gradient_bytes),
        optimizer=trainable * (2 * itemsize if state_bytes is None else state_bytes),
        activations=blocks * kept + loss,
        temporary=transient + (one if checkpoint or row in ("meft", "offload") else 0.0),
    )
