"""Every optimizer as a sentence: ``subspace x rule x residual x codec x rounding x step site``.

Each part of a recipe that answers the optimizer question returns either an innermost rule
(:class:`Inner`, or a plain rule) or a :class:`Wrapper` of rules. :func:`compose` folds the answers
into a :class:`Plan`, in recipe order, and makes the optimizer that carries it out:

    []                                   AdamW of torch, fused
    [Inner(AdamW(), "8bit")]             8-bit Adam
    [Subspace(...), Inner(AdamW())]      GaLore
    [Subspace(...), InBackward()]        GaLore, tensor by tensor inside backward
    [Rounding("stochastic")]             AdamW whose bf16 weights lose no update on average
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError, nearest
from ...core.words import honours, why
from .clip import check_norm, clip_norm_
from .codecs import Plain, codec
from .groups import param_groups
from .natural import Natural
from .plan import ROUNDINGS, Plan, RoundingKind, check_shape
from .residual import Residual, Scaled, residual
from .rota import Rota
from .rules import FUSED, SGD, AdamW, Rule, Whole
from .subspace import PICKED, AtRefresh, SubspaceMap

#: a weight of a repeated block has a number in its path; embeddings and biases are not projected
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_LINEAR = re.compile(r"embed|wte|wpe|position|relative|bias_table|(^|\.)(lm_head|classifier)\.")


def in_block(name: str) -> bool:
    """By name alone: inside a numbered module, and not an embedding or a head. For models whose
    blocks nobody has looked for."""
    return bool(_IN_BLOCK.search(name)) and not _NOT_LINEAR.search(name)


def short_side(p: Tensor) -> int:
    """The shorter side of a tensor as an (out, rest) matrix; 0 where it is empty."""
    return min(p.shape[0], math.prod(p.shape[1:]))


def block_matrices(rank: int, inside: Callable[[str], bool] = in_block
                   ) -> Callable[[str, Tensor], bool]:
    """The weights of linears and convolutions inside blocks whose short side exceeds `rank`
    (below that a subspace costs more than it saves). Embeddings, heads, norms, biases: no."""
    def where(name: str, p: Tensor) -> bool:
        return p.dim() >= 2 and short_side(p) > rank and inside(name)
    return where


def matching(targets: str | Iterable[str]) -> Callable[[str, Tensor], bool]:
    """Matrices whose name fits one of the comma-separated words: a part of the dotted path
    (``q_proj``) or a glob over all of it (``*.layers.3.*``)."""
    items = targets.split(",") if isinstance(targets, str) else \
        [w for t in targets for w in t.split(",")]
    words = [w.strip() for w in items if w.strip()]

    def where(name: str, p: Tensor) -> bool:
        return p.dim() >= 2 and any(w in name.split(".") or fnmatch(name, w) for w in words)
    return where


@runtime_checkable
class Wrapper(Protocol):
    """Changes one word of the plan."""

    name: str
    #: what it decides, for own steps that may not honour it (core/words.py)
    word: ClassVar[str]

    def wrap(self, plan: Plan) -> Plan: ...


@dataclass(frozen=True, kw_only=True)
class Inner:
    """An innermost rule, the codec of its state, and the name its method has in recipes."""

    rule: Rule
    state: str = "fp32"
    name: str = ""

    @property
    def hides(self) -> frozenset[str]:
        plain = self.state == "fp32" and not isinstance(self.rule, Whole)
        return frozenset() if plain else frozenset({"resize"})

    @property
    def why(self) -> Mapping[str, str]:
        return {"resize": "state is held in codes or sums, which have lost the tensor's shape"}


@runtime_checkable
class Builder(Protocol):
    """An innermost answer that is an optimizer of its own kind (zeroth-order methods).

    `honours` names the words of other parts that it carries out (core/words.py); the rest is
    refused, so an own step that declares nothing stands alone.
    """

    name: str

    def build(self, groups: list[dict[str, Any]], plan: Plan, seed: int,
              accumulation: int) -> torch.optim.Optimizer: ...

    def hyper(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Run the rule on the gradient's image in a subspace, and step the weight with what comes back.

        W <- W - lr (scale back(u(R)) + residual)        then decay

    every: updates between refreshes of the basis; each tensor counts its own, from its first.
    at_refresh: of the moments ("keep" is GaLore's; "restart": zero, and updates count from there).
    decay_first: decay acts on the weight before the step, as in AdamW, instead of behind it.
    rota: instead of a map, which of the covered matrices have moments in each period (rota.py).
    image: what R goes through before the rule (natural.py).
    residual: what the part outside the subspace, G - back(R), adds: "none"; "sgd" itself; "sign"
        its sign; "scaled" itself times ||u_j|| / ||R_j|| per channel j of the long side, its norm
        growing by at most `limit` per step. Times `residual_scale`. Or an object (residual.py).
    where: (name, parameter) -> projected? The others take the same rule directly.
    default: the rule if the recipe names none.
    in_backward: also step inside backward, where projected gradients accumulate in R.
    """

    word: ClassVar[str] = "subspace"

    map: SubspaceMap
    every: int = 200
    scale: float = 1.0
    at_refresh: AtRefresh = "keep"
    residual: Literal["none", "sgd", "sign", "scaled"] | Residual = "none"
    residual_scale: float = 1.0
    limit: float = 1.01
    where: Callable[[str, Tensor], bool] | None = None
    eps_first: bool = False
    default: Rule | None = None
    in_backward: bool = False
    decay_first: bool = False
    rota: Rota | None = None
    image: Natural | None = None
    name: str = "subspace"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"{self.name}: every is at least 1, got {self.every}")
        if self.map.side == "full" and isinstance(self.beside, Scaled):
            raise RecipeError(f"{self.name}: a scaled residual needs a one-sided subspace")
        if self.rota is not None and self.at_refresh != "restart":
            raise RecipeError(f"{self.name}: a matrix whose turn comes has no moments to go on "
                              "with; at_refresh is restart")
        if self.at_refresh == "rotate" and self.map.kind in (*PICKED, "gaussian"):
            raise RecipeError(f"{self.name}: rotating moments needs orthonormal factors, which a "
                              f"{self.map.kind} subspace has not; use keep or reset")

    def wrap(self, plan: Plan) -> Plan:
        rule = plan.rule
        if self.eps_first and isinstance(rule, AdamW):
            rule = dataclasses.replace(rule, eps_first=True)
        plan = plan.say("subspace", self.name, subspace=self, rule=rule)
        return InBackward(name=self.name).wrap(plan) if self.in_backward else plan

    @property
    def beside(self) -> Residual | None:
        """What is added to back(N)."""
        return residual(self.residual, self.residual_scale, self.limit)

    @property
    def hides(self) -> frozenset[str]:
        return frozenset({"resize"}) | (InBackward.hides if self.in_backward else frozenset())

    @property
    def why(self) -> Mapping[str, str]:
        return {**InBackward.why, "resize": "state lies in a projection of the tensor"}

    def covers(self, name: str, p: Tensor) -> bool:
        if p.dim() < 2:
            return False
        return (self.where or block_matrices(self.map.rank))(name, p)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes beside a tensor that is covered (by default, a matrix of a block whose short side
        exceeds the rank): what is stored of the basis and Adam's two moments of the shape of R;
        two moments of its own shape beside others. Scalars are left out."""
        wide, n = max(itemsize, 4), math.prod(shape)
        rest = n // max(shape[0], 1) if len(shape) > 1 else 0
        if len(shape) < 2 or self.where is None and min(shape[0], rest) <= self.map.rank:
            return 2 * wide * n
        R = self.map.shape(shape[0], rest)
        more = 2 * math.prod(R) + (self.image.numbers(R) if self.image is not None else 0)
        return self.map.bytes(shape[0], rest, itemsize) + wide * more


@dataclass(frozen=True, kw_only=True)
class InBackward:
    """Step each tensor inside backward, as soon as its gradient is complete, and free it.

    clip_value: largest entry of a gradient (clip.py); 0: any.
    """

    word: ClassVar[str] = "step site"
    hides: ClassVar[frozenset[str]] = frozenset({"gradients", "around_step"})
    why: ClassVar[Mapping[str, str]] = {
        "gradients": "a step inside backward frees each gradient at once",
        "around_step": "tensors are stepped inside backward, so nothing can be undone after it"}

    name: str = "step_in_backward"
    clip_value: float = 0.0

    def wrap(self, plan: Plan) -> Plan:
        if plan.in_backward:                    # galore(in_backward=True) + step_in_backward agree
            return dataclasses.replace(plan, clip_value=self.clip_value or plan.clip_value)
        return plan.say("step site", self.name, in_backward=True, clip_value=self.clip_value)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the fp32 result of a step becomes a half-precision weight.

    nearest: +0 bytes; changes below half a spacing are lost.  stochastic: +0, right on average,
    bf16 only.  master: +4, exact.  kahan: +2, deterministic, about 16 bits in all.
    """

    word: ClassVar[str] = "rounding"

    kind: RoundingKind
    name: str = "rounding"

    def __post_init__(self) -> None:
        if self.kind not in ROUNDINGS:
            raise RecipeError(f"no rounding {self.kind!r}{nearest(self.kind, ROUNDINGS)}; "
                              f"there are {', '.join(ROUNDINGS)}")

    def wrap(self, plan: Plan) -> Plan:
        return plan.say("rounding", self.name, rounding=self.kind)


def compose(answers: Iterable[Any], named_parameters: Iterable[tuple[str, nn.Parameter]],
            lr: float, *, seed: int = 0, accumulation: int = 1,
            max_grad_norm: float | None = None, scaler: Any = None,
            inside: Callable[[str], bool] | None = None,
            outputs: Mapping[str, Any] | None = None, width: int | None = None,
            **hyper: Any) -> torch.optim.Optimizer:
    """The optimizer a recipe names.

    answers: what each part's ``optimizer()`` returned, in recipe order; None is skipped.
    named_parameters: everything that may ever train (also what a schedule has frozen for now).
        A parameter may carry ``burnish_lr`` (multiplies lr) and ``burnish_decay`` (False: none).
    seed: of stochastic rounding and drawn subspaces.  accumulation: backward passes per update.
    max_grad_norm: the gradients of an update are cut to this norm, all together; a step inside
        backward learns it in a pass of its own (clip.py).  scaler: only checked.
    inside: is a weight of this name a matrix of a repeated block? None goes by the name's look.
    outputs: name -> groups of a matrix's outputs, for rules that tell them apart (core/groups.py).
    width: of the model's states, for learning rates that follow it.
    hyper: replaces hyperparameters of the innermost rule (betas, eps, weight_decay, momentum...).
    """
    inner, wrappers = _answers(answers)
    builder = inner if isinstance(inner, Builder) else None
    defaults = (builder or inner.rule).hyper()
    if unknown := set(hyper) - set(defaults):
        word = sorted(unknown)[0]
        raise ConfigError(f"{_name(builder or inner)} has no hyperparameter {word!r}"
                          f"{nearest(word, defaults)} (it has {', '.join(defaults)})")
    if not builder:
        inner = dataclasses.replace(inner, rule=dataclasses.replace(inner.rule, **hyper))
    plan = _plan(inner, wrappers)
    if outputs is not None and hasattr(plan.rule, "outputs"):
        plan = dataclasses.replace(plan, rule=dataclasses.replace(plan.rule, outputs=outputs))
    if plan.subspace is not None and plan.subspace.where is None and inside is not None:
        where = block_matrices(plan.subspace.map.rank, inside)
        plan = dataclasses.replace(plan, subspace=dataclasses.replace(plan.subspace, where=where))

    named = list(named_parameters)
    if plan.subspace is not None and plan.subspace.rota is not None:
        plan = dataclasses.replace(plan, subspace=dataclasses.replace(
            plan.subspace, rota=plan.subspace.rota.among(named, plan.subspace.covers)))
    rates = None if plan.rates is None else plan.rates.on(width, inside or in_block)
    groups = param_groups(named, lr, {**defaults, **hyper}.get("weight_decay", 0.0), rates)
    norm = check_norm(max_grad_norm)
    check_loop(plan, accumulation=accumulation, max_grad_norm=norm, scaler=scaler is not None)
    for name, p in named:
        if plan.rounding == "stochastic" and p.dtype == torch.float16:
            raise RecipeError(f"stochastic rounding is for bf16, but {name} is fp16; "
                              "use rounding kind 'master' or bf16 weights")
    if builder:
        if norm:
            raise RecipeError(f"{builder.name} makes no gradient whose norm could be clipped "
                              f"(max_grad_norm={norm:g}); set max_grad_norm=0")
        for word, by in plan.names.items():
            if not honours(builder, word):
                raise RecipeError(f"{builder.name} and {by} cannot be joined: {why(builder, word)}")
        for g in groups:
            g.update({k: v for k, v in {**defaults, **hyper}.items() if k != "weight_decay"})
        return guarded(builder.build(groups, plan, seed, accumulation))
    if all(w.word == "groups" for w in wrappers) and isinstance(plan.codec, Plain):
        if native := _native(plan.rule, groups):
            return clipped(guarded(native), norm)
    from .composed import Composed
    made = Composed(groups, plan, seed=seed, accumulation=accumulation, max_grad_norm=norm)
    return made if plan.in_backward else clipped(made, norm)


def plan_of(answers: Iterable[Any]) -> Plan:
    """The sentence alone, without an optimizer."""
    return _plan(*_answers(answers))


def _answers(answers: Iterable[Any]) -> tuple[Any, list[Any]]:
    """(the innermost answer, an `Inner` or a `Builder`; the wrappers)."""
    inner, wrappers = _sort([a for a in answers if a is not None])
    if inner is None:
        inner = next((w.default for w in wrappers if getattr(w, "default", None)), AdamW())
    if not isinstance(inner, Inner | Builder):
        inner = Inner(rule=inner)
    if isinstance(inner, Inner) and not isinstance(inner.rule, Rule):
        raise RecipeError(f"an optimizer answer is a rule or a wrapper, not "
                          f"{type(inner.rule).__name__}")
    return inner, wrappers


def _plan(inner: Any, wrappers: list[Any]) -> Plan:
    plan = Plan(rule=AdamW()) if isinstance(inner, Builder) else \
        Plan(rule=inner.rule, codec=codec(inner.state))
    for wrapper in wrappers:
        plan = wrapper.wrap(plan)
    if isinstance(plan.rule, Whole) and plan.subspace is not None:
        raise RecipeError(f"{plan.names['subspace']} and {plan.rule.name} cannot be joined: "
                          f"{plan.rule.name} looks at whole tensors, a subspace steps an image; "
                          f"take {plan.names['subspace']} + adamw")
    if isinstance(plan.rule, Whole) and not isinstance(plan.codec, Plain):
        raise RecipeError(f"{plan.rule.name} looks at whole tensors and keeps its few numbers as "
                          "they are; it takes no coded state")
    return plan


def clipped(optimizer: torch.optim.Optimizer, norm: float) -> torch.optim.Optimizer:
    """The same optimizer; before it steps, all gradients together are cut to a norm (0: any)."""
    if norm:
        optimizer.register_step_pre_hook(lambda opt, *_: clip_norm_(opt, norm))
    return optimizer


def guarded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer; before it steps, shapes are compared with those its state was made for.

    A resized embedding keeps its Parameter. Stepped with the moments of its old shape, a fused
    kernel writes past their end.
    """
    shapes: dict[nn.Parameter, torch.Size] = {}
    optimizer.burnish_shapes = shapes                # a tensor that is resized rightly says so here

    def before(opt: torch.optim.Optimizer, *_: Any) -> None:
        for group in opt.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                check_shape(name, p, opt.state.get(p), shapes)

    def after(opt: torch.optim.Optimizer, *_: Any) -> None:
        for p in opt.state:
            shapes.setdefault(p, p.shape)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def check_loop(plan: Plan, *, accumulation: int = 1, max_grad_norm: float | None = None,
               scaler: bool = False) -> None:
    """Refuse a training loop that a step inside backward would silently train wrongly."""
    if accumulation < 1:
        raise ConfigError(f"accumulation is at least 1, got {accumulation}")
    if not plan.in_backward:
        return
    who = plan.names.get("step site", "step_in_backward")
    if accumulation > 1 and (max_grad_norm or plan.clip_value):
        what = f"max_grad_norm={max_grad_norm:g}" if max_grad_norm else \
            f"clip_value={plan.clip_value:g}"
        raise RecipeError(f"{who} cannot clip ({what}) over {accumulation} backward passes: the "
                          "whole gradient never exists there; use accumulation 1, or no clipping")
    if scaler:
        raise RecipeError(f"{who} cannot use a gradient scaler; train in bf16 or fp32")
    if accumulation > 1 and plan.transforms:
        raise RecipeError(f"{who} and {plan.transforms[0].name} cannot be joined over "
                          f"{accumulation} backward passes: {plan.transforms[0].name} changes the "
                          "whole gradient, which never exists there; use accumulation 1")
    if accumulation > 1 and (plan.subspace is None or plan.subspace.beside is not None):
        raise RecipeError(f"{who} steps in every backward, so gradients cannot accumulate over "
                          f"{accumulation}; use accumulation 1, or a subspace without residual "
                          "(galore), whose projected gradients do accumulate")


def _sort(answers: list[Any]) -> tuple[Any, list[Any]]:
    """(the innermost rule or None, the wrappers)."""
    inner = [a for a in answers if isinstance(a, Rule | Inner | Builder)]
    wrappers = [a for a in answers if isinstance(a, Wrapper)]
    if len(inner) > 1:
        raise RecipeError(f"{_name(inner[0])} and {_name(inner[1])} cannot be joined: both are "
                          "innermost rules, and one recipe has one")
    if rest := [a for a in answers if a not in inner and a not in wrappers]:
        raise RecipeError(f"an optimizer answer is a rule or a wrapper, not "
                          f"{type(rest[0]).__name__}")
    return (inner[0] if inner else None), wrappers


def _name(answer: Any) -> str:
    return answer.name or answer.rule.name


def _native(rule: Rule, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """Torch's own optimizer where it computes the same."""
    fused = all(p.device.type in FUSED for g in groups for _, p in g["params"])
    hyper = rule.hyper()
    hyper.pop("weight_decay", None)
    if isinstance(rule, AdamW) and not hyper.pop("eps_first"):
        return torch.optim.AdamW(groups, fused=fused, **hyper)
    if isinstance(rule, SGD):
        # tensor by tensor nothing is allocated; the fused form makes lists of temporaries
        return torch.optim.SGD(groups, foreach=False, **hyper)
    return None
