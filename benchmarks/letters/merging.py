"""Letter A: models and adapters tuned on one task each, made one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from .letter import Claim, Letter, Row, Rows, one, percent

#: rules and what is done before them; a star: held-out rows choose the scale
RULES = ("soup(kind='uniform')", "task_arithmetic(scale=1.0)", "task_arithmetic",
         "task_arithmetic*", "ties", "ties*", "dare + task_arithmetic", "dare + ties",
         "pcb", "pcb*",
         "signature + task_arithmetic")
#: sums of factors, with what each counts
FORMS = (("cat", 0.4), ("svd", 0.4), ("linear", 0.4), ("linear", 0.25))
#: learning rates of the two ways to tune, fixed beforehand
RATES = {"full": 1e-3, "lora": 3e-3}
#: scales that held-out rows choose from
SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)
#: scans of a turn: to train, to choose a scale by, to test
TURNED = 320, 80, 300


def turned() -> Any:
    """Ten digits upright, lying to both sides and upside down: a domain each."""
    from burnish.continual import real
    from burnish.continual.streams import Stream, by_domain

    whole = real.digits(1993)
    train, test = ([r for t in whole.tasks for r in getattr(t, part)] for part in ("train", "test"))
    domains = {}
    for k in range(4):
        some = [[(x.rot90(k, (-2, -1)), y) for x, y in mixed(rows, k)] for rows in (train, test)]
        domains[f"turned by {90 * k}"] = some[0][:sum(TURNED[:2])], some[1][:TURNED[2]]
    return Stream("digits, turned", "digits", "domain", by_domain(domains), whole.model,
                  whole.collate, training=replace(whole.training, epochs=4))


def mixed(rows: Sequence[Any], seed: int) -> list[Any]:
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]


class Bench:
    """A stream of domains, a model tuned on each from one base, and heads that stay theirs."""

    def __init__(self, stream: Any, share: float):
        import torch

        self.stream = stream
        torch.manual_seed(0)
        self.model = stream.model()
        self.base = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.body = {n: t for n, t in self.base.items() if not n.startswith("classifier.")}
        cuts = [int(share * len(t.train)) for t in stream.tasks]
        self.train = [t.train[:n] for t, n in zip(stream.tasks, cuts, strict=True)]
        self.held = [t.train[n:] for t, n in zip(stream.tasks, cuts, strict=True)]
        self.test = [t.test for t in stream.tasks]

    def tune(self, recipe: str, rows: Sequence[Any]) -> Any:
        """A handle tuned on rows from the base."""
        import torch

        import burnish
        from burnish.continual.streams import logits_of
        from burnish.continual.training import Given, cross_entropy, teach

        self.model.load_state_dict(self.base)
        torch.manual_seed(0)
        tuned = burnish.tune(self.model, recipe, head=self.stream.head, seed=0)
        allowed = self.stream.classes(0)

        def make(some: list[Any]) -> Given:
            return Given(self.stream.collate([x for x, _ in some]),
                         torch.tensor([y for _, y in some]), {})

        teach(tuned, replace(self.stream.training, rate=RATES[recipe.partition("(")[0]]), make,
              logits_of, lambda logits, given: cross_entropy(logits, given.labels, allowed),
              rows, 0, head=("classifier.weight", "classifier.bias"))
        return tuned

    def score(self, weights: dict[str, Any], heads: Sequence[dict[str, Any]],
              sets: Sequence[Sequence[Any]]) -> list[float]:
        """Accuracy on each set, of a body with each task's head."""
        import torch

        from burnish.continual.streams import logits_of

        out = []
        self.model.eval()
        for head, rows in zip(heads, sets, strict=True):
            self.model.load_state_dict({**self.base, **weights, **head})
            x = self.stream.collate([x for x, _ in rows])
            with torch.no_grad():
                found = logits_of(self.model(**x) if isinstance(x, dict) else self.model(x))
            truth = torch.tensor([y for _, y in rows])
            out.append(float((found.argmax(-1) == truth).float().mean()))
        return out


def rows() -> Iterator[Row]:
    from burnish.continual import real

    digits = Bench(turned(), TURNED[0] / sum(TURNED[:2]))
    yield from merge(digits, "full")
    yield from merge(digits, "lora(rank=8)")
    yield from merge(Bench(real.tables(1993), 0.75), "full")


def merge(bench: Bench, recipe: str) -> Iterator[Row]:
    """Every way to merge models of one recipe on one bench."""
    from burnish.blocks.weight import factor_algebra
    from burnish.blocks.weight.factor import Chain
    from burnish.blocks.weight.taskvector import merged
    from burnish.core.recipe import parse

    models, heads, pairs = [], [], []
    for some in bench.train:
        tuned = bench.tune(recipe, some)
        pairs.append({n: factor_algebra.Factors(t.A.detach().double(), t.B.detach().double(),
                                                t.scale) for n, t in tuned.terms(Chain)})
        state = {n: t.detach().clone() for n, t in tuned.merge().state_dict().items()}
        models.append({n: state[n] for n in bench.body})
        heads.append({n: t for n, t in state.items() if n not in bench.body})
    alone = [bench.score(m, heads, bench.test)[j] for j, m in enumerate(models)]

    def row(how: str, scores: Sequence[float], **more: Any) -> Row:
        return {"table": f"{bench.stream.name}, {recipe}", "how": how,
                "tasks": [t.name for t in bench.stream.tasks],
                "scores": [round(s, 4) for s in scores], "mean": round(mean(scores), 4),
                "kept": round(mean(scores) / mean(alone), 4), **more}

    yield row("*each task's own model*", alone)
    every = bench.tune(recipe, [r for some in bench.train for r in some])
    joint = {n: t.detach().clone() for n, t in every.merge().state_dict().items()}
    yield row("*one model tuned on all rows*", bench.score(joint, [{}] * len(heads), bench.test))
    yield row("*the base under their heads*", bench.score({}, heads, bench.test))

    for how in RULES:
        parts = list(parse(how.rstrip("*")))
        more: Row = {}
        if how.endswith("*"):
            tried = {s: [*parts[:-1], replace(parts[-1], scale=s)] for s in SCALES}
            held = {s: mean(bench.score(dict(merged(bench.body, models, p)), heads, bench.held))
                    for s, p in tried.items()}
            best = max(held, key=lambda s: (held[s], -s))
            parts, more = tried[best], {"scale": best}
        made = dict(merged(bench.body, models, parts))
        yield row(how, bench.score(made, heads, bench.test), **more)

    for form, weight in FORMS if pairs[0] else ():
        weights, changed = [weight] * len(pairs), {}
        for name in pairs[0]:
            change = factor_algebra.merge(form, [p[name] for p in pairs], weights).dense()
            changed[name] = (bench.base[name].double() + change).to(bench.base[name].dtype)
        yield row(f"{form}, weights {weight}", bench.score(changed, heads, bench.test))


def belongs(cls: type) -> bool:
    from burnish.blocks.weight.taskvector import Changes, Rules

    return "lifecycle" in cls.axes() and issubclass(cls, Changes | Rules)


# -- what sources say -----------------------------------------------------------------------------
FULL, LORA = "digits, turned, full", "digits, turned, lora(rank=8)"
TABLES = "tables, by domain, full"


def beside(first: str, second: str, least: float = 0.0,
           tables: Sequence[str] = (FULL, LORA, TABLES)) -> Callable[[Rows], tuple[bool, str]]:
    """Is the mean of the first way above the second's by so much, on every table?"""
    def found(rows: Rows) -> tuple[bool, str]:
        pairs = [(one(rows, first, table=t)["mean"], one(rows, second, table=t)["mean"])
                 for t in tables]
        return all(a - b > least for a, b in pairs), "; ".join(
            f"{100 * a:.1f} beside {100 * b:.1f}" for a, b in pairs)

    return found


def kept(rows: Rows) -> tuple[bool, str]:
    own = [one(rows, "task_arithmetic*", table=t)["kept"] for t in (FULL, LORA, TABLES)]
    return min(own) >= 0.9, "; ".join(f"{100 * k:.1f} %" for k in own)


def drops(rows: Rows) -> tuple[bool, str]:
    _, said = beside("dare + task_arithmetic", "task_arithmetic")(rows)
    return beside("dare + task_arithmetic", "task_arithmetic", -0.015)(rows)[0], said


def exact(rows: Rows) -> tuple[bool, str]:
    a, b = (one(rows, how, table=LORA) for how in ("cat, weights 0.4", "task_arithmetic"))
    return a["scores"] == b["scores"], f"{100 * a['mean']:.1f} beside {100 * b['mean']:.1f}"


CLAIMS = (
    Claim("A sum of task vectors in one model keeps about nine tenths of the tasks' own models "
          "(task arithmetic, of eight tasks)",
          kept),
    Claim("TIES is better than task arithmetic, each at its default",
          beside("ties", "task_arithmetic")),
    Claim("TIES is better than task arithmetic, each at the scale that held-out rows choose",
          beside("ties*", "task_arithmetic*")),
    Claim("Nine tenths of a task vector's entries can be dropped before the sum (DARE): no more "
          "than 1.5 points are lost",
          drops),
    Claim("PCB-Merging is better than TIES, each at the scale that held-out rows choose",
          beside("pcb*", "ties*")),
    Claim("Stacked factors (`cat`) are the sum of the updates itself",
          exact),
    Claim("Sums of the factors themselves (`linear`) are worse than the sum of the updates: they "
          "have cross terms",
          beside("cat, weights 0.4", "linear, weights 0.4", tables=[LORA])))


def task(number: int) -> Callable[[Row], str]:
    return lambda row: f"{100 * row['scores'][number]:.1f}" if number < len(row["scores"]) else ""


LETTER = Letter(
    title="Merging models of one base",
    words="""
Four domains, four models tuned from one base, and one model made of them: scikit-learn's scanned
digits upright, lying to both sides and upside down (the glyph transformer), and cells of
scikit-learn's breast cancer by their texture (a network of three layers, trained on the smaller
cells). On the digits each task keeps its own head and the body is merged; the network is merged
whole. Accuracy on the tasks' test rows in per cent, one seed; *kept* is the mean beside that of
the tasks' own models. A star: the scale is the best on held-out rows that trained nothing. On a
command line it is `burnish combine`.""",
    belongs=belongs, rows=rows,
    columns={"mean": percent("mean"), "kept": percent("kept"),
             **{f"task {k + 1}": task(k) for k in range(4)},
             "scale": lambda r: f"{r['scale']:g}" if "scale" in r else ""},
    claims=CLAIMS,
    after="""
One thing is behind most of it: how far the merged change goes. `ties` and `pcb` keep a fifth and
a tenth of each task's entries and count a mean of those, so at their default scales (1 and 1.2)
they go less far than a sum at 0.4, and the held-out rows choose up to 2 for them, the end of the
range; then, but for `pcb` on the tables, the rules come within a few points of each other. `dare
+ ties` is near `task_arithmetic(scale=1.0)`: where nine of ten entries are gone, two tasks seldom
meet in one, and an election without opponents is a sum. On the tables a row is 0.7 of a point of
the mean.""")
