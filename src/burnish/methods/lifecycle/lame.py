from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.choose.affinity import KINDS, affinity, agreeing
from ...blocks.state.answers import with_logits
from ...blocks.update.adapting import Adapting
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ..objective.distill import logits_of
from ._adapted import Adapts, class_logits, linear_head, module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Lame(Adapts, Method):
    """LAME: the answers of a batch are corrected by each other, and no weight is touched.

    q_i are the batch's class probabilities, w_ij how alike the features of two samples are.
    Answered is z, which minimises

        sum_i KL(z_i || q_i) - (alpha / 2) sum_ij w_ij z_i . z_j

    by steps ``z <- softmax(log(q + 1e-10) + alpha W z)`` from z = q
    (``blocks/choose/affinity.py``)::

        with burnish.parse("lame")[0].lifecycle(model) as adapted:       # or what tune() returned
            for batch in stream:
                outputs = adapted(batch)         # the model's, with log z in place of the logits

    features: what the last linear of the head reads (of a model that writes on: of the token whose
    answer is the text's), or what `features` makes of the outputs; taken to length 1, in fp32.
    affinity: "knn", the paper's, 1 for the `neighbours` nearest others (searched in 1, 3, 5);
    "rbf", what the released best settings come to, since they name none; "linear", F F^T. Only for
    "linear" and "rbf", which are symmetric and positive, is it sure that every step goes down;
    neighbours are neither: `symmetrise` makes them the one.

    Start: W = 0 gives z = q. Trains nothing, keeps nothing from batch to batch; of one sample
    neighbours leave q as it is. Costs B^2 + B K numbers after a forward.

    When: streams whose batches are of few classes, where what adapts weights collapses. When not:
    batches as mixed as the training data, where neighbours say nothing that q does not.
    """

    paper: ClassVar[str] = ("Parameter-free Online Test-time Adaptation, CVPR 2022, "
                            "arXiv:2201.05718")
    tier: ClassVar[str] = "checked against an independent equation"

    affinity: Literal["knn", "rbf", "linear"] = setting("knn", "how alike two samples are")
    neighbours: int = setting(5, "others that a sample agrees with, or that say how far is near")
    alpha: float = setting(1.0, "lambda, how much being alike counts")
    symmetrise: bool = setting(False, "(W + W^T) / 2 of neighbours")

    def __post_init__(self) -> None:
        untargeted(self, "no weight is touched")
        if self.affinity not in KINDS:
            raise ConfigError(f"lame: affinity={self.affinity!r}: expected {', '.join(KINDS)}")
        if self.neighbours < 1 or not self.alpha > 0:
            raise ConfigError("lame: neighbours of at least 1 and a positive alpha are "
                              f"expected, got {self.neighbours} and {self.alpha:g}")
        if self.affinity == "linear" and "neighbours" in self.changed():
            raise ConfigError("lame: affinity='linear' has no neighbours")
        if self.affinity != "knn" and self.symmetrise:
            raise ConfigError(f"lame: affinity={self.affinity!r} is symmetric already")

    def lifecycle(self, tuned: Any, *, features: Callable[[Any], Tensor] | None = None) -> Adapting:
        """The model, or what ``tune`` returned, as it answers a stream."""
        model, seen = module_of(tuned), _Seen()
        if features is not None:
            return Adapting("lame", model, finish=lambda out: self.corrected(out, features(out)))
        head = linear_head("lame", tuned, "; give features=lambda outputs: ...")
        return Adapting("lame", model, finish=lambda out: self.corrected(
            out, seen.taken(logits_of(out, "lame"))), hooks=lambda: [
                head.register_forward_hook(seen, with_kwargs=True)])

    def corrected(self, outputs: Any, features: Tensor) -> Any:
        """Outputs with log z in place of the logits."""
        q = class_logits(outputs, "lame").softmax(1)
        if features.dim() != 2 or len(features) != len(q):
            raise ConfigError(f"lame: a row of features is expected for each of {len(q)} samples, "
                              f"and these are {list(features.shape)}; give features=lambda "
                              "outputs: ...")
        W = affinity(features, self.affinity, self.neighbours, self.symmetrise).to(q.dtype)
        said, _ = agreeing(q, W, self.alpha)
        logits = logits_of(outputs, "lame")
        return with_logits(outputs, logits, said.to(logits.dtype))


class _Seen:
    """What a head has read last, and said of it."""

    last: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: Any, args: tuple, kw: dict[str, Any], out: Any) -> None:
        x = args[0] if args else next(iter(kw.values()), None)
        self.last = (x.detach(), out.detach()) if isinstance(x, Tensor) \
            and isinstance(out, Tensor) else None

    def taken(self, logits: Tensor) -> Tensor:
        """What the head read of each sample. Where it reads every token, as of a model that writes
        on, the one whose answer was taken: the last of which it said these very logits."""
        found, self.last = self.last, None
        if found is None:
            raise ConfigError("lame: the head did not run, or not on a tensor; give "
                              "features=lambda outputs: ...")
        x, said = found
        if x.dim() == 3 and said.dim() == 3 and (len(said), said.shape[2]) == logits.shape:
            same = (said == logits.unsqueeze(1)).all(2)
            if bool(same.any(1).all()):
                at = (same * torch.arange(1, same.shape[1] + 1, device=same.device)).argmax(1)
                return x[torch.arange(len(x), device=x.device), at]
        return x
