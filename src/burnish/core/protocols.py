"""What methods are handed and what they may hand back, said by what it can do.

Methods never import the engine. A method's answer to `prompt`, `side` or `activations` is asked to
:class:`Installs` itself, and so is a `branch` that stands inside a module; what `controller`
returns is a handler of events (core/events.py); what wraps a module's run is a :class:`Listens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .method import Method
    from .recipe import Recipe
    from .sampling import Sampling
    from .site import Place


class Tuned(Protocol):
    """The handle, as a controller or an objective sees it."""

    model: nn.Module
    total_steps: int | None
    current_optimizer: Any
    sampling: Sampling | None            # how the samples of an update are drawn, where known
    state: Any                           # what the model's slots share: its tape, what is active

    @property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that trains."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of everything that trains."""

    def terms(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(place name, term) of every term of a class in the active adapter."""

    @property
    def originals(self) -> Any:
        """The base's values of what trains."""


class Probe(Protocol):
    """What a pass found that left no trace: the loss, and gradients by name of a tensor."""

    loss: Tensor
    grads: dict[str, Tensor]


class Pass(Protocol):
    """The forward and backward of a micro-batch, as a handler sees it that stands around them."""

    index: int                                       # of the update
    scale: Any                                       # of the loop's loss on its way back

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains just now, by name."""

    def probe(self, grads: bool = True, statistics: bool = False, evaluate: bool = False,
              of: Callable[[Any], Tensor] | None = None) -> Probe:
        """The pass, made and undone; `statistics`: running statistics move as in a step's own;
        `evaluate`: in evaluation mode; `of`: another scalar of the forward in place of the loss,
        made of what an objective is handed as `run` (its gradients have the loss's scale)."""

    def loss(self) -> Tensor:
        """The loss of this pass's forward alone, with a graph where the caller wants one."""

    def apart(self, after: Callable[[], None]) -> None:
        """The pass is made sample by sample, each with the loss it has alone, at no scale; `after`
        is called when the gradients of one are complete."""

    def narrow(self, rows: Sequence[int]) -> None:
        """From here on the pass, and whatever is probed, is made of these samples alone, at the
        weight that the whole micro-batch has in the update; once a pass."""

    def damped(self, paths: Iterable[str], factor: float) -> AbstractContextManager[int]:
        """Inside, what the active adapter adds within these modules counts `factor` times; gives
        how many updates and branches that are (functions of W are none, but at 0)."""

    def updated(self, grads: dict[str, Tensor]) -> AbstractContextManager[dict[str, Tensor]]:
        """Inside, weights stand after one update with these gradients; gives them as they were."""

    def unmoved(self) -> AbstractContextManager[None]:
        """Inside, running statistics are not moved."""


class Attacher(Protocol):
    """What an answer that installs itself may use of the engine."""

    model: nn.Module
    anatomy: Anatomy
    state: Any
    adapter: Any
    notes: list[str]

    def device(self, path: str) -> Any:
        """Where a module's tensors are, also those a storage holds."""

    def slot(self, path: str) -> Any:
        """The slot of a module, made on first use."""

    def rehearse(self, part: Method, enough: Callable[[], bool] = lambda: False,
                 batch: Any = None) -> bool:
        """Run the base over calibration samples until `enough()` (default: all), or over this
        batch; False where no values are wanted."""

    def informed(self, part: Method, places: Sequence[Place]
                 ) -> Iterator[tuple[Place, Any, Mapping[str, Any]]]:
        """(place, what the data pass saw there, what was settled for it), for a part that
        observes."""


class Installs(Protocol):
    """An answer that finds its own way into the model."""

    def install(self, attacher: Attacher, part: Method) -> None:
        """Put yourself into slots; RecipeError where the model has no place for you. Whatever has
        been done by then is undone when it is raised."""


class Listens(Protocol):
    """Around a module's run: ``call(*args, **kw)`` is the module (and the listeners inside)."""

    def __call__(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """What answers for the run."""
