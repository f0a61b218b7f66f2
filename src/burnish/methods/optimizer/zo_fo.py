from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.hybrid import Hybrid
from ...blocks.update.rules import SGD, AdamW, Lion, Rule
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class ZoFo(Method):
    """Hybrid ZO-FO: gradients for the last blocks and the head, probes for the first blocks.

    The first k blocks (`layers`, in the order they run; None: half) and what runs before them:

        z ~ N(0, I),   g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)     eval mode, no graph
        theta <- theta - zo_rate lr (g z + wd theta)

    The other blocks and what runs behind them, by one forward in the mode the model trains in:

        theta <- theta - lr rule(dL/dtheta)

    Both at the same weights, on the same batch, where z is of the first part alone. No graph is
    made below block k: no activations, gradients or moments of it are kept, so that k trades
    quality for memory (`burnish simulate` says what each takes). A tensor read both below and
    above, such as a tied embedding, is probed.

    Start: the function as it is. Kept: what `rule` keeps of the part above (adam 2, momentum and
    lion 1 number a weight), nothing below. Takes 2 forwards a probe beside the step of the part
    above. lr is that of gradients; `zo_rate`, and k as half of the blocks, are no published values
    but best readings: ratios of 1e-4 to 1e-2 join the rates published for each kind. Noise,
    scratch, rounding and fp32 losses as in `mezo`; no log repeats a run, since gradients moved it
    too. Objectives beside the loss and schedules are refused; one process.
    """

    paper: ClassVar[str] = ("Revisiting Zeroth-Order Optimization for Memory-Efficient LLM "
                            "Fine-Tuning: A Benchmark, ICML 2024")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})

    layers: int | None = setting(None, "k, blocks that are probed, from the first; None: half",
                                 unseen="of two blocks one is the only number: "
                                        "tests/methods/test_zo_fo.py")
    rule: Literal["adam", "sgd", "momentum", "lion"] = setting(
        "adam", "what is made of the gradients above")
    zo_rate: float = setting(1e-3, "learning rate of what is probed over that of the rest")
    eps: float = setting(1e-3, "radius of the probe; 1e-2 with LoRA, 1e-1 with prefixes")
    queries: int = setting(1, "probes averaged per update, two forwards each")
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    mode: Literal["scratch", "in_place"] = setting("scratch", "where the perturbed weights live")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Hybrid:
        rules: dict[str, Rule] = {"adam": AdamW(), "sgd": SGD(), "momentum": SGD(momentum=0.9),
                                  "lion": Lion()}
        return Hybrid(layers=self.layers, above=rules[self.rule], rate=self.zo_rate, eps=self.eps,
                      queries=self.queries, weight_decay=self.weight_decay, mode=self.mode,
                      noise=self.noise)
