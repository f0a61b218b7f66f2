"""The last map that a model of pictures makes before its head: (rows, channels, h, w)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import call, moved
from ..core.errors import RecipeError
from ..engine.tuned import Tuned


class Maps:
    """What the module that makes the last map says, in the forwards made meanwhile.

    A network of convolutions has a map (rows, channels, h, w) of its own; of a transformer the
    tokens (rows, tokens, channels) of a square picture are one, those before the last square number
    (classes, registers) left out. Found by one forward.
    """

    def __init__(self, tuned: Tuned, inputs: Any, who: str):
        self.tuned, self.last = tuned, torch.empty(0)
        picture = next((t for t in _tensors(inputs)
                        if t.dim() == 4 and t.is_floating_point()), None)
        if picture is None:
            raise RecipeError(f"{who} scans maps of pictures, (rows, channels, height, width), and "
                              "this stream's model reads none")
        self.path = self._found(inputs, len(picture), who)
        self.module = tuned.model.get_submodule(self.path)
        found = self.of(inputs)
        if picture.shape[-1] != picture.shape[-2] and self.tokens:
            raise RecipeError(f"{who}: tokens of a picture of {picture.shape[-2]} x "
                              f"{picture.shape[-1]} do not say how they lie; square pictures do")
        self.shape: tuple[int, int, int] = (found.shape[1], found.shape[2], found.shape[3])

    def _found(self, inputs: Any, rows: int, who: str) -> str:
        """The module outside of the head whose output is the last map."""
        tuned, seen, handles = self.tuned, [], []
        heads = tuple(f"{p}." for p in tuned.anatomy.head)

        def look(path: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and len(out) == rows and out.is_floating_point() and (
                        out.dim() == 4 and out.shape[2] * out.shape[3] > 1
                        or out.dim() == 3 and out.shape[1] > 1):
                    seen.append((path, out.dim()))
            return hook

        for path, module in tuned.model.named_modules():
            if path and not f"{path}.".startswith(heads or "\0") and ".burnish" not in f".{path}":
                handles.append(module.register_forward_hook(look(path)))
        try:
            self._run(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise RecipeError(f"{who} scans the last map before the head, and a "
                              f"{type(tuned.model).__name__} makes none: (rows, channels, h, w), "
                              "or tokens (rows, tokens, channels)")
        self.tokens = seen[-1][1] == 3
        return seen[-1][0]

    def _see(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.tokens:
            n, side = out.shape[1], math.isqrt(out.shape[1])
            out = out[:, n - side * side:].transpose(1, 2).unflatten(2, (side, side))
        self.last = out

    @contextmanager
    def seen(self) -> Iterator[Maps]:
        handle = self.module.register_forward_hook(self._see)
        try:
            yield self
        finally:
            handle.remove()

    @torch.no_grad()
    def _run(self, inputs: Any) -> None:
        self.tuned.model.eval()
        call(self.tuned.model, moved(inputs, next(self.tuned.model.parameters()).device))

    def of(self, inputs: Any) -> Tensor:
        """(rows, channels, h, w) of a batch, in evaluation."""
        with self.seen():
            self._run(inputs)
        return self.last


def _tensors(inputs: Any) -> list[Tensor]:
    found = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return [t for t in found if isinstance(t, Tensor)]
