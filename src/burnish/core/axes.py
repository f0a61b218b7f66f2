"""The twelve questions. Read this file first: it is the architecture.

A training step touches five things: the weights, the states between modules, the tape that
backward keeps, the update and the loss. Every fine-tuning method answers one or more of twelve
questions about them; a recipe ``a + b`` collects the answers and combines them by the law of
each axis. A method's axes are read off the answers it gives (the methods of
:class:`burnish.core.method.Method` that it overrides), never declared twice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One question, with one law for several answers at once."""

    name: str
    question: str
    returns: str
    law: str
    refused: str


AXES: dict[str, Axis] = {
    a.name: a
    for a in (
        Axis("storage", "in what form is the frozen weight held?", "a provider",
             "providers nest", "two grids for one weight"),
        Axis("delta", "what is added to this weight?", "a term, or a function of W",
             "terms add; one function of W wraps them", "two functions of one W"),
        Axis("select", "which existing entries may change?", "selections",
             "union", "frozen by one, needed by another"),
        Axis("branch", "what is added to this hidden state?", "modules at sites",
             "written order; parallel ones add", "two that replace at one site"),
        Axis("prompt", "what extra tokens, keys or pixels?", "a bank",
             "concatenate, positions kept", "two that replace the same rows"),
        Axis("side", "what reads the taps?", "a module on the tap bus",
             "heads mix", "two ladders over one backbone"),
        Axis("activations", "what is kept for backward?", "a block's mode or a saving policy",
             "first match per site or block", "two modes on one block"),
        Axis("optimizer", "how does a gradient become a step?", "a rule, or a wrapper of rules",
             "wrappers nest; one innermost rule", "two innermost rules"),
        Axis("controller", "what changes between steps, and when?", "handlers by event",
             "phases sort, then written order", "one resource, one phase, twice"),
        Axis("objective", "what is minimised besides the task?", "a scalar term",
             "terms add", "-"),
        Axis("mixture", "how are several answers weighed?", "a gate around answers",
             "wraps what it names", "two gates on one place"),
        Axis("lifecycle", "what happens before, between or after training?",
             "stages of a run; functions on checkpoints", "written order",
             "two divisions of one run"),
    )
}
