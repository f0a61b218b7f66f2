"""What a frozen network's blocks return, kept on disk sample by sample from epoch to epoch.

A run of blocks that drop nothing and do not train is one function of what its first block is given.
So a sample is told by a digest of just that: its rows of the states and of every other tensor the
first block reads (masks, positions), whatever its place in a batch and the size of that. Where all
samples of a batch are known no block runs, and each block's state is read when its turn comes.

A forward whose batch has new samples runs as ever and writes those to one file, block after block:
the states, then a footer that says where they stand, with a checksum of each. The file gets its
name when it is whole; what a kill leaves has none, and is cleared away by a later run. A file that
is damaged is deleted where that is noticed: the blocks go on from the last state that was right,
and it is made anew. States that are not finite are not kept: a fault would be served for ever.

A forward that leaves more behind than states (a key-value cache that is filled, attention maps)
runs the blocks, and so do transforms of torch.func.

Letters: B samples, n a block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.errors import FormatError, RecipeError
from ...core.followed import is_fake
from ..tape.executor import no_grad
from ..tape.functions import transformed
from .tap_files import PARTS, SUFFIX, Form, Shard, raw, read_into, unlink

VERSION, MARK = 1, "taps.json"
#: seconds after which a file that never became whole is nobody's any more
STALE = 3600.0
#: bytes that are left on the disk for others: a checkpoint that cannot be written is worse
RESERVE = 2**30
#: attributes of a module that do not change what a frozen block without a graph returns
PASSING = ("training", "gradient_checkpointing")

#: does a simulation read (as from the second epoch on), or write, which takes more?
_reading: ContextVar[bool] = ContextVar("taps_read", default=False)


@contextlib.contextmanager
def assumed_there() -> Iterator[None]:
    """Inside, a simulation takes it that all taps it has seen the form of are there."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


class TapCache:
    """The taps of one run of blocks, in a folder.

    folder: made at the first forward. It carries the fingerprint of the blocks (their classes,
        plain attributes and tensors) and serves those alone: FormatError for others, and for a
        folder that something else stands in.
    room: most bytes in it. When they are used, or the disk has hardly more than a GiB left, or a
        write fails, the run goes on: what is there is read, what is not is computed and no longer
        written, and one warning says so.

    read, written: samples so far.

    RecipeError where something else acts in the blocks, or they return more than a state.
    """

    def __init__(self, name: str, adapter: str, blocks: list[nn.Module], folder: str, room: int):
        self.name, self.adapter, self.blocks = name, adapter, blocks
        self.folder, self.room = Path(folder), room
        self.index: dict[str, tuple[Shard, int]] | None = None
        self.read = self.written = self.used = 0
        self.full = False
        self._stamp: Any = None
        self._salt = b""
        self._checked: Any = None
        self._seen: dict[int, Form] = {}             # forms, for a simulation that reads

    # -- a forward -------------------------------------------------------------------------------
    def run(self, who: Any, n: int, module: nn.Module, call: Callable[..., Any],
            args: tuple, kw: dict[str, Any], note: Callable[[], bool | None] = lambda: None
            ) -> tuple[Any, bool | None]:
        """(what block n returns, what `note` says after its run): read, or computed without a
        graph. who: the listener that asks."""
        box, key = who.here.box, ("tap cache", self.adapter)
        if n == 0:
            box[key] = self._begin(who, args, kw)
        way = box.pop(key, None)
        if isinstance(way, _Reading):
            made = way.state(n)
            if made is not None:
                if n + 1 < len(self.blocks):
                    box[key] = way
                else:
                    self.read += len(way.entries)
                return made
            way = None                               # the rest of the blocks runs on from here
        try:
            out = no_grad(module, call, args, kw)
            said = note()
            if way is not None:
                form = self._form(module, out, said, way.samples)
                way = way.add(n, out[0] if isinstance(out, tuple) else out, form)
        except BaseException:
            if way is not None:
                way.drop()
            raise
        if way is not None and n + 1 < len(self.blocks):
            box[key] = way
        return out, said

    def _begin(self, who: Any, args: tuple, kw: dict[str, Any]) -> _Reading | _Writing | None:
        given = args[0] if args else next(iter(kw.values()))
        if not len(given) or transformed() or kw.get("output_attentions") or any(
                hasattr(v, "get_seq_length") for v in (*args, *kw.values())):
            return None                              # a run that leaves more than states behind
        self._check(who, given)
        if is_fake(given):
            if _reading.get() and len(self._seen) == len(self.blocks):
                return _Reading(self, [(None, i) for i in range(len(given))], given)
            return _Writing(self, [], [], len(given), None)
        self._open()
        keys = self._keys(given, args, kw)
        assert self.index is not None
        found = [self.index.get(k) for k in keys]
        if all(found):
            return _Reading(self, found, given)
        rows = {k: i for i, (k, hit) in enumerate(zip(keys, found, strict=True)) if hit is None}
        wanted = len(self.blocks) * len(rows) * given[0].nbytes
        if not self.full:
            free = shutil.disk_usage(self.folder).free
            if self.used + wanted > self.room:
                self.stop(f"its room of {self.room:,} bytes is used")
            elif free < wanted + RESERVE:
                self.stop(f"the disk has {free:,} bytes left, and others write there too")
        if self.full:
            return None
        return _Writing(self, list(rows), list(rows.values()), len(given), self._part())

    def _form(self, module: nn.Module, out: Any, note: bool | None, samples: int) -> Form:
        state, *rest = out if isinstance(out, tuple) else (out,)
        if not isinstance(state, Tensor) or state.shape[:1] != (samples,) \
                or any(v is not None for v in rest) or len(rest) >= PARTS:
            raise RecipeError(f"{self.name}(cache=...): {type(module).__name__} returns more than "
                              "one state a sample, and only states are kept; leave cache out")
        return Form(state.dtype, tuple(state.shape[1:]), len(out) if rest or out is not state
                    else 0, note)

    # -- what it may serve -----------------------------------------------------------------------
    def _check(self, who: Any, given: Tensor) -> None:
        here = who.here
        samples = getattr(here, "samples", ())
        if samples and samples[0] != len(given):
            raise RecipeError(f"{self.name}(cache=...): the model was called with {samples[0]} "
                              f"samples and its first block with {len(given)} rows; samples are "
                              "kept one by one: leave cache out")
        active = tuple(here.active)
        now = (getattr(here, "version", None), active)
        if self._checked == now:
            return
        if others := [a for a, w in active if w and a != self.adapter]:
            raise RecipeError(f"{self.name}(cache=...): {others[0]!r} is in use beside "
                              f"{self.adapter!r}, and what blocks return would depend on it; use "
                              f"{self.adapter!r} alone, or leave cache out")
        for block in self.blocks:
            for path, m in block.named_modules():
                slot = m._modules.get("burnish")
                for x in getattr(slot, "listeners", ()):
                    if not _beside(x) and x.changes and getattr(x, "adapter", None) == self.adapter:
                        self._refuse(type(x).__name__, path)
                for part in getattr(slot, "parts", ()):
                    if part.adapter == self.adapter and (part.place or part.branch):
                        self._refuse(part.key, path)
                if getattr(slot, "reads", None):
                    self._refuse("another part that reads states", path)
        self._checked = now

    def _refuse(self, what: str, path: str) -> None:
        raise RecipeError(f"{self.name}(cache=...): {what} acts at {path or 'the block'} inside "
                          "the blocks, which would not run; drop that part or cache")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Of the blocks, without the side network's own."""
        for n, block in enumerate(self.blocks):
            own = [f"{p}." for p, m in block.named_modules() if _beside(m)]
            for name, t in (*block.named_parameters(), *block.named_buffers()):
                if not any(name.startswith(p) for p in own):
                    yield f"{n}.{name}", t

    def _fingerprint(self) -> str:
        h = hashlib.blake2b(digest_size=16)
        for n, block in enumerate(self.blocks):
            for path, m in block.named_modules():
                if "burnish" not in path.split("."):
                    plain = {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float
                             | str) and k[0] != "_" and k not in PASSING}
                    h.update(f"{n} {path} {type(m).__name__} {sorted(plain.items())}\n".encode())
        for name, t in self._tensors():
            if type(t.data).__name__ == "DTensor":
                raise RecipeError(f"{self.name}(cache=...): the blocks are spread over processes, "
                                  "which would wait for each other; leave cache out")
            h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
            if not t.is_meta:                        # else another form of it stands beside
                h.update(raw(t))
        return h.hexdigest()

    # -- the folder ------------------------------------------------------------------------------
    def _open(self) -> None:
        stamp = [(id(t), 0 if t.is_inference() else t._version) for _, t in self._tensors()]
        if self.index is not None and stamp == self._stamp:
            return
        mark = {"taps": VERSION, "blocks": self._fingerprint()}
        file = self.folder / MARK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = [p for p in self.folder.iterdir() if p.suffix != ".part"]
            if not there:
                part = self._part()
                part.write_text(json.dumps(mark), "utf-8")
                os.replace(part, file)
            elif not file.is_file():
                raise FormatError(f"{self.folder} holds other things than taps; expected a folder "
                                  "that is not there yet, an empty one, or one of an earlier run")
            found = json.loads(file.read_text("utf-8"))
        except FormatError:
            raise
        except OSError as e:
            raise RecipeError(f"{self.name}: taps cannot be kept in {self.folder}: "
                              f"{e.strerror or e}; choose another folder") from None
        except (ValueError, RecursionError):
            raise FormatError(f"{file} is damaged; delete the folder, and it is made anew"
                              ) from None
        if found != mark:
            raise FormatError(f"{self.folder} holds the states of another model: its blocks are "
                              f"{_told(found)}, these are {_told(mark)}; choose another folder, or "
                              "delete that one")
        self.index, self.used, self._stamp = {}, 0, stamp
        for path in sorted(self.folder.iterdir()):
            if path.suffix == SUFFIX:
                shard = Shard.read(path, len(self.blocks))
                if shard is None:
                    unlink(path)
                    continue
                self.used += path.stat().st_size
                self.know(shard)
            elif path.suffix == ".part":
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE:
                        path.unlink()

    def _part(self) -> Path:
        return self.folder / f"{os.getpid()}-{time.time_ns()}.part"

    def know(self, shard: Shard) -> None:
        assert self.index is not None
        self.index.update({k: (shard, i) for i, k in enumerate(shard.keys) if k})

    def forget(self, shard: Shard) -> None:
        """A file that was whole is not any more."""
        assert self.index is not None
        for k in shard.keys:
            if self.index.get(k, (None,))[0] is shard:
                del self.index[k]
        with contextlib.suppress(OSError):
            self.used -= shard.path.stat().st_size
        unlink(shard.path)

    def stop(self, why: str) -> None:
        self.full = True
        why += "" if self.read else " (none was read yet: of data that change none will be)"
        warnings.warn(f"{self.name}: no more taps are kept in {self.folder}: {why}; what is there "
                      "is read, other samples run through the backbone", stacklevel=2)

    def _keys(self, given: Tensor, args: tuple, kw: dict[str, Any]) -> list[str]:
        """A digest of each sample of what the first block is given."""
        B, device = len(given), given.device.type
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kw = {k: v for k, v in kw.items() if v is not None and k != "use_cache"}
        leaves, spec = pytree.tree_flatten((args, kw))
        common = hashlib.blake2b(f"{device} {cast} {spec}".encode(), digest_size=16)
        each: list[Tensor] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                common.update(repr(leaf).encode() if isinstance(
                    leaf, str | bool | int | float | None) else type(leaf).__name__.encode())
                continue
            if leaf.dim() > 1 and len(leaf) in (1, B):
                common.update(f"{leaf.dtype} {tuple(leaf.shape[1:])}".encode())
                each.append(leaf.detach().cpu())
            else:
                common.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            if leaf.dim() < 2 or len(leaf) not in (1, B) or leaf.shape == (B, B):
                common.update(raw(leaf))
        keys = []
        for i in range(B):
            h = common.copy()
            for leaf in each:
                h.update(raw(leaf[i if len(leaf) == B else 0]))
            keys.append(h.hexdigest())
        return keys


class _Reading:
    """A forward whose samples are all there. entries: (file, row) of each."""

    def __init__(self, cache: TapCache, entries: list[Any], given: Tensor):
        self.cache, self.entries, self.device = cache, entries, given.device

    def state(self, n: int) -> tuple[Any, bool | None] | None:
        """(what block n returned, its note); None where a file turned out to be damaged."""
        fake = self.entries[0][0] is None
        form = self.cache._seen[n] if fake else self.entries[0][0].forms[n]
        out = torch.empty((len(self.entries), *form.shape), dtype=form.dtype, device="cpu")
        if not fake:
            rows = out.view(len(out), -1).view(torch.uint8).numpy()
            by: dict[int, tuple[Shard, list[tuple[int, int]]]] = {}
            for to, (shard, row) in enumerate(self.entries):
                by.setdefault(id(shard), (shard, []))[1].append((to, row))
            for shard, wanted in by.values():
                if shard.forms[n] != form or not read_into(rows, shard, n, wanted):
                    self.cache.forget(shard)
                    return None
        return form.wrap(out.to(self.device)), form.note


class _Writing:
    """A forward with new samples. keys, rows: theirs; part: the file until it is whole, None in a
    simulation."""

    def __init__(self, cache: TapCache, keys: list[str], rows: list[int], samples: int,
                 part: Path | None):
        self.cache, self.rows, self.samples, self.part = cache, rows, samples, part
        self.shard = Shard(part or Path(), keys)
        self.at = 0

    def add(self, n: int, state: Tensor, form: Form) -> _Writing | None:
        """Write block n's states; None when nothing more is to be written."""
        self.cache._seen[n] = form
        host = state.detach().cpu()
        if self.part is None:
            return self
        last = n + 1 == len(self.cache.blocks)
        if self.cache.used + self.at + form.nbytes * len(self.rows) > self.cache.room:
            self._stop(f"its room of {self.cache.room:,} bytes is used")
            return None
        try:
            with open(self.part, "ab") as f:
                self.shard.forms.append(form)
                self.shard.starts.append(self.at)
                self.shard.sums.append(sums := [])
                for i, row in enumerate(self.rows):
                    if last and not bool(host[row].isfinite().all()):
                        self.shard.keys[i] = ""      # a fault is not served for ever
                    data = raw(host[row])
                    f.write(data)
                    sums.append(zlib.crc32(data))
                self.at += form.nbytes * len(self.rows)
                if last:
                    f.write(self.shard.footer())
            if last:
                self._whole()
        except OSError as e:
            self._stop(e.strerror or str(e))
            return None
        return self

    def _whole(self) -> None:
        if not any(self.shard.keys):
            return self.drop()
        name = hashlib.blake2b("".join(self.shard.keys).encode(), digest_size=16).hexdigest()
        path = self.cache.folder / f"{name}{SUFFIX}"
        assert self.part is not None
        there = path.stat().st_size if path.exists() else 0
        size = self.part.stat().st_size
        os.replace(self.part, path)
        self.shard.path = path
        self.cache.used += size - there
        self.cache.written += sum(map(bool, self.shard.keys))
        self.cache.know(self.shard)

    def _stop(self, why: str) -> None:
        self.drop()
        self.cache.stop(why)

    def drop(self) -> None:
        if self.part is not None:
            unlink(self.part)


def _beside(m: Any) -> bool:
    return getattr(m, "what", None) == "a side network"


def _told(mark: Any) -> str:
    return str(mark.get("blocks", "?"))[:8] if isinstance(mark, dict) else "none"
