from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.graph_prompts import Ensemble, Graphs, Learner, Prompted, parts
from ...blocks.update.adapting import asking
from ...core.batches import taken
from ...core.draw import drawn
from ...core.errors import ConfigError, DataError
from ...core.method import Method, setting
from ._adapted import anatomy_of, class_logits, labels_of, module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Relief(Method):
    """RELIEF: actors learn which nodes of a graph get a prompt, and what it is, for a network that
    stays as it is.

        v ~ softmax over nodes of f(S_t),  a ~ N(z_max tanh(g(S_t[v])), 1),  P[v] <- P[v] + a
        r_t = L_t - L_{t+1}

    P (N, width) is added to what embeds the nodes, S_t are the states that the network makes of it,
    L_t the loss of the graph; a graph has as many steps as nodes. Both are learnt by proximal
    policy optimisation (``blocks/update/ppo.py``; rewards over the running deviation of their
    discounted sum) with `members` pairs of actors, each on its share of the graphs and `overlap` of
    another, held to what they say together (``blocks/state/graph_prompts.py``). In every pass the
    members learn, then the head on graphs as the ensemble prompts them::

        prompted = burnish.parse("relief(epochs=50)")[0].lifecycle(model, batches)
        prompted(batch).logits

    Batches are of padded graphs with `labels`: `nodes` (B, N, features) of which rows of zeros are
    padding, or `mask` (B, N) beside them. The answer takes a node by the members' largest
    probabilities, made to sum to 1 (drawn, from `seed`), and the mean of their means, no noise.

    Start: P = 0 is the pre-trained function, and the first policy a uniform one of contents near 0.
    Trains the actors, a critic of the widest graph's N D numbers, the head; nothing of the network
    moves, and no backward enters it. N + 1 forwards an answer. Not mergeable.

    Departures: in the precision of the states (32 bits at least) where the authors compute in 64;
    which rows the members share, and how the learning of policy and head take turns within a pass,
    are best readings.
    """

    paper: ClassVar[str] = ("RELIEF: Reinforcement Learning Empowered Graph Feature Prompt Tuning "
                            "(2024)")
    tier: ClassVar[str] = "checked against an independent equation"

    members: int = setting(3, "pairs of actors")
    overlap: float = setting(0.2, "of a share of the graphs that the next member sees too")
    z_max: float = setting(1.0, "largest mean of what is added; published: 0.1 to 1")
    alpha_d: float = setting(1.0, "how strongly members agree on nodes; published: 1 to 1e5")
    alpha_c: float = setting(0.1, "how strongly they agree on contents")
    updates: int = setting(10, "passes over episodes, at most")
    minibatch: int = setting(64, "steps of episodes in an update")
    policy_rate: float = setting(5e-4, "of the policy")
    head_rate: float = setting(1e-3, "of the head")
    epochs: int = setting(50, "passes over the data")
    draws: bool = setting(True, "the answer draws nodes; False: takes the likeliest")
    embed: str | None = setting(None, "path of what embeds nodes; None: the one linear or table "
                                      "before the blocks")
    state_of: str | None = setting(None, "path of what returns the states; None: the last norm")
    seed: int = setting(0, "of all that is drawn")

    def __post_init__(self) -> None:
        untargeted(self, "nothing of the network trains")
        if min(self.members, self.updates, self.minibatch, self.epochs) < 1 or \
                min(self.policy_rate, self.head_rate, self.z_max) <= 0 or \
                not 0 <= self.overlap <= 1 or min(self.alpha_d, self.alpha_c) < 0:
            raise ConfigError("relief: members, updates, minibatch and epochs of at least 1, rates "
                              "and z_max above 0, alphas of at least 0 and an overlap from 0 to 1 "
                              "are expected")
        if self.members == 1 and (given := {"overlap", "alpha_d", "alpha_c"} & set(self.changed())):
            raise ConfigError(f"relief: {', '.join(sorted(given))} does nothing with one member")

    def lifecycle(self, tuned: Any, batches: Sequence[Mapping[str, Any]],
                  loss: Callable[[Any, Any], Tensor] | None = None) -> Prompted:
        """Learn of labelled batches; the head of the model is trained in place.

        loss(outputs, batch): (B,), a loss for each graph; None: cross entropy of `labels`.
        """
        model, head, graphs = module_of(tuned), *self._found(tuned, loss or _cross_entropy)
        if not batches:
            raise DataError("relief learns of labelled graphs, and there is no batch of them")
        most = max(graphs.there(b).shape[1] for b in batches)
        with drawn(self.seed), asking(model, head), torch.enable_grad():
            with torch.no_grad():
                S, _, given = graphs.run(batches[0], None)
            policy = Ensemble(self.members, S.shape[-1], given.shape[-1], most, self.z_max).to(S)
            learner = Learner(policy, self.policy_rate, self.updates, self.minibatch, self.alpha_d,
                              self.alpha_c)
            rule, losses = torch.optim.Adam(head, self.head_rate), []
            every = [(b, r) for b, batch in enumerate(batches)
                     for r in range(len(graphs.there(batch)))]
            order = [every[i] for i in torch.randperm(len(every)).tolist()]
            shares = list(parts(order, self.members, self.overlap))
            for _ in range(self.epochs):
                for i, mine in enumerate(shares):
                    for b, batch in enumerate(batches):
                        if rows := sorted({r for at, r in mine if at == b}):
                            some = taken(batch, rows)
                            learner.play(i, graphs, some)
                losses.append(self._head(graphs, policy, batches, rule, head))
        return Prompted(graphs, policy.requires_grad_(False), self.draws, self.seed, tuple(losses))

    def _head(self, graphs: Graphs, policy: Ensemble, batches: Sequence[Any], rule: Any,
              head: list[nn.Parameter]) -> float:
        """One pass of the head; the mean loss of a batch."""
        total = 0.0
        for batch in batches:
            prompt = graphs.prompts(policy, batch, self.draws)
            value = graphs.loss(graphs.run(batch, prompt)[1], batch).mean()
            for p, g in zip(head, torch.autograd.grad(value, head), strict=True):
                p.grad = g
            rule.step()
            for p in head:
                p.grad = None
            total += float(value.detach())
        return total / len(batches)

    def _found(self, tuned: Any, loss: Callable[[Any, Any], Tensor]
               ) -> tuple[list[nn.Parameter], Graphs]:
        anatomy, model = anatomy_of(tuned), module_of(tuned)
        before = [p.path for p in anatomy.places if p.block is None and not anatomy.in_head(p)]
        embed = self.embed or (before[0] if len(before) == 1 else None)
        states = self.state_of or anatomy.final_norm or \
            (anatomy.blocks[-1].path if anatomy.blocks else None)
        head = [p for h in anatomy.head for p in model.get_submodule(h).parameters()]
        if embed is None or states is None or not head:
            raise ConfigError("relief: this model does not tell what embeds its nodes, what "
                              "returns their states, or its head; give embed='path' and "
                              "state_of='path' of a model with a head")
        try:
            return head, Graphs(model, model.get_submodule(embed), model.get_submodule(states),
                                loss)
        except AttributeError:
            raise ConfigError(f"relief(embed={embed!r}, state_of={states!r}): the model has no "
                              "module of one of these paths") from None


def _cross_entropy(outputs: Any, batch: Any) -> Tensor:
    labels, _ = labels_of("relief", batch)
    return F.cross_entropy(class_logits(outputs, "relief"), labels, reduction="none")
