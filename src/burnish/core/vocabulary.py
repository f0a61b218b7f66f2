"""Names that settings of several methods share, and what each means wherever it stands.

A setting takes the name its idea has here; spellings of papers and of other libraries are aliases
of it (``setting(..., alias=(...))``). A name for an idea of one method alone needs no line: its own
doc says what it means. The words are for people who read two recipes side by side.
"""

from __future__ import annotations

VOCABULARY: dict[str, str] = {
    # sizes
    "rank": "of an update, or of the subspace it stays in",
    "init_rank": "rank before a budget has moved it",
    "rho": "how far a rank may be from the mean one, as a factor",
    "grow": "components a matrix gains at a time",
    "bottleneck": "width of a bottleneck",
    "reduction": "a width over the narrow one",
    "hidden": "width of an MLP that makes what trains",
    "code": "width of what adapters are generated from",
    "embedding": "width of the vector that stands for a task, a condition or a place",
    "block": "channels that belong together",
    "length": "tokens or rows of a prompt",
    "layers": "blocks, by number or how many",
    "k": "answers a router takes per token",
    "units": "what is taken out together",
    # factors
    "alpha": "how much a part counts: numerator of a scale, strength of a pull",
    "scale": "a factor of what a part adds",
    "scaling": "law by which a scale follows the rank",
    "weight": "factor of a term of the loss",
    "gamma": "divides the size of a start",
    "ortho": "weight of an orthogonality term",
    "balance": "weight of a balance loss",
    "dropout": "probability of a zero in training",
    "temperature": "of a softmax",
    # shares and schedules
    "s": "share of zeros",
    "density": "share that trains",
    "budget": "what may be spent: a share of the work, or parameters",
    "ratio": "share that is taken out",
    "every": "period: updates between two events, or every n-th block",
    "warmup": "training before a schedule starts, a share of the run or updates",
    "search": "share of the run in which what trains is still looked for",
    "cooldown": "share of the run after a schedule has arrived",
    "decay": "of a smoothed score",
    "samples": "read before training",
    "tolerance": "when something counts as converged",
    # the update rule
    "betas": "decays of the moments",
    "beta": "a second strength beside alpha",
    "b_rate": "learning rate of B over that of the other factors",
    "train_a": "False freezes A",
    "momentum": "of plain descent",
    "eps": "a small number of the update rule: what keeps a root from zero, the radius of a probe",
    "weight_decay": "of the weights, by the rule that steps",
    "clip": "largest mean square of an update",
    "limit": "largest growth from one update to the next",
    "state": "form the optimizer's state is kept in",
    "proj_type": "side of a projection",
    "in_backward": "step while backward runs",
    # how
    "act": "activation inside a branch",
    "form": "how a tensor is taken apart",
    "init": "start of what trains",
    "ids": "tokens of the vocabulary that the start is read from",
    "iterations": "of an approximate decomposition",
    "mask": "how entries are chosen",
    "mode": "one of two ways of working",
    "norm": "which norm a term takes",
    "on": "False leaves the part out, to compare",
    "seed": "of what is drawn",
    "share": "one tensor for all",
    "threshold": "size below which nothing is done",
    "tucker": "kernels of a convolution by a core of their own",
}
