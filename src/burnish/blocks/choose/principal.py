"""Bases of a residual stream by its principal directions, one sub-layer after the other.

A model whose stream is left k directions at every interface is the model as it is with ``x <- x Q
Q^T`` there, Q (d, k) of that interface; so each interface is read from what has passed the ones
before it, a block at a time, and no weight is changed. States wait on the host; the sums are in
fp64, where fp32 is not enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.batches import moved
from ...core.draw import drawn
from ...core.errors import ConfigError
from ...core.stream import Stream
from ..state.shortcut import norms_of, parts_of, subtract
from ..state.taps import evaluating

Batches = Iterable[Mapping[str, Any]]


class _Seen(Exception):
    """What was to be seen of a forward has been seen."""


@dataclass
class _Call:
    """What one batch gives to each block beside the state, and the state where it stands."""

    state: Tensor
    counts: Tensor | None
    beside: list[tuple[tuple, dict[str, Any], str | None]]


class Principal:
    """keep: k.  turned: a random rotation within what is kept, from `seed`.

    bases: 2 L + 1 of (d, k).  lost: the share of the sum of eigenvalues that each leaves out.
    """

    def __init__(self, anatomy: Anatomy, stream: Stream, keep: int, *, turned: bool, seed: int,
                 who: str):
        self.anatomy, self.stream, self.keep, self.who = anatomy, stream, keep, who
        self.turned, self.seed = turned, seed
        self.mean = subtract(anatomy, stream)
        if self.mean is None:
            raise ConfigError(f"{who}: some norms of this model subtract a mean and some do not")
        self.bases: list[Tensor] = []
        self.lost: list[float] = []

    @torch.no_grad()
    def read(self, batches: Batches) -> None:
        model = self.anatomy.model
        with evaluating([m for m in model.modules() if m.training]):
            calls = self._calls(model, batches)
            self._next(calls)
            for n in range(len(self.anatomy.blocks)):
                self._block(model, n, calls)

    # -- an interface --------------------------------------------------------------------------
    def _next(self, calls: list[_Call]) -> None:
        """The basis of what is there now, and the states without the rest."""
        device = self.anatomy.model.get_submodule(self.stream.norms[0]).weight.device
        d = self.stream.width
        H = torch.zeros(d, d, dtype=torch.float64, device=device)
        for call in calls:
            x = call.state.reshape(-1, d) if call.counts is None else call.state[call.counts]
            x = x.to(device, torch.float64)
            x = x - x.mean(1, keepdim=True) if self.mean else x
            H += x.t() @ x
        if not bool(torch.isfinite(H).all()):
            raise ConfigError(f"{self.who}: states of this model are not finite on these batches")
        values, vectors = (t.flip(-1) for t in torch.linalg.eigh(H))
        values = values.clamp_min(0)
        Q = vectors[:, : self.keep]
        self.lost.append(float(values[self.keep :].sum() / values.sum().clamp_min(1e-300)))
        if self.turned:
            Q = Q @ rotation(self.keep, self.seed + len(self.bases)).to(Q)
        wide = torch.promote_types(calls[0].state.dtype, torch.float32)
        self.bases.append(Q.to("cpu", wide).contiguous())
        for call in calls:
            call.state = self._projected(call.state)

    def _projected(self, x: Tensor) -> Tensor:
        """x Q Q^T, of x less its mean where norms take that off."""
        Q = self.bases[-1].to(x.device)
        wide = x.to(Q.dtype)
        wide = wide - wide.mean(-1, keepdim=True) if self.mean else wide
        return (wide @ Q @ Q.t()).to(x.dtype)

    # -- a block -------------------------------------------------------------------------------
    def _block(self, model: nn.Module, n: int, calls: list[_Call]) -> None:
        path = self.anatomy.blocks[n].path
        block, second = model.get_submodule(path), model.get_submodule(norms_of(self.stream, n)[1])
        before = [call.state for call in calls]
        for call in calls:
            call.state = self._until(block, second, call, n)
        self._next(calls)

        def project(norm: nn.Module, args: tuple) -> tuple:
            held.append(args[0])
            held.append(self._projected(args[0]))
            return held[-1], *args[1:]

        for k, (call, state) in enumerate(zip(calls, before, strict=True)):
            held: list[Tensor] = []
            call.state = state
            with self._agrees(n) if k == 0 else _nothing(), _hook(second, project):
                out = _run(block, call, n)
            call.state = (out + (held[1] - held[0]).view_as(out)).cpu()
        self._next(calls)

    def _until(self, block: nn.Module, norm: nn.Module, call: _Call, n: int) -> Tensor:
        """What the second norm of a block reads."""
        found: list[Tensor] = []

        def look(norm: nn.Module, args: tuple) -> None:
            found.append(args[0].detach())
            raise _Seen

        with _hook(norm, look):
            try:
                _run(block, call, n)
            except _Seen:
                return found[0].view_as(call.state).cpu()
        raise self._strange(f"its second norm is not run in block {n}")

    # -- what the mathematics takes for granted ------------------------------------------------
    @contextmanager
    def _agrees(self, n: int) -> Iterator[None]:
        """Block n, as it runs inside, is ``h + f(norm(h))`` twice; ConfigError where it is not."""
        model, block = self.anatomy.model, self.anatomy.blocks[n]
        given: dict[str, Tensor] = {}
        gave: dict[str, Tensor] = {}

        def look(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, kw: dict[str, Any], out: Any) -> None:
                given[path] = args[0] if args else next(iter(kw.values()))
                gave[path] = out[0] if isinstance(out, tuple) else out
            return hook

        norms = norms_of(self.stream, n)
        sides = [parts_of(self.anatomy, self.stream, block, inner) for inner in (False, True)]
        paths = [block.path, *norms, *(p.path for reads, writes in sides
                                       for p in (*reads, writes))]
        hooks = [model.get_submodule(p).register_forward_hook(look(p), with_kwargs=True)
                 for p in dict.fromkeys(paths)]
        seconds: list[Tensor] = []
        # before the hook that projects: what the block itself handed to its second norm
        hooks.append(model.get_submodule(norms[1]).register_forward_pre_hook(
            lambda module, args: seconds.append(args[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [p for p in paths if p not in gave]:
            raise self._strange(f"{missing[0]} is not run in its block")
        h = given[block.path]
        between = seconds[0].view_as(h)                  # some norm token by token
        for norm, (reads, _) in zip(norms, sides, strict=True):
            for place in reads:
                if not _same(given[place.path], gave[norm]):
                    raise self._strange(f"{place.path} does not read what {norm} gives")
        steps = ((given[norms[0]], h, f"{norms[0]} does not read what comes to the block"),
                 (between, h + gave[sides[0][1].path].view_as(h),
                  f"what {norms[1]} reads is not the sum of what came and the attention's answer"),
                 (gave[block.path], between + gave[sides[1][1].path].view_as(h),
                  f"what {block.path} gives is not the sum of what its second norm has read and "
                  "the MLP's answer"))
        for got, want, why in steps:
            if not _same(got, want):
                raise self._strange(why)

    def _strange(self, why: str) -> ConfigError:
        return ConfigError(f"{self.who}: the stream of this model cannot be turned: {why}")

    # -- the two ends --------------------------------------------------------------------------
    def _calls(self, model: nn.Module, batches: Batches) -> list[_Call]:
        """One forward for each batch: what the first block is given, and what stands beside it."""
        out = [self._call(model, batch) for batch in batches]
        if not out:
            raise ConfigError(f"{self.who} reads data first, and there is no batch")
        return out

    def _call(self, model: nn.Module, batch: Mapping[str, Any]) -> _Call:
        beside: list[tuple[tuple, dict[str, Any], str | None]] = []
        states: list[Tensor] = []
        read: dict[str, Tensor] = {}
        gave: dict[str, Tensor] = {}

        def look(module: nn.Module, args: tuple, kw: dict[str, Any]) -> None:
            name = None if args else next(iter(kw))
            states.append(args[0] if name is None else kw[name])
            beside.append((args[1:], {k: v for k, v in kw.items() if k != name}, name))

        def end(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, made: Any) -> None:
                if args:
                    read[path] = args[0]
                gave[path] = made[0] if isinstance(made, tuple) else made
            return hook

        blocks, final = self.anatomy.blocks, self.stream.norms[-1]
        last, heads = blocks[-1].path, self.anatomy.head
        hooks: list[Any] = [model.get_submodule(b.path).register_forward_pre_hook(
            look, with_kwargs=True) for b in blocks]
        hooks += [model.get_submodule(p).register_forward_hook(end(p))
                  for p in dict.fromkeys((last, final, *heads))]
        given = {k: v for k, v in batch.items() if k != "labels"}
        if "use_cache" in inspect.signature(model.forward).parameters:
            given["use_cache"] = False
        try:
            model(**moved(given, model.get_submodule(final).weight.device))
        finally:
            for hook in hooks:
                hook.remove()
        ends = [(final, last), *((h, final) for h in heads)]
        if len(beside) != len(blocks) or any(
                a not in read or b not in gave or not _same(read[a], gave[b]) for a, b in ends):
            raise self._strange("its blocks do not run once each, its last norm behind them and "
                                "its head behind that")
        counts = batch.get("attention_mask")
        if isinstance(counts, Tensor) and counts.shape != states[0].shape[:-1]:
            raise ConfigError(f"{self.who}: which of {list(states[0].shape)} states are padding "
                              f"cannot be told from a mask of {list(counts.shape)}; give batches "
                              "without padding")
        return _Call(states[0].detach().cpu(),
                     counts.bool().cpu() if isinstance(counts, Tensor) else None, beside)


def rotation(n: int, seed: int) -> Tensor:
    """(n, n), orthogonal, drawn evenly, in fp64."""
    with drawn(seed):
        Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return Q * R.diagonal().sign()


def _run(block: nn.Module, call: _Call, n: int) -> Tensor:
    args, kw, name = call.beside[n]
    first = next(p for p in block.parameters())
    h = call.state.to(first.device)
    out = block(h, *args, **kw) if name is None else block(**{name: h}, **kw)
    state: Tensor = out[0] if isinstance(out, tuple) else out
    return state


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    near = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= near * b.abs().max().clamp_min(1e-6))


@contextmanager
def _hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
