"""The wheel in an environment that holds what it declares and nothing else, core and each extra.

torch is not installed anew: a folder of links shows the declared packages, what those declare, and
no other of this environment, to a fresh Python in which the wheel is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:                                # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"test", "browser", "dev", "docs", "all"}           # for people who work on burnish itself
EXTRAS = {k: v for k, v in PROJECT["optional-dependencies"].items() if k not in OURS}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None) -> dict[str, Distribution | None]:
    """All that the wheel asks for with an extra, at any remove; None for what is not here."""
    found: dict[tuple[str, str], Distribution | None] = {}
    left = [(Requirement(r), "") for r in PROJECT["dependencies"] + EXTRAS.get(extra, [])]
    while left:
        wanted, above = left.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": above}):
            continue
        for part in ("", *wanted.extras):
            key = plain(wanted.name), part
            if key in found:
                continue
            if key[0] == "burnish":
                left += [(Requirement(r), "") for r in EXTRAS.get(part, [])]
                continue
            try:
                found[key] = distribution(wanted.name)
            except PackageNotFoundError:
                found[key] = None
                continue
            left += [(Requirement(r), part) for r in found[key].requires or ()]
    return {name: d for (name, _), d in found.items()}


def link(source: Path, target: Path) -> None:
    """A folder that several packages share is made; a module, a package and a file are linked."""
    if target.is_symlink() or not source.exists():
        return
    if source.is_dir() and source.suffix != ".dist-info" and not (source / "__init__.py").exists():
        target.mkdir(exist_ok=True)
        for child in source.iterdir():
            link(child, target / child.name)
    else:
        target.symlink_to(source)


def shown(extra: str | None, folder: Path) -> Path:
    folder.mkdir()
    for package in filter(None, declared(extra).values()):
        tops = {Path(str(f)).parts[0] for f in package.files or ()} - {"..", "__pycache__"}
        for top in tops:
            link(Path(str(package.locate_file(top))), folder / top)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Python with the wheel installed, and nothing else."""
    at = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    done(pip + ["wheel", "-q", "--no-deps", "-w", str(at), str(ROOT)], at)
    wheel, = at.glob("burnish-*.whl")
    done([sys.executable, "-m", "venv", "--without-pip", str(at / "venv")], at)
    done(pip + ["--python", str(at / "venv" / "bin" / "python"), "install", "-q", "--no-deps",
                "--no-index", "--no-compile", str(wheel)], at)
    return at


def done(words, at, **beside):
    ran = subprocess.run(words, capture_output=True, text=True, cwd=at,
                         env={**os.environ, "PYTHONPATH": "", **beside})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def python(place: Path, extra: str | None, script: str, *argv: str) -> str:
    folder = place / f"beside-{extra}"
    if not folder.exists():
        shown(extra, folder)
    return done([str(place / "venv" / "bin" / "python"), "-c", script, *argv], place,
                PYTHONPATH=str(folder), OMP_NUM_THREADS="1")


DOCTOR = """
import json, sys
from burnish.cli import main
import burnish
assert main(["doctor", *sys.argv[1:]]) == 0
assert "site-packages/burnish" in burnish.__file__, burnish.__file__
"""
#: an extra -> what imports with it, or nothing where only what a person's model needs is in it
SERVED = {
    "fit": "burnish.fit.loop burnish.fit.bridge burnish.fit.safety burnish.fit.shown "
           "transformers.trainer matplotlib.figure sklearn.metrics",
    "peft": "peft", "bitsandbytes": "", "torchao": "",
    "scipy": "scipy.stats scipy.signal burnish.board.page", "audio": "scipy.io burnish.fit.sounds",
    "privacy": "dp_accounting.pld", "federated": "burnish.federated.flower",
    "triton": "burnish.blocks.gpu.coded_kernels burnish.blocks.gpu.distances_kernels "
              "burnish.blocks.gpu.entries_kernels",
    "search": "optuna burnish.search.study", "onnx": "onnx onnxscript onnxruntime transformers",
    "ui": "burnish.ui.app uvicorn transformers",
}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_the_wheel_runs_with_what_it_declares_and_doctor_says_what_is_there(place, extra):
    there = declared(extra)
    told = json.loads(python(place, extra, DOCTOR, "--json"))
    assert told["step"]["loss_after"] < told["step"]["loss_before"]
    assert told["packages"]["burnish"] == PROJECT["version"]
    assert None not in told["packages"].values()
    assert told["extras"] == {
        name: {plain(Requirement(r).name): version(Requirement(r).name)
               if there.get(plain(Requirement(r).name)) else None
               for r in wanted if not r.startswith("burnish[")} for name, wanted in EXTRAS.items()}
    if extra is not None:
        assert extra in SERVED, f"say in SERVED what the extra {extra} is for"
        python(place, extra, "import importlib, sys\nfor m in sys.argv[1:]: "
                             "importlib.import_module(m)", *SERVED[extra].split())


def test_doctor_says_in_words_which_extra_to_install(place):
    out = " ".join(python(place, None, DOCTOR).split())
    there = declared(None)
    for extra, wanted in EXTRAS.items():
        lacks = [n for n in (plain(Requirement(r).name) for r in wanted
                             if not r.startswith("burnish[")) if not there.get(n)]
        assert f"[{extra}] missing {', '.join(lacks)}: pip install 'burnish[{extra}]'" in out


STEPS = """
import torch, burnish
x, y = torch.randn(16, 8), torch.randn(16, 4)
loss = lambda out, batch: (out - batch[1]).square().mean()
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
for recipe in ("full", "nf4 + lora(rank=2)", "lora(rank=2)"):
    tuned = burnish.tune(net(), recipe, head=False)
    tuned.optimizer(lr=1e-2)
    first, *_, last = [float(tuned.step((x, y), loss=loss)) for _ in range(5)]
    assert last < first, recipe
tuned.save("adapter")
again = burnish.load(net(), "adapter").model(x)
assert torch.equal(again, tuned.model(x))
assert torch.allclose(tuned.merge()(x), again, atol=1e-6)
simulated = burnish.simulate(net(), "lora(rank=2)", (x, y), loss=loss)
measured = burnish.measure(burnish.tune(net(), "lora(rank=2)", head=False), (x, y), loss=loss)
assert simulated.peak_bytes > 0 and measured.peak_bytes > 0
assert burnish.plan(net(), batch=(x, y), memory="1GB", loss=loss).fits
print(len(burnish.methods()))
"""


def test_core_alone_tunes_steps_saves_and_plans(place):
    assert int(python(place, None, STEPS)) > 100


#: an extra -> what needs it
NEEDS = {
    "fit": ["burnish.fit(model='m', data='d.csv', recipe='lora')", "burnish.TrainerCallback",
            "burnish.open_model('m')", "burnish.simulate({'model_type': 'bert'}, 'lora')",
            "burnish.pull('somebody/model', 'there')",
            "burnish.plan({'model_type': 'bert'}, memory='1GB')",
            "call('plan', 'somebody/model', '--memory', '1GB')", "call('simulate', 'm')",
            "call('compare', 'somebody/model', 'lora')", "call('advise', 'm', '--data', 'd.csv')",
            "call('fit', '--model', 'm', '--data', 'd.csv')", "call('fit', 'c.yaml')",
            "call('demo')", "call('conformance', 'lora')"],
    "scipy": ["at('board.prior')._alike([1, 2], [1, 2])"],
    "audio": ["at('fit.sounds').heard(io.BytesIO(b'RIFF'), 16000)"],
    "privacy": ["at('blocks.update.accountant').epsilon_of(1.0, 0.1, 10, 1e-5, 'rdp')"],
    "federated": ["at('federated.flower')._flower()"],
    "search": ["at('search.study')._optuna()"],
    "onnx": ["at('formats.exported').needed()"],
    "ui": ["call('ui', '.')"],
}
WITHOUT = """
import contextlib, importlib, io, json, os, sys
import burnish
from burnish.cli import main
open("d.csv", "w").write("text,label\\na,0\\nb,1\\n")
open("c.yaml", "w").write("model: m\\n")

os.makedirs("m", exist_ok=True)
open("m/config.json", "w").write('{"model_type": "bert"}')

class Said(Exception):
    pass

def at(name):
    return importlib.import_module("burnish." + name)

def call(*argv):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(argv))
    raise Said(f"{code}: {err.getvalue()}")

said = []
for line in json.loads(sys.argv[1]):
    try:
        said.append(["nothing", repr(eval(line))])
    except Exception as e:
        said.append([type(e).__name__, str(e)])
print(json.dumps(said))
"""


def test_without_an_extra_what_needs_it_says_which(place):
    lines = [(extra, line) for extra, of in NEEDS.items() for line in of]
    said = json.loads(python(place, None, WITHOUT, json.dumps([line for _, line in lines])))
    wrong = [(line, kind, words) for (extra, line), (kind, words) in zip(lines, said, strict=True)
             if kind not in ("Said", "ConfigError") or f"burnish[{extra}]" not in words
             or words.count("\n") > 1]
    assert not wrong, "\n".join(map(str, wrong))
