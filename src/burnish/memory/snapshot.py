"""Everything a step changes, kept and put back: what a measurement leaves as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch


class Snapshot:
    """Everything a step changes, kept and put back."""

    def __init__(self, tuned: Any):
        self.tuned = tuned

    def __enter__(self) -> None:
        tuned, model = self.tuned, self.tuned.model
        opt = tuned.current_optimizer
        held = {id(p) for g in opt.param_groups for p in g["params"]} if opt is not None else set()
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self.tensors = [(b, buffers[n]) for n, b in model.named_buffers()]
        self.named = {n: p.detach().clone() for n, p in model.named_parameters()
                      if p.requires_grad or id(p) in held or ".burnish." in f".{n}."}
        self.tensors += [(p, self.named[n]) for n, p in model.named_parameters() if n in self.named]
        self.named |= buffers
        self.optimizer, self.timeline = opt, tuned.steps._timeline
        self.state = copy.deepcopy(opt.state_dict()) if opt is not None else None
        self.events = copy.deepcopy(self.timeline.state()) if self.timeline else None
        self.rng = torch.get_rng_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def __exit__(self, *exc: Any) -> None:
        from ..engine.resize import follow

        tuned = self.tuned
        follow(tuned, self.named)                    # ranks that changed meanwhile
        for p, flag in self.flags:
            p.requires_grad_(flag)
            p.grad = None
        with torch.no_grad():
            for t, value in self.tensors:
                t.copy_(value)
        tuned.steps.optimizer, tuned.steps._timeline = self.optimizer, self.timeline
        if self.state is not None:
            self.optimizer.load_state_dict(self.state)
        if self.events is not None:
            tuned.steps._timeline.load(self.events)
        torch.set_rng_state(self.rng[0])
        random.setstate(self.rng[1])
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
