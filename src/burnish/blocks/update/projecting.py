"""The step of one projected matrix, for :class:`~burnish.blocks.update.composed.Composed`.

    refresh basis every T -> R = down(G) -> direction on R, in place -> W += back(R), panel by panel
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .noise import CounterNoise
from .residual import Seen as Beside
from .rules import Rows, accumulator
from .subspace import Basis, in_memory_order, matrix, panels, rotate
from .sweep import Bunch, State, moved, state_parts

if TYPE_CHECKING:
    from .codecs import Codec
    from .numerics import Numerics
    from .plan import Plan


class Projecting:
    """What an optimizer does with a tensor that its plan's subspace covers."""

    plan: Plan
    seed: int
    state: dict[Any, State]
    _numerics: Numerics
    _where: dict[nn.Parameter, tuple[dict[str, Any], str]]
    _covered: dict[nn.Parameter, bool]

    if TYPE_CHECKING:
        def _codec(self, p: nn.Parameter, n: int) -> Codec: ...
        def _allocate(self, state: State, codec: Codec, n: int, device: torch.device,
                      shape: tuple[int, ...]) -> None: ...
        def _slice(self, device: torch.device) -> int: ...
        def _slices(self, n: int, device: torch.device) -> Any: ...

    def _projected(self, p: nn.Parameter) -> bool:
        if self.plan.subspace is None:
            return False
        if (known := self._covered.get(p)) is None:
            known = self._covered[p] = self.plan.subspace.covers(self._where[p][1], p)
        return known

    def _basis(self, p: nn.Parameter, G: Tensor) -> Basis:
        """The current basis, refreshed first if its time has come."""
        sub, state = self.plan.subspace, self.state[p]
        name, done = self._where[p][1], state.get("step", 0)
        noise = CounterNoise(self.seed, f"{name}/subspace")
        turn, due = done // sub.every, done % sub.every == 0
        dtype = p.dtype if p.dtype.is_floating_point else torch.float32
        if sub.rota is not None:
            if due and "folded" not in state:
                self._dismiss(turn)
            return Basis(None, None, None, G.shape[1], accumulator(p.dtype),
                         live=name in sub.rota.live(turn, self.seed))
        if not sub.map.stores():
            basis = sub.map.basis(G, noise, turn, dtype)
            if due and done and "folded" not in state:
                self._move_moments(p, sub.map.basis(G, noise, turn - 1, dtype), basis)
            return basis
        old = None
        if stored := state_parts(state, "projector"):
            old = Basis(stored.get("left"), stored.get("right"), stored.get("columns"),
                        G.shape[1], accumulator(p.dtype), rows=stored.get("rows"))
            if not due or "folded" in state:
                return old
        basis = sub.map.basis(G, noise, turn, dtype, old)
        state.update({f"projector.{k}": v for k, v in basis.tensors().items()})
        if old is not None:
            self._move_moments(p, old, basis)
        return basis

    def _dismiss(self, turn: int) -> None:
        """Free all moments of the turn before, ahead of any of this one's."""
        sub = self.plan.subspace
        for q in self._where:
            state = self.state.get(q)
            if state and state.get("step") == turn * sub.every and self._projected(q):
                for key in [k for k in state if k.split(".")[0] in self.plan.rule.states]:
                    del state[key]

    def _move_moments(self, p: nn.Parameter, old: Basis, new: Basis) -> None:
        how, state = self.plan.subspace.at_refresh, self.state[p]
        if how == "keep":
            return
        m, n = matrix(p).shape
        shape = self.plan.subspace.map.shape(m, n)
        codec, name = self._codec(p, shape[0] * shape[1]), self._where[p][1]
        for s, signed in self.plan.rule.states.items():
            if parts := state_parts(state, s):
                M = codec.read(parts, 0, shape[0] * shape[1]).view(shape)
                M = rotate(M, old, new, not signed) if how == "rotate" else torch.zeros_like(M)
                codec.write(parts, 0, M.numel(), M.reshape(-1),
                            CounterNoise(self.seed, f"{name}/{s}/refresh"), state["step"])

    def _fold(self, p: nn.Parameter, grad: Tensor) -> None:
        G = in_memory_order(grad, like=p)[0]
        G = G.reshape(G.shape[0], -1)
        R = self._basis(p, G).down(G)
        state = self.state[p]
        state["folded"] = R if "folded" not in state else state["folded"].add_(R)

    def _project_step(self, p: nn.Parameter, grad: Tensor | None) -> None:
        (group, name), state, sub = self._where[p], self.state[p], self.plan.subspace
        W = matrix(p.detach())
        m, n = W.shape
        if grad is None:
            G, R = None, state["folded"]
            basis = self._basis(p, W)                # the stored one: no refresh while folded
            del state["folded"]
        else:
            G = in_memory_order(grad, like=p)[0].reshape(m, n)
            basis = self._basis(p, G)
            R = basis.down(G)
        state["step"] = t = state.get("step", 0) + 1
        since = (t - 1) % sub.every + 1 if sub.at_refresh == "restart" else t
        if sub.image is not None:
            R = sub.image.apply(R, state, t, (t - 1) % sub.every + 1)
        self._numerics.prepare(W.view(-1), state)
        axis = 0 if basis.left is not None else 1    # the rank dimension of R
        beside = sub.beside if G is not None else None
        norms = torch.linalg.vector_norm(R, dim=axis) if beside is not None else None
        if R.numel():
            self._direct(p, R, since)
        rows: Rows | None = None
        if beside is not None:
            rule = self.plan.rule
            correction = rule.correction(since, group) if hasattr(rule, "correction") else 1.0
            rows = beside.rows(Beside(G, basis, R, norms, axis, self._slice(p.device),
                                      correction, sub.scale), state)
        lr, decay = group["lr"], group["weight_decay"]
        flat, noise = W.view(-1), CounterNoise(self.seed, f"{name}/round")
        for lo, hi in panels(m, n, self._slice(p.device)):
            x = self._numerics.read(flat, state, lo * n, hi * n)
            if decay and sub.decay_first:
                x.mul_(1 - lr * decay)
            if sub.scale or rows is None:
                x.add_(basis.up(R, lo, hi).view(-1), alpha=-lr * sub.scale)
            if rows is not None:
                x.add_(rows(lo, hi).view(-1), alpha=-lr)
            if decay and not sub.decay_first:
                x.mul_(1 - lr * decay)
            self._numerics.write(flat, state, lo * n, hi * n, x, noise, t)

    def _direct(self, p: nn.Parameter, R: Tensor, t: int) -> None:
        """R becomes what the rule makes of it."""
        (group, name), state = self._where[p], self.state[p]
        codec = self._codec(p, R.numel())
        self._allocate(state, codec, R.numel(), p.device, tuple(R.shape))
        flat = R.view(-1)
        for lo, hi in self._slices(R.numel(), p.device):
            u = torch.zeros_like(flat[lo:hi])
            moved(self.plan.rule, codec, Bunch([name], [state], [(lo, hi)], [], []), [u],
                  [flat[lo:hi]], t, group, self.seed, -1.0, 0.0)
            flat[lo:hi].copy_(u)
