"""Embeddings: rows in every layout, losses from their equations, retrieval over the whole split."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.tasks import task_for
from burnish.fit.tasks.embeddings import classed, pooled, ranking, triplet, twins


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


PAIRS = [{"anchor": a, "positive": a.upper()} for a in ("ab", "cde", "f", "gh")]


@pytest.mark.parametrize("names, role", [
    (("anchor", "positive"), None), (("query", "passage"), None), (("query", "positive"), None),
    (("anchor", "positive", "negative"), "negative"), (("sentence1", "sentence2", "score"),
                                                       "label")])
def test_every_way_to_name_what_is_near(tmp_path, names, role):
    values = ["a b", "c d", 0.5 if role == "label" else "e f"]
    rows = [dict(zip(names, values, strict=False)) for _ in range(4)]
    if role == "label":
        rows = [{**r, "score": i / 4} for i, r in enumerate(rows)]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    assert data.task == "embedding"
    assert set(data.train.column_names) == {"text", "pair", role} - {None}


def test_pairs_with_a_class_stay_classification(tmp_path):
    rows = [{"sentence1": "a b", "sentence2": "c d", "label": i % 2} for i in range(4)]
    assert read(lines(tmp_path / "x.jsonl", rows), validation=0).task == "text-classification"
    with pytest.raises(DataError, match="an embedding is learnt from anchor and positive"):
        read(lines(tmp_path / "x.jsonl", rows), task="embedding")


def test_pairs_marked_good_and_bad_are_not_all_near(tmp_path):
    rows = [{"query": f"a {i}", "passage": f"b {i}", "label": i % 2} for i in range(8)]
    with pytest.raises(DataError):
        read(lines(tmp_path / "x.jsonl", rows))


def test_scores_that_no_cosine_has_are_named(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (0.5, 4.2)]
    with pytest.raises(DataError, match="line 2, field 'score': 4.2 is beyond 1"):
        read(lines(tmp_path / "x.jsonl", rows))


def test_one_direction_for_all_finds_nothing(tmp_path, tokenizer):
    task = task_for(read(lines(tmp_path / "x.jsonl", PAIRS), validation=0), "",
                    processor=tokenizer)
    task.rows("train")
    same = F.normalize(torch.ones(5, 2, 3), dim=-1)
    assert task.measure(same, None)["recall_at_1"] == 0.0
    assert task.measure(same * float("nan"), None) == {"recall_at_1": 0.0, "mrr": 0.0}


# -- the loss --------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [2, 3])
def test_ranking_is_its_equation(k):
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(4, k, 6, generator=g, dtype=torch.float64), dim=-1)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True                       # one text: no stranger to the other
    got = ranking(e, 5.0, same)
    for i in range(4):
        others = [e[j, 1] for j in range(4) if j == i or not same[i, j]]
        others += [e[j, 2] for j in range(4)] if k == 3 else []
        z = sum(math.exp(5.0 * float(e[i, 0] @ o)) for o in others)
        assert got[i].item() == pytest.approx(-5.0 * float(e[i, 0] @ e[i, 1]) + math.log(z))


@pytest.mark.parametrize("k", [2, 3])
def test_triplets_are_their_equation(k):
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(5, k, 6, generator=g, dtype=torch.float64), dim=-1)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True                       # one text: no stranger to the other
    got = triplet(e, 0.7, same)
    for i in range(5):
        near = (e[i, 0] - e[i, 1]).square().sum()
        strangers = [e[i, 2]] if k == 3 else [e[j, 1] for j in range(5) if not same[i, j]]
        far = min(float((e[i, 0] - n).square().sum()) for n in strangers)
        assert got[i].item() == pytest.approx(max(float(near) - far + 0.7, 0.0), abs=1e-12)
    assert (got > 0).any()
    if k == 2:
        assert triplet(e[:1], 0.7, same[:1, :1]).tolist() == [0.0], "no stranger: nothing to lose"


def test_twins_are_the_correlation_of_both_columns():
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(6, 2, 4, generator=g, dtype=torch.float64), dim=-1)
    z = (e - e.mean(0)) / (e.var(0, correction=0) + 1e-5).sqrt()
    C = torch.einsum("bi,bj->ij", z[:, 0], z[:, 1]) / 6
    want = sum((1 - C[i, j]) ** 2 if i == j else 0.0051 * C[i, j] ** 2
               for i in range(4) for j in range(4)) / 4
    torch.testing.assert_close(twins(e), want.expand(6))
    assert twins(e[:1]).tolist() == [0.0]


def test_classes_are_rows_of_one_neighbour():
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(4, 2, 6, generator=g, dtype=torch.float64), dim=-1)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    got = classed(e, 5.0, same)
    texts = [(i, k) for i in range(4) for k in range(2)]
    for i in range(4):
        total = 0.0
        for k in range(2):
            z = {t: 5.0 * float(e[i, k] @ e[t]) for t in texts if t != (i, k)}
            among = math.log(sum(math.exp(v) for v in z.values()))
            near = [v for (j, _), v in z.items() if same[i, j]]
            total += sum(among - v for v in near) / len(near) / 2
        assert got[i].item() == pytest.approx(total)


def test_poolings():
    states = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    mean = F.normalize(torch.stack([states[0, :3].mean(0), states[1, 0]]), dim=-1)
    assert torch.allclose(pooled(states, mask, "mean"), mean, atol=1e-6)
    assert torch.allclose(pooled(states, mask, "cls"), F.normalize(states[:, 0], dim=-1))
    last = F.normalize(torch.stack([states[0, 2], states[1, 0]]), dim=-1)
    assert torch.allclose(pooled(states, mask, "last"), last)


def test_one_neighbour_for_all_tells_nothing(tmp_path, tokenizer):
    def made(*rows):
        return task_for(read(lines(tmp_path / "x.jsonl", list(rows)), validation=0), "",
                        processor=tokenizer)

    with pytest.raises(DataError, match="all 2 rows have one pair, and nothing is told apart"):
        made({"anchor": "a", "positive": "x"}, {"anchor": "b", "positive": "x"})
    made({"anchor": "a", "positive": "x", "negative": "y"},
         {"anchor": "b", "positive": "x", "negative": "z"})


# -- a whole run -----------------------------------------------------------------------------------
@pytest.fixture
def base(tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                         num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
                         pad_token_id=0)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "triplets", "scores", "triplet", "barlow",
                                  "supcon"])
def test_a_run_learns_what_is_near(base, tmp_path, kind, capsys):
    import burnish
    from burnish.cli import main

    words = [a + b for a in "abcdefgh" for b in "klmnop"]
    rows = [{"anchor": w, "positive": w.upper()} for w in words]
    if kind == "triplets":
        rows = [{**r, "negative": words[i - 7].upper()} for i, r in enumerate(rows)]
    if kind == "scores":
        rows = [{"sentence1": w, "sentence2": v.upper(), "score": float(w[0] == v[0]) * 0.9 + 0.05}
                for w in words[::2] for v in words[::5]]
    path = lines(tmp_path / "rows.jsonl", rows)
    how = {"loss_type": kind} if kind in ("triplet", "barlow", "supcon") else {}
    run = burnish.fit(base, str(path), "full", output=tmp_path / "out", lr=5e-3, epochs=12,
                      batch_size=16, quiet=True, validation=0.25, **how)
    found = run.metrics["validation"]
    assert found["r2" if kind == "scores" else "mrr"] > 0.6, found
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moments = run.facts["memory"]["moments"]["evaluate"]
    assert moments["promised"] == moments["measured"]
    assert main(["evaluate", str(tmp_path / "out"), str(path), "--split", "validation",
                 "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"]["loss"] == pytest.approx(
        found["loss"], abs=1e-5)
    near = json.dumps({"text": "ak", "pair": "AK"})
    far = json.dumps({"text": "ak", "pair": "HP"})
    assert main(["predict", str(tmp_path / "out"), near, far, "ak", "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)["answers"]
    assert first["cosine"] > second["cosine"] and len(third["embedding"]) == 32


def test_what_looks_at_each_sample_by_itself_is_refused(base, tmp_path):
    import burnish

    path = lines(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="dp looks at each sample by itself"):
        burnish.fit(base, str(path), "lora(rank=2) + dp(epsilon=8)", output=tmp_path / "out",
                    quiet=True)


def test_settings_of_embeddings(tmp_path, tokenizer):
    data = read(lines(tmp_path / "x.jsonl", PAIRS), validation=0)
    for how, words in (({"pooling": "max"}, "pooling='max' is not one of mean, cls, last"),
                       ({"scale": -1.0}, "scale=-1.0: expected a number above 0"),
                       ({"loss_type": "tripplet"}, "not one of ranking, triplet, bar.*triplet"),
                       ({"gamma": 0.3}, "gamma=0.3 does nothing: it is of loss_type='triplet'"),
                       ({"gamma": 0.0, "loss_type": "triplet"}, "gamma=0.0: expected a number abo"),
                       ({"scale": 3.0, "loss_type": "barlow"}, "it is of loss_type='ranking' or"),
                       ({"beta": 0.1}, "beta=0.1 is a setting of preference-tuning")):
        with pytest.raises(ConfigError, match=words):
            task_for(data, "", processor=tokenizer, **how)
    scored = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (0.1, 0.5, 0.9, 0.2)]
    with pytest.raises(ConfigError, match="loss_type='triplet' does nothing: rows with a score"):
        task_for(read(lines(tmp_path / "s.jsonl", scored), validation=0), "", processor=tokenizer,
                 loss_type="triplet")
    three = [{**r, "negative": "z"} for r in PAIRS]
    for kind in ("barlow", "supcon"):
        with pytest.raises(ConfigError, match=f"{kind}.* a third text, negative"):
            task_for(read(lines(tmp_path / "n.jsonl", three), validation=0), "",
                     processor=tokenizer, loss_type=kind)
