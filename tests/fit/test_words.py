"""A model and its tokenizer agree, or are told apart before anything trains."""

from __future__ import annotations

import json

import pytest
import torch

from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.heads import resize_head
from burnish.fit.places import check_served
from burnish.fit.tasks import task_for


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


SAID = [{"text": "abc", "label": 0}, {"text": "a longer text", "label": 1},
        {"text": "ab", "label": 2}]


def classifier(kind, tokenizer, **config):
    """A small classifier of `kind` (llama or bert) as transformers makes it."""
    import transformers

    cls = {"llama": ("LlamaConfig", "LlamaForSequenceClassification"),
           "bert": ("BertConfig", "BertForSequenceClassification"),
           "roberta": ("RobertaConfig", "RobertaForSequenceClassification")}[kind]
    torch.manual_seed(0)
    made = getattr(transformers, cls[0])(**{
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "num_labels": 3, **config})
    return getattr(transformers, cls[1])(made).eval()


@torch.no_grad()
@pytest.mark.parametrize("pad", [7, None, 2])
def test_logits_do_not_depend_on_batch_mates(tmp_path, tokenizer, pad):  # findings 5.1
    model = classifier("llama", tokenizer, pad_token_id=pad, bos_token_id=None, eos_token_id=9)
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), model,
                    processor=tokenizer)
    task.settle(model)
    rows = task.rows("train")
    together = model(**task.collate([rows[i] for i in range(3)])).logits
    for i in range(3):
        alone = model(**task.collate([rows[i]])).logits[0]
        assert torch.allclose(together[i], alone, atol=1e-5)


def test_every_special_id_is_the_tokenizers(tmp_path, tokenizer):  # findings 5.1
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=11, eos_token_id=12, pad_token_id=13))
    data = read(lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}] * 3),
                validation=0)
    task = task_for(data, model, processor=tokenizer)
    task.settle(model)
    for place in (model.config, model.generation_config):
        assert (place.pad_token_id, place.bos_token_id, place.eos_token_id) == (0, 1, 2)


def test_generation_stops_where_training_taught_it_to(tmp_path, tokenizer):
    """The template closes turns with a word that is not the tokenizer's end of text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>"
                               "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2))
    data = read(lines(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}] * 3),
                validation=0)
    task = task_for(data, model, processor=tokenizer)
    task.settle(model)
    closes = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, closes]


def test_padding_beyond_the_vocabulary_is_replaced_and_said(tmp_path, tokenizer_factory):
    tokenizer = tokenizer_factory()
    model = classifier("llama", tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), model,
                    processor=tokenizer)
    task.settle(model)
    assert "'[NEW]' is beyond" in task.notes[0]
    rows = task.rows("train")
    assert model(**task.collate([rows[0], rows[1]])).loss.isfinite()
    assert model.config.pad_token_id == tokenizer.eos_token_id


def test_words_that_the_model_lacks_are_named_with_their_row(tmp_path, tokenizer):
    model = classifier("llama", tokenizer)
    tokenizer.add_tokens(["longer"])
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), model,
                    processor=tokenizer)
    task.settle(model)
    with pytest.raises(DataError, match="row 1: the tokenizer writes id 104, the model knows 104"):
        task.check(model)


def test_a_model_that_counts_positions_from_another_padding_is_refused(tmp_path, tokenizer):
    model = classifier("roberta", tokenizer, pad_token_id=1)
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), model,
                    processor=tokenizer)
    with pytest.raises(ConfigError, match="counts its positions from padding id 1"):
        task.settle(model)


def test_a_tokenizer_may_be_named_by_its_folder(tmp_path, tokenizer, tokenizer_factory):
    tokenizer.save_pretrained(tmp_path / "words")
    data = read(lines(tmp_path / "x.jsonl", SAID), validation=0)
    task = task_for(data, "", processor=str(tmp_path / "words"))
    assert task.processor.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="there is no model at"):
        task_for(data, "", processor=str(tmp_path / "wrds"))
    with pytest.raises(ConfigError, match="neither a padding nor an end"):
        task_for(data, "", processor=tokenizer_factory(pad_token=None, eos_token=None))


# -- problem_type ----------------------------------------------------------------------------------
@pytest.mark.parametrize("inherited", ["regression", "multi_label_classification", None])
def test_the_loss_is_cross_entropy_whatever_the_base_was_for(tmp_path, tokenizer, inherited):
    # findings 5.2
    model = classifier("bert", tokenizer, problem_type=inherited)
    resize_head(model, ("a", "b", "c"))
    ids, labels = torch.randint(5, 50, (4, 6)), torch.tensor([0, 2, 1, 2])
    out = model(input_ids=ids, labels=labels)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("inherited", ["regression", "multi_label_classification"])
def test_so_it_is_when_a_folder_is_loaded(tmp_path, tokenizer, inherited):  # findings 5.2
    classifier("bert", tokenizer, problem_type=inherited, num_labels=2).save_pretrained(
        tmp_path / "m")
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), "",
                    processor=tokenizer)
    model = task.load(str(tmp_path / "m")).eval()
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(3)])
    out = model(**batch)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits,
                                                                      batch["labels"]))


# -- lengths ---------------------------------------------------------------------------------------
def test_rows_end_where_a_table_of_positions_ends(tmp_path, tokenizer):  # findings 5.4
    model = classifier("bert", tokenizer, max_position_embeddings=8)
    data = read(lines(tmp_path / "x.jsonl", SAID), validation=0)
    task = task_for(data, model, processor=tokenizer)
    task.settle(model)
    rows = task.rows("train")
    assert task.max_length == 8 and rows.length(1) == 8
    assert "train: 1 of 3 rows are longer than max_length=8" in task.notes[0]
    assert model(**task.collate([rows[1]])).loss.isfinite()
    asked = task_for(data, model, processor=tokenizer, max_length=9)
    with pytest.raises(ConfigError, match="max_length=9 is more than the 8 positions"):
        asked.settle(model)


def test_positions_after_the_padding_are_not_counted(tokenizer_factory):  # findings 5.4
    from burnish.fit.words import positions_of

    tokenizer = tokenizer_factory()
    model = classifier("roberta", tokenizer, pad_token_id=1, max_position_embeddings=12)
    assert positions_of(model) == (10, True)
    ids = torch.full((1, 10), 5)
    assert model(input_ids=ids).logits.isfinite().all()


def test_rotary_positions_go_on_with_a_note(tmp_path, tokenizer):
    model = classifier("llama", tokenizer, max_position_embeddings=8)
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), model,
                    processor=tokenizer, max_length=12)
    task.settle(model)
    assert task.max_length == 12 and "made for" in task.notes[0]


def test_documents_are_cut_into_rows_that_can_be_trained(tmp_path, tokenizer):
    """A model made for 100,000 tokens is not given rows of 100,000 unless somebody asks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=100_000))
    tokenizer.model_max_length = 100_000
    (tmp_path / "a.txt").write_text("a word or two\n\n" * 100)
    data = read(tmp_path / "a.txt", validation=0)
    for asked, found in ((None, 512), (2000, 2000)):
        task = task_for(data, model, processor=tokenizer, max_length=asked)
        task.settle(model)
        assert task.max_length == found and task.notes == []


# -- what is served --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, task, words", [
    ("T5", "language-modelling", "t5, an encoder-decoder.*can train it for text-classification"),
    ("T5", "instruction-tuning", "an encoder-decoder"),
    ("Bart", "language-modelling", "an encoder-decoder"),
    ("Bert", "language-modelling", "reads in both directions.*text-classification"),
    ("ViT", "text-classification", "no model for text-classification.*image-classification"),
    ("Llama", "image-classification", "no model for image-classification"),
])
def test_a_model_of_another_kind_is_told_what_it_is_for(tmp_path, kind, task, words):  # newcomer A4
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_served(task, str(tmp_path))


@pytest.mark.parametrize("kind, task", [
    ("T5", "text-classification"), ("Bert", "text-classification"), ("GPT2", "language-modelling"),
    ("Llama", "instruction-tuning"), ("Qwen3", "text-classification"), ("Gemma3Text",
    "language-modelling"), ("ViT", "image-classification"), ("Mistral", "language-modelling"),
    ("Mamba", "language-modelling"), ("ModernBert", "text-classification")])
def test_what_is_served_passes(tmp_path, kind, task):
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    check_served(task, str(tmp_path))


def test_a_module_that_reads_in_both_directions_is_refused_too():
    import transformers

    model = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1))
    with pytest.raises(ConfigError, match="both directions"):
        check_served("language-modelling", model)


# -- what a base lacks -----------------------------------------------------------------------------
def test_a_head_drawn_at_random_is_not_left_so(tmp_path, tokenizer):
    import transformers

    from burnish.fit.heads import drawn

    body = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2))
    body.save_pretrained(tmp_path / "m")
    data = read(lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}] * 3),
                validation=0)
    task = task_for(data, "", processor=tokenizer)
    model = task.load(str(tmp_path / "m"))
    with pytest.raises(ConfigError, match="lack lm_head.weight.*give head=True"):
        drawn(model, task.fresh, "auto")
    assert drawn(model, task.fresh, True) == []
    task = task_for(read(lines(tmp_path / "y.jsonl", SAID), validation=0), "", processor=tokenizer)
    model = task.load(str(tmp_path / "m"))
    assert drawn(model, task.fresh, "auto") == []               # a new classifier trains
    with pytest.raises(ConfigError, match="head=False would leave it so"):
        drawn(model, task.fresh, False)


def test_other_tensors_drawn_at_random_are_said(tmp_path, tokenizer):
    import transformers

    from burnish.fit.heads import drawn

    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2), add_pooling_layer=False).save_pretrained(tmp_path / "m")
    task = task_for(read(lines(tmp_path / "x.jsonl", SAID), validation=0), "", processor=tokenizer)
    model = task.load(str(tmp_path / "m"))
    assert "lack bert.pooler.dense.bias, bert.pooler.dense.weight: drawn" in drawn(
        model, task.fresh, "auto")[0]
