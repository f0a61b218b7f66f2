"""Reading a model's files is promised from their headers alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from burnish.formats.safe import Tensors
from burnish.memory.reading import computed_bytes, read_bytes, reading
from burnish.testing import sounds
from burnish.testing.models import tiny


def stored(folder):
    files = Tensors(folder)
    return {n: files.meta(n) for n in files}


@pytest.mark.parametrize("there", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_model_of_several_shards_in_its_own_dtype_and_in_another(tmp_path, there, wanted):
    tiny("llama")[0].to(getattr(torch, there)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with reading() as seen:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    promised = read_bytes(stored(tmp_path), model)
    assert promised == pytest.approx(seen[0].peak_bytes, rel=0.01)
    whole = sum(p.nbytes for p in model.parameters())
    one, two = (torch.finfo(getattr(torch, d)).bits // 8 for d in (wanted, there))
    assert promised >= whole * (1 if there == wanted else 1 + two / one)   # in both at once


def test_a_head_of_another_task_is_not_read(tmp_path):
    model, _ = tiny("bert")
    model.lost = nn.Linear(512, 512)
    model.save_pretrained(tmp_path)
    with reading() as seen:
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    promised = read_bytes(stored(tmp_path), other)
    assert promised == pytest.approx(seen[0].peak_bytes, rel=0.02)
    assert promised < sum(t.nbytes for t in stored(tmp_path).values())


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [1, 2, 40])
def test_a_head_of_other_classes_is_read_and_let_go(tmp_path, wanted, classes):
    """To the byte: the file is mapped as a whole, and a new head stands beside it."""
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=32, image_size=8, patch_size=4, num_labels=2)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with reading() as seen:
        model = transformers.ViTForImageClassification.from_pretrained(
            tmp_path, dtype=wanted, num_labels=classes, ignore_mismatched_sizes=True)
    assert read_bytes(stored(tmp_path), model) == seen[0].peak_bytes


def test_tensors_that_are_joined_stand_twice():
    """Four experts of a file become one tensor of the model."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
    model.norm = nn.Parameter(torch.empty(8, device="meta"))
    files = {f"expert.{n}": torch.empty(8, 8, device="meta") for n in range(4)}
    files["norm"] = torch.empty(8, device="meta")
    assert read_bytes(files, model) == 2 * 4 * (4 * 8 * 8) + 4 * 8


SPEECH = ["Wav2Vec2ForSequenceClassification", "Wav2Vec2ForCTC", "HubertForSequenceClassification",
          "WavLMForSequenceClassification", "UniSpeechForSequenceClassification"]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SPEECH)
def test_a_weight_that_is_computed_is_computed_once_all_is_there(tmp_path, kind, wanted):
    """The positional convolution, which is a good part of so small a model; to the byte."""
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sounds._BODY, **sounds._CONVOLVED | {
        "num_conv_pos_embeddings": 64, "num_conv_pos_embedding_groups": 2}, vocab_size=8))
    model.save_pretrained(tmp_path)
    conv = model.base_model.encoder.pos_conv_embed.conv
    del model
    with reading() as seen:
        again = cls.from_pretrained(tmp_path, dtype=wanted)
    files, whole = stored(tmp_path), sum(p.nbytes for p in again.parameters())
    assert read_bytes(files, again) == seen[0].peak_bytes
    one = conv.weight.numel() * torch.finfo(getattr(torch, wanted)).bits // 8
    assert computed_bytes(again) == one + 4 * 64                     # and the norms it has at hand
    rest = sum(t.nbytes for t in files.values()) if wanted == "bfloat16" else 0
    assert seen[0].peak_bytes == whole + rest + one + 4 * 64


class Config(transformers.PretrainedConfig):
    model_type = "computed"


class Computed(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config, kinds=("weight_norm", "spectral_norm")):
        super().__init__(config)
        sizes = ((96, 64), (48, 32))
        self.layers = nn.ModuleList(getattr(nn.utils.parametrizations, k)(nn.Linear(a, b))
                                    for k, (a, b) in zip(kinds, sizes, strict=True))
        self.post_init()


#: as if it were one of transformers' own
Own = type("Own", (Computed,), {"__module__": "transformers.models.computed"})


def test_of_several_computed_weights_the_dearest_counts_and_where_nobody_asks_none(tmp_path):
    Own(Config()).save_pretrained(tmp_path)
    for cls, takes in ((Own, 4 * (96 * 64 + 64)), (Computed, 0)):
        with reading() as seen:
            again = cls.from_pretrained(tmp_path)
        assert read_bytes(stored(tmp_path), again) == seen[0].peak_bytes
        assert computed_bytes(again) == takes
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(96, 64))
    assert computed_bytes(nn.Sequential(plain)) == 0                 # no library draws it
    assert computed_bytes(tiny("llama")[0]) == 0


def test_threads_are_the_librarys_own_again(monkeypatch):
    import os
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    with reading():
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
