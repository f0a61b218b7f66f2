"""The copilot beside a language model: what logs the model's mistakes and learns them, and what
puts them right when it answers (copilot.py has the equations)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.mistakes import Corrector, Record, righted
from ...blocks.state.prompts import Listener, accepts, named
from ...blocks.update.noise import fold
from ...core.errors import ConfigError
from ...core.events import EARLY
from ...core.followed import is_fake


class State(Listener):
    """Listens to a block: what it returns, and the first is given, goes into the mean that a record
    has. The model's own ``output_hidden_states`` would leave hooks in it, which no pickle takes."""

    what = "a copilot"
    changes = False

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        met = self.here.box.get(("copilot", self.adapter))
        if met is not None:
            if not met.count:
                met.add(args[0] if args else next(iter(kw.values())))
            met.add(out[0] if isinstance(out, tuple) else out)
        return out


class Met:
    """The sum of the states of a run, and how many."""

    count = 0
    total: Any = 0.0

    def add(self, h: Tensor) -> None:
        self.total = self.total + h.to(torch.promote_types(h.dtype, torch.float32))
        self.count += 1


class Beside(Listener):
    """Listens to the model: its answers are put right where they are no part of a training step.

    looking: the next run is for the log, which finds its record in `taken`.  still: a pass of
    training is under way, and the pilot answers for itself.
    """

    what = "a copilot"

    def __init__(self, state: Any, adapter: str, decoder: Corrector, method: Any, states: int):
        super().__init__(state, adapter)
        self.decoder, self.method, self.states = decoder, method, states
        self.looking, self.still = False, False
        self.taken: Record | None = None

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if self.looking:
            return self._look(module, call, named(module, args, kw))
        if self.still or module.training or torch.is_grad_enabled() or not self.method.alpha:
            return call(*args, **kw)
        return self._answer(module, call, named(module, args, kw))

    # -- the log -------------------------------------------------------------------------------
    def _look(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        """A run whose mistakes are noted; the caller made it one of evaluation, without a graph."""
        out, _, ids, words, q, h = self._ran(module, call, given)
        valid = _valid(given, ids)
        labels = given.get("labels")
        if labels is None:
            labels = ids
        told = torch.zeros_like(valid)
        told[:, :-1] = (labels[:, 1:] != -100) & valid[:, 1:] & valid[:, :-1]
        self.taken = Record(words, q, _following(ids), h, told, valid)
        return out

    def _ran(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        """(outputs, logits, ids, the largest entries of q, their values, mean of the states)."""
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ConfigError("copilot reads texts as input_ids (batch, tokens), and this call has "
                              f"{', '.join(k for k, v in given.items() if v is not None)}")
        asked: dict[str, Any] = {"return_dict": True}
        if accepts(module, "logits_to_keep"):
            asked["logits_to_keep"] = 0              # the text so far is read whole
        met = self.here.box["copilot", self.adapter] = Met()
        try:
            out = call(**given | asked)
        finally:
            del self.here.box["copilot", self.adapter]
        logits = getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or met.count != self.states or not (
                logits.shape[:2] == ids.shape == met.total.shape[:2]):
            raise ConfigError("copilot: logits for every token and one state of each of "
                              f"{self.states - 1} blocks are expected, and {met.count - 1} came; "
                              "nothing else of the recipe may add tokens to the text")
        wide = torch.promote_types(logits.dtype, torch.float32)
        top = logits.to(wide).softmax(-1).topk(min(self.method.kept, logits.shape[-1]), -1)
        return out, logits, ids, top.indices, top.values, met.total / met.count

    # -- the answer ----------------------------------------------------------------------------
    def _answer(self, module: nn.Module, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        begun = given.get("past_key_values")
        if given.get("cache_params") is not None or begun is not None \
                and self._layer(begun) is None and begun.get_seq_length():
            raise ConfigError("copilot: of the text so far nothing but this model's own states is "
                              "kept there; let it read the text from its first token, or generate "
                              "with use_cache=False")
        out, logits, ids, words, q, h = self._ran(module, call, given)
        n = ids.shape[1]
        ids, words, q, h = self._gathered(out.get("past_key_values"), ids, words, q, h)
        valid = _valid(given, ids)
        record = Record(words, q, _following(ids), h, valid, valid)
        new = righted(logits, self.decoder(record)[:, -n:], self.method.alpha)
        if (loss := out.get("loss")) is not None and given.get("labels") is not None:
            out["loss"] = loss + _more(new, logits, given)
        keep = given.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or keep:
            new = new[:, keep] if isinstance(keep, Tensor) else new[:, -keep:]
        out["logits"] = new
        return out if given.get("return_dict") is not False else out.to_tuple()

    def _layer(self, cache: Any) -> Any:
        """The layer of ours in a cache of keys and values."""
        return next((x for x in getattr(cache, "layers", ())
                     if getattr(x, "burnish_copilot", None) == self.adapter), None)

    def _gathered(self, cache: Any, ids: Tensor, words: Tensor, q: Tensor, h: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all the text so far. A layer of the cache keeps it behind the model's own, so that it
        is put in order, repeated and cut as they are (beams)."""
        if cache is None or not hasattr(cache, "layers"):
            return ids, words, q, h
        layer = self._layer(cache)
        if layer is None:
            from transformers.cache_utils import DynamicLayer

            layer = DynamicLayer()
            layer.burnish_copilot = self.adapter
            cache.layers.append(layer)
        K = words.shape[-1]                          # numbers of words are whole up to 2^24
        h, told = layer.update(h.unsqueeze(1), torch.cat(
            [words.to(h), q.to(h), ids.unsqueeze(-1).to(h)], -1).unsqueeze(1))
        told = told[:, 0]
        return told[..., -1].long(), told[..., :K].long(), told[..., K:-1], h[:, 0]


def _following(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], ids[:, -1:]], 1)


def _valid(given: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(B, T): which tokens are no padding."""
    mask = given.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ConfigError("copilot: an attention_mask with one number a token is expected "
                          f"({list(ids.shape)} of the text so far)")
    return mask.bool()


def _more(new: Tensor, logits: Tensor, given: Mapping[str, Any]) -> Tensor:
    """What the right answers add to the model's loss, a mean over tokens."""
    labels = given["labels"][:, 1:]
    count = given.get("num_items_in_batch")
    if count is None:
        count = (labels != -100).sum()
    a, b = (F.cross_entropy(z[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum")
            for z in (new, logits))
    return (a - b) / count


class Learning:
    """Logs each micro-batch and, after each update, takes a step of the decoder.

    Before whoever else stands around a pass, so that no pass of theirs is put right either."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: Any, tuned: Any):
        self.method = method
        self.beside = next(m for m in tuned.model.modules() if isinstance(m, Beside)
                           and m.adapter == tuned.active.name)
        self.weights = dict(self.beside.decoder.named_parameters())
        self.records: list[Record] = []
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.taken, self.full = 0, False             # steps; is the largest log rehearsed?
        self.last: Tensor | None = None

    def rehearse(self, step: int) -> None:
        self.full = True

    def around_step(self, step: Any) -> Iterator[None]:
        b = self.beside
        b.looking = True
        try:
            step.probe(grads=False, evaluate=True)
        finally:
            b.looking = False
        record, b.taken = b.taken, None
        if record is None:
            raise ConfigError("copilot: the model itself did not run in this step")
        self.note(record)
        del record
        b.still = True
        try:
            yield
        finally:
            b.still = False

    def note(self, record: Record) -> None:
        """One more in the log; nothing where no token is asked for."""
        full, self.full = self.full, False
        m = self.method.log
        if full and [r.h.shape for r in self.records] != [record.h.shape] * m:
            self.records = []
            self.records = [Record(**{k: v.clone() for k, v in vars(record).items()})
                            for _ in range(m - 1)]
        if is_fake(record.asked) or bool(record.asked.any()):
            self.records = [*self.records, record][-m:]

    def after_update(self, step: int) -> None:
        if not self.records:
            return
        at = fold("copilot", self.method.seed, step) % len(self.records)
        decoder, weights = self.beside.decoder, list(self.weights.values())
        decoder.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = decoder.loss(self.records[at])
            grads = torch.autograd.grad(loss, weights)
        finally:
            decoder.requires_grad_(False)
        self.last = loss.detach()
        self.follow(dict(zip(self.weights, grads, strict=True)))

    @torch.no_grad()
    def follow(self, grads: dict[str, Tensor]) -> None:
        """A step of Adam."""
        self.taken += 1
        for name, p in self.weights.items():
            g = grads.pop(name)
            m, v = (t.to(p) for t in self.moments.get(name) or (torch.zeros_like(p),) * 2)
            m, v = m.lerp(g, 0.1), v.lerp(g.square(), 0.001)
            self.moments[name] = m, v
            p.sub_(self.method.decoder_rate / (1 - 0.9**self.taken) * m
                   / ((v / (1 - 0.999**self.taken)).sqrt() + 1e-8))

    def told(self) -> Mapping[str, Any]:
        loss = {} if self.last is None or is_fake(self.last) else {"loss": float(self.last)}
        return {"steps": self.taken, **loss}

    def state_dict(self) -> Mapping[str, Any]:
        return {"taken": self.taken, "records": [dict(vars(r)) for r in self.records],
                "moments": {n: list(t) for n, t in self.moments.items()},
                "weights": {n: p.detach().clone() for n, p in self.weights.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        home = next(iter(self.weights.values())).device
        self.taken, self.full = int(state["taken"]), False
        self.records = [Record(**{k: v.to(home) for k, v in r.items()}) for r in state["records"]]
        self.moments = {n: (m.to(home), v.to(home)) for n, (m, v) in state["moments"].items()}
        for name, p in self.weights.items():
            p.copy_(state["weights"][name])
