"""Tests against a changed copy of the package, each run in a fork of a process that has paid for
the imports of everything else."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

STAYS = tuple(f"burnish.{floor}" for floor in ("core", "blocks", "engine", "memory"))
MEMORY = 12 << 30                                   # of a run's address space, bytes


class Runner:
    """The tests of one file: those that killed most run first, quick ones before slow ones."""

    def __init__(self, root: Path, package: Path, tests: tuple[str, ...], cells: tuple[str, ...],
                 seconds: int | None = None, ready: bool = False):
        self.root, self.package, self.seconds, self.ready = root, package, seconds, ready
        self.tests, self.cells = tests, cells
        self.kills: Counter[str] = Counter()
        self.cost: dict[str, float] = {}
        self.shown: dict[str, str] = {}             # check of the suite -> model that shows it

    def prepare(self) -> str | None:
        """One run without any mutation, for times and imports; what failed in it.

        The imports are this process's: further runners need no run of their own where the tests
        are known to pass (`trust`)."""
        began = time.monotonic()
        said = self._fork(limit=1800)
        if said is None or said["killer"] is not None:
            return "a limit or a crash" if said is None else said["killer"] + said["why"]
        self.cost, self.shown = said["cost"], said["shown"]
        if self.cost:
            self.cost[next(iter(self.cost))] = 0.0         # the first test paid for the imports
        for name in said["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        if self.ready:
            self._import_what_stays(said["own"])
        gc.collect()
        gc.freeze()                        # a collection in a fork need not copy all this
        if self.seconds is None:
            self.seconds = int(30 + 4 * (time.monotonic() - began))
        return None

    def _import_what_stays(self, names: list[str]) -> None:
        """Modules of the floors that know no method (`STAYS`), from the copy: no mutant of a method
        changes them, and none imports a method before it is asked for one."""
        sys.path.insert(0, str(self.package))
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        sys.path.remove(str(self.package))
        early = [n for n in sys.modules if n.startswith("burnish.methods.")]
        assert not early, f"imported before a mutant is: {early}"

    def trust(self) -> None:
        """The tests pass without any mutation: somebody has seen them."""
        self.seconds = self.seconds or 300

    def killer(self, place: Path, source: str) -> str | None:
        """The first test that fails with `source` at `place`; None when all pass."""
        file = self.package / place
        before = file.read_bytes()
        for stale in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            stale.unlink()
        file.write_text(source, "utf-8")
        try:
            said = self._fork(limit=self.seconds)
        finally:
            file.write_bytes(before)
        if said is None:
            return "time"
        if said["killer"] is not None:
            self.kills[said["killer"]] += 1
        return said["killer"]

    def order(self, name: str) -> tuple[int, float]:
        return -self.kills[name], self.cost.get(name, 0.0)

    # -- one run ----------------------------------------------------------------------------------
    def _fork(self, limit: int) -> dict | None:
        """What the run said; None where it ran past the limit."""
        sys.stdout.flush()
        sys.stderr.flush()
        out, into = os.pipe()
        child = os.fork()
        if not child:
            os.close(out)
            self._child(into, limit)                # never returns
        os.close(into)
        said, ends = b"", time.monotonic() + 3 * limit
        while (left := ends - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
            part = os.read(out, 1 << 16)
            if not part:
                break
            said += part
        else:
            os.kill(child, signal.SIGKILL)
        os.close(out)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return None
        return json.loads(said) if said else {"killer": "crash", "why": "", "cost": {}}

    def _child(self, into: int, limit: int) -> None:
        said = {"killer": "crash", "why": "", "cost": {}, "shown": {}, "own": []}
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)
            os.chdir(self.root)
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.package))
            os.environ["PYTHONPATH"] = str(self.package)
            said = self._run()
            said["own"] = [n for n in sys.modules if n.startswith(STAYS)]
            home = (str(self.root / "src"), str(self.root / "tests"), str(self.package))
            said["modules"] = [
                n for n, m in sys.modules.items() if n != "__main__"
                and (origin := getattr(getattr(m, "__spec__", None), "origin", None))
                and not origin.startswith(home) and not n.startswith("torch._inductor")]
        except BaseException as e:
            said["why"] = f": {type(e).__name__}: {e}"
        finally:
            with contextlib.suppress(BaseException):
                left = json.dumps(said).encode()
                while left:
                    left = left[os.write(into, left):]
            os._exit(0)

    def _run(self) -> dict:
        said = {"killer": None, "why": "", "cost": {}, "shown": {}}
        for part in (self._pytest, self._conformance):
            part(said)
            if said["killer"] is not None:
                break
        return said

    def _pytest(self, said: dict) -> None:
        import pytest

        runner = self

        class Watch:
            @pytest.hookimpl(trylast=True)
            def pytest_collection_modifyitems(self, items):
                items.sort(key=lambda i: runner.order(i.nodeid))

            def pytest_runtest_logreport(self, report):
                said["cost"][report.nodeid] = said["cost"].get(report.nodeid, 0) + report.duration
                if report.failed:
                    said["killer"], said["why"] = report.nodeid, f": {report.longreprtext[-2000:]}"

        if not self.tests:
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            rc = pytest.main(["-q", "-x", "--tb=native", "-p", "no:cacheprovider", "-p", "no:xdist",
                              *self.tests], plugins=[Watch()])
        if rc and said["killer"] is None:
            said["killer"] = "collection"

    def _conformance(self, said: dict) -> None:
        if not self.cells:
            return
        from burnish.core import registry
        from burnish.testing import choose
        from burnish.testing import conformance as c

        for name in self.cells:
            if not set(registry.find(name).axes()) - {"lifecycle"}:
                continue                         # the suite has no cell for a pure lifecycle
            models = choose.models_for(name, all=False)[::-1]
            every = {f"{name}-{f.__name__}": f for f in (*c.CHECKS, *c.ONCE)}
            for word in sorted(every, key=self.order):
                began = time.monotonic()
                result = self._where_it_looks(every[word], name, models, word)
                said["cost"][word] = time.monotonic() - began
                if result.state == "fail":
                    said["killer"], said["why"] = word, f": {result.reason}"
                    return
                if result.state != "not applicable":
                    said["shown"][word] = result.model
                elif word in self.shown:                # a model that it took is refused now
                    said["killer"], said["why"] = word, f": {result.reason}"
                    return

    def _where_it_looks(self, check, name, models, word):
        """A check's result on the model that shows it: the first at which it looks at something."""
        from burnish.testing import conformance as c

        for model in [self.shown[word]] if word in self.shown else models:
            if (result := c.one(check, name, model)).state != "not applicable":
                break
        return result
