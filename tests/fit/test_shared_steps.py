"""An update of several micro-batches is that of one batch, for every task and kind of model."""

from __future__ import annotations

import json

import pytest
import torch

import burnish

ROWS = {
    "text-classification": [{"text": t, "label": y} for t, y in zip("abcdefgh", "xyxyxyxy",
                                                                    strict=True)],
    "text-multi-label": [{"text": t, "label": list(y)} for t, y in zip(
        "abcdefgh", ("x", "y", "xy", "z", "yz", "x", "y", "z"), strict=True)],
    "text-regression": [{"text": t, "label": i * 0.3 + 0.1} for i, t in enumerate("abcdefgh")],
    "token-classification": [{"tokens": [a, b], "tags": ["x", "y"]} for a, b in zip(
        "abcdefgh", "ijklmnop", strict=True)],
    "question-answering": [{"question": "q", "context": f"a{t}b", "answers": t}
                           for t in "cdefghij"],
    "instruction-tuning": [{"prompt": t, "completion": "yes"} for t in "abcdefgh"],
    "sequence-to-sequence": [{"prompt": t, "completion": "yes"} for t in "abcdefgh"],
    "preference-tuning": [{"prompt": t, "chosen": "yes", "rejected": "nay"} for t in "abcdefgh"],
}
MODELS = {"instruction-tuning": "llama", "preference-tuning": "llama", "sequence-to-sequence": "t5"}


def model(kind, size):
    import transformers as t

    torch.manual_seed(0)
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))
    if kind == "t5":
        return t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0))
    return t.BertModel(t.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_micro_batches_add_up_to_their_batch(task, tmp_path, tokenizer):
    folder = tmp_path / "base"
    model(MODELS.get(task, "bert"), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS[task])))
    found = {}
    for size, times in ((8, 1), (2, 4)):
        run = burnish.fit(str(folder), str(path), "full", output=tmp_path / f"out{size}", lr=1e-3,
                          max_steps=1, batch_size=size, gradient_accumulation_steps=times,
                          validation=0, logging_steps=1, quiet=True, measure=False, report=False,
                          seed=1, warmup_steps=0)
        (log,) = [h for h in run.history if "grad_norm" in h]
        found[size] = log["loss"], log["grad_norm"]
    assert found[2] == pytest.approx(found[8], rel=1e-3)
