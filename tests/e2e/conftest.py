"""Model folders as people have them: weights, config, and a real tokenizer or picture processor."""

from __future__ import annotations

import pytest
import torch

WORDS = ["the cat sat on the mat", "a dog ran in the park", "stocks fell as rates rose",
         "the bank cut its rates", "my dog and my cat play", "markets rose on bank news"]


def wordpiece(folder):
    """A BERT tokenizer trained on a few sentences; returns the number of its words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(WORDS * 4, trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=special, show_progress=False))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", raw.token_to_id("[CLS]")), ("[SEP]", raw.token_to_id("[SEP]"))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64)
    made.save_pretrained(folder)
    return len(made)


def bytelevel(folder, **special):
    """A byte-level BPE tokenizer such as GPT-2's and Qwen's; returns the number of its words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(WORDS * 4, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=128, **special)
    made.save_pretrained(folder)
    return len(made)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A base with neither a classifier nor class names, dropout as published."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=wordpiece(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A small Qwen3, whose config pads with another id than its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=bytelevel(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=128,
        eos_token_id=0, bos_token_id=None, pad_token_id=None)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
