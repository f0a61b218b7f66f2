"""The ledger: which storages live, how large they are, since when, until when, and why.

A dispatch mode sees every operator's outputs. Each storage (never each tensor: views share one)
is entered once, with a weak reference whose death closes the entry. Peak, timeline, categories
and modules are all read off these intervals afterwards; nothing is estimated on the way. The
ledger works alike on real tensors and on fake ones, and keeps no tensor alive.

Time is counted in operators. The entry ``[birth, death)`` lives at event e if birth <= e < death;
at its own event an operator's inputs and outputs both live, as they do in its kernel.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .devices import INSIDE, PRODUCTS, scratch, workspace
from .machine import machine
from .operators import aliases, called_by_engine, cost, leaves, mutates
from .together import Entry, Together, Watch

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporary")
#: what a ledger adds up by phase where it counts
COUNTS = ("flops", "half", "traffic", "swept", "launches", "seconds")
PHASES = ("load", "forward", "loss", "backward", "update")

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_ADD = _aten.add.Tensor
LIFT = _aten.lift_fresh.default              # hands on a tensor just made from Python numbers

class Ledger(Together, TorchDispatchMode):
    """Follow every storage while the ``with`` block runs.

    model: names modules, and whose parameters and buffers are ``weights``.
    count: also add up by phase, for the planner: floating-point operations (`flops`), those of
        them in 16 bits (`half`), bytes read and written (`traffic`), those of operators that are no
        products (`swept`), operators (`launches`), and the time of all (`seconds`, machine.py).

    Everything that exists before the block and belongs to the step is passed to :meth:`watch`;
    the model's own tensors are watched on entry.
    """

    def __init__(self, model: nn.Module | None = None, *, count: bool = False):
        super().__init__()
        self.model, self.count = model, count
        self.entries: list[Entry] = []
        self.now = 0
        self.backward_starts: list[int] = []
        self.forward_starts: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self.reset_counts()
        self.notes: list[str] = []
        self.machine: str | None = None       # whose kernels and speed count; default each tensor's
        self._alive: dict[int, Watch] = {}
        self._paths: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        self._stack: list[str] = []
        self._seqs: list[int] = [0]
        self._seq_modules: list[str] = [""]
        self._idle = "load"
        self._updating = 0
        self._in_backward = False
        self._module_in_backward = ""
        self._donors: list[tuple[int, Entry]] = []
        self._hooked: dict[int, weakref.ref[Tensor]] = {}
        self._handles: list[Any] = []
        self._thread = threading.get_ident()
        self._closed = False
        self._unopened = {False, True}        # libraries of products: forward's thread, backward's

    # -- entering and leaving ---------------------------------------------------------------
    def __enter__(self) -> Ledger:
        self._handles += [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        ]
        if self.model is not None:
            self._paths = {id(m): name for name, m in self.model.named_modules()}
            self._owners = {id(p): name.rpartition(".")[0]
                            for name, p in self.model.named_parameters()}
            self.watch("weights", dict(self.model.named_parameters()))
            self.watch("weights", dict(self.model.named_buffers()))
            self._follow_gradients(self.model.parameters())
        self._begin_together(self.model)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._end_together()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._closed = True
        self._settle_sums()
        self._alive.clear()                   # drops the weak references and their callbacks

    def watch(self, category: str, tensors: Mapping[str, Any] | Iterable[Any]) -> None:
        """Enter tensors that exist already. Names of a mapping give each one's module."""
        if category not in CATEGORIES:
            raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
        named = tensors.items() if isinstance(tensors, Mapping) else (("", t) for t in tensors)
        for name, value in named:
            for t in leaves(value):
                known = self._lookup(t)
                if known is not None:
                    known.category = known.category or category
                else:
                    self._enter(t, name.rpartition(".")[0], self._idle, category)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                          # spares every operator two wrapper frames

    # -- the mode ---------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if func is _DEVICE and hasattr(args[0], "fake_device"):
            return args[0].fake_device        # asked a dozen times per operator under fake tensors
        if self.shares and any(hasattr(t, "full_tensor") for t in types):
            return NotImplemented             # what is done to this process's own part is seen
        if self._let_go:
            self._give_time()
        out = self.call(func, args, kwargs or {})
        self.now += 1
        phase: str | None = None
        module = ""
        for t in leaves(out):
            storage = t.untyped_storage()
            watch = self._alive.get(storage._cdata)
            if watch is not None and watch.entry.bytes == storage.nbytes():
                continue
            if phase is None:
                phase = self._phase()
                module = self._module(phase)
                if not self.phases or self.phases[-1][0] != phase:
                    self.phases.append((phase, self.now))
            if watch is not None:             # resized in place
                watch.entry.death = self.now
                del self._alive[watch.key]
            found = watch is None and func is not LIFT and aliases(func)
            if found and self.now == self._collective + 1:
                continue                      # what it made inside itself, as it is let go
            # a view of something nobody watched: it was there before
            self._enter(t, "" if found else module, "load" if found else str(phase),
                        "weights" if found else (watch.entry.category if watch else None),
                        birth=0 if found else self.now)
        if func is _ADD:
            self._note_sum(args, kwargs)
        elif func.overloadpacket in INSIDE:
            here = args[0].device.type
            if (takes := scratch(func, self.machine or here)) is not None:
                self.transient(takes(args, out), here)
        elif self._unopened and func.overloadpacket in PRODUCTS:
            self._open_library(args[0].device.type)
        if self.together:
            self._said(func, args)
        if self.count:
            self._count(func, args, kwargs, out, phase)
        return out

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the operator; a subclass may know more about its values."""
        return func(*args, **kwargs)

    def reserve(self, category: str, nbytes: int, module: str = "", device: str = "cpu") -> None:
        """Enter bytes that exist for the whole block without being a tensor here."""
        self.entries.append(Entry(nbytes, self.now, module, self._idle, category, device))

    def transient(self, nbytes: int, device: str = "cpu") -> None:
        """Enter bytes that live at the present event only."""
        phase = self._phase()
        entry = Entry(nbytes, self.now, self._module(phase), phase, "temporary", device)
        entry.death = self.now + 1
        self.entries.append(entry)

    def _open_library(self, here: str) -> None:
        """A thread's first product gives its library a workspace, for good."""
        thread = torch._C._current_graph_task_id() != -1
        if thread in self._unopened:
            self._unopened.remove(thread)
            if nbytes := workspace(self.machine or here):
                self.entries.append(Entry(nbytes, self.now, "", self._phase(), "temporary", here))

    def reset_counts(self) -> None:
        """Count operations and traffic from here on."""
        self.flops: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.half: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.traffic: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.swept: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.launches: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def _enter(self, t: Tensor, module: str, phase: str, category: str | None,
               birth: int | None = None) -> None:
        storage = t.untyped_storage()
        nbytes = storage.nbytes()
        if not nbytes:
            return
        watch = Watch(storage, self._died)
        watch.key = storage._cdata
        watch.entry = Entry(nbytes, self.now if birth is None else birth, module, phase,
                            category, str(t.device.type))
        self._alive[watch.key] = watch
        self.entries.append(watch.entry)

    def _died(self, watch: Watch) -> None:
        if self._closed:
            return
        watch.entry.death = self.now + 1
        if self._alive.get(watch.key) is watch:
            del self._alive[watch.key]

    def _lookup(self, t: Tensor) -> Entry | None:
        watch = self._alive.get(t.untyped_storage()._cdata)
        return watch.entry if watch is not None else None

    # -- where we are -------------------------------------------------------------------------
    def _phase(self) -> str:
        if self._updating:
            return "update"
        if torch._C._current_graph_task_id() != -1:
            if not self._in_backward:
                self._in_backward = True
                self.backward_starts.append(self.now)
            self._idle = "update"
            return "backward"
        if self._stack:
            return "forward"
        return self._idle

    def _module(self, phase: str) -> str:
        if self._stack:                       # in forward, or recomputing inside backward
            return self._stack[-1]
        if phase == "backward":
            node = torch._C._current_autograd_node()
            seq = -1 if node is None else node._sequence_nr()
            # gradient accumulation and graphs built inside backward keep the module they serve
            if 0 <= seq < self._seqs[-1]:
                self._module_in_backward = self._seq_modules[bisect_right(self._seqs, seq) - 1]
            return self._module_in_backward
        return ""

    def _mark(self, module: str) -> None:
        # nodes are numbered as forward creates them, so a module owns a run of numbers
        if torch._C._current_graph_task_id() == -1 and threading.get_ident() == self._thread:
            self._seqs.append(torch.autograd._get_sequence_nr())
            self._seq_modules.append(module)

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        if not self._stack and torch._C._current_graph_task_id() == -1:
            self._in_backward = False
            self.forward_starts.append(self.now)
            if self.model is not None:
                self._follow_gradients(self.model.parameters())
        parent = self._stack[-1] if self._stack else ""
        self._stack.append(self._paths.get(id(module), parent))
        if self.shares:
            self._gathered(module)
        self._mark(self._stack[-1])

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._mark(self._stack[-1] if self._stack else "")
        if not self._stack and torch._C._current_graph_task_id() == -1:
            self._idle = "loss"

    # -- gradients and optimizer state ----------------------------------------------------------
    def _follow_gradients(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            if p.grad is not None:
                self.watch("gradients", [p.grad])
            known = self._hooked.get(id(p))
            if p.requires_grad and p.is_leaf and (known is None or known() is not p):
                ref = self._hooked[id(p)] = weakref.ref(p)
                self._handles.append(p.register_hook(lambda g, ref=ref: self._arrives(ref(), g)))
                self._handles.append(p.register_post_accumulate_grad_hook(self._arrived))

    def _arrives(self, p: Tensor | None, g: Tensor) -> None:
        # seen before hooks that step inside backward take it away again
        if p is not None and p.grad is None:
            self._tag(g, "gradients")

    def _arrived(self, p: Tensor) -> None:
        if p.grad is not None:
            self._tag(p.grad, "gradients")

    def _tag(self, value: Any, category: str, module: str | None = None) -> None:
        for t in leaves(value):
            entry = self._lookup(t)
            if entry is not None and entry.category != "weights":
                entry.category = category
                entry.module = entry.module if module is None else module

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._updating += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if isinstance(p, Tensor) and p.grad is not None:
                    self._tag(p.grad, "gradients")
                    self._wait_on_host([p.grad])

    def _after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._updating = max(0, self._updating - 1)
        self._idle = "update"
        for key, state in list(optimizer.state.items()):
            self._tag(state, "optimizer", self._owners.get(id(key)))
            self._wait_on_host(state.values())

    # -- sums of gradients ------------------------------------------------------------------------
    def _note_sum(self, args: tuple, kwargs: dict | None) -> None:
        """Where two gradients meet the engine adds in place, but not while a mode watches it."""
        if (torch._C._current_graph_task_id() == -1 or kwargs or len(args) != 2
                or not called_by_engine()):
            return
        entry = self._lookup(args[0])
        if entry is not None and entry.category is None and entry.phase == "backward":
            self._donors.append((self.now, entry))

    def _settle_sums(self) -> None:
        # the first addend died with the sum: without the mode it would have become the sum
        for event, entry in self._donors:
            if entry.death == event + 1:
                entry.death = event

    # -- arithmetic ---------------------------------------------------------------------------
    def _count(self, func: Any, args: tuple, kwargs: dict | None, out: Any,
               phase: str | None) -> None:
        if aliases(func) and not mutates(func):
            return
        phase = phase or self._phase()
        operations, moved, itemsize, where, crosses = self.cost(func, args, kwargs or {}, out)
        self.flops[phase] += operations
        self.traffic[phase] += moved
        self.launches[phase] += 1
        if not operations:
            self.swept[phase] += moved
        elif itemsize <= 2:
            self.half[phase] += operations
        speed = machine(self.machine or where)
        self.seconds[phase] += speed.seconds(operations, moved, itemsize, crosses)

    def cost(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """As operators.cost; a subclass may know it already."""
        return cost(func, args, kwargs, out)

    # -- read afterwards --------------------------------------------------------------------------
    def category(self, entry: Entry) -> str:
        """What a storage was for. Weights, gradients and optimizer state were told; what forward
        leaves behind for backward is activations; what an update leaves behind is state."""
        if entry.category is not None:
            return entry.category
        if entry.phase in ("forward", "loss"):
            k = bisect_right(self.backward_starts, entry.birth)
            if k < len(self.backward_starts):
                start = self.backward_starts[k]
                if entry.death is None or entry.death > start:
                    return "activations"
        elif entry.phase == "update":
            k = bisect_right(self.forward_starts, entry.birth)
            end = self.forward_starts[k] if k < len(self.forward_starts) else self.now
            if entry.death is None or entry.death > end + 1:
                return "optimizer"
        return "temporary"

    def lived(self, since: int = 0) -> Iterator[tuple[Entry, str, int, int]]:
        """(entry, category, first event, one past the last event) from event `since` on."""
        end = self.now + 1
        for e in self.entries:
            death = end if e.death is None else min(e.death, end)
            if death > max(since, e.birth):
                yield e, self.category(e), max(since, e.birth), death
