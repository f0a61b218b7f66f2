"""Pictures as directions: losses and figures from their equations, batches by class, refusals."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.supervised import hardest, per_anchor
from burnish.core.errors import ConfigError, DataError, FormatError
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.data import read
from burnish.fit.finished import Finished
from burnish.fit.order import Classed, by_class
from burnish.fit.tasks import TASKS, directions, embedded, task_for
from burnish.fit.tasks.directions import retrieval
from burnish.testing.tasks import posed

VIT = str(GLYPH_VIT)
QUIET = {"quiet": True, "report": False, "measure": False}


def drawn(rows, width, classes, seed=0):
    """Directions, some of them twice, so that cosines are equal; classes, one of a single row."""
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(rows, width, generator=g, dtype=torch.float64)
    e[rows // 2:rows // 2 + rows // 4] = e[:rows // 4]
    y = torch.randint(classes, (rows,), generator=g)
    y[1] = classes
    return F.normalize(e, dim=-1), y


def looked_for(e, y, among):
    """Figures in loops: of equal cosines (to a millionth) strangers come first."""
    recalls, precise = {k: [] for k in among}, []
    for q in range(len(e)):
        R = sum(int(y[j] == y[q]) for j in range(len(e)) if j != q)
        if not R:
            continue
        others = sorted((j for j in range(len(e)) if j != q), key=lambda j: (
            -round(sum(float(a) * float(b) for a, b in zip(e[q], e[j], strict=True)) * 1e6),
            bool(y[j] == y[q])))
        hits = [bool(y[j] == y[q]) for j in others]
        for k in among:
            recalls[k].append(any(hits[:k]))
        precise.append(sum(sum(hits[:i]) / i for i in range(1, R + 1) if hits[i - 1]) / R)
    return {**{f"recall_at_{k}": sum(v) / len(v) for k, v in recalls.items()},
            "map_at_r": sum(precise) / len(precise)}


# -- figures ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, width, classes, seed", [
    (40, 3, 4, 0), (40, 2, 12, 1), (9, 5, 2, 2), (64, 2, 3, 3), (6, 4, 1, 4)])
@pytest.mark.parametrize("at_once", [None, 7])
def test_figures_are_those_of_loops(monkeypatch, rows, width, classes, seed, at_once):
    if at_once:                                          # a row at a time
        monkeypatch.setattr(directions, "AT_ONCE", at_once)
    e, y = drawn(rows, width, classes, seed)
    found, right = retrieval(e, y), looked_for(e, y, (1, 2, 4, 8))
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_one_direction_for_all_and_none_find_nothing():
    y = torch.tensor([0, 0, 1, 1, 2])
    nothing = {"recall_at_1": 0.0, "recall_at_2": 0.0}
    for e in (torch.ones(5, 3), torch.full((5, 3), float("nan"))):
        assert nothing.items() <= retrieval(e, y).items()
    right = torch.eye(3)[y]
    assert set(retrieval(right, y).values()) == {1.0}     # the row of no other is no query
    assert set(retrieval(torch.eye(3), torch.arange(3)).values()) == {0.0}


# -- the loss --------------------------------------------------------------------------------------
def triplets(e, y, margin):
    losses, has = [], []
    for a in range(len(e)):
        far = [[float((e[a] - e[j]).square().sum()) for j in range(len(e))
                if j != a and bool(y[j] == y[a]) == same] for same in (True, False)]
        has.append(all(far))
        losses.append(max(max(far[0]) - min(far[1]) + margin, 0.0) if all(far) else 0.0)
    return losses, has


def contrasted(e, y, scale):
    losses, has = [], []
    for a in range(len(e)):
        z = sum(math.exp(scale * float(e[a] @ e[j])) for j in range(len(e)) if j != a)
        own = [math.log(z) - scale * float(e[a] @ e[j]) for j in range(len(e))
               if j != a and y[j] == y[a]]
        has.append(bool(own))
        losses.append(sum(own) / len(own) if own else 0.0)
    return losses, has


@pytest.mark.parametrize("of, right", [
    (lambda e, y, **k: hardest(e, y, 0.3, **k), lambda e, y: triplets(e, y, 0.3)),
    (lambda e, y, **k: per_anchor(e, y, 1 / 7.0, **k), lambda e, y: contrasted(e, y, 7.0))])
def test_losses_of_some_rows_among_all_are_their_equations(of, right):
    for y in (drawn(20, 3, 4)[1], torch.zeros(20, dtype=torch.long), torch.arange(20)):
        e = drawn(20, 3, 4)[0]
        losses, has = right(e, y)
        for rows in (slice(None), slice(3, 11), slice(16, 24)):
            got, there = of(e, y, rows=rows)
            assert got.tolist() == pytest.approx(losses[rows], abs=1e-9)
            assert there.tolist() == has[rows]


def test_the_hardest_have_the_gradient_of_their_distances():
    e, y = drawn(12, 3, 3, 5)
    e.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: hardest(e + 1e-2 * torch.arange(36.).view(12, 3), y,
                                                      0.5)[0].sum(), e)


@pytest.fixture(scope="module")
def task():
    return task_for(read("digits", task="image-embedding"), VIT, dimension=6)


@pytest.mark.parametrize("kind, how", [("supcon", {"scale": 4.0}), ("triplet", {"gamma": 0.4}),
                                       ("supcon", {}), ("triplet", {})])
def test_the_loss_is_of_those_that_have_others_and_an_evaluation_of_all(task, kind, how):
    made = task_for(task.data, VIT, loss_type=kind, **how)
    out, y = torch.randn(14, 6, generator=torch.Generator().manual_seed(3)), torch.arange(14) % 5
    y[2] = 9
    e = F.normalize(out.double(), dim=-1)
    losses, has = triplets(e, y, how.get("gamma", 0.2)) if kind == "triplet" else \
        contrasted(e, y, how.get("scale", 10.0))
    mean = sum(losses) / sum(has)
    assert made.loss(out, (y,)).item() == pytest.approx(mean, rel=1e-5)
    kept = [made.kept(out[k:k + 5], (y[k:k + 5],)) for k in range(0, 14, 5)]   # as it is batched
    found = made.figures(torch.cat([e for e, _ in kept]), torch.cat([n for _, n in kept]), y)
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert {"recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r"} < set(found)


# -- batches ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [[12, 12, 12], [5, 1, 7, 30], [2] * 20, [1] * 9, [3, 40]])
@pytest.mark.parametrize("per_class, batch", [(2, 4), (4, 8), (3, 8), (2, 7)])
def test_every_row_stands_once_and_rows_of_a_class_together(sizes, per_class, batch):
    classes = [c for c, n in enumerate(sizes) for _ in range(n)]
    seen = []
    for epoch in range(3):
        order = Classed(classes, 5, per_class, batch)
        order.set_epoch(epoch)
        rows = list(order)
        assert sorted(rows) == list(range(len(classes))) and len(order) == len(classes)
        again = Classed(classes, 5, per_class, batch)
        again.set_epoch(epoch)
        assert list(again) == rows                         # of seed and epoch alone
        seen.append(tuple(rows))
    assert len(set(seen)) == 3 and list(Classed(classes, 6, per_class, batch)) != list(seen[0])


@pytest.mark.parametrize("per_class, batch", [(2, 4), (4, 16), (4, 8)])
def test_batches_of_even_classes_hold_whole_shares_of_as_many_as_have_room(per_class, batch):
    classes = [c for c in range(10) for _ in range(24)]
    rows = list(Classed(classes, 0, per_class, batch))
    full = 0
    for k in range(0, len(rows), batch):
        held = [classes[i] for i in rows[k:k + batch]]
        counts = {held.count(c) for c in held}
        assert min(counts) >= per_class
        full += len(set(held)) == batch // per_class
    assert full >= 0.9 * len(rows) / batch


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_left_without_another_of_its_class(seed):
    """Five are three and two, not four and one."""
    classes = [c for c in range(2) for _ in range(5)]
    rows = [classes[i] for i in Classed(classes, seed, 4, 8)]
    for held in (rows[:8], rows[8:]):
        assert min(held.count(c) for c in held) >= 2


def test_rows_that_are_drawn_anew_are_asked_for_in_their_pass():
    later = Classed([0, 0, 1, 1, 1, 1], 0, 2, 4, redrawn=True)
    later.set_epoch(2)
    assert sorted(later) == list(range(12, 18))


def test_a_batch_has_room_for_two_of_two_classes():
    assert [by_class(None, b) for b in (4, 6, 8, 16, 64)] == [2, 3, 4, 4, 4]
    assert by_class(5, 10) == 5
    with pytest.raises(ConfigError, match="batch_size=3 cannot hold two rows of a class"):
        by_class(None, 3)
    with pytest.raises(ConfigError, match="per_class=5 leaves room for one class in batch_size=8, "
                                          "and nothing is told apart; give per_class=4"):
        by_class(5, 8)


# -- runs ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return posed("image-embedding", tmp_path_factory.mktemp("shapes"), 4)


def test_a_run_is_gone_on_with_to_the_bit_and_holds_its_promise(shapes, tmp_path):
    base, data, how = shapes
    how = {**QUIET, **how, "validation": 6, "max_steps": 8, "save_steps": 3, "save_total_limit": 9,
           "lr": 1e-2, "dimension": 6}
    whole = burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "a",
                        **{**how, "measure": True, "report": True})
    assert whole.facts["training"]["metric_for_best_model"] == "recall_at_1"
    assert whole.promise.peak_bytes == whole.truth.peak_bytes
    assert "recall_at_1" in (tmp_path / "a" / "report.html").read_text()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    again = burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "b", resume=True,
                        **how)
    for (n, a), (_, b) in zip(whole.tuned.named_parameters(), again.tuned.named_parameters(),
                              strict=True):
        assert torch.equal(a, b), n
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "c" / "checkpoint-3")
    with pytest.raises(FormatError, match="its order is '2 of a class in 4', this run's is '2 of a "
                                          "class in 5'"):
        burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "c", resume=True,
                    **{**how, "batch_size": 5})
    # -- and is asked about pictures
    done = Finished.open(tmp_path / "a")
    assert done.evaluate(str(data), "validation")["tuned"] == pytest.approx(
        whole.metrics["validation"], abs=1e-5)
    pictures = sorted(str(p) for p in data.rglob("*.png"))[:3]
    each = list(done.predict(pictures))
    assert [len(a["embedding"]) for a in each] == [6, 6, 6]
    one, two = (torch.tensor(a["embedding"]) for a in each[:2])
    assert one.norm().item() == pytest.approx(1.0, abs=1e-5)
    near, = done.predict(pictures[:2])
    assert near["cosine"] == pytest.approx(float(one @ two), abs=1e-5)
    assert near["said"] == f"{near['cosine']:.4f}" and each[0]["said"].endswith("(6 numbers)")


def batches_of(monkeypatch):
    from burnish.fit.loop import Trainer

    seen, step = [], Trainer.training_step

    def watched(self, model, inputs, *args, **kw):
        seen.append(inputs["labels"].tolist())
        return step(self, model, inputs, *args, **kw)

    monkeypatch.setattr(Trainer, "training_step", watched)
    return seen


def test_a_recipe_with_a_loss_of_its_own_minimises_that_alone(shapes, tmp_path, monkeypatch):
    """It reads the classes of each batch as it is; the task's loss is told and pulls nothing."""
    from burnish.methods.prompt import vptsp_g

    base, data, how = shapes
    read_, own = [], vptsp_g.anchored

    def watched(e, proxies, labels, *args):
        read_.append(labels.tolist())
        return own(e, proxies, labels, *args)

    monkeypatch.setattr(vptsp_g, "anchored", watched)
    seen = batches_of(monkeypatch)
    run = burnish.fit(str(base), str(data), "vptsp_g(proxies=3, length=2)", output=tmp_path / "a",
                      **{**QUIET, **how, "validation": 6, "max_steps": 4, "logging_steps": 1,
                         "batch_size": 6, "per_class": 3})
    assert all(b.count(c) == 3 for b in seen[:2] for c in b) and read_[-4:] == seen
    assert [h["loss"] for h in run.history if "loss" in h][0] > 0

    made = task_for(read("digits", task="image-embedding"), VIT)
    plain = task_for(made.data, VIT)
    made.taught_by("vptsp_g", None)
    out, y = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
    assert made.loss(out, (y,)).item() == plain.loss(out, (y,)).item() > 0
    there, = torch.autograd.grad(plain.loss(out, (y,)), out)
    gone, = torch.autograd.grad(made.loss(out, (y,)), out)
    assert there.abs().max() > 0 and not gone.any()
    batch = {"pixel_values": torch.zeros(8, 1, 8, 8), "labels": y}
    assert set(made.call(batch, False)[0][0]) == {"pixel_values", "class"}
    assert set(plain.call(batch, False)[0][0]) == set(made.feed(batch)) == {"pixel_values"}


def test_a_run_of_a_recipe_with_its_own_loss_holds_its_promise(shapes, tmp_path):
    base, data, how = shapes
    run = burnish.fit(str(base), str(data), "vptsp_g(proxies=3, length=2)", output=tmp_path / "a",
                      **{**QUIET, **how, "validation": 6, "max_steps": 2, "measure": True})
    assert run.promise.peak_bytes == run.truth.peak_bytes
    done = Finished.open(tmp_path / "a")
    assert done.evaluate(str(data), "validation")["tuned"] == pytest.approx(
        run.metrics["validation"], abs=1e-5)


# -- what is refused -------------------------------------------------------------------------------
def test_a_method_whose_outputs_are_no_classes_is_refused_by_every_task_but_its_own(tmp_path):
    from burnish.core.registry import find, names

    parts = {n: find(n) for n in names(extra=False) if find(n).head_outputs}
    assert "vptsp_g" in parts
    for name, method in parts.items():
        for task, kind in TASKS.items():
            recipe = f"lora(rank=2) + {name}"
            if kind.head_outputs == method.head_outputs:
                assert embedded(task, recipe) == name
            else:
                with pytest.raises(ConfigError, match=f"{name} makes the head's outputs an "
                                   f"embedding, and {task} would read .* take task='image-emb"):
                    embedded(task, recipe)
    assert embedded("image-classification", "lora") is embedded("embedding", None) is None
    with pytest.raises(ConfigError, match="vptsp_g makes the head's outputs an embedding, and "
                                          "image-classification would read its own answers"):
        burnish.fit(VIT, "digits", "vptsp_g(proxies=10)", output=tmp_path / "out", **QUIET)
    assert not list((tmp_path / "out").glob("*"))


def test_it_is_refused_where_streams_boards_and_clients_tell_classes_apart():
    from burnish.board import run as scored
    from burnish.board import task as on_board
    from burnish.continual import harness
    from burnish.federated.run import setting

    for begins in (lambda: scored(on_board("handwriting"), "vptsp_g(proxies=10)"),
                   lambda: harness.run(None, "vptsp_g(proxies=10)"),
                   lambda: setting("vptsp_g(proxies=10)", clients=2)):
        with pytest.raises(ConfigError, match="vptsp_g makes the head's outputs an embedding"):
            begins()


@pytest.mark.parametrize("how, words", [
    ({"loss_type": "ranking"}, "loss_type='ranking' is not one of supcon, triplet"),
    ({"gamma": 0.1}, "gamma=0.1 does nothing: it is of loss_type='triplet', and this is 'supcon'"),
    ({"loss_type": "triplet", "scale": 2.0}, "scale=2.0 does nothing: it is of loss_type='supcon'"),
    ({"scale": 0.0}, "scale=0.0: expected a number above 0"),
    ({"dimension": 1}, "dimension=1: expected 2 or more"),
    ({"per_class": 1}, "per_class=1: expected 2 or more"),
    ({"per_class": 9}, "per_class=9 leaves room for one class in batch_size=16"),
    ({"batch_size": 2}, "batch_size=2 cannot hold two rows of a class"),
    ({"group_by_length": True}, "no batch of image-embedding is filled up"),
    ({"label_smoothing_factor": 0.1}, "image-embedding has no such classes"),
    ({"memory": "1GB", "recipe": None}, "several at once, which no plan divides"),
    ({"recipe": "vptsp_g(proxies=10)", "scale": 2.0}, "scale=2.0 does nothing: vptsp_g minimises"),
    ({"recipe": "vptsp_g(proxies=5)"}, r"vptsp_g tells 5 classes apart and the data have 10: give "
                                       r"vptsp_g\(proxies=10\)"),
    ({"task": "image-classification", "dimension": 8},
     "dimension=8 is a setting of image-embedding")])
def test_what_does_nothing_is_refused_beforehand(tmp_path, how, words):
    how = {"task": "image-embedding", "recipe": "lora(rank=2)", **QUIET, **how}
    with pytest.raises(ConfigError, match=words):
        burnish.fit(VIT, "digits", output=tmp_path / "out", **how)


def test_rows_among_which_nothing_is_near_are_named(shapes):
    base, data, _ = shapes
    made = task_for(read(str(data), task="image-embedding", validation=0), str(base))
    rows = made.data.splits["train"]
    first = [rows["label"][:].index(c) for c in range(3)]
    made.data.splits["validation"] = rows.select(first)
    with pytest.raises(DataError, match="validation: no two of 3 rows are of one class.*another "
                                        "share with validation="):
        made.rows("validation")
    made.data.splits["train"] = rows.select([i for i, c in enumerate(rows["label"][:]) if c == 1])
    with pytest.raises(DataError, match="rows have one label, and nothing is told apart"):
        made.rows("train")


def test_what_reads_probabilities_of_classes_refuses_directions(task):
    from burnish.cli.adapting import _Stream

    with pytest.raises(ConfigError, match="probabilities of classes, and this is image-embedding"):
        _Stream(None, task, "test", 4)


def test_classes_keep_their_shares_where_rows_are_set_aside():
    data = read("digits", task="image-embedding", validation=0.1)
    held = data.splits["validation"]["label"][:]
    assert {held.count(c) for c in range(10)} <= {16, 17, 18, 19, 20}
