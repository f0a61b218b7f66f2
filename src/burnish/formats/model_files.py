"""The files of a model folder, as transformers names them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

#: tokenizers, image processors and chat templates
PROCESSOR = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spiece.model",
             "preprocessor_config.json", "processor_config.json", "chat_template.*",
             "added_tokens.json")


def copy_processor(sources: Iterable[Path], output: Path) -> None:
    """Tokenizer or image processor and chat template beside the weights; later sources win."""
    for file in (f for s in sources if s.is_dir() for name in PROCESSOR for f in s.glob(name)):
        if file.is_file():
            shutil.copy2(file, output / file.name)
