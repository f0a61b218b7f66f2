"""How one of several processes ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALL = """
import atexit, sys, torch.distributed as dist
import burnish.cli as cli
from burnish.core import processes
atexit.register(lambda: print("a tracker's last words"))
together, code = sys.argv[1] == "True", int(sys.argv[2])
if together:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
else:
    import torch
cli.main = lambda: code
code = cli.run()
print("goes on")
sys.exit(code)
"""


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("code", [0, 3])
def test_what_others_registered_runs_and_the_code_is_the_works(together, code, tmp_path):
    done = subprocess.run([sys.executable, "-c", CALL, str(together), str(code), tmp_path / "s"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["goes on"] * (not together) + ["a tracker's last words"]
