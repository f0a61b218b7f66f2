"""PEFT's types besides LoRA whose tensors are burnish's own in another order: LoKr, OFT, VeRA.

    LOKR  <module>.lokr_w1 (o1, i1), or lokr_w1_a, lokr_w1_b; lokr_w2 (o2, i2, kernel...), or
          lokr_w2_a (o2, r), lokr_w2_b (r, i2 kernel); with a core lokr_t2 (r, r, kernel...),
          lokr_w2_a (r, o2), lokr_w2_b (r, i2)
    OFT   <module>.oft_R.weight (blocks, b (b - 1) / 2); the exact rotation has the other sign of Q
    VERA  <module>.vera_lambda_d (r,), vera_lambda_b (out,); base_model.vera_A, base_model.vera_B

`give` writes a term, `take` reads a module's tensors; both speak the names of the term's own
parameters. VeRA can be given alone: a folder's bases are PEFT's draws, burnish draws its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.weight.kronecker import Kronecker
from ..blocks.weight.rotation import Rotation
from ..blocks.weight.term import Term
from ..core.errors import FormatError
from ..core.method import Method
from ..methods.delta.shared.vera import Scaled

TYPES: dict[type[Term], str] = {Kronecker: "LOKR", Rotation: "OFT", Scaled: "VERA"}
READ = ("LOKR", "OFT")
#: settings of these types that are read (see core/reading.py)
KINDS = {"alpha": "number?", "decompose_both": "flag?", "use_effective_conv2d": "flag?",
         "rank_dropout": "number?", "module_dropout": "number?", "coft": "flag?", "eps": "number?",
         "block_share": "flag?", "use_cayley_neumann": "flag?",
         "num_cayley_neumann_terms": "count?", "oft_block_size": "count?"}


@dataclass
class Own:
    """One module: the burnish method that computes it, its settings, and its parameters."""

    method: str
    settings: dict[str, Any]
    values: dict[str, Tensor] = field(default_factory=dict)


# -- out ------------------------------------------------------------------------------------
def give(term: Term, method: Method, module: nn.Module, path: str
         ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(a module's tensors as PEFT names them, its settings). Raises FormatError."""
    if isinstance(term, Kronecker):
        return _give_lokr(term, method, module, path)
    if isinstance(term, Rotation):
        return _give_oft(term, module, path)
    assert isinstance(term, Scaled)
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        raise FormatError(f"{path}: PEFT's VeRA is for linear layers alone")
    tensors = {"vera_lambda_d": term.d.detach(), "vera_lambda_b": term.b.detach()}
    return tensors, {"r": term.d.numel(), "vera_dropout": 0.0, "save_projection": True,
                     "projection_prng_key": 0, "d_initial": method.settings()["d_start"],
                     "init_weights": True}


def _give_lokr(term: Kronecker, method: Method, module: nn.Module, path: str
               ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise FormatError(f"{path}: PEFT's LoKr has no form for a {type(module).__name__}; "
                          "export_peft(..., rank=16) writes the best LoRA of that rank")
    said = method.settings()
    C, B = [p.detach() for p in term.C], [p.detach() for p in term.B]
    kernel = tuple(module.weight.shape[2:]) if hasattr(module, "kernel_size") else ()
    if len(kernel) == 1 and len(B) == 1:
        raise FormatError(f"{path}: PEFT's LoKr of this convolution is another function "
                          f"({type(module).__name__})")
    tensors = {"lokr_w1": C[0]} if len(C) == 1 else {"lokr_w1_a": C[0], "lokr_w1_b": C[1]}
    if term.tucker:
        r = said["rank"]
        core = B[1].view(r, r, *kernel, *((1,) * (2 - len(kernel))))
        tensors |= {"lokr_w2_a": B[0].t().contiguous(), "lokr_t2": core, "lokr_w2_b": B[2]}
    elif len(B) == 2:
        tensors |= {"lokr_w2_a": B[0], "lokr_w2_b": B[1]}
    else:
        tensors |= {"lokr_w2": B[0].unflatten(1, (-1, *kernel)) if kernel else B[0]}
    return tensors, {"r": said["rank"], "alpha": term.scale * said["rank"], "rank_dropout": 0.0,
                     "module_dropout": 0.0, "decompose_both": said["decompose_both"],
                     "decompose_factor": said["factor"], "use_effective_conv2d": said["tucker"],
                     "init_weights": True}


def _give_oft(term: Rotation, module: nn.Module, path: str
              ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise FormatError(f"{path}: PEFT's OFT of a {type(module).__name__} turns overlapping "
                          "patches and adds them up, another function; export the linear layers "
                          "alone, or merge instead")
    if not isinstance(module, nn.Linear):
        raise FormatError(f"{path}: PEFT's OFT has no form for a {type(module).__name__}; merge "
                          "instead")
    if 0 < term.terms < 4:
        raise FormatError(f"{path}: PEFT's series has at least 4 terms, this rotation "
                          f"{term.terms}; merge instead")
    upper = term.upper.detach()
    share = upper.shape[0] == 1
    return {"oft_R.weight": upper if term.terms else -upper}, {
        "r": 0, "oft_block_size": term.block, "module_dropout": 0.0, "block_share": share,
        "coft": False, "use_cayley_neumann": bool(term.terms),
        "num_cayley_neumann_terms": term.terms or 5, "init_weights": True}


# -- in -------------------------------------------------------------------------------------
_NAMES = {"LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                   "lokr_t2"), "OFT": ("oft_R.weight",)}


def sort_out(kind: str, tensors: Mapping[str, Tensor]
             ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> its tensors, tensors that are no adapter's)."""
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, value in tensors.items():
        leaf = next((n for n in _NAMES[kind] if name.endswith(f".{n}")), None)
        if leaf is None:
            rest[name] = value
        else:
            found.setdefault(name.removesuffix(f".{leaf}"), {})[leaf] = value
    return found, rest


def take(kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], rank: int,
         alpha: float, where: str) -> Own:
    """A module's tensors as burnish holds them. Raises FormatError."""
    for name in ("rank_dropout", "module_dropout"):
        if config.get(name):
            raise FormatError(f"{where}: {name} = {config[name]} has no counterpart in burnish")
    if bad := [n for n, t in tensors.items()
               if t.dim() < 2 or not t.numel() or not t.is_floating_point()]:
        t = tensors[bad[0]]
        raise FormatError(f"{where}: {bad[0]} is {t.dtype} {list(t.shape)}; expected a matrix")
    try:
        return (_take_lokr if kind == "LOKR" else _take_oft)(tensors, config, rank, alpha, where)
    except KeyError as e:
        raise FormatError(f"{where} lacks {e.args[0]}") from None


def _take_lokr(tensors: Mapping[str, Tensor], config: Mapping[str, Any], rank: int, alpha: float,
               where: str) -> Own:
    factor = config.get("decompose_factor", -1)
    if not isinstance(factor, int) or isinstance(factor, bool) or factor == 0 or factor < -1:
        raise FormatError(f"{where}: decompose_factor should be -1 or a whole number from 1, got "
                          f"{str(factor)[:60]}")
    if rank < 1:
        raise FormatError(f"{where}: r should be a whole number from 1, got {rank}")
    C = [tensors["lokr_w1"]] if "lokr_w1" in tensors else [tensors["lokr_w1_a"],
                                                          tensors["lokr_w1_b"]]
    if "lokr_w2" in tensors:
        B = [tensors["lokr_w2"]]
        if B[0].dim() == 3:
            raise FormatError(f"{where}: PEFT's LoKr of this convolution is another function")
        if len(C) == 1 and alpha != rank:        # no scale stands between two whole factors here
            C = [C[0] * (alpha / rank)]
    elif "lokr_t2" in tensors:
        B = [tensors["lokr_w2_a"].t(), tensors["lokr_t2"], tensors["lokr_w2_b"]]
    else:
        B = [tensors["lokr_w2_a"], tensors["lokr_w2_b"]]
    values = {f"C.{i}": t for i, t in enumerate(C)} | {f"B.{i}": t.flatten(1)
                                                      for i, t in enumerate(B)}
    return Own("lokr", {"rank": rank, "alpha": float(alpha), "factor": factor,
                        "decompose_both": bool(config.get("decompose_both")),
                        "tucker": bool(config.get("use_effective_conv2d"))}, values)


def _take_oft(tensors: Mapping[str, Tensor], config: Mapping[str, Any], rank: int, alpha: float,
              where: str) -> Own:
    upper = tensors["oft_R.weight"]
    block = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    series = config.get("use_cayley_neumann", True)
    terms = (config.get("num_cayley_neumann_terms") or 5) if series else 0
    if series and terms < 3:
        raise FormatError(f"{where}: a series of {terms} terms has no counterpart in burnish")
    settings: dict[str, Any] = {"block": block, "share": bool(config.get("block_share")),
                                "terms": max(terms, 4) if series else 0}
    upper = upper if series else -upper
    if config.get("coft"):                       # PEFT brings them back when it next runs
        bound = (config.get("eps") or 6e-5) / upper.shape[0] ** 0.5
        norm = torch.linalg.vector_norm(upper, dim=1, keepdim=True) * 2**0.5
        upper, settings["bound"] = upper * (bound / norm.clamp_min(bound)), bound
    return Own("oft", settings, {"upper": upper})


def refuse(kind: Any, folder: Path) -> None:
    """Raises FormatError for a type that cannot be read."""
    if kind == "VERA":
        raise FormatError(f"{folder} holds a VeRA adapter, whose random bases are PEFT's own "
                          "draws; burnish draws others. Merge it with peft first")
    if kind not in ("LORA", "MISS", *READ):
        raise FormatError(f"{folder} holds a PEFT adapter of type {kind!r}; LORA (rsLoRA and DoRA "
                          "with it), MISS, LOKR and OFT can be read")
