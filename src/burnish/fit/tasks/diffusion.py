"""Pictures made out of noise: a denoiser of diffusers, of a class or of none."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.dtypes import dtype_of
from ...core.errors import ConfigError
from ..from_files import Kept, picture
from ..pipelines import Latents, Pipeline, called, classes_of, numbers
from ..rows import Rows
from ..schedules import Flow, Schedule
from .base import Batch, Task

#: steps at which an evaluation looks at each picture
LOOKS = 4
#: what the model is told of a row; the generator is there while it trains
Beside = Callable[[int, torch.Generator | None], dict[str, Tensor]]


class Clean(Kept):
    """``x`` (C, H, W) between -1 and 1. sizes: (height, width) of those that were read."""

    def __init__(self, rows: Any, reads: Any, where: Callable[[int], str] | None):
        super().__init__(rows, where)
        self.reads = reads
        self.sizes: dict[int, tuple[int, int]] = {}

    def read(self, i: int) -> dict[str, Any]:
        image = picture(self.opened(i)["image"], self.where(i))
        self.sizes[i] = (image.height, image.width)
        return {"x": self.reads(image)}


class Noised(Rows):
    """Pictures at a step of the schedule, with what is to be told of them.

    again: each pass draws other steps (all alike likely) and other noise: row i of pass k is asked
    for as ``i + k * len(rows)``. Otherwise a picture is looked at LOOKS times, once in each part of
    the schedule, with the same noise for ever. All is a function of seed, pass and row.
    beside: what the model is told of each picture, of which training may leave some out.
    gamma: how training weighs the steps (:meth:`burnish.fit.schedules.Schedule.at`).
    """

    def __init__(self, drawn: Callable[[int, torch.Generator], Tensor], count: int,
                 schedule: Schedule | Flow, name: str, beside: Beside, seed: int, again: bool,
                 gamma: float | None = None):
        self.drawn, self.count, self.schedule, self.name = drawn, count, schedule, name
        self.beside, self.seed, self.redrawn = beside, seed, again
        self.looks, self.gamma = (1, gamma) if again else (LOOKS, None)

    def __len__(self) -> int:
        return self.count * self.looks

    def source(self, i: int) -> int:
        return i // self.looks

    def row(self, i: int) -> dict[str, Any]:
        turn, i = divmod(i, len(self))
        g = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + turn) * 1_000_003 + i) % 2**63)
        x = self.drawn(self.source(i), g)
        part = (i % self.looks + float(torch.rand((), generator=g, dtype=torch.float64)))
        t = min(int(part / self.looks * len(self.schedule)), len(self.schedule) - 1)
        there, target, weight = self.schedule.at(x, torch.randn(x.shape, generator=g), t,
                                                 self.gamma)
        told = self.beside(self.source(i), g if self.redrawn else None)
        return {self.name: there, "timestep": self.schedule.time(t), **told,
                "target": target, "weight": torch.tensor(weight)}


class ImageGeneration(Task):
    """The noisy picture under the name that the model gives it, ``timestep`` (B,) and
    ``class_labels`` (B,) where the model knows classes; ``target`` (B, C, H, W) is what it should
    tell, ``weight`` (B,) how much a picture counts.

    The loss is ``mean_b weight_b |f(x_t, t) - target|^2 / (C H W)``
    (:mod:`burnish.fit.schedules`). What a model tells of variances is not learnt.
    """

    smooths = False
    own_loss = True
    heavy = True
    takes = ("label",)
    truth = ("target", "weight")
    settings = ("snr_gamma", "num_inference_steps")
    drawing = ("seed", "num_inference_steps")
    #: entries of a batch that say where in the schedule it is, or how large: never rounded
    exact = ("timestep",)

    def prepare(self) -> None:
        if not isinstance(self.processor, Pipeline):
            raise ConfigError(f"{self.data.task} takes the folder of a pipeline of diffusers, "
                              f"not {type(self.processor).__name__}")
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length}: {self.data.task} has no length of "
                              "texts to choose; leave it out")
        self.processor.check()
        self.schedule = self.processor.schedule()
        self.asked_for(self.how)
        if self.how.get("snr_gamma") is not None:
            self.schedule.at(torch.zeros(1), torch.zeros(1), 0, self.how["snr_gamma"])

    # -- the model -----------------------------------------------------------------------------
    def load(self, name: str, trust_remote_code: bool = False, unread: bool = False, **kw: Any
             ) -> nn.Module:
        """The denoiser of the pipeline in the folder `name`."""
        pipeline = Pipeline(name)
        model = pipeline.load(pipeline.part, **numbers(dtype_of(kw.get("dtype"))))
        model.name_or_path = name
        self.settle(model)
        return model

    def files(self, name: str) -> str:
        return str(Path(name, self.processor.part))

    def blank(self, name: str) -> nn.Module:
        with torch.device("meta"):
            model = self.processor.blank(self.processor.part)
        self.settle(model)
        return model

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        self.reads_pictures = self.processor.picture(model, self.how.get("resolution"))
        self.channels = int(model.config.in_channels)  # type: ignore[union-attr, arg-type]
        self.name = called(model)
        self.numbers = self._numbers(model)

    def _numbers(self, model: nn.Module) -> list[int] | None:
        """The model's number of every class of the data; None for a model without classes."""
        many, labels = classes_of(model), self.data.labels
        if many is None:
            if labels:
                self.notes.append(f"{type(model).__name__} knows no classes: those of the data "
                                  "are not read")
            return None
        if not labels:
            raise ConfigError(f"{type(model).__name__} makes pictures of {many} classes, and the "
                              "data has none: put the pictures into a folder for each class, or "
                              "name a column with label=")
        names = self.processor.names
        if all(k in names for k in labels):
            return [names[k] for k in labels]
        if len(labels) > many:
            raise ConfigError(f"the data has {len(labels)} classes, and {type(model).__name__} "
                              f"{many}")
        if names:
            stranger = next(k for k in labels if k not in names)
            self.notes.append(f"{stranger!r} is no class of the pipeline: the data's are learnt "
                              f"as its numbers 0 to {len(labels) - 1}")
        return list(range(len(labels)))

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        clean = Clean(rows, self.reads_pictures, self.data.where.get(split))

        def plain(i: int, g: torch.Generator) -> Tensor:
            return clean[i]["x"]

        drawn = plain if self.processor.coder is None else self.latents(clean).drawn
        return Noised(drawn, len(rows), self.schedule, self.name, self.beside(rows, clean),
                      self.seed, split == "train", self.how.get("snr_gamma"))

    def beside(self, rows: Any, clean: Clean) -> Beside:
        """What the model is told of each row beside the picture."""
        if self.numbers is None:
            return lambda i, g: {}
        which = [torch.tensor(self.numbers[k]) for k in rows["label"][:]]
        return lambda i, g: {"class_labels": which[i]}

    def agreed(self, batch: Batch) -> Batch:
        return super().agreed(batch) | {k: batch[k] for k in self.exact if k in batch}

    @torch.no_grad()
    def latents(self, clean: Clean) -> Latents:
        """What the pipeline's coder makes of every picture, asked once; it is let go then."""
        assert self.processor.coder is not None
        coder: Any = self.processor.load(self.processor.coder).eval()
        if torch.cuda.is_available():
            coder = coder.cuda()
        scale, shift = centred(coder.config)
        clean.room = 0                                # they are read once
        middle: list[Tensor] = []
        spread: list[Tensor] = []
        for i in range(len(clean)):
            made = coder.encode(clean[i]["x"][None].to(coder.device, coder.dtype))
            if "latent_dist" in made:
                spread.append(made.latent_dist.std[0].float().cpu() * scale)
                found = made.latent_dist.mean
            else:
                found = made.latents
            middle.append((found[0].float().cpu() - shift) * scale)
        return Latents(middle, spread or None)

    # -- loss and figures ----------------------------------------------------------------------
    def logits(self, outputs: Any) -> Tensor:
        made = outputs if isinstance(outputs, Tensor) else \
            outputs["sample"] if isinstance(outputs, Mapping) else outputs[0]
        return made[:, :self.channels]

    def right(self, truth: Any) -> Tensor:
        """How much a picture counts: what it should be is too large to be kept."""
        return torch.as_tensor(truth["weight"] if isinstance(truth, Mapping) else self.told(truth))

    def told(self, labels: Any) -> Tensor:
        return labels[1] if isinstance(labels, tuple | list) else labels

    def errors(self, outputs: Any, target: Tensor, weight: Tensor) -> Tensor:
        off = (self.logits(outputs).float() - target.float()).square().flatten(1).mean(1)
        return off * weight

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        return self.errors(outputs, *labels).mean()

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        target, weight = (truth[k] for k in self.truth) if isinstance(truth, Mapping) else truth
        errors = self.errors(outputs, target, weight)
        return errors, torch.stack([errors, torch.ones_like(errors)], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """The loss of each part of the schedule, the least noise first."""
        parts = torch.as_tensor(answers).double().view(-1, LOOKS).mean(0).tolist() \
            if len(answers) % LOOKS == 0 else []
        return {f"loss_{k + 1}_of_{LOOKS}": v for k, v in enumerate(parts)}

    # -- answers to people ---------------------------------------------------------------------
    def asked(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str, int]:
        """(what the sampler is called with, a name for the picture, the seed of its noise)."""
        given = row.get("label")
        if self.numbers is None:                       # told apart by nothing but their noise
            text = str(given)
            if not re.fullmatch(r"\d{1,9}", text):
                raise ConfigError(f"the model makes pictures of no class: ask it with a number, "
                                  f"the seed of the noise, not {text[:40]!r}")
            return {}, text, int(text)
        labels = self.data.labels or ()
        if given not in labels:
            raise ConfigError(f"{str(given)[:40]!r} is no class of this run; it knows "
                              f"{', '.join(labels[:40])}")
        return {"class_labels": [self.numbers[labels.index(given)]]}, str(given), self.seed

    def posed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The class of a row, or where there are none the seed of the run."""
        labels = self.data.labels
        return {"label": str(self.seed) if self.numbers is None or labels is None
                else labels[row["label"]]}

    @torch.no_grad()
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A picture by the pipeline's own sampler, written into :attr:`folder`."""
        how, name, seed = self.asked(row)
        image = self.drawn(getattr(model, "whole", model), how, seed)    # it draws where it is
        folder = Path(self.folder or ".", "pictures")
        folder.mkdir(parents=True, exist_ok=True)
        return {"picture": str(written(image, folder, name))}

    def asked_for(self, how: Mapping[str, Any]) -> None:
        """Raises ConfigError for settings of the sampler that it has not."""
        steps = how.get("num_inference_steps")
        if steps is not None and steps > self.most:
            raise ConfigError(f"num_inference_steps={steps}: the scheduler of "
                              f"{self.processor.folder} draws in {self.most} steps at most")

    @property
    def most(self) -> int:
        """Steps that the sampler can take: those of the schedule behind its first."""
        return len(self.schedule) - self.processor.offset

    def draws(self, **how: Any) -> None:
        super().draws(**how)
        self.asked_for(how)
        self.seed = int(how.pop("seed", self.seed))
        self.how = self.how | how

    def drawn(self, model: nn.Module, how: Mapping[str, Any], seed: int) -> Any:
        """The picture that the pipeline's sampler makes of the noise of `seed`."""
        pipe = self.processor.around(model)
        takes = inspect.signature(pipe.__call__).parameters
        how = dict(how)
        hooks = []
        if "class_labels" in how and "class_labels" not in takes:      # a sampler without classes
            which = torch.tensor(how.pop("class_labels"), device=next(model.parameters()).device)

            def add(module: nn.Module, args: Any, kw: dict[str, Any]) -> tuple[Any, Any]:
                return args, {**kw, "class_labels": which.expand(len(args[0]))}

            hooks.append(model.register_forward_pre_hook(add, with_kwargs=True))
        elif "class_labels" in how and classes_of(model) != 1000:
            how["guidance_scale"] = 1.0       # the sampler takes number 1000 for no class
        steps = self.how.get("num_inference_steps") or min(
            takes["num_inference_steps"].default, self.most)
        try:
            return pipe(**how, num_inference_steps=steps,
                        generator=torch.Generator().manual_seed(seed)).images[0]
        finally:
            for hook in hooks:
                hook.remove()

    def said(self, answer: Mapping[str, Any]) -> str:
        return str(answer["picture"])

    def shown(self, tuned: Any, device: Any) -> dict[str, Any]:
        """``drawn``: where a run was asked for samples, the pictures of the last ones by the model
        that is kept, beside the base's; paths in the run's folder."""
        answers = Path(self.folder or ".", "answers.jsonl")
        if not answers.is_file():
            return {}
        last = json.loads(answers.read_text().splitlines()[-1])["answers"]
        rows = list(dict.fromkeys(a["asked"] for a in last))
        was = tuned.model.training
        tuned.model.eval()
        try:
            made = [self.answer(tuned.model, {self.takes[0]: r}, 0)["picture"] for r in rows]
            with tuned.disabled():
                base = [self.answer(tuned.model, {self.takes[0]: r}, 0)["picture"] for r in rows]
        finally:
            tuned.model.train(was)
        return {"drawn": [{"asked": r, "base": b, "tuned": t}
                          for r, b, t in zip(rows, base, made, strict=True)]}


def centred(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(scale, shift) of a coder's latents, ``scale (z - shift)``: numbers, or (C, 1, 1)."""
    scale, middle, spread = (config.get(k) for k in (
        "scaling_factor", "latents_mean", "latents_std"))
    if middle is not None and spread is not None:
        return scale / torch.tensor(spread).view(-1, 1, 1), torch.tensor(middle).view(-1, 1, 1)
    return scale, config.get("shift_factor") or 0.0


def written(image: Any, folder: Path, name: str) -> Path:
    """Writes a picture under a name that is free."""
    stem = re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:60] or "picture"
    free = next(p for k in range(1, 10**9)
                if not (p := folder / f"{stem}{f'-{k}' if k > 1 else ''}.png").exists())
    image.save(free)
    return free
