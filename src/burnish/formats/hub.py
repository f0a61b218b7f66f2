"""Names and folders: a local folder first, then the hub's cache, then the hub.

``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean everywhere.
Only weights in safetensors and text are fetched: no pickles, and no code unless
`trust_remote_code` asks for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import BurnishError, ConfigError, FormatError, nearest
from ..core.reading import beside, plain
from . import safe
from .folder import CONFIG, TENSORS

#: configuration, tokenizers, templates, words about it
TEXT = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "LICENSE*"]
INDEX = "model.safetensors.index.json"
MODEL = "model.safetensors"

#: commits that names stood for when they were first asked in this process: one run, one commit
_met: dict[tuple[str, str], str] = {}


def local(name: str | Path, weights: bool = False, code: bool = False) -> str:
    """The folder (or file) behind a name, for libraries that read folders.

    What exists is returned as it is. `weights`: with its weights, else with configuration and
    tokenizer alone. The same commit as whenever this process asked for it before.
    """
    if Path(name).expanduser().exists():
        return str(name)
    return str(resolve(name, trust_remote_code=code, weights=weights, again=False))


def resolve(name: str | Path, revision: str | None = None, trust_remote_code: bool = False,
            cache_dir: str | Path | None = None, weights: bool = True, again: bool = True) -> Path:
    """The local folder (or file) behind a name.

    An existing path is returned as it is and never looked up; ``owner/name`` is taken from the
    hub's cache or downloaded: text first, then those weights in safetensors that it names.
    again: ask the hub which commit `revision` is now.

    Raises ConfigError for what is neither, for what the hub does not show to us and for weights
    that are only pickled; BurnishError when the hub cannot be reached or does not do its work.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = str(name)
    if not text or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ConfigError(f"{text!r}: no such file or folder{nearest(path.name, beside(path))}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{text!r} is no local folder, and the hub needs huggingface-hub: "
                          "pip install 'burnish[fit]'") from None
    key = (text, f"{revision} {cache_dir or ''}")

    def fetch(patterns: list[str], at: str | None) -> Path:
        return Path(snapshot_download(text, revision=at, allow_patterns=patterns,
                                      cache_dir=cache_dir))

    with errors(text, revision):
        folder = fetch(TEXT + (["*.py"] if trust_remote_code else []),
                       revision if again else _met.get(key, revision))
        _met[key] = folder.name
    if weights:
        with errors(text, revision, begun=True):
            fetch([*_weights(folder), "*config.json"], folder.name)
    if weights and any((folder / f).is_file() for f in (CONFIG, "config.json")):
        _check_there(folder, text)
    return folder


def _weights(folder: Path) -> list[str]:
    """The files in which a repository has its weights: an index's shards, or the usual names.
    Copies in other formats beside them are not fetched."""
    index = folder / INDEX
    if not index.is_file():
        return [MODEL, TENSORS]
    return [*(f.name for f in safe.weight_files(folder)), TENSORS]


def _check_there(folder: Path, name: str) -> None:
    """Raises FormatError where the weights are not in safetensors."""
    if any((folder / f).is_file() for f in _weights(folder)):
        return
    found = []
    with contextlib.suppress(Exception):                 # to say which; that there are none stands
        from huggingface_hub import HfApi

        found = sorted(f for f in HfApi().list_repo_files(name, revision=folder.name)
                       if f.endswith(safe.PICKLES))
    wanted = MODEL if (folder / "config.json").is_file() else TENSORS
    why = f"its weights are in {found[0]}, which may hold a pickle and is not opened" if found \
        else f"there is no {wanted}"
    raise FormatError(f"{name} holds no weights in safetensors: {why}")


def near(name: str) -> str:
    """Folders beside a place where nothing is, whose name is like it: the tail of an error."""
    path = Path(name).expanduser()
    if path.exists() or not path.parent.is_dir():
        return ""
    there = {n: str(Path(name).with_name(n)) for n in beside(path)
             if path.with_name(n).is_dir()}
    close = nearest(path.name, there)
    for short, whole in there.items():
        close = close.replace(repr(short), repr(whole))
    return close


# -- what the hub says -------------------------------------------------------------------------
@contextlib.contextmanager
def errors(name: str, revision: str | None, done: str = "fetched", begun: bool = False
            ) -> Iterator[None]:
    """Whatever the hub's client raises inside, in our words; its bars are for terminals."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silent = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if silent:
        disable_progress_bars()
    try:
        yield
    except BurnishError:
        raise
    except Exception as e:
        raise _said(e, name, revision, done, begun) from None
    finally:
        if silent:
            enable_progress_bars()


def _said(e: Exception, name: str, revision: str | None, done: str, begun: bool) -> BurnishError:
    """begun: some of it lies in the cache."""
    from huggingface_hub import errors as kinds

    status = _status(e)
    if isinstance(e, kinds.HFValidationError):
        return ConfigError(f"{name!r} is neither a local path nor a hub name (owner/name)"
                           f"{near(name)}" if done == "fetched" else plain(e))
    if isinstance(e, kinds.GatedRepoError):
        return ConfigError(f"{name} is gated: ask for access on its page on the hub, and give the "
                           "token of who has it as HF_TOKEN")
    if status == 401 and "credentials" in str(e):
        return ConfigError(f"{name} could not be {done}: the hub does not know this token "
                           "(HF_TOKEN, or the one that was kept at login)")
    if isinstance(e, kinds.RepositoryNotFoundError):
        return ConfigError(f"{name}: there is no such folder here, and the hub knows no such name "
                           f"(a private one needs HF_TOKEN){near(name)}")
    if isinstance(e, kinds.RevisionNotFoundError):
        return ConfigError(f"{name} has no revision {revision or 'main'!r}")
    if status == 401:
        return ConfigError(f"{name} could not be {done}: the hub wants a token (HF_TOKEN)")
    if status == 403:
        return ConfigError(f"{name} could not be {done}: this token (HF_TOKEN) does not allow it"
                           + (", it needs the right to write there" if done == "pushed" else ""))
    if status is not None:
        return BurnishError(f"{name} could not be {done}: the hub answered {status}")
    nowhere = isinstance(e, kinds.LocalEntryNotFoundError | kinds.OfflineModeIsEnabled)
    if isinstance(e, kinds.IncompleteSnapshotError) or (nowhere and begun):
        return BurnishError(f"{name}: the copy in the hub's cache is not whole, and {_why()}")
    if nowhere:
        return ConfigError(f"{name}: there is no such folder here, nothing of that name is in the "
                           f"hub's cache, and {_why()}{near(name)}")
    if _sent(e):
        broke = f"the connection broke off ({plain(e)}); what has come whole is kept"
        return BurnishError(f"{name} could not be {done}: "
                            + (_why() if "Connect" in type(e).__name__ else broke))
    said = getattr(e, "strerror", None) or plain(str(e).strip().partition("\n")[0]) or \
        type(e).__name__
    return BurnishError(f"{name} could not be {done}: {said}")


def _sent(e: Exception) -> bool:
    """Is it of what carries requests, which has had more than one name?"""
    return any(c.__name__ == "TransportError" for c in type(e).__mro__)


def _status(e: BaseException | None) -> int | None:
    """The HTTP status that an error, or what it was raised from, speaks of."""
    while e is not None:
        if (answer := getattr(e, "response", None)) is not None:
            return int(answer.status_code)
        e = e.__cause__
    return None


def _why() -> str:
    from huggingface_hub import constants

    if offline():
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({constants.ENDPOINT})"


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
