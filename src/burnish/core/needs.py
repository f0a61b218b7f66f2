"""What a method needs of a model, in words that are tested on every architecture.

A method that has no place on some models says so once, in ``needs``; a delta or a storage says it
with ``kinds``. Planner, suite and docs read these facts instead of trying. The words describe an
anatomy; the suite compares them with what attaching really does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch import nn

from . import families
from .anatomy import Anatomy, Block
from .errors import BurnishError, RecipeError
from .groups import Group, groups
from .method import Method
from .outputs import LOGITS, base_class, declared, next_token, vocabulary_head
from .site import Place
from .stream import Stream, stream
from .targets import match


def _reads_text(a: Anatomy, stack: str, *names: str) -> bool:
    """The innermost module above the stack that takes inputs takes token ids (and `names`)."""
    parts = stack.split(".")
    for n in range(len(parts), -1, -1):
        taken = set(inspect.signature(a.model.get_submodule(".".join(parts[:n])).forward)
                    .parameters)
        if {"input_ids", *names} <= taken:
            return True
        if "pixel_values" in taken:
            return False
    return False


def _ladder(a: Anatomy) -> bool:
    alone = len(a.stacks()) == 1 and not any(b.cross for b in a.blocks)
    return ((alone or a.encoder_decoder() is not None)
            and all(b.attn for b in a.blocks) and len({b.hidden_size for b in a.blocks}) == 1)


def _one_width(a: Anatomy) -> bool:
    widths = {b.hidden_size or a.hidden_size for b in a.blocks}
    return (len(a.stacks()) == 1 and len(widths) == 1 and None not in widths
            and not any(b.cross for b in a.blocks))


def _even(a: Anatomy) -> bool:
    widths = ({b.hidden_size for b in blocks if b.attn} for blocks in a.stacks().values())
    return all(len(w) < 2 for w in widths) and all(b.attn != b.path for b in a.blocks)


def _reads_whole(a: Anatomy) -> bool:
    return _one_width(a) and all(b.mixer for b in a.blocks) and not next_token(a.model)


def levels(a: Anatomy) -> bool:
    """Is it a U-Net, whose stacks are its levels down, the middle and those up?"""
    leaves = {s.rpartition(".")[2] for s in a.stacks()}
    return len(leaves) > 1 and leaves <= set(families.IN_ORDER)


def _states(a: Anatomy) -> bool:
    return any(all(b.attn for b in blocks) and len({b.hidden_size for b in blocks}) == 1
               and not _reads_text(a, stack) for stack, blocks in a.stacks().items())


def patches(a: Anatomy) -> list[Place]:
    """Convolutions that cut a picture into patches."""
    return [p for p in a.places if p.role == "patch" and p.block is None and p.kind == "conv"]


def behind_patches(a: Anatomy) -> list[list[Block]]:
    """The stacks of blocks that read pictures cut into patches by a convolution, in order."""
    tops = {p.path.split(".")[0] for p in patches(a)}
    stacks = a.stacks()
    return [blocks for stack, blocks in stacks.items()
            if tops and (len(stacks) == 1 or stack.split(".")[0] in tops)]


def patch_stack(a: Anatomy) -> list[Block] | None:
    """The one stack of attending blocks of one width that reads pictures cut into patches."""
    found = behind_patches(a)
    return found[0] if len(found) == 1 and all(b.attn for b in found[0]) \
        and len({b.hidden_size for b in found[0]}) == 1 else None


def point_groups(a: Anatomy) -> str | None:
    """The module that gathers a cloud's points into groups and returns their centres; None where
    none stands before one stack of transformer blocks that mixes no text in."""
    found = [p for p, m in a.model.named_modules() if p.rpartition(".")[2] in families.GROUPERS]
    return found[0] if len(found) == 1 and _reads_whole(a) and all(b.attn for b in a.blocks) \
        else None


def head_linear(a: Anatomy) -> Place | None:
    """The linear that the task head consists of; None where it is another, or more."""
    found = [p for p in a.places if a.in_head(p)]
    one = len(a.head) == len(found) == 1 and a.head_kind == "classification"
    return found[0] if one and found[0].kind == "linear" and found[0].path == a.head[0] else None


def _pictures(a: Anatomy) -> bool:
    return (_one_width(a) and all(b.attn for b in a.blocks) and len(patches(a)) == 1
            and head_linear(a) is not None)


def _scalable(a: Anatomy) -> bool:
    keys = [p for p in a.places if p.block is not None and p.role.removeprefix("cross_") in
            ("k", "v", "qkv", "kv")]
    inner = [p for p in a.places if p.block is not None and p.role in ("fc2", "down")
             and p.kind in ("linear", "conv1d")]
    return bool(keys or inner) and all(p.kind in ("linear", "conv1d") for p in keys)


def _linears(a: Anatomy) -> bool:
    try:
        return any(p.kind in ("linear", "conv1d") and p.param == "weight" for p in match(a, None))
    except BurnishError:                         # nothing at all to act on
        return False


def _tiles(a: Anatomy) -> bool:
    sides = [n for p in match(a, None) if p.kind in ("linear", "conv1d", "mha")
             for n in (p.out, p.inp)]
    return bool(sides) and all(n % min(sides) == 0 for n in sides)


def _attends(a: Anatomy) -> bool:
    return any(p.kind in ("linear", "conv1d")
               and p.role in (*families.ATTENTION, *families.CROSS) for p in match(a, None))


def mlp_linears(a: Anatomy) -> list[Place]:
    """Linears of the blocks' MLPs that read every token (those of a routed expert do not)."""
    return [p for p in a.places if p.block is not None and p.role in families.MLP and not p.rows
            and p.kind in ("linear", "conv1d") and ".experts." not in f".{p.path}."]


def qkv_linears(a: Anatomy) -> list[Place]:
    """Linears that make the queries, keys and values of self-attention, whole where fused."""
    return [p for p in a.places if p.block is not None and p.kind in ("linear", "conv1d")
            and p.role in ("q", "k", "v", "qkv", "kv")]


def _open(a: Anatomy) -> bool:
    found = [a.model.get_submodule(b.attn) for b in a.blocks if b.attn]
    return bool(found) and not any(isinstance(m, nn.MultiheadAttention) for m in found)


def mlp_modules(a: Anatomy) -> list[tuple[Block, list[Place]]]:
    """Blocks whose MLP is a module of its own, of whole linears for all tokens, with these."""
    out = []
    for b in a.blocks:
        mine = [p for p in a.places if b.mlp and f"{p.path}.".startswith(f"{b.mlp}.")]
        if len(mine) > 1 and b.mlp_out and all(p.kind in ("linear", "conv1d") and not p.rows
                                               and p.path != b.mlp for p in mine):
            out.append((b, mine))
    return out


def inner(a: Anatomy) -> list[Group]:
    """The inner channels of MLPs of whole linears (a fused gate and up are none)."""
    return [g for g in groups(a)[0] if g.kind == "channels"
            and not any(p.rows for p, _ in (*g.rows, *g.columns))]


def _alone(a: Anatomy) -> bool:
    return not any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                   and (m.training or m.running_mean is None) for m in a.model.modules())


def _mlp_alone(a: Anatomy) -> bool:
    linears = [p for p in a.places if p.kind == "linear"]
    return len(linears) > 1 and not any(b.mixer or b.attn for b in a.blocks) and _alone(a) \
        and all(p.kind in ("linear", "embedding") for p in a.places)


def _logits(a: Anatomy) -> bool:
    said = declared(a.model)
    return said is None or not said.isdisjoint(LOGITS)


@dataclass(frozen=True)
class Towers:
    """A model that matches images and texts. text, vision: their blocks. table: the text's token
    embeddings. image: what projects images into the common width `joint`. scale: the parameter
    whose exponential multiplies their cosines, None where there is none of that name. pixels: the
    module that reads pictures and returns the states of their tower."""

    text: list[Block]
    vision: list[Block]
    table: str
    image: str
    joint: int
    scale: str | None = None
    pixels: str = ""


def towers(a: Anatomy, within: bool = False) -> Towers | None:
    """The two towers of a model that takes images and token ids, None where it has none; `within`:
    or of one that is a part of it, with blocks of other stacks behind."""
    homes = [p for p, m in a.model.named_modules() if "logits_per_image" in (declared(m) or ())]
    return next(filter(None, (_towers(a, f"{p}." if p else "") for p in homes
                              if within or not p)), None)


def _towers(a: Anatomy, home: str) -> Towers | None:
    """Those of the module with this path (and a point)."""
    stacks = {s: b for s, b in a.stacks().items() if s.startswith(home)}
    text = [b for stack, b in stacks.items() if _reads_text(a, stack)]
    vision = [b for stack, b in stacks.items() if not _reads_text(a, stack)]
    if len(text) != 1 or len(vision) != 1:
        return None
    top, eye = (f"{home}{b[0].stack.removeprefix(home).split('.')[0]}"
                for b in (text[0], vision[0]))
    tables = [p for p in a.places if p.kind == "embedding" and p.path.startswith(f"{top}.")]
    outside = [p for p in a.places if p.block is None and p.kind == "linear"
               and p.path.startswith(home) and "." not in p.path.removeprefix(home)]
    image = [p for p in outside if (leaf := p.path.removeprefix(home)).startswith("vis")
             or "image" in leaf]
    if not tables or len(image) != 1:
        return None
    longest = max(tables, key=lambda p: p.inp)
    scale = f"{home}logit_scale"
    return Towers(text[0], vision[0], longest.path, image[0].path, image[0].out,
                  scale if "logit_scale" in a.model.get_submodule(home.rstrip("."))._parameters
                  else None, eye)


def token_tables(a: Anatomy) -> list[Place]:
    """Tables that turn token ids into states."""
    return [p for p in a.places if p.kind == "embedding" and p.role == "embed" and p.block is None]


def _tables(a: Anatomy) -> bool:
    try:
        return all(a.ends(p) or not a.tied(p) for p in match(a, "embedding"))
    except BurnishError:
        return False


#: word -> (what it means, does this model have it?)
NEEDS: dict[str, tuple[str, Callable[[Anatomy], bool]]] = {
    "blocks": ("repeated blocks", lambda a: bool(a.blocks)),
    "attention": ("blocks with attention", lambda a: any(b.attn for b in a.blocks)),
    "open attention": ("blocks with attention whose queries and keys can be read, unlike those of "
                       "nn.MultiheadAttention", _open),
    "mlp": ("blocks with an MLP", lambda a: any(b.mlp_out or b.mlp for b in a.blocks)),
    "mlp behind mixing": ("blocks with an MLP behind what mixes their tokens",
                          lambda a: all(b.mixer is not None for b in a.blocks
                                        if b.mlp_out or b.mlp)
                          and any(b.mlp_out or b.mlp for b in a.blocks)),
    "linears": ("linears outside its head", _linears),
    "attention linears": ("linears in the attention of its blocks", _attends),
    "mlp linears": ("linears in the MLPs of its blocks", lambda a: bool(mlp_linears(a))),
    "norms": ("norms with a scale or a shift",
              lambda a: any(m._parameters.get(k) is not None for p in a.norms
                            for m in [a.model.get_submodule(p)] for k in ("weight", "bias"))),
    "biases": ("biases", lambda a: any(n.endswith("bias") for n, _ in
                                       a.model.named_parameters())),
    "last matrices": ("MLPs with a last linear of their own", lambda a: any(
        p.role in ("fc2", "down") for p in mlp_linears(a))),
    "mlp modules": ("blocks whose MLP is a module of linears", lambda a: bool(mlp_modules(a))),
    "last linears": ("blocks whose MLP ends in one linear for all tokens",
                     lambda a: any(b.mlp_out for b in a.blocks)),
    "queries": ("linears that make queries, keys and values", lambda a: bool(qkv_linears(a))),
    "queries alone": ("linears that make queries, keys and values each by itself", lambda a: bool(
        qkv_linears(a)) and all(p.role in ("q", "k", "v") for p in qkv_linears(a))),
    "head": ("a task head", lambda a: bool(a.head)),
    "linear head": ("a task head of one linear", lambda a: head_linear(a) is not None),
    "vocabulary": ("a linear head over a vocabulary", lambda a: vocabulary_head(a) is not None),
    "logits": ("logits among its outputs", _logits),
    "own loss": ("a loss that a sample has by itself (a contrastive one has none)",
                 lambda a: "logits_per_image" not in (declared(a.model) or ())),
    "plain mlp": ("linears one behind the other, with nothing but norms and tables beside them",
                  _mlp_alone),
    "own norms": ("norms that a sample has by itself (BatchNorm over a batch has none; in "
                  "evaluation mode it has)", _alone),
    "batch norms": ("batch norms of one process", lambda a: any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)
        for m in a.model.modules())),
    "text": ("a stack that takes embeddings in place of token ids",
             lambda a: any(_reads_text(a, s, "inputs_embeds") for s in a.stacks())),
    "writes on": ("a stack that takes embeddings in place of token ids, in a model that writes on "
                  "with a linear head over its vocabulary", lambda a: next_token(a.model)
                  and vocabulary_head(a) is not None and len(a.stacks()) == 1
                  and any(_reads_text(a, s, "inputs_embeds") for s in a.stacks())),
    "states": ("a stack of transformer blocks of one width that reads no token ids", _states),
    "tables": ("an embedding of tokens, tied to nothing but linears and embeddings", _tables),
    "two towers": ("two towers, one that reads token ids and one that reads pictures, and a linear "
                   "that projects pictures", lambda a: towers(a) is not None),
    "towers within": ("two towers as a matcher of pictures and texts has them, itself or as a part",
                      lambda a: towers(a, within=True) is not None),
    "token table": ("one table of token embeddings", lambda a: len(token_tables(a)) == 1),
    "tiles": ("weights that are whole numbers of square tiles", _tiles),
    "inner channels": ("MLPs of linears whose inner channels can be told",
                       lambda a: bool(inner(a))),
    "units": ("attention or an MLP whose units can be told", lambda a: bool(groups(a)[0])),
    "stream": ("a residual stream whose channels can be taken out",
               lambda a: isinstance(stream(a), Stream)),
    "ladder": ("transformer blocks of one width, in one stack or an encoder and its decoder",
               _ladder),
    "even stacks": ("blocks around their attention that have one width in each stack", _even),
    "one width": ("a single stack of blocks of one width", _one_width),
    "whole reading": ("a single stack of blocks of one width, in a model that reads its input as a "
                      "whole and writes nothing on", _reads_whole),
    "whole attention": ("attention in a U-Net, or in a single stack of blocks of one width of a "
                        "model that reads its input as a whole and writes nothing on",
                        lambda a: any(b.attn for b in a.blocks)
                        and (_reads_whole(a) or levels(a))),
    "pictures": ("transformer blocks of one width between a convolution that cuts pictures into "
                 "patches and a head of one linear", _pictures),
    "patches": ("blocks behind a convolution that cuts pictures into patches",
                lambda a: bool(behind_patches(a))),
    "plain patches": ("one stack of transformer blocks of one width behind a convolution that cuts "
                      "pictures into patches", lambda a: patch_stack(a) is not None),
    "groups of points": ("a module group_divider that gathers a cloud's points into groups, before "
                         "transformer blocks of one width", lambda a: point_groups(a) is not None),
    "scalable states": ("keys and values, or an inner state of an MLP, that a module of their own "
                        "computes", _scalable),
}


def unmet(method: type[Method], anatomy: Anatomy) -> str | None:
    """The first of its `needs` that this model has not, in words, or None."""
    for word in sorted(method.needs):
        meaning, has = NEEDS[word]
        if not has(anatomy):
            return meaning
    return None


def refuse(part: Method, anatomy: Anatomy) -> NoReturn:
    """RecipeError: the model has nothing that `part` acts on."""
    needed = unmet(type(part), anatomy) or "a place that it acts on"
    model = base_class(anatomy.model).__name__
    raise RecipeError(f"{part.name} needs {needed}, which {model} does not have")


def lacks(method: type[Method], anatomy: Anatomy) -> str | None:
    """What `method` needs and this model has not, in words, or None when it applies."""
    if (word := unmet(method, anatomy)) is not None:
        return word
    if {"delta", "storage"} & set(method.axes()):
        own: Any = next(f.default for f in fields(method) if f.name == "targets")
        try:
            places = match(anatomy, own)
        except BurnishError as e:
            return str(e)
        if not any(p.kind in method.kinds for p in places):
            return f"weights of kind {', '.join(sorted(method.kinds))} among the default targets"
    return None
