"""PEFT's types whose updates are products of small tensors (see peft_own.py).

    LOKR       <module>.lokr_w1 (o1, i1), or lokr_w1_a, lokr_w1_b; lokr_w2 (o2, i2, kernel...), or
               lokr_w2_a (o2, r), lokr_w2_b (r, i2 kernel); with a core lokr_t2 (r, r, kernel...),
               lokr_w2_a (r, o2), lokr_w2_b (r, i2)
    LOHA       hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a, hada_w2_b; with cores hada_t1,
               hada_t2 (r, r, kernel...) the _a are (r, out) and the _b (r, channels)
    FOURIERFT  fourierft_spectrum (n,); positions are torch.randperm of random_loc_seed
    WAVEFT     waveft_spectrum (n,); positions are torch.randperm of random_loc_seed
    VERA       vera_lambda_d (r,), vera_lambda_b (out,); base_model.vera_A, base_model.vera_B
    PVERA      the same with pvera, lambda_d (2 r,) and pvera_A (2 r, in)
    RANDLORA   randlora_lambda (r, n), randlora_gamma (n, p); base_model.randlora_A (r, 1, p),
               base_model.randlora_B (q, n, r)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.weight.cosines import Cosines
from ..blocks.weight.hadamard import Hadamard
from ..blocks.weight.kronecker import Kronecker
from ..blocks.weight.wavelets import LOW, PLAIN, Wavelets
from ..core.errors import FormatError
from ..core.method import Method
from ..core.reading import shown
from ..methods.delta.shared import pvera, randlora, vera
from .peft_own import Form, Held, Own, Said, Tensors

CONVS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_DROPS = {n: Said(n, "number", 0.0) for n in ("rank_dropout", "module_dropout")}


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight.shape[2:])


class Lokr(Form):
    kind, method, terms = "LOKR", "lokr", (Kronecker,)
    layers = CONVS
    tensors = {"lokr_w1": Held("C.0"), "lokr_w1_a": Held("C.0"), "lokr_w1_b": Held("C.1"),
               "lokr_w2": Held("B.0", (2, 3, 4)), "lokr_w2_a": Held("B.0"),
               "lokr_w2_b": Held("B.1"), "lokr_t2": Held("B.1", (3, 4))}
    settings = {"r": Said("rank", "count", 8), "alpha": Said("alpha", "number", 8),
                "decompose_both": Said("decompose_both", "flag", False),
                "decompose_factor": Said("factor", "whole", -1),
                "use_effective_conv2d": Said("tucker", "flag", False), **_DROPS,
                "rank_dropout_scale": Said("rank_dropout_scale", "flag", False)}
    patterned = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        C, B = [p.detach() for p in term.C], [p.detach() for p in term.B]
        kernel = kernel_of(module)
        if len(kernel) == 1 and len(B) == 1:
            raise FormatError(f"{path}: PEFT's LoKr of this convolution is another function "
                              f"({type(module).__name__})")
        tensors = {"lokr_w1": C[0]} if len(C) == 1 else {"lokr_w1_a": C[0], "lokr_w1_b": C[1]}
        if term.tucker:
            tensors |= {"lokr_w2_a": B[0].t().contiguous(), "lokr_w2_b": B[2],
                        "lokr_t2": _core(B[1], kernel)}
        elif len(B) == 2:
            tensors |= {"lokr_w2_a": B[0], "lokr_w2_b": B[1]}
        else:
            tensors |= {"lokr_w2": B[0].unflatten(1, (-1, *kernel)) if kernel else B[0]}
        return tensors, {n: said[s.ours] for n, s in self.settings.items()} | {
            "alpha": term.scale * said["rank"], "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        factor, rank = own.settings["factor"], own.settings["rank"]
        if factor == 0 or factor < -1:
            raise FormatError(f"{where}: decompose_factor should be -1 or a whole number from 1, "
                              f"got {str(factor)[:60]}")
        _positive(rank, "r", where)
        if (w2 := own.tensors.get("lokr_w2")) is not None and w2.dim() == 3:
            raise FormatError(f"{where}: PEFT's LoKr of this convolution is another function")
        own.settings["alpha"] = float(own.settings["alpha"])

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        t = own.tensors
        C = [t["lokr_w1"]] if "lokr_w1" in t else [t["lokr_w1_a"], t["lokr_w1_b"]]
        if "lokr_w2" in t:
            B = [t["lokr_w2"]]
            if len(C) == 1:                      # no scale stands between two whole factors here
                C = [C[0] * (own.settings["alpha"] / own.settings["rank"])]
        elif "lokr_t2" in t:
            B = [t["lokr_w2_a"].t(), t["lokr_t2"], t["lokr_w2_b"]]
        else:
            B = [t["lokr_w2_a"], t["lokr_w2_b"]]
        return {f"C.{i}": x for i, x in enumerate(C)} | {f"B.{i}": x.flatten(1)
                                                        for i, x in enumerate(B)}


class Loha(Form):
    kind, method, terms = "LOHA", "loha", (Hadamard,)
    layers, patterned = CONVS, Lokr.patterned
    tensors = {"hada_w1_a": Held("first.0"), "hada_w1_b": Held("first.1"),
               "hada_w2_a": Held("second.0"), "hada_w2_b": Held("second.1"),
               "hada_t1": Held("first.1", (4,)), "hada_t2": Held("second.1", (4,))}
    settings = {n: Lokr.settings[n] for n in ("r", "alpha", "use_effective_conv2d", *_DROPS)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {}
        for i, half in ((1, term.first), (2, term.second)):
            left, *core, right = [p.detach() for p in half]
            tensors |= {f"hada_w{i}_a": left.t().contiguous() if core else left,
                        f"hada_w{i}_b": right}
            if core:
                tensors[f"hada_t{i}"] = _core(core[0], kernel_of(module))
        said = method.settings()
        return tensors, {n: said[s.ours] for n, s in self.settings.items()} | {
            "init_weights": True}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        _positive(own.settings["rank"], "r", where)

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        made: Tensors = {}
        for i, half in ((1, "first"), (2, "second")):
            left, right = own.tensors[f"hada_w{i}_a"], own.tensors[f"hada_w{i}_b"]
            core = own.tensors.get(f"hada_t{i}")
            parts = [left, right] if core is None else [left.t(), core.flatten(1), right]
            made |= {f"{half}.{k}": p for k, p in enumerate(parts)}
        return made


class FourierFT(Form):
    kind, method, terms, gpt2 = "FOURIERFT", "fourierft", (Cosines,), True
    tensors = {"fourierft_spectrum": Held("c", (1,))}
    settings = {"n_frequency": Said("n", "count", 1000), "scaling": Said("alpha", "number", 150.0),
                "random_loc_seed": Said("seed", "whole", 777)}
    patterned, named = {"n_frequency": "n_frequency_pattern"}, True

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if method.settings()["positions"] != "torch":
            raise FormatError(f"{path}: PEFT draws its positions by torch.randperm; train with "
                              "fourierft(positions='torch') to export, or merge instead")
        return super().give(term, method, module, path)

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settings |= {"positions": "torch", "alpha": float(own.settings["alpha"])}


class WaveFT(Form):
    kind, method, terms, gpt2 = "WAVEFT", "waveft", (Wavelets,), True
    tensors = {"waveft_spectrum": Held("c", (1,))}
    settings = {"n_frequency": Said("n", "count", 2592), "scaling": Said("alpha", "number", 25.0),
                "wavelet_family": Said("wavelet", "text", "db1"),
                "use_idwt": Said(None, "flag", True),
                "proportional_parameters": Said(None, "flag", False),
                "random_loc_seed": Said("seed", "whole", 777)}
    patterned = {"n_frequency": "n_frequency_pattern"}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if method.settings()["positions"] != "torch":
            raise FormatError(f"{path}: PEFT draws its positions by torch.randperm; train with "
                              "waveft(positions='torch') to export, or merge instead")
        tensors, said = super().give(term, method, module, path)
        plain = said["wavelet_family"] == PLAIN
        return tensors, said | {"use_idwt": not plain} | ({"wavelet_family": "db1"} if plain else
                                                          {})

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        n, family = own.tensors["waveft_spectrum"].numel(), own.settings["wavelet"]
        if own.said["proportional_parameters"]:  # as its matrix is large, which the numbers say
            own.settings["n"] = n
        if own.settings["n"] != n:
            raise FormatError(f"{where} has {n} coefficients, its settings say "
                              f"{own.settings['n']}")
        if not own.said["use_idwt"]:
            own.settings["wavelet"] = PLAIN
        elif family not in LOW:
            faulty = "; PEFT's figures for it are no orthonormal wavelet's" \
                if family.startswith("coif") else ""
            raise FormatError(f"{where}: wavelet_family = {shown(family)} has no counterpart in "
                              f"burnish{faulty}")
        own.settings |= {"positions": "torch", "alpha": float(own.settings["alpha"])}


class Vera(Form):
    kind, method, terms, gpt2 = "VERA", "vera", (vera.Scaled,), True
    tensors = {"vera_lambda_d": Held("d", (1,)), "vera_lambda_b": Held("b", (1,))}
    beside = {"vera_A": Held("A"), "vera_B": Held("B")}
    settings = {"r": Said("rank", "count", 256), "vera_dropout": Said("dropout", "number", 0.0),
                "d_initial": Said("d_start", "number", 0.1),
                "save_projection": Said(None, "flag", True),
                "projection_prng_key": Said(None, "whole", 0)}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settings["bases"], own.settled = "stored", {"bases": True}

    def draw(self, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Tensors:
        return self.drawn(config, modules)

    @staticmethod
    def drawn(config: Mapping[str, Any], modules: Mapping[str, nn.Module], times: int = 1
              ) -> Tensors:
        """A (times rank, in) and B (out, rank) of the seed that a config says."""
        g = torch.Generator().manual_seed(int(config.get("projection_prng_key") or 0))
        shapes = [_matrix(m) for m in modules.values()]
        out, inp, r = (max(s[0] for s in shapes), max(s[1] for s in shapes),
                       int(config.get("r") or 256))

        def uniform(*shape: int) -> Tensor:
            bound = math.sqrt(6 / shape[1])
            return torch.empty(shape).uniform_(-bound, bound, generator=g)

        return {"vera_A": uniform(times * r, inp), "vera_B": uniform(out, r)}


class Pvera(Vera):
    kind, method, terms = "PVERA", "pvera", (pvera.Sampled,)
    tensors = {"pvera_lambda_d": Held("d", (1,)), "pvera_lambda_b": Held("b", (1,))}
    beside = {"pvera_A": Held("A"), "pvera_B": Held("B")}
    alone = {"sample_at_inference": False}
    settings = {("pvera_dropout" if n == "vera_dropout" else n): s
                for n, s in Vera.settings.items()} | {"generator_seed": Said(None, "whole?", None)}

    def draw(self, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Tensors:
        made = self.drawn(config, modules, 2)
        return {f"p{name}": t for name, t in made.items()}


class RandLora(Form):
    kind, method, terms, gpt2 = "RANDLORA", "randlora", (randlora.Scaled,), True
    tensors = {"randlora_lambda": Held("lam"), "randlora_gamma": Held("gamma")}
    beside = {"randlora_A": Held("A", (3,)), "randlora_B": Held("B", (3,))}
    settings = {"r": Said("rank", "count", 32), "randlora_alpha": Said("alpha", "number", 640.0),
                "randlora_dropout": Said("dropout", "number", 0.0),
                "save_projection": Said(None, "flag", True), "sparse": Said(None, "flag", False),
                "very_sparse": Said(None, "flag", False),
                "projection_prng_key": Said(None, "whole", 0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        tensors, said = super().give(term, method, module, path)
        return tensors | {"randlora_lambda": tensors["randlora_lambda"].t().contiguous()}, said

    def give_beside(self, shared: nn.Module, whole: Any) -> tuple[Tensors, dict[str, Any]]:
        A, B = shared.A[:, None], shared.B.transpose(0, 1)             # (r, 1, p), (q, n, r)
        used = {(t.lam.shape[0], t.pairing) for t in whole}
        if any(pairing != "peft" and n > 1 for n, pairing in used):
            if len(used) > 1 or next(iter(used))[0] != B.shape[1]:
                raise FormatError("PEFT's RandLoRA pairs its bases in an order that depends on the "
                                  "matrix, and these are of several sizes; train with "
                                  "randlora(pairing='peft') to export, or merge instead")
            B = B.transpose(1, 2).reshape(B.shape)
        out, inp = max(t.out for t in whole), max(t.inp for t in whole)
        p = min(out, inp)                        # PEFT's are as large as all the sides together
        n = -(-p // A.shape[0])
        A = nn.functional.pad(A, (0, p - A.shape[2]))
        B = nn.functional.pad(B, (0, 0, 0, n - B.shape[1]))
        # PEFT's own buffers are in half precision unless the bases are said to be sparse
        exact = all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in (A, B))
        return {"randlora_A": A.contiguous(), "randlora_B": B.contiguous()}, {"sparse": not exact}

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settled = {"bases": True}
        own.settings |= {"bases": "stored", "pairing": "peft",
                         "alpha": float(own.settings["alpha"])}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {"lam": own.tensors["randlora_lambda"].t(), "gamma": own.tensors["randlora_gamma"]}

    def values_beside(self, tensors: Tensors, shared: nn.Module) -> Tensors:
        A, B = tensors["randlora_A"][:, 0], tensors["randlora_B"].transpose(0, 1)
        n, q, r = shared.B.shape                 # PEFT's are as large as all the sides together
        return {"A": A[:, : shared.A.shape[1]], "B": B[:n, :q]}


def _core(T: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """(r, r k) as PEFT has it: (r, r, k1, k2)."""
    r = T.shape[0]
    return T.view(r, r, *kernel, *((1,) * (2 - len(kernel))))


def _matrix(module: nn.Module) -> tuple[int, int]:
    out, inp = module.weight.shape
    return (inp, out) if type(module).__name__ == "Conv1D" else (out, inp)


def _positive(rank: int, name: str, where: str) -> None:
    if rank < 1:
        raise FormatError(f"{where}: {name} should be a whole number from 1, got {rank}")
