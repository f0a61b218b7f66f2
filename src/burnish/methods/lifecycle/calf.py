from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...blocks.state.cross_modal import SeriesModel, principal_words
from ...core.anatomy import Anatomy
from ...core.draw import drawn
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Calf(Method):
    """CALF: a language model learns to foretell series, taught by its own branch of words.

    A window x (B, T, M) is scaled by each series' mean and deviation; every series is a token:
    ``X_time = Encoder(Linear(x^T))``, one transformer layer (after-norm). Its first `layers` blocks
    read X_time with LoRA on the attention (temporal branch) and, frozen, ``X_text = Attention(q =
    X_time, k = v = E)`` (textual branch), E the `words` principal components of the table of words
    along its vocabulary. ``y = Linear(h + X)`` for both by one linear, scaled back. Minimised is

        L1(y_time, y) + consistency L1(y_time, y_text)
            + feature sum_l decay^(L - l) L1(P_l h_l, P'_l h'_l)        l = 0..L

    ::

        calf = burnish.parse("calf(past=96, horizon=96)")[0]
        series = calf.lifecycle(gpt2)                 # a model of past_values, future_values
        tuned = burnish.tune(series, calf.recipe(series), head=False)
        tuned.step({"past_values": ..., "future_values": ...})

    Start: a new model, no function of the base's. Trains beside the recipe's LoRA (GPT-2: 147,456)
    the temporal branch's norms, both branches' positions, encoder, attention to E, output and the 2
    (L + 1) projections P, those at a fifth of the rate. Gradients go through the textual branch.
    Answers need the temporal branch alone, and LoRA merges. Frozen weights are held once.

    When to use: series of several variables that few windows are there of. When not: where a model
    of series is at hand (PatchTST), or the variables have no order: a causal model reads each after
    those before it. L1 of what is scaled back is dominated by the series of the largest values.
    Departures: one optimizer with two rates in place of two; the base's own mask, norms and
    dropout; norms are found as norms and not by their names. Unconfirmed: the sign of E's rows.
    """

    paper: ClassVar[str] = ("CALF: Aligning LLMs for Time Series Forecasting via Cross-modal "
                            "Fine-Tuning, AAAI 2025, arXiv:2403.07300")
    tier: ClassVar[str] = "checked against an independent equation"
    merges: ClassVar[bool] = False

    past: int = setting(96, "steps that are read")
    horizon: int = setting(96, "steps that are foretold")
    depth_kept: int = setting(6, "first blocks of the language model that are kept")
    components: int = setting(500, "principal words that the textual branch attends to")
    series_heads: int = setting(12, "of the encoder's and the textual branch's attention")
    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(32.0, "numerator of the scale")
    dropout: float = setting(0.1, "dropout of the encoder and on the input of A")
    consistency: float = setting(1.0, "factor of the two answers' distance")
    feature: float = setting(0.01, "factor of the states' distances")
    decay: float = setting(0.8, "of a state's distance, for each block below the last")
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        untargeted(self, "LoRA's targets are the recipe's")
        if min(self.past, self.horizon, self.depth_kept, self.components, self.series_heads,
               self.rank) < 1:
            raise ConfigError("calf: past, horizon, depth_kept, components, series_heads and rank "
                              "of at least 1 are expected")
        if not 0 <= self.dropout < 1 or min(self.consistency, self.feature) < 0 \
                or not 0 < self.decay <= 1:
            raise ConfigError("calf: a dropout in [0, 1), a decay in (0, 1], and consistency and "
                              "feature of 0 or more are expected, got "
                              f"{self.dropout:g}, {self.decay:g}, {self.consistency:g}, "
                              f"{self.feature:g}")

    def lifecycle(self, base: Any) -> SeriesModel:
        """A model of series from a language model, which stays as it is."""
        model = module_of(base)
        if any(n.rpartition(".")[2] == "burnish" for n, _ in model.named_modules()):
            raise ConfigError("calf makes its model of a base, and this one has an adapter: "
                              "tuned.merge() or tuned.detach() first")
        body = self._cut(copy.deepcopy(getattr(model, "base_model", model)))
        table = body.get_input_embeddings().weight                     # type: ignore[operator]
        vocabulary, width = table.shape
        if width % self.series_heads or self.components > min(vocabulary, width):
            raise ConfigError(
                f"calf: a table of {vocabulary} words of width {width} has at most "
                f"{min(vocabulary, width)} components, and series_heads divide {width}; got "
                f"components={self.components}, series_heads={self.series_heads}")
        rows = getattr(body.config, "max_position_embeddings", None)
        positions = [f"{n}.weight" for n, m in body.named_modules() if isinstance(m, nn.Embedding)
                     and m.weight is not table and m.num_embeddings == rows]
        norms = [f"{path}.{leaf}" for path in Anatomy.of(body).norms
                 for leaf, _ in body.get_submodule(path).named_parameters(recurse=False)]
        with drawn(self.seed):
            made = SeriesModel(
                body, principal_words(table.detach(), self.components), self.past, self.horizon,
                self.series_heads, positions=positions, norms=norms, dropout=self.dropout,
                factors=(self.consistency, self.feature), decay=self.decay)
        made.requires_grad_(False)
        for p in (*made.trains(), *(body.get_parameter(n) for n in (*positions, *norms))):
            p.requires_grad_()
        for p in (*made.time_states.parameters(), *made.text_states.parameters()):
            p.burnish_lr = 0.2                                         # type: ignore[attr-defined]
        return made

    def _cut(self, body: Any) -> Any:
        many = getattr(getattr(body, "config", None), "num_hidden_layers", None)
        stack = next((m for m in body.children() if isinstance(m, nn.ModuleList)
                      and len(m) == many), None)
        if stack is None or not hasattr(body, "get_input_embeddings"):
            raise ConfigError("calf: a causal language model of one stack of blocks is expected, "
                              f"not {type(body).__name__}")
        if self.depth_kept > len(stack):
            raise ConfigError(f"calf: depth_kept={self.depth_kept} of a model of {many} blocks")
        del stack[self.depth_kept:]
        body.config.num_hidden_layers = self.depth_kept
        return body

    def recipe(self, series: SeriesModel) -> str:
        """What trains it: LoRA on the attention's inputs, and all that asks for a gradient."""
        found = [p.path for p in Anatomy.of(series).places
                 if p.path.startswith("body.") and p.role in ("q", "k", "v", "qkv")]
        return (f"lora(rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, "
                f"targets={','.join(found)!r}) + as_is")
