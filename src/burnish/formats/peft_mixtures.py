"""PEFT's types whose updates follow the sample (see peft_own.py).

    POLY       poly_lora_A (h, skills, in / h, r), poly_lora_B (h, skills, r, out / h),
               poly_router.module_logits (tasks, h skills); the scale is 1 / r, in training gates
               are drawn, and a call is told ``task_ids``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..blocks.weight.skills import Skills
from ..core.errors import FormatError
from ..core.method import Method
from .peft_own import Form, Held, Own, Said, Tensors


class Poly(Form):
    kind, method, terms = "POLY", "poly", (Skills,)
    tensors = {"poly_lora_A": Held("A", (4,)), "poly_lora_B": Held("B", (4,)),
               "poly_router.module_logits": Held("Z")}
    settings = {"r": Said("rank", "count", 8), "n_tasks": Said("tasks", "count", 1),
                "n_skills": Said("experts", "count", 4), "n_splits": Said("slices", "count", 1)}
    alone = {"poly_type": "poly"}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.rows is not None:
            raise FormatError(f"{path}: PEFT's POLY adds to all outputs of a linear, here to some "
                              "rows of a fused weight")
        said, h = method.settings(), term.Z.shape[1]
        A, B = term.A.detach(), term.B.detach() * (term.scale * said["rank"])
        return {"poly_lora_A": A.unflatten(2, (h, -1)).permute(2, 0, 3, 1).contiguous(),
                "poly_lora_B": B.unflatten(1, (h, -1)).permute(1, 0, 3, 2).contiguous(),
                "poly_router.module_logits": term.Z.detach().flatten(1)}, {
            n: said[s.ours] for n, s in self.settings.items()} | self.alone | {
            "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        s = own.settings
        want = s["slices"], s["experts"]
        for leaf in ("poly_lora_A", "poly_lora_B"):
            if (t := own.tensors.get(leaf)) is not None and t.shape[:2] != want:
                raise FormatError(f"{where}: {leaf} has {t.shape[0]} slices of {t.shape[1]} "
                                  f"skills, its settings say {want[0]} of {want[1]}")
        s |= {"alpha": 1.0, "noisy": True, "gate_rate": 1.0}     # one rate there

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        t, h = own.tensors, own.settings["slices"]
        return {"A": t["poly_lora_A"].permute(1, 3, 0, 2).flatten(2),
                "B": t["poly_lora_B"].permute(1, 0, 3, 2).flatten(1, 2),
                "Z": t["poly_router.module_logits"].unflatten(1, (h, -1))}


MIXTURES: tuple[Form, ...] = (Poly(),)
