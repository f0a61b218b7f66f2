from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.draw import drawn
from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.outputs import vocabulary_head
from ...core.processes import processes

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned
    from ._mistakes import Learning


@dataclass(frozen=True, kw_only=True)
class Copilot(Method):
    """Transformer Copilot: a small decoder learns the mistakes that a language model makes as it is
    tuned, and puts them right when it answers.

    While the pilot is tuned by the rest of the recipe, each micro-batch leaves a record in the
    mistake log: q its softmax, the token that came next, its states (mean over what each block
    returns and the first is given, unconfirmed). After each update the decoder takes a step of its
    own Adam on a record drawn from the log: it foretells ``l_t = p_t - q_t``, (V,), p_t one-hot,
    from l_s, s < t, and those states (blocks/state/mistakes.py), by ``sqrt(mean |f - l|^2)`` over
    the tokens that have a label (without labels, all). Answered is

        q + alpha f        clipped at 0, summing to 1; as logits, which stay where f is 0

    wherever the model runs in evaluation mode and without gradients: figures, ``generate`` (also
    with a cache, in which a layer keeps what has been read), a loaded adapter. What trains the
    pilot is its own loss of its own logits; a loss with a gradient is the pilot's in any mode.

    Start: f = 0, the pilot's answers exactly; alpha = 0 is the pilot for good. Trains what stands
    beside it, and the decoder apart, in fp32: no gradient reaches the pilot. Does not merge.
    Costs a forward more each micro-batch; the log holds `log` of them, ``2 kept + 1`` numbers a
    token and a state; a step of the decoder takes some V numbers a token, and it has about
    ``2 V decoder_width`` with two moments each. All of it is in checkpoints, the decoder in the
    adapter's file. One process; rows that are one text each.

    When to use: small models whose errors repeat, with time to spare when answering. When not:
    where a token's cost counts (the decoder reads the text so far for each), or memory for tables
    of the vocabulary's size twice over does.
    Departures: the decoder starts random and small, not from a model of the family; beside the
    `kept` largest entries of q the others count as 0; the record is of evaluation mode.
    """

    paper: ClassVar[str] = ("Transformer Copilot: Learning from The Mistake Log in LLM Fine-tuning "
                            "(2025), arXiv:2505.16270")
    tier: ClassVar[str] = "checked against an independent equation"
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"writes on", "own loss"})
    shown_beside: ClassVar[str] = "lora(rank=2)"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step",)
    excused: ClassVar[Mapping[str, str]] = {
        "exactly_what_trains_moves": "the decoder moves by an optimizer of its own; "
                                     "tests/methods/test_copilot.py shows that all else stays"}

    alpha: float = setting(0.3, "lambda, how much of what is foretold is put right")
    kept: int = setting(32, "largest entries of q that a record has", least=1)
    log: int = setting(16, "micro-batches that the log holds", least=1)
    decoder_width: int = setting(128, "of the decoder's states", least=1)
    decoder_blocks: int = setting(2, "of the decoder", least=1)
    decoder_heads: int = setting(4, "of the decoder's attention", least=1)
    decoder_rate: float = setting(1e-3, "of the decoder's Adam", above=0.0)
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise RecipeError(f"copilot(alpha={self.alpha:g}) would add mistakes; expected 0 (the "
                              "pilot alone) or above")
        if self.decoder_width % self.decoder_heads:
            raise RecipeError(f"copilot: a decoder_width of {self.decoder_width} is not divided by "
                              f"{self.decoder_heads} heads")

    def claims(self) -> tuple[str, ...]:
        return ("the answers of the model",)

    def repeats(self) -> int | None:
        return None                                  # all blocks' states are there at once

    def side(self, anatomy: Anatomy) -> Copilot:
        if self.targets is not None:
            raise RecipeError(f"copilot takes no targets ({self.targets!r}): it reads the states "
                              "of the whole model, and no weight is touched")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        from ...blocks.state.mistakes import Corrector
        from ._mistakes import Beside, State

        anatomy = attacher.anatomy
        head = anatomy.model.get_submodule(vocabulary_head(anatomy))
        with drawn(self.seed):
            made = Corrector(head.out_features, anatomy.hidden_size or head.in_features,
                             self.decoder_width, self.decoder_blocks, self.decoder_heads)
        made.requires_grad_(False)                   # it has an optimizer of its own
        state, name = attacher.state, attacher.adapter.name
        blocks = [*anatomy.stacks().values()][-1]
        for block in blocks:
            State(state, name).listen(attacher.slot(block.path), part.name)
        Beside(state, name, made, self, len(blocks) + 1).to(
            attacher.device("")).listen(attacher.slot(""), part.name)

    def controller(self, tuned: Tuned) -> Learning:
        from ._mistakes import Learning

        if processes() > 1:
            raise ConfigError("copilot learns from what one process sees, and this run has "
                              f"{processes()}, whose decoders would differ; use one process")
        return Learning(self, tuned)
