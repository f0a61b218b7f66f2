"""Runs: folders, each with what was asked, a process of ``burnish fit``, and what it left.

    ID/asked.json     model, data, recipe and settings as they were asked for, and the promise
    ID/fit.json       the configuration that ``burnish fit`` was started with
    ID/log.txt        what it printed
    ID/process.json   its number;  ID/ended.json: its exit code
    ID/alive          locked by the system while the process lives, whatever becomes of the server
    ID/data/          what the browser uploaded
    ID/out/           the run's own folder: checkpoints, metrics.jsonl, adapter, report

The server keeps nothing in memory that is not in these files.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError
from .files import read_json, write_json
from .places import ID, Missing, Places
from .settings import known, told

ASKED, CONFIG, LOG = "asked.json", "fit.json", "log.txt"
PROCESS, ENDED, ALIVE, OUT = "process.json", "ended.json", "alive", "out"

#: columns and splits by their names, as they are asked about
READING = ("task", "text", "label", "image", "audio", "prompt", "completion", "split")
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
#: bytes of the log that are looked through for its last line, and that the page gets at first
TAIL = 1 << 14


def environment() -> dict[str, str]:
    """For a process that stands in another folder: paths of modules stay what they were."""
    own = Path(__file__).resolve().parents[2]
    paths = [str(own), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(
        os.pathsep) if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PYTHONUNBUFFERED": "1"}


@dataclass
class Runs:
    """The runs of one folder. trust: was code that comes with models allowed at the start?"""

    places: Places
    trust: bool = False
    #: what is started with a run's folder and the handle of its lock
    command: Sequence[str] = (sys.executable, "-m", "burnish.ui.child")
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)
    #: who begins a run and who stops one see each other's files whole
    _turn: threading.RLock = field(default_factory=threading.RLock, repr=False)

    # -- folders -------------------------------------------------------------------------------
    def new(self) -> str:
        """An empty folder for an upload, a run, or both."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        self.places.runs.mkdir(parents=True, exist_ok=True)
        (self.places.runs / name).mkdir()
        return name

    def folder(self, name: str) -> Path:
        """Of a run that was asked for."""
        found = self.places.run(name)
        if not (found / ASKED).is_file():
            raise Missing("no such run")
        return found

    def drop(self, name: str) -> None:
        """An upload that no run was made of is removed."""
        folder = self.places.run(name)
        if folder.is_symlink() or not folder.is_dir() or (folder / ASKED).exists():
            raise Missing("no such upload")
        shutil.rmtree(folder)

    def all(self) -> list[dict[str, Any]]:
        """Every run, the newest first."""
        if not self.places.runs.is_dir():
            return []
        names = sorted((p.name for p in self.places.runs.iterdir() if ID.fullmatch(p.name)
                        and (p / ASKED).is_file()), reverse=True)
        return [self.state(n) for n in names]

    # -- the process ---------------------------------------------------------------------------
    def start(self, asked: Mapping[str, Any]) -> str:
        """A new run of what the page asked for. Raises ConfigError and Refused."""
        wanted = self.checked(asked)
        upload = str(asked.get("data", "")).partition(":")[2].partition("/")[0] \
            if str(asked.get("data", "")).startswith("upload:") else ""
        what = {**{k: asked[k] for k in ("model", "data", "recipe") if k in asked},
                "title": _title(asked), "settings": wanted, "promise": _promise(asked),
                "created": time.time()}
        name = upload or self.new()
        try:
            write_json(self.places.run(name) / ASKED, what, new=True)
        except FileExistsError:                      # the upload is another run's already
            name, upload = self.new(), ""
            write_json(self.places.run(name) / ASKED, what)
        folder = self.places.run(name)
        try:
            self._begin(folder, {**wanted, "output": str(folder / OUT)})
        except BaseException:                        # what never began is no run; an upload stays
            (folder / ASKED).unlink(missing_ok=True)
            if not upload:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return name

    def checked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of ``burnish fit``, of what is known and of the kind it should be."""
        wanted: dict[str, Any] = {"model": self.places.named(asked.get("model")),
                                  "data": self.places.named(asked.get("data"))}
        for key in ("recipe", "memory"):
            value = asked.get(key)
            if value is not None:
                if not isinstance(value, str | int) or len(str(value)) > 2000:
                    raise ConfigError(f"{key} is text such as "
                                      f"{'lora(rank=8)' if key == 'recipe' else '8GB'!r}")
                wanted[key] = value
        for key in ("how", "settings"):
            if not isinstance(asked.get(key) or {}, dict):
                raise ConfigError(f"{key}: expected an object")
        for key, value in (asked.get("how") or {}).items():
            if key not in READING or not isinstance(value, str) or len(value) > 200:
                raise ConfigError(f"{key!r} is no way to read columns; there are "
                                  f"{', '.join(READING)}")
            wanted[key] = value
        wanted |= told(asked.get("settings") or {})
        if self.trust:
            wanted["trust_remote_code"] = True
        return wanted

    def _begin(self, folder: Path, config: Mapping[str, Any]) -> None:
        with self._turn:                             # nobody reads the number of an earlier process
            self._begun(folder, config)

    def _begun(self, folder: Path, config: Mapping[str, Any]) -> None:
        handle = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            end = time.monotonic() + 1.0                # others may be looking whether it lives
            while not _locked(handle):
                if time.monotonic() > end:
                    raise ConfigError("this run is going on already")
                time.sleep(0.02)
            write_json(folder / CONFIG, dict(config))
            for name in (PROCESS, ENDED):
                (folder / name).unlink(missing_ok=True)
            try:
                self._started.append(subprocess.Popen(
                    [*self.command, str(folder), str(handle), str(self.places.root)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    cwd=folder, env=environment(), pass_fds=(handle,), start_new_session=True))
            except OSError as e:
                raise BurnishError(f"cannot start a process: {e.strerror or e}") from None
        finally:
            os.close(handle)

    def resume(self, name: str) -> None:
        """Goes on from the newest whole checkpoint, or from the beginning where there is none."""
        folder = self.folder(name)
        if self.alive(folder):
            raise ConfigError("this run is going on already")
        asked = read_json(folder / ASKED)
        config = dict(asked["settings"])
        # the root may be another, or lie elsewhere, since
        config |= {k: self.places.named(asked[k]) for k in ("model", "data")}
        config.pop("trust_remote_code", None)
        if self.trust:
            config["trust_remote_code"] = True
        self._begin(folder, {**config, "output": str(folder / OUT), "resume": True})

    def stop(self, name: str, wait: float = 5.0) -> None:
        """As Ctrl-C: after the current step, with a whole checkpoint; a second time, at once."""
        folder = self.folder(name)
        end = time.monotonic() + wait
        while self.alive(folder):
            with self._turn:
                found = read_json(folder / PROCESS)
                if found and self.alive(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(found["pid"]), signal.SIGINT)
                    write_json(folder / PROCESS, {**found, "stopping": time.time()})
                    return
            if time.monotonic() > end:
                raise BurnishError("the run is starting and cannot be stopped yet; try again")
            time.sleep(0.05)                     # it has not written its number yet
        raise ConfigError("this run is not going on")

    def alive(self, folder: Path) -> bool:
        """Does the process live? The system's lock says so, whoever started it."""
        with self._turn:                             # nobody stays unburied
            self._started[:] = [p for p in self._started if p.poll() is None]
        try:
            handle = os.open(folder / ALIVE, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _locked(handle, shared=True)
        finally:
            os.close(handle)

    # -- what is told of it --------------------------------------------------------------------
    def state(self, name: str) -> dict[str, Any]:
        """What a run is doing, for the list and the page."""
        folder = self.folder(name)
        asked, out = read_json(folder / ASKED), folder / OUT
        alive = self.alive(folder)
        process, ended = read_json(folder / PROCESS), read_json(folder / ENDED)
        facts = read_json(out / "run.json") if not alive else {}
        settings = asked.get("settings", {})
        checkpoints = sorted(int(m[1]) for p in _listed(out) if (m := _CHECKPOINT.fullmatch(p)))
        state, why = "running", ""
        if not alive:
            if not ended and _changed(out / "run.json") < (process.get("started") or math.inf):
                facts = {}                           # of the run that this one went on from
            state, why = _outcome(facts, ended, folder / LOG)
        elif process.get("stopping"):
            state = "stopping"
        memory, about = facts.get("memory") or {}, facts.get("data") or {}
        return {
            "id": name, "state": state, "why": why, "created": asked.get("created"),
            "started": process.get("started"), "ended": ended.get("time"),
            **{k: asked.get(k) for k in ("title", "model", "data", "recipe", "promise")},
            "settings": {k: settings[k] for k in ("memory", *known(), *READING)
                         if k in settings},
            "checkpoint": checkpoints[-1] if checkpoints else None,
            "report": (out / "report.html").is_file() and bool(facts),
            "adapter": (out / "adapter_model.safetensors").is_file() and bool(facts),
            "task": about.get("task"), "pair": bool((about.get("roles") or {}).get("pair")),
            "metrics": facts.get("metrics"),
            "best": facts.get("best"), "measured": _peak(memory.get("measured")),
            "promised": _peak(memory.get("simulated")),
            "process": _resident(process.get("pid")) if alive else None}

    def watch(self, name: str) -> Watch:
        return Watch(self, name)


def _outcome(facts: Mapping[str, Any], ended: Mapping[str, Any], log: Path) -> tuple[str, str]:
    if facts and ended.get("code", 0) == 0:         # (or who should have said it was killed)
        return "finished", ""
    code = ended.get("code")
    last = _last_line(log)
    if code == 130 or code == -int(signal.SIGINT):
        return "stopped", last
    return "failed", last or "the process ended without a word" + (
        f" (exit code {code})" if code is not None else "")


@dataclass
class Watch:
    """What is new in a run's files since one looked last."""

    runs: Runs
    name: str
    _grown: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _log: int = 0
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    _state: str = ""

    def news(self) -> Iterator[tuple[str, Any]]:
        """(kind, value): ``reset`` with what begins anew; ``row``, ``answers``, ``log``, ``run``"""
        folder = self.runs.folder(self.name)
        # the state first: what it leaves behind is then read to its end
        state = self.runs.state(self.name)
        yield from self._lines(folder / OUT / "metrics.jsonl", "row")
        yield from self._lines(folder / OUT / "answers.jsonl", "answers")
        yield from self._words(folder / LOG)
        text = json.dumps(state, sort_keys=True)
        if text != self._state:
            self._state = text
            yield "run", state

    @property
    def over(self) -> bool:
        return bool(self._state) and json.loads(self._state)["state"] not in (
            "running", "stopping")

    def _lines(self, path: Path, kind: str) -> Iterator[tuple[str, Any]]:
        """Whole lines that are new, as `kind`; first ``reset`` where the file was written anew."""
        try:
            with path.open("rb") as f:
                found = os.fstat(f.fileno())
                device, inode, at = self._grown.get(kind, (0, 0, 0))
                if (found.st_dev, found.st_ino) != (device, inode) or found.st_size < at:
                    at = 0
                    yield "reset", kind
                f.seek(at)
                new = f.read()
        except FileNotFoundError:
            return
        whole, end, _ = new.rpartition(b"\n")            # a line that is being written waits
        self._grown[kind] = found.st_dev, found.st_ino, at + len(whole) + len(end)
        for text in whole.splitlines():
            with contextlib.suppress(ValueError):
                yield kind, json.loads(text)

    def _words(self, path: Path) -> Iterator[tuple[str, Any]]:
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                if not self._log and size > TAIL:
                    self._log = size - TAIL
                f.seek(self._log)
                new = f.read(1 << 20)
        except FileNotFoundError:
            return
        if new:
            self._log += len(new)
            yield "log", self._decoder.decode(new)   # a letter may come in two pieces


# -- small things --------------------------------------------------------------------------------
def _locked(handle: int, shared: bool = False) -> bool:
    """Takes the lock of an open file; False when another process holds it."""
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("burnish: ")[:2000] if said else ""


def _peak(report: Any) -> dict[str, Any] | None:
    return {"peak": report["peak_bytes"], "by": report["by_category"]} if report else None


def _resident(pid: Any) -> dict[str, int] | None:
    """Bytes that a process has in memory, and had at most (Linux)."""
    try:
        with open(f"/proc/{int(pid)}/status", encoding="ascii") as f:
            fields = dict(line.split(":", 1) for line in f)
        return {"now": int(fields["VmRSS"].split()[0]) * 1024,
                "peak": int(fields["VmHWM"].split()[0]) * 1024}
    except (OSError, TypeError, ValueError, KeyError):
        return None


def _title(asked: Mapping[str, Any]) -> str:
    model, data = (str(asked.get(k, "")).partition(":")[2].rstrip("/") for k in ("model", "data"))
    return f"{model.rpartition('/')[2]} on {data.rpartition('/')[2]}"[:200]


def _promise(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the plan said of the recipe, as numbers and nothing else."""
    given = asked.get("promise")
    if not isinstance(given, dict) or not isinstance(given.get("by"), dict):
        return None
    by = {str(k)[:40]: int(v) for k, v in list(given["by"].items())[:12] if _number(v)}
    peak = given.get("peak")
    return {"peak": int(peak) if _number(peak) else 0, "by": by}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
