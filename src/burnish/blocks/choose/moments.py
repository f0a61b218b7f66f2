"""Second moments of what linears read, token by token, over data that runs through a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ..state.taps import evaluating


class SecondMoments:
    """``mean over tokens of x_j^2`` (in,), or of A x where `through` is a factor A (rank, in)."""

    def __init__(self, through: Tensor | None = None):
        self.through, self.total, self.count = through, None, 0

    def see(self, x: Tensor) -> None:
        """x (N, in)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.through is not None:
            x = F.linear(x, self.through.to(x))
        part = x.square().sum(0)
        self.total = part if self.total is None else self.total + part
        self.count += len(x)

    @property
    def value(self) -> Tensor:
        assert self.total is not None
        return self.total / max(1, self.count)


@torch.no_grad()
def read(model: nn.Module, seen: Mapping[str, Sequence[SecondMoments]],
         batches: Iterable[Mapping[str, Any]], who: str) -> None:
    """Run the model over batches in evaluation mode; `seen` of each module's path is told what it
    reads. Tokens that ``attention_mask`` leaves out do not count. Labels have a part only where a
    decoder's input is made of them."""
    mask: Tensor | None = None
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def look(path: str, stats: Sequence[SecondMoments]) -> Any:
        def hook(module: Any, args: tuple, kw: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kw.values()))
            rows = _valid(x, mask, path, who, decodes)
            for s in stats:
                s.see(rows)
        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(look(path, stats),
                                                                 with_kwargs=True)
             for path, stats in seen.items()]
    try:
        with evaluating([m for m in model.modules() if m.training]):
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise ConfigError(f"{who}: a batch is a mapping of what the model takes, and "
                                      f"this is a {type(batch).__name__}")
                mask = batch.get("attention_mask")
                if decodes and not {"labels", "decoder_input_ids", "decoder_inputs_embeds"} & \
                        batch.keys():
                    raise ConfigError(f"{who}: this model has a decoder, whose input these batches "
                                      "do not say: bring labels or decoder_input_ids")
                model(**{k: v for k, v in batch.items() if k != "labels" or decodes})
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [path for path, stats in seen.items() if not all(s.count for s in stats)]:
        raise ConfigError(f"{who}: {idle[0]} read nothing in these batches: it is read past its "
                          "module, or there were none")


def _valid(x: Tensor, mask: Tensor | None, path: str, who: str, decodes: bool) -> Tensor:
    """Tokens (N, in) that count. decodes: the mask may be of other tokens than these."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or bool(mask.all()):
        return flat
    if decodes or mask.numel() != len(flat):
        raise ConfigError(f"{who}: {path} reads {list(x.shape)}, and which of these are padding "
                          f"cannot be told from a mask of {list(mask.shape)}; give batches without "
                          "padding")
    return flat[mask.reshape(-1).to(flat.device).bool()]
