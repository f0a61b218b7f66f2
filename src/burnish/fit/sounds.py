"""How a recording becomes the numbers that a model of sound reads.

A WAV file is read with scipy, everything else with soundfile where that is installed; channels are
averaged, and another sampling rate than the model's is changed to it by a polyphase filter
(``scipy.signal.resample_poly``). What follows is the model's own feature extractor.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..core.extras import worded
from ..core.reading import plain

#: full scale of whole numbers, by their width in bytes
_FULL = {2: 2.0**15, 4: 2.0**31, 8: 2.0**63}
#: bytes of sound that the head of a stream names, whose length nobody knew when it began
_UNSAID = 0x7FFFF000
#: samples a second beyond which no sound is recorded
_FASTEST = 1_000_000


def opened(source: Any) -> BinaryIO:
    """A path, encoded bytes, or ``{"path", "bytes"}`` as `datasets` keeps them."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    return io.BytesIO(source) if isinstance(source, bytes) else open(Path(source), "rb")


def size(source: Any) -> tuple[int, int]:
    """(samples of each channel, samples a second), from the file's head where it is a WAV."""
    with opened(source) as file:
        if file.read(4) == b"RIFF" and (found := _head(file)) is not None:
            many, rate = found
        else:
            file.seek(0)
            made, rate = _decoded(file)
            many = len(made)
    return _checked(many), _possible(rate)


@worded("audio")
def heard(source: Any, rate: int, seconds: float | None = None) -> np.ndarray:
    """(n,) fp32 at `rate` samples a second, of the first `seconds`."""
    from scipy.signal import resample_poly

    with opened(source) as file:
        made, own = _decoded(file)
    _checked(len(made))
    _possible(own)
    if seconds is not None:
        made = made[:max(1, round(seconds * own))]
    x = made.mean(1) if made.ndim > 1 else made
    if not np.isfinite(x).all():
        raise ValueError("it holds numbers that are not finite")
    if own != rate:
        common = math.gcd(own, rate)
        x = resample_poly(x, rate // common, own // common)
    return np.ascontiguousarray(x, dtype=np.float32)


def length(samples: int, own: int, rate: int, seconds: float | None = None) -> int:
    """How many numbers :func:`heard` makes of so many samples."""
    if seconds is not None:
        samples = min(samples, max(1, round(seconds * own)))
    common = math.gcd(own, rate)
    return -(-samples * (rate // common) // (own // common))


def _head(file: BinaryIO) -> tuple[int, int] | None:
    """The same from the chunks of a WAV; None where it is compressed.

    Raises ValueError for one that ends before its sound begins, or before it ends.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(12)
    rate = frame = 0
    while len(head := file.read(8)) == 8:
        name, many = struct.unpack("<4sI", head)
        if name == b"fmt " and many >= 16:
            if len(told := file.read(16)) < 16:
                break
            kind, _, rate, _, frame, _ = struct.unpack("<HHIIHH", told)
            if kind not in (1, 3, 0xFFFE):               # compressed: a frame is no sample
                return None
            many -= 16
        elif name == b"data":
            there = end - file.tell()
            if many > there and many < _UNSAID:
                raise ValueError(f"it breaks off: its head says {many:,} bytes of sound, and "
                                 f"{there:,} are there")
            if not frame:
                raise ValueError("its head does not say how a sample is written")
            return min(many, there) // frame, rate
        file.seek(many + many % 2, io.SEEK_CUR)
    raise ValueError(f"it breaks off within its head: it has {end:,} bytes, and no sound in them")


def _decoded(file: BinaryIO) -> tuple[np.ndarray, int]:
    """((n,) or (n, channels) between -1 and 1, samples a second)."""
    from scipy.io import wavfile

    kind = file.read(4)
    wav = kind in (b"RIFF", b"RIFX", b"RF64")
    if kind == b"RIFF":
        _head(file)                                       # refuses one that breaks off
    file.seek(0)
    if wav:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")           # chunks beside the sound, of any kind
                rate, x = wavfile.read(file)
            return _scaled(x), int(rate)
        except Exception as e:                            # of unlike kinds, by what is broken
            if "Unknown wave file format" not in str(e):
                raise ValueError(f"it is no whole WAV: {plain(e)}") from None
        file.seek(0)
    try:
        import soundfile
    except ImportError:
        raise ValueError("it is no plain WAV, and soundfile, which reads the other forms, is not "
                         "installed: pip install 'burnish[audio]'") from None
    x, rate = soundfile.read(file, dtype="float32")
    return x, int(rate)


def _checked(samples: int) -> int:
    if not samples:
        raise ValueError("it holds no sample")
    return samples


def _possible(rate: int) -> int:
    """A broken head may say anything, and a filter is as long as the rate is large."""
    if not 1 <= rate <= _FASTEST:
        raise ValueError(f"its head says {rate} samples a second")
    return rate


def _scaled(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return x
    if x.dtype == np.uint8:
        return (x.astype(np.float32) - 128) / 128
    return (x / _FULL[x.dtype.itemsize]).astype(np.float32)
