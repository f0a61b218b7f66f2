"""burnish adapt: figures before and with it, of a folder or a run; nothing written, one source."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import burnish
from burnish.cli import main


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def told(capsys, *argv):
    code, out, err = run(capsys, "adapt", *argv, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A small residual network with random weights and statistics."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from burnish.fit.pictures import Picture

    at = tmp_path_factory.mktemp("adapt") / "net"
    torch.manual_seed(0)
    names = {i: str(i) for i in range(10)}
    model = ResNetForImageClassification(ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        num_labels=10, id2label=names, label2id={v: k for k, v in names.items()}))
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.3, 2)
    torch.nn.init.normal_(model.classifier[-1].weight, std=0.5)
    model.save_pretrained(at)
    Picture(16, 16, (0.5,), (0.5,)).save_pretrained(at)
    return at


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(a finished fit of texts, its rows)"""
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertModel

    at = tmp_path_factory.mktemp("adapt")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=wordpiece(at / "bert"), hidden_size=32, num_hidden_layers=1,
                         num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
              ).save_pretrained(at / "bert")
    (at / "rows.csv").write_text("text,label\n" + "".join(
        f"{('the cat sat', 'stocks fell')[i % 2]} {i},{('pets', 'money')[i % 2]}\n"
        for i in range(24)))
    burnish.fit(str(at / "bert"), str(at / "rows.csv"), "lora(rank=2)", output=at / "run",
                quiet=True, report=False, epochs=1, learning_rate=1e-2)
    return at / "run", at / "rows.csv"


def by_hand(net, method, order=None):
    """Accuracy of the validation scans, batches of 64, by a loop of one's own."""
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    data = read("digits", validation=0)
    task = task_for(data, str(net))
    model, rows = task.load(str(net)).eval(), task.rows("validation")
    index = list(order or range(len(rows)))
    right = 0
    with burnish.parse(method)[0].lifecycle(model) as adapted:
        for at in range(0, len(index), 64):
            batch = [rows[i] for i in index[at : at + 64]]
            out = adapted({"pixel_values": torch.stack([b["pixel_values"] for b in batch])})
            right += sum(int(z.argmax()) == b["labels"]
                         for z, b in zip(out.logits, batch, strict=True))
    return right / len(rows), [r["labels"] for r in (rows[i] for i in range(len(rows)))]


def test_a_model_before_and_with_each_method(capsys, net):
    def files():
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in net.iterdir()}

    before = files()
    hows = ["tent(step_rate=0.05)", "alpha_bn(alpha=1.0)", "lame(neighbours=2)"]
    found = told(capsys, net, "digits", "--split", "validation",
                 *(a for h in hows for a in ("--how", h)))
    assert found["rows"] == 178 and found["split"] == "validation" and found["metric"] == "accuracy"
    (row,) = found["figures"]
    assert row["corruption"] is None and list(row["after"]) == hows
    source, labels = by_hand(net, "alpha_bn(alpha=1.0)")
    assert row["before"]["accuracy"] == pytest.approx(source)
    assert row["after"]["alpha_bn(alpha=1.0)"] == row["before"]
    for how in hows:
        assert row["after"][how]["accuracy"] == pytest.approx(by_hand(net, how)[0])
    assert row["after"][hows[0]]["loss"] != row["before"]["loss"]
    classes = told(capsys, net, "digits", "--split", "validation", "--order", "class",
                   "--how", hows[0])
    assert classes["figures"][0]["before"]["accuracy"] == row["before"]["accuracy"]
    order = sorted(range(178), key=lambda i: labels[i])
    assert classes["figures"][0]["after"][hows[0]]["accuracy"] == pytest.approx(
        by_hand(net, hows[0], order)[0])
    assert classes["figures"][0]["after"][hows[0]] != row["after"][hows[0]]
    a, b = (told(capsys, net, "digits", "--split", "validation", "--order", "shuffled", "--seed",
                 seed) for seed in (0, 1))
    assert a["figures"][0]["after"] != b["figures"][0]["after"]
    assert list(a["figures"][0]["after"]) == ["tent"] and files() == before


def test_what_learns_beforehand_has_the_train_split_and_its_labels(capsys, net):
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    how = "label_shift(hidden=8, steps=20, step_rate=0.01)"
    found = told(capsys, net, "digits", "--split", "validation", "--how", how)["figures"][0]
    task = task_for(read("digits", validation=0), str(net))
    model, learnt, rows = task.load(str(net)).eval(), task.rows("train"), task.rows("validation")

    def batches(rows, labels):
        for at in range(0, len(rows), 64):
            some = [rows[i] for i in range(at, min(at + 64, len(rows)))]
            yield {"pixel_values": torch.stack([r["pixel_values"] for r in some])} | (
                {"labels": torch.tensor([r["labels"] for r in some])} if labels else {})

    with burnish.parse(how)[0].lifecycle(model, batches(learnt, True)) as adapted:
        said = torch.cat([adapted(b).logits for b in batches(rows, False)])
    want = torch.tensor([rows[i]["labels"] for i in range(len(rows))])
    loss = float(torch.nn.functional.cross_entropy(said, want))
    assert found["after"][how]["loss"] == pytest.approx(loss, rel=1e-4) != found["before"]["loss"]


def test_a_table_of_corruptions(capsys, net):
    argv = (net, "digits", "--split", "validation", "--corrupt", "noise,blur", "--severity", "4",
            "--how", "tent", "--how", "alpha_bn(alpha=0.0)")
    found = told(capsys, *argv)
    assert [f["corruption"] for f in found["figures"]] == ["noise", "blur"]
    for side in (lambda f: f["before"], lambda f: f["after"]["tent"]):
        assert side(found["mean"])["accuracy"] == pytest.approx(
            sum(side(f)["accuracy"] for f in found["figures"]) / 2)
    one = told(capsys, net, "digits", "--split", "validation", "--corrupt", "blur", "--severity",
               "4", "--how", "tent")
    assert "mean" not in one                             # each row begins at the source
    assert one["figures"][0]["after"]["tent"] == found["figures"][1]["after"]["tent"]
    code, out, _ = run(capsys, "adapt", *argv)
    assert code == 0 and "accuracy on 178 rows of digits (validation), 64 at once" in out
    assert "severity 4" in out and "mean" in out and "alpha_bn(alpha=0.0)" in out


def test_a_run_is_what_evaluate_says_of_it(capsys, texts):
    at, rows = texts
    found = told(capsys, at, rows, "--how", "lame", "--how", "tent(again=True)", "--batch",
                 "8")
    code, out, _ = run(capsys, "evaluate", at, rows, "--json", "--batch", "8")
    assert code == 0 and found["figures"][0]["before"] == pytest.approx(json.loads(out)["tuned"])
    row = found["figures"][0]
    assert row["after"]["tent(again=True)"]["loss"] != row["before"]["loss"]
    code, _, err = run(capsys, "adapt", at, rows, "--corrupt", "noise")
    assert code == 2 and "--corrupt makes pictures worse" in err
    code, _, err = run(capsys, "adapt", at, rows, "--how", "alpha_bn")
    assert code == 2 and "this model has none" in err
    code, _, err = run(capsys, "adapt", at, rows, "--how", "label_shift", "--split", "train")
    assert code == 2 and "label_shift learns of the labels of the train split" in err


@pytest.mark.parametrize("argv, said", [
    (["--how", "lora(rank=2)"], "expected one method that adapts: alpha_bn, "),
    (["--how", "tent + lame"], "expected one method that adapts"),
    (["--how", "tent(updates=0)"], "at least 1"), (["--order", "clas"], "did you mean 'class'"),
    (["--corrupt", "noize"], "did you mean 'noise'"), (["--corrupt", "blur,blur"], "twice"),
    (["--corrupt", "blur", "--severity", "9"], "severity 9: expected 1 to 5"),
    (["--severity", "3"], "give --corrupt"), (["--seed", "0"], "give --corrupt or"),
    (["--seed", "1", "--order", "class"], "give --corrupt or"),
    (["--how", "label_shift", "--split", "train"], "train split, which is the stream"),
    (["--base", "x"], "--base is of a run's adapter"), (["--split", "tests"], "no split 'tests'"),
])
def test_what_cannot_act_is_refused(capsys, net, argv, said):
    code, out, err = run(capsys, "adapt", net, "digits", *argv)
    assert code == 2 and said in err and out == "" and err.count("\n") == 1


def test_numbers_have_no_classes(capsys, tmp_path):
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig(
        vocab_size=wordpiece(tmp_path / "m"), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=1)).save_pretrained(tmp_path / "m")
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(
        f"the cat sat {i},{i / 7:.3f}\n" for i in range(12)))
    code, _, err = run(capsys, "adapt", tmp_path / "m", tmp_path / "rows.csv")
    assert code == 2 and "probabilities of classes, and this is text-regression" in err
