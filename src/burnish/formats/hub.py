"""Names and folders: a local folder first, then the hub's cache, then the hub.

``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean everywhere.
Only weights and text are fetched: no pickles, and no code unless `trust_remote_code` asks for it.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import BurnishError, ConfigError, FormatError, nearest
from ..core.reading import beside
from .folder import CARD, CONFIG, RUN, TENSORS, read_config
from .model_files import near

#: what a snapshot brings: weights in safetensors, configuration, tokenizers, templates
PATTERNS = ["*.safetensors", "*.json", "*.jsonl", "*.txt", "*.model", "*.tiktoken", "*.jinja",
            "*.md", "LICENSE*"]


def resolve(name: str | Path, revision: str | None = None, trust_remote_code: bool = False,
            cache_dir: str | Path | None = None) -> Path:
    """The local folder (or file) behind a name.

    An existing path is returned as it is and never looked up; ``owner/name`` is taken from the
    hub's cache or downloaded. Raises ConfigError for what is neither, BurnishError when the hub
    cannot be reached or refuses.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if not text or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ConfigError(f"{text!r}: no such file or folder{nearest(path.name, beside(path))}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise ConfigError(f"{text!r} is no local folder, and the hub needs huggingface-hub: "
                          "pip install 'burnish[fit]'") from None
    patterns = PATTERNS + (["*.py"] if trust_remote_code else [])
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns,
                                      cache_dir=cache_dir))
    except HFValidationError:
        raise ConfigError(f"{text!r} is neither a local path nor a hub name "
                          f"(owner/name){near(text)}") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{text!r} is no local folder and the hub knows no such name "
                          f"(a private one needs HF_TOKEN){near(text)}") from None
    except RevisionNotFoundError:
        raise ConfigError(f"{text!r} has no revision {revision!r}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if _offline() else "the hub cannot be reached"
        raise BurnishError(f"{text!r} is no local folder, is not in the hub's cache, and "
                           f"{why}{near(text)}") from None
    except (HfHubHTTPError, OSError) as e:
        raise BurnishError(f"{text!r} could not be fetched: {str(e).splitlines()[0]}") from None


def push(folder: str | Path, repo_id: str, private: bool = True,
         message: str = "Upload adapter") -> str:
    """Upload an adapter folder to the hub (a private repository unless told); returns its address.

    Raises FormatError when `folder` is no adapter folder, BurnishError when offline or refused.
    """
    read_config(folder)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ConfigError("pushing needs huggingface-hub: pip install 'burnish[fit]'") from None
    if _offline():
        raise BurnishError("HF_HUB_OFFLINE is set: nothing is pushed")
    if not (Path(folder) / TENSORS).is_file():
        raise FormatError(f"{folder} has no {TENSORS}")
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message,
                                 allow_patterns=[CONFIG, TENSORS, CARD, RUN])
    except HFValidationError as e:
        raise ConfigError(str(e)) from None
    except (HfHubHTTPError, OSError) as e:
        raise BurnishError(f"{repo_id!r} could not be pushed: {str(e).splitlines()[0]}") from None
    return str(done)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
