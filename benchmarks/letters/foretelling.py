"""A language model that foretells series (CALF), beside a line and the last value again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .letter import Row

#: series: steps read and foretold, the part that trains, batches of 32 windows, rate
PAST, AHEAD, TRAIN, UPDATES, RATE = 24, 6, 0.7, 100, 2e-3
SMALL = f"past={PAST}, horizon={AHEAD}, depth_kept=3, components=32, series_heads=4, rank=4"
CALF, ALONE = f"calf({SMALL})", f"calf({SMALL}, consistency=0.0, feature=0.0)"
MADE, STOCKS = "series that are made: two waves and noise", "monthly logarithms of seven prices"


def waves() -> Any:
    """(400, 6): each a mix of two waves and noise."""
    import numpy as np

    g, t = np.random.default_rng(0), np.arange(400)[:, None]
    two = [g.uniform(0.5, 1.5, 6) * np.sin(2 * np.pi * (t / p + g.uniform(0, 1, 6)))
           for p in (12, 30)]
    return two[0] + two[1] + 0.3 * g.standard_normal((400, 6))


def stocks() -> Any:
    """(months, 7): logarithms of prices that matplotlib ships, from 1990."""
    import csv

    import matplotlib
    import numpy as np

    file = Path(matplotlib.get_data_path()) / "sample_data" / "Stocks.csv"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    months = [r for r in csv.DictReader(lines) if r["Date"].endswith("-01") and r["IBM"]]
    whole = [k for k in months[0] if k != "Date" and all(r[k] for r in months)]
    return np.log([[float(r[k]) for k in whole] for r in months])


def windows(series: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((past, future) that train, the same of tests), in units of what trains."""
    import torch

    x = torch.tensor(series, dtype=torch.float32)
    cut = int(TRAIN * len(x))
    x = (x - x[:cut].mean(0)) / x[:cut].std(0)
    every = x.unfold(0, PAST + AHEAD, 1).transpose(1, 2)         # (windows, steps, series)
    train, test = every[:cut - PAST - AHEAD + 1], every[cut - PAST:]
    return tuple((w[:, :PAST], w[:, PAST:]) for w in (train, test))  # type: ignore[return-value]


def linear(train: tuple[Any, Any], past: Any) -> Any:
    """One least-squares line for all series, of windows scaled as CALF scales them."""
    import torch

    def scaled(x: Any) -> tuple[Any, Any]:
        return x.mean(1, keepdim=True), (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    m, s = scaled(train[0])
    X, Y = (((w - m) / s).transpose(1, 2).flatten(0, 1) for w in train)
    W = torch.linalg.lstsq(torch.cat([X, torch.ones(len(X), 1)], 1), Y).solution
    m, s = scaled(past)
    x = ((past - m) / s).transpose(1, 2)
    return torch.cat([x, torch.ones(*x.shape[:2], 1)], -1).matmul(W).transpose(1, 2) * s + m


def foretold(base: Any, how: str, train: tuple[Any, Any], past: Any) -> tuple[Any, int]:
    """(what CALF of this base says after training, numbers that train)."""
    import torch

    import burnish

    torch.manual_seed(0)
    part = burnish.parse(how)[0]
    model = part.lifecycle(base)
    tuned = burnish.tune(model, part.recipe(model), head=False, seed=0)
    optimizer = tuned.optimizer(lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / UPDATES)
    model.train()
    draw = torch.Generator().manual_seed(0)
    for _ in range(UPDATES):
        some = torch.randint(len(train[0]), (32,), generator=draw)
        tuned.step({"past_values": train[0][some], "future_values": train[1][some]})
        schedule.step()
    model.eval()
    with torch.no_grad():
        return model(past).prediction_outputs, sum(p.numel() for p in tuned.parameters())


def rows(base: Any) -> Iterator[Row]:
    import torch
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    fresh = GPT2LMHeadModel(base.config).eval()
    for table, data in ((MADE, waves()), (STOCKS, stocks())):
        train, (past, true) = windows(data)
        said: dict[str, tuple[Any, int | None]] = {
            "*the last value again*": (past[:, -1:].expand_as(true), None),
            "*a line by least squares*": (linear(train, past), (PAST + 1) * AHEAD)}
        for how, body in ((CALF, base), (ALONE, base), (f"{CALF}, of an untaught model", fresh)):
            said[how] = foretold(body, how.partition(", of")[0], train, past)
        for how, (y, trained) in said.items():
            yield {"table": table, "how": how, "mse": round(float((y - true).square().mean()), 4),
                   "mae": round(float((y - true).abs().mean()), 4),
                   **({} if trained is None else {"trained": trained})}
