from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.concepts import concepts
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Cones(Method):
    """ConES: vectors of concepts are searched in the place of what a text encoder makes of them.

        y = s cos(f(x), C),     C (classes, p)

    ``net = burnish.parse("cones")[0].lifecycle(model, input_ids=ids)`` reads one text a class,
    once, and gives a classifier of pictures that has no text encoder: delete the model, and its
    weights are gone. C is its head, so that ``tune(net, "linear_probe")`` searches the concepts
    alone; any recipe (``lora``) tunes the model with them, and with ``head=False`` beside C as it
    stands.

    Start: C the features of the texts: the model's own logits exactly; ``init="normal"``: random
    directions. Trains classes p. Kept for backward: nothing of the pictures' tower (linear_probe).
    What is stored is C; of a class that was searched the open vocabulary is lost.

    Of the paper's two uses this is classification; contexts of a diffusion model's cross-attention,
    and a detector's fusion, have several tokens a concept and are not served.
    """

    paper: ClassVar[str] = ("ConES: Concept Embedding Search for Parameter Efficient Tuning Large "
                            "Vision Language Models (2023), arXiv:2305.18993")
    tier: ClassVar[str] = "checked against an independent equation"

    init: Literal["texts", "normal"] = setting("texts", "start of the vectors")

    def lifecycle(self, model: nn.Module, **texts: Tensor) -> nn.Module:
        """The classifier of pictures whose classes are these texts (``input_ids`` (classes,
        tokens), ``attention_mask`` where they are padded). It shares the pictures' half with
        `model`, which stays as it is. RecipeError for a model without two towers, or no texts."""
        if "input_ids" not in texts:
            raise RecipeError("cones reads one text a class: give input_ids, (classes, tokens)")
        return concepts(model, texts, self.init)

    def count(self, classes: int, p: int) -> int:
        """Trainable parameters."""
        return classes * p
