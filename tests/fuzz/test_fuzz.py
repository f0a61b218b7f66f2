"""Damaged files, and not one that gets a foreign exception, a hang or a heap of memory.

Seeded and short in the suite; ``make fuzz`` goes on for as long as one likes, from another seed
each time (``BURNISH_FUZZ_SECONDS``, ``BURNISH_FUZZ_SEED``). A failure names its seed.
(findings 4.5, 4.6)
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from burnish.core.errors import BurnishError

SECONDS = float(os.environ.get("BURNISH_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("BURNISH_FUZZ_SEED", str(int(time.time())) if SECONDS else "0"))
#: inputs per reader in the suite, seconds one may take, and how far the process may grow for one
INPUTS, LIMIT, GROWTH = 40, 20, 256 << 20


def part(name: str):
    """A file beside this one (tests are no package)."""
    spec = importlib.util.spec_from_file_location(
        f"fuzz_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


mutate, readers = part("mutate"), part("readers")


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def within(seconds: float):
    def ring(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damaged(draw: random.Random, place: Path) -> str:
    """Changes one file below `place`; returns what it did."""
    files = sorted(p for p in place.rglob("*") if p.is_file())
    file = draw.choice(files)
    kind = draw.randrange(12)
    raw = file.read_bytes()
    if kind == 0:
        file.unlink()
        {
            0: lambda: None,
            1: file.mkdir,
            2: lambda: os.mkfifo(file),
            3: lambda: file.symlink_to(file),
        }[draw.randrange(4)]()
        return f"{file.name} gone"
    if file.suffix == ".json" and kind < 9:
        file.write_text(mutate.tree(draw, raw.decode()), encoding="utf-8", errors="surrogatepass")
    elif file.suffix == ".safetensors" and kind < 6:
        size = int.from_bytes(raw[:8], "little")
        with contextlib.suppress(ValueError, RecursionError):
            text = mutate.tree(draw, raw[8 : 8 + size].decode()).encode("utf-8", "surrogatepass")
            file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    else:
        file.write_bytes(mutate.data(draw, raw))
    return file.name


def one(name: str, seed: str, source: Path, place: Path) -> str | None:
    """One damaged input to one reader; what went wrong, or None."""
    reader, draw = readers.READERS[name], random.Random(f"{name} {seed}")
    if reader.texts:
        given = mutate.words(draw, draw.choice(reader.texts))
        what = ascii(given)[:200]
    else:
        given = readers.fresh(source, place)
        what = damaged(draw, place)
    before, began = largest(), time.perf_counter()
    try:
        with (
            within(LIMIT),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            reader.read(given)
    except BurnishError as error:
        if not str(error).strip():
            return f"{name}, seed {seed} ({what}): an error without words"
    except TooSlow:
        return f"{name}, seed {seed} ({what}): took more than {LIMIT} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        at = error.__traceback__
        while at.tb_next is not None:
            at = at.tb_next
        return (
            f"{name}, seed {seed} ({what}): {type(error).__name__}: {ascii(str(error))[:160]} at "
            f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        )
    grown = largest() - before
    if grown > GROWTH:
        return (
            f"{name}, seed {seed} ({what}): the process grew by {grown >> 20} MiB in "
            f"{time.perf_counter() - began:.1f} s"
        )
    return None


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", readers.READERS)
def test_a_sound_input_is_read(name, tmp_path):
    reader = readers.READERS[name]
    if reader.texts:
        for text in reader.texts:
            reader.read(text)
    else:
        (tmp_path / "x").mkdir()
        reader.make(tmp_path / "x")
        reader.read(tmp_path / "x")


@pytest.mark.parametrize("name", readers.READERS)
def test_nothing_foreign_comes_out_of_a_reader(name, tmp_path):
    source = tmp_path / "sound"
    source.mkdir()
    if readers.READERS[name].make:
        readers.READERS[name].make(source)
    ends = time.monotonic() + SECONDS / len(readers.READERS)
    failures, n = [], 0
    while (time.monotonic() < ends) if SECONDS else (n < INPUTS):
        if said := one(name, f"{SEED}.{n}", source, tmp_path / "work"):
            failures.append(said)
        n += 1
    if SECONDS:
        print(f"{name}: {n} inputs from seed {SEED}, {len(failures)} failures")
    assert not failures, "\n".join(failures[:20])


def test_the_fuzzer_finds_what_is_there(tmp_path, monkeypatch):
    """A reader that lets things through is noticed: an exception, a hang, a heap."""

    def bad(text):
        if "x" * 2000 in text:
            json.loads("{")
        if "(.*)*" in text:
            while True:
                pass

    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 0.2)
    monkeypatch.setitem(readers.READERS, "bad", readers.Reader(None, bad, ("lora",)))
    said = " ".join(filter(None, (one("bad", str(n), tmp_path, tmp_path) for n in range(300))))
    assert "JSONDecodeError" in said and "took more than" in said
    heap: list[bytes] = []
    monkeypatch.setitem(
        readers.READERS,
        "bad",
        readers.Reader(None, lambda t: heap.append(b"x" * (2 * GROWTH + largest())), ("lora",)),
    )
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 60)
    assert "grew by" in one("bad", "0", tmp_path, tmp_path)
