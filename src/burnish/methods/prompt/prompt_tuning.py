from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.state.prompts import Behind, Lengthened, Positioned, Prepended, accepts
from ...core.errors import RecipeError
from ...core.families import OFFSET_POSITIONS
from ...core.method import Method, setting
from ._stacks import check_ids, embedding_stacks

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: ids below this are taken for the frequent ones: vocabularies are sorted by frequency
_FREQUENT = 5000


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prompt tuning: trainable embeddings in front of the input, everything else frozen.

    ``X' = [P; E(x)]``, P (length, d). Mask and positions grow by `length`; behind the last block
    the extra states are cut off, so labels, poolers, heads and losses see the tokens they know.
    Padding on the left changes nothing: positions count from the first unmasked token. With a
    key-value cache P is put in once. In an encoder-decoder P stands before the encoder's input and
    the decoder reads its states too; where the encoder reads no tokens, before the decoder's.

    Start: rows of the embedding table, of `ids` (repeated to length) or drawn from the first 5,000;
    ``init="normal"`` draws N(0, 0.5^2). Never the pre-trained function. Trains length * d.
    Kept for backward: what frozen blocks keep, for `length` more tokens. Not mergeable.

    The authors train with Adafactor at a constant rate of 0.3; P is fp32 whatever the model is.
    Models that take no ``inputs_embeds`` (pictures, sound, CLIP's text) are refused: see vpt and
    prefix.
    """

    paper: ClassVar[str] = ("The Power of Scale for Parameter-Efficient Prompt Tuning (2021), "
                            "arXiv:2104.08691")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(100, "rows of P", alias=("num_virtual_tokens",))
    init: Literal["vocabulary", "normal"] = setting("vocabulary", "start of P")
    ids: tuple[int, ...] | list[int] | None = setting(None, "token ids whose embeddings start P",
                                                   other=((1, 2, 3),))

    def prompt(self, anatomy: Anatomy) -> Front:
        if self.targets is not None:
            raise RecipeError(f"{self.name} takes no targets: it stands before the whole input")
        if self.length < 1:
            raise RecipeError(f"{self.name}(length={self.length}): expected at least one row")
        check_ids(self, "vocabulary")
        return Front(self)

    def start(self, table: Tensor) -> Tensor:
        """P from the embedding table (vocabulary, d)."""
        if self.init == "normal":
            return torch.randn(self.length, table.shape[1], device=table.device) * 0.5
        if self.ids is not None:
            check_ids(self, "vocabulary", table)
            index = torch.tensor([self.ids[i % len(self.ids)] for i in range(self.length)])
        else:
            index = torch.randint(min(len(table), _FREQUENT), (self.length,))
        return table.detach()[index.to(table.device)].float()

    def beside(self, width: int) -> tuple[Positioned | None, nn.Module | None]:
        """(what is added to the embeddings, what makes P of its rows), for methods built on it."""
        return None, None

    def listener(self, state: Any, name: str, rows: Tensor, causal: bool, stay: bool) -> Prepended:
        """What puts the rows before the input, likewise."""
        edit, maker = (None if m is None else m.to(rows.device)
                       for m in self.beside(rows.shape[1]))
        return Prepended(state, name, rows, causal, stay, edit, maker)

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        return self.length * d


@dataclass(frozen=True)
class Front:
    """Rows before the input of the first stack of blocks that embeds tokens."""

    method: PromptTuning

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, name, state = attacher.anatomy, attacher.adapter.name, attacher.state
        stacks = embedding_stacks(anatomy)
        if not stacks:
            raise RecipeError(f"{part.name} needs a model that takes inputs_embeds; "
                              f"{type(anatomy.model).__name__} does not: vpt puts tokens between "
                              "blocks, prefix works on keys and values")
        path, *others = dict.fromkeys(stacks.values())
        stack = anatomy.model.get_submodule(path)
        rows = self.method.start(stack.get_input_embeddings().weight)
        offset = getattr(getattr(stack, "config", None), "model_type", "") in OFFSET_POSITIONS
        causal = not offset and any(getattr(m, "is_causal", False) for m in stack.modules())
        readers = [p for p in others
                   if accepts(anatomy.model.get_submodule(p), "encoder_attention_mask")]
        self.method.listener(state, name, rows, causal, bool(readers)).listen(
            attacher.slot(path), part.name)
        if isinstance(getattr(stack, "pooler", None), nn.Module):
            pooler = f"{path}.pooler" if path else "pooler"
            Behind(state, name, len(rows)).listen(attacher.slot(pooler), part.name)
        for decoder in readers:
            Lengthened(state, name, len(rows)).listen(attacher.slot(decoder), part.name)
