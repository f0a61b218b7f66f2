"""GORACS: transport as a linear program, exchanges against recomputing, sets by trying all."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.transport import Plan, exchanged, potentials
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.goracs import Goracs


def program(C):
    """OT as the linear program it is."""
    from scipy.optimize import linprog

    n, m = C.shape
    A = np.zeros((n + m, n * m))
    for i in range(n):
        A[i, i * m:(i + 1) * m] = 1
    for j in range(m):
        A[n + j, j::m] = 1
    b = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(np.asarray(C).flatten(), A_eq=A, b_eq=b).fun)


def costs(n, m, seed=0):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n,m", [(1, 1), (5, 5), (6, 4), (4, 7), (1, 3), (3, 1), (12, 9)])
def test_the_plan_is_the_linear_programs(n, m):
    C = costs(n, m)
    plan = Plan(C)
    assert plan.value == pytest.approx(program(C), abs=1e-9)
    assert (plan.F.sum(1) * n == plan.units).all() and (plan.F.sum(0) * m == plan.units).all()
    assert plan.u.mean() + plan.v.mean() == pytest.approx(plan.value, abs=1e-9)       # dual
    assert (C.numpy() - plan.u[:, None] - plan.v >= -1e-9).all()
    assert torch.equal(torch.from_numpy(plan.C), C) and plan.potential(C) == pytest.approx(
        (C.numpy() - plan.v).min(1))


@pytest.mark.parametrize("n,m", [(5, 5), (6, 4), (4, 7)])
def test_an_exchange_changes_it_by_what_recomputing_says(n, m):
    plan, more = Plan(costs(n, m)), costs(8, m, 1)
    for k, c in enumerate(more):
        i = k % n
        before, bound = program(plan.C), (float(plan.potential(c[None])[0]) - plan.u[i]) / n
        change = plan.exchange(i, c)
        assert change == pytest.approx(program(plan.C) - before, abs=1e-5)
        assert change >= bound - 1e-9                    # what the potentials promise
        assert (plan.C[i] == c.numpy()).all() and plan.value == pytest.approx(program(plan.C))


def test_one_that_is_tried_on_leaves_the_plan():
    plan = Plan(costs(5, 4))
    held = {k: np.copy(v) for k, v in vars(plan).items()}
    plan.copy().exchange(2, costs(1, 4, 5)[0])
    assert all(np.array_equal(v, getattr(plan, k)) for k, v in held.items())


@pytest.mark.parametrize("block", [3, 100])
def test_the_potentials_of_a_large_set_are_nearly_the_programs(block):
    C = costs(40, 6)
    v = potentials(lambda a, b: C[a:b], 40, block, smooth=0.01, steps=400)
    dual = float((C - v).min(1).values.mean() + v.mean())
    assert dual <= program(C) + 1e-9
    assert dual == pytest.approx(program(C), rel=0.05)
    assert torch.allclose(v, potentials(lambda a, b: C[a:b], 40, 40, smooth=0.01, steps=400))


def test_the_objective_only_falls_and_ends_where_nothing_helps():
    E = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    V = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    extra = torch.rand(11, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.3

    def objective(S):
        return program(torch.cdist(E[list(S)], V)) + float(extra[list(S)].mean())

    inside, seen = [0, 1, 2, 3], [objective([0, 1, 2, 3])]
    plan = Plan(torch.cdist(E[inside], V))
    end = exchanged(plan, inside, lambda index: torch.cdist(E[index], V), extra, 100, 5,
                    seen.append)
    assert len(seen) > 2 and all(b < a for a, b in itertools.pairwise(seen))
    assert end == pytest.approx(objective(inside)) == pytest.approx(seen[-1])
    assert len(set(inside)) == 4 and torch.allclose(torch.from_numpy(plan.C),
                                                    torch.cdist(E[inside], V))
    best = min(map(objective, itertools.combinations(range(11), 4)))
    assert best <= end + 1e-9 and end - best < 0.2 * (seen[0] - best)
    again = exchanged(plan, list(inside), lambda index: torch.cdist(E[index], V), extra, 0, 5)
    assert again == pytest.approx(end)                   # no patience: nothing is tried


# -- of a model -----------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.body(x)))
        classes = labels is not None and labels.shape == x.shape[:1] and labels.dtype == torch.long
        return {"logits": logits, "loss": F.cross_entropy(logits, labels) if classes else None}


@pytest.fixture
def pool():
    torch.manual_seed(0)
    net = Net().double()
    g = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(1, 3, generator=g, dtype=torch.float64),
             "labels": torch.randint(2, (1,), generator=g)} for _ in range(12)]
    tuned = burnish.tune(net, "lora(rank=1)", targets="body", head=False)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.3
    return tuned, rows


def by_hand(tuned, rows, wanted, alpha, gap):
    """C and the gradient term, row by row."""
    with tuned.disabled(), torch.no_grad():
        E, V = (torch.cat([torch.tanh(tuned.model.body(r["x"])) for r in some])
                for some in (rows, wanted))
    C = torch.tensor([[float((e - v).norm()) for v in V] for e in E])
    other = torch.tensor([[float(int(r["labels"]) != int(w["labels"])) for w in wanted]
                          for r in rows])
    extra = []
    for r in rows:
        grads = torch.autograd.grad(tuned.model(**r)["loss"], list(tuned.parameters()))
        extra.append(alpha * float(sum(g.square().sum() for g in grads)) ** 0.5)
    return C + gap * C.mean() * other, torch.tensor(extra)


@pytest.mark.parametrize("alpha,gap", [(0.0, 0.0), (0.5, 0.0), (0.5, 2.0), (30.0, 1.0)])
def test_the_set_is_as_good_as_the_best_of_all(pool, alpha, gap):
    tuned, rows = pool
    wanted, lines = rows[:3], []
    rows = rows[3:]
    method = Goracs(coreset=3, alpha=alpha, gap=gap, patience=50)
    scores = method.lifecycle(tuned, [], rows, {"a": wanted[:1], "b": wanted[1:]},
                              say=lines.append)
    C, extra = by_hand(tuned, rows, wanted, alpha, gap)
    sets = {S: program(C[list(S)]) + float(extra[list(S)].mean())
            for S in itertools.combinations(range(9), 3)}
    chosen = method.chosen(scores)
    mine = sets[tuple(sorted(chosen))]
    assert float(lines[0].split()[-1]) == pytest.approx(mine, rel=1e-4)
    assert mine <= sorted(sets.values())[3]              # of 84 sets among the first
    assert sorted(scores[scores > 0].tolist()) == pytest.approx([1 / 3, 2 / 3, 1])
    assert scores[chosen].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert tuned.model.training


@pytest.mark.parametrize("alpha,gap", [(0.0, 0.0), (0.5, 2.0), (30.0, 1.0), (2.0, 0.0)])
def test_without_patience_it_is_the_beginning(pool, alpha, gap):
    tuned, rows = pool
    wanted, rows, lines = rows[:3], rows[3:], []
    method = Goracs(coreset=4, alpha=alpha, gap=gap, patience=0)
    scores = method.lifecycle(tuned, [], rows, {"": wanted}, say=lines.append)
    C, extra = by_hand(tuned, rows, wanted, alpha, gap)
    v = potentials(lambda a, b: C[a:b], len(C), len(C))
    first = [min(float(C[i, j] - v[j]) for j in range(3)) + float(extra[i]) for i in range(9)]
    inside = sorted(range(9), key=first.__getitem__)[:4]
    plan = Plan(C[inside])
    stands = sorted(inside, key=lambda i: plan.u[inside.index(i)] + float(extra[i]))
    assert method.chosen(scores) == stands
    begun = program(C[inside]) + float(extra[inside].mean())
    told = lines[0].split()
    assert float(told[-3]) == pytest.approx(begun, rel=1e-5) and told[-1] == told[-3]


def test_gradients_are_of_the_pool_alone_and_only_where_they_count(pool, monkeypatch):
    tuned, rows = pool
    looks, real = [], type(tuned).probe
    monkeypatch.setattr(type(tuned), "probe", lambda self, *a, **k: (
        looks.append(1), real(self, *a, **k))[1])
    Goracs(coreset=2).lifecycle(tuned, [], rows[:5], {"": rows[5:]})
    assert len(looks) == 5
    Goracs(coreset=2, alpha=0.0).lifecycle(tuned, [], rows[:5], {"": rows[5:]})
    assert len(looks) == 5


@pytest.mark.parametrize("which", ["pool", "wanted", "several", "numbers", "pairs"])
def test_rows_without_a_class_each_are_no_further_apart(pool, which):
    tuned, rows = pool
    few = {"pool": rows[:9], "wanted": rows[9:]}
    change = {"several": lambda r: {"x": r["x"], "labels": r["labels"].repeat(2)},
              "numbers": lambda r: {"x": r["x"], "labels": r["labels"].double()},
              "pairs": lambda r: (r["x"], r["labels"])}.get(which, lambda r: {"x": r["x"]})
    for name in (which,) if which in few else few:
        few[name] = [change(r) for r in few[name]]
    ends = []
    for gap in (0.0, 50.0):
        lines = []
        scores = Goracs(coreset=3, alpha=0.0, gap=gap).lifecycle(
            tuned, [], few["pool"], {"": few["wanted"]}, say=lines.append)
        ends.append((scores.tolist(), lines))
    assert ends[0] == ends[1]


def test_distances_of_many_rows_far_out_are_exact():
    E = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    none = torch.full((40,), -1)
    C = Goracs()._distances(E, E, none, none)(torch.arange(40))
    assert (C.diagonal() == 0).all()
    assert float(C[3, 7]) == pytest.approx(float((E[3] - E[7]).norm()), rel=1e-9)


def test_rows_that_are_the_wanted_ones_are_all_at_no_distance(pool):
    tuned, rows = pool
    lines = []
    method = Goracs(coreset=4, alpha=0.0, gap=0.0)
    scores = method.lifecycle(tuned, [], rows, {"": rows[4:8]}, say=lines.append)
    assert sorted(method.chosen(scores)) == [4, 5, 6, 7]
    assert float(lines[0].split()[-1]) == pytest.approx(0, abs=1e-12)
    C = torch.cdist(torch.randn(5, 2), torch.randn(5, 2))
    assert Plan(C - C).value == 0.0


def test_the_base_hands_over_features_and_nothing_is_left_changed(pool):
    tuned, rows = pool
    before = {k: v.clone() for k, v in tuned.model.state_dict().items()}
    seen = []
    one = Goracs(coreset=2, alpha=0.0).lifecycle(tuned, [], rows, {"": rows[:2]})
    other = Goracs(coreset=2, alpha=0.0).lifecycle(
        tuned, [], rows, {"": rows[:2]},
        features=lambda out: (seen.append(1), out["logits"])[1])
    assert seen and one.shape == other.shape
    assert all(torch.equal(v, before[k]) for k, v in tuned.model.state_dict().items())
    assert not tuned.model.head._forward_pre_hooks
    assert all(p.grad is None for p in tuned.parameters())


def test_tokens_are_their_mean_over_those_that_count():
    from burnish.methods.lifecycle._adapted import Read
    from burnish.testing.models import tiny

    net, batch = tiny("llama")
    net.float().eval()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    states = []
    net.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    with torch.no_grad():
        got = Read("x", net).of({"input_ids": ids, "attention_mask": mask})
        whole = Read("x", net).of({"input_ids": ids})
    torch.testing.assert_close(got[0], states[0][0, :3].mean(0))
    torch.testing.assert_close(whole, states[1].mean(1))


def test_refusals_and_defaults(pool):
    tuned, rows = pool
    assert parse("goracs")[0].settings() == {"targets": None, "coreset": 1024, "alpha": 1.0,
                                             "gap": 1.0, "patience": 20}
    least = parse("goracs(coreset=1, alpha=0.0, gap=0.0, patience=0)")[0]
    assert (least.coreset, least.patience) == (1, 0)
    for wrong in ("coreset=0", "alpha=-1", "gap=-1", "patience=-1"):
        with pytest.raises(ConfigError, match="^goracs"):
            parse(f"goracs({wrong})")
    with pytest.raises(ConfigError, match="targets='q' does nothing"):
        parse("goracs(targets='q')")
    for given, words in ((dict(rows=rows[:1]), "there are 1 rows"), (dict(rows=[]), "are 0 rows"),
                         (dict(wanted={}), "wanted rows are needed")):
        how = {"rows": rows, "wanted": {"": rows[:2]}, **given}
        with pytest.raises(ConfigError, match=words):
            Goracs(coreset=2).lifecycle(tuned, [], **how)
    with pytest.raises(ConfigError, match="no linear head"):
        Goracs(coreset=1).lifecycle(nn.Conv1d(2, 2, 1), [], rows, {"": rows})


@pytest.mark.slow
def test_the_command_chooses_by_any_run(tmp_path, capsys):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    from burnish.cli import main

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "sun", "sea", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    base, data = str(tmp_path / "base"), str(tmp_path / "rows.jsonl")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2)).save_pretrained(base)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(base)
    rows = [{"text": f"{w} {x}", "label": lab} for w, lab in (("red", "warm"), ("blue", "cold"),
                                                              ("sun", "warm"), ("sea", "cold"))
            for x in ("a", "b")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "like.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[4:8]))
    burnish.fit(base, data, "lora(rank=2)", output=tmp_path / "run", max_steps=1, validation=0,
                test=False, report=False, measure=False, quiet=True, save_strategy="no")
    out = tmp_path / "chosen.jsonl"
    assert main(["select", str(tmp_path / "run"), data, "--like", str(tmp_path / "like.jsonl"),
                 "--how", "goracs(coreset=4, alpha=0.0)", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["chosen"]) == [4, 5, 6, 7] and told["points"] == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == \
        [rows[i] for i in told["chosen"]]
