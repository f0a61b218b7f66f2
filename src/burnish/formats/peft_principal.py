"""PEFT's types that stand in subspaces of the weight itself, or read it (see peft_own.py).

    OSF        osf_svd_params.U_low (out, r), osf_svd_params.S_low (r,), osf_svd_params.V_low (r,
               in); where they began is the weight's own decomposition, made again by whoever reads
    PSOFT      psoft_R.weight, of a skew Q above its diagonal (r (r - 1) / 2,), or free (r, r);
               psoft_R.vector_a (r,), psoft_R.vector_b (r,); the factors around are the weight's

    PEANUT     peanut_A.weight (r, out), peanut_B.weight (out, r), peanut_encoders.N.weight and
               peanut_decoders.N.weight (r, r)
    DEFT       deft_P (out, r), deft_R (r, in), which PaRa has not
    FROD       frod_lambda_l (in,), frod_lambda_s_values (n,); base_model.frod_V.KIND (in, in),
               base_model.frod_s_indices.KIND (2, n), base_model.frod_s_size.KIND (2,)

What such a folder lacks follows from the base it is of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.weight.between import Turned
from ..blocks.weight.joint import Joint, basis, off_diagonal, within
from ..blocks.weight.lower import Lower
from ..core.errors import FormatError
from ..core.method import Method
from ..methods.delta.ofw.deft import Injected
from ..methods.delta.ofw.peanut import Tweaked
from ..methods.delta.shared.frod import kind_of
from .peft_own import Form, Held, Own, Said, Tensors


def matrix(module: nn.Module) -> Tensor:
    """The weight (out, in) as PEFT decomposes it."""
    W = module.weight.detach().float()
    return W.t() if type(module).__name__ == "Conv1D" else W


class Osf(Form):
    kind, method, terms, pairs = "OSF", "osf", (Lower,), True
    tensors = {"osf_svd_params.U_low": Held("P"), "osf_svd_params.S_low": Held("E", (1,)),
               "osf_svd_params.V_low": Held("Q")}
    settings = {"effective_rank": Said("kept", "number?", 0.5)}
    patterned = {"effective_rank": "rank_pattern"}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return tensors, said | {"init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        P, Q = (own.tensors.get(f"osf_svd_params.{n}_low") for n in "UV")
        if P is None or Q is None:
            raise FormatError(f"{where} lacks osf_svd_params.{'UV'[P is not None]}_low")
        m, said = min(P.shape[0], Q.shape[1]), own.settings["kept"]
        k = int(m * said) if isinstance(said, float) and 0 < said <= 1 else int(said)
        if k + len(Q) != m:
            raise FormatError(f"{where} trains {len(Q)} of {m} triplets, its settings keep {said}")
        if isinstance(said, float) and said >= 1:
            own.settings["kept"] = k

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        found: dict[str, Tensor] = term.start(*torch.linalg.svd(matrix(module),
                                                                full_matrices=False))
        return super().values(own, term, module) | found


class Psoft(Form):
    kind, method, terms, pairs = "PSOFT", "psoft", (Turned,), True
    tensors = {"psoft_R.weight": Held("upper", (1, 2)), "psoft_R.vector_a": Held("a", (1,)),
               "psoft_R.vector_b": Held("b", (1,))}
    alone = {"psoft_dropout": 0.0}
    settings = {"r": Said("rank", "count", 32), "psoft_orth": Said(None, "flag", True),
                "psoft_mag_a": Said("gain_in", "flag", True),
                "psoft_mag_b": Said("gain_out", "flag", True),
                "use_cayley_neumann": Said(None, "flag", False),
                "num_cayley_neumann_terms": Said("terms", "count", 5),
                "cayley_neumann_eps": Said("bound", "number?", None),
                "ab_svd_init": Said(None, "text", "psoft_init"),
                "psoft_svd": Said(None, "text", "full"),
                "psoft_svd_lowrank_niter": Said(None, "count", 10),
                "random_seed": Said(None, "whole", 0), "psoft_alpha": Said(None, "number", 32)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        r = len(term.R)
        if 0 < term.terms < 4:
            raise FormatError(f"{path}: PEFT's series has at least 4 terms, this turn "
                              f"{term.terms}; merge instead")
        L, R = _factors(*torch.linalg.svd(matrix(module), full_matrices=False), r, term.balanced)
        sign = (R * term.R).sum(1).sign()        # all in which two machines may differ
        off = [float((mine - sign * theirs).norm() / theirs.norm().clamp_min(1e-30))
               for mine, theirs in ((term.L, L), (term.R.t(), R.t()))]
        if max(off) > 1e-4:
            raise FormatError(f"{path}: PEFT reads the factors of PSOFT off the weight, and finds "
                              "others than this adapter has")
        turned = sign[:, None] * sign
        weight = term.T if term.upper is None else term.upper[0]
        i, j = torch.triu_indices(r, r, 1)
        tensors = {"psoft_R.weight": weight.detach() * (turned if weight.dim() > 1 else
                                                        turned[i, j])}
        for leaf, gain in (("a", term.a), ("b", term.b)):
            if gain is not None:
                tensors[f"psoft_R.vector_{leaf}"] = gain.detach()
        return tensors, {
            "r": r, "psoft_alpha": r, "psoft_orth": term.upper is not None,
            "psoft_mag_a": term.a is not None, "psoft_mag_b": term.b is not None,
            "use_cayley_neumann": bool(term.terms), "num_cayley_neumann_terms": term.terms or 5,
            "cayley_neumann_eps": term.bound, "psoft_svd": "full", "init_weights": True,
            "ab_svd_init": "pissa_init" if term.balanced else "psoft_init"} | self.alone

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        said = own.said
        for name, known in (("ab_svd_init", ("psoft_init", "pissa_init")),
                            ("psoft_svd", ("full", "lowrank"))):
            if said[name] not in known:
                raise FormatError(f"{where}: {name} = {said[name]!r:.60}; expected one of {known}")
        own.settings["balanced"] = said["ab_svd_init"] == "pissa_init"
        own.settings["free"] = not said["psoft_orth"]
        series = said["use_cayley_neumann"] and said["psoft_orth"]
        if series and own.settings["terms"] < 3:
            raise FormatError(f"{where}: a series of {own.settings['terms']} terms has no "
                              "counterpart in burnish")
        own.settings["terms"] = max(own.settings["terms"], 4) if series else 0
        if not series:
            own.settings["bound"] = None

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        W, r, said = matrix(module), len(term.R), own.said
        if said["psoft_svd"] == "full":
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng([W.device] if W.device.type == "cuda" else []):
                torch.manual_seed(said["random_seed"])
                U, S, V = torch.svd_lowrank(W, q=r, niter=said["psoft_svd_lowrank_niter"])
            Vt = V.t()
        weight = own.tensors["psoft_R.weight"]
        made = dict(zip("LR", _factors(U, S, Vt, r, term.balanced), strict=True))
        made |= {"T": weight} if term.upper is None else {"upper": weight[None]}
        return made | {leaf: own.tensors[f"psoft_R.vector_{leaf}"] for leaf in "ab"
                       if getattr(term, leaf) is not None}


def _factors(U: Tensor, S: Tensor, Vt: Tensor, r: int, balanced: bool) -> tuple[Tensor, Tensor]:
    """What stands around the turn: (out, r) and (r, in)."""
    U, S, Vt = U[:, :r], S[:r], Vt[:r]
    return (U * S.sqrt(), S.sqrt()[:, None] * Vt) if balanced else (U * S, Vt)


class Peanut(Form):
    kind, method, terms, pairs = "PEANUT", "peanut", (Tweaked,), True
    tensors = {"peanut_A.weight": Held("A"), "peanut_B.weight": Held("B")} | {
        f"peanut_{side}.{n}.weight": Held(f"{side}.{n}")
        for side in ("encoders", "decoders") for n in range(64)}
    settings = {"r": Said("rank", "count", 32), "depth": Said("encoders", "count", 0),
                "act_fn": Said("act", "text", "relu"), "scaling": Said("scale", "number", 1.0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        state, said = term.state_dict(), method.settings()
        return {leaf: state[held.name] for leaf, held in self.tensors.items()
                if held.name in state}, {
            n: said[s.ours] for n, s in self.settings.items() if s.ours} | {"init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settings["scale"] = float(own.settings["scale"])
        if (act := own.settings["act"]) not in ("relu", "gelu", "silu", "tanh"):
            raise FormatError(f"{where}: the activation {act!r:.60} has no counterpart in burnish")

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        names = {held.name: leaf for leaf, held in self.tensors.items()}
        return {name: own.tensors[names[name]] for name in term.state_dict()}


class Deft(Form):
    kind, method, terms, pairs, gpt2 = "DEFT", "deft", (Injected,), True, True
    tensors = {"deft_P": Held("P"), "deft_R": Held("R")}
    alone = {"deft_dropout": 0.0}
    settings = {"r": Said("rank", "count", 8), "alpha": Said("alpha", "number?", None),
                "decomposition_method": Said("form", "text", "relu"),
                "para": Said(None, "flag", False), "init_scale": Said(None, "number", 1.0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        tensors = {"deft_P": term.P.detach()}
        if term.R is not None:
            tensors["deft_R"] = term.R.detach()
        return tensors, {"r": said["rank"], "alpha": said["alpha"], "para": not said["inject"],
                         "decomposition_method": said["form"], "init_weights": True} | self.alone

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        said = own.said
        if said["decomposition_method"] not in ("relu", "qr"):
            raise FormatError(f"{where}: decomposition_method = "
                              f"{said['decomposition_method']!r:.60}; expected 'relu' or 'qr'")
        own.settings["inject"] = not said["para"]
        alpha = None if said["para"] or not said["alpha"] else float(said["alpha"])
        if (P := own.tensors.get("deft_P")) is None:
            raise FormatError(f"{where} lacks deft_P")
        if said["para"] == ("deft_R" in own.tensors):
            raise FormatError(f"{where}: para is {said['para']}, and deft_R is "
                              f"{'there' if said['para'] else 'missing'}")
        if alpha is not None and P.shape[1] != said["r"]:      # PEFT's rank is at most `out`
            own.settings["rank"] = P.shape[1]
        own.settings["alpha"] = alpha

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {leaf[5:]: t for leaf, t in own.tensors.items()}


class Frod(Form):
    kind, method, terms, gpt2, shares = "FROD", "frod", (Joint,), True, True
    tensors = {"frod_lambda_l": Held("z", (1,)), "frod_lambda_s_values": Held("values", (1,))}
    settings = {"sparse_rate": Said("density", "number", 0.01),
                "regularization_alpha": Said("ridge", "number", 1e-3),
                "frod_dropout": Said("dropout", "number", 0.0),
                "projection_prng_key": Said("seed", "whole", 0),
                "save_projection": Said(None, "flag", True),
                "progressbar": Said(None, "flag", True),
                "runtime_offload_base_weight": Said(None, "flag", False)}

    def stands_beside(self, names: Iterable[str]) -> Mapping[str, Held]:
        kinds = {"V": Held("V", (2,)), "s_indices": Held("index", (2,), True),
                 "s_size": Held("size", (1,), True)}
        found = {n: re.fullmatch(r"frod_(V|s_indices|s_size)\.([^.]+)", n) for n in names}
        return {n: kinds[m[1]]._replace(name=f"{kinds[m[1]].name}_{m[2]}")
                for n, m in found.items() if m}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.name != kind_of(path):
            raise FormatError(f"{path}: in PEFT all {kind_of(path)} have one number of inputs, "
                              "here another one too")
        said = method.settings()
        return {"frod_lambda_l": term.z.detach(), "frod_lambda_s_values": term.values.detach()}, {
            n: said[s.ours] if s.ours else s.default for n, s in self.settings.items()} | {
            "init_weights": True}

    def check_found(self, modules: Mapping[str, nn.Module], terms: list[Any], method: Method
                    ) -> None:
        """PEFT reads U off the weight by the basis that it finds itself."""
        known = {t.name: t.V for t in terms}
        for name, V in _bases(modules, method.settings()["ridge"]).items():
            off = torch.linalg.vector_norm(known[name].to(V) - V, dim=0)
            if float((off / torch.linalg.vector_norm(V, dim=0)).max()) > 1e-4:
                raise FormatError(f"PEFT makes the basis of {name} of the weights of the modules "
                                  "it adapts, and finds another than this adapter has")

    def give_beside(self, shared: nn.Module, whole: Any) -> tuple[Tensors, dict[str, Any]]:
        out: Tensors = {}
        for name, t in shared.named_buffers():
            what, _, kind = name.partition("_")
            if what == "V":
                out |= {f"frod_V.{kind}": t, f"frod_s_size.{kind}": torch.tensor([len(t), len(t)])}
            else:
                n = shared.get_buffer(f"V_{kind}").shape[0]
                out[f"frod_s_indices.{kind}"] = torch.stack([t // n, t % n])
        return out, {}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        for name in ("density", "ridge"):
            own.settings[name] = float(own.settings[name])

    def draw(self, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Tensors:
        said = {n: s.default if config.get(n) is None else config[n]
                for n, s in self.settings.items()}
        if said["save_projection"]:
            return {}
        made = _bases(modules, said["regularization_alpha"])
        g, out = torch.Generator().manual_seed(said["projection_prng_key"]), {}
        for kind, V in sorted(made.items()):
            n = len(V)
            at = off_diagonal(n, said["sparse_rate"], g)
            out |= {f"frod_V.{kind}": V, f"frod_s_size.{kind}": torch.tensor([n, n]),
                    f"frod_s_indices.{kind}": torch.stack([at // n, at % n])}
        return out

    def values_beside(self, tensors: Tensors, shared: nn.Module) -> Tensors:
        out: Tensors = {}
        for name in dict(shared.named_buffers()):
            what, _, kind = name.partition("_")
            V, at, size = (tensors.get(f"frod_{leaf}.{kind}") for leaf in ("V", "s_indices",
                                                                           "s_size"))
            if V is None or at is None or size is None:
                raise FormatError(f"there is no whole basis of {kind} (frod_V, frod_s_indices, "
                                  "frod_s_size); save it with save_projection=True")
            n = len(V)
            if len(at) != 2 or size.tolist() != [n, n] or not bool(((at >= 0) & (at < n)).all()):
                raise FormatError(f"frod_s_indices.{kind} are no entries of a matrix like frod_V")
            out[name] = V if what == "V" else at[0].long() * n + at[1].long()
        return out

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        U, size = within(term.V, matrix(module).to(term.V.device))
        return super().values(own, term, module) | {"L": U, "z0": size}


def _bases(modules: Mapping[str, nn.Module], ridge: float) -> Tensors:
    """kind -> the basis that PEFT makes of the weights of these modules. Raises FormatError."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for path, module in modules.items():
        parts = path.split(".")
        number = next((p for p in parts[parts.index("layers") + 1 if "layers" in parts else 0 :]
                       if p.isdigit()), path)
        if number in kinds.setdefault(kind_of(path), {}):
            raise FormatError(f"{path}: PEFT's FROD tells one {kind_of(path)} in layer {number}, "
                              "and here are two")
        kinds[kind_of(path)][number] = matrix(module).cpu()
    return {kind: basis(list(those.values()), ridge).to(next(iter(modules.values())).weight.dtype)
            for kind, those in kinds.items()}


SPACES: tuple[Form, ...] = (Osf(), Psoft(), Peanut(), Deft(), Frod())
