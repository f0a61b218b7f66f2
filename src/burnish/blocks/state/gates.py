"""Per-channel scale and shift of a hidden state, and how they fold into the weights behind it.

    y = gamma * h + beta

Kept for backward: h, when gamma trains. The lean tape makes y again from h where something else
wants y, so a gate on a value that is kept anyway (queries, keys, values, the input of an
activation) costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import CheckError


class Affine(nn.Module):
    """``y = gamma * h + beta`` on one axis of the hidden state.

    gain (n,), shift (n,) or None. rows: runs ``(start, stop)`` of the axis that are gated, in the
    order of `gain`; None gates all of it. axis: -1 for tokens, 1 for maps (batch, channel, ...).
    side: what the gate folds into: "output" the rows of the module's weight and its bias, "input"
    the columns of the weight.

    Weight decay would pull gains to zero; the start is 1, so decay, if any, belongs to
    ``gain - 1``. Both tensors are marked to be left alone by it.
    """

    def __init__(self, channels: int, *, shift: bool = False, axis: int = -1,
                 rows: tuple[tuple[int, int], ...] | None = None, side: str = "output",
                 spread: float = 0.0):
        super().__init__()
        self.channels, self.axis, self.rows, self.side = channels, axis, rows, side
        n = channels if rows is None else sum(b - a for a, b in rows)
        self.gain = nn.Parameter(torch.ones(n))
        self.shift = nn.Parameter(torch.zeros(n)) if shift else None
        for p in self.parameters():
            p.burnish_decay = False
        if spread:
            nn.init.normal_(self.gain, 1.0, spread)
            if shift:
                nn.init.normal_(self.shift, 0.0, spread)

    def whole(self, part: Tensor, rest: float) -> Tensor:
        """`part` on its rows, `rest` on the others: (channels,)."""
        if self.rows is None:
            return part
        pieces, at, used = [], 0, 0
        for a, b in self.rows:
            pieces += [part.new_full((a - at,), rest), part[used : used + b - a]]
            at, used = b, used + b - a
        return torch.cat([*pieces, part.new_full((self.channels - at,), rest)])

    def _shaped(self, part: Tensor, rest: float, h: Tensor) -> Tensor:
        trailing = 0 if self.axis == -1 else h.dim() - 1 - self.axis
        return self.whole(part, rest).to(h.dtype).view(-1, *(1,) * trailing)

    def forward(self, h: Tensor) -> Tensor:
        gain = self._shaped(self.gain, 1.0, h)
        if self.shift is None:
            return h * gain
        return torch.addcmul(self._shaped(self.shift, 0.0, h), h, gain)

    # -- folding ------------------------------------------------------------------------------
    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write the gate into the module's weight (and bias): exact, up to one rounding.

        values: parameter name -> value as stored; missing ones start from the module's own.
        """
        weight = value_of(module, values, "weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        gain = self.whole(self.gain, 1.0).to(wide)
        rows_first = out_first(module, weight)
        if self.side == "input":
            W = weight.to(wide)
            values["weight"] = (W * (gain if rows_first else gain.unsqueeze(-1))).to(weight.dtype)
            return
        shift = None if self.shift is None else self.whole(self.shift, 0.0).to(wide)
        if weight.dim() == 1:
            offset = norm_offset(module, weight)              # some norms store gamma - 1
            values["weight"] = ((weight.to(wide) + offset) * gain - offset).to(weight.dtype)
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):    # (in, out / groups, ...)
            by_group = gain.view(module.groups, 1, -1, *(1,) * (weight.dim() - 2))
            W = weight.to(wide).unflatten(0, (module.groups, -1)) * by_group
            values["weight"] = W.flatten(0, 1).to(weight.dtype)
        else:
            shape = (-1, *(1,) * (weight.dim() - 1)) if rows_first else (-1,)
            values["weight"] = (weight.to(wide) * gain.view(shape)).to(weight.dtype)
        bias = values.get("bias", getattr(module, "bias", None))
        if bias is None and shift is None:
            return
        if bias is None and "bias" not in module._parameters:
            raise CheckError(f"cannot merge: {type(module).__name__} has no bias to hold a shift")
        new = shift if bias is None else bias.detach().to(wide) * gain
        new = new if bias is None or shift is None else new + shift
        values["bias"] = new.to(weight.dtype if bias is None else bias.dtype)


class Shift(nn.Module):
    """``y = h + scale shift`` on runs of the outputs: those rows of a bias as their own tensor.

    shift (n,), n the length of `rows` together, starts at 0. Folds into the module's bias exactly.
    """

    def __init__(self, rows: tuple[tuple[int, int], ...], scale: float = 1.0):
        super().__init__()
        self.rows, self.scale = rows, scale
        self.shift = nn.Parameter(torch.zeros(sum(b - a for a, b in rows)))
        self.shift.burnish_decay = False

    def forward(self, h: Tensor) -> Tensor:
        return h + self.whole(h.shape[-1]).to(h.dtype)

    def whole(self, channels: int) -> Tensor:
        """What is added to all outputs: (channels,)."""
        sizes = [b - a for a, b in self.rows]
        pieces, at = [], 0
        for (a, b), part in zip(self.rows, self.shift.split(sizes), strict=True):
            pieces += [part.new_zeros(a - at), part]
            at = b
        made = torch.cat([*pieces, self.shift.new_zeros(channels - at)])
        return made if self.scale == 1 else made * self.scale

    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write the shift into the module's bias, which it gets where it has none."""
        like = value_of(module, values, "weight")
        if "bias" not in module._parameters:
            raise CheckError(f"cannot merge: {type(module).__name__} has no bias to hold a shift")
        bias = values.get("bias", module.bias)
        if bias is None:
            rows = like.shape[0] if out_first(module, like) else like.shape[1]
            bias = like.new_zeros(rows)
        bias, wide = bias.detach(), torch.promote_types(bias.dtype, torch.float32)
        values["bias"] = (bias.to(wide) + self.whole(bias.numel()).to(wide)).to(bias.dtype)


def takes_shift(module: nn.Module) -> bool:
    """Does the module read a bias, so that a shift behind it can fold?"""
    return "bias" in module._parameters


def value_of(module: nn.Module, values: dict[str, Tensor], name: str) -> Tensor:
    own = values.get(name)
    return (getattr(module, name) if own is None else own).detach()


def out_first(module: nn.Module, weight: Tensor) -> bool:
    """(out, in, ...), as everything stores it but the Conv1D of GPT-2."""
    return not (weight.dim() == 2 and hasattr(module, "nf"))


def norm_offset(module: nn.Module, weight: Tensor) -> float:
    """1 for norms that compute ``(1 + weight) x``, 0 for those that compute ``weight x``.

    Asked of the module itself: with a weight of zero the first answers something, the second
    nothing but its bias.
    """
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
        return 0.0
    names = {n: torch.zeros_like(p) for n, p in module.named_parameters(recurse=False)}
    probe = torch.linspace(0.5, 1.5, weight.numel(), dtype=weight.dtype, device=weight.device)
    base = getattr(type(module), "_burnish_base", type(module))
    held = {n: module._parameters[n] for n in names}
    try:
        module._parameters.update({n: nn.Parameter(t, False) for n, t in names.items()})
        out = base.forward(module, probe.view(1, 1, -1))
    finally:
        module._parameters.update(held)
    return 1.0 if bool(out.any()) else 0.0
