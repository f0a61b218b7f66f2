"""Hidden states read from a frozen network that runs without a graph, and networks beside it.

The backbone's blocks run under ``no_grad``; what they produce is handed, one tap at a time, to a
side network that owns everything that trains. Backward never enters the backbone.

Letters: D backbone width, S side width, R = D / S.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.executor import no_grad
from .prompts import Listener

#: settings of a config that are widths and shrink with the side network; head counts stay
WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "intermediate_size", "n_inner",
          "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "head_dim",
          "d_kv", "moe_intermediate_size", "shared_expert_intermediate_size")


class Gate(nn.Module):
    """``sigma(a / tau) s + (1 - sigma(a / tau)) h``; a scalar, 0 at the start (gate 1/2).

    Written as ``h + sigma (s - h)``, so backward keeps one state, s - h.
    """

    def __init__(self, tau: float = 0.1):
        super().__init__()
        self.alpha, self.tau = nn.Parameter(torch.zeros(())), tau
        self.alpha.burnish_decay = False

    def forward(self, s: Tensor, h: Tensor) -> Tensor:
        return h + torch.sigmoid(self.alpha / self.tau).to(h.dtype) * (s - h)


class Down(nn.Linear):
    """D -> S with bias, in the dtype of what it is given."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))


class Still(Listener):
    """Listens to the model: the modules in `still` run in evaluation mode.

    Dropout in a backbone that does not train only makes its taps noisy.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, still: list[nn.Module]):
        super().__init__(state, adapter)
        self.__dict__["still"] = still

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        with _evaluating(self.still):
            return call(*args, **kw)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    was = [m for m in modules if m.training]
    for m in was:
        m.training = False
    try:
        yield
    finally:
        for m in was:
            m.training = True


class Rung(Listener):
    """One step of a ladder beside one block: ``s <- g(gate(s, D h))``, h what the block returned.

    Listens to the block, which runs without a graph. down, gate and side are absent in a block
    the ladder skips. enter: this is the first block; s starts as ``D_first`` of its input.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, side: nn.Module | None, width: int, small: int,
                 *, enter: bool = False, tau: float = 0.1):
        super().__init__(state, adapter)
        self.first = Down(width, small) if enter else None
        self.down = self.gate = None
        self.side = side
        if side is not None:
            self.down, self.gate = Down(width, small), Gate(tau)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        name, given = (None, args[0]) if args else next(iter(kw.items()))
        self._runs_once(module)
        if given.requires_grad and not (getattr(module, "gradient_checkpointing", False)
                                        and not _trains(given.grad_fn)):
            raise RecipeError(f"{self.adapter}: something below {type(module).__name__} trains or "
                              "carries a gradient, but the backbone of a side network runs "
                              "without a graph: its gradient would be cut; drop that part or the "
                              "side network")
        if torch.is_grad_enabled():              # a key-value cache would keep every layer's states
            args, kw = _uncached(args), dict(zip(kw, _uncached(tuple(kw.values())), strict=True))
            if kw.get("use_cache"):
                kw["use_cache"] = False
        box, key = self.here.box, ("side", self.adapter)
        watch = Watch(self.state.tape) if isinstance(self.side, Plain) else None
        with watch or _nothing():
            out = no_grad(module, call, args, kw)
        if self.first is not None:
            box[key] = self.first(given)
        if self.side is not None:
            tap = out[0] if isinstance(out, tuple) else out
            u = self.gate(box[key], self.down(tap))
            if watch is not None:
                box[key] = self.side(u, *watch.mask())
            else:
                box[key] = self._again(u, name, args, kw)
        return out

    def _runs_once(self, module: nn.Module) -> None:
        """Somebody else's checkpointing would run a rung again without the state beside it."""
        cut = getattr(self.here, "grad", False) and not torch.is_grad_enabled()
        if cut or torch.is_grad_enabled() and self.state.tape.others():
            raise RecipeError(f"{self.adapter}: {type(module).__name__} runs inside a gradient "
                              "checkpointing that is not burnish's; a second run would lack the "
                              "state that climbs beside the blocks, and a frozen backbone keeps "
                              "nothing for backward anyway: switch that checkpointing off")

    def _again(self, u: Tensor, name: str | None, args: tuple, kw: dict[str, Any]) -> Tensor:
        """The side block on what its own block was given, with the state and positions its own."""
        small = {k: _small_rotary(v, self.side) if k == "position_embeddings" else v
                 for k, v in kw.items()}
        _second_cache((*args, *kw.values()), self.side)
        out = self.side(u, *args[1:], **small) if name is None else \
            self.side(**{**small, name: u})
        return out[0] if isinstance(out, tuple) else out


def _trains(node: Any) -> bool:
    """Does a parameter stand below this node of the graph? (Models that checkpoint themselves make
    their embeddings carry a gradient that nobody reads.)"""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        todo += [n for n, _ in node.next_functions]
    return False


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _uncached(values: tuple) -> tuple:
    return tuple(None if hasattr(v, "get_seq_length") else v for v in values)


def _second_cache(given: tuple, side: nn.Module) -> None:
    """Room behind the backbone's layers of a key-value cache for the side block's own."""
    cache = next((v for v in given if hasattr(v, "get_seq_length")), None)
    if cache is None:
        return
    while len(cache.layers) <= side.cache_index:
        fresh = copy.copy(cache.layers[side.beside])
        fresh.keys = fresh.values = None
        fresh.is_initialized = False
        if hasattr(fresh, "cumulative_length"):
            fresh.cumulative_length = 0
        cache.layers.append(fresh)


def _small_rotary(tables: Any, side: nn.Module) -> Any:
    """(cos, sin) for a head of width h / R: every R-th frequency, which are exactly its own.

    The tables repeat their h / 2 frequencies twice; frequency j of the small head is frequency
    R j of the large one.
    """
    if not isinstance(tables, tuple):
        return tables
    step = side.reduction
    made = []
    for t in tables:
        half = t[..., : t.shape[-1] // 2][..., ::step]
        made.append(torch.cat([half, half], -1))
    return tuple(made)


class Crown(Listener):
    """The ladder's end: ``y = gate(U Norm(s), h)``, h what the listened module returns.

    Listens to the backbone's last norm, or to its last block when there is none.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, norm: nn.Module, width: int, small: int,
                 tau: float = 0.1):
        super().__init__(state, adapter)
        self.norm, self.up, self.gate = norm, Down(small, width), Gate(tau)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        h = out[0] if isinstance(out, tuple) else out
        s = self.here.box.pop(("side", self.adapter))
        y = self.gate(self.up(self.norm(s)), h)
        return (y, *out[1:]) if isinstance(out, tuple) else y


# -- side blocks ------------------------------------------------------------------------------
class Plain(nn.Module):
    """A pre-norm transformer block of width S, for backbones whose own class cannot be shrunk."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        B, T, S = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.proj(a.transpose(1, 2).reshape(B, T, S))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Watch:
    """Sees how a block masks its attention, so that a plain side block masks the same way."""

    def __init__(self, tape: Any):
        self.tape, self.seen = tape, None

    def __enter__(self) -> None:
        self._was = dict(self.tape.intercept)
        sdpa, mha = F.scaled_dot_product_attention, F.multi_head_attention_forward
        self.tape.intercept |= {sdpa: self._sdpa, mha: self._mha}

    def __exit__(self, *_: Any) -> None:
        self.tape.intercept = self._was

    def _sdpa(self, func: Any, args: tuple, kw: dict) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kw
        self.seen = given.get("attn_mask"), bool(given.get("is_causal"))
        return func(*args, **kw)

    def _mha(self, func: Any, args: tuple, kw: dict) -> Any:
        given = inspect.signature(func).bind(*args, **kw).arguments
        if given.get("attn_mask") is not None or given.get("key_padding_mask") is not None:
            raise RecipeError("lst: a masked nn.MultiheadAttention has no side block yet; only "
                              "unmasked ones and transformers models do")
        self.seen = None, False
        return func(*args, **kw)

    def mask(self) -> tuple[Tensor | None, bool]:
        """(mask, causal) of the attention that ran last."""
        if self.seen is None:
            raise RecipeError("lst: this block computes no attention that can be seen, so a side "
                              "block could look where it may not; load the model with "
                              "attn_implementation='sdpa'")
        return self.seen


def shrunk(block: nn.Module, config: Any, reduction: int, number: int, layers: int
           ) -> nn.Module | None:
    """A fresh block of the same class at 1/R of every width, or None where that cannot be built.

    Widths of the config shrink, the number of heads stays. number: which of the `layers` blocks it
    stands beside; in a key-value cache it is layer ``layers + number``.
    """
    cls = getattr(type(block), "_burnish_base", type(block))
    wanted = inspect.signature(cls.__init__).parameters
    own = next((m.config for m in block.modules() if hasattr(m, "config")), config)
    if own is None or "config" not in wanted:
        return None
    small = copy.deepcopy(own)
    for name in WIDTHS:
        value = getattr(small, name, None)
        if isinstance(value, int) and name not in getattr(small, "attribute_map", {}):
            if value % reduction:
                raise RecipeError(f"a side network needs {name} = {value} divisible by the "
                                  f"reduction; {reduction} does not divide it")
            setattr(small, name, value // reduction)
            if value // reduction % 8 and \
                    getattr(small, "_experts_implementation", None) == "grouped_mm":
                small._experts_implementation = "batched_mm"     # grouped ones want 16 bytes
    made = cls(**{"config": small, **({"layer_idx": number} if "layer_idx" in wanted else {})})
    for m in made.modules():
        if hasattr(m, "layer_idx"):
            m.layer_idx = layers + number
    made.reduction, made.beside, made.cache_index = reduction, number, layers + number
    return made
