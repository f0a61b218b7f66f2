"""What is not installed is said with the extra that brings it."""

from __future__ import annotations

import re
from importlib.metadata import packages_distributions

import pytest

from burnish.core.errors import ConfigError
from burnish.core.extras import IMPORTED, OPTIONAL, told, worded


def absent(module):
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize(("module", "first", "package", "extra"), [
    ("transformers", "fit", "transformers", "fit"), ("PIL.Image", "fit", "pillow", "fit"),
    ("scipy.stats", "fit", "scipy", "scipy"), ("scipy.io", "audio", "scipy", "audio"),
    ("dp_accounting.pld", "fit", "dp-accounting", "privacy"), ("flwr", "ui", "flwr", "federated"),
])
def test_a_module_names_its_package_and_extra(module, first, package, extra):
    said = f"this needs {package}, which is not installed: pip install 'burnish[{extra}]'"
    assert told(absent(module), first) == said
    with pytest.raises(ConfigError, match=re.escape(said)), worded(first):
        raise absent(module)


def test_what_no_extra_brings_stays_what_it_is():
    for error in (absent("zzz"), ModuleNotFoundError("no name"), absent("burnish.zzz")):
        assert told(error) is None
        with pytest.raises(ModuleNotFoundError), worded():
            raise error


def test_names_of_modules_are_those_of_the_packages_that_are_here():
    here = packages_distributions()
    plain = {m: {re.sub(r"[-_.]+", "-", d).lower() for d in found} for m, found in here.items()}
    every = {p for packages in OPTIONAL.values() for p in packages}
    installed = every & {d for found in plain.values() for d in found}
    assert {"transformers", "pillow", "scikit-learn", "pyyaml"} <= installed
    for package in installed:
        module = IMPORTED.get(package, package.replace("-", "_"))
        assert package in plain.get(module, ()), f"{package} is not imported as {module}"
