"""PEFT's types besides LoRA: how a module's tensors and settings are those of a burnish method.

A :class:`Form` is one row of the table in peft_forms.py: names, dimensions and settings, and how
values change their shape where the two sides hold the same numbers in another order. Reading knows
the file alone; what needs the sizes of a matrix happens in :meth:`Form.values`, which has the term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.weight.term import Term, Wrap
from ..core.errors import FormatError
from ..core.method import Method

if TYPE_CHECKING:
    from ..core.anatomy import Anatomy

#: the bias of a layer that PEFT wraps
BIAS = ".base_layer.bias"
#: under which a form finds the module's path among the settings it is given
HERE = "its module"
Tensors = dict[str, Tensor]
Layer = type[nn.Module]


class Held(NamedTuple):
    """One of PEFT's tensors: which of the term's it is, the dimensions that it may have, and
    whether it is of whole numbers."""

    name: str
    dims: tuple[int, ...] = (2,)
    whole: bool = False


class Said(NamedTuple):
    """One of PEFT's settings: the method's (None: it has none), what it is (see core/reading.py),
    and PEFT's default."""

    ours: str | None
    kind: str
    default: Any


@dataclass
class Own:
    """One module: its tensors as PEFT names them, the burnish method that computes it with its
    settings, and what is settled for this place; what they add to its outputs beside, (out,)."""

    method: str
    settings: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    settled: dict[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    form: Any = None
    shift: Tensor | None = None


class Form:
    """One of PEFT's types and the method that is the same function.

    layers: the layers that PEFT has it for; gpt2: GPT-2's Conv1D too.
    beside: tensors that all modules read -> the method's shared ones.
    alone: settings without counterpart, with the value at which they say nothing.
    patterned: settings that PEFT can give module by module -> where it does; named: by whole names
    there, not by patterns.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    terms: ClassVar[tuple[type[nn.Module], ...]]
    tensors: ClassVar[dict[str, Held]]
    settings: ClassVar[dict[str, Said]]
    beside: ClassVar[dict[str, Held]] = {}
    alone: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[Layer, ...]] = (nn.Linear,)
    gpt2: ClassVar[bool] = False
    #: do all modules read something beside them? bare: may a module have no tensor of its own?
    shares: ClassVar[bool] = False
    bare: ClassVar[bool] = False
    patterned: ClassVar[dict[str, str]] = {}
    named: ClassVar[bool] = False
    #: may a module have several terms of one part? They are given as a tuple then
    several: ClassVar[bool] = False
    #: may an update of this type also be written as the low-rank pair that it is?
    pairs: ClassVar[bool] = False
    #: does it change the weights of plain layers?
    plain: ClassVar[bool] = True
    #: may it move the biases of its layers? A shift of their outputs stands beside the method then
    shifts: ClassVar[bool] = False

    @property
    def fields(self) -> dict[str, str]:
        """What the settings that are read should be."""
        return {n: s.kind for n, s in self.settings.items()}

    # -- out ------------------------------------------------------------------------------------
    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        """(a module's tensors as PEFT names them, its settings). Raises FormatError."""
        state, said = term.state_dict(), method.settings()
        return ({leaf: state[held.name] for leaf, held in self.tensors.items()},
                {name: said[s.ours] if s.ours else s.default for name, s in self.settings.items()}
                | self.alone | {"init_weights": True})

    def give_beside(self, shared: nn.Module, whole: Any) -> tuple[Tensors, dict[str, Any]]:
        """(what stands beside the modules, settings that say so)."""
        return {leaf: getattr(shared, held.name).detach() for leaf, held in self.beside.items()}, {}

    def check_all(self, terms: list[Any]) -> None:
        """Raises FormatError for terms that PEFT could not have together."""

    def check_found(self, modules: Mapping[str, nn.Module], terms: list[Any], method: Method
                    ) -> None:
        """Raises FormatError for modules that PEFT would find something else in."""

    def give_shifts(self, owns: Mapping[str, Own], shifts: Mapping[str, Tensor],
                    modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Write what is added to the outputs of some modules into their tensors; the settings that
        say so. Raises FormatError."""
        raise NotImplementedError

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of all modules together, as PEFT is told them."""
        return settings

    def check_layer(self, module: nn.Module, path: str) -> None:
        """Raises FormatError for a layer that PEFT has no such update for."""
        conv1d = type(module).__name__ == "Conv1D"
        if not (self.gpt2 if conv1d else isinstance(module, self.layers)):
            added = issubclass(self.terms[0], Term) and not issubclass(self.terms[0], Wrap)
            lora = "" if not added else \
                "export_peft(..., rank=16) writes the best LoRA of that rank, or "
            raise FormatError(f"{path}: PEFT's {self.kind} has no form for a "
                              f"{type(module).__name__}; {lora}merge instead")

    # -- in -------------------------------------------------------------------------------------
    def stands_beside(self, names: Iterable[str]) -> Mapping[str, Held]:
        """Which of these tensors stand beside the modules: by default those of `beside`."""
        return self.beside

    def take(self, tensors: Tensors, config: Mapping[str, Any], where: str) -> Own:
        """A module as a file says it: what needs no matrix. Raises FormatError."""
        for name, idle in self.alone.items():
            if (value := config.get(name)) not in (None, idle):
                raise FormatError(f"{where}: {name} = {value!r} has no counterpart in burnish")
        for leaf, t in tensors.items():
            if t.dim() not in self.tensors[leaf].dims or not (t.numel() or self.pairs):
                raise FormatError(f"{where}: {leaf} is {t.dtype} {list(t.shape)}; expected "
                                  f"{' or '.join(map(str, self.tensors[leaf].dims))} dimensions")
            if not t.is_floating_point() and "_indices" not in leaf:
                raise FormatError(f"{where}: {leaf} is {t.dtype} {list(t.shape)}; expected numbers "
                                  "of floating point")
        said = {n: s.default if config.get(n) is None else config[n]
                for n, s in self.settings.items()}
        own = Own(self.method, {s.ours: said[n] for n, s in self.settings.items() if s.ours},
                  tensors, said=said, form=self)
        self.adjust(own, config, where)
        return own

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        """Settings that are more than another name. Raises FormatError."""

    def all_read(self, owns: Mapping[str, Own], config: Mapping[str, Any]) -> None:
        """What settings depend on all modules together."""

    def aim(self, anatomy: Anatomy, paths: list[str]) -> dict[str, Any] | None:
        """Settings that say where a part with these modules stands, if not targets do. Raises
        FormatError."""
        return None

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        """The term's own tensors of a module's. A KeyError names what is missing."""
        return {held.name: own.tensors[leaf] for leaf, held in self.tensors.items()}

    def shift_of(self, own: Own, module: nn.Module) -> Tensor | None:
        """What a module's tensors add to its outputs, (out,); None: nothing ever. A KeyError names
        what is missing."""
        return None

    def values_beside(self, tensors: Tensors, shared: nn.Module) -> Tensors:
        """The shared tensors, by the method's names."""
        return {held.name: tensors[leaf] for leaf, held in self.beside.items()}

    def draw(self, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Tensors:
        """What a file need not hold, since PEFT draws it again."""
        return {}


def plain_bias(name: str) -> str | None:
    """A name as it is in the model, where PEFT saved biases; None: of a module saved whole, once
    more."""
    if name.endswith((".modules_to_save.bias", ".original_module.bias")):
        return None
    return f"{name.removesuffix(BIAS)}.bias" if name.endswith(BIAS) else name


def sort_out(form: Form, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensors], Tensors]:
    """(module -> its tensors, tensors that are no adapter's)."""
    found: dict[str, Tensors] = {}
    rest: Tensors = {}
    for name, value in tensors.items():
        leaf = next((n for n in form.tensors if name.endswith(f".{n}")), None)
        if leaf is None:
            rest[name] = value
        else:
            found.setdefault(name.removesuffix(f".{leaf}"), {})[leaf] = value
    return found, rest


@torch.no_grad()
def asked(where: str, ask: Any, *args: Any) -> Any:
    """What a form answers of a file's tensors; whatever they lack is a FormatError."""
    try:
        return ask(*args)
    except KeyError as e:
        raise FormatError(f"{where} lacks {e.args[0]}") from None
    except RuntimeError as e:
        raise FormatError(f"{where} has tensors of other shapes than this model needs "
                          f"({str(e).splitlines()[0]})") from None


@torch.no_grad()
def fill(own: Own, term: nn.Module, module: nn.Module, put: Any, where: str) -> None:
    """Give a term the values of a file. put: copies one tensor, and refuses another shape."""
    values = asked(where, own.form.values, own, term, module)
    for name, there in term.state_dict(keep_vars=True).items():
        if name not in values:
            raise FormatError(f"{where} has no {name}, the model needs {list(there.shape)}")
        put(there, values[name], f"{where}.{name}")
