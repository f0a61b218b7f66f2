"""Letter J: recipes of a space, asked for by what earlier ones came to, or at random."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

SPACE = "houlsby(bottleneck=0|4|16|64) + lora(rank=0|1|4|16) + vpt(length=0|2|8)"
#: trials of a search, by which it is read, and searches of each way
AT, SEEDS = (8, 12, 16, 24), 10
RATE, EPOCHS, TRAIN, TEST = 3e-3, 2, 160, 300
OBJECTIVES = ("figure", "trained")


def rows() -> Iterator[Row]:
    from burnish.search import Space

    space = Space.of(SPACE)
    known = measured(space)
    worst = replace(next(iter(known.values())), figure=min(s.figure for s in known.values()),
                    trained=max(s.trained for s in known.values()))
    whole = volume(list(known.values()), worst)
    table = f"the space: {len(known)} recipes"
    for recipe, score in front(known):
        yield {"table": table, "how": recipe, "figure": score.figure, "trained": score.trained}
    for table, objectives in (("by accuracy and by what trains", OBJECTIVES),
                              ("by accuracy alone", ("figure",))):
        for how, random in (("*burnish search*", False), ("*at random*", True)):
            found = [searched(space, known, seed, random, objectives, worst)
                     for seed in range(SEEDS)]
            out: Row = {"table": table, "how": how, "searches": SEEDS}
            for n in AT:
                if len(objectives) == 2:
                    each = [volume(f[:n], worst) / whole for f in found]
                else:
                    best = max(s.figure for s in known.values())
                    each = [max(s.figure for s in f[:n]) - best for f in found]
                out |= {f"{n}": round(median(each), 4), f"{n} least": round(min(each), 4)}
            yield out


def measured(space: Any) -> dict[str, Any]:
    """Recipe -> what it comes to, each run once: all searches ask the same table."""
    import torch

    import burnish
    from burnish.continual import real
    from burnish.continual.streams import logits_of
    from burnish.continual.training import Given, Training, cross_entropy, teach
    from burnish.search import Score

    from .merging import mixed

    stream = real.digits(1993)
    train, test = (mixed([r for t in stream.tasks for r in getattr(t, part)], 0)
                   for part in ("train", "test"))
    torch.manual_seed(0)
    model = stream.model()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    every = torch.ones(10, dtype=torch.bool)
    x, y = stream.collate([x for x, _ in test[:TEST]]), torch.tensor([y for _, y in test[:TEST]])

    def make(some: list[Any]) -> Given:
        return Given(stream.collate([x for x, _ in some]), torch.tensor([y for _, y in some]), {})

    out = {}
    for values in space.all():
        recipe = space.recipe(values)
        if recipe is None or recipe in out or space.buildable(values) is not None:
            continue
        model.load_state_dict(base)
        torch.manual_seed(0)
        tuned = burnish.tune(model, recipe, head=True, seed=0)
        teach(tuned, Training(epochs=EPOCHS, batch=16, rate=RATE, head_rate=1e-2), make, logits_of,
              lambda z, given: cross_entropy(z, given.labels, every), train[:TRAIN], 0,
              head=("classifier.weight", "classifier.bias"))
        trained = sum(p.numel() for p in tuned.parameters())
        tuned.model.eval()
        with torch.no_grad():
            right = tuned.model(**x).logits.argmax(-1) == y
        out[recipe] = Score(round(float(right.float().mean()), 4), 0, trained)
        model = tuned.detach()
    return out


def searched(space: Any, known: Mapping[str, Any], seed: int, random: bool,
             objectives: Sequence[str], worst: Any) -> list[Any]:
    """What each trial of a search came to, in order; a recipe that is asked again counts again,
    and a trial of no recipe is the worst there is."""
    from burnish.search import search

    with tempfile.TemporaryDirectory() as folder:
        front = search(space, lambda recipe, number: known[recipe], Path(folder), trials=max(AT),
                       seed=seed, objectives=objectives, random=random)
    return [t.score or worst for t in front.trials]


def volume(some: Sequence[Any], worst: Any) -> float:
    """The area that these recipes dominate: accuracy above the worst's against the logarithm of
    what trains below the worst's. worst: the least accuracy of the space, the most that trains."""
    area, best = 0.0, 0.0
    points = sorted((math.log(s.trained), s.figure - worst.figure) for s in some)
    for k, (size, figure) in enumerate(points):
        best = max(best, figure)
        until = points[k + 1][0] if k + 1 < len(points) else math.log(worst.trained)
        area += best * (until - size)
    return area


def front(known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those that no other beats, the smallest first."""
    out: list[tuple[str, Any]] = []
    for recipe, score in sorted(known.items(), key=lambda k: (k[1].trained, -k[1].figure)):
        if not out or score.figure > out[-1][1].figure:
            out.append((recipe, score))
    return out


def above(table: str, n: int, key: str = "", least: float = 0.0
          ) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (one(rows, how, table=table)[f"{n}{key}"] for how in ("*burnish search*",
                                                                    "*at random*"))
        return a - b > least, f"{100 * a:.2f} beside {100 * b:.2f}"

    return found


def small(rows: Rows) -> tuple[bool, str]:
    own = [r for r in rows if r["table"].startswith("the space")]
    best = max(own, key=lambda r: r["figure"])
    near = next(r for r in own if r["figure"] >= best["figure"] - 0.01)
    return near["trained"] * 4 <= best["trained"], (
        f"{near['trained']:,} numbers for {100 * near['figure']:.1f}, {best['trained']:,} for "
        f"{100 * best['figure']:.1f}")


BOTH, ALONE = "by accuracy and by what trains", "by accuracy alone"
LETTER = Letter(
    title="Searching a space of recipes",
    words=f"""
All recipes of the space `{SPACE}` (0: without this part) are run once on {TRAIN} of scikit-learn's
scanned digits, {EPOCHS} passes of batches of 16 at a rate of {RATE:g}, and scored on {TEST} test
scans, so that searches can be compared on what they ask alone: each trial's answer is read off.
{SEEDS} searches of {max(AT)} trials with `burnish.search` (a third of the trials at random, then
Optuna's TPE) and as many that never look at what came before, with the same seeds. Two objectives:
the area that the trials so far dominate, accuracy against the logarithm of the numbers that train
(above the space's worst of each), in per cent of what all recipes dominate. One: the best accuracy
so far less the best there is, in points. Medians over searches; *least*: the worst of them. On a
command line it is `burnish search`.""",
    belongs=None, rows=rows,
    columns={"accuracy": percent("figure"), "trained": number("trained"),
             **{f"after {n}": (lambda r, n=n: f"{100 * r[str(n)]:.2f}" if str(n) in r else "")
                for n in AT},
             f"least, after {AT[-1]}": lambda r: (f"{100 * r[f'{AT[-1]} least']:.2f}"
                                                  if f"{AT[-1]} least" in r else "")},
    claims=(
        *(Claim(f"After {n} trials a search that looks at earlier ones dominates more than one at "
                "random, in the median (AutoPEFT)", above(BOTH, n)) for n in AT[1:]),
        Claim("So it does in the worst of its searches, after the last",
              above(BOTH, AT[-1], " least")),
        Claim("It is nearer to the best accuracy, in the median", above(ALONE, AT[-1])),
        Claim("A recipe within a point of the best trains a quarter of its numbers or fewer "
              "(AutoPEFT)", small)),
    after="""
The first third of both is drawn alike, and so is the same. A space of this size is asked for half
of its recipes in a search; in larger ones what is learnt of earlier trials should count for more,
which is not shown here. All recipes have one rate and one seed: recipes that differ by a point of
accuracy (three scans) are told apart by chance, in the searches as in the table.""")
