"""Tools in chats: offered by the template, called by the assistant, and nothing else is learnt."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

import burnish
from burnish.core.errors import DataError
from burnish.fit import chat, tools
from burnish.fit.data import read
from burnish.fit.rows import Choices, Turns
from burnish.fit.shots import Shots
from burnish.testing.tasks import characters, texts

#: turns are framed, tools stand in front, calls and what they gave within a turn
SERVES = (
    "{% if tools %}<|s|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|e|>\n"
    "{% endif %}{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}</call>"
    "{% endfor %}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}")
#: the same without a place for one of them
BLIND = {
    "of the tools that are offered": SERVES.replace("{% if tools %}", "{% if false %}"),
    "of the tools that the assistant calls": SERVES.replace("m.tool_calls or []", "[]"),
    "of what a tool gives": SERVES.replace(
        "{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"),
}


def function(name, **kinds):
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {k: {"type": v} for k, v in kinds.items()}}}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HEAT = {"tools": [function("heat", kiln="string")], "messages": [
    {"role": "user", "content": "How hot is B?"},
    {"role": "assistant", "content": "", "tool_calls": [call("heat", kiln="B")]},
    {"role": "tool", "content": "1060"},
    {"role": "assistant", "content": "It is at 1060."}]}
TIME = {"tools": [function("clock"), function("alarm", at="string", loud="boolean")], "messages": [
    {"role": "user", "content": "Wake me."},
    {"role": "assistant", "content": "Yes: ", "tool_calls": [
        call("clock"), call("alarm", at="7:00", loud=None)]}]}
PLAIN = {"messages": [{"role": "user", "content": "Hello"},
                      {"role": "assistant", "content": "Good day"}]}


@pytest.fixture
def serves():
    made = characters()
    made.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>"]})
    made.chat_template = SERVES
    return made


def file(tmp_path, rows):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def learnt(tokenizer, tokens):
    return tokenizer.decode([y for y in tokens.labels if y != -100])


def test_calls_and_answers_are_learnt_and_nothing_else(serves, tmp_path):
    data = read(file(tmp_path, [HEAT, TIME, PLAIN]), validation=0)
    assert data.task == "instruction-tuning" and "not read" not in str(data)
    rows = Turns(data.train, serves, None, None)
    said = [learnt(serves, t) for t in rows.tokens]
    assert said == ['<call>heat kiln="B"</call><|e|>It is at 1060.<|e|>',
                    'Yes: <call>clock</call><call>alarm at="7:00" loud=null</call><|e|>',
                    "Good day<|e|>"]
    heat, _, plain = (serves.decode(t.input_ids) for t in rows.tokens)
    wanted = serves.apply_chat_template(HEAT["messages"], tools=HEAT["tools"], tokenize=False)
    assert heat == wanted.rstrip() + "\n" and "<|s|>tool\n1060<|e|>" in heat
    assert '"kiln": {"type": "string"}' in heat and "alarm" not in heat
    assert plain == serves.apply_chat_template(PLAIN["messages"], tokenize=False)


@pytest.mark.parametrize("form", ["in memory", "parquet", "texts"])
def test_a_table_gives_no_call_the_arguments_of_another(serves, tmp_path, form):
    """Arrow fills up what a struct lacks; JSON in text does not."""
    plain = read(file(tmp_path, [HEAT, {**TIME, "messages": [
        TIME["messages"][0], {**TIME["messages"][1], "tool_calls": [call("alarm", at="7")]}]}]),
        validation=0)
    given = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    if form == "texts":
        for row in given:
            row["tools"] = json.dumps(row["tools"])
            for turn in row["messages"]:
                for one in turn.get("tool_calls", ()):
                    one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    where = datasets.Dataset.from_list(given)
    if form == "parquet":
        where.to_parquet(tmp_path / "chats.parquet")
        where = tmp_path / "chats.parquet"
    found = read(where, validation=0)
    one, two = (Turns(d.train, serves, None, None).tokens for d in (plain, found))
    assert [t.input_ids for t in one] == [t.input_ids for t in two]
    assert "null" not in serves.decode(two[1].input_ids)


def test_other_spellings_are_read_as_the_same(serves, tmp_path):
    bare = [f["function"] for f in HEAT["tools"]]
    shared = {"tools": json.dumps(bare), "conversations": [
        {"from": "human", "value": "How hot is B?"},
        {"from": "function_call",
         "value": json.dumps({"name": "heat", "arguments": {"kiln": "B"}})},
        {"from": "observation", "value": "1060"}, {"from": "gpt", "value": "It is at 1060."}]}
    old = {"tools": HEAT["tools"], "messages": [
        HEAT["messages"][0], {"role": "assistant", "content": None, "function_call": {
            "name": "heat", "arguments": '{"kiln": "B"}'}},
        {"role": "function", "name": "heat", "content": "1060"}, HEAT["messages"][3]]}
    turns = {"tools": HEAT["tools"], "prompt": HEAT["messages"][:3],
             "completion": HEAT["messages"][3:]}
    wanted = None
    for row in (HEAT, shared, old, turns):
        data = read(file(tmp_path, [row]), validation=0)
        tokens = Turns(data.train, serves, None, None).tokens[0]
        wanted = wanted or tokens
        assert tokens == wanted, row
    assert "not read" not in str(read(file(tmp_path, [turns]), validation=0))


def test_what_a_template_asks_of_a_call_is_there(serves, tmp_path):
    serves.chat_template = SERVES.replace("<call>", "<call>{{ c.id }} ").replace(
        "{{ m.role }}",
        "{% if 'tool_call_id' in m %}{{ m.tool_call_id }} {% endif %}{{ m.role }}").replace(
        "{{ m.content }}", "{{ m.content }}{% if 'tool_calls' in m %}: calls{% endif %}")
    row = json.loads(json.dumps(HEAT))
    row["messages"][1]["tool_calls"][0]["id"] = "c1"
    row["messages"][2] |= {"tool_call_id": "c1", "name": "heat"}
    data = read(file(tmp_path, [row, PLAIN]), validation=0)
    text = serves.decode(Turns(data.train, serves, None, None).tokens[0].input_ids)
    assert "<call>c1 heat" in text and "c1 tool\n1060" in text and text.count(": calls<call>") == 1


@pytest.mark.parametrize("what", BLIND)
def test_a_template_without_a_place_for_them_is_refused_with_the_row(serves, tmp_path, what):
    serves.chat_template = BLIND[what]
    data = read(file(tmp_path, [PLAIN, HEAT]), validation=0)
    with pytest.raises(DataError, match=f"chats.jsonl, line 2: .*writes nothing {what}.*chat_temp"):
        Turns(data.train, serves, None, data.where["train"])
    plain = read(file(tmp_path, [PLAIN]), validation=0)
    assert learnt(serves, Turns(plain.train, serves, None, None).tokens[0]) == "Good day<|e|>"


def test_a_tokenizer_without_a_template_serves_no_tools(tmp_path):
    made = chat.prepare_tokenizer(characters())
    data = read(file(tmp_path, [HEAT]), validation=0)
    with pytest.raises(DataError, match="writes nothing of the tools that are offered"):
        Turns(data.train, made, None, None)


def test_a_template_that_refuses_a_row_without_them_has_a_place(serves, tmp_path):
    serves.chat_template = ("{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
                            + SERVES)
    data = read(file(tmp_path, [HEAT]), validation=0)
    assert "heat" in learnt(serves, Turns(data.train, serves, None, None).tokens[0])


@pytest.mark.parametrize("change, says", [
    ({"tools": "none"}, "field 'tools' is not JSON"),
    ({"tools": {"name": "heat"}}, "field 'tools': expected a list of functions, found dict"),
    ({"tools": [{"type": "function"}]}, r"field 'tools\[0\]': expected a function with a name"),
    ({"calls": [{"function": {"arguments": {}}}]}, r"messages\[1\].*expected a function's name"),
    ({"calls": [{"function": {"name": "f", "arguments": "x y"}}]}, r"messages\[1\].*call 0"),
    ({"calls": [{"function": {"name": "f", "arguments": [1]}}]}, "expected arguments by name"),
    ({"calls": 7}, "expected a function's name and arguments, found 7"),
    ({"user": [call("heat")]}, "the assistant calls tools, and this is the user's turn"),
    ({"content": None}, "content is missing")])
def test_what_is_wrong_is_said_by_row_and_field(tmp_path, change, says):
    row = json.loads(json.dumps(HEAT))
    if "tools" in change:
        row["tools"] = change["tools"]
    if "calls" in change:
        row["messages"][1]["tool_calls"] = change["calls"]
    if "user" in change:
        row["messages"][0]["tool_calls"] = change["user"]
    if "content" in change:
        row["messages"][3]["content"] = None
    with pytest.raises(DataError, match=f"chats.jsonl, line 1.*{says}"):
        read(file(tmp_path, [row]), validation=0)


def test_models_that_read_prompts_as_they_stand_are_given_no_tools(tmp_path):
    one = {"tools": HEAT["tools"], "messages": HEAT["messages"][:2]}
    with pytest.raises(DataError, match="line 1: tools are written by the chat template"):
        read(file(tmp_path, [one]), task="sequence-to-sequence", validation=0)
    model, tokenizer = texts("sequence-to-sequence")
    with pytest.raises(DataError, match="tools are written by the chat template"):
        burnish.fit(model, file(tmp_path, [one]), "lora(rank=2)", output=tmp_path / "out",
                    processor=tokenizer, validation=0, quiet=True)


def test_preferences_and_shots_are_of_the_tools_of_their_row(serves, tmp_path):
    other = {"role": "assistant", "content": "I do not know."}
    pairs = [{"tools": HEAT["tools"], "chosen": HEAT["messages"][:2],
              "rejected": [HEAT["messages"][0], other]}]
    data = read(file(tmp_path, pairs), validation=0)
    assert data.task == "preference-tuning"
    (good, bad), = Choices(data.train, serves, None, None).tokens
    assert "heat" in learnt(serves, good) and learnt(serves, bad) == "I do not know.<|e|>"
    assert '"kiln"' in serves.decode(bad.input_ids)

    data = read(file(tmp_path, [HEAT, TIME, HEAT, TIME, PLAIN]), validation=0)
    shots = Shots(data.train, serves, None, None, shots=5, seed=0, again=False)
    assert sorted(sorted(h) for h in shots.hands(0)) == [[0, 2], [1, 3], [4]]
    assert serves.decode(shots.tokens[0].input_ids).count('"kiln"') == 1


def test_an_answer_may_also_end_as_a_call_does(serves):
    assert [serves.decode([i]) for i in chat.stop_ids(serves)] == ["<|e|>"]
    serves.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>", "<|c|>"]})
    serves.chat_template = SERVES.replace(
        "</call>{% endfor %}<|e|>",
        "</call>{% endfor %}{{ '<|c|>' if m.tool_calls else '<|e|>' }}")
    assert [serves.decode([i]) for i in chat.stop_ids(serves)] == ["<|e|>", "<|c|>"]
    assert [chat.prepare_tokenizer(characters()).decode([i])
            for i in chat.stop_ids(chat.prepare_tokenizer(characters()))] == ["</s>"]


def test_canonical_turns_are_what_templates_read():
    kept = [{"role": "user", "content": "a", "tool_calls": None, "name": None},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([call("f", x=None)])}]
    assert tools.turns(kept) == [{"role": "user", "content": "a"}, {
        "role": "assistant", "content": "", "tool_calls": [call("f", x=None)]}]
    assert tools.of({"tools": None}) is None and tools.of({}) is None


@pytest.mark.slow
def test_a_run_learns_to_call_and_is_asked_with_tools(serves, tmp_path):
    from burnish.fit.finished import Finished

    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(serves), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "base")
    serves.save_pretrained(tmp_path / "base")
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [{"tools": [tool], "messages": [
        {"role": "user", "content": c}, {"role": "assistant", "content": "",
                                         "tool_calls": [call("f", x=c)]}]} for c in "abcd"]
    path = file(tmp_path, rows * 6)
    run = burnish.fit(str(tmp_path / "base"), path, "full", output=tmp_path / "out",
                      max_steps=150, eval_steps=150, save_steps=150, lr=3e-3, batch_size=8,
                      validation=4, quiet=True, report=False, samples=2)
    assert run.metrics["validation"]["token_accuracy"] > 0.9
    assert run.promise.peak_bytes == run.truth.peak_bytes
    asked = json.dumps({"text": "b", "tools": [tool]})
    said = next(iter(Finished.open(tmp_path / "out").predict([asked], tokens=40)))["text"]
    assert said == '<call>f x="b"</call>'
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[-1])
    assert all(a["said"].startswith("<call>f x=") and '"f"' in a["right"] for a in line["answers"])
