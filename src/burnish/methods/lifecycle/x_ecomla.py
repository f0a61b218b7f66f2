from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.latent_attention import Latent, converted, rounded
from ...blocks.state.prompts import accepts
from ...blocks.state.taps import evaluating
from ...blocks.update.token_kl import token_kl
from ...core.anatomy import Anatomy, Block
from ...core.batches import call
from ...core.errors import ConfigError, DataError
from ...core.method import Method, setting
from ..objective.distill import logits_of
from ._adapted import untargeted

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class XEcomla(Method):
    """X-EcoMLA: attentions become multi-head latent ones by two decompositions, then learn to say
    what a teacher says.

        W_q = U S V^T:            A_q = S_r V_r^T,  Q = U_r
        [W_k; W_v] = U S V^T:     A = S_R V_R^T,  K_h, V_h = rows of U_R

    of keys and values repeated to all heads; of a head's D rows the last `rope` turn (of K_h they
    are left out), and one key that turns, the mean of the last rows over the heads of keys, serves
    all heads. W_o stays (``blocks/state/latent_attention.py``). Kept for later tokens: R + rope
    numbers a token and block, instead of 2 D for each head of keys::

        teacher = copy.deepcopy(model)
        method = burnish.parse("x_ecomla(q_rank=1424, kv_rank=64)")[0]
        lost = method.lifecycle(model)                       # in place
        tuned = burnish.tune(model, "full")
        tuned.step(batch, loss=method.loss(teacher))         # KL, a mean over tokens

    A config has no word for its shapes: ``method.form(other)`` gives another copy of the base the
    same ones, for ``load_state_dict`` (with both ranks given). A third stage is learning from
    preferences, as of any model.

    Start: not the pre-trained function (another key that turns, other frequencies, ranks cut off);
    at full rank, one head of keys and rope = D it is. Ranks: given, or as many leading values as
    hold `spectrum` of the sum of their `norm_power`-th powers; up to multiples of 8. Trains
    nothing by itself; r (d + H D) + (R + rope) d + R H (2 D - rope) numbers stand in a block
    (6,225,920 of Llama-3.2-1B). The authors: all parameters, 8e-5, cosine, 2048 tokens, one epoch.

    Departures: the KL is a mean over tokens that count, not a sum over a sequence; turned numbers
    are paired half by half, as in the models that are converted. Attentions with biases or norms of
    their own are refused.
    """

    paper: ClassVar[str] = ("X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and "
                            "Extreme KV Compression (2025)")
    tier: ClassVar[str] = "checked against the paper's numbers"

    q_rank: int | None = setting(None, "r of the queries; None: by spectrum")
    kv_rank: int | None = setting(None, "R of keys and values; None: by spectrum")
    spectrum: float = setting(0.95, "share of the sum of powers that is kept, without a rank")
    norm_power: float = setting(2.0, "p of these powers")
    rope: int = setting(32, "numbers of a head that turn with the position", alias=("d_r",))
    only: tuple[int, ...] | list[int] = setting((), "blocks that are converted; none said: all")
    kl: float = setting(1.0, "weight of the divergence from the teacher")
    ce: float = setting(0.0, "weight of the model's own loss")

    def __post_init__(self) -> None:
        untargeted(self, "it converts attentions; say which blocks with only")
        ranks = [r for r in (self.q_rank, self.kv_rank) if r is not None]
        if min(*ranks, self.rope, self.rope) < 1 or self.rope % 2 or \
                not 0 < self.spectrum <= 1 or self.norm_power < 1:
            raise ConfigError("x_ecomla: ranks of at least 1, an even rope, a spectrum above 0 and "
                              "up to 1 and a norm_power of at least 1 are expected")
        if min(self.kl, self.ce) < 0 or not self.kl + self.ce:
            raise ConfigError("x_ecomla: weights kl and ce of at least 0, not both 0, are expected")
        if len(ranks) == 2 and (given := {"spectrum", "norm_power"} & set(self.changed())):
            raise ConfigError(f"x_ecomla: {', '.join(sorted(given))} does nothing beside q_rank "
                              "and kv_rank")

    def lifecycle(self, model: nn.Module) -> Mapping[str, Mapping[str, float]]:
        """Converts in place. By attention: of both decompositions the Frobenius norm of what was
        cut off."""
        out = {}
        for b, old in self._found(model):
            made, out[b.attn or ""] = converted(
                old, b.heads or 0, b.kv_heads or 0, self.rope, (self.q_rank, self.kv_rank),
                self.spectrum, self.norm_power)
            _replace(model, b, made.train(old.training))
        return out

    def form(self, model: nn.Module) -> None:
        """Give a model these settings' shapes, in place, for values that a file brings."""
        if self.q_rank is None or self.kv_rank is None:
            raise ConfigError("x_ecomla: shapes follow q_rank and kv_rank; give both, as they were "
                              "found")
        for b, old in self._found(model):
            (H, G), (wide, d) = (b.heads or 0, b.kv_heads or 0), old.q_proj.weight.shape
            ranks = (rounded(self.q_rank, min(wide, d)), rounded(self.kv_rank, min(2 * wide, d)))
            assert H and G
            _replace(model, b, Latent(old, H, wide // H, self.rope, ranks).train(old.training))

    def loss(self, teacher: nn.Module) -> Callable[[Any, Any], Tensor]:
        """loss(outputs, batch): the divergence from what the teacher says of the batch, without a
        graph and in evaluation mode, where ``attention_mask`` counts, and the model's own."""
        def value(out: Any, batch: Any) -> Tensor:
            z, total = logits_of(out, "x_ecomla"), 0.0
            if self.kl:
                with evaluating([m for m in teacher.modules() if m.training]), torch.no_grad():
                    t = logits_of(call(teacher, batch), "x_ecomla")
                if t.shape != z.shape:
                    raise DataError(f"x_ecomla: a teacher of {tuple(t.shape)} logits has another "
                                    f"tokenizer than a student of {tuple(z.shape)}")
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                total = self.kl * token_kl(z, t.to(z.device), mask)
            return total + self.ce * out.loss if self.ce else total
        return value

    def cached(self, kv_rank: int) -> int:
        """Numbers kept of a token in a converted block."""
        return kv_rank + self.rope

    def _found(self, model: Any) -> list[tuple[Block, nn.Module]]:
        if not isinstance(model, nn.Module) or any(hasattr(m, "burnish") for m in model.modules()):
            raise ConfigError("x_ecomla converts a plain model: merge or detach what is joined to "
                              "it first")
        blocks = Anatomy.of(model).blocks
        if strange := [i for i in self.only if not 0 <= i < len(blocks)]:
            raise ConfigError(f"x_ecomla(only={tuple(self.only)}): there is no block {strange[0]}; "
                              f"there are {len(blocks)}")
        some = [b for i, b in enumerate(blocks) if not self.only or i in self.only]
        if not some:
            raise ConfigError("x_ecomla: this model has no blocks")
        return [(b, self._attention(model, b)) for b in some]

    def _attention(self, model: nn.Module, b: Block) -> nn.Module:
        old = model.get_submodule(b.attn) if b.attn else None
        plain = old is not None and {n for n, _ in old.named_parameters()} == {
            f"{n}.weight" for n in LINEARS} and accepts(old, "position_embeddings",
                                                        "past_key_values", "attention_mask")
        if old is None or not plain or not b.heads or not b.kv_heads:
            raise ConfigError(f"x_ecomla: {b.attn or b.path} is no attention of q_proj, k_proj, "
                              "v_proj and o_proj alone, without biases, that is given the cosines "
                              "and sines of its positions (Llama, Mistral)")
        width = old.q_proj.weight.shape[0] // b.heads
        if width % self.rope:
            raise ConfigError(f"x_ecomla(rope={self.rope}) does not divide the width {width} of a "
                              "head")
        return old


def _replace(model: nn.Module, b: Block, made: nn.Module) -> None:
    parent, _, leaf = (b.attn or "").rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)
