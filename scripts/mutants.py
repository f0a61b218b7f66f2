"""Small mutations of a file's source, and which of them its tests let live.

    python scripts/mutants.py lora dora                    (make mutants NAME="lora dora")
    python scripts/mutants.py blocks/weight/factor --lines 40-60
    SHARD=3/8 python scripts/mutants.py --all              (make mutants NAME=--all SHARD=3/8)

One change at a time (a constant, a sign, an operator, a comparison, a dropped term, a dropped
keyword, a condition turned, a reduction exchanged, a function that returns nothing) is applied to
a copy of the package; the tests of the file must fail, and a run past its limit of time or memory
has failed. A method's tests are tests/methods/test_NAME.py and its conformance cell on a small
model; a block's are tests/blocks/test_NAME.py and the tests of the methods that import it. Further
ones stand in mutants.toml, mutants that are no other program in equivalent/NAME.toml with the
reason. The tests that killed most run first. Prints a line for each survivor, a table and a last
line that reads alike on every machine, "mutants: 52 files, 3104 mutants, 3080 killed, 24
equivalent, 0 live"; exit code
1 when any lives. `--all` takes every method and the files they share, a night's work on one
machine; SHARD=3/8 the third of eight parts of it. What became of a whole file is kept in
mutants.json, and `--left` takes those files whose code has no record there, or one with a survivor;
`--told` says how many that are. `--again` runs of a file whose code has a record the survivors
alone, against the tests that are there now.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")         # before anybody imports triton

try:
    import tomllib
except ImportError:                                             # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from mutants_apply import Mutant, mutants  # noqa: E402
from mutants_kept import Kept, code  # noqa: E402
from mutants_run import Runner  # noqa: E402


@dataclass(frozen=True)
class Subject:
    """A file of the package and the tests that must fail when it is changed."""

    name: str
    file: Path
    tests: tuple[str, ...]
    cells: tuple[str, ...]                  # methods whose conformance cell is run
    equivalent: dict[str, str]              # mutant -> why it is no other program

    @property
    def place(self) -> str:
        return self.file.relative_to(ROOT).as_posix()


@dataclass
class Tally:
    """What became of the mutants of one file."""

    name: str
    killed: int = 0
    slow: int = 0                           # of the killed, by the limit of time
    equivalent: int = 0
    live: list[Mutant] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.killed + self.equivalent + len(self.live)


def declared() -> dict:
    told = tomllib.loads((ROOT / "scripts/mutants.toml").read_text("utf-8"))
    folder = ROOT / "scripts/equivalent"
    told["equivalent"] = {f.relative_to(folder).with_suffix("").as_posix():
                          tomllib.loads(f.read_text("utf-8"))
                          for f in sorted(folder.rglob("*.toml"))}
    return told


def subject(name: str) -> Subject:
    """A method by its name, or any file of the package by its path below src/burnish."""
    package = ROOT / "src/burnish"
    name = name.removeprefix("src/burnish/").removesuffix(".py")
    told = declared()
    if "/" in name:
        files, where = [package / f"{name}.py"], "blocks"
    else:
        files, where = list((package / "methods").rglob(f"{name}.py")), "methods"
    if len(files) != 1 or not files[0].exists():
        sys.exit(f"{name}: neither a method's name nor a path below src/burnish")
    stem = files[0].stem
    own = [f"tests/{where}/test_{stem}.py"]
    cells = [name]
    if where == "blocks":
        cells = [m for m in readers(name) if (ROOT / f"tests/methods/test_{m}.py").exists()]
        own += [f"tests/methods/test_{m}.py" for m in cells]
    more = told.get("tests", {}).get(name, "").split()
    if missing := [t for t in more if not (ROOT / t).is_file()]:
        sys.exit(f"mutants.toml: {name} is tested by {missing}, which is no file")
    own = [t for t in own if (ROOT / t).is_file()] + more
    named_cells = told.get("cells", {}).get(name)
    cells = cells[:1] if named_cells is None else named_cells.split()
    if not own and not cells:
        sys.exit(f"{name}: no test is known to be of it; name its own in mutants.toml")
    return Subject(name, files[0], tuple(dict.fromkeys(own)), tuple(cells),
                   told.get("equivalent", {}).get(name, {}))


def readers(block: str) -> list[str]:
    """Methods whose file imports this block, or what its folder shares."""
    folder, stem = Path(block).parent.name, Path(block).stem
    words = [block.replace("/", ".")] + [f".{folder}.{stem}"] * block.startswith("methods/")

    def reads(p: Path) -> bool:
        text = p.read_text("utf-8")
        beside = block.startswith("methods/") and p.parent.name == folder
        return any(f"{w} import" in text for w in words) or \
            beside and f"from .{stem} import" in text

    return sorted(p.stem for p in (ROOT / "src/burnish/methods").rglob("*.py")
                  if not p.stem.startswith("_") and reads(p))


def files() -> dict[str, Path]:
    """Every method and what methods share: name -> file."""
    top = ROOT / "src/burnish"
    found = sorted((p for p in (top / "methods").glob("*/**/*.py") if p.name != "__init__.py"),
                   key=lambda p: (p.stem, p))
    return {p.relative_to(top).with_suffix("").as_posix() if p.stem.startswith("_") else p.stem: p
            for p in found}


def shared_out(names: list[str], part: str = "") -> list[str]:
    """Of these names one part, ``"3/8"``."""
    if not part:
        return names
    first, _, last = part.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        sys.exit(f"SHARD={part!r}: expected part/parts, e.g. 3/8")
    return names[int(first) - 1 :: int(last)]


def summary(tallies: list[Tally]) -> str:
    """One line for programs."""
    sums = {w: sum(n(t) for t in tallies) for w, n in (
        ("mutants", lambda t: t.count), ("killed", lambda t: t.killed),
        ("equivalent", lambda t: t.equivalent), ("live", lambda t: len(t.live)))}
    return f"mutants: {len(tallies)} files, " + ", ".join(f"{n} {w}" for w, n in sums.items())


def judge(of: Subject, mutated: list[Mutant], package: Path, seconds: int | None = None,
          trusted: bool = False, ready: bool = False) -> Tally:
    """Run the tests on every mutant, in a copy of the package; prints survivors as it goes.

    trusted: the tests are known to pass without any mutation, and are not run to see it.
    ready: nothing but methods is changed in this process, so that all else is imported once.
    """
    tally = Tally(of.name)
    runner = Runner(ROOT, package, of.tests, of.cells, seconds, ready)
    if trusted:
        runner.trust()
    elif (fault := runner.prepare()) is not None:
        sys.exit(f"{of.name}: the tests fail without any mutation: {fault}")
    for mutant in mutated:
        if mutant.name in of.equivalent:
            tally.equivalent += 1
            continue
        killer = runner.killer(of.file.relative_to(ROOT / "src"), mutant.source)
        if killer is None:
            tally.live.append(mutant)
            print(f"{of.place}:{mutant.line}: lives: {mutant.name}", flush=True)
        else:
            tally.killed += 1
            tally.slow += killer == "time"
            print(f"{of.place}:{mutant.line}: {mutant.name}: {killer}", file=sys.stderr)
    return tally


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the package as it stands now, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        compileall.compile_dir(ROOT / "src", quiet=1, workers=1)
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True)
        yield Path(folder)


def table(tallies: list[Tally]) -> str:
    rows = [("file", "mutants", "killed", "by time", "equivalent", "live")]
    rows += [(t.name, *map(str, (t.count, t.killed, t.slow, t.equivalent, len(t.live))))
             for t in tallies]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) if not i else c.rjust(w)
                               for i, (c, w) in enumerate(zip(r, wide, strict=True)))
                     for r in rows)


def named() -> list[tuple[Subject, list[Mutant]]]:
    """The mutants that mutants.toml names: mistakes somebody made, or could."""
    out = []
    for told in declared()["named"]:
        of = subject(told["file"])
        text = of.file.read_text("utf-8")
        if text.count(told["before"]) != 1:
            sys.exit(f"mutants.toml: {told['name']}: {told['before']!r} does not stand once in "
                     f"{of.place}; say what it reads now")
        line = text[:text.index(told["before"])].count("\n") + 1
        changed = text.replace(told["before"], told["after"])
        out.append((of, [Mutant(line, told["name"], changed)]))
    return out


def chosen(text: str | None) -> set[int] | None:
    """``"12,40-60"`` -> lines."""
    if not text:
        return None
    spans = [w.partition("-")[::2] for w in text.split(",")]
    return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="FILE", help="a method, or blocks/weight/term")
    parser.add_argument("--all", action="store_true", help="every method (SHARD=3/8: a part)")
    parser.add_argument("--left", action="store_true", help="those of --all without a record of "
                                                            "their code in mutants.json")
    parser.add_argument("--told", action="store_true", help="how many of --all have one")
    parser.add_argument("--again", action="store_true", help="of a file whose code has a record "
                                                             "the survivors alone")
    parser.add_argument("--named", action="store_true", help="the mutants mutants.toml names")
    parser.add_argument("--lines", help="only mutants of these lines: 12,40-60")
    parser.add_argument("--seconds", type=int, help="limit of one mutant's run (default: from the "
                                                    "run without mutation)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    given = parser.parse_args()
    kept, part = Kept(ROOT / "scripts/mutants.json"), os.environ.get("SHARD", "")
    if given.told:
        print(kept.told(files()))
        return 0
    if given.all or given.left:
        given.names += shared_out(kept.left(files()) if given.left else list(files()), part)
        if given.left and not given.names:
            print(kept.told(files()))
            return 0
    if not given.names and not given.named:
        parser.error("name a method or a file below src/burnish, or give --all, --left or --named")
    lines, work, made_of = chosen(given.lines), [], {}
    for of in map(subject, given.names):
        made_of[of.name] = code(of.file)
        every = list(mutants(of.file.read_text("utf-8")))
        if stale := set(of.equivalent) - {m.name for m in every}:
            sys.exit(f"equivalent/{of.name}.toml: {of.name} has no mutant {sorted(stale)}")
        if given.again:
            every = kept.survivors(of.name, made_of[of.name], every)
        work.append((of, [m for m in every if lines is None or m.line in lines]))
    work += named() if given.named else []
    if given.list:
        for of, every in work:
            for m in every:
                print(f"{of.place}:{m.line}: {m.name}")
        return 0
    tallies = []
    ready = all(of.place.startswith("src/burnish/methods/") for of, _ in work)
    with copied() as package:
        for k, (of, every) in enumerate(work):
            named_one = k >= len(given.names)                   # the suite runs tests of these
            t = judge(of, every, package, given.seconds, named_one and bool(k), ready)
            tallies.append(t)
            if lines is None and not named_one:
                kept.keep(of.name, made_of[of.name], t.killed, t.equivalent,
                          [m.name for m in t.live], more=given.again)
    for of, tally in zip([of for of, _ in work], tallies, strict=True):
        for m in tally.live:
            print(f"{of.place}:{m.line}: {m.name}")
    print(table(tallies))
    print(summary(tallies), flush=True)
    return int(any(t.live for t in tallies))


if __name__ == "__main__":
    sys.exit(main())
