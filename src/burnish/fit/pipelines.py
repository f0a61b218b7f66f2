"""Pipelines of diffusers in a folder: which part takes noise out, what stands around it, and the
schedule of the noise (schedules.py)."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.reading import plain, reading
from ..formats import safe
from ..formats.model_files import check_weights
from .pictures import Picture
from .schedules import Flow, Schedule

INDEX = "model_index.json"
#: parts that take noise out, as pipelines call them
DENOISERS = ("unet", "transformer")
#: what a model may be asked to tell of a noisy picture
KNOWN = ("epsilon", "v_prediction", "sample")
#: parts with weights that diffusers reads by itself, for which pickles are refused beforehand
READ_WHOLE = ("text_encoder", "safety_checker", "image_encoder")
#: pipelines that read texts: what their denoisers are told of one, beside the noisy picture
READS = {
    "StableDiffusionPipeline": ("encoder_hidden_states",),
    "StableDiffusionXLPipeline": ("encoder_hidden_states", "text_embeds"),
    "StableDiffusion3Pipeline": ("encoder_hidden_states", "pooled_projections"),
}


def is_pipeline(model: Any) -> bool:
    """Is it the folder of a pipeline?"""
    return isinstance(model, str | Path) and (Path(model).expanduser() / INDEX).is_file()


def library() -> Any:
    """diffusers; ConfigError where it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ConfigError("a pipeline of diffusers needs it: pip install diffusers") from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def tasks_of(model: Any) -> tuple[str, ...]:
    """What a pipeline's denoiser can be trained for; () for what is no pipeline."""
    if not is_pipeline(model):
        return ()
    found = Pipeline(Path(model).expanduser())
    if not found.reads_texts:
        return ("image-generation",)
    return ("text-to-image",) if found.kind in READS else ()


def usual_task(model: Any) -> str | None:
    """The task of a pipeline where nobody has said one; None for what is no pipeline."""
    return next(iter(tasks_of(model)), None)


def numbers(dtype: torch.dtype | None) -> dict[str, Any]:
    """What a part is to be held in, by the name that the installed diffusers has for it."""
    if dtype is None:
        return {}
    version = tuple(int(n) for n in library().__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


class Pipeline:
    """A pipeline's folder. Nothing is loaded before it is asked for.

    part: the name of the denoiser.
    Raises ConfigError for a folder without one, and for a schedule of unknown meaning.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        index = safe.read_json(self.folder / INDEX, finite=True)
        self.kind = str(index.get("_class_name"))
        self.parts: dict[str, tuple[str, str]] = {
            k: (str(v[0]), str(v[1])) for k, v in index.items()
            if isinstance(v, list) and len(v) == 2 and all(isinstance(x, str) for x in v)}
        #: parts that it could have and has not
        self.absent = tuple(k for k, v in index.items() if v == [None, None])
        #: class as the pipeline calls it -> the model's number
        self.names = {name.strip(): int(k) for k, v in (index.get("id2label") or {}).items()
                      for name in str(v).split(",")}

    @property
    def part(self) -> str:
        found = next((p for p in DENOISERS if p in self.parts), None)
        if found is None:
            raise ConfigError(f"{self.folder} is a {plain(self.kind, 60)} without a denoiser: "
                              f"expected {' or '.join(DENOISERS)} among its parts, it has "
                              f"{plain(', '.join(self.parts) or 'none', 200)}")
        return found

    @property
    def reads_texts(self) -> bool:
        return any(p.startswith("text_encoder") for p in self.parts)

    def check(self) -> None:
        """Raises ConfigError for a part that is not there, FormatError for one that is pickled."""
        for part, (package, name) in self.parts.items():
            where = self.folder / part
            if not where.is_dir():
                raise ConfigError(f"{self.folder} lacks the folder {part}/ ({plain(name, 60)}), "
                                  f"which its {INDEX} names")
            if package not in ("diffusers", "transformers") and \
                    not hasattr(library().pipelines, package):     # a module of its pipelines
                raise ConfigError(f"{self.folder}: {part} is {plain(name, 60)} of "
                                  f"{plain(package, 60)}; parts of diffusers and transformers are "
                                  "read, and no code that comes with a pipeline runs")
            if part.startswith(READ_WHOLE):
                safe.weight_files(where)

    def class_of(self, part: str) -> Any:
        package, name = self.parts[part]
        found = getattr(library(), name, None) if package == "diffusers" else None
        if found is None:
            raise ConfigError(f"{self.folder}: {part} is {plain(name, 60)} of {plain(package, 60)}"
                              ", which diffusers does not know")
        return found

    def load(self, part: str, **kw: Any) -> nn.Module:
        """A part of diffusers', with its weights."""
        kind, where = self.class_of(part), self.folder / part
        with reading(f"{part} of {self.folder}", ConfigError):
            check_weights(str(where), lambda: self.blank(part))
            found: nn.Module = kind.from_pretrained(where, use_safetensors=True,
                                                    low_cpu_mem_usage=True, **kw)
        return found

    def blank(self, part: str) -> nn.Module:
        """A part by its configuration alone."""
        kind = self.class_of(part)
        made: nn.Module = kind.from_config(safe.read_json(self.folder / part / "config.json"))
        return made

    def around(self, denoiser: nn.Module) -> Any:
        """The pipeline with `denoiser` in its place, in its numbers and where it is; without what
        reads texts, which conditions.py has asked."""
        left = [p for p in self.parts if p.startswith(("text_encoder", "tokenizer"))]
        one = next(denoiser.parameters())
        made = self.made(**numbers(one.dtype), **dict.fromkeys(left), **{self.part: denoiser})
        return made.to(one.device)

    def made(self, **given: Any) -> Any:
        """The pipeline with these parts and the rest from its files."""
        with reading(f"the pipeline {self.folder}", ConfigError):
            found = library().DiffusionPipeline.from_pretrained(
                self.folder, use_safetensors=True, local_files_only=True,
                **{**dict.fromkeys(self.absent), **given})
        found.set_progress_bar_config(disable=True)
        return found

    def save(self, denoiser: nn.Module, folder: Path) -> None:
        """The pipeline's folder with `denoiser` in its place; no pickles go along."""
        shutil.copy2(self.folder / INDEX, folder / INDEX)
        for part in self.parts:
            if part == self.part:
                denoiser.save_pretrained(folder / part)        # type: ignore[operator]
            elif (self.folder / part).is_dir():
                shutil.copytree(self.folder / part, folder / part, ignore=shutil.ignore_patterns(
                    *(f"*{ending}" for ending in safe.PICKLES), "*.py", ".*"))

    # -- the noise -------------------------------------------------------------------------------
    def schedule(self) -> Schedule | Flow:
        if "scheduler" not in self.parts:
            raise ConfigError(f"{self.folder} has no scheduler among its parts")
        kind = self.class_of("scheduler")
        config = safe.read_json(self.folder / "scheduler" / "scheduler_config.json", finite=True)
        with reading(f"the scheduler of {self.folder}", ConfigError):
            found = kind.from_config(config)
        if kind.__name__ == "FlowMatchEulerDiscreteScheduler":
            if found.config.get("invert_sigmas"):
                raise ConfigError(f"{self.folder}: the scheduler has invert_sigmas=True; fit learns"
                                  " flows whose noise grows with the step")
            return Flow(found.sigmas.double().flip(0))
        tells = found.config.get("prediction_type")
        if tells not in KNOWN or not hasattr(found, "alphas_cumprod"):
            said = "says no prediction_type" if tells is None else \
                f"has prediction_type {plain(tells, 40)!r}" if tells not in KNOWN else \
                "has no variance-preserving schedule (alphas_cumprod)"
            raise ConfigError(f"{self.folder}: the scheduler {kind.__name__} {said}; fit learns "
                              f"{', '.join(KNOWN)}, and flows of FlowMatchEulerDiscreteScheduler")
        kept = library().DDPMScheduler.from_config(config).alphas_cumprod
        return Schedule(kept.double(), tells)

    @property
    def offset(self) -> int:
        """Steps that the sampler leaves out at the start: Stable Diffusion's always does one."""
        config = safe.read_json(self.folder / "scheduler" / "scheduler_config.json", finite=True)
        return 1 if self.kind == "StableDiffusionPipeline" else int(config.get("steps_offset") or 0)

    # -- pictures --------------------------------------------------------------------------------
    @property
    def coder(self) -> str | None:
        """The part that makes latents of pictures."""
        return next((p for p in ("vae", "vqvae") if p in self.parts), None)

    @property
    def coder_config(self) -> dict[str, Any]:
        return safe.read_json(self.folder / str(self.coder) / "config.json", finite=True)

    @property
    def cell(self) -> int:
        """Sides of a picture over those of what stands for it."""
        return 2 ** (len(self.coder_config["block_out_channels"]) - 1) if self.coder else 1

    def picture(self, denoiser: nn.Module, resolution: int | None = None) -> Picture:
        """How large pictures are and how many channels they have: between -1 and 1, the middle of
        a picture that is no square. resolution: their sides, where they are another size than the
        denoiser was made for."""
        config: Any = denoiser.config
        side, channels = config.sample_size, config.in_channels
        if resolution is not None:
            cell = self.cell * int(config.get("patch_size") or _halved(config))
            if resolution % cell:
                near = max(1, round(resolution / cell)) * cell
                raise ConfigError(f"resolution={resolution}: {type(denoiser).__name__} makes "
                                  f"pictures whose sides are multiples of {cell}; the nearest is "
                                  f"{near}")
            side = resolution // self.cell
        if side is None:
            raise ConfigError(f"{type(denoiser).__name__} has no sample_size, so the size of "
                              "pictures is unknown")
        height, width = (side, side) if isinstance(side, int) else side
        if self.coder is not None:
            coder = self.coder_config
            kept = coder.get("latent_channels")
            if kept is not None and kept != channels:
                raise ConfigError(f"{type(denoiser).__name__} reads {channels} channels and the "
                                  f"{self.coder} makes {kept}: it is given something beside the "
                                  "noisy picture (inpainting, editing), which fit does not serve")
            height, width, channels = height * self.cell, width * self.cell, coder["in_channels"]
        if channels not in (1, 3):
            raise ConfigError(f"{type(denoiser).__name__} reads {channels} channels; pictures have "
                              "one or three")
        return Picture(height, width, (0.5,) * channels, (0.5,) * channels, crop=1.0)


def _halved(config: Any) -> int:
    """What the sides of a U-Net's input are multiples of: it halves them between its levels."""
    return 2 ** (len(config.get("block_out_channels") or (1,)) - 1)


def classes_of(denoiser: nn.Module) -> int | None:
    """How many classes it is told apart by; None for one that is told none.

    Raises ConfigError for classes that are told in another way than by number.
    """
    config: Any = denoiser.config
    kind = config.get("class_embed_type")
    if kind is not None:
        raise ConfigError(f"{type(denoiser).__name__} is told classes as {plain(kind, 40)!r}; fit "
                          "serves numbers (class_embed_type=None with num_class_embeds)")
    many = config.get("num_class_embeds") or (
        config.get("num_embeds_ada_norm") if config.get("norm_type") == "ada_norm_zero" else None)
    return None if many is None else int(many)


def called(denoiser: nn.Module) -> str:
    """What its first argument, the noisy pictures, is called."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


@dataclass
class Latents:
    """Middles and spreads (None: no spread) of what a coder makes of pictures, by row."""

    middle: list[Tensor]
    spread: list[Tensor] | None

    def drawn(self, i: int, g: torch.Generator) -> Tensor:
        x = self.middle[i]
        return x if self.spread is None else x + self.spread[i] * torch.randn(x.shape, generator=g)
