"""Several rows in one sequence, none of which sees another.

    s   = r_1 r_2 ... r_n            rows end to end, up to `size` tokens
    p_t = t - start of t's row       position_ids, which begin again with each row

Where positions begin again and there is no attention mask, models of transformers let a token
attend to those of its own row alone (``masking_utils``: eager, sdpa and flex attention in batches
of any size, flash attention in batches of one). The first token of a row is what nobody foretells,
so no label crosses a boundary, and the sum of a sequence's loss is that of its rows. Places behind
the last row are a row of padding, of which nothing is learnt.

What a model, or a recipe on it, makes of such a sequence is looked at once before anything trains
(:func:`exact`): a state that runs on over a boundary is refused, never mixed.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import BurnishError, CheckError, ConfigError, DataError
from ..core.recipe import parse
from .rows import Rows

#: how far a row may be from the row alone: over what another row before it makes of it, and in
#: steps of the shortest numbers at work, over the largest answer
NEAR, STEPS = 0.01, 2.0


def fitted(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Rows by number, sequence by sequence: the longest first, each where it leaves the least room
    (best fit, decreasing). Among rows of one length the order is drawn from `seed`."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=g).tolist()
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}                       # tokens left -> sequences with so many
    left: list[int] = []                                  # its keys, in order
    for i in sorted(order, key=lambda i: -lengths[i]):
        k = bisect_left(left, lengths[i])
        if k == len(left):
            number, rest = len(packs), size - lengths[i]
            packs.append([i])
        else:
            free = left[k]
            number, rest = room[free].pop(), free - lengths[i]
            if not room[free]:
                del room[free], left[k]
            packs[number].append(i)
        if rest not in room:
            insort(left, rest)
        room.setdefault(rest, []).append(number)
    return packs


class Pieces(Rows):
    """Documents each by itself, with the stop token behind it, cut into rows of up to `size`."""

    def __init__(self, rows: Any, tokenizer: Any, size: int):
        self.pieces: list[list[int]] = []
        self.sources: list[int] = []
        for i, text in enumerate(rows["text"]):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for k in range(0, len(ids), size):
                if len(ids) - k > 1:                      # one token foretells nothing
                    self.pieces.append(ids[k:k + size])
                    self.sources.append(i)
        if not self.pieces:
            raise DataError("no document holds two tokens; nothing can be learnt")

    def __len__(self) -> int:
        return len(self.pieces)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return len(self.pieces[i])

    def row(self, i: int) -> dict[str, Any]:
        ids = torch.tensor(self.pieces[i])
        return {"input_ids": ids, "labels": ids}


class Packed(Rows):
    """Rows of `alone` end to end in sequences of up to `size` tokens, the same in every pass."""

    def __init__(self, alone: Any, size: int, seed: int):
        lengths = [alone.length(i) for i in range(len(alone))]
        self.alone, self.packs = alone, fitted(lengths, size, seed)
        self.sizes = [sum(lengths[i] for i in pack) for pack in self.packs]
        self.tokens = getattr(alone, "tokens", None)      # rows as people read them
        full = sum(self.sizes) / (size * len(self.packs))
        self.notes = [f"{len(alone)} rows stand in {len(self.packs)} sequences of up to {size} "
                      f"tokens, which are filled to {full:.0%}"]

    def __len__(self) -> int:
        return len(self.packs)

    def source(self, i: int) -> int:
        return self.alone.source(self.packs[i][0])

    def length(self, i: int) -> int:
        return self.sizes[i]

    def row(self, i: int) -> dict[str, Any]:
        ids, labels, places = [], [], []
        for k in self.packs[i]:
            row = self.alone.row(k)
            ids.append(torch.as_tensor(row["input_ids"]))
            labels.append(torch.as_tensor(row["labels"]).clone())
            labels[-1][0] = -100
            places.append(torch.arange(len(ids[-1])))
        return {"input_ids": torch.cat(ids), "labels": torch.cat(labels),
                "position_ids": torch.cat(places)}


def together(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Packed sequences side by side; what is filled up is a row by itself."""
    ids, labels = ([r[k] for r in rows] for k in ("input_ids", "labels"))
    most = max(map(len, ids))
    places = [torch.cat([r["position_ids"], torch.arange(most - len(r["input_ids"]))])
              for r in rows]
    return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "position_ids": torch.stack(places)}


# -- what cannot be packed ---------------------------------------------------------------------
def packable(own: Any, args: Mapping[str, Any], recipe: Any, data: Any, model: Any) -> None:
    """Raises ConfigError where rows were to be packed and something asked for beside it cannot be
    honoured. data: the first data set that was read."""
    if not own.packing or data.task not in ("language-modelling", "instruction-tuning"):
        return
    if own.max_length is None:
        raise ConfigError("packing=True fills sequences of max_length tokens: give max_length=")
    for asked, why in (
            (own.group_by_length, "group_by_length: packed sequences are all about as long"),
            ((own.shots or 1) > 1, "shots: its examples see each other, and packed rows do not"),
            (args.get("use_cache"), "use_cache: a model that keeps keys and values does not look "
                                    "where rows begin")):
        if asked:
            raise ConfigError(f"packing=True goes without {why}; leave one out")
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        raise ConfigError("packing=True tells a model by position_ids where rows begin, and a "
                          "plain module is called with its input alone")
    for part in parse(recipe) if recipe is not None else ():
        if part.private or "own loss" in part.needs:
            raise ConfigError(f"{part.name} looks at each sample by itself, and with packing=True "
                              "a sample is several rows of the data: leave packing out")
    if data.keys:
        raise ConfigError(f"the recipe reads {', '.join(data.keys)} of each row, and with "
                          "packing=True a sample is several rows: leave packing out")


def takes_places(model: nn.Module) -> None:
    """Raises ConfigError for a model that is not told where its tokens stand."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} takes no position_ids, so nothing tells it "
                          "where a row of a packed sequence begins; leave packing out")


@torch.no_grad()
def exact(tuned: Any, task: Any, batch_size: int, device: Any) -> None:
    """Raises CheckError where rows of the data in one sequence are not what they are alone: in
    what `tuned` answers to a few short ones, with its adapters stirred, so that a part which
    begins as nothing is seen too. Parameters and random generators are as before."""
    rows = [r for r in (_short(task.rows("train").alone, i) for i in range(8)) if r is not None]
    packs = [p for p in (rows[:2], rows[2:4])[:batch_size] if len(p) == 2]
    if not packs:                                         # a single row is never packed
        return
    model, name = tuned.model, type(tuned.model).__name__
    was = model.training
    model.eval()
    try:
        with _stirred(tuned):
            far, most = _apart(tuned, task, packs, device)
            if far <= most:
                return
            with tuned.disabled():
                own = _apart(tuned, task, packs, device)
    except BurnishError:
        raise
    except Exception as e:
        said = " ".join(str(e).split())[:200] or type(e).__name__
        raise CheckError(f"{name} with {tuned.recipe} cannot take packed rows ({type(e).__name__}: "
                         f"{said}); leave packing out") from None
    finally:
        model.train(was)
    whose, why = f"{name} with {tuned.recipe}", "a part of the recipe reads over where a row begins"
    if not own[0] <= own[1]:
        whose, why = name, ("it does not part rows where position_ids begin again, as Llama, Qwen "
                            "and GPT-2 do")
        if batch_size > 1 and "flash" in str(getattr(model.config, "_attn_implementation", "")):
            why = "flash attention parts rows in batches of one: give batch_size=1 and accumulate"
    raise CheckError(f"packing=True would mix rows: what {whose} answers to rows in one sequence "
                     f"is {far:.3g} away from what it answers to each alone, and rounding takes "
                     f"{most:.3g}; {why}, or leave packing out")


def _apart(tuned: Any, task: Any, packs: list[list[list[int]]], device: Any
           ) -> tuple[float, float]:
    """(how far packed rows are from the rows alone, how far rounding may take them): a hundredth
    of what rows make of each other where nothing parts them, or a few steps of the numbers."""
    model, shared = tuned.model, tuned.state.shards is not None

    def answers(sequences: list[list[int]], **more: Tensor) -> list[Tensor]:
        pad = task.processor.pad_token_id
        ids = [torch.tensor(s) for s in sequences]
        batch: dict[str, Any] = {"input_ids": pad_sequence(ids, True, pad), **more}
        if not more:
            batch["attention_mask"] = pad_sequence([torch.ones_like(i) for i in ids], True)
        if shared:                    # logits that wait are made when the head is shared out again
            batch["output_hidden_states"] = True
        out = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        logits = out.hidden_states[-1] if shared else task.logits(out)
        return [row[:len(s)].double().cpu() for row, s in zip(logits, sequences, strict=True)]

    rows = [r for pack in packs for r in pack]
    joined = [[t for r in pack for t in r] for pack in packs]
    places = together([{"input_ids": torch.tensor(s), "labels": torch.tensor(s),
                        "position_ids": torch.cat([torch.arange(len(r)) for r in pack])}
                       for s, pack in zip(joined, packs, strict=True)], 0)["position_ids"]
    alone = torch.cat([answers([r])[0] for r in rows])
    mixed, packed = torch.cat(answers(joined)), torch.cat(answers(joined, position_ids=places))
    far, most = ((a - alone).abs().max().item() for a in (packed, mixed))
    return far, max(NEAR * most, STEPS * _step(model, device) * alone.abs().max().item())


def _step(model: nn.Module, device: Any) -> float:
    """The relative step of the shortest numbers that the model reckons in."""
    kind = torch.device(device).type
    kinds = {p.dtype for p in model.parameters() if p.dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    if torch.is_autocast_enabled(kind):
        kinds.add(torch.get_autocast_dtype(kind))
    return max(torch.finfo(k).eps for k in kinds or {torch.float32})


def _short(alone: Any, i: int) -> list[int] | None:
    """The first tokens of a row, of unlike numbers, so that no place of two agrees."""
    if i >= len(alone):
        return None
    ids = torch.as_tensor(alone.row(i)["input_ids"]).tolist()
    return ids[:7 + 2 * (i % 4)] if len(ids) > 1 else None


@contextmanager
def _stirred(tuned: Any) -> Iterator[None]:
    """What the recipe has added, moved by a little; then as it was, bit for bit."""
    g = torch.Generator().manual_seed(0)
    added = [p for n, p in tuned.named_parameters()
             if ".burnish." in f".{n}" and type(p) is nn.Parameter and p.is_floating_point()]
    kept = [p.detach().clone() for p in added]
    try:
        for p in added:
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p))
        yield
    finally:
        for p, value in zip(added, kept, strict=True):
            p.copy_(value)
