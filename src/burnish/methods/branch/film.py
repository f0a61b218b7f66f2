from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.state.another import beside
from ...blocks.state.banks import Conditioned
from ...blocks.state.gates import takes_shift
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.site import Branch
from ._sites import channel_axis, samples_first, scaled

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Film(Method):
    """FiLM: every norm's result is scaled and shifted by what is known of the sample.

    ``h <- gamma_c h + beta_c`` per channel, gamma_c = 1 + W_g z_c + b_g, beta_c = W_b z_c + b_b,
    with z (conditions, embedding) once for the whole model, W_g, W_b (channels, embedding) and b_g,
    b_b (channels) at every site. The batch names ``condition``: one number per sample, or one for
    all. On maps (batch, channel, height, width) gamma and beta are per channel of the map. A norm
    that has no shift (RMSNorm) gets the scale only. `targets` names other sites, linears and
    convolutions too.

    Departures: what makes z_c (the authors' question encoder) is a table here; a condition that is
    a text or a picture goes into the model by other roads.

    Start: W and b 0, z N(0, 1): the pre-trained function exactly. Trains conditions embedding + per
    site 2 channels (embedding + 1). Kept for backward: h of every site; the scaled one is made
    again from it. Not mergeable (it follows the sample); :meth:`lifecycle` makes one condition an
    ``ssf``, which merges. A model that puts tokens before samples (``batch_first=False``) is
    refused.
    """

    paper: ClassVar[str] = ("FiLM: Visual Reasoning with a General Conditioning Layer (2018), "
                            "arXiv:1709.07871")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"norms"})
    context: ClassVar[Mapping[str, Key]] = {
        "condition": Key("what each sample is conditioned on, by number", below="conditions")}
    merges: ClassVar[bool] = False

    conditions: int = setting(2, "how many conditions there are", least=1)
    embedding: int = setting(64, "width of z, the embedding of a condition", least=1)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if min(self.conditions, self.embedding) < 1:
            raise RecipeError(f"{self}: expected at least one condition, and one number of each")
        samples_first(anatomy, self)
        z = nn.Embedding(self.conditions, self.embedding)
        for n, (path, channels, module) in enumerate(scaled(anatomy, self, norms=True, rows=True)):
            yield Branch(path, Conditioned("condition", z, channels, shift=takes_shift(module),
                                           axis=channel_axis(module), owns=n == 0),
                         compose="replace")

    def lifecycle(self, tuned: Any, condition: int, name: str) -> None:
        """Settle one condition: an adapter `name` beside the one in use (which must train this
        method), with an ``ssf`` for it, and use that. It reads no key, merges and trains on.
        Raises RecipeError for a condition that is none."""
        if not 0 <= condition < self.conditions:
            raise RecipeError(f"film has conditions 0 to {self.conditions - 1}, not {condition}")
        made = {path: m.plain(condition) for path, m in tuned.branches(Conditioned)}
        plain = make("ssf", {"targets": [f"{p}.weight" if p else "weight" for p in made]})
        beside(tuned, self, name, [(plain, made)])

    def count(self, channels: int, shift: bool = True) -> int:
        """Trainable parameters of one site."""
        return (1 + shift) * channels * (self.embedding + 1)
