"""Where tokens, keys and values enter a model: shared by the methods of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...blocks.state.bare import Bare
from ...blocks.state.keys_values import Moved
from ...blocks.state.prompts import accepts
from ...core.errors import RecipeError
from ...core.families import rotary

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.site import Place


def embedding_stacks(anatomy: Anatomy) -> dict[str, str]:
    """stack of blocks -> the innermost module above it that takes ids or their embeddings."""
    return {stack: path for stack in anatomy.stacks()
            if (path := above(anatomy, stack, "input_ids", "inputs_embeds")) is not None}


def above(anatomy: Anatomy, stack: str, *names: str) -> str | None:
    """The innermost module above a stack whose forward takes these arguments."""
    parts = stack.split(".")
    for n in reversed(range(len(parts))):
        path = ".".join(parts[:n])
        if accepts(anatomy.model.get_submodule(path), *names):
            return path
    return None


def states_as_they_were(attacher: Any, part: Any, stack: str, length: int, after: int | None
                        ) -> None:
    """Let every module above a stack hand out its states without the `length` rows behind the first
    `after` tokens (None: behind all), whichever of them collects them."""
    parts = stack.split(".")
    for n in range(len(parts)):
        path = ".".join(parts[:n])
        if not isinstance(attacher.model.get_submodule(path), nn.ModuleList | nn.Sequential):
            Bare(attacher.state, attacher.adapter.name, length, after).listen(
                attacher.slot(path), f"{part.name}_bare_{n}")


def check_ids(method: Any, init: str, table: torch.Tensor | None = None) -> None:
    """RecipeError for `ids` that another start than `init` would not read, that are more than the
    rows, or (with the embedding `table`) that name no token."""
    if method.ids is None:
        return
    if method.init != init:
        raise RecipeError(f"{method.name}(ids=...) starts from tokens, and init={method.init!r} "
                          f"reads none: leave one of them out, or take init={init!r}")
    if len(method.ids) > method.length:
        raise RecipeError(f"{method.name}(ids=...): {len(method.ids)} tokens are more than the "
                          f"{method.length} rows (length) that start from them")
    if table is not None and not (method.ids and 0 <= min(method.ids)
                                  and max(method.ids) < len(table)):
        raise RecipeError(f"{method.name}(ids=...): expected ids from 0 to {len(table) - 1}")


def read_words(attacher: Any, part: Any, method: Any) -> bool:
    """Run the base on the method's `ids`, repeated to `length`: before the text where positions
    are rotary, so that what they leave behind stands where words before the text would. False where
    no values are wanted; RecipeError where the model does not run on token ids."""
    model, length = attacher.model, method.length
    if not accepts(model, "input_ids"):
        raise RecipeError(f"{method.name}(ids=...): {type(model).__name__} reads no token ids; "
                          "leave them out and give tune(..., calibration=batches)")
    try:
        check_ids(method, method.init, model.get_input_embeddings().weight)
        text = torch.tensor([[method.ids[i % len(method.ids)] for i in range(length)]],
                            device=attacher.device(""))
        batch = {"input_ids": text}
        if accepts(model, "decoder_input_ids"):
            batch["decoder_input_ids"] = text
        if rotary(model) and accepts(model, "position_ids"):
            batch["position_ids"] = torch.arange(-length, 0, device=text.device).unsqueeze(0)
        return attacher.rehearse(part, batch=batch)
    except RecipeError:
        raise
    except Exception as e:
        why = str(e).partition("\n")[0]
        raise RecipeError(f"{method.name}(ids=...): {type(model).__name__} does not run on these "
                          f"token ids alone ({why}); leave them out and give "
                          "tune(..., calibration=batches)") from e


def move_tokens(attacher: Any, part: Any, length: int) -> None:
    """Let the tokens of the model count from `length` on."""
    stacks = list(attacher.anatomy.stacks())
    path = above(attacher.anatomy, stacks[0], "position_ids") if len(stacks) == 1 else None
    if path is None:
        raise RecipeError(f"{part.name}(moved=True) needs one stack of blocks that takes "
                          f"position_ids; {type(attacher.model).__name__} has none")
    Moved(attacher.state, attacher.adapter.name, length).listen(attacher.slot(path), part.name)


def attentions(anatomy: Anatomy) -> Iterator[tuple[str, int]]:
    """(path, width of its keys) of every self- and cross-attention of the blocks."""
    for number, block in enumerate(anatomy.blocks):
        for path, prefix in ((block.attn, ""), (block.cross, "cross_")):
            if path is not None:
                yield path, key_width(anatomy, number, block, prefix)


def key_width(anatomy: Anatomy, number: int, block: Block, prefix: str,
              part: str = "prefix") -> int:
    """Of the keys of one attention (`prefix` of its roles: "" or "cross_"), from its weights."""
    mine = [p for p in anatomy.places if p.block == number]
    for place in mine:
        for p in (place, *anatomy.slices(place)):
            if p.role == f"{prefix}k":
                return p.out
    fused = next((p for p in mine if p.role == f"{prefix}qkv"), None)
    if fused is not None and block.heads and block.kv_heads:
        return fused.out * block.kv_heads // (block.heads + 2 * block.kv_heads)
    raise RecipeError(f"{part}: the width of the keys in {block.path} cannot be told from its "
                      "weights")


def key_value_linears(anatomy: Anatomy, number: int, attn: str, part: str) -> tuple[Place, Place]:
    """The linears of the self-attention at `attn`, of block `number`, that make its keys and its
    values, or the runs of a fused one that do. RecipeError where there are none."""
    mine = [s for p in anatomy.places if p.block == number and p.kind in ("linear", "conv1d")
            and p.path.startswith(f"{attn}.") for s in (p, *anatomy.slices(p))]
    found = [next((p for p in mine if p.role == role), None) for role in ("k", "v")]
    if found[0] is None or found[1] is None:
        raise RecipeError(f"{part}: {attn} has no linear whose outputs are its keys, or its "
                          "values, alone and in one run, so nothing else can be sent through it")
    return found[0], found[1]
