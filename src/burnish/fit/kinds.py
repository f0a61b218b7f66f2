"""The tasks that `fit` serves, and what is known of each before anything is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """auto: the class of transformers that holds the models. pipeline: the task's name on hubs.
    also: (configuration, model) of those that `auto` does not know (autos.py)."""

    auto: str
    pipeline: str
    also: tuple[tuple[str, str], ...] = ()


_SEQUENCE, _IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
_AUDIO = "AutoModelForAudioClassification"
_CAUSAL = "AutoModelForCausalLM"

KINDS = {
    "image-classification": Kind(_IMAGE, "image-classification"),
    "image-multi-label": Kind(_IMAGE, "image-classification"),
    "image-regression": Kind(_IMAGE, "image-classification"),
    "image-text-contrastive": Kind("AutoModelForZeroShotImageClassification",
                                   "zero-shot-image-classification"),
    "image-generation": Kind("DiffusionPipeline", "unconditional-image-generation"),
    "image-captioning": Kind("AutoModelForImageTextToText", "image-to-text"),
    "audio-classification": Kind(_AUDIO, "audio-classification"),
    "audio-multi-label": Kind(_AUDIO, "audio-classification"),
    "audio-regression": Kind(_AUDIO, "audio-classification"),
    "speech-recognition": Kind("AutoModelForCTC", "automatic-speech-recognition"),
    "speech-to-text": Kind("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    "semantic-segmentation": Kind("AutoModelForSemanticSegmentation", "image-segmentation"),
    "object-detection": Kind("AutoModelForObjectDetection", "object-detection"),
    "time-series-forecasting": Kind(
        "AutoModelForTimeSeriesPrediction", "time-series-forecasting",
        (("PatchTSTConfig", "PatchTSTForPrediction"),
         ("PatchTSMixerConfig", "PatchTSMixerForPrediction"))),
    "text-classification": Kind(_SEQUENCE, "text-classification"),
    "text-multi-label": Kind(_SEQUENCE, "text-classification"),
    "text-regression": Kind(_SEQUENCE, "text-classification"),
    "token-classification": Kind("AutoModelForTokenClassification", "token-classification"),
    "question-answering": Kind("AutoModelForQuestionAnswering", "question-answering"),
    "language-modelling": Kind(_CAUSAL, "text-generation"),
    "masked-language-modelling": Kind("AutoModelForMaskedLM", "fill-mask"),
    "masked-instruction-tuning": Kind("AutoModelForMaskedLM", "fill-mask"),
    "instruction-tuning": Kind(_CAUSAL, "text-generation"),
    "embedding": Kind("AutoModel", "sentence-similarity"),
    "preference-tuning": Kind(_CAUSAL, "text-generation"),
    "unpaired-preference-tuning": Kind(_CAUSAL, "text-generation"),
    "sequence-to-sequence": Kind("AutoModelForSeq2SeqLM", "text2text-generation"),
}

TASKS = tuple(KINDS)

#: what rows are learnt as by a model that is not made for their first reading: an encoder fills
#: gaps in texts and answers behind its mask, an encoder-decoder answers prompts and writes down
#: what it hears and sees; the first that the model serves
INSTEAD = {"language-modelling": ("masked-language-modelling",),
           "instruction-tuning": ("sequence-to-sequence", "masked-instruction-tuning"),
           "speech-recognition": ("speech-to-text",),
           "image-text-contrastive": ("image-captioning",)}

#: one answer to one prompt
SINGLE = ("sequence-to-sequence", "masked-instruction-tuning")


#: pairs of towers for pictures and texts, and those of them whose pairs are told one by one
TOWERS = frozenset({"clip", "metaclip_2", "siglip"})
SIGMOID = frozenset({"siglip"})


#: models that tell boxes by queries, one each, and learn them as DETR does
DETECTORS = frozenset({"yolos"})


#: models that read so many steps of a series and foretell so many, as their config says
FORECASTERS = frozenset({"patchtst", "patchtsmixer"})


def pictured(task: str) -> bool:
    return task.startswith("image-")


def heard(task: str) -> bool:
    return task.startswith("audio-") or spoken(task)


def captioned(task: str) -> bool:
    return task in ("image-text-contrastive", "image-captioning")


def spoken(task: str) -> bool:
    return task in ("speech-recognition", "speech-to-text")


def in_time(task: str | None) -> bool:
    return task == "time-series-forecasting"


def generated(task: str) -> bool:
    """Are pictures made, by a pipeline of diffusers?"""
    return task == "image-generation"


def form_of_label(task: str) -> str | None:
    """"class", "several", "number" or "tags"; None where rows have no label."""
    ends = {"token-classification": "tags", "classification": "class", "multi-label": "several",
            "regression": "number", "embedding": "number"}
    return next((form for end, form in ends.items() if task.endswith(end)), None)
