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


# -- what is learnt, for every kind of tokenizer ---------------------------------------------------
def bytelevel(trim):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["yes it is", "no it is not", "the answer: yes", "a b c  d"] * 3,
                            trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"],
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                show_progress=False))
    if trim is not None:
        raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    return raw


def wordpiece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(["yes it is", "no it is not", "the answer: yes", "a b c  d"],
                            trainers.WordPieceTrainer(vocab_size=80, show_progress=False,
                                                      special_tokens=["<unk>", "</s>"]))
    return raw


def sentencepiece():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(["yes it is", "no it is not", "the answer: yes", "a b c  d"] * 4,
                            trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>",
                                                    special_tokens=["<unk>", "</s>"],
                                                    show_progress=False))
    return raw


KINDS = {"bytelevel": lambda: bytelevel(None), "trimmed": lambda: bytelevel(True),
         "untrimmed": lambda: bytelevel(False), "wordpiece": wordpiece,
         "sentencepiece": sentencepiece}
_MADE: dict = {}


def kind_of(name):
    from transformers import PreTrainedTokenizerFast
    if name not in _MADE:
        _MADE[name] = PreTrainedTokenizerFast(tokenizer_object=KINDS[name](), eos_token="</s>",
                                              pad_token="</s>", unk_token="<unk>")
    return _MADE[name]


def covered(tokenizer, marked):
    """(letters some learnt token holds, letters some token holds), by the tokenizer's offsets."""
    tokens = chat.tokenize(tokenizer, marked, None)
    spans = tokenizer(marked.text, return_offsets_mapping=True,
                      add_special_tokens=False)["offset_mapping"]
    assert len(spans) == len(tokens.labels)
    learnt, held = set(), set()
    for (a, b), y in zip(spans, tokens.labels, strict=True):
        held |= set(range(a, b))
        if y != -100:
            learnt |= set(range(a, b))
            assert any(a < stop and max(b, a + 1) > start for start, stop in marked.learnt), (a, b)
    return learnt, held


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_after_a_space_keeps_its_first_token(kind):  # findings 5.3
    tokenizer = kind_of(kind)
    for prompt in ("the answer: ", "the answer:", "a\n", "a  "):
        marked = chat.mark_completion(tokenizer, prompt, "yes it is")
        learnt, held = covered(tokenizer, marked)
        answer = set(range(*marked.learnt[0]))
        assert answer & held <= learnt, (prompt, sorted(answer & held - learnt))
        said = tokenizer.decode([y for y in chat.tokenize(tokenizer, marked, None).labels
                                 if y != -100]).replace(" ", "")
        assert said.endswith("yesitis</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_every_letter_of_an_answer_is_learnt_whatever_the_text(kind):  # findings 5.3
    from hypothesis import given, settings
    from hypothesis import strategies as st
    tokenizer = kind_of(kind)
    words = st.text(alphabet=" \n\tabyes:éß漢👍ﬁ", max_size=12)

    @settings(max_examples=60, deadline=None)
    @given(words, words)
    def check(prompt, answer):
        marked = chat.mark_completion(tokenizer, prompt, answer)
        learnt, held = covered(tokenizer, marked)
        assert set(range(*marked.learnt[0])) & held <= learnt
        labels = chat.tokenize(tokenizer, marked, None).labels
        assert labels[-1] == tokenizer.eos_token_id

    check()


# -- templates are other people's programs ---------------------------------------------------------
ALTERNATE = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
             "{{ m['content'] }}{{ eos_token }}{% endfor %}")


@pytest.mark.parametrize("template, turns, words", [
    (ALTERNATE, [TURNS[0], *TURNS], "here: .*refuses these turns .system, system, user.*alternate"),
    (ALTERNATE, [TURNS[1], TURNS[1], TURNS[2]], "here: .*roles must alternate"),
    ("{% for m in messages %}{{ m['content']", TURNS, "cannot be read .line 1"),
    ("{{ messages[0]['tools'][0] }}", TURNS, "here: .*refuses these turns"),
    ("{{ 1 / 0 }}", TURNS, "here: .*refuses these turns.*division by zero"),
    ("{{ messages[99]['content'] }}", TURNS, "here: .*refuses"),
])
def test_a_template_that_fails_is_one_error_with_the_row(tokenizer, template, turns, words):
    # findings 5.4
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        chat.mark(tokenizer, turns, "here")


#: as Gemma's: turns alternate, and a system turn is refused
NO_SYSTEM = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE)


def test_a_system_turn_that_a_template_refuses_opens_the_first_user_turn(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    system, user, *rest = TURNS
    by_hand = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    assert chat.mark(tokenizer, TURNS, "here") == chat.mark(tokenizer, by_hand, "here")
    assert chat.render(tokenizer, TURNS[:2], True) == chat.render(tokenizer, by_hand[:1], True)
    assert chat.refuses_system(tokenizer)
    with pytest.raises(DataError, match="not supported"):          # and what cannot be folded
        chat.render(tokenizer, [system], True)
    with pytest.raises(DataError, match="not supported"):
        chat.render(tokenizer, [system, user, user], True)


def test_a_template_that_takes_system_turns_keeps_them(tokenizer):
    chat.prepare_tokenizer(tokenizer)
    assert not chat.refuses_system(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] + '' }}\n" \
                              "{% endfor %}"
    assert "system: " in chat.render(tokenizer, TURNS[:2], True)
    with pytest.raises(DataError, match="refuses"):                # not for its role
        chat.render(tokenizer, [{**TURNS[0], "content": None}, TURNS[1]], True)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    assert not chat.refuses_system(tokenizer)


def test_rows_whose_system_turn_is_folded_are_told(tokenizer):
    import datasets

    from burnish.fit.rows import Turns

    rows = datasets.Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[1:]}])
    assert not Turns(rows, chat.prepare_tokenizer(tokenizer), None, None).notes
    tokenizer.chat_template = NO_SYSTEM
    (note,) = Turns(rows, tokenizer, None, None).notes
    assert note.startswith("1 of 2 rows begin with a system turn")
