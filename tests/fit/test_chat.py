"""What of a conversation is learnt: what the assistant says, and how it stops. Nothing else."""

from __future__ import annotations

import pytest

from burnish.core.errors import DataError
from burnish.fit import chat

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
         {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"},
         {"role": "assistant", "content": "6"}]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def learnt(tokenizer, tokens):
    return tokenizer.decode([y for y in tokens.labels if y != -100])


def test_only_answers_and_their_stops_are_learnt(tokenizer):
    tokenizer = chat.prepare_tokenizer(tokenizer)
    tokens = chat.tokenize(tokenizer, chat.mark(tokenizer, TURNS), None)
    assert learnt(tokenizer, tokens) == "4</s>6</s>"
    assert tokens.labels.count(tokenizer.eos_token_id) == 2
    assert "### User:\n2+2?" in tokenizer.decode(tokens.input_ids)


def test_training_text_is_what_generation_starts_from(tokenizer):
    """The prompt at use is, letter by letter, the text before the first learnt token."""
    tokenizer = chat.prepare_tokenizer(tokenizer)
    marked = chat.mark(tokenizer, TURNS[:3])
    asked = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert marked.text[: marked.learnt[0][0]] == asked


def test_a_tokenizers_own_template_is_kept(tokenizer):
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer = chat.prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == CHATML
    tokens = chat.tokenize(tokenizer, chat.mark(tokenizer, TURNS), None)
    assert learnt(tokenizer, tokens) == "4<|im_end|>6<|im_end|>"


def test_a_template_without_a_stop_gets_one(tokenizer):
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
                               "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    tokens = chat.tokenize(tokenizer, chat.mark(tokenizer, TURNS), None)
    assert learnt(tokenizer, tokens) == "4</s>6</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}"
                               "{% endfor %}")
    with pytest.raises(DataError, match="here: .*rewrites earlier turns"):
        chat.mark(tokenizer, TURNS, "here")


def test_plain_prompts_are_joined_as_they_are(tokenizer):
    tokens = chat.tokenize(tokenizer, chat.mark_completion(tokenizer, "2+2=", "4"), None,
                           special=True)
    assert tokenizer.decode(tokens.input_ids) == "<s>2+2=4</s>"
    assert learnt(tokenizer, tokens) == "4</s>"


def test_a_tokenizer_without_offsets_marks_the_same(tokenizer):
    """The slow road (pieces tokenised one by one) against the fast one (offsets)."""
    tokenizer = chat.prepare_tokenizer(tokenizer)
    marked = chat.mark(tokenizer, TURNS)

    class Slow:
        is_fast, bos_token_id = False, None

        def __call__(self, text, add_special_tokens):
            return tokenizer(text, add_special_tokens=add_special_tokens)

    assert chat.tokenize(Slow(), marked, None) == chat.tokenize(tokenizer, marked, None)


def test_a_tokenizer_that_cannot_stop_is_refused(tokenizer_factory):
    with pytest.raises(DataError, match="no end-of-text token"):
        chat.prepare_tokenizer(tokenizer_factory(eos_token=None))


def test_the_loss_mask_can_be_read(tokenizer):
    tokenizer = chat.prepare_tokenizer(tokenizer)
    tokens = chat.tokenize(tokenizer, chat.mark(tokenizer, TURNS), None)
    assert "»4</s>«" in chat.show(tokenizer, tokens)
