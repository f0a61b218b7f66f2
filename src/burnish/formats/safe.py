"""Files that are either whole or not there: safetensors and JSON, written atomically.

A file is written beside its place under another name, flushed to the disk and renamed over the
old one, so a crash or a full disk leaves what was there. Nothing is ever pickled; files that may
hold pickles are refused by name.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as _write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import BurnishError, FormatError
from ..core.reading import LARGEST, parse_json, plain, read_text, regular

#: weights of a whole model, as transformers and diffusers call them
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
#: endings of files that run code when they are opened
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ALIASES = "aliases"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends without an error.

    Raises BurnishError when the disk is full or not writable; the old file is then untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as e:
        raise BurnishError(f"cannot write {path}: {e.strerror or e}") from None
    temp = Path(name)
    try:
        yield temp
        temp.chmod(0o666 & ~_umask())
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temp, path)
    except (OSError, SafetensorError) as e:
        raise BurnishError(f"cannot write {path}: {reason(e)}; "
                           "what was there before is untouched") from None
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Raises BurnishError where a file of this name cannot be written, before work that ends in it.
    Its folder is made."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise BurnishError(f"cannot write {path}: {e.strerror or e}") from None


def is_temporary(path: Path) -> bool:
    """A file that :func:`atomic` was writing when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def reason(e: Exception) -> str:
    return str(getattr(e, "strerror", None) or e).rpartition("I/O error: ")[2]


def sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk; systems that cannot open a folder need no such call."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# -- tensors --------------------------------------------------------------------------------
def save_file(tensors: Mapping[str, Tensor], path: str | Path,
              metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically.

    Names of one and the same tensor are stored once and recorded as aliases; a sharded tensor is
    gathered first (every process must call).
    """
    stored, aliases = laid_out(tensors)
    meta = {"format": "pt", **(metadata or {})}
    if aliases:
        meta[_ALIASES] = json.dumps(aliases, sort_keys=True)
    with atomic(path) as temp:
        _write(stored, str(temp), metadata=meta)


def laid_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors as a file holds them: contiguous, each with a storage of its own; further names of
    one and the same tensor)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[Any] = set()
    for name, tensor in tensors.items():
        t = tensor.detach()
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        key = (t.device, _begins(t), t.shape, t.stride(), t.dtype)
        if t.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        t = t.contiguous()
        owner = _begins(t, whole=True)
        stored[name] = t.clone() if owner in storages else t      # another view of one storage
        storages.add(owner)
    return stored, aliases


def _begins(t: Tensor, whole: bool = False) -> Any:
    """Where its bytes begin, or with `whole` those of its storage; of a fake one, what says it."""
    if isinstance(t, FakeTensor):
        return (t.untyped_storage()._cdata, 0 if whole else t.storage_offset())
    return t.untyped_storage().data_ptr() if whole else t.data_ptr()


def load_file(path: str | Path, device: str | torch.device = "cpu",
              names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or only `names`; the rest is never read.

    Raises FormatError for a missing, truncated or foreign file, a pickle, or an unknown name.
    """
    with opened(path, device) as (f, aliases), _as_safetensors(path):
        stored = set(f.keys())
        wanted = [*f.keys(), *aliases] if names is None else list(names)
        out: dict[str, Tensor] = {}
        for name in wanted:
            source = aliases.get(name, name)
            if source not in stored:
                raise FormatError(f"{path} holds no tensor {name!r}")
            out[name] = out[source] if source in out else f.get_tensor(source)
        return out


@contextmanager
def opened(path: str | Path, device: str | torch.device = "cpu") -> Iterator[tuple[Any, dict]]:
    """(memory-mapped file, aliases): for reading tensor by tensor."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise FormatError(f"{path} may hold a pickle, which runs code when opened; "
                          "expected a .safetensors file")
    regular(path)
    with _as_safetensors(path):
        file = safe_open(str(path), "pt", device=str(device))
        text = (file.metadata() or {}).get(_ALIASES, "{}")
        aliases = parse_json(text, f"{path}, entry {_ALIASES!r}")
        if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
            raise FormatError(f"{path}: entry {_ALIASES!r} should map names to names")
        if lost := set(aliases.values()) - set(file.keys()):
            raise FormatError(f"{path}: entry {_ALIASES!r} names {plain(repr(min(lost)), 60)}, "
                              "which the file does not hold")
    with file as f:
        yield f, aliases


@contextmanager
def _as_safetensors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (BurnishError, MemoryError):
        raise
    except Exception as e:                           # RuntimeError and TypeError among them
        raise FormatError(f"{plain(path)} is truncated or no safetensors file "
                          f"({plain(e)})") from None


def header(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, aliases included, without reading a tensor."""
    with opened(path) as (f, aliases), _as_safetensors(path):
        shapes = {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
        return shapes | {a: shapes[n] for a, n in aliases.items() if n in shapes}


def layout(path: str | Path
           ) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], int]], dict[str, str]]:
    """(name -> dtype, shape, first byte in the file; aliases) of a safetensors file."""
    with opened(path) as (f, aliases):               # which looks whether the header is sound
        names = set(f.keys())
    with open(path, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        told = json.loads(raw.read(size))
    out = {}
    for name in names:
        slot = told[name]
        if slot["dtype"] not in _DTYPES:
            raise FormatError(f"{path}: {plain(name, 60)} holds {plain(slot['dtype'], 20)}, which "
                              "cannot be read piece by piece")
        out[name] = (_DTYPES[slot["dtype"]], tuple(slot["shape"]),
                     8 + size + slot["data_offsets"][0])
    return out, aliases


class Tensors(Mapping[str, Tensor]):
    """A checkpoint on disk as a mapping: a tensor is read when it is asked for, and not kept.

    path: a .safetensors file, or a folder with model.safetensors, adapter_model.safetensors or
    shards and their index.
    """

    def __init__(self, path: str | Path):
        self.files: dict[str, Path] = {}
        self.aliases: dict[str, str] = {}
        for file in weight_files(Path(path)):
            with opened(file) as (f, aliases):
                self.files.update(dict.fromkeys(f.keys(), file))
                self.aliases.update(aliases)

    def __getitem__(self, name: str) -> Tensor:
        name = self.aliases.get(name, name)
        if name not in self.files:
            raise KeyError(name)
        with opened(self.files[name]) as (f, _), _as_safetensors(self.files[name]):
            return f.get_tensor(name)

    def meta(self, name: str) -> Tensor:
        """Its shape and dtype, on the meta device: nothing but the header is read."""
        name = self.aliases.get(name, name)
        if name not in self.files:
            raise KeyError(name)
        with opened(self.files[name]) as (f, _), _as_safetensors(self.files[name]):
            part = f.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            return f.get_tensor(name).to("meta") if dtype is None else \
                torch.empty(tuple(part.get_shape()), dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter([*self.files, *self.aliases])

    def __len__(self) -> int:
        return len(self.files) + len(self.aliases)


def weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = next((i for n in _WHOLE if (i := path / f"{n}.index.json").is_file()), None)
    if index is not None:
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(s, str) for s in named.values()):
            raise FormatError(f"{index}: field 'weight_map' should map tensors to files")
        shards = sorted(set(named.values()))
        return [path / Path(s).name for s in shards]
    for name in (*_WHOLE, "adapter_model.safetensors"):
        if (path / name).is_file():
            return [path / name]
    raise FormatError(f"{path} holds no model.safetensors" + (
        "; pickled weights are not opened" if any(p.suffix in PICKLES for p in path.iterdir())
        else ""))


_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
          torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
          torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def save_stream(tensors: Iterable[tuple[str, Tensor]], like: Mapping[str, Tensor],
                path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint one tensor at a time, so no more than one of them is in memory.

    like: names, shapes and dtypes of what will come (values are not read where a checkpoint can
    tell without). Raises FormatError when something else comes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in like:
        t = like.meta(name) if isinstance(like, Tensors) else like[name]
        if t.dtype not in _CODES:
            raise FormatError(f"{name}: safetensors has no code for {t.dtype}")
        header[name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = {n for n in header if n != "__metadata__"}
    with atomic(path) as temp, open(temp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, t in tensors:
            slot = header.get(name, {})
            if (name not in missing or slot["dtype"] != _CODES.get(t.dtype)
                    or slot["shape"] != list(t.shape)):
                raise FormatError(f"{name} ({t.dtype}, {list(t.shape)}) does not belong in {path}")
            missing.discard(name)
            f.seek(8 + len(text) + slot["data_offsets"][0])
            flat = t.detach().cpu().contiguous().view(-1)
            if flat.numel():
                f.write(flat.view(torch.uint8).numpy())
        if missing:
            raise FormatError(f"{path}: {sorted(missing)[0]} did not come")


def metadata(path: str | Path) -> dict[str, str]:
    """The text entries of a safetensors header."""
    with opened(path) as (f, _):
        return dict(f.metadata() or {})


# -- text -----------------------------------------------------------------------------------
def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temp, open(temp, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


def write_json(path: str | Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, finite: bool = False) -> dict[str, Any]:
    """A JSON object, with `finite` one without NaN and infinity; anything else is a FormatError
    that names the line."""
    data = parse_json(read_text(path, largest=LARGEST), path, finite=finite)
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
