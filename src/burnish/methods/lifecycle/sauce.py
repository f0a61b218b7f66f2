from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.autoencoder import SparseAutoencoder, damped
from ...blocks.state.steered import first
from ...blocks.state.taps import evaluating
from ...core.anatomy import Anatomy
from ...core.batches import call
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Sauce(Method):
    """SAUCE: a concept is forgotten by damping a few features of a sparse autoencoder.

    An autoencoder of the states h behind one late block learns features f (blocks/state/
    autoencoder.py; its coefficients are unconfirmed). A concept's score for a feature is its mean
    activation on pictures that show the concept less that on others; the `concept_size` of positive
    score are J. Then, at tokens where f_j is above `threshold`,

        h <- h + sum over j in J of (concept_factor - 1) f_j W_d[:, j]

    which adds a difference, so that the autoencoder's own error is nowhere: a token of which no
    feature of J is active stays bit for bit::

        forget = burnish.parse("sauce(expansion=8)")[0].lifecycle(model, batches)
        forget.learn("cat", cats, others)
        with forget.standing("cat", "dog"):          # several concepts: the union of their features
            model(**batch)

    Start: concept_factor = 1 is the model exactly. Trains the autoencoder alone, ``2 d m + m + d``
    numbers (m = expansion d; d = 1024, m = 8192: 16.8 million), by Adam; `forget.dead` is the share
    of features that no state has used. Needs states of some thousand tokens at once. It does not
    merge: what is damped depends on the state.

    When to use: one or many concepts of a vision tower, taken out and put back at will, with the
    weights as they are. When not: a guarantee that nothing is left in the weights.
    """

    paper: ClassVar[str] = ("SAUCE: Selective Concept Unlearning in Vision-Language Models with "
                            "Sparse Autoencoders (2025), arXiv:2503.14530")
    tier: ClassVar[str] = "checked against an independent equation"
    merges: ClassVar[bool] = False

    expansion: int = setting(8, "features per channel")
    active: int = setting(32, "features of a token that may be above 0; 0: any number")
    l1: float = setting(0.0, "weight of the activations' sum in the autoencoder's loss")
    concept_size: int = setting(20, "features that a concept has at most")
    concept_factor: float = setting(-0.5, "what a concept's features are multiplied by; 1: nothing",
                                 alias=("gamma",))
    threshold: float = setting(0.0, "activation above which a feature is damped")
    layer: int | None = setting(None, "block, from 0; None: the last but one")
    state_passes: int = setting(1, "times that the states are gone through")
    step_size: float = setting(1e-3, "of the autoencoder's Adam")
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        untargeted(self, "what is changed is the states behind one block")
        if min(self.expansion, self.concept_size, self.state_passes) < 1 \
                or min(self.active, self.l1) < 0 or not self.step_size > 0:
            raise ConfigError("sauce: expansion, concept_size and state_passes of at least 1, "
                              "active and l1 of 0 or more and a step_size above 0 are expected")
        if self.concept_factor > 1:
            raise ConfigError(f"sauce: concept_factor={self.concept_factor:g} would strengthen a "
                              "concept; expected up to 1, below 0 to turn it round")

    def lifecycle(self, tuned: Any, batches: Iterable[Any], path: str | None = None) -> Forgetting:
        """An autoencoder of what the module at `path` (default: block `layer` of the stack that
        reads pictures, else of the first) makes of these batches, ready to learn concepts."""
        model = module_of(tuned)
        path = self._path(model) if path is None else path
        if path not in dict(model.named_modules()):
            raise ConfigError(f"sauce: the model has no module {path}")
        sae, adam, some = None, None, list(batches)
        for _ in range(self.state_passes):
            for batch in some:
                h = read(model, path, batch)
                if sae is None:
                    sae = SparseAutoencoder(h.shape[-1], self.expansion * h.shape[-1], self.active,
                                            self.seed).to(h)
                    sae.b_d.data.copy_(h.mean(0))
                    adam = torch.optim.Adam(sae.parameters(), self.step_size)
                with torch.enable_grad():
                    sae.loss(h, self.l1).backward()
                assert adam is not None
                adam.step()
                adam.zero_grad()
                sae.unit()
        if sae is None:
            raise ConfigError("sauce: there are no batches to learn features of")
        used = torch.zeros(len(sae.b_e), dtype=torch.bool, device=sae.b_e.device)
        with torch.no_grad():
            for batch in some:
                used |= (sae.encode(read(model, path, batch)) > 0).any(0)
        return Forgetting(self, model, path, sae.requires_grad_(False),
                          1 - float(used.float().mean()))

    def _path(self, model: nn.Module) -> str:
        anatomy = Anatomy.of(model)
        stacks = anatomy.stacks()
        if not stacks:
            raise ConfigError("sauce: this model has no blocks; name a module with path=")
        seeing = [s for s in stacks if any(w in s.lower() for w in ("vis", "image", "vit"))]
        blocks = stacks[(seeing or list(stacks))[0]]
        at = max(0, len(blocks) - 2) if self.layer is None else self.layer
        if not 0 <= at < len(blocks):
            raise ConfigError(f"sauce: layer={at}: there are blocks 0 to {len(blocks) - 1}")
        return blocks[at].path


@torch.no_grad()
def read(model: nn.Module, path: str, batch: Any) -> Tensor:
    """(N, D) in fp32: the states of all tokens of a batch behind a module."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: seen.append(first(out).detach()))
    try:
        with evaluating(list(model.modules())):
            call(model, batch)
    finally:
        hook.remove()
    if not seen or seen[0].dim() < 2:
        raise ConfigError(f"sauce: {path} gave no states of tokens")
    return seen[0].flatten(0, -2).to(torch.promote_types(seen[0].dtype, torch.float32))


@dataclass
class Forgetting:
    """Concepts of a model by their features. dead: the share of features never used."""

    part: Sauce
    model: nn.Module
    path: str
    sae: SparseAutoencoder
    dead: float
    concepts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @torch.no_grad()
    def scores(self, concept: Iterable[Any], others: Iterable[Any]) -> Tensor:
        """(features,) mean activation on the one less that on the others."""
        means = []
        for batches in (concept, others):
            total, count = torch.zeros(len(self.sae.b_e)), 0
            for batch in batches:
                f = self.sae.encode(read(self.model, self.path, batch))
                total, count = total.to(f) + f.sum(0), count + len(f)
            if not count:
                raise ConfigError("sauce: a concept is told by batches that show it and batches "
                                  "that do not, and one of the two is empty")
            means.append(total / count)
        return means[0] - means[1]

    def learn(self, name: str, concept: Iterable[Any], others: Iterable[Any]) -> tuple[int, ...]:
        """The features of a concept, the one of largest score first."""
        score = self.scores(concept, others)
        order = score.argsort(descending=True, stable=True)[:self.part.concept_size]
        found = tuple(int(j) for j in order if score[j] > 0)
        if not found:
            raise ConfigError(f"sauce: no feature is more active on {name!r} than elsewhere")
        self.concepts[name] = found
        return found

    def features(self, *names: str) -> tuple[int, ...]:
        """The union of these concepts' features."""
        if unknown := [n for n in names if n not in self.concepts]:
            raise ConfigError(f"sauce: {unknown[0]!r} was not learnt; there is "
                              f"{', '.join(self.concepts) or 'nothing yet'}")
        return tuple(sorted({j for n in names for j in self.concepts[n]}))

    @contextmanager
    def standing(self, *names: str, concept_factor: float | None = None) -> Iterator[None]:
        """Inside, the model answers without these concepts."""
        which = self.features(*names)
        strength = self.part.concept_factor if concept_factor is None else concept_factor
        hook = self.model.get_submodule(self.path).register_forward_hook(
            lambda module, args, out: self._changed(out, which, strength))
        try:
            yield
        finally:
            hook.remove()

    def _changed(self, out: Any, which: Sequence[int], strength: float) -> Any:
        if not isinstance(out, Tensor | list | tuple):
            raise ConfigError(f"sauce: {self.path} gives a {type(out).__name__}, and states are "
                              "expected; name the block itself")
        h = damped(self.sae, first(out), which, strength, self.part.threshold)
        return h if isinstance(out, Tensor) else type(out)((h, *out[1:]))

    # -- files -----------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """What a file needs: the autoencoder, and each concept's features."""
        return {**self.sae.state_dict(), **{f"concept.{n}": torch.tensor(j)
                                            for n, j in self.concepts.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`tensors` gave them."""
        own = self.sae.state_dict()
        if lost := sorted(own.keys() - tensors.keys()):
            raise ConfigError(f"sauce: {lost[0]} is missing")
        self.sae.load_state_dict({n: tensors[n] for n in own})
        self.concepts = {n.removeprefix("concept."): tuple(t.tolist())
                         for n, t in tensors.items() if n.startswith("concept.")}
