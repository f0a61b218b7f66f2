"""Files of a model, in a folder here or in a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import BurnishError, ConfigError


def file_of(name: str, file: str) -> Path | None:
    """Where it lies, brought here from the hub if need be; None where the model has no such file.

    Raises ConfigError where that cannot be told.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except BurnishError:
        raise
    except Exception as e:
        if isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
            return None
        raise ConfigError(f"{name!r} is neither a folder here nor a model that could be loaded "
                          f"from the hub ({type(e).__name__})") from None
