from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...blocks.update.absorbed import Absorber
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.outputs import next_token
from ...core.targets import match


@dataclass(frozen=True, kw_only=True)
class StreamAdapter(Method):
    """StreamAdapter: a context becomes a change of weights in one forward, without a gradient.

        U_j = softmax(Q K_j^T / sqrt(d_k)) V_j          of `fold` tokens' keys and values, a layer
        S_j = sigmoid(U_j w_g) * S_{j-1} + U_j          (rank, d_v), S_0 = 0
        W' = W + P_out S^T P_in                         P_out (out, d_v), P_in (rank, in)

    K_j (fold, d_k), V_j (fold, d_v) of all heads, as the frozen model leaves them in its cache.
    Then the cache is dropped: a query costs the same however long the context was. Q, w_g and the
    P's learn by next-token loss on queries whose contexts were absorbed::

        absorber = burnish.parse("streamadapter")[0].lifecycle(model)
        absorber.learn(lessons, rate=1e-4)          # (context ids (1, T), query with labels) each
        context = absorber.absorb(ids)              # more: absorber.absorb(ids, after=context)
        with absorber.edit(context).standing(): model(**query)       # or .merge(), for good

    Start: P_out = 0, whatever the context is the base; so is no context. Trains, a layer,
    ``rank d_k + d_v`` and ``d_v out + rank in`` a matrix. Kept: keys and values of the context,
    rows of x P_in. Merges exactly, by context; the rank of a change is at most `rank`.

    Contexts cut at multiples of `fold`, read in order, give the state of the whole. `targets`:
    linears inside layers, default q and v. When: many demonstrations, and queries that all read
    them. When not: an answer that needs a context word for word. Needs a causal language model of
    transformers. Unconfirmed: all of the form above, gate, shapes, targets, and the learning rate.
    """

    paper: ClassVar[str] = ("StreamAdapter: Efficient Test Time Adaptation from Contextual Streams "
                            "(2024), arXiv:2411.09289")
    tier: ClassVar[str] = "from the text"

    rank: int = setting(16, "rows of Q, the largest rank of a change")
    fold: int = setting(128, "tokens that are folded at once")
    seed: int = setting(0, "of Q and P_in")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.fold < 1:
            raise ConfigError(f"streamadapter: rank and fold of at least 1 are expected, got "
                              f"{self.rank} and {self.fold}")

    def lifecycle(self, model: nn.Module) -> Absorber:
        """What folds contexts of a plain causal language model, before it has learnt."""
        if not isinstance(model, nn.Module):
            raise ConfigError("streamadapter takes a plain model; merge what was tuned first")
        if not next_token(model):
            raise ConfigError("streamadapter folds keys and values of a causal language model, and "
                              f"a {type(model).__name__} is none")
        anatomy = Anatomy.of(model)
        places = match(anatomy, "q,v" if self.targets is None else self.targets)
        for p in places:
            if p.kind not in ("linear", "conv1d") or p.rows or p.experts:
                raise ConfigError(f"streamadapter changes whole linears, and {p.name} is none "
                                  f"({p.kind}): name others by targets")
        return Absorber("streamadapter", model, places, self.rank, self.fold, self.seed)
