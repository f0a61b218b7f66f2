from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ...blocks.choose.genes import Genes, genetic
from ...blocks.choose.widths import drawn, mean_of, swept, within
from ...blocks.state.taps import evaluating
from ...blocks.update.noise import fold
from ...blocks.update.widths import DrawnWidths
from ...blocks.weight.grids import parts
from ...blocks.weight.quantise import Quantiser
from ...blocks.weight.widths import Chains, Grids, choose
from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.recipe import key_of
from ...core.site import Place, Site
from ..delta.lowrank.lora import check_dropout

if TYPE_CHECKING:
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class LlmQfa(Method):
    """LLM-QFA: one training, from which a model of any budget of bits is taken.

        y = x Q_b(W)^T + s drop(x) A_b^T B_b^T,    for each layer a width b, s = alpha / rank

    Each matrix is held in every width, and each width has factors of its own, A_b (rank, in) and
    B_b (out, rank): nothing is shared, so what one width learns changes no other. Every update
    draws one configuration (a width for each layer) and trains its factors alone; the others have
    no gradient, and their moments rest on the host with counts of their own. Drawn layer by layer
    alike, the mean bits of a weight are near the middle; so the mean that is wanted sweeps all
    there is, down and up in `every` updates, and layers are drawn by ``p_b ~ exp(lambda b)`` to
    meet it to 0.05 bits (the nearest of 64 draws where layers are few). A draw depends on `seed`
    and the update alone. Afterwards (`lifecycle`) the best configuration within a budget is looked
    for by evolution, and `export` leaves one width per layer:

        part = tuned.recipe.named("llm_qfa")
        part.lifecycle(tuned, batches, budget=2.5)      # {layer: bits}, which answers from then on
        part.export(tuned)                              # the other widths are gone
        tuned.merge()                                   # or keep the factors beside the codes

    Start: B = 0: the model in its largest width. Trains rank (in + out) per matrix and width. Holds
    the sum of all widths and 40 / group bits per weight for each, after `export` b + 40 / group
    (:meth:`size`). Kept for backward: x and rank numbers per token. Merges exactly, as configured.
    The head stays as it is. No weight decay. A file says which widths answer.

    Our reading: how a mean is swept and layers are drawn to meet it, alpha, and the search's sizes.
    Departure: each run of `group` weights is rounded to the grid with the least squared
    error, not by GPTQ.
    """

    paper: ClassVar[str] = ("One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient "
                            "Deployments (2024), arXiv:2405.20202")
    tier: ClassVar[str] = "from the text"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)
    small: ClassVar[Mapping[str, Any]] = {"group": 8}
    excused: ClassVar[Mapping[str, str]] = {
        "every_tensor_has_a_gradient": "factors of widths that rest have none: "
                                       "tests/methods/test_llm_qfa.py",
        "exactly_what_trains_moves": "by chance: six draws of one width in three leave some out",
        "loss_falls on graphs": "it swings at the suite's rate, each update being of other widths; "
                                "at a fifth of that rate it falls",
        "every_kind_of_place":
            "slices of a fused weight are refused, as in other storages: "
            "tests/methods/test_llm_qfa.py shows linears and GPT-2's transposed ones"}

    bits: str = setting("2-3-4", "widths of a weight, joined by '-', 2 to 8", other=("2-5",))
    rank: int = setting(64, "rank of the update of each width", alias=("r",))
    alpha: float = setting(64.0, "numerator of the scale", alias=("lora_alpha",))
    group: int = setting(128, "inputs of one output that share a scale; 0: all")
    dropout: float = setting(0.0, "dropout on the input of A", alias=("lora_dropout",))
    draw: Literal["swept", "uniform"] = setting(
        "swept", "so that all mean widths come alike, or each layer by itself",
        beside={"every": 32})
    every: int = setting(32, "updates of a sweep", other=(2, 3))
    seed: int = setting(0, "of the draws")

    def __post_init__(self) -> None:
        check_dropout("llm_qfa", self.dropout)
        if len(self.widths) < 2 or not all(2 <= b <= 8 for b in self.widths):
            raise RecipeError(f"llm_qfa(bits={self.bits!r}): expected two or more different widths "
                              "of 2 to 8 joined by '-', e.g. '2-3-4'")
        if self.group < 0 or self.every < 1:
            raise RecipeError(f"llm_qfa: group={self.group}, every={self.every}: expected the "
                              "inputs that share a scale, or 0 for all, and at least 1 update")
        if self.draw == "uniform" and "every" in self.changed():
            raise RecipeError("llm_qfa: every does nothing with draw='uniform'; expected "
                              "draw='swept', or every left out")

    @property
    def widths(self) -> tuple[int, ...]:
        try:
            return tuple(sorted({int(b) for b in str(self.bits).split("-")}))
        except ValueError:
            return ()

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights", "the schedule of live blocks")

    def storage(self, site: Site) -> Grids | None:
        if site.place.role == "head":
            return None
        grids = {b: Quantiser(b, self.group, False, "search") for b in self.widths}
        return Grids(site.weight, site.place, grids, site.settled.get("bits") or None)

    def delta(self, site: Site) -> Chains | None:
        if site.place.role == "head":
            return None
        site.place.check_rank(self.rank, "llm_qfa")
        term = Chains(site.place, self.widths, self.rank, self.alpha / self.rank, self.dropout,
                      site.settled.get("bits") or None)
        for p in term.parameters():
            p.burnish_decay = False                  # type: ignore[attr-defined]
        return term

    def controller(self, tuned: Tuned) -> DrawnWidths:
        return DrawnWidths(self.layers(tuned), self.drawn, lambda: tuned.current_optimizer)

    def drawn(self, step: int, sizes: list[int]) -> Genes:
        """The widths of an update, for layers of so many weights."""
        draw = Random(fold("llm_qfa", self.seed, step))
        if self.draw == "uniform":
            return tuple(draw.choices(self.widths, k=len(sizes)))
        wanted = swept(self.widths[0], self.widths[-1], step, self.every, draw)
        return drawn(self.widths, sizes, wanted, draw)

    def layers(self, tuned: Any) -> dict[str, tuple[Grids, Chains]]:
        """What holds each layer's weight, and what is added to it, by the layer's name."""
        part = next((m for m in tuned.recipe if m == self), None)
        if part is None:
            raise RecipeError(f"{self} is no part of the recipe that trains, {tuned.recipe}")
        held = {m.place.name: m for m in tuned.model.modules() if isinstance(m, Grids)}
        mine = {n: t for n, t in tuned.terms(Chains) if t.part == key_of(tuned.recipe, part)}
        if left := sorted(mine.keys() - held.keys()):
            raise RecipeError(f"llm_qfa: {left[0]} is tied to another weight and stays whole, so "
                              "it has no widths to choose from; leave it out of the targets")
        return {n: (held[n], t) for n, t in mine.items()}

    def choose(self, tuned: Any, configuration: Mapping[str, int]) -> None:
        """Let layers answer in these widths (the others stay as they are), until a next update
        draws. ConfigError for a layer or a width that is not there; nothing is changed then."""
        choose(self.layers(tuned), configuration)

    @torch.no_grad()
    def lifecycle(self, tuned: Any, batches: Iterable[Any], budget: float, *,
                  loss: Callable[[Any, Any], torch.Tensor] | None = None, population: int = 32,
                  generations: int = 16, seed: int = 0) -> dict[str, int]:
        """The configuration with the least loss on `batches` among those that evolution meets with
        at most `budget` mean bits of a weight: {layer: bits}. It answers from then on. Each of at
        most population (generations + 1) configurations is run once on all batches, in evaluation
        mode. ConfigError for a budget below the smallest width, and for no batches."""
        layers, data = self.layers(tuned), list(batches)
        sizes, names = [t.size for _, t in layers.values()], list(layers)
        space = [q.widths for q, _ in layers.values()]
        least = mean_of([min(s) for s in space], sizes)
        if budget < least or not data:
            raise ConfigError(f"llm_qfa: a budget of {budget:g} bits and {len(data)} batches: "
                              f"expected at least {least:g} bits, and one batch")

        def fitness(genes: Genes) -> float:
            choose(layers, dict(zip(names, genes, strict=True)))
            return -sum(float(tuned.loss(b, loss)) for b in data)

        with evaluating(list(tuned.model.modules())):
            best = genetic(space, fitness, population=population, rounds=generations, seed=seed,
                           mend=lambda genes, draw: within(genes, space, sizes, budget, draw))
        found = dict(zip(names, best, strict=True))
        choose(layers, found)
        return found

    def export(self, tuned: Any) -> dict[str, int]:
        """Leave the configuration that answers, and nothing of the other widths: {layer: bits}.
        Files hold it alone, and its factors train on."""
        tuned.check_plain()
        none = torch.empty(0, dtype=torch.long)
        for held, term in self.layers(tuned).values():
            held.keep()
            others = {n for n in term.ranked if int(n[1:]) != term.chosen}
            keep = {n: none if n in others else torch.arange(len(term.A)) for n in term.ranked}
            tuned.resize(term, keep)
        return {n: q.chosen for n, (q, _) in self.layers(tuned).items()}

    def size(self, place: Place, bits: int) -> int:
        """Bytes of a matrix in one width: its codes, a scale and a zero point for each group."""
        groups = place.out * -(-place.inp // (self.group or place.inp))
        return sum(-(-place.numel * p // 8) for p in parts(bits)) + 5 * groups

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return len(self.widths) * self.rank * (place.inp + place.out)
