from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.answers import with_logits
from ...blocks.state.mistakes import Corrector, Record, corrected
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ..objective.distill import logits_of
from ._adapted import module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Copilot(Method):
    """Transformer Copilot: a small decoder learns the mistakes that a language model makes as it is
    tuned, and puts them right when it answers.

    While the pilot is tuned by a method of its own, each batch leaves a record in the mistake log:
    q its softmax, the token that came next, its states (mean over all layers and the embeddings,
    unconfirmed). The copilot foretells ``l_t = p_t - q_t`` from ``l_s, s < t`` and those states
    (blocks/state/mistakes.py), by ``sqrt(mean |f - l|^2)``; answered is

        q + alpha f        clipped at 0, summing to 1; as log-probabilities in place of the logits

    ::

        copilot = burnish.parse("copilot")[0].lifecycle(tuned)
        for batch in batches:                  # input_ids, labels
            tuned.step(batch)
            copilot.learn(batch)               # a forward of the pilot, and a step of the copilot
        with copilot.standing():
            tuned.model.generate(..., use_cache=False, logits_to_keep=0)

    Start: what goes out of the copilot is 0, so the pilot's answers stay; alpha = 0 is the pilot
    exactly. Trains the copilot alone: no gradient reaches the pilot. The log holds `log` batches,
    ``2 kept + 1`` numbers a token beside its states; a step rebuilds l of one batch, V numbers a
    token. A text that is written on is read whole for each token (no cache).

    When to use: small models whose errors repeat, with time to spare when answering. When not:
    where a token's cost counts, or memory for a table of the vocabulary's size twice over does.
    Departures: the copilot starts random and small, not from a model of the family; beside the
    `kept` largest entries of q the others count as 0.
    """

    paper: ClassVar[str] = ("Transformer Copilot: Learning from The Mistake Log in LLM Fine-tuning "
                            "(2025), arXiv:2505.16270")
    tier: ClassVar[str] = "checked against an independent equation"
    merges: ClassVar[bool] = False

    alpha: float = setting(0.3, "lambda, how much of what is foretold is put right")
    kept: int = setting(32, "largest entries of q that a record has")
    log: int = setting(16, "batches that the log holds")
    decoder_width: int = setting(128, "of the copilot's states")
    decoder_blocks: int = setting(2, "of the copilot")
    decoder_heads: int = setting(4, "of the copilot's attention")
    decoder_rate: float = setting(1e-3, "of the copilot's Adam")
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        untargeted(self, "no weight of the model is touched")
        if min(self.kept, self.log, self.decoder_blocks, self.decoder_heads) < 1 \
                or self.decoder_width % self.decoder_heads or not self.decoder_rate > 0:
            raise ConfigError("copilot: kept, log, decoder_blocks and decoder_heads of at least 1, "
                              "a decoder_width that the heads divide and a decoder_rate above 0 "
                              "are expected")
        if self.alpha < 0:
            raise ConfigError(f"copilot: alpha={self.alpha:g} would add mistakes; expected 0 or "
                              "more")

    def lifecycle(self, tuned: Any) -> Pair:
        """The pilot (a causal language model, or what ``tune`` returned) with a copilot."""
        return Pair(self, module_of(tuned))


@dataclass
class Pair:
    """A pilot with its copilot, which is made at the first batch."""

    part: Copilot
    pilot: nn.Module
    copilot: Corrector | None = None
    records: list[Record] = field(default_factory=list)
    _adam: Any = None

    @torch.no_grad()
    def recorded(self, batch: Mapping[str, Any]) -> tuple[Any, Record]:
        """(the pilot's outputs, what the log keeps of them); nothing of it has a graph."""
        if "input_ids" not in batch:
            raise ConfigError(f"copilot: a batch of texts has input_ids; this one has "
                              f"{', '.join(batch)}")
        given = {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": False}
        with evaluating(list(self.pilot.modules())):
            out = self.pilot(**given, output_hidden_states=True)
        return out, self._record(out, batch)

    def _record(self, out: Any, batch: Mapping[str, Any]) -> Record:
        ids, logits = batch["input_ids"], logits_of(out, "copilot")
        states = getattr(out, "hidden_states", None)
        if states is None or logits.shape[:2] != ids.shape:
            raise ConfigError("copilot: a causal language model that gives its states is expected "
                              "(output_hidden_states), with logits for every token")
        q = logits.float().softmax(-1)
        top = q.topk(min(self.part.kept, q.shape[-1]), -1)
        valid = batch.get("attention_mask")
        valid = torch.ones_like(ids).bool() if valid is None else valid.bool()
        labels = batch.get("labels", ids)
        told = torch.zeros_like(valid)
        told[:, :-1] = (labels[:, 1:] != -100) & valid[:, 1:] & valid[:, :-1]
        following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)
        return Record(top.indices, top.values, following,
                      torch.stack([h.float() for h in states]).mean(0), told, valid)

    def learn(self, batch: Mapping[str, Any]) -> float:
        """Logs a batch, and takes a step on a record of the log. Its loss."""
        out, record = self.recorded(batch)
        if not bool(record.asked.any()):
            raise ConfigError("copilot: no token of this batch is learnt from; its labels are all "
                              "-100")
        if self.copilot is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(self.part.seed)
                self.copilot = Corrector(
                    logits_of(out, "copilot").shape[-1], record.h.shape[-1],
                    self.part.decoder_width, self.part.decoder_blocks,
                    self.part.decoder_heads).to(record.h)
            self._adam = torch.optim.Adam(self.copilot.parameters(), self.part.decoder_rate)
            self._draw = torch.Generator().manual_seed(self.part.seed)
        self.records = [*self.records, record][-self.part.log:]
        at = int(torch.randint(len(self.records), (), generator=self._draw))
        with torch.enable_grad():
            loss = self.copilot.loss(self.records[at])
            loss.backward()
        self._adam.step()
        self._adam.zero_grad()
        return float(loss.detach())

    @contextmanager
    def standing(self, alpha: float | None = None) -> Iterator[None]:
        """Inside, the pilot answers with its mistakes put right: log-probabilities as logits."""
        strength = self.part.alpha if alpha is None else alpha
        if self.copilot is None and strength:
            raise ConfigError("copilot: nothing has been learnt yet")

        def before(module: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
            kept = kw.get("past_key_values")
            if kept is not None and kept.get_seq_length():
                raise ConfigError("copilot: a text is read whole for each token; generate with "
                                  "use_cache=False, logits_to_keep=0")
            return args, kw | {"output_hidden_states": True}

        hooks = [] if strength == 0 else [
            self.pilot.register_forward_pre_hook(before, with_kwargs=True),
            self.pilot.register_forward_hook(
                lambda m, args, kw, out: self._right(args, kw, out, strength), with_kwargs=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _right(self, args: Any, kw: Mapping[str, Any], out: Any, strength: float) -> Any:
        batch = dict(kw) | ({"input_ids": args[0]} if args else {})
        logits = logits_of(out, "copilot")
        if logits.shape[1] != batch["input_ids"].shape[1]:   # generate asks for the last alone
            raise ConfigError("copilot: the model gave logits of the last token alone; call it "
                              "with logits_to_keep=0")
        record = self._record(out, batch)
        assert self.copilot is not None
        q = logits.float().softmax(-1)
        said: Tensor = corrected(q, self.copilot(record), strength).clamp_min(1e-30).log()
        return with_logits(out, logits, said.to(logits.dtype))
