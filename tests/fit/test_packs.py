"""Packed rows: a sequence of several is what they are alone, or it is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError, FormatError
from burnish.fit.packs import Packed, fitted, together
from burnish.fit.rows import Rows
from burnish.testing.tasks import characters

TOKENIZER = characters()
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 96, **_IDS}
_GPT2 = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_IDS}
MODELS = {
    "llama": lambda **kw: t.LlamaForCausalLM(t.LlamaConfig(**_SIZE, **kw)),
    "qwen2": lambda **kw: t.Qwen2ForCausalLM(t.Qwen2Config(**_SIZE, **kw)),
    "gpt2": lambda **kw: t.GPT2LMHeadModel(t.GPT2Config(**_GPT2, **kw)),
    "mistral": lambda **kw: t.MistralForCausalLM(t.MistralConfig(**_SIZE, sliding_window=6, **kw)),
}
MIXED = {
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=4,
        time_step_rank=8, **_IDS)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, n_layer=2, n_head=4, **_IDS)),
    "bamba": lambda: t.BambaForCausalLM(t.BambaConfig(
        **_SIZE, mamba_n_heads=8, mamba_d_state=8, mamba_d_head=8, mamba_n_groups=1,
        attn_layer_indices=[1])),
    "lfm2": lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**_SIZE, full_attn_idxs=[1])),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        alibi=True, **_IDS)),
    "roberta": lambda: t.RobertaForCausalLM(t.RobertaConfig(
        **{k: v for k, v in _SIZE.items() if k != "num_key_value_heads"}, is_decoder=True)),
}
ROWS = [{"prompt": "ab "[:1 + i % 3] * (1 + i % 5), "completion": "cde"[i % 3:] * (1 + i * 7 % 9)}
        for i in range(40)]
SMALL = {"packing": True, "max_length": 48, "batch_size": 2, "validation": 0, "quiet": True,
         "report": False, "measure": False}


def built(name, **kw):
    torch.manual_seed(0)
    return MODELS[name](**kw) if name in MODELS else MIXED[name]()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


# -- which rows share a sequence ---------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 64).flatmap(lambda size: st.tuples(
    st.just(size), st.lists(st.integers(1, size), max_size=80))), st.integers(0, 9))
def test_every_row_stands_once_and_no_two_sequences_could_be_one(drawn, seed):
    size, lengths = drawn
    packs = fitted(lengths, size, seed)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in p) for p in packs)
    assert all(0 < s <= size for s in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > size
    assert packs == fitted(lengths, size, seed)


def test_a_row_goes_where_it_leaves_the_least_room_and_ties_are_drawn():
    assert [sorted(p) for p in fitted([6, 5, 4, 3, 2], 10, 0)] == [[0, 2], [1, 3, 4]]
    assert sorted(map(sorted, fitted([7, 8, 2], 10, 0))) == [[0], [1, 2]]
    assert fitted([4] * 40, 10, 0) != fitted([4] * 40, 10, 1)


class Plain(Rows):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def length(self, i):
        return len(self.rows[i])

    def row(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def test_a_sequence_is_its_rows_with_places_that_begin_again():
    packed = Packed(Plain([[5, 6, 7], [8, 9], [4, 4, 4, 4]]), 6, 0)
    assert sorted(map(sorted, packed.packs)) == [[0], [1, 2]]
    number = next(i for i, p in enumerate(packed.packs) if len(p) == 2)
    batch = together([packed[number], packed[1 - number]], 0)
    assert batch["input_ids"].tolist() == [[4, 4, 4, 4, 8, 9], [5, 6, 7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 4, 4, -100, 9], [-100, 6, 7, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert packed.length(number) == 6 and packed.source(number) == 2
    assert packed.longest(1)[0]["input_ids"].tolist() == [4, 4, 4, 4, 8, 9]


# -- what a model makes of it ------------------------------------------------------------------
def alone(model, rows):
    """The sum of -log p over what is learnt, and how much that is, each row by itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = (torch.as_tensor(row[k]) for k in ("input_ids", "labels"))
        p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        for at, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total, count = total - p[at, label], count + 1
    return total, count


def in_float64(model):
    """Norms that go by way of float32 in every precision, in the model's own."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            own = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            own.weight = module.weight
            model.set_submodule(name, own)
    return model.double()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_gradients_of_packed_rows_are_those_of_the_rows_alone(name, attention, data):
    """In float64 throughout, but for eager attention, whose softmax is of float32."""
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    model = in_float64(built(name, attn_implementation=attention))
    near = 1e-12 if attention == "sdpa" else torch.finfo(torch.float32).eps
    made = task_for(read(data, validation=0), model, processor=TOKENIZER, max_length=48,
                    packing=True)
    made.settle(model)
    rows = made.rows("train")
    assert len(rows) < 30 and max(map(len, rows.packs)) > 2
    own = rows.alone
    tuned = burnish.tune(model, "lora(rank=2) + lean + checkpoint")
    model.double()
    with torch.no_grad():
        for n, p in enumerate(tuned.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).to(p))
    trained = list(tuned.parameters())
    model.eval()
    for start in range(0, len(rows), 4):
        batch = made.collate([rows[i] for i in range(start, min(start + 4, len(rows)))])
        assert "attention_mask" not in batch
        model.train()
        labels = batch.pop("labels")
        with torch.no_grad():                              # the model's own is made in float32
            own_loss = model(**batch, labels=labels).loss
        logits = model(**batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        found = torch.autograd.grad(loss, trained)
        model.eval()
        these = [own[k] for p in rows.packs[start:start + 4] for k in p]
        total, count = alone(model, these)
        wanted = torch.autograd.grad(total / count, trained)
        assert int((labels != -100).sum()) == count
        torch.testing.assert_close(loss, total / count, rtol=near, atol=0)
        torch.testing.assert_close(own_loss.double(), total / count, rtol=1e-6, atol=0)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=10 * near * float(b.abs().max()))


def test_one_update_of_all_packed_rows_is_one_of_all_rows(data, tmp_path):
    """Through the trainer: micro-batches, items of an update, first tokens."""
    after = []
    for n, more in enumerate(({}, {"packing": None, "batch_size": 40},
                              {"accumulation": 50, "batch_size": 1})):
        run = burnish.fit(built("llama").double(), data, "lora(rank=2) + sgd", max_steps=1, lr=1.0,
                          output=tmp_path / str(n), processor=TOKENIZER, warmup_steps=0,
                          **{**SMALL, "batch_size": 50, "max_grad_norm": 0.0, **more})
        after.append([p.detach().clone() for p in run.tuned.parameters()])
    moved = max(float(p.abs().max()) for p in after[0])
    assert moved > 1e-3
    for one in after[1:]:
        for a, b in zip(one, after[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * moved)


@pytest.mark.parametrize("name", MIXED)
def test_models_that_would_mix_rows_are_refused_before_anything_trains(name, data, tmp_path):
    model = built(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises((ConfigError, CheckError), match="no position_ids|would mix rows") as told:
        burnish.fit(model, data, "lora(rank=2)", output=tmp_path, processor=TOKENIZER, max_steps=1,
                    **SMALL)
    assert "leave packing out" in str(told.value) and not list(tmp_path.glob("checkpoint-*"))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_a_model_that_keeps_keys_and_values_would_mix_rows(data, monkeypatch):
    """What fit turns off is what the look beforehand would see."""
    from burnish.fit import packs
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    model = built("llama")
    made = task_for(read(data, validation=0), model, processor=TOKENIZER, max_length=48,
                    packing=True)
    made.settle(model)
    assert model.config.use_cache is False
    tuned = burnish.tune(model, "lora(rank=2)")
    held = [p.detach().clone() for p in tuned.parameters()]
    drawn = torch.get_rng_state()
    packs.exact(tuned, made, 2, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(held, tuned.parameters(), strict=True))
    assert torch.equal(drawn, torch.get_rng_state()) and model.training is True
    model.config.use_cache = True
    with pytest.raises(CheckError, match="would mix rows: what LlamaForCausalLM answers.*part"):
        packs.exact(tuned, made, 2, "cpu")


@pytest.mark.parametrize("recipe, mixes", [
    ("lily", True), ("pq_attention", True), ("prompt_tuning(length=2)", True),
    ("prefix(length=2)", False), ("houlsby", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_recipe_that_reads_over_rows_is_seen_though_it_begins_as_nothing(
        data, recipe, mixes, dtype):
    from burnish.fit import packs
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    model = built("llama")
    made = task_for(read(data, validation=0), model, processor=TOKENIZER, max_length=48,
                    packing=True)
    made.settle(model)
    tuned = burnish.tune(model.to(dtype), recipe)
    if mixes:
        with pytest.raises(CheckError, match="would mix rows: what Llama.*with.* of the recipe"):
            packs.exact(tuned, made, 2, "cpu")
    else:
        packs.exact(tuned, made, 2, "cpu")


# -- a run -------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "full + checkpoint", "mezo + lora(rank=2)"])
def test_the_promise_of_a_packed_run_is_what_is_measured(data, tmp_path, recipe, capsys):
    run = burnish.fit(built("llama"), data, recipe, output=tmp_path, processor=TOKENIZER,
                      max_steps=2, **{**SMALL, "measure": True, "validation": 4, "quiet": False})
    assert run.promise.peak_bytes == run.truth.peak_bytes
    assert run.facts["memory"]["simulated"]["batch"] == "2 x 48"
    assert "36 rows stand in" in " ".join(capsys.readouterr().out.split())
    assert run.facts["task"] == {"packing": True} and run.metrics["validation"]["loss"] > 0


def test_a_packed_run_that_goes_on_is_the_one_that_was_not_stopped(data, tmp_path):
    how = {**SMALL, "max_steps": 12, "save_steps": 5, "save_total_limit": 9, "lr": 1e-2,
           "processor": TOKENIZER}
    whole = burnish.fit(built("qwen2"), data, "lora(rank=2)", output=tmp_path / "a", **how)
    for name in "bcd":
        shutil.copytree(tmp_path / "a" / "checkpoint-5", tmp_path / name / "checkpoint-5")
    again = burnish.fit(built("qwen2"), data, "lora(rank=2)", output=tmp_path / "b", resume=True,
                        **how)
    for a, b in zip(whole.tuned.parameters(), again.tuned.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, odd in (("c", {"packing": None}), ("d", {"max_length": 40})):
        with pytest.raises(FormatError, match="its samples is"):
            burnish.fit(built("qwen2"), data, "lora(rank=2)", output=tmp_path / name, resume=True,
                        **{**how, **odd})


def test_documents_are_each_by_themselves_and_what_is_written_opens_again(tmp_path):
    from burnish.fit.finished import Finished

    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "abcd"[i % 4] * (1 + i * 5 % 60)}) + "\n"
                            for i in range(30)))
    model = built("gpt2")
    model.save_pretrained(tmp_path / "base"), TOKENIZER.save_pretrained(tmp_path / "base")
    run = burnish.fit(str(tmp_path / "base"), path, "lora(rank=2)", output=tmp_path / "out",
                      max_steps=20, lr=1e-2, **{**SMALL, "validation": 6})
    again = Finished.open(tmp_path / "out")
    for split in ("validation", "train"):
        found = again.evaluate(str(path), split=split, batch=2)["tuned"]
        if split == "validation":
            assert found["loss"] == pytest.approx(run.metrics["validation"]["loss"], rel=1e-5)
    rows = again.task.rows("train")
    lengths = [rows.alone.length(i) for i in range(len(rows.alone))]
    assert max(lengths) == 48 and len(rows) < 0.6 * len(lengths)
    assert next(iter(again.predict(["aaa"])))["text"]


@pytest.mark.parametrize("how, says", [
    ({"max_length": None}, "fills sequences of max_length tokens"),
    ({"group_by_length": True}, "without group_by_length"), ({"shots": 2}, "without shots"),
    ({"use_cache": True}, "without use_cache"),
    ({"recipe": "dp + lora(rank=2)"}, "dp looks at each sample by itself"),
    ({"packing": "perhaps"}, "packing='perhaps': expected true or false")])
def test_what_cannot_be_honoured_beside_it_is_refused(data, tmp_path, how, says):
    recipe = how.get("recipe", "lora(rank=2)")
    with pytest.raises(ConfigError, match=says):
        burnish.fit(built("llama"), data, recipe, output=tmp_path, processor=TOKENIZER,
                    **{**SMALL, **{k: v for k, v in how.items() if k != "recipe"}})


def test_other_tasks_and_rows_with_keys_of_their_own_are_refused(data, tmp_path, glyph_vit):
    with pytest.raises(ConfigError, match="packing=True is a setting of language-mod.*instruction"):
        burnish.fit(glyph_vit, "digits", output=tmp_path, packing=True, quiet=True)
    keyed = tmp_path / "keyed.jsonl"
    keyed.write_text("".join(json.dumps({**r, "sample_type": i % 2}) + "\n"
                             for i, r in enumerate(ROWS)))
    with pytest.raises(ConfigError, match="reads sample_type of each row"):
        burnish.fit(built("llama"), keyed, "loramoe", output=tmp_path / "out",
                    processor=TOKENIZER, **SMALL)
