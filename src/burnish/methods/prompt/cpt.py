from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...blocks.state.examples import Examples, Projecting, Types, of_all
from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.outputs import next_token, vocabulary_head
from ._stacks import embedding_stacks

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Tuned


@dataclass(frozen=True, kw_only=True)
class Cpt(Method):
    """CPT: examples in the context whose embeddings are refined, each within a small ball.

    ``X' = [e(c) + d; E(x)]``: c (n) the tokens of the examples, template and labels included, d
    (n, D) trains. `types` says what each token is: 0 free text; else t mod 4: 1 template of the
    input, 2 input, 3 template of the label, 0 label; tokens of one label share one t, which grows
    from example to example. d of labels and free text is 0, and after every update

        d_i <- d_i min(1, r_i / ||d_i||),   r_i = radius sqrt(D / 2048), `input_radius` or
                                            `format_radius`

    The loss is the mean over all labelled tokens, of the query and of the context, those of the
    context's last label times `label_decay`, of the one before times label_decay^2, and so on.

    ``tune(model, Cpt(ids=..., types=...))``, then ``tuned.step`` with a query a sample. Training
    takes each example as a query too, with the whole context before it: that is intended.

    Start: d = 0, in-context learning with these examples, not the model alone. Trains n D (those
    of labels stay 0). Kept for backward: what frozen blocks keep, for n more tokens. Not mergeable;
    with a key-value cache the context is put in once. Moments are left as they are by the
    projection. The loss is the model's own, so labels are in the batch. `label_decay` 0.95 is the
    paper's best (unconfirmed); 1 counts all alike.

    For models that write on; rows that many beside short texts take their memory in every block.
    """

    paper: ClassVar[str] = "Context-aware Prompt Tuning (2024), arXiv:2410.17222"
    tier: ClassVar[str] = "from the text"
    needs: ClassVar[frozenset[str]] = frozenset({"writes on"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    sees_run: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"ids": (5, 9, 7, 11, 6, 9, 8, 12),
                                       "types": (1, 2, 3, 4, 5, 6, 7, 8)}

    ids: tuple[int, ...] | list[int] | None = setting(None, "tokens of the examples, in order",
                                                   other=((5, 9, 7, 11, 6, 9, 8, 13),))
    types: tuple[int, ...] | list[int] | None = setting(
        None, "what each token is; None: all are input", other=((1, 2, 3, 4, 5, 6, 8, 8),))
    input_radius: float = setting(0.1, "how far an input's embedding may go, at width 2048")
    format_radius: float = setting(0.1, "how far a template's embedding may go, at width 2048")
    label_decay: float = setting(0.95, "of a label's weight, per example back", alias=("gamma",))

    def __post_init__(self) -> None:
        if min(self.input_radius, self.format_radius) < 0 or not 0 <= self.label_decay <= 1:
            raise RecipeError("cpt: radii are at least 0 and label_decay is from 0 to 1, got "
                              f"{self.input_radius:g}, {self.format_radius:g} and "
                              f"{self.label_decay:g}")
        if self.types is not None and len(self.types) != len(self.ids or ()):
            raise RecipeError(f"cpt: one type a token: {len(self.ids or ())} ids and "
                              f"{len(self.types)} types")
        if any(t < 0 for t in self.types or ()):
            raise RecipeError("cpt: types are 0 (free text) or counted from 1")
        kinds = {t % 4 if t else None for t in self.coded().codes}
        for name, kind, what in (("input_radius", 2, "an input"), ("label_decay", 0, "a label"),
                                 ("format_radius", None, "a template")):
            if self.ids and name in self.changed() and not (
                    {1, 3} & kinds if kind is None else kind in kinds):
                raise RecipeError(f"cpt({name}={getattr(self, name):g}) does nothing: by `types` "
                                  f"no token is {what}")

    def coded(self) -> Types:
        """The types; all are input where none are given."""
        return Types(tuple(self.types) if self.types is not None else (2,) * len(self.ids or ()))

    def prompt(self, anatomy: Anatomy) -> Cpt:
        if self.targets is not None:
            raise RecipeError("cpt takes no targets: it stands before the whole input")
        return self

    def install(self, attacher: Attacher, part: Method) -> None:
        model, types = attacher.model, self.coded()
        paths = _stack(attacher.anatomy)
        if len(paths) != 1 or not next_token(model) or vocabulary_head(attacher.anatomy) is None:
            raise RecipeError(f"cpt needs a model that writes on, reading embeddings in place of "
                              f"token ids; {type(model).__name__} does not: see prompt_tuning")
        embed = model.get_submodule(paths[0]).get_input_embeddings()
        table = embed.weight
        if not self.ids or not (0 <= min(self.ids) and max(self.ids) < len(table)):
            raise RecipeError("cpt needs the tokens of its examples: ids=..., from 0 to "
                              f"{len(table) - 1}")
        size = (table.shape[1] / 2048) ** 0.5
        radii = types.radii(size * self.input_radius, size * self.format_radius)
        if not any(radii):
            raise RecipeError("cpt: nothing may move: no token is an input or a template of a "
                              "radius above 0")
        Examples(attacher.state, attacher.adapter.name, self.ids, radii, embed, types.labels
                 ).listen(attacher.slot(paths[0]), part.name)

    def controller(self, tuned: Tuned) -> Projecting:
        return Projecting(self._rows(tuned))

    def _rows(self, tuned: Any) -> list[Examples]:
        return [m for m in tuned.model.modules()
                if isinstance(m, Examples) and m.adapter == tuned.training]

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        """What makes the mean over the query's labels the mean over all."""
        (rows,), (path,) = self._rows(tuned), _stack(tuned.anatomy)
        if (logits := rows.take(tuned.model, path)) is None:
            yield 0 * rows.rows.sum()            # no label in the context: the query's loss alone
            return
        labels = run.batch.get("labels") if isinstance(run.batch, Mapping) else None
        loss = getattr(run.outputs, "loss", None)
        if labels is None or loss is None:
            raise ConfigError("cpt weighs the labels of its context against those of the query: "
                              "put labels in the batch, and let the model make the loss")
        yield of_all(logits, rows, self.coded().weights(self.label_decay), loss, labels,
                     run.batch.get("num_items_in_batch"))

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        return len(self.ids or ()) * d


def _stack(anatomy: Anatomy) -> list[str]:
    """What embeds and runs the blocks: one path where cpt can stand."""
    return list(dict.fromkeys(embedding_stacks(anatomy).values()))
