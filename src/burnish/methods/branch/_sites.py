"""Where adapters stand in a block: shared by the methods of this folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...core import families
from ...core.asked import narrowed
from ...core.errors import RecipeError
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.method import Method
    from ...core.site import Place


@dataclass(frozen=True)
class Site:
    """The end of one sub-layer: `path` returns what is added to the residual stream."""

    block: Block
    path: str
    width: int


def at(path: str, places: list[Place]) -> bool:
    """Is a site named by one of the places: its own weight, or one inside it?"""
    return any(p.path == path or p.path.startswith(f"{path}.") for p in places)


def width(anatomy: Anatomy, path: str, block: Block) -> int:
    """Of what the module at `path` returns: its last matrix, or the block's own."""
    ends = [p.out for p in anatomy.places
            if p.path == path and p.role not in ("q", "k", "v", "qkv", "kv")
            and p.kind not in ("experts", "embedding")]
    made = ends[-1] if ends else block.hidden_size
    if made is None:
        raise RecipeError(f"the width of {path} cannot be told from its weights")
    return made


def attention_ends(anatomy: Anatomy) -> Iterator[Site]:
    """Behind self-attention, cross-attention or another mixer of tokens, before the residual."""
    for b in anatomy.blocks:
        for path in dict.fromkeys((b.attn_out or (b.mixer if not b.attn else None), b.cross_out)):
            if path:
                yield Site(b, path, width(anatomy, path, b))


def mlp_ends(anatomy: Anatomy) -> Iterator[Site]:
    """Behind the MLP, or behind a whole mixture of experts."""
    for b in anatomy.blocks:
        path = b.mlp_out or b.mlp
        if path:
            yield Site(b, path, width(anatomy, path, b))


def numbered(sites: Iterable[Site]) -> list[tuple[int, int]]:
    """(number of its block, number within the block) of every site."""
    blocks: dict[str, int] = {}
    within: dict[str, int] = {}
    out = []
    for s in sites:
        path = s.block.path
        within[path] = within.get(path, -1) + 1
        out.append((blocks.setdefault(path, len(blocks)), within[path]))
    return out


def norm_tensors(anatomy: Anatomy) -> Iterator[Selection]:
    """The scales and shifts of all norms, without weight decay."""
    for path in anatomy.norms:
        for leaf, _ in anatomy.model.get_submodule(path).named_parameters(recurse=False):
            yield Selection(f"{path}.{leaf}", decay=False)


def found(anatomy: Anatomy, sites: Iterable[Site], method: Method, what: str) -> list[Site]:
    """The sites that targets name, or an error when the model has none."""
    sites = list(sites)
    if not sites:
        raise RecipeError(f"{method.name}: this model has no {what} to stand behind")
    return narrowed(anatomy, method, sites, lambda s, places: at(s.path, places))


def post_norm(anatomy: Anatomy, block: Block) -> str | None:
    """The norm behind the MLP's residual in blocks that normalise last, else None."""
    module = anatomy.model.get_submodule(block.path)
    last = block.stack not in anatomy.final_norms
    if not getattr(module, "norm_first", not last):
        mine = outer_norms(block)
        return mine[-1] if len(mine) > 1 else None
    return None


def outer_norms(block: Block) -> list[str]:
    """Norms of the residual stream: those inside attention (of queries and keys) left out."""
    inside = tuple(f"{m}." for m in (block.attn, block.cross, block.mixer, block.mlp) if m)
    return [n for n in block.norms if not n.startswith(inside) or _ends_attention(block, n)]


def _ends_attention(block: Block, norm: str) -> bool:
    """BERT's ``attention.output.LayerNorm`` stands beside the projection it follows."""
    return bool(block.attn_out) and norm.rpartition(".")[0] == block.attn_out.rpartition(".")[0] \
        and norm.rpartition(".")[0].endswith("output")


def mlp_norm(anatomy: Anatomy, block: Block) -> str | None:
    """The norm whose output the MLP reads, None where it reads the residual stream itself."""
    if post_norm(anatomy, block):
        return None
    if block.mixer is None:
        raise RecipeError(f"{block.path} mixes no tokens before its MLP, so there is no residual "
                          "stream between the two; tap='norm' reads what the MLP reads")
    mine = [(n, n.rpartition(".")[2]) for n in outer_norms(block)]
    before = [n for n, leaf in mine if families.BEFORE_MLP.search(leaf)]
    left = [n for n, leaf in mine if not families.BEHIND.search(leaf)]
    if before:
        return before[0]
    if len(left) > 1:
        return left[-1]
    if len(left) == len(mine) == 1:
        raise RecipeError(f"{block.path} has one norm for attention and MLP together; tap='norm' "
                          "reads what the MLP reads")
    return None


def module(anatomy: Anatomy, path: str) -> nn.Module:
    return anatomy.model.get_submodule(path)
