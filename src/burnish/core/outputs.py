"""What a model answers, read off what its class declares: no forward, no value of any tensor."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .anatomy import Anatomy

#: fields of outputs that are logits, first found wins
LOGITS = ("logits", "logits_per_image")


def declared(model: nn.Module) -> frozenset[str] | None:
    """Names of the fields of the outputs that ``forward`` says it returns (transformers' models
    do); None where it says nothing."""
    names = [f.name for kind in _kinds(model) for f in dataclasses.fields(kind)]
    return frozenset(names) or None


def next_token(model: nn.Module) -> bool:
    """Given its own input as labels, does row n of the logits answer the label n + 1?

    Models that write on by themselves do, but for those that read the text apart (their decoder's
    input is shifted already) and those whose outputs are declared to be of masked words.
    """
    writes = getattr(model, "can_generate", lambda: False)()
    apart = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(writes and not apart and not any("Masked" in k.__name__ for k in _kinds(model)))


def vocabulary_head(anatomy: Anatomy) -> str | None:
    """Path of the linear whose outputs are logits of a vocabulary: the one that a model names as
    its output embeddings, else one in the head with as many outputs as an embedding has rows; None
    where there is none, or it computes something else than ``x W^T + b``."""
    model = anatomy.model
    try:
        said = getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):    # asked of a model that has none
        said = None
    words = {p.inp for p in anatomy.places if p.kind == "embedding"}
    found = next((n for n, m in model.named_modules() if m is said), None) if said is not None \
        else next((p.path for p in anatomy.places if anatomy.head_kind == "lm"
                   and anatomy.in_head(p) and p.out in words), None)
    if found is None:
        return None
    kind = base_class(model.get_submodule(found))
    return found if issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward else None


def base_class(model: nn.Module) -> type[nn.Module]:
    """The class a module had before anything was added to it."""
    return getattr(type(model), "_burnish_base", type(model))


def _kinds(model: nn.Module) -> list[typing.Any]:
    """The output classes in the annotation of forward."""
    try:
        said = typing.get_type_hints(base_class(model).forward).get("return")
    except (NameError, TypeError, AttributeError):      # names that only a type checker knows
        return []
    every = (said, *typing.get_args(said))
    return [k for k in every if isinstance(k, type) and dataclasses.is_dataclass(k)]
