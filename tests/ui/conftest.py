"""A page over a small root, its desk put aside, and a process that plays a run."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from burnish.core.errors import ConfigError
from burnish.ui.app import Ui, make
from burnish.ui.places import Places

HERE = "http://127.0.0.1:7788"
OWN = {"X-Burnish": "1"}

#: writes a few figures, then waits for SIGINT, as ``burnish fit`` does
PLAYED = '''
import json, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
config = json.loads((folder / "fit.json").read_text())
out = Path(config["output"])
out.mkdir(exist_ok=True)
(folder / "log.txt").write_text("it began\\n")
first = 1 + 3 * bool(config.get("resume"))
with (out / "metrics.jsonl").open("a") as f:
    for step in range(first, first + 3):
        f.write(json.dumps({"step": step, "time": time.time(), "loss": 1 / step, "epoch": step / 9})
                + "\\n")
import os
(folder / "process.json").write_text(json.dumps({"pid": os.getpid(), "started": time.time()}))
while not asked:
    time.sleep(0.02)
(out / f"checkpoint-{first + 2}").mkdir()
(folder / "ended.json").write_text(json.dumps({"code": 130, "time": time.time()}))
'''


class Played:
    """A desk that answers at once, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.says = [], {}

    async def ask(self, what, how):
        self.asked.append((what, how))
        yield {"progress": [1, 2]}
        yield self.says.get(what, {"answer": {"said": what}})

    async def one(self, what, how):
        return [m async for m in self.ask(what, how)][-1]

    async def end(self):
        pass


@pytest.fixture
def root(tmp_path):
    top = tmp_path / "root"
    (top / "models/vit").mkdir(parents=True)
    (top / "models/vit/config.json").write_text('{"model_type": "vit"}')
    (top / "data").mkdir()
    (top / "data/mails.csv").write_text("text,label\nhello,good\nbye,bad\n")
    (top / ".secret").write_text("hidden")
    (tmp_path / "outside.csv").write_text("text,label\nsecret,good\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a.csv").write_text("text,label\nsecret,good\n")
    return top


@pytest.fixture
def page(root, tmp_path):
    """The page on this machine: ``page.client``, its parts beside it."""
    ui = Ui(Places.of(root, root / "runs"), limit=1000, desk=Played(), trying=Played())
    (tmp_path / "played.py").write_text(PLAYED)
    ui.runs.command = (sys.executable, str(tmp_path / "played.py"))
    with TestClient(make(ui), base_url=HERE, headers=OWN) as client:
        yield SimpleNamespace(client=client, ui=ui, root=root)
        for run in ui.runs.all():                       # nothing is left going on
            while ui.runs.alive(ui.runs.folder(run["id"])):
                with contextlib.suppress(ConfigError):  # it ended meanwhile
                    ui.runs.stop(run["id"])
