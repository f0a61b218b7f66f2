"""The table of PEFT's types whose tensors are burnish's own in another order (see peft_own.py).

    OFT        oft_R.weight (blocks, b (b - 1) / 2); the exact rotation has the other sign of Q
    BOFT       boft_R (factors, blocks, b, b), whose skew part is -Q; boft_s (out, 1)
    HRA        hra_u (in, r)
    HIRA       hira_A (r, in), hira_B (out, r): HUT with s = 1
    MISS       with init_weights "bat", Bone: miss_block (out / r, r, r)
    SHIRA      shira_weight (k,), shira_indices (2, k)
    SUPERTUNING  supertuning_values (k,), supertuning_indices (k,), flat; with a LoRA beside them
               supertuning_lora_A.weight (r, in), supertuning_lora_B.weight (out, r)
    ADALORA    lora_A (r, in), lora_B (out, r), lora_E (r, 1)
    IA3        ia3_l (out, 1), or (1, in) where the input is scaled
    BEFT       beft_bias (1, out)
    TRAINABLE_TOKENS  trainable_tokens_delta (n, width): the rows themselves

Those whose updates are products of small tensors are in peft_products.py, those of another
structure in peft_structured.py, those in subspaces of the weight in peft_principal.py, those that
follow the sample in peft_mixtures.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..blocks.state.gates import Affine, Shift
from ..blocks.weight.butterfly import Butterfly, Gained
from ..blocks.weight.reflections import Reflections
from ..blocks.weight.rotation import Rotation
from ..blocks.weight.sparse import SparseDelta
from ..blocks.weight.tokens import Tokens
from ..blocks.weight.triplets import Triplets
from ..core.errors import FormatError
from ..core.method import Method
from ..methods.delta.ofw.bone import Guide
from ..methods.delta.ofw.hut import Weighed
from ..methods.delta.sparse.supertuning import Support
from .peft_mixtures import MIXTURES
from .peft_own import Form, Held, Own, Said, Tensors
from .peft_principal import SPACES
from .peft_products import FourierFT, Loha, Lokr, Pvera, RandLora, Vera, WaveFT, kernel_of
from .peft_shared import BANKS
from .peft_structured import Adamss, Adaption, C3a, Delora, Glora, Gralora, Road


class Oft(Form):
    kind, method, terms = "OFT", "oft", (Rotation,)
    tensors = {"oft_R.weight": Held("upper")}
    settings = {"block_share": Said("share", "flag", False), "coft": Said(None, "flag", False),
                "eps": Said(None, "number", 6e-5), "r": Said(None, "count", 0),
                "use_cayley_neumann": Said(None, "flag", True),
                "num_cayley_neumann_terms": Said("terms", "count", 5),
                "oft_block_size": Said("block", "count", 32),
                "module_dropout": Said("block_dropout", "number", 0.0)}

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
            "num_cayley_neumann_terms": term.terms or 5, "init_weights": True,
            "module_dropout": term.block_dropout}

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
    settings = {"boft_block_size": Said("block", "count", 4),
                "boft_dropout": Said("block_dropout", "number", 0.0),
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
            "boft_n_butterfly_factor": term.factors, "init_weights": True,
            "boft_dropout": term.block_dropout}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if (R := own.tensors.get("boft_R")) is None:
            raise FormatError(f"{where} lacks boft_R")
        if R.shape[2] != R.shape[3]:
            raise FormatError(f"{where}: boft_R has blocks of {R.shape[2]} x {R.shape[3]}")
        own.settings |= {"block": R.shape[2], "factors": R.shape[0], "gains": True}

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


class Hira(Form):
    kind, method, terms, gpt2 = "HIRA", "hut", (Weighed,), True
    tensors = {"hira_A": Held("A"), "hira_B": Held("B")}
    settings = {"r": Said("rank", "count", 32), "hira_dropout": Said("dropout", "number", 0.0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return {**tensors, "hira_B": term.B.detach() * term.scale}, said

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        A, said = own.tensors.get("hira_A"), own.said["r"]
        rank = said if A is None else len(A)     # PEFT takes a pattern of ranks, which does nothing
        if rank not in (said, *(config.get("rank_pattern") or {}).values()):
            raise FormatError(f"{where} has rank {rank}, its settings say {said}")
        own.settings |= {"rank": rank, "alpha": float(rank)}


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
        if int(columns.min()) < 0 or int(columns.max()) >= term.inp:
            raise RuntimeError(f"entries outside {term.out} x {term.inp}")
        return _placed(own.tensors["shira_weight"], rows * term.inp + columns, term)


def _placed(values: torch.Tensor, flat: torch.Tensor, term: Any) -> Tensors:
    """Entries in the order of the matrix."""
    if int(flat.min()) < 0 or int(flat.max()) >= term.out * term.inp:
        raise RuntimeError(f"entries outside {term.out} x {term.inp}")
    flat, order = flat.sort()
    if bool((flat[1:] == flat[:-1]).any()):
        raise RuntimeError("an entry stands twice")
    return {"values": values[order], "index": flat}


class Supertuning(Form):
    kind, method, terms, several = "SUPERTUNING", "supertuning", (Support,), True
    tensors = {"supertuning_values": Held("values", (1,)),
               "supertuning_indices": Held("index", (1,)),
               "supertuning_lora_A.weight": Held("A"), "supertuning_lora_B.weight": Held("B")}
    settings = {"select_top": Said("largest", "flag", True), "r": Said("rank", "count?", None),
                "lora_alpha": Said("alpha", "number?", None),
                "lora_dropout": Said("dropout", "number", 0.0),
                "sparsity": Said(None, "number", 0.99),
                "save_precomputed_indices": Said(None, "flag", True)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        first, *rest = term if isinstance(term, tuple) else (term,)
        said, n, k = method.settings(), first.out * first.inp, first.values.numel()
        near = [1 - said["density"] + step for step in (-1e-12, 0.0, 1e-12)]
        zeros = next((s for s in near if s >= 0 and int(n * (1 - s)) == k), None)
        if zeros is None:
            raise FormatError(f"{path}: {k} of {n} entries are not the share of "
                              f"{said['density']} that the recipe says; merge instead")
        tensors = {"supertuning_values": first.values.detach(),
                   "supertuning_indices": first.index.to(torch.int32)}
        for chain in rest:
            tensors |= {f"supertuning_lora_{leaf}.weight": getattr(chain, leaf).detach()
                        for leaf in "AB"}
        alpha = 2.0 * said["rank"] if rest and said["alpha"] is None else said["alpha"]
        return tensors, {"sparsity": zeros, "select_top": said["largest"], "r": said["rank"],
                         "lora_alpha": alpha, "lora_dropout": said["dropout"],
                         "save_precomputed_indices": True, "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        values, index = (own.tensors.get(f"supertuning_{n}") for n in ("values", "indices"))
        if values is None or index is not None and (index.shape != values.shape
                                                    or index.is_floating_point()):
            raise FormatError(f"{where}: supertuning_indices should be as many whole numbers as "
                              "supertuning_values has")
        if not 0 <= own.said["sparsity"] < 1:
            raise FormatError(f"{where}: sparsity = {own.said['sparsity']}; expected a share from "
                              "0, below 1")
        if own.settings["rank"] is None:
            own.settings |= {"alpha": None, "dropout": 0.0}
        elif own.settings["alpha"] is not None:
            own.settings["alpha"] = float(own.settings["alpha"])
        own.settings["density"] = round(1 - own.said["sparsity"], 12)
        own.settled = {"entries": values.numel()}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        if not isinstance(term, Support):
            return {leaf: own.tensors[f"supertuning_lora_{leaf}.weight"] for leaf in "AB"}
        values, index = own.tensors["supertuning_values"], own.tensors.get("supertuning_indices")
        n, share = term.out * term.inp, 1 - own.said["sparsity"]
        if len(values) != int(n * share):
            raise RuntimeError(f"{len(values)} of {n} entries, its settings say {int(n * share)}")
        if index is None and own.said["save_precomputed_indices"]:
            raise KeyError("supertuning_indices")
        if index is None:                        # PEFT finds them again
            size = module.weight.detach().abs().flatten()
            index = torch.topk(size, len(values), largest=own.said["select_top"]).indices
        return _placed(values, index.long().to(values.device), term)


class AdaLora(Form):
    kind, method, terms = "ADALORA", "adalora", (Triplets,)
    gpt2, pairs = True, True
    tensors = {"lora_A": Held("Q"), "lora_B": Held("P"), "lora_E": Held("E")}
    settings = {"target_r": Said("rank", "count", 8),
                "lora_dropout": Said("dropout", "number", 0.0),
                "init_r": Said("init_rank", "count", 12),
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
                "lora_E": term.E.detach()[:, None]}, part | {
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


class Beft(Form):
    kind, method, terms = "BEFT", "beft", (Shift,)
    tensors = {"beft_bias": Held("shift")}
    settings: ClassVar[dict[str, Said]] = {}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.rows != ((0, module.out_features),):
            raise FormatError(f"{path}: PEFT's BEFT adds a bias to all outputs of a layer, here to "
                              "some of them; merge instead")
        return {"beft_bias": term.shift.detach()[None] * term.scale}, {"init_weights": True}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {"shift": own.tensors["beft_bias"].flatten()}


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
FORMS: tuple[Form, ...] = (*SPACES, *BANKS, *MIXTURES, Supertuning(), Beft(),
                           Lokr(), Loha(), Oft(), Boft(), Hra(), Hira(), Bone(), FourierFT(),
                           WaveFT(), Vera(), Pvera(), RandLora(), Shira(), AdaLora(), Ia3(), TOKENS,
                           Road(), C3a(), Delora(), Gralora(), Adaption(),
                           Adamss(), Glora())
OF_TERM: dict[type[nn.Module], Form] = {t: f for f in FORMS for t in f.terms}
OF_KIND: dict[str, Form] = {f.kind: f for f in FORMS}
