"""LESS: Adam's direction by Adam, angles after projection, loss changes it foretells, a run."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.influence import STRIP, adam_direction, projected, signs
from burnish.core.errors import ConfigError, FormatError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.less import Less, Point


@pytest.mark.parametrize("before", [0, 1, 5])
def test_the_direction_is_the_one_adam_takes(before):
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(before):
        p.grad = torch.randn(4, 3, generator=g, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[p] or {"exp_avg": torch.zeros_like(p), "step": 0,
                                   "exp_avg_sq": torch.zeros_like(p)}
    grads = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    made = adam_direction(grads, state["exp_avg"], state["exp_avg_sq"], int(state["step"]),
                          (0.8, 0.95), 1e-3)
    for i in range(2):
        twin, opt = nn.Parameter(p.detach().clone()), copy.deepcopy(optimizer.state_dict())
        again = torch.optim.Adam([twin], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
        again.load_state_dict(opt)
        twin.grad = grads[i]
        again.step()
        torch.testing.assert_close((p.detach() - twin.detach()) / 0.01, made[i])


def test_a_projection_keeps_angles():
    k, P = 1024, 3 * STRIP + 17
    g = torch.Generator().manual_seed(1)
    a = torch.randn(8, P, generator=g)
    b = 0.6 * a + 0.8 * torch.randn(8, P, generator=g)
    fa, fb = (projected({"x": t[:, :5000].reshape(8, 50, 100), "y": t[:, 5000:]}, k, seed=3)
              for t in (a, b))
    off = F.cosine_similarity(fa, fb) - F.cosine_similarity(a, b)
    assert float(off.abs().max()) <= 3 / k**0.5
    R = torch.cat([signs(k, 3, i) for i in range(4)], 1)                 # strips of x, then of y
    assert set(R.unique().tolist()) == {-1.0, 1.0} and abs(float(R.mean())) < 5e-3
    x, y = a[:1, :5000], a[:1, 5000:]
    want = (R[:, :STRIP] @ x[0, :STRIP] + R[:, STRIP:STRIP + 904] @ x[0, STRIP:]
            + R[:, 2 * STRIP:3 * STRIP] @ y[0, :STRIP]
            + R[:, 3 * STRIP:][:, :P - 5000 - STRIP] @ y[0, STRIP:])
    torch.testing.assert_close(fa[0] * k**0.5, want, rtol=1e-3, atol=1e-2)
    assert not torch.equal(projected({"x": a}, k, 0), projected({"x": a}, k, 1))


@pytest.fixture
def toy():
    """A small network that has been trained a little, its moments, rows and what is wanted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
    tuned = burnish.tune(net, "lora(rank=4)", head=False)

    def loss(out, batch):
        return F.cross_entropy(out, batch[1])

    def rows(n, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 6, generator=g)
        return [(x[i:i + 1], torch.tensor([int(x[i, :3].argmax())])) for i in range(n)]

    optimizer, points, train = tuned.optimizer(lr=0.02, weight_decay=0.0), [], rows(40, 1)
    net.train()
    names = {id(p): n for n, p in tuned.named_parameters()}
    for turn in range(2):
        for x, y in train:
            tuned.step((x, y), loss=loss)
        kept = ({n: t.clone() for n, t in tuned.tensors().items()},
                {names[id(p)]: {k: v.clone() for k, v in s.items()}
                 for p, s in optimizer.state.items()})
        points.append(Point(0.02 / (1 + turn), lambda kept=kept: kept))
    return tuned, points, rows(30, 2), rows(6, 3), loss


def by_hand(tuned, points, rows, groups, loss):
    """The equation, with the whole gradients."""
    total = 0
    for point in points:
        tensors, moments = point.read()
        for n, t in tuned.tensors().items():
            t.data.copy_(tensors[n])
        tuned.model.eval()
        names = [n for n, _ in tuned.named_parameters()]

        def grad(batch, names=names):
            grads = tuned.probe(batch, loss).grads
            return torch.cat([grads[n].flatten() for n in names])

        flat = {k: torch.cat([moments[n][k].flatten() for n in names])
                for k in ("exp_avg", "exp_avg_sq")}
        step = int(moments[names[0]]["step"])
        val = torch.stack([torch.stack([grad(b) for b in some]).mean(0) for some in groups])
        go = torch.stack([adam_direction(grad(b), flat["exp_avg"], flat["exp_avg_sq"], step,
                                         point.betas, point.eps) for b in rows])
        total = total + point.rate * (F.normalize(go, dim=1) @ F.normalize(val, dim=1).t())
    return (total / sum(p.rate for p in points)).max(1).values


def test_scores_are_the_equation_s_and_do_not_depend_on_how_many_go_together(toy):
    tuned, points, rows, wanted, loss = toy
    for t in tuned.tensors().values():               # it stands elsewhere than any of the points
        t.data.add_(0.1)
    before = {n: t.clone() for n, t in tuned.tensors().items()}
    groups = {"a": wanted[:3], "b": wanted[3:]}
    made = [Less(dimension=4096, at_once=n).lifecycle(tuned, points, rows, groups, loss)
            for n in (1, 16)]
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in tuned.tensors().items())
    assert tuned.model.training
    want = by_hand(tuned, points, rows, list(groups.values()), loss)
    assert float((made[0] - want).abs().max()) <= 4 / 4096**0.5
    assert float(torch.corrcoef(torch.stack([made[0], want]))[0, 1]) > 0.99


def test_a_score_foretells_what_a_step_on_the_row_does_to_the_wanted_loss(toy):
    tuned, points, rows, wanted, loss = toy
    scores = Less(dimension=4096).lifecycle(tuned, points[-1:], rows, {"": wanted}, loss)
    tensors, moments = points[-1].read()
    live = dict(tuned.named_parameters())
    tuned.model.eval()

    def of_wanted():
        with torch.no_grad():
            return sum(float(loss(tuned.model(x), (x, y))) for x, y in wanted) / len(wanted)

    changes = []
    for row in rows:
        for n, t in tuned.tensors().items():
            t.data.copy_(tensors[n])
        first, grads = of_wanted(), tuned.probe(row, loss).grads
        go = {n: adam_direction(grads[n], moments[n]["exp_avg"], moments[n]["exp_avg_sq"],
                                int(moments[n]["step"]), (0.9, 0.999), 1e-8) for n in live}
        size = sum(float(d.square().sum()) for d in go.values())**0.5
        for n, p in live.items():
            p.data.sub_(1e-3 / size * go[n])
        changes.append(first - of_wanted())
    together = torch.corrcoef(torch.stack([scores, torch.tensor(changes)]))
    assert float(together[0, 1]) > 0.9


def test_each_point_is_told_and_steps_may_be_numbers(toy):
    tuned, points, rows, wanted, loss = toy
    lines = []
    one = Less(dimension=64).lifecycle(tuned, points, rows, {"": wanted}, loss, say=lines.append)
    assert lines == [f"point {i} of {len(points)}: {len(rows)} rows"
                     for i in range(1, len(points) + 1)]

    def plain(point):
        tensors, moments = point.read()
        return Point(point.rate, lambda: (tensors, {
            n: {**m, "step": int(m["step"])} for n, m in moments.items()}))

    other = Less(dimension=64).lifecycle(tuned, [*map(plain, points)], rows, {"": wanted}, loss)
    assert torch.equal(one, other)
    assert (Point(1.0, dict).betas, Point(1.0, dict).eps) == ((0.9, 0.999), 1e-8)  # torch's Adam


def test_what_a_row_does_not_reach_has_no_gradient():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "spare": nn.Linear(3, 2)})
    net.forward = lambda x: net["used"](x)
    tuned = burnish.tune(net, "full", head=False)
    found = Less()._gradient(tuned, torch.ones(1, 3), lambda out, _: out.sum())
    assert {n: bool(g.any()) for n, g in found.items()} == {
        n: n.startswith("used") for n, _ in tuned.named_parameters()}
    assert len(found) == 4


def test_the_best_are_chosen_and_of_equal_ones_the_earlier():
    assert Less(fraction=0.5).chosen(torch.tensor([0.1, 0.9, 0.9, -1.0])) == [1, 2]
    assert Less(fraction=0.001).chosen(torch.tensor([0.1, 0.3])) == [1]


def test_what_cannot_be_scored_is_refused(toy):
    tuned, points, rows, wanted, loss = toy
    less = Less(dimension=16)
    tensors, moments = points[0].read()
    lost = Point(0.1, lambda: (tensors, {}))
    part = Point(0.1, lambda: (dict(list(tensors.items())[1:]), moments))
    for given, words in ((dict(points=[]), "points of a warm-up"),
                         (dict(rows=[]), "no rows to choose"),
                         (dict(wanted={}), "wanted rows"),
                         (dict(wanted={"": []}), "is empty"),
                         (dict(points=[lost]), "no moments of Adam"),
                         (dict(points=[part]), "of the model alone")):
        how = {"points": points, "rows": rows, "wanted": {"": wanted}, "loss": loss, **given}
        with pytest.raises(ConfigError, match=words):
            less.lifecycle(tuned, **how)
        assert tuned.model.training
    assert parse("less")[0].settings() == {"targets": None, "dimension": 8192, "fraction": 0.05,
                                           "at_once": 16, "seed": 0}
    assert parse("less(dimension=1, at_once=1, fraction=1.0)")[0].fraction == 1.0
    for wrong in ("less(fraction=0.0)", "less(fraction=1.5)", "less(dimension=0)",
                  "less(at_once=0)"):
        with pytest.raises(ConfigError, match="are expected"):
            parse(wrong)
    with pytest.raises(ConfigError, match="targets='q' does nothing"):
        parse("less(targets='q')")


# -- the command -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A run on sentences of two kinds that keeps three checkpoints."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    root = tmp_path_factory.mktemp("less")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "sun", "sea", "a", "b"]
    (root / "vocab.txt").write_text("\n".join(words))
    base = root / "base"
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2)).save_pretrained(base)
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(base)
    rows = [{"text": f"{w} {x}", "label": lab} for w, lab in (("red", "warm"), ("blue", "cold"),
                                                              ("sun", "warm"), ("sea", "cold"))
            for x in ("a", "b")]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for kind, word in (("warm", "sun"), ("cold", "sea")):
        (root / f"{kind}.jsonl").write_text(json.dumps({"text": f"{word} a", "label": kind}) + "\n")
    run = burnish.fit(str(base), str(root / "rows.jsonl"), "lora(rank=4)", output=root / "run",
                      epochs=3, batch_size=4, lr=1e-3, save_strategy="epoch", save_total_limit=3,
                      validation=0, test=False, report=False, measure=False, quiet=True)
    return root, run


@pytest.mark.slow
def test_a_run_chooses_rows_that_fit_reads(warm, capsys):
    from burnish.cli import main

    root, _ = warm
    out = root / "chosen.jsonl"
    words = ["select", str(root / "run"), str(root / "rows.jsonl"), "--like",
             str(root / "warm.jsonl"), "--like", str(root / "cold.jsonl"), "--how",
             "less(dimension=512, fraction=0.75)"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["points"] == 3 and told["rows"] == 8 and len(told["chosen"]) == 6
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == \
        [rows[i] for i in told["chosen"]]
    assert all(r["text"].startswith(("sun", "sea")) for r in
               (rows[i] for i in told["chosen"][:2]))
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "6 of 8 rows are chosen; --out FILE.jsonl writes them" in shown.out
    assert "point 3 of 3: 8 rows" in shown.err
    again = burnish.fit(str(root / "base"), str(out), "lora(rank=2)", output=root / "again",
                        max_steps=1, validation=0, test=False, report=False, measure=False,
                        quiet=True)
    assert again.facts["data"]["rows"] == {"train": 6}


@pytest.mark.slow
def test_what_cannot_be_chosen_from_says_why(warm, tmp_path, capsys):
    from burnish.cli import main

    root, _ = warm
    rows, like = str(root / "rows.jsonl"), str(root / "warm.jsonl")
    burnish.fit(str(root / "base"), rows, "lora(rank=2)", output=tmp_path / "bare", max_steps=1,
                validation=0, test=False, report=False, measure=False, quiet=True,
                save_strategy="no")
    for words, said in (
            ([str(tmp_path / "bare"), rows, "--like", like], "has no checkpoints"),
            ([str(root / "run"), rows, "--like", like, "--how", "soup"], "or less, with"),
            ([str(root / "run"), rows, "--like", like, "--out", "x.csv"], "ends in .jsonl"),
            ([str(root / "run"), rows, "--like", like, "--like", like], "same file twice"),
            ([str(root / "run"), rows, "--like", like, "--split", "test"], "no split 'test'")):
        assert main(["select", *words]) == 2
        assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, a run on documents, a run on prompts with completions), both with checkpoints."""
    from tests.e2e.conftest import bytelevel
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=bytelevel(root / "base"), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128)
    ).save_pretrained(root / "base")
    docs = ["the cat sat", "my dog ran to the bank and back", "stocks", "a dog ran in the park"]
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    (root / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": p, "completion": " the cat"}) + "\n" for p in (
            "a dog ran in the park " * 9, "my dog", "stocks", "the bank " * 20, "a park")))
    (root / "like.jsonl").write_text(json.dumps({"text": "my dog ran"}) + "\n")
    (root / "pair.jsonl").write_text(json.dumps(
        {"prompt": "my dog", "completion": " the cat"}) + "\n")
    how = {"epochs": 2, "lr": 1e-2, "save_strategy": "epoch", "save_total_limit": 2,
           "warmup_steps": 0, "validation": 0, "test": False, "report": False, "measure": False,
           "quiet": True, "max_length": 16}
    for name in ("docs", "pairs"):
        burnish.fit(str(root / "base"), str(root / f"{name}.jsonl"), "lora(rank=4)",
                    output=root / name, **how)
    return root


def scored(root, run, data, like, **how):
    from burnish.fit.choosing import Chooser

    chooser = Chooser.open(root / run)
    found = chooser.scores(Less(dimension=256), str(data), [str(root / like)], "train", **how)
    return dict(zip(chooser.numbers, found.tolist(), strict=True)), chooser


@pytest.mark.slow
def test_documents_are_chosen_one_by_one(written, tmp_path):
    found, chooser = scored(written, "docs", written / "docs.jsonl", "like.jsonl")
    lines = (written / "docs.jsonl").read_text().splitlines()
    assert list(found) == [0, 1, 2, 3]
    for i, line in enumerate(lines):                 # a score is its own, whatever stands beside
        (tmp_path / "one.jsonl").write_text(line + "\n")
        alone, _ = scored(written, "docs", tmp_path / "one.jsonl", "like.jsonl")
        assert alone == {0: pytest.approx(found[i], abs=1e-5)}
    chooser.write(tmp_path / "out.jsonl", [2, 0])
    assert (tmp_path / "out.jsonl").read_text().splitlines() == [lines[2], lines[0]]


@pytest.mark.slow
def test_a_row_that_is_left_out_moves_no_other(written, tmp_path):
    found, _ = scored(written, "pairs", written / "pairs.jsonl", "pair.jsonl")
    assert list(found) == [1, 2, 4]                  # the others are cut before their answer
    assert max(found, key=found.get) == 1            # which is the wanted row itself


@pytest.mark.slow
def test_a_file_that_is_read_is_never_the_one_written(written, tmp_path, capsys):
    from burnish.cli import main

    words = ["select", str(written / "docs"), str(written / "docs.jsonl"), "--like",
             str(written / "like.jsonl"), "--how", "less(dimension=16)", "--out"]
    for name in ("docs.jsonl", "like.jsonl"):
        before = (written / name).read_bytes()
        assert main([*words, str(written / name)]) == 2
        assert "which would be replaced" in capsys.readouterr().err
        assert (written / name).read_bytes() == before
    (tmp_path / "odd.jsonl").mkdir()
    assert main([*words, str(tmp_path / "odd.jsonl")]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_no_point(written, tmp_path, capsys):
    import shutil

    from burnish.fit.choosing import Chooser

    for file, damage in (("optimizer.safetensors", lambda b: b[:-9]),
                         ("trainer_state.json", lambda b: b.replace(b"0.01", b"0.02")),
                         ("complete.json", lambda b: b[:20])):
        shutil.copytree(written / "docs", tmp_path / file)
        first = sorted((tmp_path / file).glob("checkpoint-*"))[0] / file
        first.write_bytes(damage(first.read_bytes()))
        with pytest.raises(FormatError, match=f"{file} is not what the run wrote"):
            Chooser.open(tmp_path / file)


@pytest.mark.slow
def test_rows_that_are_no_json_are_refused_before_anything_is_scored(written, monkeypatch):
    from burnish.fit.choosing import Chooser

    monkeypatch.setattr(Chooser, "_row", lambda self, i: {"text": "a", "x": [b"odd"]})
    monkeypatch.setattr(Less, "lifecycle", None)
    with pytest.raises(ConfigError, match="column 'x' is no text or number"):
        scored(written, "docs", written / "docs.jsonl", "like.jsonl", written=True)
    monkeypatch.setattr(Chooser, "_row", lambda self, i: {"text": "a", "y": float("nan")})
    with pytest.raises(ConfigError, match="column 'y' is no text or number"):
        scored(written, "docs", written / "docs.jsonl", "like.jsonl", written=True)
