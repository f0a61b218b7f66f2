"""Examples of one task in one sequence, of which every answer is learnt (many-shot in-context
tuning: "You Only Fine-tune Once", 2025, whose code was not public).

    s = x_1 y_1 x_2 y_2 ... x_n y_n        x_i prompts, y_i answers with their stops, of one task
    L = - sum_i log p(y_i | x_1 y_1 ... x_(i-1) y_(i-1) x_i)

One pass over the sequence is what n passes over its beginnings would be, at about 2 / (n + 1) of
their tokens; it trains the answer to no example shown, to one, ..., to n - 1. A batch divides its
sum by the answers' tokens, not answer by answer (unconfirmed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import chat, tools
from .rows import Rows, Turns


class Shots(Rows):
    """Up to `shots` examples in a row, fewer where `max_length` tokens hold fewer.

    Examples share a row only where they are of one task: alike in ``group``, in the `keys` that a
    recipe reads, in what the system says and in the tools they offer. Rows are samples of a batch,
    so none sees another.

    again: each pass over the rows deals a task's examples anew; row i of pass k is asked for as
    ``i + k * len(rows)``. What is dealt is a function of seed, pass and task. A task has as many
    rows in every pass as in the first: where examples are of unlike length, a pass may leave the
    last of its order out, or begin its order again.
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None,
                 where: Callable[[int], str] | None, *, shots: int, seed: int, again: bool,
                 keys: Sequence[str] = ()):
        alone = Turns(rows, tokenizer, max_length, where)
        self.notes, self.data, self.tokenizer, self.where = alone.notes, rows, tokenizer, where
        self.shots, self.max_length, self.seed, self.redrawn = shots, max_length, seed, again
        self.plain = "prompt" in rows.column_names
        self.lengths = {alone.source(k): alone.length(k) for k in range(len(alone))}
        told = [rows[k][:] for k in ("group", *keys) if k in rows.column_names]
        tasks: dict[Any, list[int]] = {}
        for i in self.lengths:
            tasks.setdefault((*(t[i] for t in told), self._system(i)), []).append(i)
        self.tasks = list(tasks.values())
        self._dealt: dict[int, list[list[int]]] = {}
        first = [self._deal(0, t, None) for t in range(len(self.tasks))]
        self.counts = [len(hands) for hands in first]
        self._dealt[0] = [hand for hands in first for hand in hands]
        self.tokens = [self.made(i) for i in range(min(3, len(self)))]
        many = sum(map(len, self._dealt[0])) / len(self)
        self.notes = [*self.notes, f"{len(self.lengths)} examples of {len(self.tasks)} "
                      f"{'task' if len(self.tasks) == 1 else 'tasks'} stand in {len(self)} "
                      f"sequences, {many:.3g} in each"]

    def _system(self, i: int) -> str:
        """What rules a conversation before anybody speaks: its system, and the tools it offers."""
        if self.plain:
            return ""
        turns = self.data[i]["messages"]
        ruled = "".join(t["content"] for t in turns[:1] if t["role"] == "system")
        return f"{ruled}{self.data[i].get('tools') or ''}"

    # -- which examples stand together -------------------------------------------------------
    def _deal(self, turn: int, task: int, count: int | None) -> list[list[int]]:
        """A task's examples in the order of this pass, as many in a hand as fit: `count` hands, or
        as many as one round makes."""
        own = self.tasks[task]
        mixed = (self.seed * 1_000_003 + turn) * 1_000_003 + task
        g = torch.Generator().manual_seed(mixed % 2**63)
        hands: list[list[int]] = []
        while not hands or count is not None and len(hands) < count:
            room = 0
            for k in torch.randperm(len(own), generator=g).tolist():
                long = self.lengths[own[k]]
                if not room or len(hands[-1]) == self.shots or self._over(room + long):
                    hands.append([])
                    room = 0
                hands[-1].append(own[k])
                room += long
        return hands[:count]

    def _over(self, tokens: int) -> bool:
        return self.max_length is not None and tokens > self.max_length

    def hands(self, turn: int) -> list[list[int]]:
        """The rows of a pass, each as the examples it is made of."""
        if turn not in self._dealt:
            self._dealt = {0: self._dealt[0], turn: [
                hand for t, n in enumerate(self.counts) for hand in self._deal(turn, t, n)]}
        return self._dealt[turn]

    # -- as tensors --------------------------------------------------------------------------
    def joined(self, hand: Sequence[int]) -> chat.Tokens:
        """These examples end to end, as a prompt that shows them is written."""
        if self.plain:
            text, learnt = "", []
            for i in hand:
                one = chat.mark_completion(self.tokenizer, self.data[i]["prompt"],
                                           self.data[i]["completion"])
                learnt += [(a + len(text), b + len(text)) for a, b in one.learnt]
                text += one.text
            return chat.tokenize(self.tokenizer, chat.Marked(text, tuple(learnt)), None,
                                 special=True)
        turns: list[dict[str, str]] = []
        for i in hand:                                   # all begin with the same system
            said = self.data[i]["messages"]
            turns += said[1:] if turns and said[0]["role"] == "system" else said
        at = self.where(hand[0]) if self.where else f"row {hand[0]}"
        offer = tools.of(self.data[hand[0]])
        return chat.tokenize(self.tokenizer, chat.mark(self.tokenizer, turns, at, offer), None)

    def made(self, i: int) -> chat.Tokens:
        """Row i of a pass; where the joint text has more tokens than its parts, fewer examples."""
        turn, i = divmod(i, len(self))
        hand = self.hands(turn)[i]
        found = self.joined(hand)
        while self._over(len(found.input_ids)) and len(hand) > 1:
            hand = hand[:-1]
            found = self.joined(hand)
        return self._cut(found)

    def _cut(self, tokens: chat.Tokens) -> chat.Tokens:
        return chat.Tokens(tokens.input_ids[:self.max_length], tokens.labels[:self.max_length])

    def __len__(self) -> int:
        return sum(self.counts)

    def source(self, i: int) -> int:
        return self.hands(0)[i][0]

    def length(self, i: int) -> int:
        turn, i = divmod(i, len(self))
        return min(sum(self.lengths[k] for k in self.hands(turn)[i]), self.max_length or 2**63)

    def longest(self, count: int) -> list[dict[str, Any]]:
        """The longest examples of a task in one row, up to `max_length`: no pass deals more."""
        longest = [sorted(own, key=lambda i: -self.lengths[i])[:self.shots] for own in self.tasks]
        hand = max(longest, key=lambda hand: sum(self.lengths[i] for i in hand))
        tokens = self._cut(self.joined(hand))
        row = {"input_ids": tokens.input_ids, "labels": tokens.labels}
        return [row | {k: v[hand[0]] for k, v in self.context.items()}] * count

    def row(self, i: int) -> dict[str, Any]:
        t = self.made(i)
        return {"input_ids": t.input_ids, "labels": t.labels}
