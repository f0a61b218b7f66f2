"""``fit`` of a folder with a storage part: each weight goes from its file into the stored form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import burnish
from burnish.core import unread
from burnish.core.errors import FormatError
from burnish.core.unread import is_unread
from burnish.engine.originals import Originals
from burnish.fit.data import read
from burnish.fit.tasks import Task, task_for

RECIPE = "nf4 + lora(rank=2)"
SMALL = {"max_steps": 2, "batch_size": 4, "test": False, "validation": 4, "report": False,
         "quiet": True, "seed": 3}


@pytest.fixture(autouse=True)
def every_tensor_waits(monkeypatch):
    monkeypatch.setattr(unread, "WAITS", 1)
    monkeypatch.setattr("burnish.engine.originals.IN_MEMORY", 1)


def folder_of(where, tokenizer, shard="20KB", **settings):
    """A Llama no weight of which is more than a sixth of all, and rows for it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        **settings}))
    model.save_pretrained(where / "base", max_shard_size=shard)
    tokenizer.save_pretrained(where / "base")
    lines = [json.dumps({"prompt": "a", "completion": "b " * (3 + i % 9)}) for i in range(20)]
    (where / "x.jsonl").write_text("\n".join(lines) + "\n")
    return where / "base", where / "x.jsonl", sum(p.nbytes for p in model.parameters())


def whole(monkeypatch):
    """The model is loaded whole, as before."""
    load = Task.load
    monkeypatch.setattr(Task, "load", lambda self, name, trust=False, unread=False, **kw:
                        load(self, name, trust, False, **kw))


def same(left, right):
    left, right = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (left, right))
    assert left.keys() == right.keys()
    assert all(torch.equal(t, right[n]) and t.dtype == right[n].dtype for n, t in left.items())


@pytest.mark.parametrize(("shard", "tied", "recipe"), [
    ("20KB", True, RECIPE),
    *[pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("20KB", False, RECIPE), ("5GB", False, RECIPE), ("20KB", False, "bf16 + lora(rank=2)"),
        ("20KB", False, None))]])
def test_what_is_trained_is_bit_for_bit_what_training_the_loaded_model_gives(
        shard, tied, recipe, tmp_path, tokenizer, monkeypatch):
    base, data, _ = folder_of(tmp_path, tokenizer, shard, tie_word_embeddings=tied)
    one = burnish.fit(base, data, recipe, output=tmp_path / "one", **SMALL)
    assert not is_unread(one.tuned.model)
    whole(monkeypatch)
    two = burnish.fit(base, data, recipe, output=tmp_path / "two", **SMALL)
    same(one.tuned.model, two.tuned.model)
    left, right = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert left and left.keys() == right.keys()
    assert all(torch.equal(t, right[n]) for n, t in left.items())
    assert one.metrics == two.metrics


def test_the_load_is_as_promised_and_never_the_whole_model(tmp_path, tokenizer, monkeypatch):
    base, data, size = folder_of(tmp_path, tokenizer)
    run = burnish.fit(base, data, RECIPE, output=tmp_path / "one", **SMALL)
    load = run.facts["memory"]["moments"]["load"]
    assert load["promised"] == load["measured"] < size
    whole(monkeypatch)
    run = burnish.fit(base, data, RECIPE, output=tmp_path / "two", **SMALL)
    assert run.facts["memory"]["moments"]["load"]["measured"] >= size > load["measured"]


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, tokenizer):
    base, data, _ = folder_of(tmp_path, tokenizer)
    more = {**SMALL, "save_steps": 1, "lr_scheduler_type": "constant"}
    straight = burnish.fit(base, data, RECIPE, output=tmp_path / "one", **more)
    burnish.fit(base, data, RECIPE, output=tmp_path / "two", **{**more, "max_steps": 1})
    resumed = burnish.fit(base, data, RECIPE, output=tmp_path / "two", resume=True, **more)
    same(straight.tuned.model, resumed.tuned.model)


def test_a_new_head_is_drawn_as_when_the_model_is_loaded(glyph_vit, tmp_path):
    task = task_for(read("digits"), glyph_vit)
    task.data.labels = (*task.data.labels, "more")
    torch.manual_seed(5)
    left = task.load(glyph_vit, unread=True)
    fresh = task.fresh
    torch.manual_seed(5)
    right = task.load(glyph_vit)
    assert is_unread(left) and fresh == task.fresh and any("classifier" in n for n in fresh)
    unread.read_all(left)
    same(left, right)


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_a_folder_cut_in_half_is_refused_and_nothing_is_written(shard, tmp_path, tokenizer):
    base, data, _ = folder_of(tmp_path, tokenizer, shard)
    cut = max(base.glob("model*.safetensors"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(FormatError, match=cut.name):
        burnish.fit(base, data, RECIPE, output=tmp_path / "out", **SMALL)
    assert not any(f.is_file() for f in (tmp_path / "out").rglob("*"))


def test_files_cut_while_they_are_read_end_the_run_with_the_files_left_as_they_were(
        tmp_path, tokenizer, monkeypatch):
    base, data, _ = folder_of(tmp_path, tokenizer)
    cut, put, seen = max(base.glob("model*.safetensors")), Originals.put, []

    def put_and_cut(*words):
        put(*words)
        seen.append(words)
        if len(seen) == 3:
            cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])

    monkeypatch.setattr(Originals, "put", put_and_cut)
    others = {f: f.read_bytes() for f in base.iterdir() if f != cut}
    with pytest.raises(FormatError, match="has changed since"):
        burnish.fit(base, data, RECIPE, output=tmp_path / "out", **SMALL)
    assert {f: f.read_bytes() for f in base.iterdir() if f != cut} == others
    assert not list((tmp_path / "out").glob("adapter*"))


def test_a_finished_run_is_opened_again_weight_by_weight(tmp_path, tokenizer, monkeypatch):
    from burnish.fit.finished import Finished

    base, data, _ = folder_of(tmp_path, tokenizer)
    run = burnish.fit(base, data, RECIPE, output=tmp_path / "one", **SMALL)
    asked, load = [], Task.load
    monkeypatch.setattr(Task, "load", lambda self, name, trust=False, unread=False, **kw: (
        asked.append(unread), load(self, name, trust, unread, **kw))[1])
    again = Finished.open(tmp_path / "one")
    assert asked == [True] and not is_unread(again.tuned.model)
    same(run.tuned.model, again.tuned.model)
