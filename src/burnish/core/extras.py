"""What comes with each extra of the package, and the words for what is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from .errors import ConfigError

#: what each extra of the package brings
OPTIONAL = {
    "fit": ("transformers", "accelerate", "datasets", "huggingface-hub", "torchmetrics",
            "matplotlib", "jinja2", "pillow", "scikit-learn", "pyyaml"),
    "peft": ("peft",), "bitsandbytes": ("bitsandbytes",), "torchao": ("torchao",),
    "scipy": ("scipy",), "audio": ("scipy", "soundfile"), "privacy": ("dp-accounting",),
    "federated": ("flwr",), "triton": ("triton",), "search": ("optuna",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"), "ui": ("starlette", "uvicorn")}
#: packages that are imported by a name of their own
IMPORTED = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}


def told(error: ModuleNotFoundError, first: str = "fit") -> str | None:
    """Which extra brings the module that was not found, `first` before others; None: none does.

    >>> told(ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"))
    "this needs pillow, which is not installed: pip install 'burnish[fit]'"
    """
    wanted = (error.name or "").partition(".")[0]
    for extra in (first, *OPTIONAL):
        for package in OPTIONAL[extra]:
            if wanted and wanted == IMPORTED.get(package, package.replace("-", "_")):
                return (f"this needs {package}, which is not installed: "
                        f"pip install 'burnish[{extra}]'")
    return None


def installed(package: str) -> str | None:
    """Its version; None: it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def too_old() -> dict[str, dict[str, str]]:
    """Packages whose version is outside what burnish declares: extra ("" for what it cannot be
    without) -> package -> the versions that it wants, ``">=4.5"``. None of what is not installed,
    and nothing where burnish itself is not (run from its source)."""
    try:
        declared = [Requirement(r) for r in requires("burnish") or ()]
    except PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str]] = {}
    for extra in ("", *OPTIONAL):
        for r in declared:
            own = r.name in OPTIONAL[extra] if extra else "extra ==" not in str(r.marker)
            if own and (r.marker is None or r.marker.evaluate({"extra": extra})) and _outside(r):
                found.setdefault(extra, {})[r.name] = str(r.specifier)
    return found


def _outside(wanted: Requirement) -> bool:
    there = installed(wanted.name)
    try:
        return there is not None and not wanted.specifier.contains(Version(there),
                                                                   prereleases=True)
    except InvalidVersion:                 # a build with a name instead of a number: nobody can say
        return False


@contextmanager
def worded(first: str = "fit") -> Iterator[None]:
    """Within it, or within a function that it decorates, a module of an extra that is not installed
    is a ConfigError which names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if lacks := told(error, first):
            raise ConfigError(lacks) from None
        raise
