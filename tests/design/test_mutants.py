"""The mutation check itself, and the mistakes that once passed the suite."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/mutants.py"


def run(*words, timeout=None):
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=timeout)


def listed(name):
    return [line.split(": ", 1)[1] for line in run(name, "--list").stdout.splitlines()]


def test_constants_signs_and_terms_are_changed():
    said = listed("dora")
    size = "self.rank * (place.out + (place.inp if self.train_a else 0))"
    assert f"Dora.count: {size} + place.out -> {size}" in said
    assert f"Dora.count: {size} + place.out -> {size} - place.out" in said
    assert "Dora.delta: False -> True" in said
    assert any(s.startswith("Dora: setting(16.0") and "setting(32.0" in s for s in said)
    assert not any("RecipeError" in s or "2402.09353" in s for s in said)
    assert len(said) == len(set(said)) > 20


def test_every_mutant_is_a_program_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants_apply

    source = (ROOT / "src/burnish/methods/delta/rank/adalora.py").read_text("utf-8")
    every = [m.source for m in mutants_apply.mutants(source)]
    same = ast.unparse(ast.parse(source))
    assert len(set(every)) == len(every) and same not in every
    for text in every:
        compile(text, "mutant", "exec")


def test_a_path_names_a_block():
    assert any(s.startswith("cubic: ") for s in listed("blocks/choose/budget"))


def test_what_is_no_file_is_said():
    done = run("nonesuch", "--list")
    assert done.returncode == 1 and "neither a method's name nor a path" in done.stderr


def test_a_file_that_no_test_is_known_of_is_refused():
    """None of its mutants could be killed, and a survivor would say nothing."""
    done = run("blocks/__init__", "--list")
    assert done.returncode == 1 and "blocks/__init__: no test is known to be of it" in done.stderr


@dataclass
class Named:
    name: str


def test_what_became_of_a_file_is_kept_until_its_code_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from mutants_kept import Kept, code

    made = {n: tmp_path / f"{n}.py" for n in ("one", "two", "three")}
    for name, path in made.items():
        path.write_text(f'"""Of {name}."""\n\n\ndef f(x):\n    """Doubles."""\n    return 2 * x\n')
    kept = Kept(tmp_path / "mutants.json")
    assert kept.left(made) == ["one", "two", "three"]
    kept.keep("one", code(made["one"]), 3, 1, [])
    Kept(kept.file).keep("two", code(made["two"]), 2, 0, ["f: 2 -> 3"])           # another process
    kept.keep("three", code(made["three"]), 4, 0, [])
    again = Kept(kept.file)
    assert again.left(made) == ["two"]                                      # it has a survivor
    assert again.told(made) == "kept: 2 of 3 files without a survivor, 8 mutants; 1 live in others"
    every = [Named("f: 2 -> 1"), Named("f: 2 -> 3")]
    now = code(made["two"])
    assert again.survivors("two", now, every) == every[1:]
    assert again.survivors("two", "other", every) == again.survivors("four", now, every) == every
    Kept(kept.file).keep("two", now, 1, 0, [], more=True)                   # a test was added
    assert Kept(kept.file).records["two"] == {"code": now, "killed": 3, "equivalent": 0, "live": []}
    Kept(kept.file).keep("two", now, 2, 0, ["f: 2 -> 3"])
    text = made["one"].read_text()
    made["one"].write_text(text.replace("Doubles", "Twice x") + "# a remark\n")
    assert again.left(made) == ["two"]
    made["three"].write_text(text.replace("2 *", "3 *"))
    assert again.left(made) == ["three", "two"]


def test_every_record_is_of_a_file_that_is_there():
    import json

    said = json.loads((ROOT / "scripts/mutants.json").read_text("utf-8"))
    files = {p.stem for p in (ROOT / "src/burnish/methods").rglob("*.py")}
    gone = [n for n in said if n not in files and not (ROOT / f"src/burnish/{n}.py").is_file()]
    assert not gone
    assert "files without a survivor" in run("--told").stdout


TOY = """
from pathlib import Path
from mutants_run import Runner
runner = Runner(Path({root!r}), Path({root!r}) / "copy", ("tests/test_toy.py",), (), seconds=2)
assert runner.prepare() is None
for changed in ("x = 1 + 0", "x = 2", "raise OSError", "while True: pass", "x = 1"):
    print(runner.killer(Path("toy.py"), changed))
"""


def test_what_fails_or_hangs_is_killed_and_what_changes_nothing_lives(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "copy/toy.py").write_text("x = 1")
    (tmp_path / "tests/test_toy.py").write_text(
        "def test_other(): pass\ndef test_x():\n    import toy\n    assert toy.x == 1\n")
    done = subprocess.run([sys.executable, "-c", TOY.format(root=str(tmp_path))], cwd=SCRIPT.parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [w.rpartition("/")[2] for w in done.stdout.split()]
    assert said == ["None", "test_toy.py::test_x", "test_toy.py::test_x", "time", "None"]


STAYS = """
import sys
from pathlib import Path
from mutants_run import Runner
root = Path({root!r})
runner = Runner(root, root / "copy", ("tests/test_toy.py",), (), seconds=20, ready=True)
assert runner.prepare() is None
assert "burnish.core" in sys.modules and "burnish.methods.toy" not in sys.modules
for changed in ("from .. import core\\nx = core.ONE", "from .. import core\\nx = core.ONE + 1"):
    print(runner.killer(Path("burnish/methods/toy.py"), changed))
"""


def test_of_a_method_all_but_methods_is_imported_once(tmp_path):
    package = tmp_path / "copy/burnish"
    (package / "methods").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for file, text in {"__init__.py": "", "core.py": "ONE = 1", "methods/__init__.py": "",
                       "methods/toy.py": "from .. import core\nx = core.ONE + 0"}.items():
        (package / file).write_text(text)
    (tmp_path / "tests/test_toy.py").write_text(
        "def test_x():\n    from burnish.methods import toy\n    assert toy.x == 1\n")
    done = subprocess.run([sys.executable, "-c", STAYS.format(root=str(tmp_path))],
                          cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [w.rpartition("/")[2] for w in done.stdout.split()] == ["None", "test_toy.py::test_x"]


def test_tests_of_other_names_are_told(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants

    assert mutants.subject("lora").tests == ("tests/methods/test_lora.py",)
    told = mutants.declared()["tests"]
    for name, files in told.items():
        got = mutants.subject(name)
        assert set(files.split()) <= set(got.tests), name
        assert all(t.startswith("tests/") and t.endswith(".py") for t in got.tests), name


def test_all_is_the_whole_catalogue_and_each_of_it_is_tested(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants

    from burnish.core.registry import names

    every = list(mutants.files())
    assert set(names(extra=False)) <= set(every) and len(every) == len(set(every))
    parts = [mutants.shared_out(every, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(n for part in parts for n in part) == sorted(every) and all(parts)
    for name in every:
        found = mutants.subject(name)
        assert found.tests or (found.cells and "/" not in name), name
    with pytest.raises(SystemExit, match="expected part/parts"):
        mutants.shared_out(every, "4/3")


def test_the_last_line_sums_up(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from mutants import Mutant, Tally, summary

    one, two = Tally("lora", killed=5, equivalent=1), Tally("dora", killed=2)
    two.live.append(Mutant(1, "x", "x"))
    assert summary([one, two]) == \
        "mutants: 2 files, 9 mutants, 7 killed, 1 equivalent, 1 live"


def test_what_is_declared_equivalent_is_a_mutant(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants

    for name, told in mutants.declared()["equivalent"].items():
        every = {m.name for m in mutants.mutants(mutants.subject(name).file.read_text("utf-8"))}
        assert not set(told) - every, name


def test_every_check_is_run_on_a_model_that_shows_it(monkeypatch, tmp_path):
    """Of bd_lora's models the first has attention whose weights are fused, and what waits for
    backward is told of whole linears alone."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants_run

    from burnish.methods.delta.lowrank.bd_lora import BdLora
    from burnish.testing import choose, conformance
    from burnish.testing.checks import cost

    monkeypatch.setattr(conformance, "CHECKS", (cost.keeps_what_it_says,))
    monkeypatch.setattr(conformance, "ONCE", ())
    runner = mutants_run.Runner(ROOT, tmp_path, (), ("bd_lora",))
    word = "bd_lora-keeps_what_it_says"
    runner.shown = (first := runner._run())["shown"]
    assert first["killer"] is None and runner.shown[word] != choose.models_for("bd_lora")[-1]
    monkeypatch.setattr(BdLora, "per_token", lambda self, place: 1)
    assert runner._run()["killer"] == word
    monkeypatch.undo()
    monkeypatch.setattr(conformance, "CHECKS", (cost.keeps_what_it_says,))
    monkeypatch.setattr(conformance, "ONCE", ())
    monkeypatch.setattr(BdLora, "kinds", frozenset())          # a model that it took is refused
    assert runner._run()["killer"] == word


@pytest.mark.slow
def test_mistakes_that_once_passed_the_suite_fail_it():                     # findings 6
    done = run("--named")
    assert done.returncode == 0, done.stdout


def test_functions_on_what_is_there_have_no_cell(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants
    import mutants_run

    for name, cells in (("tent", False), ("ties", False), ("spsa_gc", True)):
        of = mutants.subject(name)
        said = {"killer": None, "why": "", "cost": {}, "shown": {}}
        mutants_run.Runner(ROOT, tmp_path, (), of.cells)._conformance(said)
        assert bool(said["cost"]) is cells and said["killer"] is None, said["why"]
