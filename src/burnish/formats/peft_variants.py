"""What PEFT writes as LORA and is another function than a LoRA: one setting of the config says it
(see peft_own.py).

    use_bdlora             lora_A.weight (r, in / n) or lora_B.weight (out, r / n): blocks of a
                           diagonal one below the other; patterns in the setting say which
    kasa_config            lora_A, lora_B, lora_diag (r,); the least r triplets leave the weight,
                           which whoever reads takes off again
    alora_invocation_tokens  lora_A, lora_B, which count behind these tokens
    use_qalora             lora_A.weight (r, in / group); in PEFT on GPTQ's layers alone, so it is
                           read, and written as the plain pair that it is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..blocks.weight.invoked import Invoked
from ..blocks.weight.least import Cut, Graded, least
from ..core.errors import FormatError
from ..core.method import Method
from ..core.reading import shown
from ..methods.delta.lowrank.bd_lora import Blockwise
from ..methods.delta.lowrank.qa_lora import Summed
from .peft_own import HERE, Form, Held, Own, Said, Tensors
from .peft_principal import matrix


class Variant(Form):
    """A row of the type LORA. says: the setting that makes it this one."""

    kind = "LORA"
    says: str
    tensors = {"lora_A.weight": Held("A"), "lora_B.weight": Held("B")}
    settings = {"r": Said("rank", "count", 8), "lora_alpha": Said("alpha", "number", 8),
                "lora_dropout": Said("dropout", "number", 0.0),
                "use_rslora": Said(None, "flag", False)}
    patterned = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    alone = {"use_dora": False, "lora_bias": False, "trainable_token_indices": None,
             "target_parameters": None, "velora_config": None, "monteclora_config": None}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return tensors, {n: v for n, v in said.items() if n != "init_weights"} | {
            "init_lora_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        rank, start = own.settings["rank"], config.get("init_lora_weights")
        if str(start).lower() == "mica":             # whose B stays as it is
            raise FormatError(f"{where}: init_lora_weights = {shown(start)} and {self.says} are "
                              "two functions")
        if (A := own.tensors.get("lora_A.weight")) is not None and len(A) != rank:
            raise FormatError(f"{where} has rank {len(A)}, its settings say {rank}")
        own.settings["alpha"] = float(own.settings["alpha"]) * \
            (rank**0.5 if own.said["use_rslora"] else 1.0)
        own.settings["dropout"] = float(own.settings["dropout"])

    def inside(self, config: Mapping[str, Any], kinds: dict[str, type], where: str
               ) -> dict[str, Any]:
        """The fields of the setting that says it. Raises FormatError for others."""
        said = config[self.says]
        if not isinstance(said, dict):
            raise FormatError(f"{where}: {self.says} = {shown(said)}; expected its fields")
        for name, value in said.items():
            if name not in kinds:
                raise FormatError(f"{where}: {self.says}.{shown(name)[1:-1]} = {shown(value)} has "
                                  "no counterpart in burnish")
            whole = kinds[name] is float and type(value) is int
            if value is not None and not whole and type(value) is not kinds[name]:
                raise FormatError(f"{where}: {self.says}.{name} = {shown(value)}; expected "
                                  f"{kinds[name].__name__}")
        return said


class Blocked(Variant):
    says, method, terms, pairs = "use_bdlora", "bd_lora", (Blockwise,), True
    settings = Variant.settings | {"use_bdlora": Said(None, "mapping", None)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return tensors, said | {"blocks": term.blocks, "use_bdlora": {path: term.cut}}

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        """PEFT finds each of these names inside the module's: the shortest that find no others."""
        cut = settings["use_bdlora"]
        for short in (True, False):
            names = {side: sorted({p.rpartition(".")[2] if short else p
                                   for p, c in cut.items() if c == side}) for side in "AB"}
            if all((c == side) == any(n in p for n in names[side])
                   for p, c in cut.items() for side in "AB"):
                break
        else:
            raise FormatError("PEFT's BD-LoRA finds what is cut by a part of the name, and here "
                              "are names inside each other; merge instead")
        return {n: v for n, v in settings.items() if n != "blocks"} | {"use_bdlora": {
            "target_modules_bd_a": names["A"] or None, "target_modules_bd_b": names["B"] or None,
            "nblocks": settings["blocks"], "match_strict": True}}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        super().adjust(own, config, where)
        said = self.inside(config, {"target_modules_bd_a": list, "target_modules_bd_b": list,
                                    "nblocks": int, "match_strict": bool}, where)
        found = [side for side in "AB" for n in [said.get(f"target_modules_bd_{side.lower()}")]
                 if n and any(isinstance(x, str) and x in config[HERE] for x in n)]
        if len(found) > 1 or said.get("match_strict", True) and not found:
            raise FormatError(f"{where}: use_bdlora names {'both' if found else 'none'} of its "
                              "factors")
        blocks = said.get("nblocks", 1) if found else 1    # a LoRA beside them has one
        if not isinstance(blocks, int) or blocks < 1:
            raise FormatError(f"{where}: use_bdlora.nblocks = {shown(blocks)}; expected 1 or more")
        own.settings |= {"shards": blocks, "sharded": found[0] if found else "B"}


class Kasa(Variant):
    says, method, terms = "kasa_config", "kasa", (Graded, Cut)
    pairs, several = True, True
    tensors = Variant.tensors | {"lora_diag": Held("E", (1,))}
    settings = Variant.settings | {"kasa_config": Said(None, "mapping", None)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        graded, cut = term
        U, V = least(matrix(module), len(cut.V))
        gone, here = U @ V, cut.U @ cut.V
        if float((gone - here).norm()) > 1e-4 * float(gone.norm()):
            raise FormatError(f"{path}: PEFT takes the least directions off the weight, and finds "
                              "others than this adapter has")
        tensors, said = super().give(graded, method, module, path)
        own = method.settings()
        return tensors, said | {"kasa_config": {"beta": own["weight"], "gamma": own["ortho"]}}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        super().adjust(own, config, where)
        said = self.inside(config, {"beta": float, "gamma": float}, where)
        own.settings |= {"weight": float(said.get("beta", 1e-4)),
                         "ortho": float(said.get("gamma", 1e-3))}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        if isinstance(term, Cut):
            return dict(zip("UV", least(matrix(module), len(term.V)), strict=True))
        return super().values(own, term, module)


class Activated(Variant):
    says, method, terms, gpt2 = "alora_invocation_tokens", "alora", (Invoked,), True
    settings = Variant.settings | {"alora_invocation_tokens": Said("invocation", "list", None)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.rows is not None:
            raise FormatError(f"{path}: PEFT's aLoRA adds to all outputs of a linear, here to some "
                              "rows of a fused weight")
        tensors, said = super().give(term, method, module, path)
        return tensors, said | {"alora_invocation_tokens": list(said["alora_invocation_tokens"])}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        super().adjust(own, config, where)
        ids = own.settings["invocation"]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise FormatError(f"{where}: alora_invocation_tokens = {shown(ids)}; expected token "
                              "ids")
        own.settings["invocation"] = tuple(ids)


class Pooled(Variant):
    says, method, terms, pairs, gpt2 = "use_qalora", "qa_lora", (Summed,), True, True
    settings = Variant.settings | {"use_qalora": Said(None, "flag", False),
                                   "qalora_group_size": Said("group", "count", 16)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        raise FormatError(f"{path}: PEFT has QALoRA for layers of GPTQ alone")

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        super().adjust(own, config, where)
        if (A := own.tensors.get("lora_A.weight")) is not None and own.settings["group"]:
            # the mean of a group times the number of groups, here their sum
            own.settings["alpha"] *= A.shape[1] / own.settings["group"]


VARIANTS: tuple[Variant, ...] = (Blocked(), Kasa(), Activated(), Pooled())
OF_VARIANT = {t: form for form in VARIANTS for t in form.terms}


def variant_of(config: Mapping[str, Any], where: str) -> Variant | None:
    """Which row a config of LORA is of, None where it is LoRA itself. Raises FormatError for two
    at once."""
    found = [form for form in VARIANTS if config.get(form.says)]
    if len(found) > 1:
        raise FormatError(f"{where}: {found[0].says} and {found[1].says} are two functions")
    return found[0] if found else None
