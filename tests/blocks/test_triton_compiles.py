"""What Triton's interpreter accepts is more than its compiler does: all kernels are compiled, for
GPUs that need not be there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import burnish

HERE = Path(__file__).parent
#: bytes of shared memory that a program may have (compute capability 8.6 has least, 99 KiB)
SHARED = 99 << 10


def test_every_kernel_compiles(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(HERE / "triton_compile_work.py"), "80", "wide"],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert not {name for name, _, shared in rows if int(shared) > SHARED}
    kernels = {f"{path.stem}.{f.name}"
               for path in (Path(burnish.__file__).parent / "blocks/gpu").glob("*_kernels.py")
               for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)
               and any(isinstance(n, ast.Attribute) and n.attr == "program_id"
                       for n in ast.walk(f))}
    assert {name for name, *_ in rows} == kernels and kernels


def test_the_benchmark_runs_without_a_gpu(tmp_path):
    """Its checks, counts and table; figures are a GPU's, and refused where there is none."""
    script, out = HERE.parents[1] / "benchmarks/kernels.py", tmp_path / "k.jsonl"
    env = {**os.environ, "TRITON_INTERPRET": "1"}

    def run(*words):
        return subprocess.run([sys.executable, str(script), *words], env=env, capture_output=True,
                              text=True)

    done = run("--tiny", "--turns", "1", "--out", str(out), "product", "entries")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and not any("bandwidth" in r or "rate" in r for r in rows)
    assert len(run("--table", str(out)).stdout.splitlines()) == 8
    refused = run("product")
    assert refused.returncode == 1 and "none is here" in refused.stderr
