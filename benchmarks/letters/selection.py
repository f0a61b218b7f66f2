"""Letter H: which rows of a large pool are worth training on, for a few that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .letter import Claim, Letter, Row, Rows, one, percent

RECIPE, RATE, HEAD, BATCH, UPDATES = "lora(rank=8)", 3e-3, 1e-2, 32, 40
#: of each turn in the pool; wanted rows; chosen of the pool; test rows
EACH, WANTED, CHOSEN, TEST = 80, 20, 80, 300
SIDE = 1                                             # what is wanted: scans turned by 90 degrees
HOW = (f"less(fraction={CHOSEN / (4 * EACH)}, dimension=256)", f"goracs(coreset={CHOSEN})",
       f"goracs(coreset={CHOSEN}, alpha=0.0)")
ONLINE = "uds(best=8)"


class Pool:
    """Scans turned in four ways, some of one way that are wanted, and a model to tune."""

    def __init__(self) -> None:
        import torch

        from .merging import turned

        self.stream = turned()
        torch.manual_seed(0)
        self.model = self.stream.model()
        self.base = {n: t.clone() for n, t in self.model.state_dict().items()}
        rows = [(x, y, k) for k, t in enumerate(self.stream.tasks) for x, y in t.train[:EACH]]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows = [rows[i] for i in order]
        # the names of domains say how far they are turned; tasks come in an order of their own
        self.side = next(k for k, t in enumerate(self.stream.tasks)
                         if t.name == f"turned by {90 * SIDE}")
        own = self.stream.tasks[self.side]
        self.wanted = [(x, y, self.side) for x, y in own.train[EACH:EACH + WANTED]]
        self.test = [(x, y, self.side) for x, y in own.test[:TEST]]

    def batch(self, rows: Sequence[Any]) -> dict[str, Any]:
        import torch

        return {**self.stream.collate([x for x, _, _ in rows]),
                "labels": torch.tensor([y for _, y, _ in rows])}

    def tuned(self, recipe: str = RECIPE) -> Any:
        """A fresh handle on the base."""
        import torch

        import burnish

        self.model.load_state_dict(self.base)
        torch.manual_seed(0)
        made = burnish.tune(self.model, recipe, head=True, seed=0)
        for n, p in made.named_parameters():
            if n.startswith("classifier."):
                p.burnish_lr = HEAD / RATE
        return made

    def train(self, made: Any, rows: Sequence[Any], updates: int = UPDATES,
              after: Callable[[int], None] = lambda step: None) -> None:
        import torch

        made.total_steps = updates
        optimizer = made.optimizer(lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / updates)
        made.model.train()
        draw = torch.Generator().manual_seed(0)
        order: list[int] = []
        for step in range(updates):
            while len(order) < BATCH:
                order += torch.randperm(len(rows), generator=draw).tolist()
            made.step(self.batch([rows[i] for i in order[:BATCH]]))
            schedule.step()
            order = order[BATCH:]
            after(step)

    def score(self, made: Any) -> float:
        import torch

        made.model.eval()
        batch = self.batch(self.test)
        labels = batch.pop("labels")
        with torch.no_grad():
            found = made.model(**batch).logits.argmax(-1)
        made.detach()
        return round(float((found == labels).float().mean()), 4)


def rows() -> Iterator[Row]:
    import torch

    import burnish

    pool = Pool()

    def row(how: str, some: Sequence[Any], recipe: str = RECIPE) -> Row:
        made = pool.tuned(recipe)
        pool.train(made, some)
        like = sum(k == pool.side for _, _, k in some) / len(some)
        return {"table": "scans in four turns, wanted: on their side", "how": how,
                "rows": len(some), "like": round(like, 4), "accuracy": pool.score(made)}

    yield row("*all of the pool*", pool.rows)
    yield row("*the wanted rows alone*", pool.wanted)
    yield row("*those turned as the wanted ones are*",
              [r for r in pool.rows if r[2] == pool.side])
    for seed in range(3):
        draw = torch.Generator().manual_seed(100 + seed)
        some = torch.randperm(len(pool.rows), generator=draw)[:CHOSEN].tolist()
        yield row(f"*random, draw {seed + 1}*", [pool.rows[i] for i in some])
    yield row(f"{RECIPE} + {ONLINE}", pool.rows, f"{RECIPE} + {ONLINE}")

    for how in HOW:
        part = burnish.parse(how)[0]
        made = pool.tuned()
        points = warm(pool, made) if part.at_points else []
        scores = part.lifecycle(made, points, [pool.batch([r]) for r in pool.rows],
                                {"": [pool.batch([r]) for r in pool.wanted]})
        made.detach()
        yield row(how, [pool.rows[i] for i in part.chosen(scores)])


def warm(pool: Pool, made: Any) -> list[Any]:
    """A warm-up on a tenth of the pool, and where it stood at its half and its end."""
    import torch

    from burnish.methods.lifecycle.less import Point

    points = []

    def keep(step: int) -> None:
        if step in (4, 9):
            state = made.current_optimizer.state
            moments = {n: {k: torch.as_tensor(state[p][k]).clone()
                           for k in ("exp_avg", "exp_avg_sq", "step")}
                       for n, p in made.named_parameters()}
            points.append(({n: t.detach().clone() for n, t in made.tensors(made.training).items()},
                           moments))

    pool.train(made, pool.rows[:len(pool.rows) // 10], 10, keep)
    # mean rates of the two halves of a line to zero
    return [Point(rate=RATE * r, read=lambda p=p: p)
            for r, p in zip((0.8, 0.3), points, strict=True)]


def belongs(cls: type) -> bool:
    """What chooses rows before a run; `uds`, which does so in one, has a row beside them."""
    return getattr(cls, "chooses", False)


def random(rows: Rows) -> float:
    found = [r["accuracy"] for r in rows if r["how"].startswith("*random")]
    return sum(found) / len(found)


def above(how: str) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = one(rows, how)["accuracy"], random(rows)
        return a > b, f"{100 * a:.1f} beside {100 * b:.1f}, the mean of three draws"

    return found


def beside(first: str, second: str) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (one(rows, how)["accuracy"] for how in (first, second))
        return a >= b, f"{100 * a:.1f} beside {100 * b:.1f}"

    return found


def likeness(rows: Rows) -> tuple[bool, str]:
    found = [one(rows, how)["like"] for how in HOW[:2]]
    return min(found) > 0.5, "; ".join(f"{100 * x:.0f} %" for x in found) + " beside 25 %"


LETTER = Letter(
    title="Choosing rows to train on",
    words="""
A pool of 320 of scikit-learn's scanned digits, 80 of each quarter turn, and 20 more that say what
is wanted: scans on their side. A quarter of the pool is chosen for them, and the glyph
transformer with a fresh head is tuned on the choice, 40 updates of 32 rows each time, by a LoRA.
Accuracy on 300 test scans on their side, one seed; *like* is the share of the rows that are
turned as the wanted ones are. `uds` chooses among the 32 rows of each batch as it trains. On a
command line it is `burnish select`.""",
    belongs=belongs, rows=rows,
    columns={"accuracy": percent("accuracy"), "like": percent("like"),
             "rows": lambda r: str(r["rows"])},
    claims=(
        Claim("Rows whose gradients point where the wanted rows point are better than random ones"
              " (LESS)",
              above(HOW[0])),
        Claim("They are as good as the whole pool (LESS)",
              beside(HOW[0], "*all of the pool*")),
        Claim("A set that as a whole lies where the wanted rows lie is better than a random one "
              "(GORACS)",
              above(HOW[1])),
        Claim("The gradient term helps (GORACS)",
              beside(HOW[1], HOW[2])),
        Claim("More than half of what is chosen is turned as the wanted rows are (LESS, GORACS)",
              likeness),
        Claim("Choosing a quarter of each batch is as good as training on all of it (UDS)",
              beside(f"{RECIPE} + {ONLINE}", "*all of the pool*"))),
    after="""
With 40 updates on few rows, rows count: all of the pool and the right quarter are far above a
random quarter. `less` finds little here: gradients of single rows are hardly alike (a cosine of
0.03 with the wanted rows for those on their side, 0.02 for the others, and a deviation of 0.02),
after a warm-up of ten updates and with a new head whose classes are the same in every turn; 1,024
numbers a row in place of 256 chose 38 % alike and came to 45.7, so the projection is not what is
missing. `goracs` looks at embeddings, in which turned scans do lie apart. `uds` prefers large
logits: of a classifier a row's logits are one line, whose nuclear norm is its length, so the
surest rows train and the others never do.""")
