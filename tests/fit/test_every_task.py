"""What is promised of every task that is served: a small model of each, from a folder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.dtypes import PLAIN, SHORT, dtype_of
from burnish.core.errors import ConfigError
from burnish.fit.finished import Finished
from burnish.fit.tasks import TASKS
from burnish.testing.tasks import posed


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_base_is_held_in_the_numbers_that_are_asked_for(tmp_path, task):
    """Read, trained, evaluated, and opened again as it was."""
    base, data, how = posed(task, tmp_path)
    run = burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "run", max_steps=2,
                      dtype="bf16", lr=0.1, batch_size=how.pop("batch_size", 2),
                      validation=0, quiet=True, report=False,
                      measure=False, save_strategy="no", **how)
    assert run.facts["data"]["task"] == task
    again = Finished.open(tmp_path / "run", trust=how.get("trust_remote_code", False))
    held = {p.dtype for n, p in again.tuned.model.named_parameters() if ".burnish." not in n}
    assert torch.bfloat16 in held
    assert "loss" in again.evaluate(str(data))["tuned"]


def test_every_name_of_numbers_is_known_and_others_are_refused():
    for name in PLAIN:
        kind = getattr(torch, name)
        assert dtype_of(name) is dtype_of(str(kind)) is dtype_of(kind) is kind
    assert {dtype_of(n) for n in SHORT} <= {getattr(torch, n) for n in PLAIN}
    assert dtype_of(None) is dtype_of("auto") is None
    for name in ("int8", torch.int8, "float8_e4m3fn", "bfloat", "nn", "", 16):
        with pytest.raises(ConfigError, match="dtype=.*expected one of float32"):
            dtype_of(name)
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        dtype_of("bf61")


def test_numbers_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="expected one of float32"):
        burnish.fit("nowhere", "nothing.csv", dtype="int8", output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"there in torch.float32; hand over model.to"):
        burnish.fit(nn.Linear(2, 2), "digits", dtype="bf16", output=tmp_path / "out")
    with pytest.raises(ConfigError, match="expected one of float32"):
        burnish.open_model(str(tmp_path), "bf17")
