from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.choose.genes import Genes, Sizes, climbed, genetic
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.families import HEAD_COUNT, WIDTH
from ...core.method import Method, setting
from ..objective.distill import divergence, logits_of

#: values of each size, in the order of `Sizes`
SPACE = (range(1000, 50001, 1000), (1, 2, 4, 8), range(16, 769, 16), range(32, 3041, 32),
         range(1, 13))
_INNER, _LAYERS = ("intermediate_size", "dim_feedforward"), ("num_hidden_layers", "num_layers")


@dataclass(frozen=True, kw_only=True)
class Compressor(Method):
    """Compressor: a small encoder of the sizes that a genetic search finds for a file of so many
    megabytes, which then learns what a large one answers.

        fitness = operations / 1e9 - |target - parameters| 4 / 1e6,   target = megabytes 1e6 / 4

    over vocabularies of 1,000 to 50,000 tokens, 1 to 8 heads, widths of 16 to 768, inner widths of
    32 to 3,040 and 1 to 12 blocks: as much work as fits the size (``blocks/choose/genes.py``).
    `counting` "literal" is the published count, in which a table is a product with one-hot vectors,
    so that large vocabularies are rewarded, and a norm lacks its width; "corrected" has neither.

        method = burnish.parse("compressor(megabytes=3.0)")[0]
        sizes = method.lifecycle()                             # seconds, no data, no model
        small = method.student(teacher, sizes)                 # at random, of the teacher's class
        known = method.answers(teacher, batches)               # the teacher runs once
        tuned = burnish.tune(small, "full", head=True)
        tuned.step(batch, loss=method.loss(known[i]))          # T^2 KL, no label is read

    Where the teacher reads tokens of its own, those of the student come from a byte-pair vocabulary
    that is trained anew to `sizes.vocabulary` (``tokenizer.train_new_from_iterator``); give it
    batches in these, and the teacher the same texts in its own.

    Departure: where the search ends, the best values of every two sizes are taken in turn as long
    as one is better (`climb`); as published it often ends a tenth short of the best there is.

    Start: random. Trains the whole student: 750,000 parameters at 3 MB. The student stands alone.
    Published: 160 times smaller than CodeBERT, 4.2 times faster.
    """

    paper: ClassVar[str] = ("Compressing Pre-trained Models of Code into 3 MB, ASE 2022, "
                            "arXiv:2208.07120")
    tier: ClassVar[str] = "from the text"

    megabytes: float = setting(3.0, "of the student, its numbers in 4 bytes each")
    population: int = setting(50, "genomes that stay")
    generations: int = setting(100, "of the search")
    crossover: float = setting(0.6, "probability that a child has two parents")
    climb: bool = setting(True, "end with the best values of every two sizes")
    counting: Literal["literal", "corrected"] = setting("literal", "of operations")
    text_length: int = setting(512, "tokens of a text whose operations are counted")
    labels: int = setting(2, "classes of the head whose parameters are counted")
    temperature: float = setting(10.0, "T, softens both distributions", alias=("T",))
    seed: int = setting(0, "of the search")

    def __post_init__(self) -> None:
        if self.targets is not None:
            raise ConfigError("compressor: a whole model is made; targets do nothing")
        if self.megabytes <= 0 or self.temperature <= 0 or not 0 <= self.crossover <= 1:
            raise ConfigError("compressor: megabytes and temperature above 0 and a crossover from "
                              f"0 to 1 are expected, got {self.megabytes:g}, {self.temperature:g} "
                              f"and {self.crossover:g}")
        if min(self.population, self.generations, self.text_length, self.labels) < 1:
            raise ConfigError("compressor: population, generations, text_length and labels are at "
                              "least 1")

    def fitness(self, genes: Genes) -> float:
        """Of sizes, more is better."""
        sizes = Sizes(*genes)
        work = sizes.operations(self.text_length, self.labels, self.counting == "literal")
        off = abs(self.megabytes * 1e6 / 4 - sizes.parameters(self.labels))
        return work / 1e9 - off * 4 / 1e6

    def lifecycle(self) -> Sizes:
        """The sizes that the search ends with."""
        found = genetic(SPACE, self.fitness, population=self.population, rounds=self.generations,
                        crossover=self.crossover, seed=self.seed)
        return Sizes(*(climbed(SPACE, self.fitness, found) if self.climb else found))

    def student(self, teacher: nn.Module, sizes: Sizes) -> nn.Module:
        """A model of the teacher's class with these sizes, at random. ConfigError where its config
        has no word for one of them."""
        config: Any = copy.deepcopy(getattr(teacher, "config", None))
        for names, value in zip((("vocab_size",), HEAD_COUNT, WIDTH, _INNER, _LAYERS), sizes,
                                strict=True):
            name = next((n for n in names if isinstance(getattr(config, n, None), int)), None)
            if name is None:
                raise ConfigError(f"compressor: {type(teacher).__name__} has no config with "
                                  f"{' or '.join(names)}, of which the student has {value}")
            setattr(config, name, value)
        made: nn.Module = type(teacher)(config)
        return made

    @torch.no_grad()
    def answers(self, teacher: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """The teacher's logits on every batch, on the host."""
        with evaluating([m for m in teacher.modules() if m.training]):
            return [logits_of(teacher(**{k: v for k, v in b.items() if k != "labels"}),
                              "compressor").cpu() for b in batches]

    def loss(self, known: Tensor) -> Callable[[Any, Any], Tensor]:
        """For ``tuned.step(batch, loss=...)``: ``T^2 mean KL`` from what the teacher said."""
        def apart(out: Any, batch: Any) -> Tensor:
            z = logits_of(out, "compressor")
            return divergence(z, known.to(z.device), self.temperature)
        return apart
