"""What every command shares: exit codes, one line on stderr, JSON, and no surprise on screen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.cli import main
from burnish.cli.app import command
from burnish.core import errors


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


RAISED = [
    (errors.BurnishError("it broke"), 1), (errors.ConfigError("bad call"), 2),
    (errors.RecipeError("no such part"), 2), (errors.NoPlanError("nothing fits"), 3),
    (errors.CheckError("nothing trained"), 4), (errors.MemoryExceeded("too much"), 5),
    (MemoryError("host"), 5), (torch.OutOfMemoryError("device"), 5), (KeyboardInterrupt(), 130),
    (ZeroDivisionError("division\nby zero"), 1),
]


@pytest.mark.parametrize(("error", "code"), RAISED, ids=lambda v: str(v).split("(")[0][:20])
def test_each_kind_of_failure_has_its_code(capsys, monkeypatch, error, code):
    def fail(*args, **kw):
        raise error

    monkeypatch.setattr("burnish.core.registry.catalogue", fail)
    got, out, err = run(capsys, "methods")
    assert got == code and out == ""
    assert err.startswith("burnish: ") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [
    ["nonsense"], ["plan"], ["simulate", "--batch", "none", "x"], ["methods", "--bogus"],
    ["fit", "missing.yaml"], ["fit", "--model", "m"], ["methods", "--axis", "detla"],
    ["methods", "lorra"], ["simulate", "./nowhere"],
])
def test_a_wrong_call_is_code_2_and_one_line(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1, err


def test_near_misses_are_named(capsys):
    assert "did you mean 'lora'" in run(capsys, "methods", "lorra")[2]
    assert "did you mean 'delta'" in run(capsys, "methods", "--axis", "detla")[2]


def test_the_traceback_is_there_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("BURNISH_DEBUG", "1")
    assert "Traceback" in run(capsys, "methods", "lorra")[2]


def test_methods_for_people_and_for_programs(capsys):
    code, text, _ = run(capsys, "methods")
    assert code == 0 and "lora" in text and "delta: what is added to this weight?" in text
    code, out, _ = run(capsys, "methods", "--json")
    data = json.loads(out)
    assert {"name", "axes", "summary", "tier"} == set(data["methods"][0])
    assert all(m["summary"] for m in data["methods"])
    code, out, _ = run(capsys, "methods", "--axis", "storage", "--json")
    assert all("storage" in m["axes"] for m in json.loads(out)["methods"])


def test_one_method_in_full(capsys):
    code, text, _ = run(capsys, "methods", "lora")
    assert code == 0 and "rank of the update" in text and "arXiv:2106.09685" in text
    data = json.loads(run(capsys, "methods", "lora", "--json")[1])
    assert {s["name"]: s["default"] for s in data["settings"]}["rank"] == 8
    assert data["merges"] is True and data["axes"] == ["delta"]


def test_a_preset_is_its_expression(capsys):
    code, text, _ = run(capsys, "methods", "qlora")
    assert code == 0 and text.startswith("qlora = nf4 + lora(")


def test_doctor_trains_a_step(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["step"]["loss_after"] < data["step"]["loss_before"]
    assert data["packages"]["torch"] == torch.__version__ and "fit" in data["extras"]
    assert "training works" in run(capsys, "doctor")[1]


PLACES = {"torch": "", "peft": "peft", "flwr": "federated", "starlette": "ui", "uvicorn": "ui"}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(PLACES)), st.sampled_from(
    ["0.0.9", "0.0.dev3+cpu", "99.1", "99.0rc1", "own-build"])))
def test_a_version_is_too_old_where_what_is_declared_says_so(monkeypatch, there):
    from burnish.core import extras

    real = extras.version
    with monkeypatch.context() as m:
        m.setattr(extras, "version", lambda p: there.get(p) or real(p))
        old = extras.too_old()
    assert {p: e for e, found in old.items() for p in found} == {
        p: PLACES[p] for p, v in there.items() if v.startswith("0.")}


def test_doctor_says_what_is_too_old_and_what_to_type(monkeypatch, capsys):
    from burnish.core import extras

    real, there = extras.version, {"torch": "2.1", "starlette": "0.4"}
    monkeypatch.setattr(extras, "version", lambda p: there.get(p) or real(p))
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "torch 2.1, wants >=2.8: pip install --upgrade 'torch>=2.8'" in out
    assert "starlette 0.4, wants >=0.46: pip install --upgrade 'burnish[ui]'" in out
    assert json.loads(run(capsys, "doctor", "--json")[1])["too_old"] == {
        "": {"torch": ">=2.8"}, "ui": {"starlette": ">=0.46"}}


def test_doctor_from_a_source_that_is_not_installed_compares_nothing(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from burnish.core import extras

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", none)
    assert extras.too_old() == {}


def test_doctor_knows_every_package_that_is_declared():
    import re
    from pathlib import Path

    from burnish.cli.catalogue import REQUIRED
    from burnish.core.extras import OPTIONAL

    try:
        import tomllib
    except ModuleNotFoundError:                            # Python 3.10
        import tomli as tomllib
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"]
    ours = {"test", "browser", "dev", "docs", "all"}       # for people who work on burnish itself

    def named(requirements):
        return tuple(re.match(r"[\w.-]+", n)[0] for n in requirements if "burnish[" not in n)

    extras = project["optional-dependencies"].items()
    assert {extra: named(names) for extra, names in extras if extra not in ours} == OPTIONAL
    assert named(n for n in project["dependencies"] if "python_version" not in n) == REQUIRED


@pytest.mark.parametrize(("module", "words"), [
    ("sklearn.cluster",
     "this needs scikit-learn, which is not installed: pip install 'burnish[fit]'"),
    ("scipy.stats", "'burnish[scipy]'"), ("dp_accounting", "'burnish[privacy]'"),
    ("onnxruntime", "'burnish[onnx]'"),
])
def test_what_is_not_installed_is_named_with_its_extra(capsys, monkeypatch, module, words):
    def fail(*args, **kw):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("burnish.core.registry.catalogue", fail)
    code, out, err = run(capsys, "methods")
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_module_that_no_extra_brings_is_an_error_of_the_work(capsys, monkeypatch):
    def fail(*args, **kw):
        raise ModuleNotFoundError("No module named 'zzz'", name="zzz")

    monkeypatch.setattr("burnish.core.registry.catalogue", fail)
    code, _, err = run(capsys, "methods")
    assert code == 1 and "No module named 'zzz'" in err and "burnish[" not in err


def test_version(capsys):
    import burnish

    assert run(capsys, "--version")[:2] == (0, f"burnish {burnish.__version__}\n")


def test_help_needs_no_torch():
    code = ("import sys\nfrom burnish.cli import main\nassert main(['--help']) == 0\n"
            "assert main(['fit', '--help']) == 0\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_hangs_up_is_no_error():
    shell = f"{sys.executable} -m burnish methods | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"


def test_no_colour_off_a_terminal():
    done = subprocess.run([sys.executable, "-m", "burnish", "methods", "lora"],
                          capture_output=True, text=True)
    assert "\x1b" not in done.stdout


def test_conformance_is_a_table_and_fails_with_four(capsys, monkeypatch):
    from burnish.testing import conformance as suite

    def wrong(name, model):
        raise AssertionError("off by one")

    def idle(name, model):
        return suite.Skip("nothing to look at")

    monkeypatch.setattr(suite, "CHECKS", (suite.CHECKS[0], idle))
    monkeypatch.setattr(suite, "ONCE", ())
    code, out, _ = run(capsys, "conformance", "lora", "--model", "mlp", "--json")
    told = json.loads(out)
    assert code == 0 and told["count"] == {"pass": 1, "not applicable": 1}
    assert told["results"][1] == {"check": "idle", "model": "mlp", "state": "not applicable",
                                  "reason": "nothing to look at"}
    monkeypatch.setattr(suite, "CHECKS", (suite.CHECKS[0], wrong))
    code, out, err = run(capsys, "conformance", "lora", "--model", "mlp")
    assert code == 4 and "lora fails 1 check" in err
    assert "wrong (FAIL) on mlp: off by one" in out
    assert run(capsys, "conformance", "lora", "--model", "vitt")[0] == 2
    assert run(capsys, "conformance", "loraa")[0] == 2


SURFACE = {
    "fit": "data from_yaml json launch memory model output recipe",
    "search": "data json layers memory metric model objectives output picture seed space trials",
    "select": "base data how json like out run split",
    "mark": "base data how json out source split",
    "predict": "base cache given guidance_scale inputs json num_inference_steps run seed tokens "
               "trust",
    "evaluate": "audio base batch cache data image json label run split text trust",
    "advise": "data json memory model test",
    "demo": "json memory output",
    "plan": "batch cache data device dtype epochs fit_card gpu json length limits memory model "
            "prefer rows shard shard_offload smaller targets tokens world_size",
    "simulate": "accumulation batch device dtype json length model moments picture recipe shard "
                "shard_offload targets tasks world_size",
    "compare": "accumulation batch device dtype json length model recipes shard shard_offload "
               "targets tasks world_size",
    "merge": "adapter base force json output tolerance",
    "export": "adapter base force json output rank to",
    "push": "folder json message public repository revision",
    "pull": "json output repository revision",
    "inspect": "adapter base force intruders json leading likeness picture",
    "adapt": "base batch corrupt data how json order seed severity source split",
    "audit": "answers attack base batch json judge margin policy prompts seed source split steps "
             "system temperature tokens",
    "repair": "base batch benign data how json judge metric output policy prompts source split "
              "tokens",
    "edit": "editor edits epochs how json lessons output plain seed source",
    "steer": "against alphas batch cap json layer model output pairs",
    "sparsity": "batch control data drop grid json metric model picture ranking runs split targets",
    "dimension": "beyond data halvings json least metric model most output picture share times",
    "continual": "baselines epochs json learner page rate recipes scenario seeds stream",
    "federate": "alpha batch clients compare data down epochs image json label lr memory model "
                "output rank ranks recipe rounds rule sampled seed strict text up",
    "bench": "budget json output page picture recipes seeds task",
    "reproduce": "json listed names page",
    "soup": "batch data folders greedy json learned metric output rank split",
    "mix": "batch count data epochs held how json lr metric model out recipe rows",
    "arithmetic": "expression json output rank",
    "combine": "base batch data folders force how json metric output rank split weights",
    "compress": "base folder how json output",
    "expand": "base file json output",
    "ui": "browser host port root trust_remote_code",
    "methods": "axis json name",
    "doctor": "again json",
    "conformance": "json model name",
}


def test_the_commands_and_their_options_are_these():
    """A new option is a promise; make it on purpose, here."""
    found = {name: " ".join(sorted(p.name for p in c.params if p.name != "help"))
             for name, c in command().commands.items()}
    assert found == SURFACE


def test_the_catalogue_says_how_each_method_was_held_against_its_source(capsys):
    from burnish.cli import main

    assert main(["methods", "vera"]) == 0
    assert "checked against the paper's numbers" in capsys.readouterr().out
    assert main(["methods"]) == 0
    last = " ".join(capsys.readouterr().out.rpartition("\n\n")[2].split())
    assert "from the text, " in last and "checked against an independent equation, " in last
    assert main(["methods", "norms", "--json"]) == 0
    assert '"tier": "from the text"' in capsys.readouterr().out
