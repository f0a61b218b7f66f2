"""What the word after a command stands for: a folder, a config file or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.architecture import architecture
from ..core.errors import ConfigError, nearest
from ..core.reading import beside


def config(target: str) -> Any:
    """The transformers configuration of a model folder, a JSON file or a hub name.

    Code that comes with a model is never run. Raises ConfigError when there is none.
    """
    transformers = needs_transformers("model configurations")
    from ..formats.hub import near
    from ..formats.model_files import loading, unfound

    path = Path(target)
    if path.name == "config.json":
        path = path.parent
    elif not path.exists() and _looks_local(target):
        raise ConfigError(_nothing_at(path))
    elif path.is_dir() and not (path / "config.json").exists():
        raise ConfigError(f"{path} holds no config.json, so it is no model folder")
    elif path.is_file() and path.suffix != ".json":
        raise ConfigError(f"{path} is a file; expected a model folder, a config as JSON "
                          "(config.json) or a name on the hub")
    name = str(path) if path.exists() else target
    with loading(name, "the configuration of") as where:
        try:
            return transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        except (OSError, KeyError) as error:
            raise ConfigError(f"no model configuration in {target}: {unfound(name, error)}"
                              f"{near(name)}") from None


def model(target: str, dtype: str | None = None) -> Any:
    """The model of a folder or a hub name with its weights, as what its config stands for."""
    transformers = needs_transformers("models")
    from ..formats.hub import near
    from ..formats.model_files import check_weights, loading, named, unfound

    found = config(target)
    cls: Any = architecture(found)
    if not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"{target} names {cls.__name__}, which is no model of transformers")
    with loading(target, "the weights of", weights=True) as where:
        check_weights(where, lambda: cls(found))
        try:
            made = cls.from_pretrained(where, dtype=dtype or "auto", trust_remote_code=False,
                                       use_safetensors=True)
            return named(made, target) if where != target else made
        except OSError as error:
            raise ConfigError(f"cannot load the weights of {target}: {unfound(target, error)}"
                              f"{near(target)}") from None


def needs_transformers(what: str) -> Any:
    """The module, or one line that says how to get it."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ConfigError(f"{what} are read with transformers: pip install 'burnish[fit]'"
                          ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _looks_local(target: str) -> bool:
    return target.startswith((".", "/", "~")) or target.count("/") != 1


def _nothing_at(path: Path) -> str:
    return f"there is nothing at {path}{nearest(path.name, beside(path))}"
