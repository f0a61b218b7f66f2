"""A whole model as ONNX, written by torch and run by onnxruntime before anybody has it.

torch.export follows the model once on a small batch, with the batch and, where an input has one,
the length left open. What comes of it is run by onnxruntime on other batches and lengths than the
one that was followed, with padding where there is a mask, and compared with torch; the folder is
written where they agree.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import families
from ..core.errors import CheckError, ConfigError, FormatError
from ..core.example import example_batch
from ..core.reading import plain
from . import claim, staged
from .model_files import copy_processor

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"
#: largest difference from torch's outputs, relative to their norm: sums in float32 in another order
TOLERANCE = 1e-4
#: tokens of the batch that torch follows, and of those that are run beside it
TOKENS, OTHERS = 12, (5, 29)


@dataclass(frozen=True)
class Exported:
    """What was written. inputs, outputs: name -> axes, "batch" and "length" where they are open.
    difference: the largest from torch's outputs, of the batches that were run."""

    folder: Path
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    difference: float
    shapes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.folder), "format": "onnx", "file": FILE, "inputs": self.inputs,
                "outputs": self.outputs, "difference": self.difference,
                "notes": list(self.notes)}

    def __str__(self) -> str:
        def told(of: Mapping[str, list[int | str]]) -> str:
            return ", ".join(f"{n} ({', '.join(map(str, axes))})" for n, axes in of.items())

        return "\n".join([
            f"written to {self.folder / FILE}", f"takes {told(self.inputs)}",
            f"gives {told(self.outputs)}",
            f"run by onnxruntime on {self.shapes} batches of other sizes: the outputs differ from "
            f"torch's by {self.difference:.2g} of their size", *(f"note: {n}" for n in self.notes)])


def needed() -> None:
    """Raises ConfigError where what writes and runs ONNX is not installed."""
    if lacks := [p for p in PACKAGES if importlib.util.find_spec(p) is None]:
        raise ConfigError(f"onnx is written and run with {', '.join(PACKAGES)}, and "
                          f"{', '.join(lacks)} {'is' if len(lacks) == 1 else 'are'} missing: "
                          "pip install 'burnish[onnx]'")


def export_onnx(model: nn.Module, folder: str | Path, beside: Iterable[str | Path] = (),
                inputs: claim.Inputs = ()) -> Exported:
    """Write a plain model (merged, nothing of burnish in it) as ``folder/model.onnx``.

    model: of transformers, or one with an ``example(samples)`` of its own. Its weights are written
    in float32. beside: folders whose tokenizer or image processor goes along. inputs: what must
    not be written over.

    Raises ConfigError without the packages, FormatError for what torch cannot follow with batch and
    length left open, CheckError where onnxruntime answers otherwise than torch; nothing is written
    then.
    """
    needed()
    import onnx

    notes = []
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds - {torch.float32}:
        model = copy.deepcopy(model).float()
        notes.append("its weights were " + ", ".join(sorted(str(k).removeprefix("torch.")
                                                            for k in kinds))
                     + " and are written, and run, in float32")
    if _grouped(model):
        notes.append("it takes the weights of its experts token by token, so that memory grows "
                     "with the tokens of a batch")
    model = model.eval()
    batches = [_batch(model, n, k) for n, k in zip((2, 1, 3), (TOKENS, *OTHERS), strict=True)]
    run = _Plain(model, tuple(batches[0]))
    with torch.no_grad():
        names = list(run.named(*batches[0].values()))
    if not names:
        raise ConfigError(f"{type(model).__name__} gives no tensor that a file could have as its "
                          "output")
    with staged.replace(folder, "onnx", inputs) as new:
        program = _followed(run, batches[0], names)
        with _quietly():
            program.save(str(new / FILE))
        onnx.checker.check_model(str(new / FILE))
        worst, given, made = _compared(new / FILE, run, batches)
        if not worst <= TOLERANCE:
            raise CheckError(f"onnxruntime's outputs differ from torch's by {worst:.2g} of their "
                             f"size, more than {TOLERANCE:g}; nothing was written")
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            model.config.save_pretrained(new)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(new)
        copy_processor([Path(b) for b in beside], new)
    return Exported(Path(folder), given, made, worst, len(batches), tuple(notes))


class _Plain(nn.Module):
    """The model as a function of tensors alone, which gives tensors alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names
        takes = inspect.signature(model.forward).parameters
        self.how: dict[str, Any] = {k: v for k, v in (("use_cache", False), ("return_dict", True))
                                    if k in takes}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*tensors).values())

    def named(self, *tensors: Tensor) -> dict[str, Tensor]:
        out = self.model(**dict(zip(self.names, tensors, strict=True)), **self.how)
        if isinstance(out, Tensor):
            return {"output": out}
        if isinstance(out, list | tuple):
            out = {f"output_{n}": v for n, v in enumerate(out)}
        fields = out if isinstance(out, Mapping) else getattr(out, "__dict__", {})
        return {k: v for k, v in fields.items() if isinstance(v, Tensor)}


def _batch(model: nn.Module, samples: int, tokens: int) -> dict[str, Tensor]:
    """Inputs as a user of the file gives them: text with its mask, the last sample padded."""
    tokens = min(tokens, _longest(getattr(model, "config", None)))
    text = "input_ids" in example_batch(model, 1)
    made = example_batch(model, (samples, tokens if text else 1600 * tokens))
    out = {k: v for k, v in made.items() if k != "labels" and isinstance(v, Tensor)}
    out = {k: v.float() if v.is_floating_point() else v for k, v in out.items()}
    takes = inspect.signature(model.forward).parameters
    if "input_ids" in out and "attention_mask" in takes:
        out["attention_mask"] = torch.ones_like(out["input_ids"])
        if samples > 1:
            out["attention_mask"][-1, -(tokens // 3):] = 0
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and \
            "decoder_input_ids" in takes:
        words = out.get("input_ids", torch.arange(1, tokens + 1).expand(samples, -1))
        out["decoder_input_ids"] = words[:, : max(2, tokens // 2)].contiguous()
    return out


def _longest(config: Any) -> int:
    """Tokens that a model of text has places for."""
    text = getattr(config, "text_config", None) or config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return OTHERS[-1]
    offset = getattr(text, "model_type", "") in families.OFFSET_POSITIONS
    return most - (text.pad_token_id or 0) - 1 if offset else most


def _open(batch: Mapping[str, Tensor]) -> tuple[dict[int, Any], ...]:
    """Which axes are open: the batch, and the length of tokens, their masks and of sounds."""
    Dim = torch.export.Dim
    rows, lengths = Dim("batch"), {False: Dim("length"), True: Dim("decoder_length")}
    return tuple({0: rows, 1: lengths[name.startswith("decoder_")]}
                 if t.dim() == 2 and (not t.is_floating_point() or name == "input_values")
                 else {0: rows} for name, t in batch.items())


def _followed(run: _Plain, batch: Mapping[str, Tensor], names: list[str]) -> Any:
    kind = type(run.model).__name__
    try:
        with _quietly(), _expressible(run.model), torch.no_grad():
            return torch.onnx.export(
                run, tuple(batch.values()), dynamo=True, verbose=False, input_names=list(batch),
                output_names=names, dynamic_shapes=(_open(batch),))
    except Exception as e:
        why: BaseException = e
        while why.__cause__ is not None:
            why = why.__cause__
        said = next((line for line in str(why).splitlines() if line.strip()), "no details")
        raise FormatError(f"torch cannot write {kind} as ONNX with batch and length left open: "
                          f"{plain(said)} ({type(why).__name__}); nothing was written") from None


def _grouped(model: nn.Module) -> bool:
    """Are its experts run by a kernel that sorts tokens first, for which ONNX has no word?"""
    return getattr(getattr(model, "config", None), "_experts_implementation", "") == "grouped_mm"


@contextlib.contextmanager
def _expressible(model: Any) -> Iterator[None]:
    if not _grouped(model):
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation("grouped_mm")


def _compared(file: Path, run: _Plain, batches: list[dict[str, Tensor]]
              ) -> tuple[float, dict[str, list[int | str]], dict[str, list[int | str]]]:
    """(the largest difference of any batch's outputs, the axes of what goes in, and comes out)."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        _check_open(session, run, batches[0])
        worst = 0.0
        for batch in batches:
            with torch.no_grad():
                want = run.named(*batch.values())
            feeds = {i.name: batch[i.name].numpy() for i in session.get_inputs()}
            for name, got in zip(want, session.run(list(want), feeds), strict=True):
                a, b = want[name].double(), torch.from_numpy(got).double()
                same = a.shape == b.shape
                gap = float((a - b).norm() / a.norm().clamp(min=1e-30)) if same else float("inf")
                worst = max(worst, gap) if gap == gap else float("inf")
    except FormatError:
        raise
    except Exception as e:
        raise CheckError("onnxruntime cannot run what was written: "
                         f"{plain(str(e).partition(chr(10))[0])}; nothing was written") from None
    return worst, {i.name: list(i.shape) for i in session.get_inputs()}, \
        {o.name: list(o.shape) for o in session.get_outputs()}


def _check_open(session: Any, run: _Plain, batch: Mapping[str, Tensor]) -> None:
    """A model that goes by a size is followed for that size alone."""
    axes = dict(zip(batch, _open(batch), strict=True))
    for one in session.get_inputs():
        for axis, dim in axes[one.name].items():
            if isinstance(one.shape[axis], int):
                raise FormatError(
                    f"torch cannot write {type(run.model).__name__} as ONNX with batch and length "
                    f"left open: it goes by the {dim.__name__} of {one.name} and holds for "
                    f"{one.shape[axis]} alone; nothing was written")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What the exporter says of itself on the way is not for people."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [g.level for g in loggers]
    for g in loggers:
        g.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for g, level in zip(loggers, levels, strict=True):
            g.setLevel(level)
