"""What is told about a run: facts for programs (`run.json`), and one page for people.

The page is a single HTML file with its pictures inside; it needs no server and no network.
"""

from __future__ import annotations

import base64
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..blocks.weight import spectrum
from ..engine.tuned import Tuned
from ..engine.updates import updates
from ..memory import MemoryReport, format_bytes
from . import figures
from .kinds import KINDS, pictured
from .mistakes import coded, in_words, shown

if TYPE_CHECKING:
    from .data import Data
    from .moments import Moments
    from .stages import Past
    from .tasks import Task

#: entries of all tuned matrices together above which their change is not computed for the page, and
#: operations of a decomposition above which one matrix has no spectrum there
LOOKED_AT, DECOMPOSED = 1 << 31, 1 << 31
#: singular values of a matrix that the page shows
SHOWN = 64


def facts_of(tuned: Tuned, tasks: Mapping[str, Task], name: str,
             metrics: dict[str, dict[str, float]], promise: MemoryReport | None,
             truth: MemoryReport | None, trainer: Any, past: Past, *,
             process: tuple[int, int], settings: Mapping[str, Any],
             moments: Moments | None = None) -> dict[str, Any]:
    """Everything `run.json` holds, in plain types. `data` is the first task's, where there are
    several; `tasks` has them all, and `stages` what is told of each."""
    summary, state, seconds = tuned.summary(), trainer.state, past.seconds
    task = next(iter(tasks.values()))
    notes = [n for t in tasks.values() for n in t.notes]
    several = {"tasks": {n: t.data.summary() for n, t in tasks.items()}} if "" not in tasks else {}
    if past.stages:
        several["stages"] = past.stages
    memory: dict[str, Any] = {
        "simulated": promise.to_dict() if promise else None,
        "measured": truth.to_dict() if truth else None,
        "moments": moments.to_dict() if moments else {},
        "difference": None, "process_before": process[0], "process_peak": process[1],
    }
    if promise and truth:
        memory["difference"] = promise.peak_bytes / truth.peak_bytes - 1
    if told := tuned.timeline.told():
        several["told"] = told
        notes += [f"{n}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                       for k, v in facts.items()) for n, facts in told.items()]
    if "vocab_size" in (head := task.head()):       # of a head that spells, whatever the base's
        several["vocabulary"] = head["vocab_size"]
    if KINDS[task.data.task].also:                  # an auto class alone does not know the model
        several["class"] = type(tuned.model).__name__
    if trainer.args.process_index == 0 and tuned.state.shards is None:
        several |= task.shown(tuned, trainer.args.device)
    if found := trainer.mistakes:                   # of the split that was looked at last
        at, _, split = list(metrics)[-1].rpartition(" ")
        several["mistakes"] = in_words(tasks[at], split, found) | ({"task": at} if at else {})
    steps = trainer.step                            # of all sessions, as the seconds are
    return {
        "burnish": _version(), "model": name,        # later adapters leave out how the base is held
        "recipe": str(next(iter(tuned.adapters.values())).recipe),
        "parts": [m.name for m in tuned.recipe],
        "settings": {m.name: {k: _plain(v) for k, v in m.settings().items()}
                     for m in tuned.recipe},
        "trained": summary["parts"], "trainable": summary["trainable"],
        "parameters": summary["parameters"], "notes": [*summary["notes"], *dict.fromkeys(notes)],
        "max_length": task.max_length, "task": dict(task.how), "data": task.data.summary(),
        "samples": task.data.samples(), "metrics": metrics,
        "best": {"step": state.best_global_step and trainer.leg.before + state.best_global_step,
                 "metric": state.best_metric,
                 "by": trainer.args.metric_for_best_model},
        "training": {k: _plain(v) for k, v in settings.items() if k != "output_dir"},
        "memory": memory,
        "time": {"seconds": seconds, "steps": steps, "steps_per_second": steps / seconds},
        "environment": environment(), **several,
    }


def sources(facts: Mapping[str, Any]) -> list[str]:
    """Where the data came from, task by task."""
    return [about["source"] for about in facts.get("tasks", {"": facts["data"]}).values()]


def environment() -> dict[str, str]:
    """Versions and device, as they bear on the figures."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        platform.processor() or platform.machine())
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "system": platform.system(),
            "device": device, "threads": str(torch.get_num_threads())}


@torch.no_grad()
def change(tuned: Tuned) -> dict[str, dict[str, Any]]:
    """How each weight moved: ``|Delta| / |W|``, the share of entries that moved at all, and, where
    it costs little, how many directions its update has: effective and stable rank, and the leading
    singular values. (blocks/weight/spectrum.py says what these are.)"""
    out: dict[str, dict[str, Any]] = {}
    size = 0
    for update in updates(tuned):
        if (size := size + update.numel) > LOOKED_AT:
            return {}
        delta, base = update.delta(), update.base()
        row = out[update.name] = {
            "change": float(delta.norm()) / max(float(base.float().norm()), 1e-12),
            "nonzero": float((delta != 0).float().mean())}
        s = update.values(DECOMPOSED)
        if s is not None and float(s.sum()) > 0:
            row |= {"effective_rank": spectrum.effective_rank(s),
                    "stable_rank": spectrum.stable_rank(s),
                    "values": [float(v) for v in s[:SHOWN]]}
    return out


def write_report(facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]],
                 tuned: Tuned | None = None, *, data: Data | None = None,
                 comparison: Mapping[str, Any] | None = None, title: str | None = None) -> str:
    """The page as text.

    data: pictures of it are shown, where it has any.
    comparison: ``rows`` (recipe, accuracy, trained, simulated, measured, seconds...) of several
        runs, shown as one table and one picture at the top (the demo's, and `compare`'s).
    """
    import jinja2

    layers = change(tuned) if tuned is not None else facts.get("layers") or {}
    memory = facts["memory"]
    pictures = {
        "learning": figures.learning(history, facts["best"]),
        "memory": figures.memory(memory["simulated"], memory["measured"]),
        "timeline": figures.timeline(memory["simulated"], memory["measured"]),
        "layers": figures.layers(layers),
        "spectra": figures.spectra(layers),
        "forecast": figures.forecast(facts.get("forecast")),
        "comparison": figures.comparison(comparison["rows"]) if comparison else "",
        "mistakes": figures.confusion(facts.get("mistakes") or {}),
    }
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "assets"), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    env.filters |= {"bytes": format_bytes, "count": lambda n: f"{n:,}",
                    "figure": lambda v: f"{v:.4g}" if isinstance(v, float) else v}
    return env.get_template("report.html.j2").render(
        title=title or f"{facts['recipe']} on {', then '.join(sources(facts))}", run=facts,
        sources=", then ".join(sources(facts)),
        pictures=pictures, comparison=comparison, gallery=gallery(data) if data else [],
        drawn=drawn(facts.get("drawn", ())), mistakes=facts.get("mistakes"),
        mistaken=shown(data, facts.get("mistakes") or {}),
        names=list(dict.fromkeys(n for m in facts["metrics"].values() for n in m)),
        command="burnish " + " ".join(a for a in sys.argv[1:]) if _on_command_line() else "")


def drawn(pairs: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """(what was asked, the base's picture as a data URI, the tuned model's) of what a run drew."""
    def read(path: str) -> str:
        return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"

    return [(p["asked"], read(p["base"]), read(p["tuned"])) for p in pairs
            if Path(p["base"]).is_file() and Path(p["tuned"]).is_file()]


def gallery(data: Data, count: int = 14, side: int = 56) -> list[tuple[str, str]]:
    """(picture as a data URI, its label) of rows spread over the training split."""
    if not pictured(data.task):
        return []
    step = max(1, len(data.train) // count)
    out = []
    for i in range(0, len(data.train), step)[:count]:
        row = data.row("train", i)
        said = _label(row["label"], data.labels) if "label" in row else row.get("text", "")
        out.append((coded(row["image"], side), said))
    return out


def _label(label: Any, names: Sequence[str] | None) -> str:
    """A class, several, or a number."""
    if names is None:
        return f"{label:.4g}"
    return ", ".join(names[i] for i in label) if isinstance(label, list) else names[label]


def _on_command_line() -> bool:
    return Path(sys.argv[0]).name == "burnish"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)


def _version() -> str:
    from .. import __version__

    return __version__
