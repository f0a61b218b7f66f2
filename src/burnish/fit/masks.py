"""Pictures whose every pixel has a class: folders of pictures and masks, and the numbers in masks.

A mask is a picture of one channel; a pixel's number is its class, 255 one that is not counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.reading import parse_json, plain, read_text
from .media import LOOKED_AT, PICTURE
from .table import Table

#: the number of a pixel that is not counted, as transformers has it
IGNORED = 255
#: what people call the two folders
IMAGES, MASKS = ("images", "image", "imgs"), ("annotations", "masks", "mask", "labels",
                                              "segmentation_masks")
#: names of a class that is no class
NOTHING = frozenset({"background", "unlabeled", "unlabelled", "void", "ignore", "other", "none"})


# -- folders -------------------------------------------------------------------------------------
def paired(path: Path, task: str | None, split_of: Callable[[str], str | None]
           ) -> dict[str, Table] | None:
    """The splits of ``images/`` and ``masks/`` side by side, None where there are none such.

    split_of: which split a folder's name says. Raises DataError for a picture without its mask.
    """
    pair = next(((path / a, path / b) for a in IMAGES for b in MASKS
                 if (path / a).is_dir() and (path / b).is_dir()), None)
    if pair is None or (task or "").startswith("image-"):
        return None
    images, masks = pair
    if not PICTURE.among(masks):
        for ending, whose in ((".json", "COCO"), (".txt", "YOLO"), (".xml", "Pascal VOC")):
            if any(masks.rglob(f"*{ending}")):
                raise DataError(f"{path} holds pictures and {masks.name}/*{ending}, as {whose} has "
                                "them; objects in boxes are read from COCO's form beside "
                                f"{images.name}/ (annotations.json), classes of pixels from a mask "
                                f"for each picture in {masks}")
        return None
    inside = {s: p for p in sorted(images.iterdir()) if p.is_dir() and (s := split_of(p.name))}
    names = _names(path, split_of(path.resolve().name) is not None)
    out = {}
    for split, folder in (inside or {"train": images}).items():
        beside = masks / folder.relative_to(images)
        there = PICTURE.among(beside) if beside.is_dir() else []
        found = PICTURE.among(folder)
        theirs = _matched(found, folder, there, beside)
        paths = [str(p) for p in found]
        PICTURE.look(paths)
        out[split] = Table({"image": paths, "mask": theirs},
                           paths.__getitem__, "pictures with masks",
                           {"mask": names} if names else {})
    return out


def _matched(pictures: Sequence[Path], folder: Path, masks: Sequence[Path], beside: Path
             ) -> list[str]:
    """The mask of each picture: of its name, in the folder within `beside` that the picture has
    within `folder`, else the only one of its name. Raises DataError where there is none or more.
    """
    near: dict[tuple[Path, str], list[Path]] = {}
    named: dict[str, list[Path]] = {}
    for p in masks:
        stem = p.stem.removesuffix("_mask")
        near.setdefault((p.parent.relative_to(beside), stem), []).append(p)
        named.setdefault(stem, []).append(p)
    out = []
    for p in pictures:
        found = near.get((p.parent.relative_to(folder), p.stem)) or named.get(p.stem) or []
        if not found:
            raise DataError(f"picture {plain(p)} has no mask: there is no {p.stem}.png in "
                            f"{plain(beside)}")
        if len(found) > 1:
            raise DataError(f"picture {plain(p)} has {len(found)} masks: "
                            f"{' and '.join(plain(m) for m in found[:2])}; leave one of them")
        out.append(str(found[0]))
    return out


def _names(path: Path, above: bool) -> tuple[str, ...] | None:
    """The classes in their order, from `id2label.json` or `classes.txt` here, or above where the
    folder is one split of several. Raises DataError for a name of two classes."""
    for folder in (path, path.parent) if above else (path,):
        if (file := folder / "id2label.json").is_file():
            said = parse_json(read_text(file, DataError), file, DataError)
            if not isinstance(said, dict) or set(said) != {str(i) for i in range(len(said))}:
                raise DataError(f"{file}: expected an object with a name for each class, "
                                '{"0": "road", "1": "sky", ...}')
            return _each(tuple(str(said[str(i)]) for i in range(len(said))), file)
        if (file := folder / "classes.txt").is_file():
            lines = map(str.strip, read_text(file, DataError).splitlines())
            return _each(tuple(filter(None, lines)), file)
    return None


def _each(names: tuple[str, ...], file: Path) -> tuple[str, ...]:
    if (twice := next((n for n in names if names.count(n) > 1), None)) is not None:
        raise DataError(f"{plain(file)} names {plain(twice, 60)!r} twice; a class has one name, "
                        "and a name one class")
    return names


# -- numbers -------------------------------------------------------------------------------------
def numbers(mask: Any) -> np.ndarray:
    """(H, W) of whole numbers up to 255. Raises ValueError for colours and larger ones."""
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"its pixels are colours ({mask.mode}), and a mask's are the numbers of "
                         "their classes: save it with one channel (mode L or P)")
    made = np.asarray(mask).astype(np.int64)
    if made.min() < 0 or made.max() > IGNORED:
        raise ValueError(f"it holds number {made.max() if made.max() > IGNORED else made.min()}, "
                         f"and image processors take 0 to {IGNORED}")
    return made.astype(np.uint8)


def values(table: Table, mask: str, image: str) -> set[int]:
    """The numbers in a table's masks (evenly spread ones where there are very many). Raises
    DataError for a mask that cannot be read, or is of another size than its picture."""
    seen: set[int] = set()
    column, pictures = table.columns[mask], table.columns[image]
    for i in range(0, len(column), max(1, len(column) // LOOKED_AT)):
        at = f"{table.where(i)}, field {mask!r}"
        try:
            with _opened(column[i]) as opened:
                found = numbers(opened)
            with _opened(pictures[i]) as picture:
                size = picture.size
                if picture.getexif().get(0x0112, 1) > 4:               # lies on its side
                    size = size[::-1]
        except Exception as e:
            raise DataError(f"{at}: the mask cannot be read: {plain(e)}") from None
        if found.shape != size[::-1]:
            raise DataError(f"{at}: the mask is {found.shape[1]} x {found.shape[0]}, and its "
                            f"picture {size[0]} x {size[1]}")
        seen |= set(np.unique(found).tolist())
    return seen


def _opened(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if hasattr(value, "convert"):
        return value.copy()
    return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)


def classes(held: Iterable[int], names: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """The classes in their order: their names, or the numbers from nought to the largest.

    Raises DataError for numbers that are grey levels rather than classes.
    """
    counted = sorted(set(held) - {IGNORED})
    if not counted:
        raise DataError(f"{source}: every pixel of every mask is {IGNORED}, which is not counted")
    if names:
        return tuple(names)
    how = "name the classes, one a line, in classes.txt beside the folders if it is so"
    if counted == [0]:
        more = f" and {IGNORED}, which is not counted: where it is the object, save it as 1" \
            if IGNORED in held else ", one class"
        raise DataError(f"{source}: the masks hold nothing but 0{more}")
    if len(counted) <= 16 and counted[-1] >= 4 * len(counted):
        raise DataError(f"{source}: the masks hold {len(counted)} numbers up to {counted[-1]} "
                        f"({', '.join(map(str, counted[:6]))}, ...), which look like grey levels: "
                        f"classes are numbered from 0; {how}")
    return tuple(str(i) for i in range(counted[-1] + 1))
