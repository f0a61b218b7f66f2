from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.another import beside
from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.domains import Domains, Kept, gate
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.recipe import parse
from ..branch._sites import post_norm, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.protocols import Attacher


@dataclass(frozen=True, kw_only=True)
class MixDA(Method):
    """MixDA: adapters that hold domains beside an MLP, weighed against what it said before.

    At each of `layers`, with u (F) what the MLP's last linear reads: ``o_i = U_i gelu(D_i u + d_i)
    + c_i``, i = 1..n = `adapters`, of width m = F / reduction, and ``o_{n+1} = W u + b``; it gives
    ``sum_i g_i o_i``, ``g = softmax(gate(u_t))``, t the sample's last token that is no padding, one
    g for all of its tokens. The gate is dropout, F -> hidden, twice relu, dropout, hidden ->
    hidden, relu, dropout, hidden -> n + 1. gated=False: o_1 stands in the place of the linear's.

    learns="domain" (stage 1): adapters and gate train on the domain's text, whatever the model's
    loss is there (masked spans), and beside it on text whose key ``general`` is 1 (mask its labels)

        weight mean (y - y')^2

    y the layer's normed output, y' that of the MLP alone, no gradient: what it knew stays.
    :meth:`lifecycle` makes of it learns="task" (stage 2): adapters frozen, gates and what stands
    beside them train (``pfeiffer``, ``lora``, ``prefix``), no key is read.

    Start: U = 0, d, c = 0: o_{n+1} times g_{n+1}, not the pre-trained function; `lean` is added to
    the bias of g_{n+1} (ours). Trains per layer n (F m + m + m d + d) and the gate's F h + h
    + 2 (h^2 + h) + (h + 1)(n + 1). Kept for backward: u, m numbers per token and domain, the o_i.
    Not mergeable. Needs a model that reads its input whole: one g for all tokens looks ahead.

    Departures: weight = 1 / lambda on the term in place of lambda on the loss; dropout between
    linear and norm does not reach what y' takes away. The published gate reads the last position,
    padding or not: pool="position".
    """

    paper: ClassVar[str] = ("Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge "
                            "to Pre-trained Language Models Memories, ACL 2023, arXiv:2306.05406")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"last linears", "whole reading"})
    context: ClassVar[Mapping[str, Key]] = {
        "general": Key("1 for text that is to stay as it was, 0 for the domain's", training=True)}
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    small: ClassVar[dict[str, Any]] = {"layers": (1,), "hidden": 16}

    layers: tuple[int, ...] = setting((7,), "blocks, by number", other=((0, 1),))
    adapters: int = setting(1, "adapters beside each MLP")
    reduction: int = setting(1, "F / m, the MLP's inner width over an adapter's")
    gated: bool = setting(True, "False: the adapter stands in the place of the linear")
    hidden: int = setting(768, "inner width of the gate")
    dropout: float = setting(0.2, "dropout in the gate")
    lean: float = setting(0.0, "added to the start of the bias for what was there", signed=True)
    pool: Literal["token", "position"] = setting(
        "token", "what the gate reads: the last token, or the last position, padding too",
        unseen="batches of the suite have no padding: tests/methods/test_mixda.py")
    weight: float = setting(2.0, "1 / lambda, of what stays as it was; 0: nothing is held")
    learns: Literal["domain", "task"] = setting(
        "domain", "domain: adapters train too; task: they are frozen",
        unseen="it is refused before there are domains: tests/methods/test_mixda.py")

    def __post_init__(self) -> None:
        if min(self.adapters, self.reduction, self.hidden) < 1 or self.weight < 0 \
                or not 0 <= self.dropout < 1:
            raise RecipeError(f"{self}: expected adapters, reduction and hidden of at least 1, a "
                              "weight of at least 0 and a dropout below 1")
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise RecipeError(f"mixda(layers={self.layers}): expected numbers of blocks, each once")
        if not self.gated and self.adapters > 1:
            raise RecipeError("mixda(gated=False): one adapter stands in the place of the linear; "
                              "several need a gate")

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.holds else {}

    @property
    def holds(self) -> bool:
        """Is there a term for what is to stay?"""
        return self.learns == "domain" and self.weight > 0

    def claims(self) -> tuple[str, ...]:
        return ("what an MLP's last linear gives",)

    def repeats(self) -> int | None:
        return None

    def mixture(self, anatomy: Anatomy) -> Iterable[Any]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        if max(self.layers) >= len(anatomy.blocks):
            raise RecipeError(f"mixda(layers={self.layers}): the model has blocks 0 to "
                              f"{len(anatomy.blocks) - 1}")
        return [self]

    def install(self, attacher: Attacher, part: Method) -> None:
        for number in self.layers:
            self._beside(attacher, part, attacher.anatomy.blocks[number])

    def _beside(self, attacher: Any, part: Method, block: Block) -> None:
        path, state, name = block.mlp_out, attacher.state, attacher.adapter.name
        place = next((p for p in attacher.anatomy.places if p.path == path
                      and p.kind in ("linear", "conv1d")), None)
        if place is None:
            raise RecipeError(f"mixda: the MLP of {block.path} does not end in one linear")
        own = [Bottleneck(place.inp, max(1, place.inp // self.reduction), place.out, act="gelu")
               for _ in range(self.adapters)]
        made = gate(place.inp, self.hidden, self.adapters + 1, self.dropout, self.lean) \
            if self.gated else None
        Domains(state, name, own, made, frozen=self.learns == "task", noted=self.holds,
                padded=self.pool == "position").to(attacher.device(path)).listen(
            attacher.slot(path), part.name)
        if self.holds:
            norm = post_norm(attacher.anatomy, block)
            Kept(state, name, self.weight, norm is not None).listen(
                attacher.slot(norm or block.path), f"{part.name}_kept")

    def lifecycle(self, tuned: Any, name: str, task: str = "") -> None:
        """Stage 2: add an adapter `name` whose domains are those of the one in use (which must
        train this method) and frozen, with `task`, a recipe, beside them; and use it."""
        made = {path: {n: t.detach().clone() for n, t in m.state_dict().items()}
                for path, m in _listeners(tuned)}
        beside(tuned, self, name, [(replace(self, learns="task"), made),
                                   *((m, {}) for m in (parse(task) if task else ()))])

    def count(self, inner: int, d: int) -> int:
        """Trainable parameters of one layer in stage 1, of an MLP inner -> d."""
        own = self.adapters * Bottleneck.count(inner, inner // self.reduction, d)
        h, n = self.hidden, self.adapters + 1
        return own + (inner * h + h + 2 * (h * h + h) + (h + 1) * n if self.gated else 0)


def _listeners(tuned: Any) -> list[tuple[str, Domains]]:
    return [(path.partition(".burnish.")[0], m) for path, m in tuned.model.named_modules()
            if isinstance(m, Domains) and m.adapter == tuned.training]
