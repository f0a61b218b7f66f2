"""The board: equal budgets, runs that are documents, ranks and what they tell apart."""

from __future__ import annotations

import json
import math

import pytest
import torch

from burnish import tune
from burnish.board import Record, Records, budgets, page, running, tasks
from burnish.board.page import frontier, percent, points, ranking
from burnish.core.errors import ConfigError, FormatError, RecipeError
from burnish.core.recipe import parse


@pytest.fixture(scope="module")
def cells():
    return tasks.task("cells")


def count(task, recipe):
    """Trained numbers, of a real tuned model."""
    tuned = tune(task.fresh(), recipe, calibration=task.epoch("train", 0)[:2], **task.how)
    return sum(p.numel() for p in tuned.parameters() if p.requires_grad)


# -- tasks ---------------------------------------------------------------------------------------
def test_rows_of_a_task_are_in_one_split_only(cells):
    seen = [tuple(x.tolist()) for split in cells.splits.values() for x, _ in split]
    assert len(seen) == len(set(seen)) > 200


def test_every_start_is_the_same_and_its_own(cells):
    a, b = cells.fresh(), cells.fresh()
    with torch.no_grad():
        next(a.parameters()).add_(1)
    assert not torch.equal(next(a.parameters()), next(b.parameters()))
    assert torch.equal(next(b.parameters()), next(cells.fresh().parameters()))


def test_a_score_is_the_share_of_right_answers(cells):
    model = cells.fresh().train()
    x, y = (torch.stack(list(v)) for v in zip(*cells.splits["test"], strict=True))
    right = (model.eval()(x).argmax(-1) == y).float().mean().item()
    model.train()
    assert cells.score(model, "test") == pytest.approx(right)
    assert model.training


@pytest.mark.parametrize("name", ["handwriting", "text", "cells", "patients"])
def test_the_first_rows_of_every_task_are_a_batch(name):
    made = tasks.task(name)
    batch = made.first(3)
    sizes = {v.shape[0] for v in (batch if isinstance(batch, tuple) else batch.values())}
    assert sizes == {3}
    assert budgets.trained(made, "full") > 0
    assert made.kind == tasks.KINDS[name] and set(tasks.KINDS) == set(tasks.TASKS)


def test_a_task_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cells'"):
        tasks.task("cell")


# -- budgets -------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["lora", "fourierft", "shira"])
def test_equal_parameters_take_the_largest_size_that_trains_no_more(cells, recipe):
    most = count(cells, "lora(rank=8)")
    share = budgets.share(cells, recipe, "parameters")
    assert share.limit == most and count(cells, share.recipe) <= most
    if recipe == "lora":
        assert count(cells, share.recipe) == most
    if recipe == "fourierft":                       # a coefficient of each of three matrices more
        assert count(cells, share.recipe) > most - 3


def test_what_has_no_size_runs_as_it_is_or_not_at_all(cells):
    assert budgets.share(cells, "bitfit", "parameters").recipe == "bitfit"
    with pytest.raises(RecipeError, match="full trains 6274 numbers, has no setting"):
        budgets.share(cells, "full", "parameters")
    with pytest.raises(RecipeError, match="no attention or MLP to stand behind"):
        budgets.share(cells, "houlsby", "parameters")


def test_the_last_of_those_that_fit_is_found():
    for last in range(9):
        assert budgets._largest(range(1, 9), lambda v, last=last: v <= last) == (last or None)


def test_sizes_that_a_model_refuses_are_passed_over(cells, monkeypatch):
    """Only powers of two are taken, the largest of which trains too much."""
    def trained(task, recipe):
        rank = parse(recipe)[0].rank
        if rank & (rank - 1):
            raise RecipeError("does not divide")
        return 10 * rank

    monkeypatch.setattr(budgets, "trained", trained)
    assert budgets.sized(cells, "lora", 300) == "lora(rank=16)"
    with pytest.raises(RecipeError, match="no rank of it trains 5 numbers or fewer"):
        budgets.sized(cells, "lora", 5)


def test_equal_peak_halves_batches_until_a_step_takes_no_more(cells):
    most = budgets.peak(cells, "lora(rank=8)", cells.batch)
    share = budgets.share(cells, "lora(rank=8)", "peak")
    assert (share.batch, share.limit) == (cells.batch, most)
    try:
        full = budgets.share(cells, "full", "peak")
    except RecipeError as e:                        # weights of its moments alone may be more
        assert "on one sample" in str(e)
        assert budgets.peak(cells, "full", 1) > most
    else:
        assert budgets.peak(cells, "full", full.batch) <= most < budgets.peak(
            cells, "full", 2 * full.batch)


def test_equal_time_gives_a_slower_recipe_fewer_updates(cells, monkeypatch):
    monkeypatch.setattr(budgets, "seconds", lambda task, recipe: (0.3, 0.1))
    share = budgets.share(cells, "dora", "time")
    assert share.updates == round(cells.updates / 3)
    assert share.limit == pytest.approx(0.1 * cells.updates)


def test_a_budget_that_is_none_is_refused(cells):
    with pytest.raises(ConfigError, match="expected one of as_is, parameters, peak, time"):
        budgets.share(cells, "lora", "memory")


# -- running -------------------------------------------------------------------------------------
def test_a_smaller_batch_makes_the_same_update(cells):
    """Gradients of the parts, weighed by their rows, are those of the whole (a last part is short).
    """
    batch, ends = cells.epoch("train", 0)[0], []
    for samples in (16, 5):
        torch.manual_seed(0)
        tuned = tune(cells.fresh().double().train(), "full", **cells.how)
        optimizer = tuned.optimizer(lr=1e-2, weight_decay=0.0)
        double = batch[0].double(), batch[1]
        running.update(tuned, optimizer, double, cells, samples)
        ends.append(torch.cat([p.detach().flatten() for p in tuned.model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_there_are_as_many_batches_as_updates_and_epochs_differ(cells):
    own = list(running.batches(cells, 7, seed=3))
    assert len(own) == 7
    assert not torch.equal(own[0][0], own[4][0])    # four a epoch
    assert torch.equal(own[0][0], next(running.batches(cells, 1, seed=3))[0])


def search(cells, scores, tried=(0, 1, -1)):
    """A search in which a power comes to scores[power], with what was tried."""
    from dataclasses import replace

    found = running.Search(replace(cells, choosing=1, tried=tried),
                           budgets.Share("lora", 16, 1), None)
    found.end = lambda power, seed: running.End(scores.get(power, 0.0))   # type: ignore
    return found.best(), set(found.tried)


def test_rates_are_tried_until_none_beside_the_best_is_better(cells):
    assert search(cells, {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.65}) == (2, {-1, 0, 1, 2, 3})
    assert search(cells, {0: 0.5, -1: 0.6, -2: 0.5}) == (-1, {-2, -1, 0, 1})
    still = dict.fromkeys(range(-4, 5), 0.7)
    assert search(cells, still | {2: 0.9}) == (2, {-2, -1, 0, 1, 2, 3})        # nothing moved
    assert search(cells, still | {-3: 0.9}) == (-3, {-4, -3, -2, -1, 0, 1, 2, 3})
    assert search(cells, still)[1] == set(still)
    assert search(cells, {4: 1.0}, tried=(4,)) == (4, {3, 4})                  # no wider


def test_a_recipe_that_diverges_has_no_right_answer(cells, monkeypatch):
    from burnish.core.errors import BurnishError

    def diverges(*_):
        raise BurnishError("the loss is not finite (nan)")

    monkeypatch.setattr(running, "train", diverges)
    found = running.Search(cells, budgets.Share("lora", 16, 1), None)
    assert found.end(0, 0).validation == 0.0


def test_a_run_says_all_there_is_to_say(cells):
    from dataclasses import replace

    said: list[str] = []
    quick = replace(cells, epochs=1, choosing=1, tried=(2,))
    found = running.run(quick, "lora(rank=2)", "as_is", 2, said.append)
    assert len(found.scores) == 2 and all(0 <= s <= 1 for s in found.scores)
    assert found.trained == count(cells, "lora(rank=2)")
    assert found.peak == found.promised > 0
    assert found.updates == 4 and found.batch == 16 and found.step_s > 0
    assert found.made["torch"] == torch.__version__ and found.date and said
    best = float(max(found.tried, key=found.tried.__getitem__))
    assert found.rate == pytest.approx(best, rel=0.01)


# -- records -------------------------------------------------------------------------------------
def made(recipe, task, *scores, budget="as_is", peak=100, date="2026-01-01", **more):
    return Record(recipe, task, budget, recipe, scores=list(scores), peak=peak, trained=10,
                  step_s=0.1, date=date, **more)


def test_a_document_is_read_as_it_was_written(tmp_path):
    first = made("lora(rank=8)", "text", 0.5, 0.6, tried={"0.003": 0.5}, limit=7)
    Records.write(tmp_path, first)
    (tmp_path / "others.jsonl").write_text(json.dumps(made("full", "text", 0.4).to_dict()) + "\n\n")
    (tmp_path / "notes.txt").write_text("not a run")
    read = Records.read(tmp_path)
    assert len(read) == 2 and first in list(read)
    assert read.get("full", "text", "as_is").scores == [0.4]
    assert read.get("full", "cells", "as_is") is None
    assert read.get("lora( rank = 8 )", "text", "as_is") == first      # however it is written
    assert len(Records.read(tmp_path / "nowhere")) == 0


def test_of_two_documents_of_a_run_the_newer_stands():
    old, new = made("lora", "text", 0.1, date="2026-01-01"), made("lora", "text", 0.2,
                                                                  date="2026-01-02")
    for order in ((old, new), (new, old)):
        assert next(iter(Records(order))).scores == [0.2]


def test_recipes_have_file_names_of_their_own():
    names = {made(r, t, 0.1, budget=b).file for r in ("lora(rank=8)", "lora(rank=16)", "nf4 + lora")
             for t in ("text", "cells") for b in ("as_is", "peak")}
    assert len(names) == 12 and all("/" not in n and " " not in n for n in names)
    same = {made(r, "text", 0.1).file for r in ("lora(rank=2)", "lora( rank = 2 )")}
    assert len(same) == 1
    signs = {made(f"fourierft(alpha={a})", "text", 0.1).file for a in (1.0, -1.0)}
    assert len(signs) == 2
    assert len(made(" + ".join(["lora(rank=2)"] * 40), "text", 0.1).file) < 120


@pytest.mark.parametrize(("text", "why"), [
    ("{", "bad.json"), ("[1]", "is an object"), ('{"recipe": "lora"}', "task is to be a text"),
    ('{"recipe": "a", "task": "b", "budget": "c"}', "neither scores nor why"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1.5]}', "shares from 0 to 1"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [true]}', "shares from 0 to 1"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1], "peak": -1}', "peak=-1"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1], "made": 3}', "made is to be"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1], "colour": 3}', "no 'colour'"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1], "rate": NaN}', "finite"),
    ('{"recipe": "a", "task": "b", "budget": "c", "scores": [1], "tried": {"1": "x"}}', "tried")])
def test_what_is_no_run_is_named_by_file(tmp_path, text, why):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(FormatError, match=why) as e:
        Records.read(tmp_path)
    assert "bad.json" in str(e.value)


def test_a_line_that_is_no_run_is_named_by_number(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(made("a", "text", 0.1).to_dict()) + "\n{}\n")
    with pytest.raises(FormatError, match="line 2"):
        Records.read(tmp_path)


# -- the page ------------------------------------------------------------------------------------
def test_ranks_are_means_over_tasks_and_equal_scores_share_theirs():
    found = [made("a", "text", 0.9), made("b", "text", 0.9), made("c", "text", 0.1),
             made("a", "cells", 0.5), made("b", "cells", 0.7), made("c", "cells", 0.6),
             made("d", "cells", 0.9)]                                   # d: not on every task
    assert ranking(found).ranks == {"b": 1.25, "a": 2.25, "c": 2.5}


def test_the_critical_difference_is_that_of_the_tables():
    """Demsar 2006, table 5a: q_0.05 is 2.343 for three and 2.728 for five classifiers; his example
    (four on fourteen data sets) has CD = 1.25."""
    names = list(tasks.TASKS)
    for k, q in ((3, 2.343), (5, 2.728)):
        found = [made(f"r{i}", t, 0.1 * i + 0.01 * j)
                 for i in range(k) for j, t in enumerate(names)]
        p, apart = ranking(found).differ()
        assert apart == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * len(names))),
                                                abs=2e-3)
        assert p < 0.01                        # the same order on six tasks


def test_what_cannot_be_told_apart_is_said():
    equal = ranking([made(r, t, 0.5) for r in "abc" for t in ("text", "cells")])
    assert equal.differ()[0] == 1.0 and set(equal.ranks.values()) == {2.0}
    assert ranking([made("a", "text", 0.5), made("b", "text", 0.6)]).differ() is None


def test_the_frontier_is_what_nothing_beats_in_both():
    found = [made("lora", "text", 0.8, peak=100), made("full", "text", 0.9, peak=300),
             made("probe", "text", 0.5, peak=40), made("poor", "text", 0.7, peak=200),
             made("twin", "text", 0.8, peak=100)]
    assert [(n, p) for n, p, _ in frontier(found)] == \
        [("probe", 0.4), ("lora", 1.0), ("twin", 1.0), ("full", 3.0)]
    assert len(points(found)) == 5
    assert points([made("full", "text", 0.9)]) == []                    # nothing to hold it against


def test_the_page_has_a_section_for_each_budget_and_the_refused_by_name():
    records = Records([made(r, t, s, s + 0.02, budget=b) for b in ("as_is", "time")
                       for r, s in (("lora", 0.8), ("full", 0.7), ("bitfit", 0.6))
                       for t in ("text", "cells")]
                      + [Record("vpt", "cells", "as_is", refused="no blocks")])
    text = page(records)
    assert text.count("\n## ") == 2 and "## Equal time" in text and "## Equal peak" not in text
    rows = [x for x in text.splitlines() if x.startswith("| `")]
    assert [x.split("`")[1] for x in rows[:3]] == ["lora", "full", "bitfit"]
    assert "81.0 ± 1.4" in rows[0] and "- `vpt` on cells: no blocks" in text
    with pytest.raises(ConfigError, match="no run here has scores"):
        page(Records([Record("vpt", "cells", "as_is", refused="no blocks")]))


def test_percent_has_no_deviation_of_one_seed():
    assert percent([0.5]) == "50.0" and percent([]) == ""
