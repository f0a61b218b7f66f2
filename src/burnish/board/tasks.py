"""Six transfers that every machine can run: a pre-trained model, rows it has not seen, a score.

    handwriting  the glyph transformer (rendered print) to scikit-learn's scanned digits
    text         all-MiniLM-L6-v2 to docstrings of Python's standard library, by package
    cells        a network that knows the smaller half of scikit-learn's breast-cancer cells, to the
                 larger half
    patients     a network that knows the progression of diabetes in women, to men
    bytes        a byte-level transformer that has read docstrings, to source code
    tones        a spectrogram transformer that knows single tones, to intervals of two

What no package ships is pre-trained here, once on a machine (the cache of plans is beside it).
Scores are shares of right answers: of classes, of the next byte.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..continual import real
from ..core.errors import ConfigError, DataError, nearest
from ..formats import safe
from ..memory import cache

#: task -> the kind of model and data that it stands for
KINDS = {"handwriting": "image", "text": "text", "cells": "table", "patients": "table",
         "bytes": "language", "tones": "sound"}
SPLITS = ("train", "validation", "test")


@dataclass
class Task:
    """fresh: the model as it was pre-trained, anew each time. splits: rows to train, to choose a
    rate by, to test. answers: outputs, batch -> (logits (..., C), right classes (...)).

    how: what ``burnish.tune`` is told of targets and head; head: the name of a new head's tensors,
    which have a rate of their own. choosing: seeds that choose the rate; tried: half decades from
    `rate` that are tried in any case.
    """

    name: str
    fresh: Callable[[], nn.Module]
    splits: dict[str, Sequence[Any]]
    collate: Callable[[Sequence[Any]], Any]
    answers: Callable[[Any, Any], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Any], Tensor] | None
    batch: int
    epochs: int
    how: dict[str, Any]
    head: str = ""
    rate: float = 3e-3
    choosing: int = 1
    tried: tuple[int, ...] = (0, 1, -1)

    @property
    def kind(self) -> str:
        return KINDS[self.name]

    def epoch(self, split: str, seed: int | None = None) -> list[Any]:
        """Batches of a split, shuffled where a seed is given."""
        rows = self.splits[split]
        order = list(range(len(rows)))
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(rows), generator=draw).tolist()
        return [self.collate([rows[i] for i in order[k:k + self.batch]])
                for k in range(0, len(order), self.batch)]

    def first(self, samples: int) -> Any:
        """The batch of the first rows to train."""
        rows = self.splits["train"]
        return self.collate([rows[i] for i in range(samples)])

    @property
    def updates(self) -> int:
        """Of a training as it stands, one per batch."""
        return self.epochs * -(-len(self.splits["train"]) // self.batch)

    def score(self, model: nn.Module, split: str) -> float:
        """The share of right answers, in evaluation mode."""
        right = many = 0
        was = model.training
        model.eval()
        with torch.no_grad():
            for batch in self.epoch(split):
                found, truth = self.answers(called(model, batch), batch)
                right += int((found.argmax(-1) == truth).sum())
                many += truth.numel()
        model.train(was)
        return right / many


def called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, tuple):
        return model(batch[0])
    return model(**{k: v for k, v in batch.items() if k != "labels"})


def task(name: str) -> Task:
    """The task of a name. Raises ConfigError for a name that is none, and for one whose model or
    data is in a package that is not there."""
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}{nearest(name, TASKS)} (there is {', '.join(TASKS)})")
    return TASKS[name]()


# -- pictures ------------------------------------------------------------------------------------
def handwriting() -> Task:
    from ..fit.assets import GLYPH_VIT
    from ..fit.data import read
    from ..fit.driving import quiet_libraries
    from ..fit.tasks import task_for

    quiet_libraries()
    own = task_for(read("digits"), str(GLYPH_VIT))
    return Task("handwriting", lambda: own.load(str(GLYPH_VIT)),
                {s: own.rows(s) for s in SPLITS}, own.collate, _labels, None, 32, 4, {},
                "classifier.")


def _labels(out: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return out.logits, batch["labels"]


# -- texts ---------------------------------------------------------------------------------------
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest",
            "urllib", "xml")
#: rows of each class
SIZES = {"train": 20, "validation": 30, "test": 40}


def text() -> Task:
    folder = real.encoder()
    words = real.Words(folder)

    def collate(rows: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        return {**words([t for t, _ in rows]), "labels": torch.tensor([y for _, y in rows])}

    return Task("text", lambda: real.sentences(folder, len(PACKAGES)), docstrings(),
                collate, _labels, None, 16, 6, {}, "classifier.")


def docstrings() -> dict[str, list[tuple[str, int]]]:
    """Sentences of the standard library with the number of their package, none twice."""
    out: dict[str, list[tuple[str, int]]] = {s: [] for s in SPLITS}
    seen: set[str] = set()
    for label, package in enumerate(PACKAGES):
        texts = [t for t in real.docstrings(package) if t not in seen]
        seen.update(texts)
        random.Random(label).shuffle(texts)
        if len(texts) < sum(SIZES.values()):
            raise DataError(f"{package} of this Python's standard library has {len(texts)} "
                            f"docstrings, and {sum(SIZES.values())} are needed")
        start = 0
        for split, n in SIZES.items():
            out[split] += [(t, label) for t in texts[start:start + n]]
            start += n
    return out


# -- tables --------------------------------------------------------------------------------------
def cells() -> Task:
    x, y, small = real.cells()
    rest = (~small).nonzero().squeeze(1)
    return _table("cells", x[rest], y[rest], real.network, 60, 40)


def patients() -> Task:
    """In which third of all patients the progression after a year is."""
    x, y, women = _diabetes()
    return _table("patients", x[~women], y[~women], lambda: real.anew(_women()), 80, 50)


def _table(name: str, x: Tensor, y: Tensor, fresh: Callable[[], nn.Module], train: int,
           validation: int) -> Task:
    mixed = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rows = [(x[i], y[i]) for i in mixed.tolist()]

    def collate(some: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([a for a, _ in some]), torch.stack([b for _, b in some])

    middle = train + validation
    return Task(name, fresh, {"train": rows[:train], "validation": rows[train:middle],
                                       "test": rows[middle:]},
                collate, lambda out, batch: (out, batch[1]),
                lambda out, batch: F.cross_entropy(out, batch[1]), 16, 10, {"head": False},
                choosing=5, tried=tuple(range(-2, 5)))


@functools.lru_cache(maxsize=1)
def _diabetes() -> tuple[Tensor, Tensor, Tensor]:
    """Features in units of the women's, the third of the progression, and who is a woman."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    x = torch.tensor(bunch.data, dtype=torch.float32)
    women, y = x[:, 1] == x[:, 1].min(), torch.tensor(bunch.target)
    x = torch.cat([x[:, :1], x[:, 2:]], 1)                         # column 1 says who
    thirds = torch.quantile(y, torch.tensor([1 / 3, 2 / 3], dtype=y.dtype))
    return (x - x[women].mean(0)) / x[women].std(0), torch.bucketize(y, thirds), women


@functools.lru_cache(maxsize=1)
def _women() -> nn.Module:
    x, y, women = _diabetes()
    return real.learnt(x[women], y[women])


# -- bytes ---------------------------------------------------------------------------------------
#: bytes of a row, rows of a split, of pre-training
LENGTH, ROWS, READ = 128, {"train": 96, "validation": 64, "test": 160}, 1024


def bytes_() -> Task:
    """The next byte of source code, by a transformer that has read prose."""
    source = _source()
    rows = [source[k * LENGTH:(k + 1) * LENGTH] for k in range(len(source) // LENGTH)]
    random.Random(0).shuffle(rows)
    if len(rows) < sum(ROWS.values()):
        raise DataError(f"this Python's standard library has {len(rows)} rows of source code, and "
                        f"{sum(ROWS.values())} are needed")
    splits, start = {}, 0
    for split, n in ROWS.items():
        splits[split] = rows[start:start + n]
        start += n

    def collate(some: Sequence[bytes]) -> dict[str, Tensor]:
        ids = torch.tensor([list(row) for row in some])
        return {"input_ids": ids, "labels": ids.clone()}

    return Task("bytes", lambda: _kept("bytes", _reader, _reads), splits, collate,
                lambda out, batch: (out.logits[:, :-1], batch["labels"][:, 1:]), None, 16, 8,
                {"head": False})


def _source() -> bytes:
    """Code of a package, without its docstrings' language being all there is to it."""
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(p.read_bytes() for p in sorted((root / "email").rglob("*.py")))


def _reader() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=2 * LENGTH, use_cache=False,
        tie_word_embeddings=False, attn_implementation="sdpa"))


def _reads(model: nn.Module) -> None:
    """Six epochs over docstrings."""
    prose = "\n".join(t for p in real.PACKAGES for t in real.docstrings(p)).encode()
    rows = [prose[k * LENGTH:(k + 1) * LENGTH] for k in range(len(prose) // LENGTH)][:READ]
    ids = torch.tensor([list(row) for row in rows])
    _train(model, ids, lambda part: model(input_ids=part, labels=part).loss, 6, 1e-3)


# -- tones ---------------------------------------------------------------------------------------
#: samples a second, length in seconds
RATE, SECONDS = 8000, 0.64


def tones() -> Task:
    """Which of eight intervals lies between two tones, for who can tell single pitches."""
    x, y = _heard(8, 800, 1, pairs=True)
    rows = [{"input_values": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def collate(some: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([r[k] for r in some]) for k in some[0]}

    def fresh() -> nn.Module:
        model = _kept("tones", _ear, _hears)
        old, model.classifier.dense = model.classifier.dense, None          # type: ignore
        model.classifier.dense = nn.Linear(old.in_features, 8)              # type: ignore
        model.config.num_labels = model.num_labels = 8                      # type: ignore
        return model

    return Task("tones", fresh, {"train": rows[:240], "validation": rows[240:400],
                                          "test": rows[400:]},
                collate, _labels, None, 16, 6, {}, "classifier.dense.")


def _heard(classes: int, many: int, seed: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """(log-mel spectrograms (N, frames, bins), classes) of tones with three overtones in noise: the
    pitch class, or the interval above a tone of any pitch."""
    import numpy as np
    from transformers import ASTFeatureExtractor

    g = np.random.default_rng(seed)
    t = np.arange(int(RATE * SECONDS)) / RATE
    labels = g.integers(0, classes, many)

    def tone(pitch: float) -> Any:
        strong = g.uniform(0.2, 1.0, 4)
        return sum(s * np.sin(2 * np.pi * 220 * 2 ** (pitch / 12) * k * t + g.uniform(0, 6))
                   for k, s in enumerate(strong, 1))

    waves = []
    for label in labels:
        low = float(g.integers(0, 12)) if pairs else float(label)
        x = tone(low) + (tone(low + 1 + label) if pairs else 0)
        waves.append((0.2 * x + 0.05 * g.standard_normal(len(t))).astype("float32"))
    ear = ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=64, max_length=64)
    made = ear(waves, sampling_rate=RATE, return_tensors="pt")["input_values"]
    return made, torch.tensor(labels)


def _ear() -> nn.Module:
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(ASTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192,
        max_length=64, num_mel_bins=64, patch_size=16, frequency_stride=16, time_stride=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=12,
        attn_implementation="sdpa"))


def _hears(model: nn.Module) -> None:
    x, y = _heard(12, 1536, 0, pairs=False)
    both = torch.arange(len(y))
    _train(model, both, lambda part: model(input_values=x[part], labels=y[part]).loss, 8, 1e-3)


# -- pre-training --------------------------------------------------------------------------------
def _train(model: nn.Module, rows: Tensor, loss: Callable[[Tensor], Tensor], epochs: int,
           rate: float) -> None:
    """Plain torch."""
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    every = epochs * -(-len(rows) // 32)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, n / 20) * (1 - n / every))
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=draw).split(32):
            optimizer.zero_grad()
            loss(rows[part]).backward()
            optimizer.step()
            plan.step()


def _kept(name: str, make: Callable[[], nn.Module], learn: Callable[[nn.Module], None]
          ) -> nn.Module:
    """A model that learns once on a machine: a file of its weights is kept beside the plans, named
    by what made it, so that a change here makes another."""
    import hashlib
    import sys

    by = Path(__file__).read_bytes() + sys.version.split()[0].encode()      # whose texts are read
    mark = hashlib.sha256(by).hexdigest()[:12]
    file = cache.folder().parent / "board" / f"{name}-{mark}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        if file.is_file():
            model.load_state_dict(safe.load_file(file))
        else:
            learn(model.train())
            file.parent.mkdir(parents=True, exist_ok=True)
            safe.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    model.zero_grad(set_to_none=True)
    return model


TASKS: dict[str, Callable[[], Task]] = {
    "handwriting": handwriting, "text": text, "cells": cells, "patients": patients,
    "bytes": bytes_, "tones": tones}
