from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.state.another import beside
from ...blocks.state.style import Mean, alike, clean, noisy, nothing, sample_of
from ...blocks.weight.factor import Chain
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.stage import Stage
from .distill import divergence
from .feature_distill import apart, state

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned

_ALONE = "a fresh model has no style before it: tests/methods/test_museum_maker.py"
_NOISED = "it is of a denoiser's batches: tests/methods/test_museum_maker.py"


@dataclass(frozen=True, kw_only=True)
class MuseumMaker(Method):
    """MuseumMaker: a denoiser learns one style after the other in a shared LoRA, and keeps those
    that it has learnt.

        loss + style T^2 mean_b a_b KL(softmax(m / T) || softmax(x_b / T))
             + weight mean_places (1 - cos(B A, B' A'))
             + feature mean_blocks mean (f - f')^2

    m (C, H, W) is the mean latent of this style's pictures, a_b in [0, 1] what is left of the
    picture in a sample (``signal`` in the batch: abar_t, of a flow 1 - s_t), x_b the clean latent
    that the model's answer implies, softmax over all its entries: what the pictures have in common
    is learnt rather than what each shows. A', B' are the LoRA as the last style left it, f the
    states after each block and f' those under A', B' on the same batch, without gradients. Written
    beside a low-rank delta, and with the styles' tokens where a table of the model has them:
    ``lora(rank=8) + trainable_tokens(ids=(0, 1, 2)) + museum_maker``. Several data sets are styles,
    each in an adapter that begins as the one before it ends; the last one answers for all. The
    first has nothing before it: without ``signal`` it is learnt by the loss alone.

    Start: the LoRA's own. Trains nothing itself. Held: (C, H, W) sums and each style's factors;
    a forward more from the second style on, and its states until backward. Merges as the LoRA.

    When to use: styles that come one by one, whose pictures are not kept. When not: where they can
    be learnt together, or each may have an adapter (``tuned.use`` by name).
    Departures: m is the least-squares mean of what the run has noised, ``sum sqrt(a) x_t / sum a``
    (unbiased; no pass over the data). Unconfirmed: x_b and not the noise is compared, over entries
    and weighed by a; the cosine is of the whole update with the last style's; f' is of this batch;
    tokens are rows of a table and not one a cross-attention; every default.
    """

    paper: ClassVar[str] = ("MuseumMaker: Continual Style Customization without Catastrophic "
                            "Forgetting (2024), arXiv:2404.16612")
    tier: ClassVar[str] = "from the text"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    context: ClassVar[dict[str, Key]] = {
        "signal": Key("share of the picture that is left in a noisy sample", real=True,
                      training=True, optional=True)}
    sees_run: ClassVar[bool] = True
    shown_beside: ClassVar[str] = "lora(rank=2)"
    excused: ClassVar[dict[str, str]] = {
        "beside_a_partner_it_acts":
            "by chance: with no style before it, it holds the states after each block and no more, "
            "which most models hold anyhow; tests/methods/test_museum_maker.py"}

    style: float = setting(0.1, "factor of the distance to the mean latent", unseen=_NOISED)
    temperature: float = setting(2.0, "T, softens both distributions", alias=("T",), above=0.0,
                                 unseen=_NOISED)
    tells: Literal["epsilon", "v_prediction", "sample", "flow"] = setting(
        "epsilon", "what the denoiser answers", unseen=_NOISED)
    weight: float = setting(1.0, "factor of the update's turn", unseen=_ALONE)
    feature: float = setting(1.0, "factor of the states' distances", unseen=_ALONE)

    def __post_init__(self) -> None:
        if self.style == self.weight == self.feature == 0:
            raise RecipeError("museum_maker: one of style, weight and feature above 0 is "
                              "expected, for there is nothing to minimise else")

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(b.path for b in anatomy.blocks) if self.feature else ()

    def controller(self, tuned: Tuned) -> Mean:
        if next(tuned.terms(Chain), None) is None:
            raise RecipeError(f"museum_maker turns low-rank updates B A, and {tuned.recipe} has "
                              "none: lora(rank=8) + museum_maker")
        return Mean()

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        yield nothing(run.outputs)                       # a first style may have no other term
        signal = run.given.get("signal")
        if signal is not None and self.style:
            yield self.style * self._style(tuned, run, signal)
        before = self.before(tuned)
        if before is None:
            return
        if self.weight:
            old = dict(tuned.terms(Chain, before))
            turned = [1 - alike(t.factors(), tuple(f.detach() for f in old[place].factors()))
                      for place, t in tuned.terms(Chain) if place in old]
            yield self.weight * torch.stack(turned).mean()
        if self.feature:
            theirs = run.reference_taps(before)
            yield self.feature * torch.stack([apart(state(run.taps[p]), state(theirs[p]))
                                              for p in self.taps(tuned.anatomy)]).mean()

    def _style(self, tuned: Tuned, run: Any, signal: Any) -> Tensor:
        out = sample_of(run.outputs)
        x_t = noisy(run.batch, out)
        a = torch.as_tensor(signal).to(x_t).expand(len(x_t))
        handler = next(h for _, h in tuned.timeline.handlers if isinstance(h, Mean))
        m = handler.with_these(x_t, a, self.tells, tuned.steps.still)
        x = clean(x_t, out[:, :x_t.shape[1]], a, self.tells)
        off = [divergence(row.flatten(), m.flatten().to(row), self.temperature) for row in x]
        return (a.to(off[0]) * torch.stack(off)).mean()

    def before(self, tuned: Tuned) -> str | None:
        """The adapter of the style before the one that trains."""
        mine = [n for n, a in tuned.adapters.items() if self.name in {m.name for m in a.recipe}]
        at = mine.index(tuned.training)
        return mine[at - 1] if at else None

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        """A style after the other, each in an adapter that begins where the last one ended."""
        for i, task in enumerate(tasks):
            then = partial(self.hand_on, name=tasks[i + 1]) if i + 1 < len(tasks) else None
            yield Stage(task, tuned.recipe, data=task, then=then)

    def hand_on(self, tuned: Any, name: str) -> None:
        """An adapter for the next style, with all the values that this one has."""
        beside(tuned, self, name, [(self, {})])
