"""burnish touches what it wrote, one writer at a time, and never what it reads (findings 4.1)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import burnish
from burnish.cli import main
from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.formats import claim, peft_files, safe, staged
from burnish.formats.folder import CARD, CONFIG, RUN, TENSORS, read_adapter, write_adapter
from burnish.formats.peft_folder import Lora, PeftFolder

CONF = {"recipe": "lora(rank=8)", "base": {"name": "somewhere"}}


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((64, 8), value), "b": torch.full((8, 64), value)}


def adapter(folder: Path, value: float = 0.0, **kw) -> Path:
    return write_adapter(folder, tensors(value), CONF, **kw)


def peft_folder(folder: Path, value: float = 0.0, base: str = "") -> Path:
    what = PeftFolder(loras={"fc": Lora(torch.full((2, 8), value), torch.full((8, 2), value))},
                      base=base)
    return peft_files.write(folder, what, ["fc"], "a card")


def model_folder(folder: Path, value: float = 0.0) -> Path:
    """What merge writes, by the same way, without a model."""
    with staged.replace(folder, "model") as new:
        safe.save_file(tensors(value), new / "model.safetensors")
        safe.write_json(new / "config.json", {"value": value})
    return folder


def model_value(folder: Path) -> float:
    found = safe.load_file(folder / "model.safetensors")
    value = safe.read_json(folder / "config.json")["value"]
    assert {float(t.unique()) for t in found.values()} == {value}, "half of one and half of another"
    return value


def peft_value(folder: Path) -> float:
    found = peft_files.read(folder).loras["fc"]
    assert float(found.A.unique()) == float(found.B.unique())
    return float(found.A.unique())


def adapter_value(folder: Path) -> float:
    return float(read_adapter(folder)[1]["a"].unique())


KINDS = {"adapter": (adapter, adapter_value), "peft": (peft_folder, peft_value),
         "model": (model_folder, model_value)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def base(tmp_path) -> Path:
    """A model folder that somebody else made."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    safe.save_file(tensors(), folder / "model.safetensors")
    return folder


def tuned(base: Path | str):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model.name_or_path = str(base)
    return burnish.tune(model, "lora(rank=2)", targets="0", head=False)


def verbs(base: Path, made: Path) -> dict:
    """Every verb that writes a folder: output -> what it does."""
    def cli(*argv):
        def call(output):
            code = main([*map(str, argv), "--output", str(output)])
            if code:
                raise ConfigError(f"exit code {code}")
        return call

    return {
        "fit": lambda output: burnish.fit(str(base), "digits", output=output, quiet=True),
        "fit from the shell": cli("fit", "--model", base, "--data", "digits"),
        "save": lambda output: tuned(base).save(output),
        "export_peft": lambda output: burnish.export_peft(tuned(base), output),
        "merge": cli("merge", made, "--base", base),
        "export": cli("export", made, "--base", base),
    }


VERBS = ("fit", "fit from the shell", "save", "export_peft", "merge", "export")


# -- output and input -----------------------------------------------------------------------
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("where", ["itself", "inside", "by a link", "by a loop of dots"])
def test_an_output_that_is_an_input_is_refused_and_the_input_stays(tmp_path, base, verb, where):
    made = adapter(tmp_path / "made")
    output = {"itself": base, "inside": base / "new" / "deep", "by a link": tmp_path / "link",
              "by a loop of dots": tmp_path / "made" / ".." / "base"}[where]
    if where == "by a link":
        output.symlink_to(base, target_is_directory=True)
    before = contents(base)
    with pytest.raises(ConfigError):
        verbs(base, made)[verb](output)
    assert contents(base) == before and not (base / "new").exists()


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_an_adapter_is_not_replaced_by_what_is_made_of_it(tmp_path, base, verb, capsys):
    made = adapter(tmp_path / "runs" / "made")
    before = contents(tmp_path)
    for output in (made, made / "in", made.parent):
        with pytest.raises(ConfigError):
            verbs(base, made)[verb](output)
        assert "adapter" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_data_in_the_output_and_the_output_in_the_data_are_told_apart(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(ConfigError, match="lies inside the data"):
        claim.refuse_overlap(data / "out", [("the data", data)])
    claim.refuse_overlap(data, [("the data", data / "rows.csv")])       # a file beside the rest
    claim.own(data, ["metrics.jsonl"], "adapter")
    (data / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="would be replaced"):
        claim.refuse_overlap(data, [("the data", data / "metrics.jsonl")])
    claim.refuse_overlap(tmp_path / "out", [("the model", "owner/name"), ("the data", None)])


# -- what somebody else wrote ---------------------------------------------------------------
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [CARD, CONFIG, TENSORS, RUN])
def test_a_file_of_somebody_else_is_never_touched(tmp_path, base, verb, name):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("mine")
    with pytest.raises(ConfigError):
        verbs(base, adapter(tmp_path / "made"))[verb](output)
    assert contents(output) == {name: b"mine"}


def test_a_card_that_was_edited_is_somebodys(tmp_path):
    folder = adapter(tmp_path / "a", 1.0)
    (folder / CARD).write_text("# what I found out")
    with pytest.raises(ConfigError, match="README.md was changed since burnish wrote it"):
        adapter(folder, 2.0)
    assert (folder / CARD).read_text() == "# what I found out" and adapter_value(folder) == 1.0
    (folder / CARD).unlink()
    adapter(folder, 2.0)
    assert adapter_value(folder) == 2.0


def test_a_saved_folder_may_hold_other_files_and_keeps_them(tmp_path):
    folder = adapter(tmp_path / "a", 1.0, run={"steps": 3})
    (folder / "notes.txt").write_text("mine")
    adapter(folder, 2.0)
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / RUN).exists()


@pytest.mark.parametrize("kind", ["peft", "model"])
def test_a_whole_folder_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path, kind):
    write, value = KINDS[kind]
    folder = write(tmp_path / "x", 1.0)
    write(folder, 2.0)
    assert value(folder) == 2.0
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes.txt.*did not write"):
        write(folder, 3.0)
    assert value(folder) == 2.0 and (folder / "notes.txt").read_text() == "mine"
    other = adapter(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds an adapter"):
        write(other, 1.0)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_named_like_a_checkpoint_is_not_taken(tmp_path, base):
    from burnish.fit import checkpoint

    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "weights").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="checkpoint-1 was not written by burnish"):
            burnish.fit(str(base), "digits", output=tmp_path / "out", quiet=True, resume=resume,
                        overwrite=not resume)
    assert checkpoint.clear_leftovers(tmp_path / "out") == []
    with pytest.raises(ConfigError), checkpoint.writing(tmp_path / "out" / "checkpoint-1"):
        pass
    with pytest.raises(ConfigError):
        checkpoint.remove(tmp_path / "out" / "checkpoint-1")
    assert contents(tmp_path / "out") == {"checkpoint-1/weights": b"mine"}


def test_a_file_put_into_a_checkpoint_keeps_the_checkpoint(tmp_path):
    from burnish.fit import checkpoint

    for n in (1, 2, 3):
        with checkpoint.writing(tmp_path / f"checkpoint-{n}") as hidden:
            (hidden / "x").write_text("x")
    (tmp_path / "checkpoint-1" / "notes").write_text("mine")
    checkpoint.rotate(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    with pytest.raises(ConfigError, match="notes"):
        checkpoint.remove(tmp_path / "checkpoint-1")


def test_a_pickle_of_the_names_is_not_enough(tmp_path):
    """A mark that is broken or somebody else's owns nothing."""
    for text in ("", "[]", "{", '{"library": "x"}', "[" * 100_000, '{"library":"burnish"}',
                 '{"library":"burnish","kind":3,"wrote":[],"pending":[],"dropped":[]}'):
        (tmp_path / claim.MARK).write_text(text)
        (tmp_path / CARD).write_text("mine")
        with pytest.raises(ConfigError):
            adapter(tmp_path)
        assert (tmp_path / CARD).read_text() == "mine"


# -- one writer at a time -------------------------------------------------------------------
def forked(act) -> int:
    """`act` in a process of its own; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("verb", VERBS)
def test_two_processes_do_not_write_to_one_folder(tmp_path, base, verb):
    output, made = tmp_path / "out", adapter(tmp_path / "made")
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with claim.lock(output):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(BurnishError) as caught:
            verbs(base, made)[verb](output)
        if verb in ("fit", "save", "export_peft"):
            assert f"process {child} on" in str(caught.value)
        assert not output.exists() or contents(output) == {}
    finally:
        os.kill(child, signal.SIGKILL)                  # it cannot let go by itself
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)
    with claim.lock(output):                            # what the dead one held is free
        pass
    assert not [p.name for p in tmp_path.iterdir() if "lock" in p.name]


def test_a_lock_of_another_machine_is_believed(tmp_path):
    left = tmp_path / ".out.burnish-lock"
    left.write_text(json.dumps({"process": 7, "machine": "elsewhere"}))
    with pytest.raises(ConfigError, match="process 7 on elsewhere.*if it is dead, remove"), \
            claim.lock(tmp_path / "out"):
        pass
    left.write_text("no json")
    with claim.lock(tmp_path / "out"):
        pass


def test_a_thread_holds_a_folder_again_and_another_thread_does_not(tmp_path):
    said: list[str] = []

    def other():
        try:
            with claim.lock(tmp_path / "x"):
                said.append("taken")
        except ConfigError as error:
            said.append(str(error))

    with claim.lock(tmp_path / "x"), claim.lock(tmp_path / "." / "x"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in said[0]
    other()
    assert said[1] == "taken"


# -- disks and rights -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch, kind, nth):
    write, value = KINDS[kind]
    folder = write(tmp_path / "x", 1.0)
    before, calls, real = contents(folder), [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BurnishError, match="cannot write .*No space left.*untouched"):
        write(folder, 2.0)
    assert contents(folder) == before and value(folder) == 1.0
    with pytest.raises(BurnishError, match="No space left"):
        write(tmp_path / "new", 2.0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_may_not_be_written_is_said(kind):
    """As a user without rights there, whoever runs the tests."""
    write, value = KINDS[kind]
    place = Path(tempfile.mkdtemp())
    try:
        folder = write(place / "x", 1.0)
        before = contents(folder)
        folder.chmod(0o555)
        place.chmod(0o555)

        def act():
            if os.getuid() == 0:
                os.setuid(65534)
            for goal in (folder, place / "new", folder / CONFIG / "below"):
                with pytest.raises(BurnishError, match="cannot write|is a file"):
                    write(goal, 2.0)
            assert value(folder) == 1.0                 # reading needs no right to write

        assert forked(act) == 0
        assert contents(folder) == before
    finally:
        place.chmod(0o755)
        (place / "x").chmod(0o755)
        shutil.rmtree(place)


# -- killed -----------------------------------------------------------------------------------
def deadly(real, left):
    """A call of the system that kills the process when `left` has come to nothing."""
    def call(*args, **kw):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False], ids=["new", "again"])
def test_killed_at_any_moment_the_old_folder_or_the_new_one_is_whole(tmp_path, kind, first):
    write, value = KINDS[kind]
    folder, seen, moments = tmp_path / "x", set(), 0
    for n in range(1, 200):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if not first:
            write(folder, 1.0)

        def act(n=n):
            left = [n]
            for name in ("replace", "fsync", "unlink", "mkdir", "rmdir", "open"):
                setattr(os, name, deadly(getattr(os, name), left))
            write(folder, 2.0)

        code = forked(act)
        if folder.exists() and contents(folder):
            try:
                seen.add(value(folder))
            except FormatError:
                assert first and code, "the old folder is gone"
        else:
            assert first
        write(folder, 3.0)                              # whatever is left, the next one works
        assert value(folder) == 3.0
        assert {p.name for p in tmp_path.iterdir()} == {"x"}
        assert not (folder / claim.STAGE).exists()
        if code == 0:
            break
        moments += 1
    assert moments > 8 and seen == ({2.0} if first else {1.0, 2.0})


def test_whoever_reads_while_another_writes_gets_one_of_both(tmp_path):
    folder = adapter(tmp_path / "x", 0.0)

    def act():
        for n in range(40):
            adapter(folder, float(n))

    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    reads = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert adapter_value(folder) in range(40)
        reads += 1
    assert reads > 3 and adapter_value(folder) == 39


def test_a_writer_that_ends_while_the_reader_asks_is_no_missing_file(tmp_path, monkeypatch):
    folder = adapter(tmp_path / "x", 1.0)
    name = "adapter_model.safetensors"
    (folder / claim.STAGE).mkdir()
    (folder / name).rename(folder / claim.STAGE / name)
    mark = claim.Mark.of(folder)
    mark.pending = [name]
    mark.write(folder)
    asked, of = [], claim.Mark.of

    def read():
        if not asked:
            raise FormatError("no such file")
        return adapter_value(folder)

    def ends_first(where):
        if not asked:
            asked.append(1)
            staged.finish(folder)
        return of(where)

    monkeypatch.setattr(claim.Mark, "of", staticmethod(ends_first))
    assert staged.steady(folder, read) == 1.0


# -- names ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two words", "größe 漢字", "a\nb", "-x", "..x", "x" * 250,
                                  "é" * 100, "a'b\"c", "%s{}", "~"])
def test_every_name_a_folder_may_have_does(tmp_path, kind, name):
    write, value = KINDS[kind]
    for n in (1.0, 2.0):
        write(tmp_path / "up" / name, n)
        assert value(tmp_path / "up" / name) == n
    assert [p.name for p in (tmp_path / "up").iterdir()] == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_names_no_folder_may_have_are_said_in_one_line(tmp_path, kind):
    write, _ = KINDS[kind]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    for name in ("x" * 300, "loop/x", "loop", "file", "file/x", "a" + "/b" * 3000):
        with pytest.raises(BurnishError) as caught:
            write(tmp_path / name, 1.0)
        assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_differs_in_case_alone_is_not_written_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "readme.MD").write_text("mine")
    with pytest.raises(ConfigError, match="readme.MD"):
        adapter(tmp_path / "a")
