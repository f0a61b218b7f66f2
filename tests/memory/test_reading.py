"""Reading a model's files is promised from their headers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from burnish.formats.safe import Tensors
from burnish.memory.reading import read_bytes, reading
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


def test_tensors_that_are_joined_stand_twice():
    """Four experts of a file become one tensor of the model."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
    model.norm = nn.Parameter(torch.empty(8, device="meta"))
    files = {f"expert.{n}": torch.empty(8, 8, device="meta") for n in range(4)}
    files["norm"] = torch.empty(8, device="meta")
    assert read_bytes(files, model) == 2 * 4 * (4 * 8 * 8) + 4 * 8


def test_threads_are_the_librarys_own_again(monkeypatch):
    import os
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    with reading():
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
