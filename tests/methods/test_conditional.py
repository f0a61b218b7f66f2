"""Conditional instruction tuning: how far an answer looks at what it was given, and a mark."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tests.fit.conftest import make_tokenizer

import burnish
from burnish.blocks.choose.attended import mass, rows
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit import chat, marking
from burnish.fit.data import read
from burnish.fit.tasks import task_for
from burnish.testing.models import tiny


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.chat_template = chat.PLAIN
    return made


# -- the score -----------------------------------------------------------------------------------
def test_the_score_is_the_mass_of_the_users_span_in_an_attention_built_by_hand():
    A = torch.tensor([[[0.1, 0.6, 0.2, 0.1, 0.0], [0.2, 0.1, 0.1, 0.1, 0.5]],
                      [[0.7, 0.1, 0.1, 0.1, 0.0], [0.0, 0.5, 0.4, 0.0, 0.1]]])   # (H, R, T)
    user = torch.tensor([False, True, True, False, False])
    assert torch.allclose(mass(A, user), torch.tensor([0.8, 0.9]))
    assert torch.equal(mass(A, torch.zeros(5)), torch.zeros(2))
    assert torch.allclose(mass(A, torch.ones(5)), torch.ones(2))


@pytest.mark.parametrize("how", ["causal", "bool", "float", "grouped", "scale"])
def test_rows_are_those_of_the_whole_attention(how):
    g = torch.Generator().manual_seed(0)
    T, heads = 7, 2 if how == "grouped" else 4
    q = torch.randn(1, 4, T, 8, generator=g, dtype=torch.float64)
    k = torch.randn(1, heads, T, 8, generator=g, dtype=torch.float64)
    see = torch.ones(T, T).tril().bool()
    given = {"query": q, "key": k} | {
        "causal": {"is_causal": True}, "bool": {"attn_mask": see[None, None]},
        "float": {"attn_mask": torch.zeros(T, T, dtype=torch.float64).masked_fill(
            ~see, -torch.inf)[None, None]},
        "grouped": {"is_causal": True, "enable_gqa": True},
        "scale": {"is_causal": True, "scale": 0.3}}[how]
    eye = torch.eye(T, dtype=torch.float64).expand(1, heads, T, T)       # values that show weights
    whole = F.scaled_dot_product_attention(q, k, eye, **{n: v for n, v in given.items()
                                                         if n not in ("query", "key")})[0]
    at = torch.tensor([2, 5, 6])
    assert torch.allclose(rows(given, at), whole[:, at], atol=1e-12)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_equation_by_the_attention_that_the_model_itself_gives(model, layer):
    net, _ = tiny(model)
    eager, _ = tiny(model)
    eager.set_attn_implementation("eager")
    eager.load_state_dict(net.state_dict())
    ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    user, response = torch.zeros(2, 12), torch.zeros(2, 12)
    user[0, 1:4] = user[1, 1:4] = user[1, 7:9] = 1
    response[0, 5:7] = response[1, 9:12] = 1
    part = burnish.parse(f"conditional(layer={layer})")[0]
    net.train()
    (got,) = part.lifecycle(net, [{"input_ids": ids, "user": user, "response": response}])
    assert net.training
    with torch.no_grad():
        A = eager.eval()(input_ids=ids, output_attentions=True).attentions[layer][0]
    for turn in range(2):
        want = torch.stack([max(((A[h, t] * user[turn]).sum() for h in range(len(A))),
                                key=float) for t in response[turn].nonzero()[:, 0]]).mean()
        assert got[turn].item() == pytest.approx(want.item(), abs=1e-5)
    assert 0 < float(got.min()) and float(got.max()) < 1
    middle = burnish.parse("conditional")[0].lifecycle(
        net, [{"input_ids": ids, "user": user, "response": response}])[0]
    assert torch.equal(middle, got) == (layer == 1)


# -- where the user's words stand ----------------------------------------------------------------
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Be brief. A?"},
         {"role": "assistant", "content": "A"}, {"role": "user", "content": "and B? "},
         {"role": "assistant", "content": "B"}]


def test_the_users_words_are_told_from_the_frame(tokenizer):
    (one,) = marking.texts(tokenizer, [{"messages": TURNS}], lambda i: f"row {i}", None)
    said = [tokenizer.decode(one["input_ids"][0][m]) for m in one["user"]]
    assert said == ["Be brief. A?", "Be brief. A?and B?"]
    assert [tokenizer.decode(one["input_ids"][0][m]) for m in one["response"]] == ["A</s>", "B</s>"]
    (one,) = marking.texts(tokenizer, [{"prompt": "2+2=", "completion": "4"}], str, None)
    assert tokenizer.decode(one["input_ids"][0]) == "<s>2+2=4</s>"
    assert tokenizer.decode(one["input_ids"][0][one["user"][0]]) == "2+2="
    assert tokenizer.decode(one["input_ids"][0][one["response"][0]]) == "4</s>"


# -- the mark ------------------------------------------------------------------------------------
def test_the_indicator_changes_the_users_turn_and_nothing_else():
    row = {"messages": TURNS, "group": "a"}
    for which in ([True, False], [False, True], [True, True]):
        made = marking.indicated(row, which, "[look]")
        changed = [i for i, (a, b) in enumerate(zip(TURNS, made["messages"], strict=True))
                   if a != b]
        assert changed == [1 if k == 0 else 3 for k in range(2) if which[k]]
        for i in changed:
            assert made["messages"][i] == {"role": "user",
                                           "content": TURNS[i]["content"] + "\n[look]"}
        assert made["group"] == "a"
    assert row["messages"] == TURNS
    assert marking.indicated(row, [False, False], "[look]") == row
    plain = {"prompt": "say cat = ", "completion": "tac"}
    assert marking.indicated(plain, [True], "[look]") == {"prompt": "say cat =\n[look] ",
                                                          "completion": "tac"}
    twice = {"messages": [TURNS[1], TURNS[2], TURNS[4]]}                 # one question, two answers
    made = marking.indicated(twice, [True, True], "!")["messages"]
    assert made[0]["content"] == "Be brief. A?\n!" and made[1:] == twice["messages"][1:]


@pytest.fixture
def seed(tmp_path, tokenizer):
    """A small language model's folder, and rows of instructions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(tmp_path / "seed")
    tokenizer.save_pretrained(tmp_path / "seed")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": "kiln " * n}, {"role": "assistant", "content": "hot"}]}) + "\n"
        for n in range(1, 9)))
    return tmp_path


def run(capsys, *argv):
    capsys.readouterr()
    return main([str(a) for a in argv]), *capsys.readouterr()


def test_a_file_is_marked_by_what_the_seed_says(seed, capsys, tokenizer):
    def marked(beta):
        code, out, err = run(capsys, "mark", seed / "seed", seed / "x.jsonl", "--out",
                             seed / "m.jsonl", "--how", f"conditional(beta={beta})", "--json")
        assert code == 0, err
        return json.loads(out), [json.loads(line) for line in open(seed / "m.jsonl")]

    rows = [json.loads(line) for line in open(seed / "x.jsonl")]
    told, made = marked(1.0)
    assert made == rows and told["marked"] == 0
    tokens = [[task_for(read(str(seed / f), validation=0), "", processor=tokenizer).rows(
        "train")[i] for i in range(8)] for f in ("x.jsonl", "m.jsonl")]
    assert tokens[0] == tokens[1]                       # without a mark the data are those of SFT
    scores = [s for (s,) in told["scores"]]
    assert len(set(scores)) > 1 and 0 < min(scores) < max(scores) < 1
    beta = sorted(scores)[3]
    told, made = marked(beta)
    assert told["marked"] == 4                          # above, not at
    for row, new, score in zip(rows, made, scores, strict=True):
        said = new["messages"][0]["content"]
        assert said.endswith("\n[use the text above]") == (score > beta)
        assert new["messages"][1] == row["messages"][1]
    code, out, err = run(capsys, "mark", seed / "seed", seed / "x.jsonl", "--out", seed / "m.jsonl")
    assert code == 0 and "answers lean on their context (score above 0.6)" in out


def test_refusals(seed, capsys):
    def refused(words, *how, data=seed / "x.jsonl", out=seed / "m.jsonl"):
        code, _, err = run(capsys, "mark", seed / "seed", data, "--out", out, *how)
        assert code in (1, 2) and words in err, err

    refused("conditional with its settings is expected", "--how", "lora")
    refused("name a file that ends in .jsonl", out=seed / "m.csv")
    refused("has no split 'test'", "--split", "test")
    refused("layer=7: this model has blocks 0 to 1", "--how", "conditional(layer=7)")
    (seed / "long.jsonl").write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n")
    refused("line 1: 203 tokens, and the seed model reads 128", data=seed / "long.jsonl")
    for text, words in (("conditional(beta=1.5)", "beta is from 0 to 1"),
                        ("conditional(indicator=' ')", "the indicator is empty"),
                        ("conditional(targets='q')", "targets='q' does nothing")):
        with pytest.raises(ConfigError, match=words):
            burnish.parse(text)
    part, (net, _) = burnish.parse("conditional")[0], tiny("llama")
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="each with some of a response"):
        part.lifecycle(net, [{"input_ids": ids, "user": [[1, 1, 0, 0]], "response": [[0] * 4]}])
    with pytest.raises(ConfigError, match=r"user \(4,\) and response \(4,\) mark tokens"):
        part.lifecycle(net, [{"input_ids": ids, "user": [1, 1, 0, 0], "response": [0, 0, 1, 1]}])
    net.set_attn_implementation("eager")
    with pytest.raises(burnish.RecipeError, match="attn_implementation='sdpa'"):
        part.lifecycle(net, [{"input_ids": ids, "user": [[1, 1, 0, 0]],
                              "response": [[0, 0, 1, 1]]}])


def test_a_template_that_rewrites_what_is_said_is_refused(tokenizer):
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] | upper }}</s>{% endfor %}")
    with pytest.raises(DataError, match="row 0: the chat template rewrites what user says"):
        list(marking.texts(tokenizer, [{"messages": TURNS[1:3]}], lambda i: f"row {i}", None))
