from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.prompts import accepts
from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.needs import qkv_linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.site import Place
    from ...engine.tuned import Tuned


def apart(inner: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """``|A/|A| - B/|B||`` of <A, B>, <A, A> and <B, B>; 0, with no gradient, where they agree to
    rounding."""
    tiny = torch.finfo(own.dtype).tiny
    cosine = inner / (own * other).clamp_min(tiny).sqrt()
    return (2 - 2 * cosine).clamp_min(4 * torch.finfo(own.dtype).eps).sqrt()


def products(Z: Tensor, Y: Tensor) -> Tensor:
    """``sum <Z Z^T, Y Y^T>`` over samples and heads of states (batch, tokens, heads, h):
    ``|Z^T Y|^2``, without a matrix of tokens by tokens."""
    return torch.einsum("bthi,bthj->bhij", Z, Y).square().sum()


@dataclass(frozen=True, kw_only=True)
class DirectionMatch(Method):
    """Direction-matching distillation: queries, keys and values are alike among themselves as the
    base's are.

        loss + weight sum_l sum_{Z in q, k, v} | R / |R| - R' / |R'| | + states sum_l | H / |H| -
        H' / |H'| |,       R = Z Z^T / sqrt(h)

    Z (tokens, h) what a projection gives to a head, H the states after a block, R' and H' those of
    the base (or of another `adapter`) on the same batch, without gradients and in eval mode. |.| is
    the Frobenius norm over the whole batch and all heads of a layer: a pattern counts, not its
    size, so that signs can match real numbers. Tokens that ``attention_mask`` leaves out count as
    zeros (``decoder_attention_mask`` in a decoder beside an encoder). BiBERT distils with it in
    place of attention scores (``full + bibert + direction_match + distill``).

    R is never made: ``<R, R'> = |Z^T Z'|^2 / h``, so the cost is tokens * h^2, and backward keeps
    what the projections gave. Trains nothing of its own; needs no second model; costs one more
    forward per batch. Start: where step 0 is the base the term and its gradient are zero.

    Checkpointed blocks, and side networks beside them, are refused with `weight` above 0: what a
    projection gives within a block that runs without a graph has no gradient.

    Departures: the authors' code sets entries of R below -100 to zero, which a pattern that is
    never made cannot; where a fused projection interleaves its heads there are no Z, and it is
    refused.
    """

    paper: ClassVar[str] = ("BiBERT: Accurate Fully Binarized BERT (Qin et al., 2022), "
                            "arXiv:2203.06390")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    sees_run: ClassVar[bool] = True

    weight: float = setting(1.0, "of the patterns' term")
    states: float = setting(1.0, "weight of the states' term")
    adapter: str | None = setting(None, "the teacher: None is the base, else an adapter's name",
                                  unseen="a fresh model has no other adapter: "
                                         "tests/methods/test_direction_match.py")

    def __post_init__(self) -> None:
        if min(self.weight, self.states) < 0 or not (self.weight or self.states):
            raise RecipeError("direction_match: weight and states of at least 0, one of them "
                              f"above, are expected; got {self.weight} and {self.states}")

    def forbids(self) -> dict[str, str]:
        return {"the mode of the blocks": "direction_match pulls at what projections give inside "
                                          "the blocks, which run as they are for it (weight=0 "
                                          "looks at the states after them alone)"} \
            if self.weight else {}

    def projections(self, anatomy: Anatomy) -> list[Place]:
        """What makes queries, keys and values, run by run of a fused one."""
        found: list[Place] = []
        for place in qkv_linears(anatomy):
            runs = anatomy.slices(place)
            if place.role in ("qkv", "kv") and not runs:
                raise RecipeError(f"direction_match: {place.name} interleaves queries, keys and "
                                  "values, so that no run of its outputs is one of them")
            found += runs or [place]
        return found

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        paths = [p.path for p in self.projections(anatomy)] if self.weight else []
        return (*dict.fromkeys(paths), *(b.path for b in anatomy.blocks if self.states))

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        anatomy, theirs = tuned.anatomy, run.reference_taps(self.adapter)
        terms = []
        for place in self.projections(anatomy) if self.weight else ():
            block = anatomy.blocks[place.block]
            heads = (block.heads if place.role == "q" else block.kv_heads or block.heads) or 1
            pair = []
            for taps in (run.taps, theirs):
                Z = _counting(_state(taps[place.path]), run.batch, mask_key(anatomy, block))
                Z = Z if place.rows is None else Z[..., place.rows[0] : place.rows[1]]
                pair.append(Z.reshape(-1, *Z.shape[-2:-1], heads, Z.shape[-1] // heads))
            Z, Y = _same(place.path, *pair)
            terms.append(apart(products(Z, Y), products(Z, Z), products(Y, Y)))
        if terms:
            yield self.weight * sum(terms)
        terms = []
        for block in anatomy.blocks if self.states else ():
            H, Y = _same(block.path, *(
                _counting(_state(t[block.path]), run.batch, mask_key(anatomy, block))
                for t in (run.taps, theirs)))
            terms.append(apart((H * Y).sum(), H.square().sum(), Y.square().sum()))
        if terms:
            yield self.states * sum(terms)


def _state(out: Any) -> Tensor:
    state: Tensor = out[0] if isinstance(out, tuple | list) else out
    return state


def mask_key(anatomy: Anatomy, block: Block) -> str:
    """The key of the batch that says which tokens of a block count."""
    decodes = block.cross is not None and accepts(anatomy.model, "decoder_input_ids")
    return "decoder_attention_mask" if decodes else "attention_mask"


def _counting(h: Tensor, batch: Any, key: str) -> Tensor:
    """States (..., tokens, n) in fp32 at least, zero where the batch's mask leaves a token out."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == h.shape[:2]:
        h = h * mask.to(h).unsqueeze(-1)
    return h


def _same(path: str, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    if mine.shape != theirs.shape:
        raise ConfigError("direction_match compares states token by token, and after "
                          f"{path} there are {tuple(mine.shape)} beside {tuple(theirs.shape)} of "
                          "the teacher; leave out the part that adds tokens")
    return mine, theirs
