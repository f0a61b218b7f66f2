"""The table of PEFT's types whose tensors are burnish's own in another order (see peft_own.py).

    OFT        oft_R.weight (blocks, b (b - 1) / 2); the exact rotation has the other sign of Q
    BOFT       boft_R (factors, blocks, b, b), whose skew part is -Q; boft_s (out, 1)
    HRA        hra_u (in, r)
    MISS       with init_weights "bat", Bone: miss_block (out / r, r, r)
    SHIRA      shira_weight (k,), shira_indices (2, k)
    ADALORA    lora_A (r, in), lora_B (out, r), lora_E (r, 1)
    IA3        ia3_l (out, 1), or (1, in) where the input is scaled
    TRAINABLE_TOKENS  trainable_tokens_delta (n, width): the rows themselves

Those whose updates are products of small tensors are in peft_products.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..blocks.state.gates import Affine
from ..blocks.weight.butterfly import Butterfly, Gained
from ..blocks.weight.reflections import Reflections
from ..blocks.weight.rotation import Rotation
from ..blocks.weight.sparse import SparseDelta
from ..blocks.weight.tokens import Tokens
from ..blocks.weight.triplets import Triplets
from ..core.errors import FormatError
from ..core.method import Method
from ..methods.delta.ofw.bone import Guide
from .peft_own import Form, Held, Own, Said, Tensors
from .peft_products import FourierFT, Loha, Lokr, RandLora, Vera, kernel_of


class Oft(Form):
    kind, method, terms = "OFT", "oft", (Rotation,)
    tensors = {"oft_R.weight": Held("upper")}
    alone = {"module_dropout": 0.0}
    settings = {"block_share": Said("share", "flag", False), "coft": Said(None, "flag", False),
                "eps": Said(None, "number", 6e-5), "r": Said(None, "count", 0),
                "use_cayley_neumann": Said(None, "flag", True),
                "num_cayley_neumann_terms": Said("terms", "count", 5),
                "oft_block_size": Said("block", "count", 32)}

    def check_layer(self, module: nn.Module, path: str) -> None:
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise FormatError(f"{path}: PEFT's OFT of a {type(module).__name__} turns overlapping "
                              "patches and adds them up, another function; export the linear "
                              "layers alone, or merge instead")
        super().check_layer(module, path)

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if 0 < term.terms < 4:
            raise FormatError(f"{path}: PEFT's series has at least 4 terms, this rotation "
                              f"{term.terms}; merge instead")
        upper = term.upper.detach()
        return {"oft_R.weight": upper if term.terms else -upper}, {
            "r": 0, "oft_block_size": term.block, "block_share": upper.shape[0] == 1,
            "coft": False, "use_cayley_neumann": bool(term.terms),
            "num_cayley_neumann_terms": term.terms or 5, "init_weights": True} | self.alone

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if "oft_R.weight" not in own.tensors:
            raise FormatError(f"{where} lacks oft_R.weight")
        upper, said = own.tensors["oft_R.weight"], own.said
        terms = (said["num_cayley_neumann_terms"] or 5) if said["use_cayley_neumann"] else 0
        if said["use_cayley_neumann"] and terms < 3:
            raise FormatError(f"{where}: a series of {terms} terms has no counterpart in burnish")
        own.settings |= {"block": round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2),
                         "terms": max(terms, 4) if terms else 0}
        upper = upper if terms else -upper
        if said["coft"]:                         # PEFT brings them back when it next runs
            bound = (said["eps"] or 6e-5) / upper.shape[0] ** 0.5
            norm = torch.linalg.vector_norm(upper, dim=1, keepdim=True) * 2**0.5
            upper, own.settings["bound"] = upper * (bound / norm.clamp_min(bound)), bound
        own.tensors = {"oft_R.weight": upper}


class Boft(Form):
    kind, method, terms = "BOFT", "boft", (Butterfly, Gained)
    tensors = {"boft_R": Held("upper", (4,)), "boft_s": Held("s", (1, 2))}
    alone = {"boft_dropout": 0.0}
    settings = {"boft_block_size": Said("block", "count", 4),
                "boft_block_num": Said(None, "count", 0),
                "boft_n_butterfly_factor": Said("factors", "count", 1)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.terms:
            raise FormatError(f"{path}: PEFT's BOFT solves for its rotations; one of a series of "
                              f"{term.terms} terms is another function: boft(terms=0), or merge")
        Q = term.skew().detach()
        s = term.s.detach() if isinstance(term, Gained) else Q.new_ones(module.weight.shape[0])
        return {"boft_R": -Q.unflatten(0, (term.factors, -1)), "boft_s": s[:, None]}, {
            "boft_block_size": term.block, "boft_block_num": 0,
            "boft_n_butterfly_factor": term.factors, "init_weights": True} | self.alone

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if (R := own.tensors.get("boft_R")) is None:
            raise FormatError(f"{where} lacks boft_R")
        if R.shape[2] != R.shape[3]:
            raise FormatError(f"{where}: boft_R has blocks of {R.shape[2]} x {R.shape[3]}")
        own.settings = {"block": R.shape[2], "factors": R.shape[0], "gains": True}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        S = own.tensors["boft_R"].flatten(0, 1)
        i, j = torch.triu_indices(S.shape[-1], S.shape[-1], 1)
        return {"upper": (S.transpose(1, 2) - S)[:, i, j] / 2, "s": own.tensors["boft_s"].flatten()}


class Hra(Form):
    kind, method, terms = "HRA", "hra", (Reflections,)
    layers, pairs = (nn.Linear, nn.Conv2d), True
    tensors = {"hra_u": Held("U")}
    settings = {"r": Said("rank", "count", 8), "apply_GS": Said(None, "flag", False)}

    def check_layer(self, module: nn.Module, path: str) -> None:
        super().check_layer(module, path)
        if (k := kernel_of(module)) and (len(set(k)) > 1 or module.groups > 1):
            raise FormatError(f"{path}: PEFT's HRA is for square kernels without groups")

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if own.settings["rank"] % 2:
            raise FormatError(f"{where}: {own.settings['rank']} reflections; an odd number cannot "
                              "start from the pre-trained function, and is not read")
        U = own.tensors["hra_u"]
        if own.said["apply_GS"] and U.shape[0] >= U.shape[1]:
            Q, R = torch.linalg.qr(U)            # axes at right angles: the chain of them is theirs
            own.tensors = {"hra_u": Q}


class Bone(Form):
    kind, method, terms = "MISS", "bone", (Guide,)
    tensors = {"miss_block": Held("D", (3,))}
    alone = {"miss_dropout": 0.0}
    settings = {"r": Said("rank", "count", 64)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return tensors, said | {"init_weights": "bat", "mini_r": 1}


class Shira(Form):
    kind, method, terms = "SHIRA", "shira", (SparseDelta,)
    tensors = {"shira_weight": Held("values", (1,)), "shira_indices": Held("index")}
    settings = {"r": Said("rank", "count", 32), "random_seed": Said(None, "whole?", None)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        k, sides = term.values.numel(), term.out + term.inp
        if k % sides:
            raise FormatError(f"{path}: PEFT's SHiRA has r (in + out) entries, r a whole number; "
                              f"here are {k} of {term.out} x {term.inp}: merge instead")
        rows, columns = term._rows_cols()
        return {"shira_weight": term.values.detach(),
                "shira_indices": torch.stack([rows, columns]).int()}, {
            "r": k // sides, "mask_type": "random", "random_seed": None, "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        index, v = own.tensors.get("shira_indices"), own.tensors.get("shira_weight")
        if v is None or index is None or index.shape != (2, v.numel()):
            raise FormatError(f"{where}: shira_indices should be two rows of as many numbers as "
                              "shira_weight has values")
        own.settings["mask"], own.settled = "stored", {"entries": v.numel()}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        rows, columns = own.tensors["shira_indices"].long()
        if int(rows.min()) < 0 or int(columns.min()) < 0 or int(rows.max()) >= term.out \
                or int(columns.max()) >= term.inp:
            raise RuntimeError(f"entries outside {term.out} x {term.inp}")
        flat, order = (rows * term.inp + columns).sort()
        if bool((flat[1:] == flat[:-1]).any()):
            raise RuntimeError("an entry stands twice")
        return {"values": own.tensors["shira_weight"][order], "index": flat}


class AdaLora(Form):
    kind, method, terms = "ADALORA", "adalora", (Triplets,)
    gpt2, pairs = True, True
    tensors = {"lora_A": Held("Q"), "lora_B": Held("P"), "lora_E": Held("E")}
    alone = {"lora_dropout": 0.0}
    settings = {"target_r": Said("rank", "count", 8), "init_r": Said("init_rank", "count", 12),
                "lora_alpha": Said("alpha", "number", 8), "tinit": Said(None, "count", 0),
                "tfinal": Said(None, "count", 0), "deltaT": Said("every", "count", 1),
                "orth_reg_weight": Said("ortho", "number", 0.5),
                "total_step": Said(None, "count?", None),
                "rank_pattern": Said(None, "mapping?", None)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said, steps, r = method.settings(), 1000, term.rank
        if method.name != self.method or term.waiting or r > said["init_rank"]:
            raise FormatError(f"{path}: {method.name} is no AdaLoRA")
        part = {n: said[s.ours] for n, s in self.settings.items() if s.ours}
        mask = [i < r for i in range(said["init_rank"])]
        return {"lora_A": term.Q.detach(), "lora_B": term.P.detach(),
                "lora_E": term.E.detach()[:, None]}, part | self.alone | {
            "r": said["init_rank"], "tinit": round(said["warmup"] * steps), "total_step": steps,
            "tfinal": round(said["cooldown"] * steps), "rank_pattern": {f"{path}.lora_E": mask},
            "init_lora_weights": True, "beta1": 0.85, "beta2": 0.85}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if (E := own.tensors.get("lora_E")) is None:
            raise FormatError(f"{where} lacks lora_E")
        if own.settings["alpha"] <= 0:
            raise FormatError(f"{where}: lora_alpha = {own.settings['alpha']}; expected a number "
                              "above 0")
        steps = own.said["total_step"] or 1
        own.settings |= {"warmup": own.said["tinit"] / steps,
                         "cooldown": own.said["tfinal"] / steps,
                         "alpha": float(own.settings["alpha"])}
        own.settled = {"rank": E.shape[0]}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {"Q": own.tensors["lora_A"], "P": own.tensors["lora_B"],
                "E": own.tensors["lora_E"].flatten()}


class Ia3(Form):
    kind, method, terms, gpt2 = "IA3", "ia3", (Affine,), True
    tensors = {"ia3_l": Held("gain")}
    settings: ClassVar[dict[str, Said]] = {}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if method.name != self.method:
            raise FormatError(f"{path}: PEFT has no form for {method.name}; merge instead")
        gain, inside = term.whole(term.gain, 1.0).detach(), term.side == "input"
        return {"ia3_l": gain[None] if inside else gain[:, None]}, {
            "init_ia3_weights": True, "feedforward_modules": {path: True} if inside else {}}

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        inside = "|".join(map(re.escape, settings["feedforward_modules"]))
        return settings | {"feedforward_modules": f"^({inside})$" if inside else []}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settings["at"] = "input" if own.tensors["ia3_l"].shape[0] == 1 else "output"

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {"gain": own.tensors["ia3_l"].flatten()}


class TrainableTokens(Form):
    kind, method, terms = "TRAINABLE_TOKENS", "trainable_tokens", (Tokens,)
    layers = (nn.Embedding,)
    tensors = {"trainable_tokens_delta": Held("rows")}
    settings = {"token_indices": Said("ids", "list", [])}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        rows = module.weight.detach()[term.ids] + term.rows.detach()
        return {"trainable_tokens_delta": rows}, {"token_indices": term.ids.tolist(),
                                                  "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        ids, rows = own.settings["ids"], own.tensors["trainable_tokens_delta"]
        if not all(type(i) is int for i in ids) or len(ids) != len(rows):
            raise FormatError(f"{where}: token_indices should be {len(rows)} whole numbers, as "
                              "many as there are rows")
        own.settings["ids"] = tuple(ids)

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        rows = own.tensors["trainable_tokens_delta"]
        return {"rows": rows - module.weight.detach()[term.ids.to(module.weight.device)].to(rows)}


TOKENS = TrainableTokens()
FORMS: tuple[Form, ...] = (Lokr(), Loha(), Oft(), Boft(), Hra(), Bone(), FourierFT(), Vera(),
                           RandLora(), Shira(), AdaLora(), Ia3(), TOKENS)
OF_TERM: dict[type[nn.Module], Form] = {t: f for f in FORMS for t in f.terms}
OF_KIND: dict[str, Form] = {f.kind: f for f in FORMS}
