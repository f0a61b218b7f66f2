"""The model card of a run: a header that hubs read, what it learnt, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.card import code, heading, quoted, words
from ..memory import format_bytes
from .kinds import KINDS, foreign_models, generated
from .report import sources

#: figures that hubs know by these names
KNOWN = {"accuracy": "Accuracy", "f1": "F1", "perplexity": "Perplexity"}


def card(run: Mapping[str, Any], merged: bool = False) -> str:
    """README.md of a finished run, from the facts of its `run.json`. merged: of the model with what
    it learnt in its weights."""
    data, recipe, base = run["data"], run["recipe"], run["model"]
    pipeline = KINDS[data["task"]].pipeline
    auto = run.get("class", KINDS[data["task"]].auto)
    head = ["---", *heading(base, merged, pipeline, run["parts"])]
    if "/" in data["source"] and data["layout"] == "hub":
        head += ["datasets:", f"- {quoted(data['source'].partition(':')[0])}"]
    head += _index(run, pipeline)
    head.append("---")

    loader = f"{auto}.from_pretrained({base!r}"
    if data["task"].endswith("-regression"):
        loader += ", num_labels=1, ignore_mismatched_sizes=True"
    elif "vocabulary" in run:
        loader += f", vocab_size={run['vocabulary']}, ignore_mismatched_sizes=True"
    elif data["labels"]:
        loader += f", num_labels={len(data['labels'])}, ignore_mismatched_sizes=True"
    if foreign_models(data["task"]):
        loader += ", trust_remote_code=True"
    use = ["```python", *([] if merged else ["import burnish"]),
        f"from transformers import {auto}", "", *(
            [f'model = {auto}.from_pretrained("path/to/this/folder")'] if merged else
            [f"model = {loader})", 'tuned = burnish.load(model, "path/to/this/folder")']),
        "```"]
    if generated(data["task"]) and merged:
        use = ["```python", f"from diffusers import {auto}", "",
               f'pipe = {auto}.from_pretrained("path/to/this/folder")', "```"]
    elif generated(data["task"]):
        use = ["```python", "import burnish", f"from diffusers import {auto}", "",
               f"pipe = {auto}.from_pretrained({base!r})",
               'model = pipe.components.get("unet") or pipe.components["transformer"]',
               'tuned = burnish.load(model, "path/to/this/folder")', "```"]
    lines = [
        f"# {words(recipe)} on {words(', then '.join(map(_short, sources(run))))}", "",
        f"{code(_short(base))} fine-tuned with burnish, recipe {code(recipe)}: "
        f"{run['trainable']:,} of "
        f"{run['parameters']:,} parameters trained.", "",
        *_figures(run), "## Use", "", *use, "",
        "## Memory", "", *_memory(run["memory"]), "", "## Data", "",
        *[line for name, about in run.get("tasks", {"": data}).items() for line in (
            f"{words(name) + ': ' if name else ''}{words(about['layout'])}, {about['task']}: "
            + ", ".join(f"{n} {words(k)}" for k, n in about["rows"].items()) + " rows.", "")][:-1],
        *_stages(run),
    ]
    return "\n".join([*head, "", *lines]) + "\n"


def _index(run: Mapping[str, Any], pipeline: str) -> list[str]:
    """The `model-index` that results on hubs are made of."""
    rows = [(split, name, value) for split, metrics in run["metrics"].items()
            for name, value in metrics.items() if name in KNOWN]
    if not rows:
        return []
    out = ["model-index:", f"- name: {quoted(_short(run['recipe']))}", "  results:"]
    for split, name, value in rows:
        out += ["  - task:", f"      type: {pipeline}", "    dataset:",
                f"      name: {quoted(_short(run['data']['source']))}",
                f"      type: {quoted(_short(run['data']['source']))}",
                f"      split: {quoted(split)}",
                "    metrics:", f"    - type: {name}", f"      name: {KNOWN[name]}",
                f"      value: {value:.6g}"]
    return out


def _figures(run: Mapping[str, Any]) -> list[str]:
    if not run["metrics"]:
        return []
    names = list(dict.fromkeys(n for m in run["metrics"].values() for n in m))
    rows = ["| split | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for split, m in run["metrics"].items():
        rows.append(f"| {words(split)} | " + " | ".join(
            f"{m[n]:.4g}" if n in m else "" for n in names) + " |")
    return [*rows, ""]


def _stages(run: Mapping[str, Any]) -> list[str]:
    """What trained when, where the run had several stages."""
    if not run.get("stages"):
        return []
    rows = ["", "## Stages", "", "| stage | data | beside it | steps |", "|---|---|---|---:|"]
    return rows + [f"| {words(s['stage'])} | {words(_short(s['data']))} | "
                   f"{words(', '.join(s['beside']))} | {s['steps']} |" for s in run["stages"]]


def _memory(memory: Mapping[str, Any]) -> list[str]:
    rows = ["| | peak of a training step |", "|---|---:|"]
    for key, word in (("simulated", "promised beforehand"), ("measured", "measured afterwards")):
        if memory.get(key):
            rows.append(f"| {word} | {format_bytes(memory[key]['peak_bytes'])} |")
    return rows


def _short(text: str) -> str:
    """A path by its last part; the card travels, the machine does not."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith((".", "/", "~")) else text
