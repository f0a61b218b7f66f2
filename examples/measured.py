"""Several classes, or a number, of what is no text: sounds, clouds of points, graphs.

    python examples/measured.py [TASK ...]        # all six; half a minute each

audio-multi-label: which notes a chord has. audio-regression: how high a tone is, in octaves.
cloud-multi-label: which solids stand in one cloud. cloud-regression: how flat a ball is.
graph-multi-label: what is in a molecule. graph-regression: how many bonds of two kinds it has.
All are drawn, and so are the models: nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from taught import taught

from burnish.testing import own, sounds
from burnish.testing.graphs import molecules
from burnish.testing.points import surfaces

NOTES = {"c": 262, "e": 330, "g": 392, "b": 494}
SOLIDS = ("sphere", "saddle", "torus")


def heard(path: Path, several: bool, g: np.random.Generator) -> Any:
    t = np.arange(3200) / 8000
    chord = [n for n in NOTES if g.random() < 0.5] if several else []
    up = g.uniform(-1, 1)
    pitches = [NOTES[n] for n in chord] if several else [440 * 2 ** up]
    x = sum((0.2 * np.sin(2 * np.pi * p * t + g.uniform(0, 6)) for p in pitches), 0 * t)
    wavfile.write(path, 8000, np.int16(32767 * (x + 0.02 * g.standard_normal(len(t)))))
    return chord if several else round(up, 4)


def pointed(path: Path, several: bool, g: np.random.Generator) -> Any:
    if not several:
        flat, ball = g.uniform(0.2, 1.0), g.standard_normal((128, 3))
        own.written(path, ball / np.linalg.norm(ball, axis=1, keepdims=True) * [1, 1, flat])
        return round(flat, 4)
    seed, there = int(g.integers(2**31)), [k for k in SOLIDS if g.random() < 0.5] or [SOLIDS[0]]
    own.written(path, torch.cat([surfaces([k], 1, 96, seed)[0][0] + 2.0 * SOLIDS.index(k)
                                 for k in there]))
    return there


def graphs(path: Path, several: bool, count: int) -> Path:
    rows = own.rows_of_graphs(count)
    for row, said in zip(rows, molecules(count)[2], strict=True):
        row["y"] = [k for k, n in said.items() if n] if several else said["pairs"] / 2
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def main(task: str, count: int = 320, epochs: int = 12, recipe: str = "full") -> dict[str, float]:
    kind, several = task.split("-")[0], task.endswith("label")
    draw, how = np.random.default_rng(0), {"lr": 2e-3, "batch_size": 16, "task": task}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as model:
        data = Path(folder)
        for part in sounds.made(sounds.AST) if kind == "audio" else (own.made(kind),):
            part.save_pretrained(model)
        if kind != "audio":
            how["trust_remote_code"] = True
        if kind == "graph":
            return taught(graphs(data / "rows.jsonl", several, count), model, recipe,
                          epochs=epochs, **how)
        make, end = (heard, "wav") if kind == "audio" else (pointed, "xyz")
        lines = [json.dumps({"file_name": f"{i}.{end}",
                             "label": make(data / f"{i}.{end}", several, draw)})
                 for i in range(count)]
        (data / "metadata.jsonl").write_text("\n".join(lines))
        return taught(data, model, recipe, epochs=epochs, **how)


if __name__ == "__main__":
    for task in sys.argv[1:] or [f"{kind}-{form}" for kind in ("audio", "cloud", "graph")
                                 for form in ("multi-label", "regression")]:
        main(task)
