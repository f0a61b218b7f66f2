"""Forecast a series of another rhythm: PatchTST, learnt on one family of series, goes to another.

    python examples/series.py                 # under a minute

The series are synthesised: two periods, a drift and noise. Pre-training sees many of short periods;
the task has long ones, and few of them. Scores are mean squared errors of 16 values ahead, over
those of the last value said again (lower is better; 1 is to have learnt nothing).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transferred import compare, split, trained
from transformers import PatchTSTConfig, PatchTSTForPrediction

PAST, AHEAD = 64, 16
RECIPES = {"linear_probe": 1e-2, "norms": 3e-3, "lora(rank=8)": 3e-3,
           "houlsby(bottleneck=16)": 3e-3, "full": 1e-3}


def windows(count: int, periods: tuple[float, float], seed: int
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, PAST, 1) and (count, AHEAD, 1), which follow."""
    g = np.random.default_rng(seed)
    t = np.arange(PAST + AHEAD)
    rows = [g.uniform(0.5, 1.5) * np.sin(2 * np.pi * (t / g.uniform(*periods) + g.uniform()))
            + 0.5 * np.sign(np.sin(2 * np.pi * (t / g.uniform(*periods) + g.uniform())))
            + g.normal(0, 0.01) * t + 0.1 * g.standard_normal(len(t)) for _ in range(count)]
    x = torch.tensor(np.stack(rows), dtype=torch.float32).unsqueeze(-1)
    return x[:, :PAST], x[:, PAST:]


def made() -> PatchTSTForPrediction:
    return PatchTSTForPrediction(PatchTSTConfig(
        num_input_channels=1, context_length=PAST, prediction_length=AHEAD, patch_length=8,
        patch_stride=8, d_model=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=128,
        loss="mse", scaling="std", attention_dropout=0.0, ff_dropout=0.0, head_dropout=0.0))


def main(many: int = 4096, few: int = 256, epochs: int = 8, first: int = 6) -> dict[str, float]:
    def batches(rows: tuple[torch.Tensor, torch.Tensor], size: int) -> list[dict[str, Any]]:
        return [{"past_values": rows[0][i], "future_values": rows[1][i]}
                for i in split(len(rows[0]), size)]

    torch.manual_seed(0)
    base = trained(made(), batches(windows(many, (6, 14), 0), 64), 1e-3, first,
                   lambda model, b: model(**b).loss)
    learnt, (past, ahead) = windows(few, (18, 40), 1), windows(512, (18, 40), 2)
    nothing = (past[:, -1:] - ahead).square().mean()

    def error(model: nn.Module) -> float:
        said = model(past_values=past).prediction_outputs
        return float((said - ahead).square().mean() / nothing)

    with torch.no_grad():
        print(f"as it was pre-trained: {error(base.eval()):.4f}")
    return compare(lambda: copy.deepcopy(base), batches(learnt, 32), error, RECIPES, epochs=epochs,
                   word="error")


if __name__ == "__main__":
    main()
