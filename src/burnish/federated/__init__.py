"""Clients that keep their rows, and a server that makes one thing of what they trained.

    from burnish import federated

    clients = [federated.Client(f"ward {i}", rows[part]) for i, part in enumerate(parts)]
    done = federated.federate(model, clients, "lora(rank=8)", rule="stack", rounds=3)
"""

from __future__ import annotations

from .attack import auc, membership
from .choose import fitted, importance
from .client import Client, Member, Report, Training
from .message import pack, unpack
from .rounds import Federation, Round, Server, federate
from .rules import Mean, Rule, Stack
from .split import dirichlet, even

__all__ = ["Client", "Federation", "Mean", "Member", "Report", "Round", "Rule", "Server", "Stack",
           "Training", "auc", "dirichlet", "even", "federate", "fitted",
           "importance", "membership", "pack", "unpack"]
