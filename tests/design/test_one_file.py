"""A new method is one file and its test: nothing else in the repository knows its name.

A copy of the repository gets two files, and every suite that goes through the catalogue runs there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

METHOD = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.weight.factor import Chain
from ....core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Novelty(Method):
    """Novelty: a low-rank update behind a fixed random projection.

    ``y = x W^T + b + s (x A^T) B^T`` with A (rank, in) drawn once and frozen, B (out, rank) zero.
    """

    paper: ClassVar[str] = "a test of burnish"

    rank: int = setting(8, "rank of the update")
    numerator: float = setting(8.0, "numerator of s")
    boldness: str = setting("plain", "plain: s = numerator / rank; bold: s = numerator",
                            other=("bold",))
    spice: float = setting(1.0, "a further factor, where it is asked for",
                           beside={"spiced": True})
    spiced: bool = setting(False, "take `spice`", beside={"spice": 3.0})
    mood: Literal["grave", "gay"] = setting(
        "grave", "of nobody's interest", unseen="nothing reads it, which is what this is about: "
                                                "tests/methods/test_novelty.py")

    def delta(self, site):
        site.place.check_rank(self.rank, "novelty")
        s = self.numerator / (self.rank if self.boldness == "plain" else 1)
        return Chain(site.place, self.rank, s * (self.spice if self.spiced else 1.0),
                     train_a=False)

    def count(self, place):
        """Trainable parameters on one matrix."""
        return self.rank * place.out * max(1, place.experts)
'''

TEST = '''
import torch

import burnish


def test_its_equation():
    net = torch.nn.Linear(6, 5).double()
    tuned = burnish.tune(net, "novelty(rank=2)", targets="linear", head=False)
    (_, term), = tuned.terms(torch.nn.Module)
    with torch.no_grad():
        term.B.normal_()
    x = torch.randn(7, 6).double()
    want = x @ net.weight.t() + net.bias + 4.0 * (x @ term.A.double().t()) @ term.B.double().t()
    torch.testing.assert_close(net(x), want)
'''

#: what goes through the catalogue, and which of it concerns every method at once
SUITES = [
    ["tests/methods/test_novelty.py", "tests/methods/test_settings.py",
     "tests/design/test_names.py", "tests/design/test_method_files.py"],
    ["tests/conformance/test_methods.py", "tests/conformance/test_pairs.py",
     "tests/formats/test_enough.py", "tests/engine/test_errors.py", "tests/engine/test_targets.py",
     "-k", "novelty or (test_methods and not slow and not test_method and not test_once "
           "and not test_applies)"],
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository, with one method more."""
    root = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "src/burnish/methods/delta/lowrank/novelty.py").write_text(METHOD.lstrip())
    (root / "tests/methods/test_novelty.py").write_text(TEST.lstrip())
    return root


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=root, env=env, capture_output=True,
                          text=True)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=["facts", "shown"])
def test_a_new_method_needs_no_line_elsewhere(copy, suite):
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_it_is_in_the_catalogue_and_in_help(copy):
    page = run(copy, "-c", "import sys; sys.path.insert(0, 'docs'); import catalogue; "
                           "print(catalogue.pages()['methods/novelty.md'])")
    assert page.returncode == 0, page.stderr
    assert "# `novelty`" in page.stdout and "numerator of s" in page.stdout
    shown = run(copy, "-m", "burnish", "methods", "novelty")
    assert shown.returncode == 0 and "of nobody's interest" in shown.stdout, shown.stderr
