"""What is said in a recording, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import ConfigError, DataError
from ..alphabet import Spoken, Written, drawn_from
from ..from_files import Sounds
from ..places import check_local, config_of
from ..rows import Rows
from .base import Batch
from .heard import Heard


class Sentences(Sounds):
    """Recordings with the tokens of what is said in them; those too short for their text are left
    out. texts: as they are learnt."""

    def __init__(self, rows: Any, texts: Sequence[str], tokens: Sequence[Sequence[int]],
                 frames: Any, *how: Any):
        super().__init__(rows, tokens, *how)
        needs = [len(t) + sum(a == b for a, b in zip(t, t[1:], strict=False)) for t in tokens]
        has = [frames(n) for n in self.samples]
        self.sources = [i for i in range(len(rows)) if 0 < needs[i] <= has[i]]
        if lost := len(rows) - len(self.sources):
            self.notes.append(f"{lost} of {len(rows)} sounds have fewer frames than their text has "
                              "letters (or no text is left), and are left out")
        if not self.sources:
            raise DataError("no sound has as many frames as its text has letters; nothing can be "
                            "learnt")
        self.texts = [texts[i] for i in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    def source(self, i: int) -> int:
        return self.sources[i]

    def length(self, i: int) -> int:
        return self.samples[self.sources[i]]

    def row(self, i: int) -> dict[str, Any]:
        return super().row(self.sources[i])

    def longest(self, count: int) -> list[dict[str, Any]]:
        """The longest sounds beside the longest texts, which may be of other rows."""
        texts = sorted(range(len(self)), key=lambda i: -len(self.labels[self.sources[i]]))
        return [row | {"labels": self.labels[self.sources[i]]}
                for row, i in zip(super().longest(count), texts[:count], strict=True)]


class SpeechRecognition(Heard):
    """The model's input as :class:`Heard` has it, ``labels`` (B, S) the tokens of the text, -100
    behind it, and ``counted`` (B,) the frames that are heard.

    Connectionist temporal classification (Graves et al., 2006): the sum of all ways in which frames
    may spell the text, by characters; the mean over rows of -log p per character, as transformers
    has it with ``ctc_loss_reduction="mean"``. A model without a tokenizer writes with the
    characters of the training texts.
    """

    metric = "wer"
    greater_is_better = False
    smooths = False
    own_loss = True
    truth = ("labels", "counted")

    def prepare(self) -> None:
        p = self.processor
        if hasattr(p, "feature_extractor") and hasattr(p, "tokenizer"):    # transformers' own pair
            p = self.processor = Spoken(p.feature_extractor, p.tokenizer)
        if not isinstance(p, Spoken):
            raise ConfigError(f"{type(p).__name__} does not read sounds and write texts; give "
                              "processor= with the folder of a model of speech")
        super().prepare()
        texts = self.data.splits["train"]["text"][:] if "train" in self.data.splits else []
        self._drawn = p.tokenizer is None
        if p.tokenizer is None:
            if not texts:
                raise ConfigError("the model has no tokenizer, and there are no texts to draw its "
                                  "characters from")
            p.tokenizer = drawn_from(texts)
            self.notes.append(f"the model has no tokenizer: it gets the {len(p.tokenizer) - 5} "
                              "characters of the training texts")
        if not hasattr(p.tokenizer, "word_delimiter_token") or p.tokenizer.pad_token_id is None:
            raise ConfigError(f"{type(p.tokenizer).__name__} does not write letter by letter with "
                              "blanks between them; speech recognition is served with tokenizers "
                              "such as Wav2Vec2CTCTokenizer")
        self._written: Written | None = None
        self._width = len(p.tokenizer)

    @property
    def extractor(self) -> Any:
        return self.processor.extractor if isinstance(self.processor, Spoken) else self.processor

    def written(self, texts: Sequence[str]) -> Written:
        """How texts are brought to the tokenizer's alphabet, told by the first that are read."""
        if self._written is None:
            self._written = Written.by(self.processor.tokenizer, texts, self.data.source)
            self.notes += self._written.notes()
        return self._written

    # -- the model -----------------------------------------------------------------------------
    def load(self, name: str, trust_remote_code: bool = False, unread: bool = False, **kw: Any
             ) -> nn.Module:
        check_local(name)
        config = config_of(name, self.data.task, trust_remote_code)
        has = getattr(config, "vocab_size", None)
        self._width = has if self._spells(has) else len(self.processor.tokenizer)
        if has is not None and has != self._width and not self._drawn:
            self.notes.append(f"the model writes {has} tokens and its tokenizer {self._width}: its "
                              "head is drawn anew")
        return super().load(name, trust_remote_code, unread, **kw)

    def _spells(self, width: Any) -> bool:
        """Whether a head of this width writes all that is learnt: many tokenizers have beginnings
        and ends behind the last token that their model was trained to write, and some heads are
        filled up to a round number behind the last token of theirs."""
        t = self.processor.tokenizer
        ends = {t.bos_token, t.eos_token} - {t.pad_token, t.word_delimiter_token}
        needs = 1 + max(i for w, i in t.get_vocab().items() if w not in ends)
        round_up = () if self._drawn else (-(-len(t) // m) * m for m in (8, 16))
        return isinstance(width, int) and (needs <= width <= len(t) or width in round_up)

    def head(self) -> dict[str, Any]:
        t = self.processor.tokenizer
        return {"vocab_size": self._width, "pad_token_id": t.pad_token_id,
                "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
                "ignore_mismatched_sizes": True}

    def fit_head(self, model: nn.Module) -> nn.Module:
        config = getattr(model, "config", None)
        has, wanted = getattr(config, "vocab_size", None), len(self.processor.tokenizer)
        if not self._spells(has):
            raise ConfigError(f"{type(model).__name__} writes {has} tokens and the tokenizer has "
                              f"{wanted}; give the model by its folder, or with "
                              f"vocab_size={wanted}")
        return model

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        config = getattr(model, "config", None)
        kernels, strides = (getattr(config, k, None) for k in ("conv_kernel", "conv_stride"))
        theirs = getattr(model, "_get_feat_extract_output_lengths", None)
        self._cuts = list(zip(kernels, strides, strict=True)) if kernels and strides else []
        if theirs is None or not self._cuts or any(
                int(theirs(torch.tensor(n))) != self.frames(n) for n in (4000, 16001, 70123)):
            raise ConfigError(f"{type(model).__name__}: how many frames it makes of a sound cannot "
                              "be told beforehand; speech recognition is served for wav2vec2 and "
                              "its kin, without adapter layers")

    def frames(self, samples: int) -> int:
        """How many frames the model's convolutions make of so many samples."""
        for kernel, stride in self._cuts:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        written = self.written(rows["text"][:])
        texts = [written(t) for t in rows["text"]]
        tokens = [self.processor.tokenizer(t)["input_ids"] for t in texts]
        made = Sentences(rows, texts, tokens, self.frames, self.extractor, self.limit,
                         self.data.where.get(split))
        self.hear(split, made)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        made = self.padded(rows)
        heard = made[self.extractor.model_input_names[0]]
        long = made["attention_mask"].sum(-1) if "attention_mask" in made else \
            torch.full((len(rows),), heard.shape[-1])
        labels = [torch.tensor(r["labels"]) for r in rows]
        return made | {"labels": pad_sequence(labels, batch_first=True, padding_value=-100),
                       "counted": torch.tensor([self.frames(int(n)) for n in long])}

    # -- loss and figures ----------------------------------------------------------------------
    def spelt(self, logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """(-log p of each row's text, its length)."""
        shares = F.log_softmax(logits, -1, dtype=torch.float32).transpose(0, 1)
        lengths = (labels != -100).sum(-1)
        blank = self.processor.tokenizer.pad_token_id
        sums = torch._ctc_loss(shares, labels.clamp(min=0), counted, lengths, blank, True)[0]
        return torch.where(sums.isinf(), 0.0, sums), lengths

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> torch.Tensor:
        sums, lengths = self.spelt(self.logits(outputs), *labels)
        return (sums / lengths.clamp(min=1)).mean()

    def right(self, truth: Any) -> torch.Tensor:
        if isinstance(truth, Mapping):
            return torch.as_tensor(truth["labels"])
        return torch.as_tensor(truth[0] if isinstance(truth, tuple | list) else truth)

    def kept(self, outputs: Any, truth: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest token of every frame, -100 behind the last that is heard."""
        labels, counted = (truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        logits = self.logits(outputs)
        sums, lengths = self.spelt(logits, labels, counted)
        place = torch.arange(logits.shape[1], device=logits.device)
        said = torch.where(place < counted.unsqueeze(1), logits.argmax(-1), -100)
        return said, torch.stack([sums, lengths.float()], -1)

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """Words and characters to be changed, left out and put in, over those that are right."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        assert isinstance(rows, Sentences)
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        said = [self.read(torch.as_tensor(a)) for a in answers]
        return {"loss": total / max(count, 1.0), "wer": float(word_error_rate(said, rows.texts)),
                "cer": float(char_error_rate(said, rows.texts))}

    def read(self, tokens: torch.Tensor) -> str:
        """Frames as a text: what is said twice running is one letter, blanks are none."""
        t = self.processor.tokenizer
        once = torch.unique_consecutive(tokens[tokens >= 0]).tolist()
        marks = set(t.all_special_ids) - {t.word_delimiter_token_id}
        kept = [i for i in once if i < len(t) and i not in marks]   # a head may be filled up
        return t.decode(kept, group_tokens=False).strip()

    # -- answers to people ---------------------------------------------------------------------
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        return {"text": self.read(self.logits(model(**self.encode(row)))[0].argmax(-1))}
