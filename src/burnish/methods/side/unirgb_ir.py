from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.infrared import KERNELS, Injected, Injector, Pool, Pooled
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import patch_stack, patches, refuse, unmet
from ...core.site import Selection
from ..prompt.vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

KEY = "infrared"
#: of ImageNet's pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class UnirgbIr(Method):
    """UniRGB-IR: a second picture of the scene, infrared, is injected into a frozen vision
    transformer of pictures in colour.

    The batch names ``infrared``, (1, pixels, pixels) of 0 to 1 a sample. Both pictures make a pool
    F of features at 1/8, 1/16 and 1/32; blocks are cut into `injectors` stages, before the i-th

        N_i = gamma_i * MSDeformAttn(LN x, LN F),   P_1 = N_1
        P_i = (1 - z) P_{i-1} + z N_i,   z = sigmoid(W_i [mean N_i; mean P_{i-1}])   (B, D)
        x <- x + P_i

    x the tokens of patches, whose own places the attention looks around (3 levels, `offsets` places
    a head and level; ``blocks/state/infrared.py``). Infrared pictures are taken in three equal
    channels, less pixel_mean, over pixel_std.

    Start: gamma = 0, the pre-trained function exactly whatever the second picture; the first
    update moves gamma alone (and what else trains), the pool is reached behind it. Trains the pool
    (1.65 M at D = 768), the attentions (5.39 M in four), the gates (3.54 M), and tables of relative
    positions. Kept for backward: as of training all blocks, F and what the injectors keep. Not
    mergeable. Sides that 32 does not divide leave levels that are rounded up.

    Departures: batch norms are of one process (the paper's are synchronised), and of one number a
    channel go by their running statistics. Injectors stand outside what checkpointing runs again.
    """

    paper: ClassVar[str] = ("UniRGB-IR: A Unified Framework for RGB-Infrared Semantic Tasks via "
                            "Adapter Tuning (2024)")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"plain patches"})
    context: ClassVar[Mapping[str, Key]] = {KEY: Key("a second picture of each sample", real=True)}
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"pixels": 16, "injectors": 2, "attention_heads": 4,
                                      "stem": 8}

    pixels: int = setting(768, "pixels of the infrared picture's side", other=(8,))
    injectors: int = setting(4, "before how many blocks, spread evenly", other=(1,))
    attention_heads: int = setting(6, "of the deformable attention", other=(2,))
    offsets: int = setting(4, "places that a head looks at in each level")
    stem: int = setting(64, "channels of the pool's stems", other=(4,))
    rel_pos: bool = setting(True, "tables of relative positions train too",
                              unseen="the suite's plain transformers have none: "
                                     "tests/methods/test_unirgb_ir.py")
    pixel_mean: tuple[float, ...] = setting(_MEAN, "of the pixels, by channel")
    pixel_std: tuple[float, ...] = setting(_STD, "of the pixels, by channel")

    def __post_init__(self) -> None:
        if min(self.pixels, self.injectors, self.attention_heads, self.offsets, self.stem) < 1 \
                or self.stem % len(KERNELS):
            raise RecipeError("unirgb_ir: pixels, injectors, attention_heads and offsets of at "
                              f"least 1 and a stem that {len(KERNELS)} divides are expected")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise RecipeError("unirgb_ir: pixel_mean and pixel_std have three numbers, the latter "
                              f"positive; got {self.pixel_mean} and {self.pixel_std}")

    def keys(self) -> Mapping[str, Key]:
        return {KEY: Key(self.context[KEY].meaning, real=True, shape=(1, self.pixels, self.pixels))}

    def repeats(self) -> int | None:
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for name, _ in anatomy.model.named_parameters() if self.rel_pos else ():
            if "rel_pos" in name.rpartition(".")[2]:
                yield Selection(name)

    def starts(self, anatomy: Anatomy) -> list[int]:
        """Numbers of the blocks that begin a stage."""
        n = len(patch_stack(anatomy) or ())
        if n < self.injectors:
            raise RecipeError(f"unirgb_ir(injectors={self.injectors}): there are {n} blocks")
        return [i * n // self.injectors for i in range(self.injectors)]

    def prompt(self, anatomy: Anatomy) -> UnirgbIr:
        if self.targets is not None:
            raise RecipeError("unirgb_ir takes no targets: it stands before blocks; say how many "
                              "with injectors")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        model, anatomy, name = attacher.model, attacher.anatomy, attacher.adapter.name
        blocks, starts = patch_stack(anatomy), self.starts(anatomy)
        d = blocks[0].hidden_size
        if d % self.attention_heads:
            raise RecipeError(f"unirgb_ir(attention_heads={self.attention_heads}) does not divide "
                              f"the width {d}")
        after = special_tokens(model, blocks[0].stack)
        own = model.get_submodule(patches(anatomy)[0].path)
        Pooled(attacher.state, name, Pool(d, self.stem), KEY, self.pixel_mean, self.pixel_std,
               own.stride).to(attacher.device("")).listen(attacher.slot(""), f"{part.name}_pool")
        for i in starts:
            path = blocks[i].path
            made = Injector(d, self.attention_heads, self.offsets, first=i == starts[0])
            Injected(attacher.state, name, made, after).to(attacher.device(path)).listen(
                attacher.slot(path), part.name)

    def count(self, d: int) -> int:
        """Trainable parameters at width d, tables of relative positions aside."""
        return Pool.count(d, self.stem) + sum(
            Injector.count(d, self.attention_heads, self.offsets, not i)
            for i in range(self.injectors))
