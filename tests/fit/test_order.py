"""The order of rows: what stands together, in one process or several, and in a run that goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError, FormatError
from burnish.fit.data import read
from burnish.fit.order import Alike, Shuffled
from burnish.fit.rows import Rows
from burnish.fit.tasks import TASKS, task_for
from burnish.testing.tasks import posed, texts

QUIET = {"quiet": True, "report": False, "measure": False, "validation": 0, "batch_size": 4}


class Long(Rows):
    """Rows of lengths that are told; those of a later pass are a token longer each."""

    def __init__(self, lengths, redrawn=False):
        self.lengths, self.redrawn = lengths, redrawn

    def __len__(self):
        return len(self.lengths)

    def length(self, i):
        turn, i = divmod(i, len(self))
        return self.lengths[i] + turn


def drawn(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 200, (count,), generator=g).tolist()


def padded(lengths, order, batch):
    """Places of all batches that hold no token."""
    some = [[lengths[i] for i in order[k:k + batch]] for k in range(0, len(order), batch)]
    return sum(len(b) * max(b) - sum(b) for b in some)


@pytest.mark.parametrize("count", [3, 37, 400, 2000])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_row_stands_once_in_an_epoch_and_fewer_places_are_filled_up(count, batch):
    lengths = drawn(count)
    alike, plain = Alike(Long(lengths), 7, 8), Shuffled(count, 7)
    seen = []
    for epoch in range(3):
        alike.set_epoch(epoch), plain.set_epoch(epoch)
        order = list(alike)
        assert sorted(order) == list(range(count)) and len(alike) == count
        seen.append(tuple(order))
        least = {400: 0.6, 2000: 0.25}.get(count)             # longer stretches, more alike
        if batch > 1 and least:
            assert padded(lengths, order, batch) < least * padded(lengths, list(plain), batch)
    assert len(set(seen)) == 3 or count == 3


def test_a_stretch_is_fifty_updates_of_the_permutation_sorted():
    lengths, update = drawn(1000), 4
    alike, plain = Alike(Long(lengths), 3, update), Shuffled(1000, 3)
    order, before = list(alike), list(plain)
    for k in range(0, 1000, 200):
        part = order[k:k + 200]
        assert set(part) == set(before[k:k + 200])
        assert [lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True)
    assert Alike(Long(lengths[:30]), 3, update).stretch == 4          # at least four stretches
    assert Alike(Long(lengths[:3]), 3, update).stretch == 4           # and an update in each


def test_rows_that_are_drawn_anew_are_asked_for_in_their_pass_and_by_its_lengths():
    lengths = drawn(40)
    alike = Alike(Long(lengths, redrawn=True), 0, 4)
    alike.set_epoch(2)
    order = list(alike)
    assert sorted(order) == list(range(80, 120))
    plain = Alike(Long(lengths), 0, 4)
    plain.set_epoch(2)
    assert [i - 80 for i in order] == list(plain)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder with a small encoder, and rows of unlike length."""
    folder = tmp_path_factory.mktemp("classes")
    model, tokenizer = texts("text-classification")
    model.save_pretrained(folder / "base"), tokenizer.save_pretrained(folder / "base")
    rows = [{"text": "ab" * (1 + n % 40), "label": "xy"[i % 2]}
            for i, n in enumerate(drawn(48, 1))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def widths(monkeypatch):
    """The (rows, tokens) of every batch that a run reads."""
    from burnish.fit.loop import Trainer

    seen, step = [], Trainer.training_step

    def watched(self, model, inputs, *args, **kw):
        seen.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *args, **kw)

    monkeypatch.setattr(Trainer, "training_step", watched)
    return seen


def test_a_run_reads_batches_of_rows_of_like_length_within_what_was_promised(
        classes, tmp_path, monkeypatch):
    seen = widths(monkeypatch)
    how = {**QUIET, "epochs": 1, "measure": True}
    for n, asked in enumerate((False, True)):
        run = burnish.fit(str(classes / "base"), classes / "rows.jsonl", "lora(rank=2)",
                          output=tmp_path / str(n), group_by_length=asked, **how)
    plain, grouped = seen[:12], seen[12:]
    assert sum(b for b, _ in plain) == sum(b for b, _ in grouped) == 48
    assert sum(b * t for b, t in grouped) < 0.8 * sum(b * t for b, t in plain)
    # the longest rows stand together at last, and that is what was promised
    batch = run.facts["memory"]["simulated"]["batch"]
    assert max(t for _, t in grouped) == max(t for _, t in plain) == int(batch.split()[-1])
    assert run.promise.peak_bytes == run.truth.peak_bytes
    assert run.facts["training"]["train_sampling_strategy"] == "group_by_length"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(classes, tmp_path, accumulation):
    how = {**QUIET, "max_steps": 12, "save_steps": 5, "save_total_limit": 9, "lr": 1e-2,
           "group_by_length": True, "accumulation": accumulation}
    base, data = str(classes / "base"), classes / "rows.jsonl"
    whole = burnish.fit(base, data, "lora(rank=2)", output=tmp_path / "a", **how)
    shutil.copytree(tmp_path / "a" / "checkpoint-5", tmp_path / "b" / "checkpoint-5")
    again = burnish.fit(base, data, "lora(rank=2)", output=tmp_path / "b", resume=True, **how)
    for (n, a), (_, b) in zip(whole.tuned.named_parameters(), again.tuned.named_parameters(),
                              strict=True):
        assert torch.equal(a, b), n
    shutil.copytree(tmp_path / "a" / "checkpoint-5", tmp_path / "c" / "checkpoint-5")
    with pytest.raises(FormatError, match="its order is 'group_by_length', this run's is 'random'"):
        burnish.fit(base, data, "lora(rank=2)", output=tmp_path / "c", resume=True,
                    **{**how, "group_by_length": False})


def test_it_is_refused_where_nothing_is_filled_up_or_rows_are_drawn_each_by_itself(
        classes, tmp_path, glyph_vit):
    with pytest.raises(ConfigError, match="no batch of image-classification is filled up.*text-cl"):
        burnish.fit(glyph_vit, "digits", "lora(rank=2)", output=tmp_path, group_by_length=True)
    with pytest.raises(ConfigError, match="dp draws each by itself"):
        burnish.fit(str(classes / "base"), classes / "rows.jsonl", "dp + lora(rank=2)",
                    output=tmp_path, group_by_length=True, **QUIET)
    with pytest.raises(ConfigError, match="group_by_length=True puts"):
        burnish.fit(glyph_vit, "digits", train_sampling_strategy="sequential", output=tmp_path)
    with pytest.raises(ConfigError, match="group_by_length='perhaps': expected true or false"):
        burnish.fit(glyph_vit, "digits", group_by_length="perhaps", output=tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_says_of_its_rows_whether_they_have_a_length(task, tmp_path):
    base, data, how = posed(task, tmp_path)
    asked = {k: v for k, v in how.items() if k in ("task", "label", "text")}
    model = str(base)
    from burnish.fit.pipelines import usual_task
    from burnish.fit.places import suited

    asked.setdefault("task", usual_task(model))
    found = suited(read(str(data), validation=0, **asked), model,
                   how.get("trust_remote_code", False))
    made = task_for(found, model, trust_remote_code=how.get("trust_remote_code", False),
                    **{k: v for k, v in how.items() if k in TASKS[task].settings})
    made.load(model, how.get("trust_remote_code", False))
    length = type(made.rows("train")).length
    if TASKS[task].unlike:
        assert length is not Rows.length
    else:
        end_to_end = task in ("language-modelling", "masked-language-modelling")
        assert length is Rows.length or end_to_end or task == "object-detection"
