"""The last layer of a classifier, widened or narrowed to the classes of the data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.anatomy import Anatomy
from ..core.errors import ConfigError


def head_of(model: nn.Module, classes: int | None = None) -> str | None:
    """Dotted name of the layer that gives the logits: the last linear layer, in module order.

    classes: its width where that is known; the last linear layer of that width then.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)
             and (classes is None or m.out_features == classes)]
    return names[-1] if names else None


def drawn(model: nn.Module, fresh: Sequence[str], train_head: bool | str) -> list[str]:
    """Notes on tensors that the base lacks, so that they were drawn at random.

    train_head: as for :func:`burnish.tune`. Raises ConfigError where the head is among them and
    would stay as it was drawn.
    """
    anatomy = Anatomy.of(model)
    head = [n for n in fresh if n.startswith(tuple(f"{h}." for h in anatomy.head))]
    trains = anatomy.head_kind == "classification" if train_head == "auto" else bool(train_head)
    if head and not trains:
        raise ConfigError(f"the model's files lack {head[0]}, so the head is drawn at random, and "
                          f"head={train_head!r} would leave it so; give head=True, or a model with "
                          "its head")
    rest = [n for n in fresh if n not in head]
    return [f"the model's files lack {', '.join(rest[:3])}"
            f"{f' and {len(rest) - 3} more' if len(rest) > 3 else ''}: drawn at random by the seed"
            ] if rest else []


def resize_head(model: nn.Module, labels: Sequence[str],
                problem: str | None = "single_label_classification") -> nn.Module:
    """Replaces the head where its width is not ``len(labels)``; new rows start afresh.

    A transformers model also gets the names of its classes, and `problem`, its name of the loss. A
    head of the right width is kept.
    Raises ConfigError where no head can be told.
    """
    wanted = len(labels)
    config = getattr(model, "config", None)
    known = getattr(config, "num_labels", None) or getattr(model, "num_classes", None)
    if known != wanted:
        if hasattr(model, "reset_classifier"):  # timm knows its own head
            model.reset_classifier(wanted)
        else:
            name = head_of(model, known)
            if name is None:
                raise ConfigError(f"cannot tell the head of {type(model).__name__}; give a model "
                                  f"with {wanted} classes")
            parent = model.get_submodule(name.rpartition(".")[0])
            old = model.get_submodule(name)
            if old.out_features != wanted:
                new = nn.Linear(old.in_features, wanted, old.bias is not None,
                                device=old.weight.device, dtype=old.weight.dtype)
                std = getattr(config, "initializer_range", None)
                if std is not None:
                    nn.init.normal_(new.weight, std=std)
                    if new.bias is not None:
                        nn.init.zeros_(new.bias)
                setattr(parent, name.rpartition(".")[2], new)
    if config is not None and hasattr(config, "num_labels"):
        config.problem_type = problem                       # not what the base was trained for
        config.num_labels = wanted
        config.id2label = dict(enumerate(labels))
        config.label2id = {v: k for k, v in enumerate(labels)}
        if hasattr(model, "num_labels"):
            model.num_labels = wanted
    return model
