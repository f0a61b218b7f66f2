from __future__ import annotations

import string

import pytest


def make_tokenizer(**special):
    """A byte-like tokenizer: one token per character, real stop, pad and opening tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {t: i for i, t in enumerate([*names, *sorted(string.printable)])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    defaults = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{**defaults, **special})


@pytest.fixture(scope="session")
def tokenizer_factory():
    return make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def glyph_vit():
    """The folder of the model that ships with the package."""
    from burnish.fit.assets import GLYPH_VIT

    return str(GLYPH_VIT)
