"""What a run shows and writes while it goes: metrics.jsonl, one bar, and a stop that keeps."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from ..core.errors import BurnishError
from ..formats import claim, safe
from ..memory import format_bytes
from .stages import Leg

#: what counts first, so that a narrow terminal cuts off the least
LINE = "{n_fmt}/{total_fmt} |{bar:14}| {rate_noinv_fmt}, {remaining} left{postfix}"


class Metrics(transformers.TrainerCallback):
    """One line of JSON per log and per evaluation, written as it happens.

    Steps are counted over the whole run, and a line says its stage where there are several. A
    resumed run drops the lines of steps it will take again, so that each step stands once. With an
    accelerator a line has the most bytes of tensors there so far, `device_peak`.
    """

    def __init__(self, path: Path, resumed_at: int | None, leg: Leg):
        self.path, self.leg = path, leg
        growing(path, resumed_at)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": self.leg.before + state.global_step, "time": round(time.time(), 3),
               **({"stage": self.leg.name} if self.leg.name else {}),
               **{k: v for k, v in logs.items() if isinstance(v, int | float | str)}}
        if (peak := device_peak()) is not None:
            row["device_peak"] = peak
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v
               for k, v in row.items()}
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise BurnishError(f"cannot write {self.path}: {e.strerror or e}; the checkpoints "
                               "so far are whole, resume=True goes on from the last") from None


def growing(path: Path, resumed_at: int | None) -> None:
    """A file of lines that is ours, with those of the steps up to where the run goes on."""
    if int(os.environ.get("RANK", "0")):
        return
    kept: list[str] = []
    if resumed_at is not None and path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):      # the last line of a killed process
                if json.loads(line)["step"] <= resumed_at:
                    kept.append(line)
    claim.own(path.parent, [path.name], "adapter")
    safe.write_text(path, "".join(f"{line}\n" for line in kept))


class Bar(transformers.TrainerCallback):
    """One line: how far, how fast, the loss, and a device's peak against the promise.

    Silent off-terminal.
    """

    def __init__(self, promise: int | None, quiet: bool, leg: Leg):
        self.promise, self.quiet, self.bar, self.leg = promise, quiet, None, leg
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        from tqdm.auto import tqdm

        off = self.quiet or not state.is_world_process_zero or not sys.stderr.isatty()
        line = f"{self.leg.name} {LINE}" if self.leg.name else LINE
        self.bar = tqdm(total=self.leg.total or state.max_steps, disable=off, bar_format=line,
                        initial=self.leg.before + state.global_step, dynamic_ncols=True,
                        unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.leg.before + state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if self.bar is None or self.bar.disable:
            return
        for key in ("loss", "eval_loss", "eval_accuracy"):
            if key in (logs or {}):
                self.shown[key.removeprefix("eval_")] = f"{logs[key]:.4g}"
        peak = device_peak()
        if peak is not None:                    # both are bytes of tensors on the device
            against = f" of {format_bytes(self.promise)}" if self.promise else ""
            self.shown["peak"] = f"{format_bytes(peak)}{against}"
        self.bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in self.shown.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Stop(transformers.TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; twice, at once."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.asked is not None:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.asked is not None and state.epoch != round(state.epoch):
            # the loop closes the epoch it broke off; a run without the stop would not have
            control.should_save = control.should_evaluate = control.should_log = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heard inside the block (in the main thread; elsewhere nothing changes)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def hear(number: int, frame: Any) -> None:
            if self.asked is not None:
                signal.signal(number, before[signal.Signals(number)])
                raise KeyboardInterrupt
            self.asked = number

        for s in before:
            signal.signal(s, hear)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def device_peak() -> int | None:
    """Peak bytes of tensors on the accelerator; None without one (what a whole process takes, its
    libraries included, is no measure of a step)."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
