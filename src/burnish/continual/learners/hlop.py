from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.choose.hebbian import Lateral
from ...blocks.update.noise import fold
from ...core.batches import call
from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ...core.site import Place
from ...engine.stages import divides
from ..learner import Learner, Stored, Study, count
from ..training import batches


@dataclass
class Hlop(Learner):
    """HLOP: updates of a linear weight keep off the directions that its past inputs vary in.

        W <- W + dW - dW H^T H                         every update of a task, from the second on
        H <- H + rate mean_n y_n (x_n - H^T y_n)^T     y = H x, over its rows once it is learnt

    H (k, in) of each layer is learnt by a Hebbian rule (Oja's, blocks/choose/hebbian.py), in
    `passes` over a task's rows: so many `neurons` more a task, a share of the layer's inputs, for
    what those before them leave. An answer to an input within their span stays bit for bit nearly
    as it was. Tensors without such inputs (biases, norms, convolutions, tables) stay, after the
    first task, as it left them.

    For recipes that train weights of linears whole (``full``, ``full(targets="fc1,fc2")``): a
    product of factors turns both its sides, and what B takes from A's side no projection of A
    undoes. When to use: no row of the past may be kept, and layers are wider than all tasks' inputs
    together need. When not: many tasks on narrow layers, which come to have no free direction left.

    Stores k in numbers a layer. Departures: the authors' spiking networks carry traces over time
    where inputs stand here; their gradients are made of projected inputs, here the update is
    projected, which is the same for plain descent and holds for any rule; the neurons learn after
    a task and not in its last passes; inputs are in units of what settled neurons leave
    (unconfirmed: numbers of neurons, rate and passes).
    """

    paper: ClassVar[str] = ("Hebbian Learning based Orthogonal Projection for Continual Learning "
                            "of Spiking Neural Networks, ICLR 2024, arXiv:2402.11984")

    neurons: float = setting(0.1, "that a task adds, a share of a layer's inputs")
    rate: float = setting(0.5, "of the Hebbian rule")
    passes: int = setting(5, "over a task's rows, in which its neurons learn")
    compete: Literal["seen", "current"] = setting(
        "seen", "classes that compete in training: seen so far, or of this task alone")

    def __post_init__(self) -> None:
        if not 0 < self.neurons <= 1 or not 0 < self.rate <= 1 or self.passes < 1 \
                or self.compete not in ("seen", "current"):
            raise ConfigError("hlop: neurons and rate above 0 and up to 1, passes of at least 1 "
                              "and compete of 'seen' or 'current' are expected, got "
                              f"{self.neurons}, {self.rate}, {self.passes} and {self.compete!r}")

    @property
    def current(self) -> bool:                       # type: ignore[override]
        return self.compete == "current"

    def check(self, study: Study) -> None:
        super().check(study)
        if (part := divides(study.recipe)) is not None:
            raise RecipeError(f"{part.name} has its own way through tasks, and so has hlop: leave "
                              "it out")

    def begin(self, study: Study) -> None:
        super().begin(study)
        named = dict(self.tuned.named_parameters())
        self.lateral: dict[str, tuple[Place, Lateral]] = {}
        for place in self.tuned.anatomy.places:
            name = f"{place.path}.{place.param}" if place.path else place.param
            module = self.tuned.model.get_submodule(place.path)
            if place.kind in ("linear", "conv1d") and name in named and not place.rows \
                    and getattr(module, place.param, None) is named[name]:
                self.lateral[name] = place, Lateral(place.inp, named[name])
        outside = [n for n in named if n not in self.head]
        if not set(self.lateral) & set(outside) or any(".burnish." in f".{n}" for n in outside):
            raise RecipeError(f"hlop projects updates of linear weights that train whole, and "
                              f"{study.recipe} trains something else: 'full', or "
                              "'full(targets=...)'")
        self.draw = torch.Generator().manual_seed(study.seed)

    def learn(self, t: int) -> None:
        rows = self.study.stream.tasks[t].train
        self.last = {n: p.detach().clone() for n, p in self.tuned.named_parameters()}
        self.teach(rows, t, after=self._project if t else None)
        self.last = {}
        self._hear(rows, t)

    @torch.no_grad()
    def _project(self) -> None:
        """What the last update has added keeps off the neurons' directions."""
        for n, p in self.tuned.named_parameters():
            if n in self.lateral:
                place, lateral = self.lateral[n]
                D = (place.view(p) - place.view(self.last[n])).to(lateral.H)
                p.copy_(self.last[n] + place.unview(lateral.off(D), p).to(p.dtype))
            else:
                p.copy_(self.last[n])
            self.last[n].copy_(p)

    @torch.no_grad()
    def _hear(self, rows: Any, t: int) -> None:
        """Neurons for task t learn of what its rows are in each layer."""
        for place, lateral in self.lateral.values():
            lateral.grow(max(1, int(self.neurons * place.inp)), self.draw)
        self.tuned.model.eval()
        for k in range(self.passes):
            for some in batches(rows, self.study.training.batch, fold(self.study.seed, t, k)):
                given = self.given(some, t)
                keys = {k: v for k, v in given.keys.items() if k in self.keys}
                mask = given.inputs.get("attention_mask") if isinstance(given.inputs, dict) \
                    else None
                with self._listening(mask), self.tuned.given(**keys):
                    call(self.tuned.model, given.inputs)

    @contextmanager
    def _listening(self, mask: Tensor | None) -> Iterator[None]:
        def hook(lateral: Lateral) -> Any:
            def hear(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach()
                counts = mask is not None and x.shape[:-1] == mask.shape
                lateral.learn((x[mask.bool()] if counts else x).reshape(-1, x.shape[-1]), self.rate)
            return hear

        hooks = [self.tuned.model.get_submodule(place.path).register_forward_pre_hook(hook(lateral))
                 for place, lateral in self.lateral.values()]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()

    def stored(self) -> Stored:
        return count([*self.held().values(), *(one.H for _, one in self.lateral.values())])
