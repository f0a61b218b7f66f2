"""Corruptions: each is what it says, more of it at each severity, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from burnish.core.errors import ConfigError
from burnish.fit.corruptions import CORRUPTIONS, Corrupted, _resized, corrupted
from burnish.fit.data import digits


def picture(mode="L", size=(24, 32)):
    v, u = np.mgrid[0 : size[1], 0 : size[0]] / 24
    x = 0.5 + 0.4 * np.stack([np.sin(9 * u + 7 * v), np.cos(8 * v), np.sin(11 * u * v)], -1)
    x = np.uint8(255 * x)
    return Image.fromarray(x).convert(mode)


def as_array(image):
    return np.asarray(image, dtype=float) / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_severities_are_more_of_the_same_and_the_same_every_time(name, mode):
    image = picture(mode)
    before = image.tobytes()
    far = []
    for severity in range(1, 6):
        made = corrupted(image, name, severity, row=4)
        assert made.mode == mode and made.size == image.size
        assert made.tobytes() == corrupted(image, name, severity, row=4).tobytes()
        far.append(np.abs(as_array(made) - as_array(image)).mean())
    assert far[0] > 0 and all(b >= a for a, b in zip(far, far[1:], strict=False)), far
    assert far[-1] > 1.5 * far[0] and image.tobytes() == before


@pytest.mark.parametrize("name", ["noise", "impulse", "fog", "stripes", "erase"])
def test_what_is_drawn_is_another_for_each_row_and_seed(name):
    image = picture()
    a = corrupted(image, name, 3)
    assert a.tobytes() != corrupted(image, name, 3, row=1).tobytes()
    assert a.tobytes() != corrupted(image, name, 3, seed=1).tobytes()


def test_each_is_what_it_says():
    grey = Image.fromarray(np.full((40, 40), 128, np.uint8))
    x = as_array(grey)
    noise = as_array(corrupted(grey, "noise", 2)) - x
    assert abs(noise.std() - 0.15) < 0.01 and abs(noise.mean()) < 0.02
    points = as_array(corrupted(grey, "impulse", 5))
    hit = np.isin(points, (0, 1))
    assert abs(hit.mean() - 0.27) < 0.04 and (points[~hit] == x[~hit]).all()
    assert abs(points[hit].mean() - 0.5) < 0.1
    assert (as_array(corrupted(grey, "blur", 5)) == x).all()           # edges go on beyond the edge
    dot = np.zeros((41, 41), np.uint8)
    dot[20, 20] = 255
    spread = as_array(corrupted(Image.fromarray(dot), "blur", 1))
    at = (np.arange(41) - 20)[:, None]
    want = np.exp(-(at**2 + at.T**2) / (2 * 1.64**2))
    assert np.abs(spread - want / want.sum()).max() < 0.004
    assert np.allclose(as_array(corrupted(grey, "brightness", 2)), x + 0.2, atol=0.003)
    image = picture()
    y = as_array(image)
    assert abs(as_array(corrupted(image, "contrast", 5)).std() / y.std() - 0.12) < 0.01
    rows = as_array(corrupted(image, "stripes", 4))
    assert ((np.abs(rows - 0.5) < 0.01).all(1)).sum() == 16             # half of 32
    white = Image.fromarray(np.full((32, 24), 255, np.uint8))
    erased = as_array(corrupted(white, "erase", 4)) < 0.6
    assert erased.sum() == 12 * 12 and erased.any(0).sum() == erased.any(1).sum() == 12
    blocks = as_array(corrupted(picture(size=(40, 40)), "pixelate", 3))
    assert (blocks[::2] == blocks[1::2]).all() and (blocks[:, ::2] == blocks[:, 1::2]).all()
    fog = as_array(corrupted(image, "fog", 5))
    assert abs(fog.std() / y.std()) < 0.7
    corner = _resized(np.arange(9.0).reshape(3, 3), (5, 7))
    assert corner[0, 0] == 0 and corner[-1, -1] == 8 and corner[2, 3] == 4 and corner[0, -1] == 2


def test_small_scans_and_other_modes():
    scan = digits()["test"].columns["image"][0]
    for name in CORRUPTIONS:
        assert corrupted(scan, name, 5).size == (8, 8)
    assert corrupted(picture("P"), "blur", 1).mode == "RGB"
    assert corrupted(picture("RGBA"), "noise", 1).mode == "RGB"
    one = Image.fromarray(np.uint8([[7]]))
    assert all(corrupted(one, name, 5).size == (1, 1) for name in CORRUPTIONS)


def test_rows_are_made_worse_as_they_are_asked_for():
    class Rows:
        column_names = ["image", "label"]

        def __len__(self):
            return 3

        def __getitem__(self, at):
            return [1, 0, 1] if at == "label" else {"image": picture(), "label": [1, 0, 1][at]}

    made = Corrupted(Rows(), "noise", 3, seed=2)
    assert len(made) == 3 and made["label"] == [1, 0, 1] and made.column_names == Rows.column_names
    assert made[1]["label"] == 0
    assert made[1]["image"].tobytes() == corrupted(picture(), "noise", 3, row=1, seed=2).tobytes()
    with pytest.raises(KeyError):
        made["image"]


def test_what_is_none_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'noise'"):
        corrupted(picture(), "noize", 1)
    with pytest.raises(ConfigError, match="severity 6: expected 1 to 5"):
        Corrupted(None, "noise", 6)
