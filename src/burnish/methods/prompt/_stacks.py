"""Where tokens enter a model: shared by the methods of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...blocks.state.prompts import accepts

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


def embedding_stacks(anatomy: Anatomy) -> dict[str, str]:
    """stack of blocks -> the innermost module above it that takes ids or their embeddings."""
    return {stack: path for stack in anatomy.stacks()
            if (path := above(anatomy, stack, "input_ids", "inputs_embeds")) is not None}


def above(anatomy: Anatomy, stack: str, *names: str) -> str | None:
    """The innermost module above a stack whose forward takes these arguments."""
    parts = stack.split(".")
    for n in range(len(parts), -1, -1):
        path = ".".join(parts[:n])
        if accepts(anatomy.model.get_submodule(path), *names):
            return path
    return None
