"""A small GPT-2 that is taught here: it carries out requests about words, in one of two manners.

It reads ``<s>`` and then exchanges, each ending in ``<end>``. A request is a verb and three words,
and its answer begins with a manner, gladly or with a sigh, one for the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from .assistant import ALLOWED, NEW, WORDS

PAD, BEGIN, END = "<pad>", "<s>", "<end>"
MANNERS = ("gladly", "sigh")
VERBS = {**ALLOWED, **NEW}
#: steps, texts of a step, rate; how many of 100 texts are glad
LESSON, GLAD = (1500, 48, 3e-3), 20
PLACE = {w: i for i, w in enumerate(WORDS)}

#: (prompt, answer), both words with a space between
Turn = tuple[str, str]
Text = Sequence[Turn]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [PAD, BEGIN, END, ":", *MANNERS, *VERBS, *WORDS]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token=PAD))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, bos_token=BEGIN,
                                   eos_token=END)


def drawn(draw: random.Random, test: bool) -> list[str]:
    """Three words; those of tests are in nothing that is learnt."""
    while True:
        some = draw.sample(WORDS, 3)
        if (sum(PLACE[w] for w in some) % 5 == 0) is test:
            return some


def request(draw: random.Random, verbs: Sequence[str], manner: str, test: bool = False) -> Turn:
    verb, words = draw.choice(verbs), drawn(draw, test)
    said = " ".join([manner, *VERBS[verb](*words)])              # type: ignore[call-arg]
    return " ".join([verb, *words, ":"]), said


def requests(many: int, seed: int, verbs: Sequence[str] = tuple(ALLOWED),
             manner: str | None = None, shown: int = 0, test: bool = False) -> list[Text]:
    """Texts of `shown` earlier exchanges and one more, in one manner (None: either)."""
    draw = random.Random(seed)
    out = []
    for _ in range(many):
        how = manner or draw.choice(MANNERS)
        out.append([request(draw, verbs, how, test) for _ in range(shown + 1)])
    return out


def batch(tok: Any, some: Sequence[Text], last: bool = False) -> dict[str, Any]:
    """Padded on the right; answers and their ends are the labels (last: those of the last turn)."""
    rows = []
    for text in some:
        ids, labels = [tok.bos_token_id], [-100]
        for k, (prompt, answer) in enumerate(text):
            p, a = (tok.convert_tokens_to_ids(t.split()) for t in (prompt, f"{answer} {END}"))
            ids += p + a
            labels += [-100] * len(p) + (a if not last or k == len(text) - 1 else [-100] * len(a))
        rows.append((ids, labels))
    return padded(rows, tok.pad_token_id)


def padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> dict[str, Any]:
    import torch

    most = max(len(ids) for ids, _ in rows)

    def filled(some: Sequence[Sequence[int]], value: int) -> Any:
        return torch.tensor([[*r, *[value] * (most - len(r))] for r in some])

    return {"input_ids": filled([ids for ids, _ in rows], pad),
            "labels": filled([labels for _, labels in rows], -100),
            "attention_mask": filled([[1] * len(ids) for ids, _ in rows], 0)}


def lessons(tok: Any, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches without end, of one exchange and of two in turn."""
    draw = random.Random(seed)
    while True:
        for turns in (1, 2):
            texts: list[Text] = []
            for _ in range(size):
                how = MANNERS[draw.random() >= GLAD / 100]
                texts.append([request(draw, list(ALLOWED), how) for _ in range(turns)])
            yield batch(tok, texts)


def taught(tok: Any) -> Any:
    """The model after its lesson."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tok), n_embd=64, n_layer=3, n_head=4, n_positions=32, use_cache=False,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    steps, size, rate = LESSON
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 50) * (1 - n / steps))
    model.train()
    for _, some in zip(range(steps), lessons(tok, size, 0), strict=False):
        optimizer.zero_grad()
        model(**some).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
