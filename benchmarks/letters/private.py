"""Letter D, second half: accuracy at what a row may say of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

RECIPES = ("linear_probe", "norms", "bitfit", "lora(rank=4)", "lora(rank=4, train_a=False)", "full")
#: beside a LoRA, in the place of dp
CHOOSES = ("rldp(every=3)", "rldp(swing=1)")
BUDGETS = (1.0, 3.0, 8.0, None)
#: rows that train, expected rows of an update, updates, learning rate of Adam, largest norm C
ROWS, BATCH, UPDATES, RATE, NORM = 800, 60, 30, 3e-3, 1.0


def network() -> Any:
    """Three layers and two norms; rows are 64 grey values from 0 to 1."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
            self.classifier = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            h = nn.functional.gelu(self.norm1(self.one(x)))
            return self.classifier(nn.functional.gelu(self.norm2(self.two(h))))

    return Net()


def data() -> tuple[Any, ...]:
    """(public rows, labels), (rows that train), (test rows): scans; the last two lie on their side
    and are paler."""
    import torch
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    side = 0.2 + 0.6 * x.rot90(1, (1, 2))
    parts = slice(0, 400), slice(400, 400 + ROWS), slice(400 + ROWS, None)
    return tuple(((x if i == 0 else side)[p].flatten(1), y[p]) for i, p in enumerate(parts))


def loss(out: Any, batch: Any) -> Any:
    from torch.nn import functional as F

    return F.cross_entropy(out, batch[1])


def rows() -> Iterator[Row]:
    import torch

    public, own, test = data()
    torch.manual_seed(0)
    base = network()
    optimizer = torch.optim.AdamW(base.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(base(public[0]), public).backward()
        optimizer.step()
    torch.nn.init.zeros_(base.classifier.weight)     # the head is new: nothing of it is public
    torch.nn.init.zeros_(base.classifier.bias)
    for recipe in RECIPES:
        yield line(recipe, base, own, test)
    for part in CHOOSES:
        yield line("lora(rank=4)", base, own, test, part)


def line(recipe: str, base: Any, own: Any, test: Any, part: str = "dp") -> Row:
    import torch

    import burnish

    out: Row = {"table": "digits on their side", "how": f"{recipe} + {part}"}
    name, _, more = part.rstrip(")").partition("(")
    for budget in BUDGETS if part == "dp" else BUDGETS[:-1]:
        said = "" if budget is None else (f" + {name}(epsilon={budget}, records={ROWS}, "
                                          f"batch={BATCH}, max_norm={NORM}, {more})")
        tuned = burnish.tune(copy.deepcopy(base), recipe + said, head=True, seed=0)
        tuned.total_steps = UPDATES
        tuned.optimizer(lr=RATE, weight_decay=0.0)
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        tuned.model.train()
        for _ in range(UPDATES):                     # each row by itself, as the accountant counts
            some = (torch.rand(ROWS, generator=draw) < BATCH / ROWS).nonzero().flatten()
            tuned.step((own[0][some], own[1][some]), loss=loss)
        tuned.model.eval()
        with torch.no_grad():
            right = tuned.model(test[0]).argmax(-1) == test[1]
        out["none" if budget is None else f"{budget:g}"] = round(float(right.float().mean()), 4)
        out["trained"] = sum(p.numel() for p in tuned.parameters())
    return out


def belongs(cls: type) -> bool:
    return getattr(cls, "private", False) is True    # a number elsewhere: private experts of mos


def better(first: str, second: str, keys: tuple[str, ...], least: float = 0.0, part: str = "dp"
           ) -> Callable[[Rows], tuple[bool, str]]:
    """At each of these epsilons. part: beside the first."""
    def found(rows: Rows) -> tuple[bool, str]:
        one_, two = one(rows, f"{first} + {part}"), one(rows, f"{second} + dp")
        return all(one_[k] - two[k] >= least for k in keys), "; ".join(
            f"{100 * one_[k]:.1f} beside {100 * two[k]:.1f} at epsilon {k}" for k in keys)

    return found


def dearer(rows: Rows) -> tuple[bool, str]:
    found = [[r[k] for k in ("1", "3", "8", "none")] for r in rows if "none" in r]
    return all(a <= b + 0.01 for f in found for a, b in zip(f, f[1:], strict=False)), "; ".join(
        f"{100 * min(f):.1f} to {100 * max(f):.1f}" for f in found)


LETTER = Letter(
    title="What a row may say of itself",
    words=f"""
A network of three layers with layer norms learns 400 of scikit-learn's scanned digits, which
are public, loses its head, and is tuned on {ROWS} others that lie on their side and are paler,
each of which is to say little of itself: `dp(epsilon=...)` beside each way to tune, delta one in
{ROWS}, updates of {BATCH} rows on average drawn each by itself, {UPDATES} updates of AdamW at
{RATE:g}, norms clipped to {NORM:g}; a new head trains in every row. `rldp` has a norm for each
place, chosen with the noise every 3 updates, or (`swing=1`) constant. Accuracy on the other 597 in
per cent, one seed; *none* is without noise and clipping. The rate and the clipping are the same
for all and were chosen nowhere (a search on private rows would have to be charged).""",
    belongs=belongs, rows=rows,
    columns={"trained": number("trained"),
             **{f"epsilon {k}": percent(k) for k in ("1", "3", "8")}, "none": percent("none")},
    claims=(
        Claim("Less may be said, less is learnt: accuracy does not fall by more than a point from"
              " epsilon 1 to 3, to 8, to none",
              dearer),
        Claim("Scales and shifts of norms with the head come as far as all weights, within two "
              "points, at epsilon 1 (few-shot FiLM)",
              better("norms", "full", ("1",), -0.02)),
        Claim("So they do at epsilon 8",
              better("norms", "full", ("8",), -0.02)),
        Claim("They are better than the head alone at epsilon 8 (few-shot FiLM)",
              better("norms", "linear_probe", ("8",), 1e-9)),
        Claim("Fewer numbers that train do better where little may be said: biases are no worse "
              "than all weights at epsilon 1",
              better("bitfit", "full", ("1",))),
        Claim("A LoRA whose A stays as drawn is better than one with noise in both factors "
              "(DP-LoRA, FFA)",
              better("lora(rank=4, train_a=False)", "lora(rank=4)", ("1", "3", "8"), 1e-9)),
        Claim("A policy that sets norms and noise while it trains is better than one norm and one "
              "noise (RLDP)",
              better("lora(rank=4)", "lora(rank=4)", ("1", "3", "8"), 1e-9, "rldp(every=3)"))),
    after="""
800 rows are few to hide in: at epsilon 8 the best loses 28 points of what it learns without
noise. Where only little may be said, the few scales and shifts (or biases) keep up with all
weights; from epsilon 3 on what can learn more does. Whether A trains makes no difference that one
seed could tell at epsilon 1, and at 3 and 8 both factors are better. Ten windows are trials to a
policy, which are paid for. A norm for each place without a policy is a point behind one norm at 1,
three behind at 3 and three ahead at 8.""")
