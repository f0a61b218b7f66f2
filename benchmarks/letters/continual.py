"""Letter C: tasks that come one after the other, and what is left of the first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

RECIPE, PROBE, SEMA = "lora(rank=4)", "linear_probe", "sema(layers=(3, 4, 5))"
#: ways to learn a stream that every stream is learnt by, beside the baselines
LEARNERS = ("conpet", "fast_slow", "model_surgery")
#: recipes with a part of their own against forgetting, each under its learner; where all are run
METHODS = ((f"{RECIPE} + o_lora", "sequential"), ("i_lora(rank=4)", "replay"),
           ("osf", "sequential"), ("dst", "sequential"), (SEMA, "sema(epochs=3)"))
#: all weights, which are ten seconds more on digits than a run has left
FULL = (("full", "sequential"), ("full", "hlop"))
STREAMS = {"digits": METHODS, "text": (), "tables": (*METHODS, *FULL)}
#: passes over a task's rows, fewer than the streams' own, so that all of it takes five minutes
EPOCHS = {"digits": 3, "text": 3}
LAE = "lae(freeze=1)"
DIGITS, TEXT, TABLES = "digits, by class", "text, by domain", "tables, by domain"


def rows() -> Iterator[Row]:
    import warnings

    from burnish.continual import real
    from burnish.continual.report import compare
    from burnish.core.errors import BurnishError

    warnings.simplefilter("ignore")
    for name, methods in STREAMS.items():
        made = real.named(name)
        own = made(0).training
        training = replace(own, epochs=EPOCHS.get(name, own.epochs))
        yield from lines(compare(made, RECIPE, learners=[*LEARNERS, *extra(name)],
                                 training=training))
        for recipe, how in methods:
            try:
                yield from lines(compare(made, recipe, learners=[how], baselines=False,
                                         training=training))
            except BurnishError as why:              # the only row, and it is refused
                yield {"table": made(0).name, "how": f"{recipe}, {how}", "refused": str(why)}


def extra(name: str) -> tuple[str, ...]:
    """The head trains alone for 3 passes by default, which is all there are here: for one."""
    return (LAE if name in EPOCHS else "lae",
            *(("sequential(compete='current')",) if name == "digits" else ()))


def lines(report: Any) -> Iterator[Row]:
    """A row of every line, as numbers."""
    for line in report.lines:
        out: Row = {"table": report.stream, "how": f"{line.recipe}, {line.learner}",
                    "tasks": list(report.tasks)}
        if line.refused:
            yield {**out, "refused": line.refused}
            continue
        (run,) = line.results
        figures = {k: None if v is None else round(v, 4) for k, v in run.matrix.figures().items()}
        adds = run.added[1:]
        yield {**out, **figures, "trained": run.trained, "adds": max(adds) if adds else None,
               "bytes": run.stored[-1].bytes, "kept": run.stored[-1].samples}


def belongs(cls: type) -> bool:
    """What its source says: it is of a stream of tasks. (Without forgetting by another's name,
    `distill` is of a teacher. Styles of pictures that are drawn have a page of their own.)"""
    paper = getattr(cls, "paper", "")
    return "Continual Style" not in paper and bool(
        re.search(r"continual|forgetting in|class incremental", paper, re.IGNORECASE))


def how(learner: str, recipe: str = RECIPE) -> str:
    return f"{recipe}, {learner}"


def above(first: str, second: str, table: str, least: float = 0.0, key: str = "last"
          ) -> Callable[[Rows], tuple[bool, str]]:
    """Is the first above the second by so much?"""
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (one(rows, h, table=table)[key] for h in (first, second))
        return a - b >= least, f"{100 * a:.1f} beside {100 * b:.1f}"

    return found


def lost(rows: Rows) -> tuple[bool, str]:
    row = one(rows, how("sequential"), table=DIGITS)
    return row["last"] < 0.25, f"{100 * row['last']:.1f} of 100, two digits of ten were last"


def little(rows: Rows) -> tuple[bool, str]:
    found = [one(rows, how("sequential"), table=t)["forgetting"] for t in (TEXT, TABLES)]
    return max(found) < 0.1, "; ".join(f"{100 * f:.1f} points" for f in found)


def signed(key: str, row: Row) -> str:
    return f"{100 * row[key]:+.1f}" if row.get(key) is not None else ""


SEQUENTIAL, REPLAY, JOINT = how("sequential"), how("replay"), how("joint")
LETTER = Letter(
    title="Streams of tasks",
    words="""
Three streams that every machine has (`digits`, `text`, `tables`, see the guide to
[continual learning](../guide/continual.md), which explains the words), each learnt by a recipe
under a way to learn a stream, beside all tasks at once (`joint`), nothing against forgetting
(`sequential`), 100 rows of the past (`replay`) and a linear probe. Per cent of test rows, one
seed: differences of a few points are chance. *last*: after the last task; *average*: over tasks as
they come; *forgetting*: best less last of each task; *backward* and *forward*: transfer to tasks
past and ahead; *bytes*: stored beside the pre-trained model, rows of the past among them. Rates
are the streams' own, one for all rows, chosen on none of them; passes over a task's rows are 3 on
digits and text and 10 on tables. On a command line it is `burnish
continual`.""",
    belongs=belongs, rows=rows,
    columns={"last": percent("last"), "average": percent("average"),
             "forgetting": percent("forgetting"), "backward": partial(signed, "backward"),
             "forward": partial(signed, "forward"), "trained": number("trained"),
             "a task adds": number("adds"), "bytes": number("bytes"), "rows kept": number("kept")},
    claims=(
        Claim("With nothing against forgetting, where classes compete, the last task alone is "
              "left: under a quarter", lost),
        Claim("By domain little is forgotten: under ten points", little),
        Claim("100 rows of the past come within five points of all tasks at once, where classes "
              "compete (tiny episodic memories)",
              above(REPLAY, JOINT, DIGITS, -0.05)),
        Claim("An adapter a task with a selector comes as near (ConPET)",
              above(how("conpet"), JOINT, DIGITS, -0.05)),
        Claim("Task adapters and Gaussians of features, without a row of the past, are better than "
              "100 rows (MOS)",
              above(how("model_surgery"), REPLAY, DIGITS)),
        Claim("A slow copy and the surer of two answers are better than nothing by 20 points (LAE)",
              above(how(LAE), SEQUENTIAL, DIGITS, 0.2)),
        Claim("They are better than the loss among a task's own classes alone, by ten points (LAE)",
              above(how(LAE), how("sequential(compete='current')"), DIGITS, 0.1)),
        Claim("A long-term set that answers is better than its memory alone (I-LoRA)",
              above(how("replay", "i_lora(rank=4)"), REPLAY, DIGITS)),
        Claim("Directions that earlier tasks have left free are better than nothing by 20 points "
              "(O-LoRA)",
              above(how("sequential", f"{RECIPE} + o_lora"), SEQUENTIAL, DIGITS, 0.2)),
        Claim("So are the lesser triplets of each weight (OSF)",
              above(how("sequential", "osf"), SEQUENTIAL, DIGITS, 0.2)),
        Claim("Updates of all weights that keep off what Hebbian neurons have heard of past inputs "
              "end above plain ones (HLOP)",
              above(how("hlop", "full"), how("sequential", "full"), TABLES)),
        Claim("A sparse set of weights that moves is better than nothing (DST)",
              above(how("sequential", "dst"), SEQUENTIAL, DIGITS)),
        Claim("Adapters that come where a task is new are better than a linear probe, which "
              "forgets as it goes (SEMA)",
              above(how("sema(epochs=3)", SEMA), how("sequential", PROBE), DIGITS)),
        Claim("Weights that follow slowly are better than nothing by 20 points, where classes "
              "compete (fast and slow; elastic weight consolidation)",
              above(how("fast_slow"), SEQUENTIAL, DIGITS, 0.2)),
        Claim("They come as far as all tasks at once by domain, within two points",
              above(how("fast_slow"), JOINT, TEXT, -0.02))),
    after="""
Where classes compete, rows of the past are cheap and hard to beat: `conpet` keeps as many and four
times the bytes, `model_surgery` none and nearly six times the bytes. Of what keeps neither rows nor
statistics, the loss among a task's own classes does nearly all: `lae` adds a point to it, its slow
copy having hardly moved in so few updates, and `sema`, in which no block found a later task new,
is one adapter under that loss. What only keeps weights apart or near (`o_lora`, `osf`, `dst`,
`fast_slow`) does not help a head whose classes compete, as is known of elastic weight
consolidation. `i_lora` answers with a long-term set, and at its default that follows too slowly for
streams as short as these: on tables `ema=0.9` comes as far as the others, which says that much and
no more, since it was tried afterwards on this very stream. By domain little is forgotten at all,
and a memory buys nothing beyond chance.""",
    left={"cpe_clip": "prompts of both encoders of a CLIP, on "
                      "[classes that come with few rows](few_shot.md)",
          "rft": "learns from rewards on answers that a language model draws"})
