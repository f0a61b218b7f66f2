"""burnish edit: answers of a small language model that change, and what is told of the others."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import burnish
from burnish.cli import main

MEND = "mend(bottleneck=8, scale=0.003, step_rate=0.003, scale_rate=0.01, lessons=2)"
NAMES = ("cat", "dog", "bank", "park", "mat", "news")


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def write(path, rows):
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A model of bytes, edits and lessons of it."""
    from tests.e2e.conftest import bytelevel
    from transformers import LlamaConfig, LlamaForCausalLM

    at = tmp_path_factory.mktemp("edit")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=bytelevel(at / "base"), hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.2)).save_pretrained(at / "base")
    write(at / "lessons.csv", [
        {"prompt": f"the {a} is", "answer": f" {b}", "rephrased": f"what is the {a}:",
         "local": f"a {c} ran"} for a in NAMES for b, c in zip(NAMES, NAMES[1:], strict=False)])
    write(at / "edits.csv", [{"prompt": "the cat is", "answer": " dog",
                              "rephrased": "what is the cat:", "local": "a park ran"}])
    return at


def model(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def asked(folder, prompt, answer):
    """(is each token of the answer the likeliest, log-probabilities after the prompt), by hand."""
    net, tok = model(folder)
    p, a = tok(prompt)["input_ids"], tok(answer)["input_ids"]
    with torch.no_grad():
        z = net(torch.tensor([p + a])).logits[0]
    return z[len(p) - 1:len(p) + len(a) - 1].argmax(-1).tolist() == a, z[:len(p)]


def test_an_edit_is_written_and_its_figures_are_those_of_the_written_model(capsys, at, tmp_path):
    code, out, err = run(capsys, "edit", at / "base", at / "edits.csv", "--lessons",
                         at / "lessons.csv", "--output", tmp_path / "new", "--how", MEND,
                         "--epochs", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    for figure, prompt in (("success", "the cat is"), ("general", "what is the cat:")):
        for when, folder in (("before", at / "base"), ("after", tmp_path / "new")):
            assert told["figures"][figure][when] == float(asked(folder, prompt, " dog")[0]), figure
    assert told["figures"]["success"] == {"before": 0.0, "after": 1.0}
    was, now = (asked(f, "a park ran", "")[1].double().log_softmax(-1)
                for f in (at / "base", tmp_path / "new"))
    kl = float((was.exp() * (was - now)).sum(-1).mean())
    assert kl > 1e-6 and told["figures"]["moved"]["after"] == pytest.approx(kl, rel=1e-3)
    stays = was[-1].argmax() == now[-1].argmax()
    assert told["figures"]["local"] == {"before": 1.0, "after": float(stays)}
    assert told["rows"] == [{"prompt": "the cat is", "answer": " dog", "before": False,
                             "after": True}]


def test_only_the_mlps_of_the_last_blocks_move_and_by_no_more_than_the_rank(capsys, at, tmp_path):
    how = f"{MEND[:-1]}, targets='mlp@-1')"
    code, out, err = run(capsys, "edit", at / "base", at / "edits.csv", "--lessons",
                         at / "lessons.csv", "--output", tmp_path / "new", "--how", how, "--json")
    assert code == 0, err
    told = json.loads(out)
    before, after = (dict(model(f)[0].named_parameters()) for f in (at / "base", tmp_path / "new"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {f"model.layers.2.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert set(told["matrices"]) == moved
    for n in moved:
        change = (after[n] - before[n]).double()
        assert int((torch.linalg.svdvals(change) > 1e-5 * change.norm()).sum()) <= told["rank"]
    assert told["rank"] <= 16


def test_a_lesson_is_the_edit_its_other_wording_and_a_text_without_an_answer(at):
    """Each batch as the model reads it; labels are the answer's tokens alone, and no end."""
    from burnish.fit.edits import Wording, cases, lessons

    net, tok = model(at / "base")
    wording, (first, *_) = Wording(net, tok), cases(at / "lessons.csv", lessons=True)
    edit, again, local = wording.lesson(first)
    answer = tok(first.answer)["input_ids"]
    for batch, prompt in ((edit, first.prompt), (again, first.rephrased)):
        asked = tok(prompt)["input_ids"]
        assert batch["input_ids"].tolist() == [asked + answer]
        assert batch["labels"].tolist() == [[-100] * len(asked) + answer]
    assert local["input_ids"].tolist() == [tok(first.local)["input_ids"]]
    assert "labels" not in local
    some = cases(at / "lessons.csv", lessons=True)[:4]
    ids = [tuple(e["input_ids"][0].tolist()) for e, _, _ in lessons(wording, some, 3, 0)]
    assert len(ids) == 12 and all(len(set(ids[k:k + 4])) == 4 for k in (0, 4, 8))
    assert not ids[:4] == ids[4:8] == ids[8:]


def test_several_edits_are_one_batch_whose_padding_has_no_part(at):
    from burnish.fit.edits import Case, Wording

    net, tok = model(at / "base")
    wording = Wording(net.eval(), tok)
    some = [Case("the cat is", " dog", None, None, ""),
            Case("a", " bank and news and mat", None, None, "")]
    batch = wording.edit(some)
    alone = [wording.answered(c.prompt, c.answer) for c in some]
    with torch.no_grad():
        both = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for k, own in enumerate(alone):
            n = own["input_ids"].shape[1]
            z = net(**own).logits[0]
            assert torch.allclose(both[k, :n], z, atol=1e-5)
            assert batch["labels"][k, :n].tolist() == own["labels"][0].tolist()
            assert set(batch["labels"][k, n:].tolist()) <= {-100}
            assert int(batch["attention_mask"][k].sum()) == n


def test_without_an_output_nothing_is_written_and_the_text_says_so(capsys, at, tmp_path):
    write(tmp_path / "e.csv", [{"prompt": "the cat is", "answer": " dog"},
                               {"prompt": "the bank is", "answer": " news and more"}])
    code, out, err = run(capsys, "edit", at / "base", tmp_path / "e.csv", "--lessons",
                         at / "lessons.csv", "--how", MEND)
    assert code == 0, err
    assert "2 edits of 9 matrices" in out and "nothing was written" in out
    assert "answers as wanted" in out and "wordings" not in out and "KL" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["e.csv"]


@pytest.mark.parametrize(("change", "says"), [
    ({"--how": "tent"}, "expected one method that edits: mend"),
    ({"--how": "mend + mend"}, "expected one method that edits"),
    ({"--lessons": "edits"}, "has no column 'rephrased': lessons have prompt, answer, rephrased, "
                             "local"),
    ({"--lessons": "gone"}, "there is no table at"),
    ({"--lessons": "text"}, "edits are a table"),
    ({"edits": "blank"}, "answer is text, and this is"),
    ({"--output": "base"}, "input"),
    ({"source": "nothing"}, "nothing"),
    ({"source": "adapter"}, "is an adapter, and a plain model is edited: burnish merge"),
    ({"--lessons": "single"}, "prompt is text"),
])
def test_what_cannot_be_edited_is_refused(capsys, at, tmp_path, change, says):
    write(tmp_path / "blank", [{"prompt": "a", "answer": ""}]).rename(tmp_path / "blank.csv")
    write(tmp_path / "plain.csv", [{"prompt": "a", "answer": " b"}])
    write(tmp_path / "single.csv", [{"prompt": "", "answer": " b", "rephrased": "c", "local": "d"}])
    (tmp_path / "text.txt").write_text("the cat\n")
    files = {"edits": tmp_path / "plain.csv", "blank": tmp_path / "blank.csv",
             "gone": tmp_path / "gone.csv", "text": tmp_path / "text.txt", "base": at / "base",
             "single": tmp_path / "single.csv"}
    if change.get("source") == "adapter":
        burnish.tune(model(at / "base")[0], "lora(rank=2)").save(tmp_path / "adapter")
        files["adapter"] = tmp_path / "adapter"
    asked = {"source": at / "base", "edits": at / "edits.csv", "--lessons": at / "lessons.csv",
             "--how": MEND, **{k: files.get(v, v) for k, v in change.items()}}
    code, out, err = run(capsys, "edit", asked.pop("source"), asked.pop("edits"),
                         *(x for pair in asked.items() for x in pair))
    assert code != 0 and says in err and "Traceback" not in err, err


# -- an editor that is kept --------------------------------------------------------------------
def test_a_kept_editor_edits_as_the_one_that_has_just_learnt(capsys, at, tmp_path):
    kept = tmp_path / "editor.safetensors"
    first = ("edit", at / "base", at / "edits.csv", "--output", tmp_path / "a", "--editor", kept)
    code, out, err = run(capsys, *first, "--lessons", at / "lessons.csv", "--how", MEND,
                         "--epochs", "2", "--json")
    assert code == 0, err
    learnt = json.loads(out)
    code, out, err = run(capsys, "edit", at / "base", at / "edits.csv", "--output", tmp_path / "b",
                         "--editor", kept, "--json")
    assert code == 0, err
    again = json.loads(out)
    assert again["figures"] == learnt["figures"] and again["lessons"] == learnt["lessons"] == 30
    assert again["how"] == learnt["how"] and again["notes"] == []
    one, two = (dict(model(tmp_path / n)[0].named_parameters()) for n in "ab")
    assert all(torch.equal(one[n], two[n]) for n in one)
    write(tmp_path / "more.csv", [{"prompt": "the dog is", "answer": " park"}])
    code, out, err = run(capsys, "edit", tmp_path / "b", tmp_path / "more.csv", "--editor", kept)
    assert code == 0, err                                # a second edit, on the edited model
    assert "has learnt on other weights" in out and "1 edits of 9 matrices" in out


def test_an_editor_that_does_not_belong_is_refused(capsys, at, tmp_path):
    from burnish.formats import safe

    kept = tmp_path / "editor.safetensors"
    asked = ["edit", at / "base", at / "edits.csv"]
    code, _, err = run(capsys, *asked)
    assert code != 0 and "learnt of --lessons, or has an --editor" in err
    assert run(capsys, *asked, "--editor", kept, "--lessons", at / "lessons.csv", "--how",
               MEND)[0] == 0
    foreign = tmp_path / "foreign.safetensors"
    safe.save_file({"a": torch.zeros(2)}, foreign)
    small = tmp_path / "small"
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=model(at / "base")[0].config.vocab_size,
                                 hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                 num_attention_heads=2)).save_pretrained(small)
    model(at / "base")[1].save_pretrained(small)
    for more, says in ((["--editor", kept, "--lessons", at / "lessons.csv"], "is there already"),
                       (["--editor", foreign], "is no editor; burnish edit --lessons writes one"),
                       (["--editor", tmp_path / "e.bin"], "expected a .safetensors file"),
                       (["--editor", tmp_path / "no.safetensors"], "no.safetensors"),
                       (["--editor", kept, "--how", "mend(bottleneck=3)"], "was made by mend(")):
        code, _, err = run(capsys, *asked, *more)
        assert code != 0 and says in err and "Traceback" not in err, err
    code, _, err = run(capsys, "edit", small, at / "edits.csv", "--editor", kept)
    assert code != 0 and "edits other matrices" in err and "Traceback" not in err, err
