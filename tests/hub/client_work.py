"""A process with the hub's settings in its environment, which runs one command line after another.

Each line of its input is ``{"argv": [...], "env": {...}}``, or ``{"run": "code"}``; each line of
its output what came of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys


def main() -> None:
    from burnish.cli import main as burnish

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        for name, value in asked.get("env", {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if "run" in asked:
                exec(asked["run"], {})
            else:
                code = burnish(asked["argv"])
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}),
              file=answers, flush=True)


if __name__ == "__main__":
    main()
