"""A small model that foretells series, drawn at random, and series of two columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAST, AHEAD = 32, 8


def made(kind: str = "PatchTST", seed: int = 0, channels: int = 2, **config: Any) -> Any:
    """`kind` is PatchTST or PatchTSMixer."""
    import torch
    import transformers

    torch.manual_seed(seed)
    body: dict[str, Any] = {"num_input_channels": channels, "context_length": PAST,
                            "prediction_length": AHEAD, "patch_length": 4, "patch_stride": 4,
                            "d_model": 32, "loss": "mse", "scaling": "std", "head_dropout": 0.0}
    body |= {"PatchTST": {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64},
             "PatchTSMixer": {"num_layers": 2, "dropout": 0.0}}[kind]
    config_class = getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}ForPrediction")(config_class(**(body | config)))


def written(path: Path, steps: int = 300, seed: int = 0, names: tuple[str, ...] = (), **how: Any
            ) -> Path:
    """A CSV of ``time,heat,flow``, an hour a row: two rhythms of 16 and 12 hours that lean on each
    other, in noise.  names: series of which each has rows of its own, in a column series_id.
    header: of the columns, where they are called otherwise."""
    from datetime import datetime, timedelta

    import numpy as np

    header = how.get("header", "time,heat,flow")
    lines = [f"series_id,{header}" if names else header]
    for k, name in enumerate(names or ("",)):
        g = np.random.default_rng((seed, k))
        t = np.arange(steps)
        a, b = (np.sin(2 * np.pi * (t / period + g.uniform())) for period in (16, 12))
        heat = 20 + 5 * a + 2 * b + 0.3 * g.standard_normal(steps)
        flow = 3 + 2 * b + 0.1 * g.standard_normal(steps)
        for i in range(steps):
            at = datetime(2024, 1, 1) + timedelta(hours=i)
            row = f"{at:%Y-%m-%d %H:%M},{heat[i]:.3f},{flow[i]:.3f}"
            lines.append(f"{name},{row}" if names else row)
    path.write_text("\n".join(lines) + "\n")
    return path
