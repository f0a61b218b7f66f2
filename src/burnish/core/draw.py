"""Random numbers of one's own: inside `drawn(seed)`, this thread draws from its own generators.

A global seed is everybody's: another thread that draws at the same time changes what both get, and
putting the state back takes its numbers away. Here every function that draws is given a generator
of this context instead, so equal seeds give equal numbers whatever else runs. They are the
numbers ``torch.manual_seed(seed)`` would have given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: make a tensor on a device
_MAKERS = frozenset({"rand", "randn", "randint", "randperm", "normal"})
#: fill, or draw from, the tensor they are given first
_FILLERS = frozenset({"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_",
                      "log_normal_", "geometric_", "kaiming_uniform_", "bernoulli", "multinomial",
                      "poisson"})
_LIKE = {"rand_like": Tensor.uniform_, "randn_like": Tensor.normal_}


class drawn(TorchFunctionMode):
    """``with drawn(seed):`` functions that draw do so from generators of this context.

    One generator per device, each seeded with `seed`. Tensors without values (meta) draw nothing.
    Dropout and its like, which take no generator, go on drawing from the global one.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: Any) -> torch.Generator | None:
        """This context's generator for a device; None where nothing is drawn."""
        device = torch.device(device)
        if device.type == "meta":
            return None
        if device.index is None and device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if name in _LIKE:
            like = {k: v for k, v in kwargs.items() if k not in ("requires_grad", "generator")}
            made = torch.empty_like(*args, **like)
            _LIKE[name](made, generator=self.generator(made.device))
            return made.requires_grad_(kwargs.get("requires_grad", False))
        if name in _FILLERS:
            first: Any = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
            kwargs = kwargs | {"generator": self.generator(first.device)}
        elif name in _MAKERS:
            given = next((a for a in args if isinstance(a, Tensor)), None)
            device = given.device if given is not None else \
                kwargs.get("device") or torch.get_default_device()
            kwargs = kwargs | {"generator": self.generator(device)}
        return func(*args, **kwargs)


@contextmanager
def random_kept() -> Iterator[None]:
    """Inside, numbers are drawn as ever; afterwards everybody's generators (Python's, numpy's,
    torch's on the host and on the accelerator) stand where they stood."""
    import numpy as np

    python, array, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    beside: Any = torch.get_device_module(device) if device is not None else None
    if beside is not None and not getattr(beside, "is_initialized", lambda: True)():
        beside = None                                # asking would wake it
    every = hasattr(beside, "get_rng_state_all")
    states = None if beside is None else \
        beside.get_rng_state_all() if every else beside.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(host)
        if states is not None:
            (beside.set_rng_state_all if every else beside.set_rng_state)(states)
