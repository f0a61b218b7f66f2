"""What comes with each extra of the package, and the words for what is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
