from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...blocks.state.another import beside
from ...blocks.state.bottleneck import Bottleneck, activation
from ...blocks.state.keyed_bottleneck import TaskBottlenecks
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.site import Branch, Selection
from ._sites import attention_ends, found, mlp_ends, norm_tensors, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class VlAdapter(Method):
    """VL-Adapter: adapters of several tasks that share all of themselves, a half, or nothing.

    ``a(h) = h + U_t act(D_t h + b_t) + c_t`` behind self-attention, cross-attention and MLP, before
    the residual; D (m, d), U (d, m), m = d / reduction, t the sample's task: the batch names
    ``task``. share="all": one adapter for all tasks (the paper's single adapter, its best; no key
    is read). "down", "up": that half for all, the other each task's own (half-shared). "none": one
    each (multiple adapters). Norms train too. The same by a network that all tasks share is
    `hyperformer`; with factors that all sites share, `compacter`.

    What is mapped from pictures to words trains as a part of its own, and the encoder of pictures
    rests where `targets` names weights of the others: ``vl_adapter(targets="...") +
    full(targets="visual_projection")``; norms of a stack that it leaves out stay too.

    Start: weights normal of deviation 0.02 ("bert"), near the pre-trained function, "zero" exactly
    on it. Trains per site m d for each D and U, m and d for their biases, times tasks where they
    are a task's own (of which a sample moves its own task's), and norms. Kept for backward: h, and
    with share="all" m numbers per token. Not mergeable; :meth:`lifecycle` makes one task's adapters
    plain ones. (Start and activation are unconfirmed.)
    """

    paper: ClassVar[str] = ("VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-"
                            "Language Tasks (2021), arXiv:2112.06825")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per sample", below="tasks")}
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    tasks: int = setting(2, "how many tasks", beside={"share": "none"})
    reduction: int = setting(8, "d over the adapter's width m", alias=("reduction_factor",))
    share: Literal["all", "down", "up", "none"] = setting("all", "what all tasks have")
    act: str = setting("gelu_new", "activation inside", other=("relu",))
    init: Literal["bert", "truncated", "zero"] = setting("bert", "start of the weights")
    norms: bool = setting(True, "train the norms too")

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.reduction < 1:
            raise RecipeError(f"{self}: expected tasks and reduction of at least 1")
        if self.share == "all" and "tasks" in self.changed():
            raise RecipeError(f"vl_adapter: tasks={self.tasks} tells apart what tasks have alone, "
                              "and share='all' leaves them nothing; expected share='down', 'up' or "
                              "'none', or tasks left out")
        activation(self.act)

    def keys(self) -> Mapping[str, Key]:
        return {} if self.share == "all" else self.context

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if self.share != "all":
            samples_first(anatomy, self)
        for s in found(anatomy, [*attention_ends(anatomy), *mlp_ends(anatomy)], self,
                       "attention or MLP"):
            m = max(1, s.width // self.reduction)
            made: nn.Module = Bottleneck(s.width, m, act=self.act, init=self.init) \
                if self.share == "all" else TaskBottlenecks(
                    self.tasks, s.width, m, share=self.share, act=self.act, init=self.init)
            yield Branch(s.path, made)

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        sites = found(anatomy, [*attention_ends(anatomy), *mlp_ends(anatomy)], self,
                      "attention or MLP")
        used = {s.block.stack for s in sites}
        rest = tuple(f"{b.path}." for b in anatomy.blocks if b.stack not in used)
        return (s for s in norm_tensors(anatomy) if not s.name.startswith(rest)) \
            if self.norms else ()

    def lifecycle(self, tuned: Any, task: int, name: str) -> None:
        """Settle one task: an adapter `name` beside the one in use (which must train this method),
        with its adapters for everybody (share="all"), and use that: it reads no key, saves and
        trains on. Raises RecipeError for a task that is none, and where there is nothing to settle.
        """
        if self.share == "all":
            raise RecipeError("vl_adapter(share='all') has one adapter for all tasks already")
        if not 0 <= task < self.tasks:
            raise RecipeError(f"vl_adapter has tasks 0 to {self.tasks - 1}, not {task}")
        made = {path: m.plain(task).state_dict() for path, m in tuned.branches(TaskBottlenecks)}
        plain = replace(self, share="all", tasks=VlAdapter.tasks)
        beside(tuned, self, name, [(plain, made)])

    def count(self, d: int) -> int:
        """Trainable parameters of one site of width d, norms left out."""
        m = max(1, d // self.reduction)
        down, up = (1 if self.share in ("all", half) else self.tasks for half in ("down", "up"))
        return down * (m * d + m) + up * (m * d + d)
