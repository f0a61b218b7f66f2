"""The files of a model folder, as transformers names them, looked at before anything is loaded.

A configuration of nine kilobytes may ask for gigabytes: so what it asks for is built without
memory first (on the meta device) and compared with what the weight files hold.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError, FormatError
from ..core.reading import plain, reading
from . import safe
from .hub import local

#: tokenizers, image processors and chat templates
PROCESSOR = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spiece.model",
             "preprocessor_config.json", "processor_config.json", "chat_template.*",
             "added_tokens.json")

#: parameters a model may have beyond its files (a new head), times what its files hold
SLACK, TIMES = 32_000_000, 4
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
          "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth", "depths")
#: files with more parameters than this are as large as what they could ask for
SMALL = 128_000_000


def copy_processor(sources: Iterable[Path], output: Path) -> None:
    """Tokenizer or image processor and chat template beside the weights; later sources win."""
    for file in (f for s in sources if s.is_dir() for name in PROCESSOR for f in s.glob(name)):
        if file.is_file():
            shutil.copy2(file, output / file.name)


@contextmanager
def loading(name: str, what: str, weights: bool = False, code: bool = False) -> Iterator[str]:
    """Whatever a library raises inside is a ConfigError that names the model; its configuration is
    looked at first. Gives the folder that it lies in: `name`, or what the hub has under that name,
    with its weights or its code where they are asked for."""
    with reading(f"{what} {plain(name)}", ConfigError):
        where = local(name, weights, code)
        folder = Path(where).expanduser()
        if (folder / "config.json").exists():
            check_config(folder)
        yield where


def named(model: nn.Module, name: str) -> nn.Module:
    """The model, which says that it is of `name` and not of a folder in the hub's cache."""
    model.name_or_path = name
    if hasattr(getattr(model, "config", None), "_name_or_path"):
        model.config._name_or_path = name
    return model


def unfound(name: str, error: BaseException) -> str:
    """Why a library found no files under `name`, in words: it speaks of a folder in the hub's cache
    where a name was meant."""
    said = re.sub(r"\S*models--\S+/snapshots/[0-9a-f]{40}", lambda _: name, str(error))
    if "contains custom code" in said:
        return "code comes with it, which runs where trust_remote_code=True lets it"
    return plain(said.strip().partition("\n")[0])


def check_config(folder: Path) -> dict[str, Any]:
    """The configuration as it stands in the file: JSON, finite, every name once."""
    config = safe.read_json(folder / "config.json", finite=True)
    for key, value in _numbers(config):
        if key.startswith(("num_", "n_")) and value > 1_000_000:
            raise FormatError(f"{folder / 'config.json'}: {plain(key, 60)} = {value}; no model has "
                              "so many")
    return config


def check_weights(name: str, build: Callable[[], nn.Module]) -> None:
    """Raises FormatError when a local folder's weights are pickled, or are much less than what
    its configuration asks for. build: makes the model; it is called on the meta device."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    config = check_config(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in safe.weight_files(folder):
        shapes |= safe.header(file)
    held = sum(math.prod(s) for s in shapes.values())
    if held > SMALL:
        return
    for key, value in _numbers(config):
        if key in LAYERS and value > 64 + 8 * len(shapes):     # some models share their layers
            raise FormatError(f"{folder}: {plain(key, 60)} = {value}, but the weights are "
                              f"{len(shapes)} tensors")
    with torch.device("meta"):
        model = build()
    asked = sum(p.numel() for p in model.parameters())
    if asked > SLACK + TIMES * held * (8 if "quantization_config" in config else 1):
        raise FormatError(f"{folder}: the configuration asks for {asked:,} parameters, the "
                          f"weight files hold {held:,}; they do not belong together")


def _numbers(tree: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers of a configuration, with the name they stand under."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _numbers(value, str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value, name)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield name, tree
