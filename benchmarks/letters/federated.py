"""Letter D, first half: clients that keep their rows, and what they send."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

CLIENTS, ROUNDS, SKEW = 8, 3, 0.1
WORDS = {"rounds": ROUNDS, "epochs": 1, "batch": 16, "lr": 3e-3}
#: recipe, rule, what else is said
MEANS = (("linear_probe", {}), ("bitfit", {}), ("houlsby", {}), ("vpt", {}), ("lora(rank=8)", {}),
         ("lora(rank=8, train_a=False)", {}), ("full", {"lr": 3e-4}))
STACKS = ((None, ()), (8, ()), (None, (16, 8, 4)))
CODED = ("bf16", "8bit", "signs")
LORA = "lora(rank=8)"
SPLIT = "sfprompt(local_updates=2, pruned=0.4)"


def rows() -> Iterator[Row]:
    from burnish.federated import run
    from burnish.federated.client import Client

    def made(recipe: str, ranks: tuple[int, ...] = ()) -> Any:
        return run.setting(recipe, clients=CLIENTS, alpha=SKEW, ranks=ranks, seed=0, **WORDS)

    def row(how: str, figure: float, told: dict[str, Any] | None = None, **more: Any) -> Row:
        sent = {} if told is None else {k: told[k] // (CLIENTS * ROUNDS) for k in ("up", "down")}
        return {"table": f"digits among {CLIENTS} clients", "how": how,
                "accuracy": round(figure, 4), **sent, **more}

    at = made(LORA)
    metric = at.task.metric
    yield row("*the base, a fresh head*", at.score(at.model, at.last)[metric])
    alone = []
    for client in at.clients:
        _, figures, _ = run.once(at, clients=[client])
        alone.append(figures[metric])
    yield row(f"*{LORA}, each client alone*", sum(alone) / len(alone))
    everybody = Client("everybody", run.Part(at.clients[0].rows.rows, list(range(len(
        at.clients[0].rows.rows)))), at.clients[0].collate)
    _, figures, _ = run.once(at, clients=[everybody])
    yield row(f"*{LORA}, all rows in one place*", figures[metric])

    for recipe, words in MEANS:
        done, figures, _ = run.once(made(recipe), **words)
        yield row(f"{recipe}, mean", figures[metric], done.bytes)
    for rank, ranks in STACKS:
        done, figures, _ = run.once(made(LORA, ranks), "stack", rank)
        said = "" if rank is None else f" of rank {rank}"
        said += f", ranks {', '.join(map(str, ranks))}" if ranks else ""
        errors = getattr(done.server.rule, "errors", [])
        yield row(f"{LORA}, stack{said}", figures[metric], done.bytes,
                  **({"left_out": round(max(errors), 4)} if errors else {}))
    for coding in CODED:
        done, figures, _ = run.once(at, up=coding)
        yield row(f"{LORA}, mean, up in {coding}", figures[metric], done.bytes)
    yield split(at, row)


def split(at: Any, row: Callable[..., Row]) -> Row:
    """SFPrompt on the same clients; each batch crosses to the server and back."""
    import burnish

    tuned = burnish.tune(copy.deepcopy(at.model), "vpt(length=4)", head=True, seed=0)
    method = burnish.parse(SPLIT)[0]
    clients = []
    for c in at.clients:
        some = [c.rows[i] for i in range(len(c.rows))]
        clients.append([c.collate(some[i:i + WORDS["batch"]])
                        for i in range(0, len(some), WORDS["batch"])])
    up = down = 0
    for _ in range(ROUNDS):
        for report in method.lifecycle(tuned, clients, lr=1e-2):
            own = sum(t.nbytes for t in report.state.values())
            up += report.traffic.sent + own
            down += report.traffic.received + own
    figure = at.score(tuned.model, at.last)[at.task.metric]
    return row(f"vpt(length=4) + {SPLIT}", figure, {"up": up, "down": down})


def belongs(cls: type) -> bool:
    """Methods whose lifecycle is told of clients."""
    return "lifecycle" in vars(cls) and "clients" in inspect.signature(
        vars(cls)["lifecycle"]).parameters


def near(first: str, second: str, most: float) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (one(rows, how)["accuracy"] for how in (first, second))
        return a >= b - most, f"{100 * a:.1f} beside {100 * b:.1f}"

    return found


def fewer(first: str, second: str, times: float) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (one(rows, how)["up"] for how in (first, second))
        return b >= times * a, f"{a:,} beside {b:,} bytes up, {b / a:.1f} times"

    return found


ALONE, POOLED = f"*{LORA}, each client alone*", f"*{LORA}, all rows in one place*"
LETTER = Letter(
    title="Clients that keep their rows",
    words=f"""
scikit-learn's scanned digits divided among {CLIENTS} clients by a Dirichlet law of {SKEW} (most
of a client's rows are of a few digits), the glyph transformer with a fresh head, {ROUNDS} rounds
of one pass over each client's rows in batches of 16. Accuracy on the 899 test scans in per cent,
one seed; bytes are of a client's messages in a round, head and all. *mean* averages what trains,
*stack* adds the updates themselves. The rate is 3e-3 for all (3e-4 where the whole model trains),
chosen nowhere. On a command line it is `burnish federate`.""",
    belongs=belongs, rows=rows,
    columns={"accuracy": percent("accuracy"), "bytes up": number("up"),
             "bytes down": number("down"), "left out of the sum": percent("left_out")},
    claims=(
        Claim("Exchanging a small part comes as far as exchanging all, within two points "
              "(FedPEFT; its prototype is bias)",
              near("bitfit, mean", "full, mean", 0.02)),
        Claim("So does LoRA",
              near("lora(rank=8), mean", "full, mean", 0.02)),
        Claim("Biases with the head take a hundredth of the bytes or less (FedPEFT)",
              fewer("bitfit, mean", "full, mean", 100)),
        Claim("The exact sum by stacking is better than the mean of factors (FLoRA)",
              near("lora(rank=8), stack", "lora(rank=8), mean", -1e-9)),
        Claim("It takes clients of unlike ranks and loses nothing: within two points (FLoRA)",
              near("lora(rank=8), stack, ranks 16, 8, 4", "lora(rank=8), stack", 0.02)),
        Claim("With A frozen the mean is exact, and no worse than the mean of both factors",
              near("lora(rank=8, train_a=False), mean", "lora(rank=8), mean", 0.0)),
        Claim("A federation is better than each client alone",
              near("lora(rank=8), mean", ALONE, -1e-9)),
        Claim("It is as good as all rows in one place, within two points",
              near("lora(rank=8), mean", POOLED, 0.02)),
        Claim("Changes coded in 8 bits lose nothing: within half a point",
              near("lora(rank=8), mean, up in 8bit", "lora(rank=8), mean", 0.005))),
    after="""
`full` at a rate of its own is the worst of all here: three rounds do not bring it far. `sfprompt`
trains a prompt and the head on the client and sends states, not weights; its bytes grow with
rows, those of the others do not. A client's signs alone (ComPEFT's code, 40 times fewer bytes)
cost 30 points in three rounds at their default size.""")
