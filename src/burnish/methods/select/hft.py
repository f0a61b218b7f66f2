from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block

#: (block's path, category) -> its units, each the parameters that stand or fall together
Units = dict[tuple[str, int | None], dict[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Hft(Method):
    """HFT: half of every block's matrices train as in full fine-tuning, the others keep what they
    know.

    ``theta <- theta - eta (m * dL/dtheta)``, m one number per matrix: full fine-tuning whose frozen
    half has an infinitely strong anchor. Per block and category half of the units are drawn from
    `seed`, a unit being a matrix with its bias: of the attention's (2 of q, k, v, o), of the MLP's
    (of 3: 1 and 2 in turn from block to block), of the norms (1 of 2), of whatever else the block
    has. An odd number leaves one more in every second block.

    Start: the pre-trained function. Trains half of the blocks' weights; what stands outside the
    blocks (embeddings, last norm, head) trains with ``ends=True``: Llama-2-7B without it 3.24e9.
    Kept for backward: a frozen matrix keeps no input unless a trained one reads the same. One draw
    lasts a run; for the next task of a sequence take another `seed`. `targets` narrows it.

    No code was published; the quotas of MLP and norms, and that the ends train, are our reading.
    """

    paper: ClassVar[str] = "HFT: Half Fine-Tuning for Large Language Models (2024)"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    ends: bool = setting(True, "what stands outside the blocks trains too")
    seed: int = setting(0, "of the draw")

    def repeats(self) -> int | None:
        """Which matrices train is drawn block by block."""
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not anatomy.blocks:
            raise RecipeError("hft draws half of the matrices of each repeated block, and this "
                              "model has no blocks; full(targets=...) names what trains")
        names = list(self._names(anatomy))
        for name in chosen(anatomy, self, names, siblings=False):
            yield Selection(name)

    def _names(self, anatomy: Anatomy) -> Iterator[str]:
        """What trains, in the model's order."""
        units, inside = self.units(anatomy)
        number = {b.path: i for i, b in enumerate(anatomy.blocks)}
        drawn: set[str] = set()
        for (path, _), made in units.items():
            half = (len(made) + number[path] % 2) // 2
            for stem in sorted(made, key=lambda s: Random(f"{self.seed}/{s}").random())[:half]:
                drawn |= set(made[stem])
        for name, p in anatomy.model.named_parameters():
            if p.is_floating_point() and (name in drawn or self.ends and name not in inside) \
                    and ".burnish." not in f".{name}":
                yield name

    @staticmethod
    def units(anatomy: Anatomy) -> tuple[Units, set[str]]:
        """(the units of every block by category, all names inside blocks)."""
        units: Units = {}
        inside: set[str] = set()
        for block in anatomy.blocks:
            for leaf, p in anatomy.model.get_submodule(block.path).named_parameters():
                name = f"{block.path}.{leaf}"
                inside.add(name)
                if p.is_floating_point() and ".burnish." not in f".{leaf}":
                    kinds = units.setdefault((block.path, category(anatomy, block, name)), {})
                    stem = name.removesuffix("weight").removesuffix("bias")
                    kinds.setdefault(stem, []).append(name)
        return units, inside


def category(anatomy: Anatomy, block: Block, name: str) -> int | None:
    """Of a block's parameter: norms, MLP, attention (or what mixes tokens), None for others."""
    kinds: tuple[Iterable[str | None], ...] = (
        anatomy.norms, (block.mlp, *block.mlp_in, block.mlp_out),
        (block.attn, block.attn_out, block.cross, block.cross_out, block.mixer))
    return next((k for k, paths in enumerate(kinds)
                 if any(p is not None and name.startswith(f"{p}.") for p in paths)), None)
