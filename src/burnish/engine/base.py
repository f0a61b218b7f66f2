"""What the base answers while the recipe is off: trained weights and moved buffers as they were."""

from __future__ import annotations

from torch import Tensor, nn

from .buffers import Buffers
from .originals import Originals
from .swap import expose


class Base:
    """``base(module, name)``: the original of a tensor that trains or moves, None for any other.

    Nothing in the model is touched but the class of the modules that own such tensors, so that
    they ask (see swap.py). An original is brought when it is first asked for and held as long as
    anybody needs it.
    """

    def __init__(self, model: nn.Module, originals: Originals, buffers: Buffers):
        self.originals, self.buffers = originals, buffers
        self.keys: dict[tuple[int, str], tuple[str, str]] = {}
        self.brought: dict[tuple[str, str], Tensor] = {}
        mine = {}
        for path, param in originals:
            own = _owner(model, path)._parameters.get(param)
            if own is not None:                      # else a provider holds it in another form
                mine[id(own)] = path, param
        for name, b in buffers.live():
            path, _, leaf = name.rpartition(".")
            mine[id(b)] = path, leaf
        for module in model.modules():
            both = {**module._parameters, **module._buffers}
            for name, p in both.items():             # every end of a tied tensor
                if id(p) in mine:
                    self.keys[id(module), name] = mine[id(p)]
                    expose(module, name)

    def __call__(self, module: nn.Module, name: str) -> Tensor | None:
        key = self.keys.get((id(module), name))
        if key is None:
            return None
        value = self.brought.get(key)
        if value is None:
            if key in self.originals:
                own = module._parameters[name]
                value = nn.Parameter(self.originals.get(*key).to(own.device, own.dtype),
                                     requires_grad=False)
            else:                                    # a forward may move it: it is a copy
                b = module._buffers[name]
                value = self.buffers.starts.get(*key).to(b.device, b.dtype, copy=True)
            self.brought[key] = value
        return value


def _owner(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:                           # it was replaced since
        return nn.Module()
