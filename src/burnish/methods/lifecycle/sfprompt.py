from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.parted import Send, Traffic, averaged, crossing, el2n, left_out
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ..objective.distill import logits_of

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Report:
    """One client's part of a round: what it trained, its samples, those it kept, its traffic."""

    state: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    kept: int = 0
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True, kw_only=True)
class Sfprompt(Method):
    """SFPrompt: clients hold a model's first and last blocks and a prompt, a server the middle.

        head W_h (client, frozen) | body W_b (server, frozen) | tail W_t (client), prompt p (client)

    A round, for each client from the server's p and W_t: (1) `local_updates` passes over its data
    with the body left out, ``W_t(W_h([p; x]))``, without any traffic; (2) the share `pruned` of
    least ``||softmax(f(x)) - y||`` by that short model is left out; (3) one pass over the rest
    through the whole model: states cross two borders, gradients come back over them; (4) p and
    W_t become the mean of the clients', weighed by their samples. Through `tuned.step`::

        tuned = burnish.tune(model, "vpt(length=4)", head=True)
        method = burnish.parse("sfprompt(client_blocks=1)")[0]
        for _ in range(100):
            reports = method.lifecycle(tuned, some(clients, 5), lr=1e-2)    # a round

    clients: for each a list of batches with ``labels``; one without any has no part in the round.
    `split` and `bypass` are its passes by themselves: ``with method.split(tuned, send) as traffic:
    tuned.step(batch)``. `send` is what stands between client and server, both ways (a cast, a code,
    noise; as it is by default).

    What trains is the recipe's: a prompt before the first block (tokens carried through, as `vpt`
    shallow), a head, parts in the client's blocks; a part in the body is refused. Traffic of a
    pass: 4 (kept) (tokens + length) width numbers. Here all parts run in one process, which shows
    what a federation computes and sends, not what a client saves. Labels stay with the client, but
    states tell of its data: add noise in `send` where that matters.

    (unconfirmed: numbers of blocks, local passes and the share; no code is public.)
    """

    paper: ClassVar[str] = ("SFPrompt: Communication-Efficient Split Federated Fine-Tuning for "
                            "Large Pre-Trained Models over Resource-Limited Devices (2024), "
                            "arXiv:2407.17533")
    tier: ClassVar[str] = "from the text"

    client_blocks: int = setting(1, "blocks that a client holds at either end")
    local_updates: int = setting(10, "passes over its data with the body left out")
    pruned: float = setting(0.4, "share of a client's samples that sends nothing")

    def __post_init__(self) -> None:
        if self.client_blocks < 1 or self.local_updates < 0 or not 0 <= self.pruned < 1:
            raise ConfigError("sfprompt: client_blocks of at least 1, local_updates of at least 0 "
                              "and pruned from 0 and below 1 are expected, got "
                              f"{self.client_blocks}, {self.local_updates} and {self.pruned:g}")

    def parts(self, tuned: Any) -> tuple[nn.Module, list[nn.Module]]:
        """(the last block of the head, the blocks of the body)."""
        stacks, n = list(tuned.anatomy.stacks().values()), self.client_blocks
        if len(stacks) != 1 or len(stacks[0]) <= 2 * n:
            raise ConfigError(f"sfprompt: one stack of more than {2 * n} blocks is expected, for "
                              f"{n} at either end and a body; {type(tuned.model).__name__} has "
                              f"{', '.join(str(len(s)) for s in stacks) or 'none'}")
        body = [b.path for b in stacks[0][n:-n]]
        inside = [name for name, _ in tuned.named_parameters()
                  if any(name.startswith(f"{p}.") for p in body)]
        if inside:
            raise ConfigError(f"sfprompt: {inside[0]} trains in the body, which the server holds "
                              "frozen; give the recipe targets in the first or the last blocks")
        model = tuned.model
        return model.get_submodule(stacks[0][n - 1].path), [model.get_submodule(p) for p in body]

    @contextmanager
    def split(self, tuned: Any, send: Send = lambda t: t) -> Iterator[Traffic]:
        """Inside, what goes to the body and comes from it is sent, and counted."""
        head, body = self.parts(tuned)
        with crossing(head, body[-1], send) as traffic:
            yield traffic

    @contextmanager
    def bypass(self, tuned: Any) -> Iterator[None]:
        """Inside, the model is head and tail alone."""
        with left_out(*self.parts(tuned)):
            yield

    @torch.no_grad()
    def kept(self, tuned: Any, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Indices of the samples of each batch that stay, by the short model: of all of them the
        ``n - floor(pruned n)`` that it is furthest off on."""
        with self.bypass(tuned), evaluating([m for m in tuned.model.modules() if m.training]):
            off = [el2n(logits_of(tuned.model(**b), "sfprompt"), b["labels"]) for b in batches]
        every = torch.cat(off)
        out = every.argsort(stable=True)[:int(self.pruned * len(every) + 1e-9)]
        stays = torch.ones(len(every), dtype=torch.bool, device=every.device)
        stays[out] = False
        return [s.nonzero().flatten() for s in stays.split([len(o) for o in off])]

    def client(self, tuned: Any, batches: Sequence[Mapping[str, Any]], loss: Loss | None = None,
               send: Send = lambda t: t, **optimizer: Any) -> Report:
        """One client's round, from what stands in the model; one without batches does nothing."""
        if not batches:
            return Report()
        tuned.optimizer(**optimizer)
        with self.bypass(tuned):
            for batch in (b for _ in range(self.local_updates) for b in batches):
                tuned.step(batch, loss)
        found = self.kept(tuned, batches)
        with self.split(tuned, send) as traffic:
            for batch, index in zip(batches, found, strict=True):
                n = len(batch["labels"])
                if len(index):
                    tuned.step({k: v[index] if isinstance(v, Tensor) and v.dim() and len(v) == n
                                else v for k, v in batch.items()}, loss)
        return Report({n: p.detach().clone() for n, p in tuned.named_parameters()},
                      sum(len(b["labels"]) for b in batches), sum(map(len, found)), traffic)

    def lifecycle(self, tuned: Any, clients: Sequence[Sequence[Mapping[str, Any]]],
                  loss: Loss | None = None, send: Send = lambda t: t, **optimizer: Any
                  ) -> list[Report]:
        """A round of these clients; what trains is their mean afterwards. optimizer: words for
        ``tuned.optimizer``, made anew for each client; no client's is left afterwards, and one
        that was made before is of no more use, as whenever another is made."""
        params = dict(tuned.named_parameters())
        start = {n: p.detach().clone() for n, p in params.items()}
        reports, before = list[Report](), tuned.current_optimizer
        try:
            for batches in clients:
                self._put(params, start)
                reports.append(self.client(tuned, batches, loss, send, **optimizer))
        except BaseException:
            self._put(params, start)
            raise
        finally:
            if tuned.current_optimizer is not before:
                tuned.steps.let_go()                 # a client's moments are no server's
        some = [r for r in reports if r.samples]
        self._put(params, averaged([r.state for r in some], [r.samples for r in some])
                  if some else start)
        return reports

    @torch.no_grad()
    def _put(self, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            params[name].copy_(value)
