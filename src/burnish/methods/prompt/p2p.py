from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.state.prompts import Fixed
from ...blocks.state.rendered import FIRST, WIDE, Painter, Rendered
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import behind_patches, refuse, unmet
from ...core.protocols import Attacher
from ...core.site import Selection
from .vpt import CLASS

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

KEY = "cloud"
#: of ImageNet's pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class P2p(Method):
    """P2P: a cloud of points is drawn as a picture whose colours train, for a frozen model of
    pictures.

    The batch names ``cloud``, (cloud_size, 3) a sample, in the unit cube. Of a point p_i

        g = W_1 p + b_1 (8),   f_i = W_3 max_{j near i} leaky(GN(W_2 [g_j - g_i; g_i])) + b_3 (64)

    near: the `neighbours` nearest in space, GN of 4 groups. Seen along z, f_i is added to 3 x 3
    cells of a map of `drawn` x `drawn`, a cell the larger range of x and y over drawn - 3, what is
    drawn in the middle; of the map F, padded to the picture,

        x' = normalise(sigmoid(W_5 relu(W_4 (F + K_2 relu(K_1 F)))))

    takes the picture's place. In training each cloud is turned about y before it is projected;
    features are of the cloud as it is. A picture in the batch says its size and nothing else;
    without one it is of `picture` x `picture`.

    Start: as linears and convolutions start; there is no pre-trained function of points. Trains
    83,555 numbers (W_1 .. W_5, K_1, K_2, GN), with ``rest=True`` the norms, whose running
    statistics stay, and the class token (and the head). Kept for backward: as of training the
    pixels, and 64 neighbours numbers a point. Not mergeable.

    Best readings: the residual block is two convolutions of 3 x 3 without norms; the axis of the
    turn; GN before the maximum.
    """

    paper: ClassVar[str] = ("P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with "
                            "Point-to-Pixel Prompting (2022), arXiv:2208.02812")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    context: ClassVar[Mapping[str, Key]] = {KEY: Key("points of each sample", real=True)}
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"cloud_size": 12, "neighbours": 4, "rotate": False,
                                      "drawn": 8}

    cloud_size: int = setting(4096, "in a cloud", other=(10,))
    neighbours: int = setting(32, "nearest points that one looks at", other=(3,))
    drawn: int | None = setting(None, "cells of the map's side; None: as the picture", other=(10,))
    picture: int = setting(224, "pixels of the picture's side, where the batch has no picture",
                        unseen="the suite's batches have pictures: tests/methods/test_p2p.py")
    rotate: bool = setting(True, "turn clouds in training before they are projected")
    pixel_mean: tuple[float, ...] = setting(_MEAN, "of the pixels, by channel")
    pixel_std: tuple[float, ...] = setting(_STD, "of the pixels, by channel")
    rest: bool = setting(True, "the norms and the class token train too")

    def __post_init__(self) -> None:
        if self.cloud_size < 1 or self.neighbours < 1 or min(self.picture, self.drawn or 4) < 4:
            raise RecipeError(f"{self}: expected a point and a neighbour at least, and sides of 4 "
                              "or more")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise RecipeError("p2p draws in three colours: pixel_mean and pixel_std have three "
                              f"numbers, the latter positive; got {self.pixel_mean} and "
                              f"{self.pixel_std}")

    def keys(self) -> Mapping[str, Key]:
        return {KEY: Key(self.context[KEY].meaning, real=True, shape=(self.cloud_size, 3))}

    def prompt(self, anatomy: Anatomy) -> P2p:
        if self.targets is not None:
            raise RecipeError("p2p takes no targets: it stands before the whole model")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for path in anatomy.norms if self.rest else ():
            for leaf, _ in anatomy.model.get_submodule(path).named_parameters():
                yield Selection(f"{path}.{leaf}", decay=False)
        tops = {b[0].stack.split(".")[0] for b in behind_patches(anatomy)}
        for name, _ in anatomy.model.named_parameters() if self.rest else ():
            path, _, leaf = name.rpartition(".")
            if leaf in CLASS and (not path or path.split(".")[0] in tops):
                yield Selection(name, decay=False)

    def install(self, attacher: Attacher, part: Method) -> None:
        name, model = attacher.adapter.name, attacher.model
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        Rendered(attacher.state, name, Painter(self.neighbours).to(attacher.device("")), KEY,
                 side=self.drawn, size=self.picture, rotate=self.rotate, mean=self.pixel_mean,
                 std=self.pixel_std).listen(attacher.slot(""), part.name)
        if norms:
            Fixed(attacher.state, name, norms).listen(attacher.slot(""), f"{part.name}_norms")

    def count(self) -> int:
        """Trainable parameters beside the model's own."""
        edges = 2 * FIRST * WIDE + 2 * WIDE
        maps = 2 * (9 * WIDE * WIDE + WIDE) + WIDE * WIDE + WIDE + 3 * WIDE + 3
        return 4 * FIRST + edges + WIDE * WIDE + WIDE + maps
