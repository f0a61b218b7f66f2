"""PEFT's types whose updates have a structure of their own (see peft_own.py).

    ROAD       road_theta, road_alpha (out / 2,), (out,) or (2 out,): variants 1, 2, 4
    C3A        c3a_kernel (out / block, in / block, block)
    DELORA     delora_A (r, in), delora_B (out, r), delora_lambda (1,), delora_w_norm (in,)
    GRALORA    gralora_A (k, in / k, r), gralora_B (k, r, out / k); with a plain pair
               gralora_A_general.weight (rest, in), gralora_B_general.weight (out, rest)
    ADAMSS     adamss_A.N (s, r), adamss_B.N (outputs of the cluster, s), adamss_newB (r, in); which
               outputs are in a cluster is told by the weight
    GLORA      glora_A.Xd (out, r), glora_A.Xu (r, in), or glora_A.X (out, 1) or (1,); glora_B so;
               glora_C.zeros, glora_D.zeros, glora_E.zeros where a bias stays
    ADAPTION_PROMPT  adaption_prompt (1, length, width), adaption_gate (1,), of an attention
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.state.gated_rows import GatedRows
from ..blocks.state.planes import Planes
from ..blocks.weight.circulant import Circulant
from ..blocks.weight.clustered import Clustered, clusters, leading
from ..blocks.weight.granular import Granular
from ..blocks.weight.normed import Normed
from ..core.errors import FormatError
from ..core.method import Method
from ..methods.delta.ofw.glora import Generalised
from .peft_own import Form, Held, Own, Said, Tensors

if TYPE_CHECKING:
    from ..core.anatomy import Anatomy


class Road(Form):
    kind, method, terms = "ROAD", "road", (Planes,)
    tensors = {"road_theta": Held("theta", (1,)), "road_alpha": Held("alpha", (1,))}
    settings = {"variant": Said("own", "text", "road_1"),
                "group_size": Said("block", "count", 64)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.rows is not None:
            raise FormatError(f"{path}: PEFT's RoAd turns all outputs of a linear, here some rows "
                              "of a fused weight are turned; merge instead")
        tensors, said = super().give(term, method, module, path)
        return tensors, said | {"variant": f"road_{term.own}"}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if (said := own.said["variant"]) not in ("road_1", "road_2", "road_4"):
            raise FormatError(f"{where}: variant = {said!r}; expected road_1, road_2 or road_4")
        own.settings["own"] = int(said[-1])


class C3a(Form):
    kind, method, terms = "C3A", "c3a", (Circulant,)
    tensors = {"c3a_kernel": Held("w", (3,))}
    settings = {"block_size": Said("block", "count", 256)}
    patterned, named = {"block_size": "block_size_pattern"}, True


class Delora(Form):
    kind, method, terms, pairs = "DELORA", "delora", (Normed,), True
    tensors = {"delora_A": Held("A"), "delora_B": Held("B"), "delora_lambda": Held("lam", (1,)),
               "delora_w_norm": Held("norms", (1,))}
    settings = {"r": Said("rank", "count", 8), "delora_lambda": Said("reach", "number", 15),
                "module_dropout": Said("dropout", "number", 0.0)}
    patterned = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        for name in ("reach", "dropout"):
            own.settings[name] = float(own.settings[name])


class Gralora(Form):
    kind, method, terms = "GRALORA", "gralora", (Granular,)
    gpt2, pairs = True, True
    tensors = {"gralora_A": Held("A", (3,)), "gralora_B": Held("B", (3,)),
               "gralora_A_general.weight": Held("A_rest"),
               "gralora_B_general.weight": Held("B_rest")}
    settings = {"r": Said("rank", "count", 32), "alpha": Said("alpha", "number", 64),
                "gralora_k": Said("cells", "count", 2), "hybrid_r": Said("beside", "whole", 0),
                "gralora_dropout": Said("dropout", "number", 0.0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        state, said = term.state_dict(), method.settings()
        return ({leaf: state[held.name] for leaf, held in self.tensors.items()
                 if held.name in state},
                {name: said[s.ours] for name, s in self.settings.items() if s.ours}
                | {"init_weights": True})

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        for name in ("alpha", "dropout"):
            own.settings[name] = float(own.settings[name])

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {held.name: own.tensors[leaf] for leaf, held in self.tensors.items()
                if getattr(term, held.name) is not None}


class Adamss(Form):
    kind, method, terms, pairs = "ADAMSS", "adamss", (Clustered,), True
    tensors = {f"adamss_{side}.{n}": Held(f"{side}.{n}") for side in "AB" for n in range(64)} | {
        "adamss_newB": Held("V")}
    settings = {"r": Said("rank", "count", 100), "num_subspaces": Said("clusters", "count", 5),
                "subspace_rank": Said("each", "count", 1), "random_seed": Said("seed", "whole", 0),
                "use_dynamic_rank": Said(None, "flag", False),
                "svd_threshold": Said("threshold", "number", 0.1)}

    def check_layer(self, module: nn.Module, path: str) -> None:
        super().check_layer(module, path)
        if module.bias is not None:
            raise FormatError(f"{path} has a bias, which PEFT's ADAMSS takes as one more input")

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        at = self._clusters(module, said)
        if not torch.equal(at, term.cluster.cpu()) or len(term.A) > 64:
            raise FormatError(f"{path}: PEFT reads the clusters of ADAMSS off the weight, and "
                              "finds others than this adapter has, or they are more than 64")
        out = {"adamss_newB": term.V}
        for c, A in enumerate(term.A.detach()):
            out |= {f"adamss_A.{c}": A.clone(), f"adamss_B.{c}": term.B.detach()[at == c]}
        fixed = said["threshold"] is None
        return out, {"r": said["rank"], "num_subspaces": said["clusters"],
                     "subspace_rank": said["each"], "random_seed": said["seed"],
                     "use_dynamic_rank": not fixed, "init_weights": "orthogonal",
                     "svd_threshold": 0.1 if fixed else said["threshold"], "use_asa": False}

    @staticmethod
    def _clusters(module: nn.Module, said: Mapping[str, Any]) -> Tensor:
        """By the k-means that PEFT calls where it is there: exact ties fall by its rounding."""
        U, k = leading(module.weight, said["rank"], said["seed"])[0], said["clusters"]
        try:
            from sklearn.cluster import KMeans
        except ImportError:
            return clusters(U, k)
        means = KMeans(min(k, len(U)), init="random", n_init=1, max_iter=10, random_state=123456789)
        return torch.from_numpy(means.fit_predict(U.numpy())).long()

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if not own.said["use_dynamic_rank"] or own.said["subspace_rank"] == 1:
            own.settings["threshold"] = None

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        at = self._clusters(module, own.settings)
        A, B = torch.zeros(term.A.shape), torch.zeros(term.B.shape)
        for c in range(len(A)):
            a, b = own.tensors[f"adamss_A.{c}"], own.tensors[f"adamss_B.{c}"]
            s, rows = len(a), at == c
            if b.shape != (int(rows.sum()), s) or s > A.shape[1] or a.shape[1] != A.shape[2]:
                raise FormatError(f"adamss_A.{c} and adamss_B.{c} are {list(a.shape)} and "
                                  f"{list(b.shape)}, the model needs rank {A.shape[1]} at most, "
                                  f"{A.shape[2]} directions and {int(rows.sum())} outputs")
            A[c, :s] = a
            B[rows.nonzero(), torch.arange(s)] = b.to(B)
        return {"A": A, "B": B, "V": own.tensors["adamss_newB"], "cluster": at}


class Glora(Form):
    kind, method, terms, shifts = "GLORA", "glora", (Generalised,), True
    tensors = {f"glora_{n}.{leaf}": Held(n, (1, 2)) for n in "ABCDE"
               for leaf in ("Xd", "Xu", "X", "zeros")}
    settings = {"r": Said("rank", "count", 8), "config_A_B": Said("form", "text", "lora"),
                "config_C": Said(None, "text", "lora"),
                "config_D_E": Said(None, "text", "constant")}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said, out = method.settings(), {}
        leaves = {"Xd": "_out", "Xu": "_in"} if term.form == "lora" else {"X": ""}
        for n in "AB":
            out |= {f"glora_{n}.{leaf}": getattr(term, n + mine).detach()
                    for leaf, mine in leaves.items()}
        out |= self._zeros(module)
        return out, {"r": said["rank"], "config_A_B": term.form, "config_C": "none",
                     "config_D_E": "none", "init_weights": True}

    @staticmethod
    def _zeros(module: nn.Module) -> Tensors:
        """What PEFT has where no bias moves."""
        rows, columns = module.weight.shape
        return {"glora_C.zeros": torch.zeros(columns, 1), "glora_D.zeros": torch.zeros(rows),
                "glora_E.zeros": torch.zeros(rows)}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if own.settings["form"] not in ("lora", "vector", "constant"):
            raise FormatError(f"{where}: config_A_B = {own.settings['form']!r:.60}; expected "
                              "'lora', 'vector' or 'constant'")
        for name, known in (("config_C", ("lora", "vector", "none")),
                            ("config_D_E", ("vector", "constant", "none"))):
            if own.said[name] not in known:
                raise FormatError(f"{where}: {name} = {own.said[name]!r:.60}; expected one of "
                                  f"{known}")

    def shift_of(self, own: Own, module: nn.Module) -> Tensor | None:
        """``b D + E + W C`` of a layer with a bias, where any of them is there."""
        t, said, zeros = own.tensors, own.said, self._zeros(module)
        if not any(n[6] in "CDE" and n not in zeros for n in t):
            return None
        if getattr(module, "bias", None) is None:
            raise RuntimeError("they move a bias, and here is none")
        W, b = module.weight.detach().float(), module.bias.detach().float()
        made = torch.zeros_like(b)
        if said["config_C"] != "none":
            C = t["glora_C.X"] if said["config_C"] == "vector" else \
                t["glora_C.Xd"] @ t["glora_C.Xu"]
            made = made + (W @ C.to(W)).view(b.shape)
        if said["config_D_E"] != "none":
            D, E = (t[f"glora_{n}.X"].to(b) for n in "DE")
            if {tuple(D.shape), tuple(E.shape)} - {
                    tuple(b.shape) if said["config_D_E"] == "vector" else (1,)}:
                raise RuntimeError(f"glora_D.X is {list(D.shape)}, glora_E.X {list(E.shape)}")
            made = made + b * D + E
        return made

    def give_shifts(self, owns: Mapping[str, Own], shifts: Mapping[str, Tensor],
                    modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """As E, one number for each output; layers without a shift of their own have zeros."""
        for path, own in owns.items():
            if getattr(modules[path], "bias", None) is None:
                if path in shifts:
                    raise FormatError(f"{path} has a shift of its outputs and no bias, which is "
                                      "what PEFT's GLORA moves; merge instead")
                continue
            for n in "DE":
                zeros = own.tensors.pop(f"glora_{n}.zeros")
                own.tensors[f"glora_{n}.X"] = shifts.get(path, zeros) if n == "E" else zeros
        return {"config_D_E": "vector"}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        for n, zeros in self._zeros(module).items():
            if own.shift is not None and n not in own.tensors:
                continue
            if not torch.equal(own.tensors[n].to(zeros), zeros):
                raise FormatError(f"{n} should be {list(zeros.shape)} zeros")
        if term.form != "lora":
            return {n: own.tensors[f"glora_{n}.X"] for n in "AB"}
        return {f"{n}_{mine}": own.tensors[f"glora_{n}.{leaf}"] for n in "AB"
                for leaf, mine in (("Xd", "out"), ("Xu", "in"))}


class Adaption(Form):
    kind, method, terms, plain = "ADAPTION_PROMPT", "adaption_prompt", (GatedRows,), False
    tensors = {"adaption_prompt": Held("rows", (3,)), "adaption_gate": Held("gate", (1,))}
    settings = {"adapter_len": Said("length", "count?", None),
                "adapter_layers": Said("layers", "count?", None)}

    def check_layer(self, module: nn.Module, path: str) -> None:
        """PEFT adds behind the last projection of GPT-2's attention; elsewhere its bias twice."""
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) not in ("llama", "mistral") \
                or config.hidden_size != config.num_attention_heads * module.head_dim:
            raise FormatError(f"{path}: PEFT's ADAPTION_PROMPT is this function for attentions of "
                              "llama and mistral as wide as the model, not for a "
                              f"{type(module).__name__} here")
        if module.o_proj.bias is not None:
            raise FormatError(f"{path}.o_proj has a bias, which PEFT's ADAPTION_PROMPT adds twice")

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        gate = term.gate.detach()
        if len(gate) > 1:
            raise FormatError(f"{path}: PEFT's ADAPTION_PROMPT has one gate for an attention, here "
                              "is one for each head")
        return {"adaption_prompt": term.rows.detach()[None],
                "adaption_gate": torch.tanh(gate) if term.squash else gate}, {
            "adapter_len": len(term.rows), "target_modules": path.rpartition(".")[2],
            "adapter_layers": {path: 1}}

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {"adapter_layers": len(settings["adapter_layers"])}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        if (rows := own.tensors.get("adaption_prompt")) is None:
            raise FormatError(f"{where} lacks adaption_prompt")
        if len(rows) != 1:
            raise FormatError(f"{where}: adaption_prompt is {list(rows.shape)}; expected one set "
                              "of rows")
        if own.settings["length"] not in (None, rows.shape[1]):
            raise FormatError(f"{where}: adaption_prompt has {rows.shape[1]} rows, its settings "
                              f"say {own.settings['length']}")
        own.settings["length"] = rows.shape[1]

    def all_read(self, owns: Mapping[str, Own], config: Mapping[str, Any]) -> None:
        for own in owns.values():
            if own.settings["layers"] not in (None, len(owns)):
                raise FormatError(f"{len(owns)} attentions have an adaption_prompt, its settings "
                                  f"say {own.settings['layers']}")
            own.settings["layers"] = len(owns)

    def aim(self, anatomy: Anatomy, paths: list[str]) -> dict[str, Any]:
        last = [b.attn for b in anatomy.blocks if b.attn][-len(paths):]
        if set(paths) != set(last):
            raise FormatError(f"{paths[0]}: an adaption_prompt stands in the last attentions of a "
                              f"model, here {', '.join(map(str, last))}")
        return {}                                # `layers` says it

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        rows, = own.tensors["adaption_prompt"]
        return {"rows": rows, "gate": own.tensors["adaption_gate"]}
