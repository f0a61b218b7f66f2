"""What the base answers while the recipe is off: the values of trained tensors before training."""

from __future__ import annotations

from torch import Tensor, nn

from .originals import Originals
from .swap import expose


class Base:
    """``base(module, name)``: the original of a tensor that trains, None for any other.

    Nothing in the model is touched but the class of the modules that own such tensors, so that
    they ask (see swap.py). An original is brought when it is first asked for and held as long as
    anybody needs it.
    """

    def __init__(self, model: nn.Module, originals: Originals):
        self.originals = originals
        self.keys: dict[tuple[int, str], tuple[str, str]] = {}
        self.brought: dict[tuple[str, str], Tensor] = {}
        mine = {}
        for path, param in originals:
            try:
                mine[id(model.get_parameter(f"{path}.{param}" if path else param))] = path, param
            except AttributeError:
                continue                             # held by a provider in another form
        for module in model.modules():
            for name, p in module._parameters.items():       # every end of a tied tensor
                if id(p) in mine:
                    self.keys[id(module), name] = mine[id(p)]
                    expose(module, name)

    def __call__(self, module: nn.Module, name: str) -> Tensor | None:
        key = self.keys.get((id(module), name))
        if key is None:
            return None
        value = self.brought.get(key)
        if value is None:
            own = module._parameters[name]
            value = nn.Parameter(self.originals.get(*key).to(own.device), requires_grad=False)
            self.brought[key] = value
        return value
