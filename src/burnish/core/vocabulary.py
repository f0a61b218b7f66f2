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
    "cache": "folder where a frozen backbone's states wait from epoch to epoch",
    "cache_gb": "most that folder holds, in 10^9 bytes",
    "hidden": "width of an MLP that makes what trains",
    "code": "width of what adapters are generated from",
    "embedding": "width of the vector that stands for a task, a condition or a place",
    "block": "channels that belong together",
    "dimension": "how many numbers the matrices that share them are made of",
    "length": "tokens or rows of a prompt",
    "layers": "blocks, by number or how many",
    "layer": "one block, from 0",
    "k": "answers a router takes per token",
    "kernel": "tokens that a convolution sees",
    "units": "what is taken out together",
    "neighbours": "the nearest others that have a say",
    "bits": "of a value that is held as a code",
    "group": "values that share a scale",
    "experts": "parts of which a few answer at a time",
    "features": "random ones that stand for a kernel",
    "entries": "single weights that train, of a row or of a matrix",
    # factors
    "alpha": "how much a part counts: numerator of a scale, strength of a pull",
    "scale": "a factor of what a part adds",
    "scaling": "law by which a scale follows the rank",
    "weight": "factor of a term of the loss",
    "gamma": "divides the size of a start",
    "ortho": "weight of an orthogonality term",
    "balance": "weight of a balance loss",
    "dropout": "probability of a zero in training",
    "rank_dropout": "probability that an output gets no update in training",
    "module_dropout": "probability that a matrix gets no update in training",
    "block_dropout": "share of the blocks that do not act in training",
    "drop_path": "probability that a sample does without a part in training",
    "temperature": "of a softmax",
    # shares and schedules
    "s": "share of zeros",
    "density": "share that trains, or of a change that stays",
    "budget": "what may be spent: a share of the work, or parameters",
    "ratio": "share that is taken out",
    "order": "what comes first",
    "ranking": "what a score is compared with",
    "every": "period: updates between two events, or every n-th block",
    "warmup": "training before a schedule starts, a share of the run or updates",
    "search": "share of the run in which what trains is still looked for",
    "cooldown": "share of the run after a schedule has arrived",
    "decay": "of a smoothed score",
    "samples": "read before training",
    "buffer": "samples of earlier steps that are remembered",
    "tolerance": "when something counts as converged",
    "steps": "how often a part does what it does",
    "drop": "share of a figure that may be lost",
    # the update rule
    "rule": "what is made of a gradient or of its estimate",
    "betas": "decays of the moments",
    "beta": "a second strength beside alpha",
    "b_rate": "learning rate of B over that of the other factors",
    "gate_rate": "learning rate of gates over that of what they let through",
    "train_a": "False freezes A",
    "momentum": "of plain descent",
    "eps": "a small number of the update rule: what keeps a root from zero, the radius of a probe",
    "weight_decay": "of the weights, by the rule that steps",
    "updates": "steps of an optimizer of their own, on one sample or batch",
    "queries": "directions in which the loss is probed, averaged per update",
    "clip": "largest mean square of an update",
    "limit": "largest growth from one update to the next",
    "state": "form the optimizer's state is kept in",
    "proj_type": "side of a projection",
    "in_backward": "step while backward runs",
    "epsilon": "how much may be told of one sample",
    # how
    "act": "activation inside a branch",
    "form": "how a tensor is taken apart",
    "init": "start of what trains",
    "start": "bound of a uniform start",
    "std": "standard deviation of a start",
    "ids": "tokens of the vocabulary that the start is read from",
    "iterations": "of an approximate decomposition",
    "kept": "leading directions of a weight that stay as they are",
    "bound": "largest norm of a skew matrix",
    "mask": "how entries are chosen",
    "mode": "one of two ways of working",
    "norm": "which norm a term takes",
    "on": "False leaves the part out, to compare",
    "seed": "of what is drawn",
    "coupled": "rows of both towers come of the same",
    "rest": "what else of the model trains beside what is named",
    "share": "one tensor for all",
    "threshold": "size below which nothing is done",
    "stored": "what training leaves, as a file that answers holds it",
    "tucker": "kernels of a convolution by a core of their own",
}

#: names that mean a probability wherever they stand
PROBABILITIES = frozenset(n for n, words in VOCABULARY.items() if words.startswith("probability"))
#: names whose sign is free: a factor of an update that trains turns its start, of one that has
#: trained takes it back; a seed is no number of things
SIGNED = frozenset({"alpha", "scale", "seed"})
#: names of the share that a smoothed value keeps of what it was
DECAYS = frozenset({"betas", "beta1", "momentum"})
