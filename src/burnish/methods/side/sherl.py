from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.gathered import Early, Late
from ...blocks.state.parallel_head import Tapped
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ._beside import Cached, frozen, narrowed, still, width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Sherl(Cached):
    """SHERL: the states below the last block, gathered into the one that the last block reads.

    With H_0 .. H_K what goes into the first block and what comes out of each below the last
    `layers`, ``X_i = Norm(D_i H_i)`` of width S = D / reduction, token by token

        o_i = relu(w (X_i * X_K) + b) / sum_{j<K} relu(cos(X_i, X_j)),   their sum made 1,
        A = sum_{i<K} o_i X_i + X_K,
        O = dropout(Norm(U relu(A))) + tanh(g / 0.1) H_K

    and O goes into the last blocks in place of H_K. States that are alike share what one of them
    would have. D_i (S, D) and U (D, S) have biases, g is a scalar.

    Start: g = 0, the rest as linears start, so the last blocks read nothing of H_K as it was: not
    the pre-trained function. Trains (K + 1) (D S + 3 S) + S + 1 + S D + D + 2 D + 1. Kept for
    backward: H_i and D_i H_i, and of the last blocks what frozen ones keep; no block below them
    keeps anything, and backward never enters one. Not mergeable.

    The frozen backbone, its last blocks included, runs in evaluation mode. What trains in the last
    blocks or behind them may stand beside it, what trains below is refused; so are several stacks.
    A token is gathered from its own states, so models write on from a cache as without one.
    Departures: with K = 1 (two blocks) the only shallow state counts whole, without w and b, which
    could not train. S divides D; the published S is 512 beside D = 768.

    cache="folder" keeps H_i on disk by sample, for data that do not change: of a batch that is all
    there the last blocks alone run (blocks/state/tap_cache.py).
    """

    paper: ClassVar[str] = ("SHERL: Synthesizing High Accuracy and Efficient Memory for "
                            "Resource-Limited Transfer Learning (2024), arXiv:2407.07523")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"one width"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    reduction: int = setting(2, "D / S, the backbone's width over that of the gathering")
    layers: int = setting(
        1, "how many of the last blocks run in the graph",
        unseen="a model of two blocks has one below: tests/methods/test_sherl.py")
    dropout: float = setting(0.1, "on what is gathered")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1 or self.layers < 1:
            raise RecipeError(f"sherl(reduction={self.reduction}, layers={self.layers}): 1 or more")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"sherl(dropout={self.dropout}): 0 or more, and below 1")

    def repeats(self) -> int | None:
        return None                              # the last blocks are like none below them

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def side(self, anatomy: Anatomy) -> Sherl:
        if self.targets is not None:
            raise RecipeError("sherl takes no targets: it reads all blocks; sherl(layers=...) says "
                              "how many of the last run in the graph")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        if self.layers >= len(anatomy.blocks):
            raise RecipeError(f"sherl(layers={self.layers}): this model has {len(anatomy.blocks)} "
                              "blocks, and one below the last ones at least is to be read")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, model = attacher.anatomy, attacher.model
        (blocks,) = anatomy.stacks().values()
        below, late = blocks[:-self.layers], blocks[-self.layers:]
        behind = (*anatomy.head, *(b.path for b in late), anatomy.final_norms.get(late[0].stack))
        frozen(attacher, part, tuple(f"{p}." for p in behind if p))
        d = width(anatomy, part, [blocks])
        small = narrowed(self, d)
        still(attacher, part, [blocks])
        state, name = attacher.state, attacher.adapter.name
        cache = self.keeping(attacher, below)
        for i, block in enumerate(below):
            Tapped(state, name, enter=i == 0).kept(cache, i).listen(
                attacher.slot(block.path), part.name)
        like = next(p for p in model.get_submodule(late[0].path).parameters()
                    if p.is_floating_point())
        head = Early(len(below) + 1, d, small, self.dropout)
        head.to(device=like.device, dtype=like.dtype)
        for i, block in enumerate(late):
            Late(state, name, None if i else head).listen(attacher.slot(block.path), part.name)

    def count(self, states: int, d: int, small: int | None = None) -> int:
        """Trainable parameters beside so many states (the blocks below, and one more) of width d;
        small: S, where it is another."""
        s = small or d // self.reduction
        sure = s + 1 if states > 2 else 0
        return states * (d * s + 3 * s) + sure + s * d + d + 2 * d + 1
