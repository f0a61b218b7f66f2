"""From rows of a task to batches of a model, and from its answers to figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...core.errors import ConfigError
from ...core.recipe import parse
from ..data import Data
from ..places import check_local, check_there, processor_for
from .base import Batch, Task, evaluate
from .captions import ImageCaptioning
from .classes import (
    ImageClassification,
    ImageMultiLabel,
    ImageRegression,
    TextClassification,
    TextMultiLabel,
    TextRegression,
)
from .clouds import CloudClassification, CloudMultiLabel, CloudRegression
from .contrast import ImageTextContrastive
from .detection import ObjectDetection
from .dictation import SpeechToText
from .diffusion import ImageGeneration
from .embeddings import Embedding
from .forecast import TimeSeriesForecasting
from .graphs import GraphClassification, GraphMultiLabel, GraphRegression
from .heard import AudioClassification, AudioMultiLabel, AudioRegression
from .image_embeddings import ImageEmbedding
from .language import InstructionTuning, LanguageModelling
from .marks import UnpairedPreferenceTuning
from .masked import MaskedLanguageModelling
from .masked_answers import MaskedInstructionTuning
from .pixels import SemanticSegmentation
from .preferences import PreferenceTuning
from .prompted import TextToImage
from .sequences import SequenceToSequence
from .spans import QuestionAnswering
from .speech import SpeechRecognition
from .text_masks import TextSegmentation
from .tokens import TokenClassification

__all__ = ["TASKS", "Batch", "Task", "evaluate", "task_for"]

TASKS: dict[str, type[Task]] = {
    "image-classification": ImageClassification,
    "image-multi-label": ImageMultiLabel,
    "image-regression": ImageRegression,
    "image-embedding": ImageEmbedding,
    "image-text-contrastive": ImageTextContrastive,
    "image-captioning": ImageCaptioning,
    "image-generation": ImageGeneration,
    "text-to-image": TextToImage,
    "audio-classification": AudioClassification,
    "audio-multi-label": AudioMultiLabel,
    "audio-regression": AudioRegression,
    "speech-recognition": SpeechRecognition,
    "speech-to-text": SpeechToText,
    "semantic-segmentation": SemanticSegmentation,
    "text-segmentation": TextSegmentation,
    "object-detection": ObjectDetection,
    "cloud-classification": CloudClassification,
    "cloud-multi-label": CloudMultiLabel,
    "cloud-regression": CloudRegression,
    "graph-classification": GraphClassification,
    "graph-multi-label": GraphMultiLabel,
    "graph-regression": GraphRegression,
    "time-series-forecasting": TimeSeriesForecasting,
    "text-classification": TextClassification,
    "text-multi-label": TextMultiLabel,
    "text-regression": TextRegression,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "language-modelling": LanguageModelling,
    "masked-language-modelling": MaskedLanguageModelling,
    "masked-instruction-tuning": MaskedInstructionTuning,
    "instruction-tuning": InstructionTuning,
    "embedding": Embedding,
    "preference-tuning": PreferenceTuning,
    "unpaired-preference-tuning": UnpairedPreferenceTuning,
    "sequence-to-sequence": SequenceToSequence,
}


def task_for(data: Data, model: str | nn.Module, *, processor: Any = None,
             max_length: int | None = None, trust_remote_code: bool = False, seed: int = 0,
             **how: Any) -> Task:
    """The task of `data`, with the tokenizer, image processor or feature
    extractor that belongs to `model`.

    seed: of what the task itself draws (which words are masked).  how: settings of the task.
    Raises ConfigError for a setting that is not this task's.
    """
    kind, how = TASKS[data.task], {k: v for k, v in how.items() if v is not None}
    for name in how:
        if name not in kind.settings:
            whose = ", ".join(t for t, k in TASKS.items() if name in k.settings)
            raise ConfigError(f"{name}={how[name]!r} is a setting of {whose}, and the data are for "
                              f"{data.task}")
    if how.get("shots", 1) == 1 and any("group" in s.column_names for s in data.splits.values()):
        raise ConfigError("group= says which examples may share a sequence, and a sequence has one "
                          "example; give shots=, how many")
    if isinstance(processor, str | Path):
        check_there(str(processor))
        processor = processor_for(data.task, str(processor), trust_remote_code)
    if processor is None:
        if isinstance(model, str):
            check_local(model)
        processor = processor_for(data.task, model, trust_remote_code)
    made = kind(data, processor, max_length, seed, how)
    made.prepare()
    return made


def by_itself(task: str, recipe: Any, memory: Any, shots: int | None = None) -> None:
    """Raises ConfigError where the recipe, or the plan of one for a memory, looks at one text by
    itself and a sample of the task is several, or is told apart from those beside it; where it
    protects rows and a sample is several of them."""
    if (shots or 1) > 1 and recipe is not None:
        if private := next((m.name for m in parse(recipe) if m.private), None):
            raise ConfigError(f"{private} protects a sample, and with shots={shots} a sample is "
                              "several rows of the data: leave shots out")
    if TASKS[task].alone:
        return
    if recipe is None:
        if memory is not None:
            raise ConfigError(f"a sample of {task} is several at once, which no plan divides; give "
                              "the recipe, and memory= to hold it to")
        return
    parts = [m.name for m in parse(recipe) if m.private or "own loss" in m.needs]
    if parts:
        raise ConfigError(f"{parts[0]} looks at each sample by itself, and a sample of {task} is "
                          "several at once: take another task or leave it out")


def embedded(task: str, recipe: Any) -> str | None:
    """The part that makes the head's outputs something else than the model was made to say, and
    minimises a loss of its own of that, by name (:attr:`Method.head_outputs`). Raises ConfigError
    where the task reads anything else in them."""
    part = next((m for m in parse(recipe) if m.head_outputs), None) if recipe is not None else None
    if part is None:
        return None
    if TASKS[task].head_outputs != part.head_outputs:
        serve = [t for t, kind in TASKS.items() if kind.head_outputs == part.head_outputs]
        a = "an" if part.head_outputs[0] in "aeiou" else "a"
        raise ConfigError(f"{part.name} makes the head's outputs {a} {part.head_outputs}, and "
                          f"{task} would read its own answers in them; take task="
                          + " or ".join(map(repr, serve)))
    return part.name


def smooths(task: str, smoothing: float) -> None:
    """Raises ConfigError where `smoothing` of labels was asked for and the task has none."""
    if smoothing and not TASKS[task].smooths:
        raise ConfigError(f"label_smoothing_factor={smoothing} smooths classes over others, and "
                          f"{task} has no such classes; leave it out")
