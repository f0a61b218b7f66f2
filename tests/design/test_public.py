"""The public names: they are what design and documentation call them, and they last."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import burnish

NAMES = {
    "tune", "Tuned", "load", "open_model", "shard", "simulate", "measure", "plan", "fit",
    "TrainerCallback", "BlackBox", "continual",
    "methods", "export_peft", "load_peft", "repeat_blocks", "push", "pull", "MemoryReport",
    "Method",
    "setting",
    "register",
    "Recipe", "parse", "BurnishError", "ConfigError", "RecipeError", "TargetError", "DataError",
    "FormatError", "NoPlanError", "CheckError", "MemoryExceeded", "__version__",
}


def test_the_public_names_are_these():
    assert set(burnish.__all__) == NAMES
    assert set(dir(burnish)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_a_public_name_explains_itself(name):
    value = getattr(burnish, name)
    assert callable(value)
    assert (inspect.getdoc(value) or "").strip()


def test_the_version_is_the_package_s():
    from importlib.metadata import version

    assert burnish.__version__ == version("burnish")


@pytest.mark.parametrize("first", [
    "import burnish.methods.delta.lowrank.lora", "import burnish.fit.data", "burnish.methods()",
    "from burnish.core import registry; registry.catalogue()",
])
def test_functions_stay_functions_though_packages_bear_their_names(first):
    code = (f"import burnish\n{first}\n"
            "import burnish.methods.delta.lowrank.lora, burnish.fit.data\n"
            "assert callable(burnish.fit) and len(burnish.methods()) > 1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ARGUMENTS = {
    "tune": ["model", "recipe", "targets", "head", "calibration", "example", "seed"],
    "load": ["model"],
    "simulate": ["model", "recipe", "batch", "dtype"],
    "measure": ["tuned", "batch"],
    "plan": ["memory", "batch", "prefer"],
    "export_peft": ["tuned"],
    "load_peft": ["model"],
    "push": ["folder", "repo_id", "private", "revision", "message"],
    "pull": ["repo_id", "output", "revision"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_keep_their_names(name):
    assert set(ARGUMENTS[name]) <= set(inspect.signature(getattr(burnish, name)).parameters)
