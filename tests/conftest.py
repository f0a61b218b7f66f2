"""Every test starts from the same seed and leaves the process as it found it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # no test reaches a network
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["BURNISH_CACHE"] = CACHE = tempfile.mkdtemp(prefix="burnish-tests-")   # nobody's own

# before anybody imports triton: its kernels run on any machine, on tensors of the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_configure(config):
    """Every process of a run has one seed (burnish/testing/changed.py)."""
    from burnish.testing import changed

    os.environ["BURNISH_SEED"] = str(changed.seed())


def pytest_unconfigure(config):
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Long tests first, so that no core waits for another at the end; ``SHARD=3/8``: the third of
    eight parts of what was collected."""
    items.sort(key=lambda i: ("/e2e/" not in i.path.as_posix(), "slow" not in i.keywords))
    from burnish.testing.choose import rank, shard

    if not config.option.file_or_dir and not config.option.keyword:
        _in_turn(config, items)
    part, parts = shard(os.environ.get("SHARD"))
    if parts > 1:
        mine = [i for i in items if rank(i.nodeid) % parts == part - 1]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(mine)])
        items[:] = mine


def _in_turn(config, items):
    """Where nobody names tests: of the methods' own files and of the long tests those that have
    changed, and others in turn (docs/decisions/0028-what-one-run-looks-at.md)."""
    from burnish.core import registry
    from burnish.testing.choose import TESTS, long_tests, visited

    own = {f"test_{n}.py": n for n in registry.names(extra=False)}
    of = {i: own[i.path.name] for i in items if i.path.parent.name == "methods"
          and i.path.name in own}
    names = sorted(set(of.values()))
    rest = set(names) - set(visited(names, window=TESTS))
    long = {i: f"{i.path.relative_to(config.rootpath).as_posix()}::{i.name}" for i in items
            if "slow" in i.keywords and i.path.parent.name not in ("methods", "conformance")}
    turn = long_tests(list(long.values()))
    out = {i for i in items if of.get(i) in rest or i in long and long[i] not in turn}
    config.hook.pytest_deselected(items=[i for i in items if i in out])
    items[:] = [i for i in items if i not in out]


def pytest_terminal_summary(terminalreporter):
    """What the conformance suite looked at, and what it had nothing to look at for."""
    told = [v for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)
            for k, v in r.user_properties if k == "conformance"]
    states = Counter(state for results in told for _, state in results)
    idle = Counter(check for results in told for check, state in results
                   if state == "not applicable")
    if states:
        from burnish.testing import changed

        new = sorted(changed.methods())
        terminalreporter.write_sep("-", "conformance")
        terminalreporter.write_line(
            f"BURNISH_SEED={changed.seed()}, changed since {(changed.since() or 'ever')[:10]}: "
            + (", ".join(new[:12]) + f" and {len(new) - 12} more" * (len(new) > 12) or "none"))
        terminalreporter.write_line(", ".join(f"{n} {s}" for s, n in sorted(states.items())))
        terminalreporter.write_line("nothing to look at: " + ", ".join(
            f"{check} {n}" for check, n in idle.most_common()))


    _where_the_time_went(terminalreporter)


def _where_the_time_went(terminalreporter):
    """Seconds of a core by folder, and the longest files, of a run of minutes."""
    folders, files = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for r in reports:
            if hasattr(r, "duration") and hasattr(r, "nodeid"):
                file = r.nodeid.partition("::")[0]
                files[file] += r.duration
                folders[file.rpartition("/")[0]] += r.duration
    if sum(folders.values()) > 120:
        terminalreporter.write_sep("-", "where the time went, in seconds of a core")
        for found in (folders.most_common(), files.most_common(12)):
            terminalreporter.write_line(", ".join(f"{n} {t:.0f}" for n, t in found))


class Said(str):
    """What a command prints has what is looked for wherever its lines break: that is another place
    on each machine where one names a temporary folder."""

    def __contains__(self, words):
        prose = words and words == " ".join(words.split())
        return super().__contains__(words) or bool(prose) and words in " ".join(self.split())


class Heard:
    """capsys, of whom what is read is :class:`Said`."""

    def __init__(self, capsys):
        self.capsys = capsys

    def readouterr(self):
        found = self.capsys.readouterr()
        return type(found)(Said(found.out), Said(found.err))

    def __getattr__(self, name):
        return getattr(self.capsys, name)


@pytest.fixture
def capsys(capsys):
    return Heard(capsys)


@pytest.fixture(autouse=True)
def steady():
    """Seed, dtype and threads are put back whatever a test does to them."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
