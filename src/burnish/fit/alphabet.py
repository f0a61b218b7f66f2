"""What a model of speech writes with: its own tokenizer, or the characters of the transcripts."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from ..core.reading import reading
from ..formats.hub import local
from .repository import file_of

#: what a tokenizer of CTC has beside its characters; the blank, between two letters, is the first
_MARKS = ("<pad>", "<s>", "</s>", "<unk>", "|")
#: any of these says that a model has a tokenizer
_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
#: share of characters that a tokenizer may lack before its alphabet is another
_LACKS = 0.2


@dataclass
class Spoken:
    """What reads recordings, and what writes texts: None until the transcripts say with what."""

    extractor: Any
    tokenizer: Any = None

    def save_pretrained(self, folder: str | Path) -> None:
        self.extractor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def with_tokenizer(extractor: Any, name: str, trust_remote_code: bool) -> Spoken:
    """With the model's tokenizer, where it has one."""
    import transformers

    if not any(file_of(name, f) for f in _FILES):
        return Spoken(extractor)
    with reading(f"the tokenizer of {name}", ConfigError, "give processor="):
        try:
            return Spoken(extractor, transformers.AutoTokenizer.from_pretrained(
                local(name, code=trust_remote_code), trust_remote_code=trust_remote_code))
        except (OSError, ValueError) as e:
            raise ConfigError(f"no tokenizer could be loaded from {name}: "
                              f"{str(e).partition(chr(10))[0]}; give processor=") from None


def drawn_from(texts: Sequence[str]) -> Any:
    """A tokenizer of the characters of these texts, in their order, as wav2vec2's is: a word ends
    with "|"."""
    from transformers import Wav2Vec2CTCTokenizer

    letters = sorted({c for t in texts for c in t if not c.isspace()} - {"|"})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps({c: i for i, c in enumerate((*_MARKS, *letters))}), "utf-8")
        return Wav2Vec2CTCTokenizer(str(file))


@dataclass
class Written:
    """How texts are brought to a tokenizer's alphabet.

    case: "upper" or "lower" where that is the only one it has. known: characters it writes; None
    where it cuts texts into longer pieces itself. lacks: others that were met, and are left out.
    """

    case: str | None
    known: frozenset[str] | None
    lacks: frozenset[str] = frozenset()
    #: whether texts were met in another case
    recased: bool = False

    @classmethod
    def by(cls, tokenizer: Any, texts: Sequence[str], source: str) -> Written:
        """Raises DataError where the alphabet lacks more than a fifth of what is written."""
        counts = Counter(c for t in texts for c in " ".join(t.split()))
        vocabulary = set(tokenizer.get_vocab())
        if any(len(w) > 1 for w in vocabulary - set(_MARKS) - set(tokenizer.all_special_tokens)):
            return cls(None, None)
        known = frozenset(vocabulary - {tokenizer.word_delimiter_token} | {" "})

        case = _only(known)
        lacks = frozenset(c for c in counts if not known.issuperset(_cased(c, case)))
        if sum(counts[c] for c in lacks) > _LACKS * counts.total():
            has = "".join(sorted(c for c in known if len(c) == 1 and c != " "))
            raise DataError(f"{source}: the tokenizer writes {has[:60]!r}, and the texts are "
                            f"written with {''.join(sorted(lacks))[:60]!r}; give a model of their "
                            "alphabet, or one without a tokenizer, which gets the characters of "
                            "the texts")
        return cls(case, known, lacks, any(_cased(t, case) != t for t in texts))

    def __call__(self, text: str) -> str:
        text = _cased(" ".join(text.split()), self.case)
        if self.known is None:
            return text
        return " ".join("".join(c for c in text if c in self.known).split())

    def notes(self) -> list[str]:
        out = []
        if self.recased:
            big = "capitals" if self.case == "upper" else "small letters"
            out.append(f"texts are learnt and measured in {big}, which the tokenizer writes")
        if self.lacks:
            out.append(f"characters that the tokenizer lacks are left out of texts: "
                       f"{' '.join(sorted(self.lacks))}")
        return out


def _only(known: frozenset[str]) -> str | None:
    """The case of all letters of an alphabet, whatever the texts: None where it has both or none.
    """
    letters = [c for c in known if len(c) == 1 and c.lower() != c.upper()]
    big, small = (any(c == _cased(c, case) for c in letters) for case in ("upper", "lower"))
    return None if big == small else "upper" if big else "lower"


def _cased(text: str, case: str | None) -> str:
    return text.upper() if case == "upper" else text.lower() if case == "lower" else text
