"""Pipelines of diffusers in a folder: which part takes noise out, what stands around it, and the
schedule of the noise."""

from __future__ import annotations

import inspect
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

INDEX = "model_index.json"
#: parts that take noise out, as pipelines call them
DENOISERS = ("unet", "transformer")
#: what a model may be asked to tell of a noisy picture
KNOWN = ("epsilon", "v_prediction", "sample")


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
    parts = Pipeline(Path(model).expanduser()).parts
    return () if "text_encoder" in parts else ("image-generation",)


def usual_task(model: Any) -> str | None:
    """The task of a pipeline where nobody has said one; None for what is no pipeline."""
    return next(iter(tasks_of(model)), None)


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
                                                    low_cpu_mem_usage=False, **kw)
        return found

    def blank(self, part: str) -> nn.Module:
        """A part by its configuration alone."""
        kind = self.class_of(part)
        made: nn.Module = kind.from_config(safe.read_json(self.folder / part / "config.json"))
        return made

    def around(self, denoiser: nn.Module) -> Any:
        """The whole pipeline with `denoiser` in its place."""
        with reading(f"the pipeline {self.folder}", ConfigError):
            made = library().DiffusionPipeline.from_pretrained(
                self.folder, use_safetensors=True, **{self.part: denoiser})
        made.set_progress_bar_config(disable=True)
        return made.to(next(denoiser.parameters()).device)

    # -- the noise -------------------------------------------------------------------------------
    def schedule(self) -> Schedule:
        if "scheduler" not in self.parts:
            raise ConfigError(f"{self.folder} has no scheduler among its parts")
        kind = self.class_of("scheduler")
        config = safe.read_json(self.folder / "scheduler" / "scheduler_config.json", finite=True)
        own = kind.from_config(config).config
        tells = own.get("prediction_type")
        if tells not in KNOWN or own.get("num_train_timesteps") is None:
            said = "says no prediction_type" if tells is None else \
                f"has prediction_type {plain(tells, 40)!r}"
            raise ConfigError(f"{self.folder}: the scheduler {kind.__name__} {said}; fit learns "
                              f"{', '.join(KNOWN)}")
        kept = library().DDPMScheduler.from_config(config).alphas_cumprod
        return Schedule(kept.double(), tells)

    # -- pictures --------------------------------------------------------------------------------
    @property
    def coder(self) -> str | None:
        """The part that makes latents of pictures."""
        return next((p for p in ("vae", "vqvae") if p in self.parts), None)

    def picture(self, denoiser: nn.Module) -> Picture:
        """How large pictures are and how many channels they have: between -1 and 1, the middle of
        a picture that is no square."""
        config: Any = denoiser.config
        side, channels = config.sample_size, config.in_channels
        if side is None:
            raise ConfigError(f"{type(denoiser).__name__} has no sample_size, so the size of "
                              "pictures is unknown")
        height, width = (side, side) if isinstance(side, int) else side
        if self.coder is not None:
            coder = safe.read_json(self.folder / self.coder / "config.json")
            times = 2 ** (len(coder["block_out_channels"]) - 1)
            height, width, channels = height * times, width * times, coder["in_channels"]
        if channels not in (1, 3):
            raise ConfigError(f"{type(denoiser).__name__} reads {channels} channels; pictures have "
                              "one or three")
        return Picture(height, width, (0.5,) * channels, (0.5,) * channels, crop=1.0)


class Schedule:
    """How much noise stands in a picture at each step, and what is told of it.

    ``x_t = sqrt(a_t) x + sqrt(1 - a_t) e`` with a_t falling. tells: epsilon, v_prediction, sample.
    """

    def __init__(self, kept: Tensor, tells: str):
        self.kept, self.tells = kept, tells

    def __len__(self) -> int:
        return len(self.kept)

    def at(self, x: Tensor, noise: Tensor, t: int) -> tuple[Tensor, Tensor, float]:
        """(x_t, what is to be told, its weight): the noise ``e`` (Ho et al., 2020), the velocity
        ``sqrt(a_t) e - sqrt(1 - a_t) x``, or the picture, which counts by ``a_t / (1 - a_t)``
        (both Salimans and Ho, 2022)."""
        a = float(self.kept[t])
        there = a ** 0.5 * x + (1 - a) ** 0.5 * noise
        if self.tells == "epsilon":
            return there, noise, 1.0
        if self.tells == "v_prediction":
            return there, a ** 0.5 * noise - (1 - a) ** 0.5 * x, 1.0
        return there, x, a / max(1 - a, 1e-12)


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
