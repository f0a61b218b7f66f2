"""Objects in boxes: how they are read, paired with what a model says, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.reading import parse_json, plain, read_text
from .media import PICTURE
from .table import Table

#: files in which COCO's form keeps the objects of a folder of pictures
COCO = ("annotations.json", "_annotations.coco.json", "instances.json")
#: overlaps at which COCO's average precision is taken
OVERLAPS = tuple(0.5 + 0.05 * k for k in range(10))
#: boxes of a class in a picture that are counted, the surest first
MOST = 100


# -- layouts ---------------------------------------------------------------------------------------
def coco(path: Path) -> Table | None:
    """Pictures with a file of COCO's form beside them (or above an `images/`); None where there is
    none. Crowds are left out. Raises DataError for what is no such file."""
    file = next((path / name for name in COCO if (path / name).is_file()), None)
    return None if file is None else _read(file, (path / "images", path))


def tree(path: Path, split_of: Callable[[str], str | None]) -> dict[str, Table] | None:
    """COCO's own folders, by split: ``annotations/instances_train2017.json`` and its pictures below
    ``train2017/``, ``images/train2017/`` or ``images/``; None where there are none.

    split_of: of a name; a single file is of train.
    Raises DataError for several files of one split, or of none.
    """
    files = sorted((path / "annotations").glob("instances_*.json"))
    out: dict[str, Path] = {}
    for file in files:
        name = file.stem.removeprefix("instances_")
        split = "train" if len(files) == 1 else split_of(name.rstrip("0123456789"))
        if split is None or split in out:
            raise DataError(f"{file}: " + (f"{name!r} is no split: expected train, val or test, "
                                           "perhaps with a year" if split is None else
                                           f"{out[split].name} is of {split} as well; keep one"))
        out[split] = file
    if not out:
        return None
    if "train" not in out:
        raise DataError(f"{path}/annotations has no instances of train; it has "
                        f"{', '.join(f.name for f in files)}")
    found = {}
    for split, file in out.items():
        name = file.stem.removeprefix("instances_")
        table = _read(file, [path / p for p in (f"images/{name}", name, "images", ".")])
        assert table is not None
        found[split] = table
    return found


def _read(file: Path, places: Sequence[Path]) -> Table | None:
    """One file of COCO's form. places: where its pictures may lie."""
    told = parse_json(read_text(file, DataError), str(file), DataError)
    parts = ("images", "annotations", "categories")
    if not isinstance(told, dict) or not all(isinstance(told.get(k), list) for k in parts):
        if file.name == COCO[0]:
            return None
        raise DataError(f"{file}: expected images, annotations and categories, as COCO has them")
    for k in parts:
        for i, entry in enumerate(told[k]):
            if not isinstance(entry, dict):
                raise DataError(f"{file}, {k}[{i}]: expected an object with fields")
    names = {k: _word(c.get("name"), f"{at}, name")
             for k, c, at in _known(told, "categories", file)}
    rows: dict[Any, dict[str, list[Any]]] = {}
    paths = []
    for k, m, at in _known(told, "images", file):
        rows[k] = {"bbox": [], "category": []}
        paths.append(_found(places, m, at))
    for i, a in enumerate(told["annotations"]):
        at = f"{file}, annotations[{i}]"
        if a.get("iscrowd"):
            continue
        of, kind = a.get("image_id"), a.get("category_id")
        if not _plain(of) or of not in rows:
            raise DataError(f"{at}: there is no image {plain(of)}")
        if not _plain(kind) or kind not in names:
            raise DataError(f"{at}: there is no category {plain(kind)}")
        rows[of]["bbox"].append(a.get("bbox"))
        rows[of]["category"].append(names[kind])
    if not paths:
        raise DataError(f"{file} names no picture")
    PICTURE.look(paths)
    used = {c for row in rows.values() for c in row["category"]}
    return Table({"image": paths, "objects": list(rows.values())}, paths.__getitem__,
                 "pictures with objects, as COCO has them",
                 {"objects": tuple(n for n in names.values() if n in used)})


def _plain(value: Any) -> bool:
    """Whether it can be an id or the name of a class: a number or a text."""
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _word(value: Any, at: str) -> str:
    if not _plain(value):
        raise DataError(f"{at}: expected the name of a class, it is "
                        f"{'missing' if value is None else plain(value, 60)}")
    return str(value)


def _known(told: dict[str, Any], part: str, file: Path
           ) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(id, entry, where it stands) of each; two of one id would be taken for each other."""
    seen: dict[Any, int] = {}
    for i, entry in enumerate(told[part]):
        at, k = f"{file}, {part}[{i}]", entry.get("id")
        if not _plain(k):
            raise DataError(f"{at}, id: expected a number, it is "
                            f"{'missing' if k is None else plain(k, 60)}")
        if k in seen:
            raise DataError(f"{at} has the id of {part}[{seen[k]}], {plain(k)}")
        seen[k] = i
        yield k, entry, at


def _found(folders: Sequence[Path], image: dict[str, Any], at: str) -> str:
    """Where a picture lies: below one of the folders."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{at}, file_name: expected the name of a picture, it is "
                        f"{'missing' if name is None else plain(name, 60)}")
    places = [p / name for p in folders if p.is_dir()]
    for place in places:
        if place.is_file():
            return str(place)
    raise DataError(f"{at}: there is no picture at {plain(places[0])}")


def objects(values: Sequence[Any], field: str, table: Table, classes: Sequence[str] | None
            ) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """(boxes, classes, names): ``{"bbox": [[x, y, width, height]...], "category": [...]}`` of each
    row, in pixels. Raises DataError with the row that has no such."""
    boxes, kinds = [], []
    for i, v in enumerate(values):
        at = f"{table.where(i)}, field {field!r}"
        if isinstance(v, list) and all(isinstance(o, dict) for o in v):          # one by one
            v = {k: [o.get(k) for o in v] for k in ("bbox", *_CATEGORY) if any(k in o for o in v)}
            v.setdefault("bbox", [])
        if not isinstance(v, dict) or "bbox" not in v:
            raise DataError(f"{at}: expected bbox and category, found {type(v).__name__}")
        kind = next((v[k] for k in _CATEGORY if k in v), [])
        if not isinstance(v["bbox"], list) or not isinstance(kind, list) or \
                len(v["bbox"]) != len(kind):
            raise DataError(f"{at}: bbox and category should be lists of one length")
        for box in v["bbox"]:
            good = isinstance(box, list | tuple) and len(box) == 4 and all(
                isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9
                for x in box)
            if not good or not (box[2] > 0 and box[3] > 0):
                raise DataError(f"{at}: a box is {plain(box, 60)}; expected x, y, width and height "
                                "in pixels, the last two above 0")
        boxes.append([[float(x) for x in box] for box in v["bbox"]])
        kinds.append([_word(k, f"{at}, category") for k in kind])
    found = {k for row in kinds for k in row}
    if not found and not classes:
        raise DataError(f"{table.where(0)}, field {field!r}: no picture has an object, this one "
                        "neither, so there is no class to learn")
    names = tuple(classes) if classes else tuple(sorted(
        found, key=lambda n: (0, int(n), n) if n.isdigit() else (1, 0, n)))
    if strange := found - set(names):
        raise DataError(f"{table.where(0)}: the class {min(strange)!r} is not among "
                        f"{', '.join(names[:8])}")
    number = {n: k for k, n in enumerate(names)}
    return boxes, [[number[k] for k in row] for row in kinds], names


_CATEGORY = ("category", "categories", "label", "labels")


# -- overlaps --------------------------------------------------------------------------------------
def corners(boxes: Tensor) -> Tensor:
    """(..., 4) middle and size as the two corners."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection over union, generalised: Rezatofighi et al., 2019) of boxes (..., 4) by their
    corners, where the shapes before the last meet."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0)
    common = size[..., 0] * size[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    union = areas[0] + areas[1] - common
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    around = hull[..., 0] * hull[..., 1]
    iou = common / union.clamp(min=1e-9)
    return iou, iou - (around - union) / around.clamp(min=1e-9)


@torch.library.custom_op("burnish::assigned", mutates_args=())
def assigned(cost: Tensor, counts: Tensor) -> Tensor:
    """(B, N) which of Q has each of the first `counts` (B,) of N, one each, at the least cost
    (B, Q, N) together (Kuhn, 1955); Q where there is none."""
    from scipy.optimize import linear_sum_assignment

    out = torch.full((len(cost), cost.shape[2]), cost.shape[1])
    for row, many, told in zip(cost.detach().float().cpu().numpy(), counts.tolist(), out,
                               strict=True):
        one, other = linear_sum_assignment(np.nan_to_num(row[:, :many], nan=1e9, posinf=1e9,
                                                         neginf=-1e9))
        told[torch.as_tensor(other)] = torch.as_tensor(one)
    return out.to(cost.device)


@assigned.register_fake
def _(cost: Tensor, counts: Tensor) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.long)


# -- figures ---------------------------------------------------------------------------------------
def average_precision(said: Sequence[Tensor], right: Sequence[Tensor], classes: int
                      ) -> dict[float, float]:
    """overlap -> COCO's average precision, the mean over the classes that there are.

    said: of each picture (n, 6): corners, score, class.  right: (m, 5): corners, class.  A box
    has the free true box of its class that it overlaps most, the surest box first; precision is
    read off at 101 recalls, each the best at that recall or beyond."""
    found: dict[float, list[float]] = {t: [] for t in OVERLAPS}
    for c in range(classes):
        true = [r[r[:, 4] == c] for r in right]
        many = sum(map(len, true))
        if not many:
            continue
        scores, hits = [], {t: [] for t in OVERLAPS}
        for boxes, theirs in zip(said, true, strict=True):
            own = boxes[boxes[:, 5] == c]
            own = own[own[:, 4].argsort(descending=True, stable=True)[:MOST]]
            scores.append(own[:, 4])
            iou = overlap(own[:, None, :4], theirs[None, :, :4])[0].numpy()
            for t in OVERLAPS:
                hits[t] += _taken(iou, t)
        order = torch.cat(scores).argsort(descending=True, stable=True).numpy()
        for t in OVERLAPS:
            hit = np.asarray(hits[t], float)[order]
            so_far = hit.cumsum()
            precision = so_far / np.arange(1, len(hit) + 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(so_far / many, np.linspace(0, 1, 101))
            found[t].append(float(sum(best[k] for k in at if k < len(best)) / 101))
    return {t: sum(v) / len(v) if v else 0.0 for t, v in found.items()}


def _taken(iou: np.ndarray, least: float) -> list[bool]:
    """Which boxes of a picture, the surest first, have a true box to themselves."""
    free, out = np.ones(iou.shape[1], bool), []
    for row in iou:
        row = np.where(free, row, -1.0)
        best = int(row.argmax()) if len(row) else 0
        good = bool(len(row)) and row[best] >= least - 1e-9
        if good:
            free[best] = False
        out.append(good)
    return out
