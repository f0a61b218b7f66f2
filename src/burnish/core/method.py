"""What a method is: its settings, and its answers to the twelve questions.

A method lives in one file, ``methods/<axis>/<name>.py``; the file name is its name everywhere.
It is a dataclass whose fields are its settings and whose overridden methods are its answers::

    @dataclass(frozen=True, kw_only=True)
    class Lora(Method):
        \"\"\"LoRA -- ... equation, shapes, count, start, merge, source.\"\"\"

        rank: int = setting(8, "rank of the update")

        def delta(self, site):
            return Chain(site.place, rank=self.rank, ...)

Registry, command-line help, catalogue and conformance suite are generated from these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .axes import AXES
from .keys import Key
from .site import Branch, Place, Selection, Site

if TYPE_CHECKING:
    from ..blocks.choose.observe import Statistic
    from ..blocks.weight.shared import Seeded
    from ..blocks.weight.term import Provider, Term
    from .anatomy import Anatomy
    from .protocols import Installs, Tuned
    from .stage import Stage


#: behind a path of `Method.taps`: what the module reads, not what it returns
INPUT = "/input"
#: how a method was held against its source: read and written down; its test computes the equation
#: again, in float64 and without burnish; its test meets figures that the source prints
TIERS = ("from the text", "checked against an independent equation",
         "checked against the paper's numbers")


def setting(default: Any = MISSING, help: str = "", *, alias: Sequence[str] = (),
            other: Sequence[Any] = (), beside: Mapping[str, Any] = MappingProxyType({}),
            unseen: str = "", least: float | None = None,
            above: float | None = None, signed: bool = False) -> Any:
    """A dataclass field with a few words of meaning, printed by help and catalogue.

    alias: other spellings that are read, of papers and of other libraries.

    The suite shows that every setting acts: a run with another value of it differs. Where it cannot
    tell how by itself, the field says so:

    other: other legal values, where the type tells none, or none that acts.
    beside: settings it is shown with, where it has nothing to act on alone (its own value too).
    unseen: why no run of a small model shows it, and the test that does: "reason: tests/...".

    A number below 0 is refused (core/recipe.py), but for names whose sign is free
    (core/vocabulary.py). Where a setting's is, or its bound is another, it says so:

    least: the least that it can be; above: what it must be more than; signed: any number will do.
    """
    about = {"help": help, "alias": tuple(alias), "other": tuple(other),
             "beside": MappingProxyType(dict(beside)), "unseen": unseen, "least": least,
             "above": above, "signed": signed}
    return field(default=default, metadata=about, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Override the questions the method answers; leave the others.

    Class facts, each written once and used by planner, suite and docs:

    paper: the source.
    identity: step 0 equals the pre-trained function exactly (up to rounding).
    merges: the update folds exactly into plain weights.
    kinds: kinds of :class:`~burnish.core.site.Place` a `delta` or `storage` applies to.
    needs: what a model must have besides (words of core/needs.py); others refuse with a reason.
    exact: the gradients are those of the loss; False: estimates of them, by design.
    ties: its updates of a tied table reach every module that reads it (`Term.mirrored`); False: a
    tied table is refused.
    fixed: what it does not train is a fixed function: it runs in evaluation mode, whatever the
    model's mode (no dropout, no moving statistics).
    by_data: where it acts, and how much, is decided by data that it reads first: a promise made
    without them is of the most it may take.
    holds_out: it looks at validation rows while it trains; a promise counts their longest batch.
    takes_head: ``head="auto"`` trains a classification-like head beside it; False: it says itself
    all that trains of the model.
    of_task: settings that say something of the task and nothing of what is learnt: a run that
    begins where another has ended may have others.
    small: settings the suite shows it with on its models of width 32, beside the usual small ones
    (``testing/checks/common.py``).
    shown_beside: the parts that the suite shows it beside, where it is nothing alone and the usual
    ones ("full", "lora") do not suit it.
    excused: checks of the conformance suite that it is excused from, each with the reason and the
    test that holds it instead: ``{"loss_falls": "..."}``, or ``{"loss_falls on mlp": "..."}``. An
    excused check that passes fails, unless the reason begins "by chance".
    tier: how what is written here was held against the source, one of :data:`TIERS`.
    quality: prior used by the planner comes from measured data, never from here.
    """

    paper: ClassVar[str] = ""
    identity: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    ties: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    by_data: ClassVar[bool] = False
    holds_out: ClassVar[bool] = False
    takes_head: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset(
        {"linear", "conv1d", "conv", "embedding", "mha", "experts"}
    )
    needs: ClassVar[frozenset[str]] = frozenset()
    #: keys of the batch that parts of this method read from the call (core/call.py), with what each
    #: means and may be: ``{"task": Key("one id per sample", below="tasks")}`` (core/keys.py). The
    #: model need not take them.
    context: ClassVar[Mapping[str, Key]] = MappingProxyType({})
    #: what this part needs of the optimizer beside it (see core/words.py); axes are read off
    relies_on: ClassVar[tuple[str, ...]] = ()
    of_task: ClassVar[frozenset[str]] = frozenset()
    #: what of a step nothing beside it may rely on, word -> reason
    denies: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: an update is to say little of any one sample: fit draws each by itself (core/sampling.py),
    #: and nothing else of the run may read them
    private: ClassVar[bool] = False
    #: what the head's outputs are beside it, where they are no longer what the task makes of them,
    #: and it minimises a loss of its own of that: "embedding". Tasks that read anything else in
    #: them are refused (:func:`burnish.fit.tasks.embedded`)
    head_outputs: ClassVar[str] = ""
    #: the objective reads the forward it is asked about (its outputs, its batch)
    sees_run: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    shown_beside: ClassVar[str] = ""
    excused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    tier: ClassVar[str] = "from the text"
    #: name in a recipe; set by the registry from the file name
    name: ClassVar[str] = ""

    targets: str | list[str] | tuple[str, ...] | None = setting(
        None, "which weights, text or a list; None takes the recipe's")

    # -- the twelve questions -------------------------------------------------------------
    def storage(self, site: Site) -> Provider | None:
        """The provider that holds this frozen weight from now on, or None to leave it."""

    def waits(self, place: Place) -> bool:
        """Has this storage a weight that trains on the host (blocks/weight/waiting.py), instead of
        refusing it? It stays a parameter."""
        return False

    def delta(self, site: Site) -> Term | tuple[Term, ...] | None:
        """The term (or terms) added to this weight, and at most one function of W (`Wrap`).
        `site.weight` is the (out, in) view, possibly fake."""

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        """Existing parameters that train whole."""
        return ()

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | Installs]:
        """Modules that add to hidden states, or that find their own way to them."""
        return ()

    def prompt(self, anatomy: Anatomy) -> Any:
        """A prompt bank (see blocks/state/prompts.py)."""

    def side(self, anatomy: Anatomy) -> Any:
        """A side network on the tap bus (see blocks/state/taps.py)."""

    def activations(self, anatomy: Anatomy) -> Any:
        """What is kept for backward (see blocks/tape/executor.py and blocks/tape/saved.py)."""

    def optimizer(self) -> Any:
        """A rule or a wrapper of rules (see blocks/update/step.py)."""

    def controller(self, tuned: Tuned) -> Any:
        """An object whose methods are named by events (see core/events.py)."""

    def objective(self, tuned: Tuned, run: Any) -> Iterable[Any]:
        """Terms added to the task's loss; they follow its scale (see blocks/update/objective.py).

        A term of weights alone is an ``OnWeights``, asked for once per optimizer (`run` is None).
        With ``sees_run`` the terms are scalar tensors of one forward: `run` has ``batch``,
        ``given``, ``outputs``, ``taps``, ``reference()`` and ``reference_taps()``.
        """
        return ()

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Paths of modules whose outputs the objective reads as ``run.taps[path]``; with
        :data:`INPUT` behind it, what the module is given first."""
        return ()

    def ahead(self, tuned: Tuned, run: Any) -> Any:
        """What parts of a forward that trains want to know before it begins: `run` has ``batch``,
        ``given``, ``reference()`` and ``reference_taps()``, whose runs are made once and are those
        that objectives read later. Kept as ``context().ahead[name]`` of that forward, also where
        backward runs a block of it again; other forwards have none."""

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        """A gate around several answers, as branches that carry their router."""
        return ()

    def lifecycle(self, *args: Any, **kw: Any) -> Any:
        """Functions on checkpoints before or after training."""

    # -- before the questions: data, and tensors that places share -------------------------
    def observe(self, place: Place) -> Statistic | None:
        """What a `delta` or `storage` wants to know of the data that passes this place, or of its
        weight beside others' (see blocks/choose/observe.py); read before anything is added, from
        as many samples as the setting `samples` says, all there are where there is none. None:
        nothing."""

    def read_loss(self, model: nn.Module, batch: Any, run: Callable[..., Any]) -> torch.Tensor:
        """The scalar whose gradients `observe` is given of a batch: the task's loss, unless a
        method says another. ``run(batch)`` is the model's answer, with ``loss=True`` its loss."""
        return run(batch, loss=True)

    def travel(self, model: nn.Module, batches: Sequence[Any],
               loss: Callable[[Any], torch.Tensor]
               ) -> Iterator[Mapping[nn.Parameter, torch.Tensor]]:
        """Move the weights from point to point; at each the gradients that `observe` wants are read
        from all batches. Gives how far each parameter goes in all, which its statistic is told
        (`leads`), and has put everything back when it is closed. They stay where they are unless a
        method says more."""
        yield {}

    def settle(self, seen: Mapping[Place, Statistic]) -> Mapping[Place, dict[str, Any]]:
        """Decide over all places at once (ranks, budgets) from what was seen so far; called after
        every batch of the data pass, or after every round where statistics condense. Plain values
        only: they go into the adapter's file."""
        return {}

    def shared(self, places: Sequence[Place]) -> Mapping[str, torch.Tensor | Seeded]:
        """Tensors this part owns once for all its places: parameters train and are saved once,
        `Seeded` ones are drawn again and never saved."""
        return {}

    def stages(self, tuned: Any, tasks: Sequence[str]) -> Iterable[Stage]:
        """How a run over `tasks` is divided (core/stage.py); nothing: it is one stretch. Asked
        before anything trains; `tasks` are the names of data sets, none where there is one."""
        return ()

    def keys(self) -> Mapping[str, Key]:
        """The keys of `context` that these settings read; all of them unless a method says so."""
        return self.context

    def together(self) -> int:
        """Consecutive samples of a batch that are one thing (slices of a scan, views of an object),
        so that a batch holds whole ones in order, which `fit` does not: it draws each sample."""
        return 1

    def repeats(self) -> int | None:
        """After how many blocks of a stack what this part does to a block begins again: 1, the same
        for each; None, it depends on the block's place among them or on how many there are. A
        simulation of a deep model that runs a few of its blocks goes by it."""
        return 1

    def finished(self) -> Method:
        """What a file says in place of this part once training is over; a module it has added gives
        the tensors for that by its own ``finished()``. This part itself, unless it says more."""
        return self

    # -- laws -----------------------------------------------------------------------------
    def claims(self) -> tuple[str, ...]:
        """Resources only one part of a recipe may take ("the function of W on q,v")."""
        return ()

    def forbids(self) -> dict[str, str]:
        """resource -> reason: what another part must not claim beside this one."""
        return {}

    def unread(self, anatomy: Anatomy) -> Iterable[str]:
        """Modules whose answer nobody reads beside this part, since it hands the head another: what
        other parts are not told to act on stays out of them, and what they are told is refused."""
        return ()

    # -- read off the answers -------------------------------------------------------------
    @classmethod
    def axes(cls) -> tuple[str, ...]:
        """The axes this method answers, in the order of the table; stages are of the lifecycle."""
        return tuple(a for a in AXES if getattr(cls, a) is not getattr(Method, a)
                     or a == "lifecycle" and cls.divides())

    @classmethod
    def divides(cls) -> bool:
        """Does it divide a run into stages?"""
        return cls.stages is not Method.stages

    @classmethod
    def apart(cls) -> bool:
        """Is it a function on models and data alone, called by its name and not by a recipe?"""
        return cls.axes() == ("lifecycle",) and not cls.divides()

    def settings(self) -> dict[str, Any]:
        """Every setting with its value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def changed(self) -> dict[str, Any]:
        """Only the settings that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        args = ", ".join(f"{k}={v!r}" for k, v in self.changed().items())
        return f"{self.name}({args})" if args else self.name
