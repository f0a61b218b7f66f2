"""Sounds with a label: a class, several classes, or a number."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError, DataError
from ..from_files import Sounds, extracted
from ..rows import Rows
from .base import Batch, Task
from .classes import _Number, _Several, _Single


class Heard(Task):
    """What the model's own feature extractor makes of a recording, ``input_values`` (B, T) or
    ``input_features`` (B, frames, bands), with ``attention_mask`` where it makes one.

    Recordings are averaged to one channel and resampled to the extractor's rate. Each is prepared
    by itself, then rows are padded to the longest of their batch with the extractor's own value.
    """

    unlike = True
    takes = ("audio",)
    settings = ("max_seconds",)

    @property
    def extractor(self) -> Any:
        return self.processor

    def prepare(self) -> None:
        kind = type(self.extractor).__name__
        if not getattr(self.extractor, "sampling_rate", None):
            raise ConfigError(f"{kind} is no feature extractor of sound: it has no sampling_rate; "
                              "give processor= with a folder that has one")
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length} counts tokens, and a sound has none; "
                              "max_seconds= says how much of it is heard")
        seconds = self.how.get("max_seconds")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ConfigError(f"max_seconds={seconds!r}: expected a finite number above 0")

    @property
    def limit(self) -> float | None:
        """Seconds of a recording that are heard."""
        said, most = self.how.get("max_seconds"), self._window()
        return min((s for s in (said, most) if s is not None), default=None)

    def _window(self) -> float | None:
        """Seconds that an extractor of one length takes in; None where it takes any."""
        p = self.extractor
        if (samples := getattr(p, "n_samples", None)) is not None:                     # Whisper's
            return samples / p.sampling_rate
        frames = getattr(p, "max_length", None)
        return (0.025 + 0.010 * (frames - 1)) if isinstance(frames, int) else None     # AST's

    # -- the model -----------------------------------------------------------------------------
    def settle(self, model: nn.Module) -> None:
        """Model and extractor speak of the same input; layers are never left out by chance, which
        no promise of memory could be made of."""
        super().settle(model)
        config, p = getattr(model, "config", None), self.extractor
        wanted, made = getattr(model, "main_input_name", None), p.model_input_names[0]
        name = type(model).__name__
        if wanted is not None and config is not None and wanted != made:
            raise ConfigError(f"{name} reads {wanted}, and {type(p).__name__} makes {made}; give "
                              "processor= with the feature extractor that belongs to the model")
        bands = getattr(config, "num_mel_bins", None)
        ours = getattr(p, "num_mel_bins", None) or getattr(p, "feature_size", None)
        if bands is not None and ours is not None and bands != ours:
            raise ConfigError(f"{name} reads {bands} mel bands, and {type(p).__name__} makes "
                              f"{ours}; give the feature extractor that belongs to the model")
        places = getattr(config, "max_source_positions", None)
        if hasattr(p, "nb_max_frames") and places is not None and p.nb_max_frames != 2 * places:
            raise ConfigError(f"{name} reads {2 * places} frames, and {type(p).__name__} makes "
                              f"{p.nb_max_frames}; give the one that belongs to the model")
        long, ours = getattr(config, "max_length", None), getattr(p, "max_length", None)
        if hasattr(config, "frequency_stride") and None not in (long, ours) and long != ours:
            raise ConfigError(f"{name} reads {long} frames, and {type(p).__name__} makes {ours}; "
                              "give the one that belongs to the model")
        left = {k: v for k in ("layerdrop", "encoder_layerdrop")
                if isinstance(v := getattr(config, k, None), float) and v > 0}
        for k, v in left.items():
            setattr(config, k, 0.0)
            self.notes.append(f"the config's {k}={v:g} is put to 0: layers left out by chance have "
                              "no memory that could be promised")
        for module in model.modules() if left else ():
            if isinstance(getattr(module, "layerdrop", None), float):
                module.layerdrop = 0.0  # type: ignore[assignment]
        for module in model.modules():
            if hasattr(module, "_mask_hidden_states") and hasattr(module, "masked_spec_embed"):
                module._mask_hidden_states = MethodType(masked, module)  # type: ignore[assignment]

    def check(self, model: nn.Module) -> None:
        """Every recording is long enough for the model; spans that a training step masks are no
        longer than the shortest."""
        frames = getattr(model, "_get_feat_extract_output_lengths", None)
        if frames is None or self.extractor.model_input_names[0] != "input_values":
            return
        config, spare = model.config, None
        for split in self.data.splits:
            rows = self.rows(split)
            assert isinstance(rows, Sounds)
            least = min(range(len(rows)), key=rows.length)
            many = int(frames(torch.tensor(rows.length(least))))
            if many < 1:
                raise DataError(f"{rows.where(rows.source(least))}: the sound has "
                                f"{rows.length(least)} samples, too few for a single frame of the "
                                "model")
            if split == "train":
                spare = many
        span = getattr(config, "mask_time_length", 0)
        masks = getattr(config, "apply_spec_augment", False) and config.mask_time_prob > 0
        if masks and spare is not None and spare < span:
            config.mask_time_prob = 0.0
            self.notes.append(f"stretches of {span} frames are not masked in training "
                              f"(mask_time_prob=0): the shortest sound has {spare}")

    # -- the rows ------------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        made = Sounds(rows, rows["label"][:], self.extractor, self.limit,
                      self.data.where.get(split))
        self.hear(split, made)
        return made

    def hear(self, split: str, made: Sounds) -> None:
        """What is to be said of a split's recordings."""
        self.notes += [f"{split}: {n}" for n in made.notes]
        if split == "train" and not self._masks() and len(set(made.samples)) > 1:
            self.notes.append(f"{type(self.extractor).__name__} makes no mask: shorter sounds are "
                              "filled up with silence that the model hears")

    def _masks(self) -> bool:
        return self._window() is not None or bool(
            getattr(self.extractor, "return_attention_mask", True))

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.padded(rows) | {"labels": self.labels([r["labels"] for r in rows])}

    def padded(self, rows: Sequence[dict[str, Any]]) -> Batch:
        bare = [{k: v for k, v in r.items() if k != "labels"} for r in rows]
        if all(v.shape == bare[0][k].shape for r in bare for k, v in r.items()):
            return {k: torch.stack([r[k] for r in bare]) for k in bare[0]}
        return dict(self.extractor.pad(bare, padding=True, return_tensors="pt"))

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        raise NotImplementedError

    def input(self, batch: Batch) -> torch.Tensor:
        return batch[self.extractor.model_input_names[0]]

    # -- answers to people ---------------------------------------------------------------------
    def encode(self, row: Mapping[str, Any]) -> Batch:
        try:
            return self.agreed(self.padded([extracted(self.extractor, row["audio"],
                                                      self.limit)]))
        except ValueError as e:
            raise DataError(f"{row['audio']}: the sound cannot be read: {e}") from None


def masked(self: Any, hidden_states: torch.Tensor, mask_time_indices: torch.Tensor | None = None,
           attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """SpecAugment (Park et al., 2019) with the masks that transformers draws, as a choice between
    two tensors instead of an assignment to places: a step then takes the same memory however many
    places it masks. A method of a model's own module."""
    config, (many, frames, width) = self.config, hidden_states.shape
    if not getattr(config, "apply_spec_augment", True):
        return hidden_states
    draw = sys.modules[type(self).__module__]._compute_mask_indices
    where = mask_time_indices
    if where is None and config.mask_time_prob > 0 and self.training:
        where = torch.from_numpy(draw((many, frames), mask_prob=config.mask_time_prob,
                                      mask_length=config.mask_time_length,
                                      attention_mask=attention_mask,
                                      min_masks=config.mask_time_min_masks))
    if where is not None:
        told = self.masked_spec_embed.to(hidden_states.dtype)
        hidden_states = torch.where(where.to(hidden_states.device).bool().unsqueeze(-1), told,
                                    hidden_states)
    if config.mask_feature_prob > 0 and self.training:
        off = torch.from_numpy(draw((many, width), mask_prob=config.mask_feature_prob,
                                    mask_length=config.mask_feature_length,
                                    min_masks=config.mask_feature_min_masks))
        hidden_states = hidden_states.masked_fill(
            off.to(hidden_states.device).bool().unsqueeze(1), 0.0)
    return hidden_states


class AudioClassification(_Single, Heard):
    """Sounds, each of one class."""


class _OwnLoss(Task):
    """Models of sound, as transformers has them, know the loss of one class alone."""

    own_loss = True

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> torch.Tensor:
        return super().loss(outputs, self.right(labels), smoothing)


class AudioMultiLabel(_OwnLoss, _Several, Heard):
    """Sounds, each of any number of classes."""


class AudioRegression(_OwnLoss, _Number, Heard):
    """Sounds with a number each."""
