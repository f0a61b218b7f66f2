from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.forward import ForwardGrad as Rule
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class ForwardGrad(Method):
    """Forward-Grad: the slope of the loss along a random direction, by one forward and no backward.

        z ~ N(0, I)      g = <grad L(theta), z>      theta <- theta - lr (g z + wd theta)

    on the batch in eval mode; g is exact (what `mezo` estimates as its eps goes to 0), so E[g z] is
    the gradient and there is no radius to choose. `queries` directions are averaged, one forward
    each. Learning rates as small as `mezo`'s: |g z|^2 is (d + 2) times that of the gradient.

    No state. z is drawn again where the weights move; while the loss is evaluated it stands beside
    them (as much again as what trains), with a tangent beside each activation of a layer, and
    attention runs unfused. Parts whose operations have no forward derivative are refused, and so
    are objectives beside the loss (take `mezo`). The log repeats a run as `mezo`'s does.
    """

    paper: ClassVar[str] = ("Gradients without Backpropagation (2022), arXiv:2202.08587; "
                            "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM "
                            "Fine-Tuning: A Benchmark, ICML 2024")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("simulated_is_measured on mixtral", "simulated_is_measured on qwen_moe"),
        "experts run one by one, on as many tokens as each is sent, which only values tell: a "
        "simulation says so and names burnish.measure; tests/methods/test_forward_grad.py steps")

    queries: int = setting(1, "directions averaged per update, a forward each")
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Rule:
        return Rule(queries=self.queries, noise=self.noise, weight_decay=self.weight_decay)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 0
