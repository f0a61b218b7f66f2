"""Where adapters stand in a block: shared by the methods of this folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...core import families
from ...core.asked import chosen, narrowed
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


def attention_inputs(block: Block, end: str) -> str:
    """The module that is given what the sub-layer reads of which `end` is the end."""
    read = block.cross if end == block.cross_out else block.mixer
    assert read is not None
    return read


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


#: roles of weights that nothing scales: heads, routers, tables
_UNSCALED = ("head", "router", "embed", "position", "type")


def scaled(anatomy: Anatomy, method: Method, *, norms: bool = False, rows: bool = False
           ) -> Iterator[tuple[str, int, nn.Module]]:
    """(path, channels, module) of the linears, convolutions and norms behind which a part scales
    channels, those that targets name: a weight, a norm or a module that holds some.

    norms: of norms alone, unless targets name others. rows: each sample has its own scale, so a
    routed expert is left out, which is given the tokens of all of them.
    """
    sites = {p.path: p.out for p in anatomy.places
             if p.kind in ("linear", "conv1d", "conv") and p.param == "weight"
             and p.role not in _UNSCALED and not (rows and ".experts." in f".{p.path}.")}
    if norms and anatomy.asked.of(method)[0] is None:
        sites = {}
    for path in anatomy.norms:
        if path not in anatomy.head:
            sites[path] = next(module(anatomy, path).parameters()).numel()
    if not sites:
        what = "norm" if norms else "linear, convolution or norm"
        raise RecipeError(f"{method.name}: this model has no {what} to stand behind")
    named = chosen(anatomy, method, [f"{s}.weight" if s else "weight" for s in sites],
                   siblings=True)
    for path in (n.rpartition(".")[0] for n in named):
        yield path, sites[path], module(anatomy, path)


def channel_axis(module: nn.Module) -> int:
    """1 where the module's result is (batch, channel, ...), -1 where channels come last."""
    first = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    maps = getattr(module, "data_format", "") == "channels_first" \
        or type(module).__name__ == "LayerNorm2d"
    return 1 if isinstance(module, first) or maps else -1


def samples_first(anatomy: Anatomy, method: Method) -> None:
    """RecipeError for a model that puts tokens before samples, for one that tells samples apart."""
    if any(not getattr(m, "batch_first", True) for m in anatomy.model.modules()):
        raise RecipeError(f"{method.name} tells the samples of a batch apart, and this model puts "
                          "tokens before samples (batch_first=False)")


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


def norm_before(anatomy: Anatomy, s: Site) -> str | None:
    """The norm whose output the sub-layer of a site reads; None where it stands in another block,
    or there is none."""
    block, mine = s.block, outer_norms(s.block)
    mlp, cross = s.path in (block.mlp_out, block.mlp), s.path == block.cross_out
    if post_norm(anatomy, block):
        return mine[-2] if mlp else mine[0] if cross else None
    if cross and len(mine) > 2:
        return mine[1]
    if not mlp or block.mixer is None or len(mine) < 2:
        return mine[0] if mine else None
    return mlp_norm(anatomy, block)


def module(anatomy: Anatomy, path: str) -> nn.Module:
    return anatomy.model.get_submodule(path)
