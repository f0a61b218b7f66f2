"""``burnish federate``: clients that keep their rows, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .screen import emit, say, table


@app.command()
def federate(
    recipe: Annotated[str, typer.Argument(help="What clients train, such as 'lora(rank=8)'.")],
    model: Annotated[str | None, typer.Option(help="A model folder or hub name; default the small "
                                                   "transformer that ships, for digits.")] = None,
    data: Annotated[str, typer.Option(help="What burnish fit takes.")] = "digits",
    clients: Annotated[int, typer.Option(help="Among how many the rows are divided.", min=1)] = 32,
    alpha: Annotated[float | None, typer.Option(
        help="Of the Dirichlet law that divides classes: small, and a client has few. Default 0.1; "
             "rows without classes are dealt out evenly.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
    sampled: Annotated[int | None, typer.Option(help="Clients of a round; default all.")] = None,
    epochs: Annotated[int, typer.Option(help="A client's passes in a round.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Rows of an update.", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    rule: Annotated[str, typer.Option(help="mean of what trains, or stack of factors.")] = "mean",
    rank: Annotated[int | None, typer.Option(help="Send the stack as the best of this rank.")
                    ] = None,
    ranks: Annotated[str | None, typer.Option(
        help="Ranks dealt to the clients in turn, e.g. 16,8,4; with --memory those that may be "
             "chosen.")] = None,
    memory: Annotated[str | None, typer.Option(
        help="What clients have, in turn, e.g. 20MB,40MB; each takes what fits.")] = None,
    up: Annotated[str, typer.Option(help="How clients' messages are coded: none, bf16, 8bit, "
                                         "signs.")] = "none",
    down: Annotated[str, typer.Option(help="How the server's are: none, bf16, 8bit.")] = "none",
    text: Annotated[str | None, typer.Option(help="The text's column.")] = None,
    label: Annotated[str | None, typer.Option(help="The label's column.")] = None,
    image: Annotated[str | None, typer.Option(help="The picture's column.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Beside the base, all rows in one "
                                                            "place, each client alone, and every "
                                                            "rule.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A client that fails ends it.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="A folder for the adapter (stack: the model) "
                                                     "and federation.json.")] = None,
    json: Json = False,
) -> None:
    """Train among clients: burnish federate 'lora(rank=8)' --clients 32 --rounds 3

    The rows of a data set are divided among clients in this process, who train in rounds and send
    what trained; bytes are those of their messages. --compare makes the table with what stands
    beside it. A recipe with dp(epsilon=8) protects each client's rows.
    """
    from ..federated import run
    from ..fit.assets import GLYPH_VIT

    if compare and output is not None:
        raise ConfigError("--compare writes a table of several runs, and --output takes one: leave "
                          "one of them out")
    if compare and rank is not None:
        raise ConfigError("--rank is of one stack, and --compare takes every rule as it is; leave "
                          "one of them out")
    if output is not None:
        run.check_output(output, rule, model, data)
    at = run.setting(recipe, model=model or GLYPH_VIT, data=data, clients=clients, alpha=alpha,
                     ranks=[_whole(r) for r in _list(ranks)], memory=_list(memory), seed=seed,
                     text=text, label=label, image=image, rounds=rounds, sampled=sampled,
                     epochs=epochs, batch=batch, lr=lr, up=up, down=down,
                     on_failure="refuse" if strict else "name")
    sizes = sorted(len(c.rows) for c in at.clients)
    told = f"{at.task.data}\n{clients} clients of {sizes[0]} to {sizes[-1]} rows" + (
        "" if at.alpha is None else f", classes divided with alpha {at.alpha:g}")
    if compare:
        tell = (lambda line: None) if json else say
        tell(told)
        rows = run.compare(at, tell)
        emit(json, {"recipe": recipe, "alpha": at.alpha, "rows": rows},
             "\n" + table(("", rows[0]["metric"], "sent up", "sent down", "seconds"),
                          [_way(r) for r in rows], range(1, 5)))
        return
    done, figures, made = run.once(at, rule, rank)
    facts = run.facts(at, done, figures)
    if output is not None:
        run.save(at, done, made, output, facts)
    emit(json, facts, "\n\n".join([told, _rounds(done, at.task.metric), _end(done, figures, at)]))


def _list(words: str | None) -> list[str]:
    return [w.strip() for w in words.split(",")] if words else []


def _whole(word: str) -> int:
    if not word.isdigit() or not int(word):
        raise ConfigError(f"--ranks: {word!r} is no rank; write them as 16,8,4")
    return int(word)


def _mega(n: int | None) -> str:
    return "" if n is None else f"{n / 1e6:.2f} MB"


def _way(row: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return (row["way"], "refused", "", "", "")
    return (row["way"], f"{row['figure']:.4f}", _mega(row.get("up")), _mega(row.get("down")),
            f"{row['seconds']:.0f}")


def _rounds(done: Any, metric: str) -> str:
    coded = done.bytes["up"] != done.bytes["plain_up"] or \
        done.bytes["down"] != done.bytes["plain_down"]
    head = ["round", "clients", "failed", "sent up", "sent down",
            *(["uncoded up", "uncoded down"] if coded else []), f"validation {metric}"]
    rows = [(r.number, len(r.clients), len(r.failed), _mega(r.up), _mega(r.down),
             *((_mega(r.plain_up), _mega(r.plain_down)) if coded else ()),
             f"{r.figures[metric]:.4f}") for r in done.rounds]
    failed = [f"round {r.number}: {name} failed: {why}" for r in done.rounds
              for name, why in r.failed.items()]
    return "\n".join([table(head, rows, range(len(head))), *failed])


def _end(done: Any, figures: dict[str, float], at: Any) -> str:
    lines = [f"{at.last}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items())]
    last = done.rounds[-1]
    spent = {c.name: t["epsilon"] for c in last.clients for t in c.told.values() if "epsilon" in t}
    if spent:
        most = max(spent, key=lambda n: spent[n])
        lines.append(f"spent by a client's rows: epsilon {spent[most]:.3f} at most ({most}); what "
                     "is protected is a row of a client")
    for name, choice in done.choices.items():
        lines.append(f"{name}: {choice.recipe}, batch {choice.batch}, {_mega(choice.needs)}")
    errors = getattr(done.server.rule, "errors", [])
    if errors:
        lines.append("left out of the stack's sum: "
                     + ", ".join(f"{100 * e:.2f} %" for e in errors))
    return "\n".join(lines)
