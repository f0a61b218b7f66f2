"""The rest of ``burnish demo``: a second task, a file that opens elsewhere, the page.

Each ends in a check, as the first task does. What needs a package that is not there is left out,
and said.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError

#: recipe -> learning rate (of LoRA's 1e-3, 3e-3 and 5e-3 the best by validation: 50, 67 and 64 %);
#: the last is the one that is exported
TEXTS = {"linear_probe": 1e-2, "bitfit": 1e-2, "lora(rank=8)": 3e-3}
EPOCHS, BATCH = 6, 16
#: how far a promise of memory, and an answer of PEFT's, may be off
PROMISE, EQUAL = 0.03, 1e-5


class Tour:
    """say: where lines go. checks: (what, whether it holds), as the demo's. left: what was left
    out, and why."""

    def __init__(self, folder: Path, say: Any):
        self.folder, self.say = folder, say
        self.rows: list[dict[str, Any]] = []
        self.checks: list[tuple[str, bool]] = []
        self.left: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        return {"texts": self.rows, "left out": self.left,
                "checks": [{"what": w, "holds": h} for w, h in self.checks]}

    def take(self) -> None:
        self.say("\ntexts: docstrings of Python's standard library, by package; all-MiniLM-L6-v2")
        run = self._or_left(self.texts)
        if run is not None:
            self.say("\nexport: the adapter as PEFT reads it")
            self._or_left(lambda: self.exported(run))
        self.say("\npage: burnish ui on this folder")
        self._or_left(self.page)
        for what in self.left:
            self.say(f"  left out: {what}")

    def _or_left(self, part: Any) -> Any:
        try:
            return part()
        except ConfigError as e:               # a package that is not here
            self.left.append(str(e))
            return None

    # -- texts --------------------------------------------------------------------------------
    def texts(self) -> Any:
        """Three recipes on a second task; the run of the last."""
        import json

        import burnish

        from ..board.tasks import PACKAGES, docstrings
        from ..continual.real import encoder
        from ..formats import safe

        base, run = encoder(), None
        data = self.folder / "texts" / "data"
        data.mkdir(parents=True, exist_ok=True)
        for split, rows in docstrings().items():
            safe.write_text(data / f"{split}.jsonl", "".join(
                json.dumps({"text": t, "label": PACKAGES[y]}) + "\n" for t, y in rows))
        for recipe, rate in TEXTS.items():
            name = re.sub(r"\W+", "-", recipe).strip("-")
            run = burnish.fit(base, str(data), recipe, output=self.folder / "texts" / name,
                              learning_rate=rate, epochs=EPOCHS, batch_size=BATCH, max_length=16,
                              quiet=True, overwrite=True, seed=0)
            memory = run.facts["memory"]
            assert run.promise is not None and run.truth is not None        # neither is put off
            self.rows.append({"recipe": recipe, "accuracy": run.metrics["test"]["accuracy"],
                              "trained": run.facts["trainable"],
                              "promised": run.promise.peak_bytes,
                              "measured": run.truth.peak_bytes,
                              "difference": memory["difference"], "folder": str(run.folder)})
            self.say(f"  {recipe}: {100 * self.rows[-1]['accuracy']:.2f} % on test, "
                     f"{run.facts['trainable']:,} trained, memory {memory['difference']:+.2%} of "
                     "what was promised")
        probe, last = self.rows[0], self.rows[-1]
        self.check(f"{last['recipe']} above the linear probe ({100 * last['accuracy']:.2f} "
                   f"against {100 * probe['accuracy']:.2f} %)",
                   last["accuracy"] > probe["accuracy"])
        worst = max(abs(r["difference"]) for r in self.rows)
        self.check(f"promises of memory within {PROMISE:.0%} of what was measured (at most "
                   f"{worst:.2%} off)", worst <= PROMISE)
        return run

    # -- a file that opens elsewhere ------------------------------------------------------------
    def exported(self, run: Any) -> None:
        """The adapter in PEFT's own format, loaded by PEFT beside the base, answers alike."""
        import torch

        import burnish

        try:
            from peft import PeftModel
        except ImportError:
            raise ConfigError("the export is read with peft, which is not installed: pip install "
                              "'burnish[peft]'") from None
        from transformers import AutoModelForSequenceClassification

        from ..continual.real import Words, encoder

        folder = self.folder / "texts" / "peft"
        burnish.export_peft(run.tuned, folder)
        own = run.tuned.model.eval()
        base = AutoModelForSequenceClassification.from_pretrained(
            encoder(), num_labels=own.config.num_labels)
        theirs = PeftModel.from_pretrained(base, str(folder)).eval()
        batch = Words(encoder())(["Open a connection to the server.", "Return the logger's name."])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # theirs
            off = (own(**batch).logits - theirs(**batch).logits).abs().max().item()
        self.say(f"  {folder}: read by peft {_version('peft')}, answers {off:.1e} apart")
        self.check(f"the exported adapter answers in peft as here (at most {off:.1e} apart)",
                   off <= EQUAL)

    # -- the page -------------------------------------------------------------------------------
    def page(self) -> None:
        """The page is served on this machine, and shows the folder."""
        with served(self.folder) as address:
            with urllib.request.urlopen(address, timeout=30) as answer:
                text = answer.read().decode()
            self.say(f"  {address}: {len(text):,} characters; burnish ui {self.folder} opens it")
            self.check("the page of burnish ui is served", "<title>" in text and "burnish" in text)

    def check(self, what: str, holds: bool) -> None:
        self.checks.append((what, holds))


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """``burnish ui`` in a process of its own, which ends with this; its address."""
    source = str(Path(__file__).resolve().parents[2])
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [source, env.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-m", "burnish", "ui", str(root), "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        line = child.stdout.readline() if child.stdout else ""
        found = re.search(r"http://\S+", line)
        if found is None:
            child.kill()
            said = child.communicate()[1].strip().splitlines()
            why = said[-1] if said else line.strip()
            raise (ConfigError if "pip install" in why else BurnishError)(
                re.sub(r"^burnish: ", "", why) or "burnish ui said nothing")
        yield found.group()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
