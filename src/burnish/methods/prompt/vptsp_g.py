from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.state.proxies import (
    CLASSES,
    Embedding,
    Normed,
    OfClass,
    Proxies,
    anchored,
    gathered,
)
from ...blocks.update.objective import loss_of
from ...core.errors import ConfigError, RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import head_linear, refuse, unmet
from ...core.processes import processes
from ..objective.distill import logits_of
from .vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class VptspG(Method):
    """VPTSP-G: embeddings by visual prompts, drawn to proxies that a second pass makes of classes.

    The model's answer becomes an embedding e (B, E), with E the outputs of its head: every block
    has `length` fresh rows (as ``vpt(deep=True)``), the head reads LN(x). While training, the same
    pictures run once more with `class_length` rows of their own class in every block in place of
    those; v of that pass, its own LN and linear, is of length 1. Each class reads its samples:

        h = c_y, then h <- GRU(v_i, h) for its samples i;  GRU with ReLU in place of tanh
        c_y <- h / ||h||,      pi_y = norm(bias_ratio b_y + (1 - bias_ratio) c_y)
        mean_y log(1 + sum_{i of y} exp(-sharpness (cos(e_i, pi_y) - margin)))
        + mean_y log(1 + sum_{i not of y} exp(sharpness (cos(e_i, pi_y) + margin)))

    over all C = `proxies` classes y. c (C, E) is state of the run, without a graph. It is minimised
    in place of the loss that the model returns of its labels, which counts `own_loss` times; a loss
    that is made outside (``loss=``) is minimised beside it. Classes are the batch's `class`, or
    `labels`. A model cannot return a loss of more classes than its head has outputs: give it
    `class` alone.

    Evaluation runs one pass and needs no class. A finished file holds the embedding's rows and LN
    alone, ``proxies=0``; nothing else can train with it. Samples of a class may stand anywhere in a
    batch (two of each are the authors'). Other parts of the recipe are in both passes: ``vptsp_g +
    bitfit`` is the authors'. ``resident=False``: rows of classes, their gradient and what the
    optimizer holds of them stay on the host; a batch takes its own.

    Start: rows Xavier-normal, b Xavier-uniform / 8, c Xavier-uniform of length 1: never the
    pre-trained function. Trains blocks (length + C class_length) d + 4 d + (d + 1) E + 6 E^2 +
    3 E + C E, and the head. Kept for backward: two passes. Not mergeable.

    Authors: SGD at 5e-3 (0.1 for b), weight decay 1e-6, 64 samples, 15 epochs. Of the code, not
    the text: means over all classes, also where a batch has none.
    """

    paper: ClassVar[str] = ("Learning Semantic Proxies from Visual Prompts for Parameter-Efficient "
                            "Fine-Tuning in Deep Metric Learning, ICLR 2024, arXiv:2402.02340")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"pictures", "logits"})
    context: ClassVar[Mapping[str, Key]] = {
        "class": Key("the class of each sample", below="proxies", training=True, optional=True)}
    relies_on: ClassVar[tuple[str, ...]] = ("gradients",)
    head_outputs: ClassVar[str] = "embedding"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    excused: ClassVar[Mapping[str, str]] = {
        "every_tensor_has_a_gradient": "its proxies are of a run, which begins with an optimizer: "
                                       "tests/methods/test_vptsp_g.py holds every gradient",
        "loss_falls": "by chance: another loss is minimised in place of the one that is told: "
                      "tests/methods/test_vptsp_g.py"}
    small: ClassVar[Mapping[str, Any]] = {"length": 3, "proxies": 5, "class_length": 2}

    length: int = setting(10, "rows of the embedding, in every block", alias=("num_prompt",))
    proxies: int = setting(2, "C, one a class; 0: embeddings alone, as a finished file has them")
    class_length: int = setting(3, "rows of a class, in every block", alias=("num_p_prompt",))
    bias_ratio: float = setting(0.5, "rho, what a proxy has of its trained row",
                                alias=("proxy_bias_ratio",))
    sharpness: float = setting(32.0, "of the loss, how far the hardest samples lead",
                               alias=("alpha",))
    margin: float = setting(0.1, "of the loss, in cosines")
    own_loss: float = setting(0.0, "weight of the loss that the model returns of its labels")
    resident: bool = setting(True, "rows of classes are where the model is; False: on the host",
                             unseen="where the model is on the host they are in one memory: "
                                    "tests/methods/test_vptsp_g.py")

    def __post_init__(self) -> None:
        if min(self.length, self.class_length) < 1 or self.proxies < 0 or self.proxies == 1 \
                or not 0 <= self.bias_ratio < 1 or not 0 < self.sharpness < float("inf") \
                or self.own_loss < 0:
            raise RecipeError("vptsp_g: rows of at least 1, two proxies or more (or 0), bias_ratio "
                              "from 0 and below 1, sharpness above 0 and own_loss of 0 or more "
                              f"are expected, got {self}")

    @property
    def sees_run(self) -> bool:                          # type: ignore[override]
        """Are there classes?"""
        return self.proxies > 0

    def forbids(self) -> dict[str, str]:
        return {"which tokens go on": "vptsp_g finds its tokens by their places"}

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.proxies else {}

    def prompt(self, anatomy: Anatomy) -> VptspG:
        if self.targets is not None:
            raise RecipeError("vptsp_g takes no targets: it stands in all blocks and at the head")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        blocks, head = anatomy.blocks, head_linear(anatomy)
        d = blocks[0].hidden_size
        after = special_tokens(anatomy.model, blocks[0].stack)
        for block in blocks:
            slot, device = attacher.slot(block.path), attacher.device(block.path)
            rows = torch.nn.init.xavier_normal_(torch.empty(1, self.length, d))[0]
            Embedding(state, name, self.length, rows, after=after, enter=True, leave=True).to(
                device).listen(slot, part.name)
            if self.proxies:
                own = torch.nn.init.xavier_normal_(torch.empty(self.proxies, self.class_length, d))
                OfClass(state, name, own, after=after, resident=self.resident).to(device).listen(
                    slot, f"{part.name}_class")
        slot, device = attacher.slot(head.path), attacher.device(head.path)
        Normed(state, name, head.inp).to(device).listen(slot, part.name)
        if self.proxies:
            Proxies(state, name, self.proxies, head.inp, head.out, attacher.adapter.seed).to(
                device).listen(slot, f"{part.name}_proxies")

    def controller(self, tuned: Tuned) -> Container | None:
        if not self.proxies:
            return None
        if processes() > 1:
            raise ConfigError("vptsp_g gathers classes over the whole batch, and each of "
                              f"{processes()} processes sees its own part: use one")
        return Container(self, tuned)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        if not self.proxies:
            return
        e = logits_of(run.outputs, self.name)
        labels = self.read(run, e, tuned.model.training)
        if labels is None:
            return
        v = logits_of(run.again(**{CLASSES: labels}), self.name)
        wide = torch.promote_types(v.dtype, torch.float32)
        holder = next(h for _, h in tuned.timeline.handlers if isinstance(h, Container))
        proxies = holder.proxies(F.normalize(v.to(wide), dim=1), labels)
        own = loss_of(run.outputs)
        made = anchored(e.to(wide), proxies, labels, self.sharpness, self.margin)
        yield made if own is None or self.own_loss == 1 else made + (self.own_loss - 1) * own

    def read(self, run: Any, e: Tensor, training: bool) -> Tensor | None:
        """The class of each sample; None in an evaluation that brings none."""
        labels = run.given.get("class")
        if labels is None and isinstance(run.batch, Mapping):
            labels = run.batch.get("labels")
        if labels is None and not training:
            return None
        if not isinstance(labels, Tensor) or labels.is_floating_point() or e.dim() != 2 \
                or labels.shape != e.shape[:1]:
            raise ConfigError("vptsp_g gathers samples by class: a batch has `class` or `labels`, "
                              "one class a sample")
        if int(labels.min()) < 0 or int(labels.max()) >= self.proxies:
            raise ConfigError(f"vptsp_g(proxies={self.proxies}): classes from 0 to "
                              f"{self.proxies - 1} are expected, and the batch has "
                              f"{int(labels.min())} to {int(labels.max())}")
        return labels.to(e.device)

    def finished(self) -> VptspG:
        return replace(self, proxies=0)

    def count(self, d: int, blocks: int, embed: int) -> int:
        """Trainable parameters at width d, the model's own head left out."""
        made = 2 * d + (d + 1) * embed + 6 * embed**2 + 3 * embed + self.proxies * embed
        rows = self.length + self.proxies * self.class_length
        return blocks * rows * d + 2 * d + (made if self.proxies else 0)


class Container:
    """Holds c, and makes proxies of it."""

    def __init__(self, method: VptspG, tuned: Tuned):
        self.method, self.tuned = method, tuned
        head = tuned.model.get_submodule(head_linear(tuned.anatomy).path)
        self.made: Any = next(m for m in head.modules() if isinstance(m, Proxies)
                              and m.adapter == tuned.state.training)
        self.c: Tensor = self.made.start()

    def proxies(self, v: Tensor, labels: Tensor) -> Tensor:
        """pi (C, E); these samples are read, unless the pass is one that leaves no trace."""
        c = gathered(self.made.cell, v, labels, self.c.to(v))
        if not self.tuned.steps.still:
            self.c = c.detach()
        rho = self.method.bias_ratio
        return rho * self.made.bias.to(v) + (1 - rho) * c

    def state_dict(self) -> Mapping[str, Any]:
        return {"c": self.c}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.c = state["c"].to(self.c.device, copy=True)
