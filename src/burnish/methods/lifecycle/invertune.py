from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.choose.backdoor import inverted, outputs_of, risen, stamped, two_clusters, universal
from ...blocks.state.taps import evaluating
from ...core.anatomy import Anatomy
from ...core.errors import CheckError, ConfigError, DataError
from ...core.method import Method, setting
from ...core.targets import match
from ..objective.distill import logits_of


@dataclass(frozen=True)
class Erased:
    """target: the suspected class.  rise: shares of answers it gained under a universal change.
    mask, pattern: the trigger that was found.  neurons: layer -> those that were tuned.  attack,
    agree: before and after, shares of pictures with the trigger answered by the target (of those
    that are not without it), and of clean ones answered as before."""

    target: int
    rise: float
    mask: Tensor
    pattern: Tensor
    neurons: Mapping[str, Tensor]
    attack: tuple[float, float]
    agree: float


@dataclass(frozen=True, kw_only=True)
class InverTune(Method):
    """InverTune: find the class that a backdoor leads to, a trigger for it, and tune it away.

        1. one change of all pictures, max |d| <= sway, that leads most answers astray; the class
           whose answers rise most is suspected
        2. a trigger x' = (1 - m) x + m p:  min CE(f(x'), class) + patch mean(m)
        3. neurons whose mean |a(x') - a(x)| is of the upper of two clusters, layer by layer:
           min CE(f(x), what was answered) + weight mean (a(x') - a(x))^2 over their rows alone

    a(x) as the model was, a constant; rows are the neurons' own in weight and bias, all else stays
    bit for bit::

        found = burnish.parse("invertune(targets='features')")[0].lifecycle(model, pictures)
        found.target, found.attack, found.agree

    pictures: (n, channels, h, w), clean, no labels. Start: the model. Merges: it is the model that
    moves. Takes gradients of the pictures and of the chosen rows, all pictures at once.

    When: a classifier of somebody else's, and clean pictures. When not: triggers that are no patch;
    classes that a universal change leads to anyway: read `rise` and `attack`. All is a best reading
    (unconfirmed): of CLIP the class is a text's, and activations are matched in step 2 too.
    """

    paper: ClassVar[str] = "InverTune (2025), arXiv:2506.12411"
    tier: ClassVar[str] = "from the text"

    sway: float = setting(0.3, "largest number of the universal change")
    patch: float = setting(1.0, "weight of the size of the trigger")
    inversions: int = setting(200, "steps of the universal change and of the trigger, each")
    updates: int = setting(100, "steps of Adam on the neurons")
    step_rate: float = setting(1e-3, "learning rate of these updates")
    weight: float = setting(10.0, "of activations under the trigger")

    def __post_init__(self) -> None:
        if min(self.sway, self.step_rate) <= 0 or min(self.patch, self.weight) < 0 or \
                min(self.inversions, self.updates) < 1:
            raise ConfigError("invertune: a positive sway and step_rate, patch and weight of at "
                              "least 0, inversions and updates of at least 1 are expected")

    def lifecycle(self, model: nn.Module, pictures: Tensor) -> Erased:
        """Tunes a plain model that classifies pictures, and says what was found."""
        if not isinstance(model, nn.Module):
            raise ConfigError("invertune takes a plain model; merge what was tuned first")
        if not isinstance(pictures, Tensor) or pictures.dim() != 4 or len(pictures) < 2:
            raise DataError("invertune takes clean pictures (n, channels, height, width), two or "
                            "more")
        places = [p for p in match(Anatomy.of(model), self.targets) if not p.rows]
        layers = {p.path: model.get_submodule(p.path) for p in places
                  if isinstance(model.get_submodule(p.path), nn.Linear | nn.Conv2d)}
        if not layers:
            raise ConfigError("invertune tunes rows of linears and convolutions, and there is none "
                              "among these targets")
        x = pictures.to(next(model.parameters()).device)

        def logits(some: Tensor) -> Tensor:
            return logits_of(model(some), "invertune")

        with evaluating([m for m in model.modules() if m.training]):
            change = universal(logits, x, self.sway, self.inversions, self.sway / 10)
            rise = risen(logits, x, change)
            target = int(rise.argmax())
            if not rise[target] > 0:
                raise CheckError("invertune: no answer becomes more frequent under a change of "
                                 f"{self.sway:g}, so none is suspected; nothing was moved. A "
                                 "larger sway= may show one")
            mask, pattern = inverted(logits, x, target, self.patch, self.inversions, 0.1)
            bad = stamped(x, mask, pattern)
            with torch.no_grad(), outputs_of(layers) as seen:
                said = logits(x).argmax(1)
                clean = dict(seen)
                before = logits(bad).argmax(1)
                neurons = {n: two_clusters((seen[n] - clean[n]).abs().mean(0)) for n in layers}
            self._tune(logits, layers, neurons, x, bad, said, clean)
            with torch.no_grad():
                agree, after = logits(x).argmax(1) == said, logits(bad).argmax(1)
        others = said != target                      # some are: its answers could not have risen

        def share(answers: Tensor) -> float:
            return float((answers[others] == target).double().mean())

        return Erased(target, float(rise[target]), mask, pattern, neurons,
                      (share(before), share(after)), float(agree.double().mean()))

    def _tune(self, logits: Any, layers: Mapping[str, nn.Module], neurons: Mapping[str, Tensor],
              x: Tensor, bad: Tensor, said: Tensor, clean: Mapping[str, Tensor]) -> None:
        rows = [(p, neurons[n]) for n, m in layers.items() for p in m.parameters()
                if neurons[n].any()]
        chosen = [p.detach()[r].clone().requires_grad_() for p, r in rows]
        adam = torch.optim.Adam(chosen, self.step_rate)
        for _ in range(self.updates):
            with torch.enable_grad(), outputs_of(layers) as seen:
                loss = F.cross_entropy(logits(x), said)
                logits(bad)
                for n, r in neurons.items():
                    if r.any():
                        off = (seen[n] - clean[n])[:, r].square().mean()
                        loss = loss + self.weight * off
                grads = torch.autograd.grad(loss, [p for p, _ in rows])
            if not all(bool(g.isfinite().all()) for g in grads):
                raise CheckError("invertune: a gradient is not finite")
            for c, g, (_, r) in zip(chosen, grads, rows, strict=True):
                c.grad = g[r]
            adam.step()
            with torch.no_grad():
                for c, (p, r) in zip(chosen, rows, strict=True):
                    p[r] = c
