"""Rows of published figures: reading them, running them, printing them.

A file is a mapping. ``source`` and ``url`` say where the figures stand, ``base`` what its rows
share, ``rows`` name -> what differs (nested mappings are merged). A row has

    published, unit     the figure as printed: B, kB, MB, GB (powers of 1000), KiB, MiB, GiB
    counts              allocated, active or reserved (memory/caching.py)
    tolerance           a share (0.02), or a size ("1 MiB")
    why                 the reason for a miss; must be there where the tolerance is above 3 %
    less, over          a second run, merged into this one: its figure is taken off, or divided by

and says what is run, on ``device``:

    operation, settings             one operation, forward and backward (kernels.py), or
    graph, shape, batch, dtype      another laboratory's graph (graphs.py), or
    config, batch, dtype            a transformers config with its ``architectures``;
    recipe, targets, steps          of the last two; default: the graph as it stands, two steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch

from ..core.errors import ConfigError, nearest
from ..memory import MemoryReport, parse_bytes, simulate
from .graphs import Decoder
from .kernels import watch

GRAPHS = {"decoder": Decoder}
COUNTS = ("allocated", "active", "reserved")
#: what is run, and all that a row may say
RUN = frozenset({"device", "operation", "settings", "runs", "graph", "shape", "config", "batch",
                 "dtype", "recipe", "targets", "steps"})
KNOWN = RUN | {"published", "unit", "counts", "tolerance", "why", "less", "over"}
#: a miss beyond this share is explained
EXPLAINED = 0.03


@dataclass(frozen=True)
class Row:
    """One published figure with its settings. name: ``topic/file/row``."""

    name: str
    source: str
    url: str
    facts: dict[str, Any]

    @property
    def published(self) -> float:
        return float(self.facts["published"])

    @property
    def unit(self) -> str:
        return "x" if "over" in self.facts else str(self.facts.get("unit", "GB"))

    @property
    def allowed(self) -> float:
        """The tolerance as a share of the figure."""
        told = self.facts["tolerance"]
        return float(told) if isinstance(told, int | float) else \
            parse_bytes(told) / (self.published * parse_bytes(f"1{self.unit}"))

    @property
    def why(self) -> str:
        return " ".join(str(self.facts.get("why", "")).split())


@dataclass(frozen=True)
class Outcome:
    """ours: in the row's unit; error: a share of the published figure."""

    row: Row
    ours: float

    @property
    def error(self) -> float:
        return self.ours / self.row.published - 1

    @property
    def kept(self) -> bool:
        return abs(self.error) <= self.row.allowed

    def to_dict(self) -> dict[str, Any]:
        r = self.row
        return {"name": r.name, "source": r.source, "url": r.url, "published": r.published,
                "ours": round(self.ours, 4), "unit": r.unit, "error": round(self.error, 6),
                "tolerance": round(r.allowed, 6), "kept": self.kept, "why": r.why, **{
                    k: v for k, v in r.facts.items() if k not in ("published", "unit", "tolerance",
                                                                  "why")}}


# -- reading --------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def read() -> dict[str, Row]:
    """Every row by name, file by file. Raises ConfigError for one that is not whole."""
    rows: dict[str, Row] = {}
    for topic, stem, text in _texts():
        data = _parse(text, f"{topic}/{stem}")
        base = data.get("base", {})
        for label, own in data["rows"].items():
            name = f"{topic}/{stem}/{label}"
            rows[name] = _checked(Row(name, str(data["source"]), str(data["url"]),
                                      _merged(base, own)))
    return rows


def _texts() -> Iterator[tuple[str, str, str]]:
    for topic in sorted(files("burnish.reproductions").joinpath("published").iterdir(),
                        key=lambda t: t.name):
        for file in sorted(topic.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".yaml"):
                yield topic.name, file.name[: -len(".yaml")], file.read_text("utf-8")


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError("reproductions are YAML: pip install 'burnish[fit]'") from None
    data = yaml.safe_load(text)
    missing = [k for k in ("source", "url", "rows") if k not in data]
    if missing:
        raise ConfigError(f"reproduction {name} has no {missing[0]}")
    return dict(data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for k, v in own.items():
        out[k] = _merged(out[k], v) if isinstance(v, dict) and isinstance(out.get(k), dict) else v
    return out


def _checked(row: Row) -> Row:
    f = row.facts
    for key in f:
        if key not in KNOWN:
            raise ConfigError(f"reproduction {row.name} says {key!r}{nearest(key, KNOWN)}")
    ways = [k for k in ("operation", "graph", "config") if k in f]
    if len(ways) != 1 or not {"published", "tolerance", "device"} <= set(f):
        raise ConfigError(f"reproduction {row.name} needs published, tolerance, device and one of "
                          f"operation, graph, config; it has {', '.join(f)}")
    if f.get("counts", "allocated") not in COUNTS:
        raise ConfigError(f"reproduction {row.name} counts {f['counts']!r}; expected one of "
                          f"{', '.join(COUNTS)}")
    if row.allowed > EXPLAINED and not row.why:
        raise ConfigError(f"reproduction {row.name} may miss by {row.allowed:.1%} and says no why")
    return row


def names(asked: Iterable[str] = ()) -> list[str]:
    """Names of rows: those asked for, or below a topic or a file asked for; none asked: all."""
    rows = read()
    found: list[str] = []
    for word in asked:
        some = [n for n in rows if n == word or n.startswith(f"{word.rstrip('/')}/")]
        if not some:
            near = {p for n in rows for p in (n, n.rpartition("/")[0], n.partition("/")[0])}
            raise ConfigError(f"no reproduction {word!r}{nearest(word, near)} (topics: "
                              f"{', '.join(dict.fromkeys(n.partition('/')[0] for n in rows))})")
        found += some
    return list(dict.fromkeys(found)) if asked else list(rows)


# -- running --------------------------------------------------------------------------------------
def run(name: str) -> Outcome:
    """Simulate one row from its settings alone."""
    row = read()[name]
    ours = float(_bytes(row.facts))
    for word in ("less", "over"):
        if word in row.facts:
            other = _bytes(_merged(row.facts, row.facts[word]))
            ours = ours - other if word == "less" else ours / other
    scale = 1.0 if "over" in row.facts else float(parse_bytes(f"1{row.unit}"))
    return Outcome(row, ours / scale)


def _bytes(facts: dict[str, Any]) -> int:
    said = {k: v for k, v in facts.items() if k in RUN}
    return _figures(json.dumps(said, sort_keys=True))[facts.get("counts", "allocated")]


@cache
def _figures(said: str) -> dict[str, int]:
    """The allocator's figures of one run; two laboratories may publish the same."""
    return _report(json.loads(said)).allocator


def _report(facts: dict[str, Any]) -> MemoryReport:
    device = facts["device"]
    if "operation" in facts:
        return watch(facts["operation"], facts["settings"], device, facts.get("runs", 3))
    model, batch = _model(facts)
    return simulate(model, facts.get("recipe", "as_is + lean(on=False)"), batch,
                    dtype=facts["dtype"], targets=facts.get("targets"), device=device,
                    steps=facts.get("steps", 2))


def _model(facts: dict[str, Any]) -> tuple[Any, Any]:
    samples, *rest = facts["batch"]
    if "graph" in facts:
        shape = {**facts["shape"], "length": rest[0]}
        with torch.device("meta"):
            model = GRAPHS[facts["graph"]](**shape)
        ids = torch.zeros(samples, rest[0], dtype=torch.long)
        return model, {"input_ids": ids, "labels": ids}
    import transformers

    told = dict(facts["config"])
    config = getattr(transformers, told.pop("class"))(**told)
    return config, (samples, *rest) if rest else samples


# -- printing -------------------------------------------------------------------------------------
def cells(done: Outcome) -> tuple[str, ...]:
    """(name, published, ours, error, tolerance) as they are printed."""
    row = done.row
    places = 3 if abs(row.published) < 100 else 2
    unit = f" {row.unit}"
    return (row.name, f"{row.published:.{places}f}".rstrip("0").rstrip(".") + unit,
            f"{done.ours:.{places}f}{unit}", f"{done.error:+.2%}", f"{row.allowed:.2%}")


HEAD = ("row", "published", "ours", "error", "tolerance")


def table(done: list[Outcome]) -> str:
    """Aligned columns for a screen, misses explained below."""
    rows = [HEAD, *map(cells, done)]
    widths = [max(len(r[k]) for r in rows) for k in range(len(HEAD))]
    lines = ["  ".join(c.ljust(w) if k == 0 else c.rjust(w)
                       for k, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
             for r in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines += [f"missed: {o.row.name}" for o in done if not o.kept]
    lines += [f"{', '.join(some)}: {why}" for why, some in _whys(done).items()]
    return "\n".join(lines)


def _whys(done: list[Outcome]) -> dict[str, list[str]]:
    """Each reason, with the rows it is for."""
    found: dict[str, list[str]] = {}
    for o in done:
        if o.row.why:
            found.setdefault(o.row.why, []).append(o.row.name.rpartition("/")[2])
    return found


def line(done: Outcome) -> str:
    """A row of the page."""
    return f"| {' | '.join(cells(done))} |"


def page(done: list[Outcome]) -> str:
    """The handbook's page."""
    worst = max(done, key=lambda o: abs(o.error))
    exact = sum(abs(o.error) < 0.0005 for o in done)
    out = [INTRODUCTION.format(rows=len(done), sources=len({o.row.url for o in done}), exact=exact,
                               worst=f"{abs(worst.error):.1%}")]
    by: dict[tuple[str, str], list[Outcome]] = {}
    for o in done:
        by.setdefault((o.row.source, o.row.url), []).append(o)
    for (source, url), some in by.items():
        out += [f"## {source}", "", f"<{url}>", "", f"| {' | '.join(HEAD)} |",
                "|" + "---|" * len(HEAD), *map(line, some), ""]
        whys = [f"- {', '.join(rows)}: {why}" for why, rows in _whys(some).items()]
        out += [*whys, ""] if whys else []
    return "\n".join(out).rstrip() + "\n"


INTRODUCTION = """# Published figures, reproduced

`burnish.simulate` says what a step takes on a GPU that is not there. Here it is held against what
others have measured and published on theirs: {rows} figures of {sources} tables, each simulated
from its settings alone, on a CPU, without weights. {exact} agree to 0.05 %; the largest miss is
{worst}.

```
burnish reproduce                       # all of them
burnish reproduce losses lora --json    # some, for programs
```

A row whose settings are not published is no row. The peers' own graphs are simulated, written by
hand from what their authors describe and run as they stand (`as_is + lean(on=False)`). Figures
count what `torch.cuda.max_memory_allocated` counts unless a file says otherwise.
"""
