"""The tasks that `fit` serves, and what is known of each before anything is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """auto: the class of transformers that holds the models. pipeline: the task's name on hubs.
    rows: what data of it looks like.  also: (configuration, model) of those that `auto` does not
    know (autos.py).  example: the file in examples/ that learns it.  tests: files that hold it,
    beside those of all tasks.
    """

    auto: str
    pipeline: str
    rows: str
    tests: tuple[str, ...]
    example: str
    also: tuple[tuple[str, str], ...] = ()


_SEQUENCE, _IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
_AUDIO = "AutoModelForAudioClassification"
_CAUSAL = "AutoModelForCausalLM"

KINDS = {
    "image-classification": Kind(
        _IMAGE, "image-classification", "a folder of pictures per class; file_name or image, label",
        ("tests/fit/test_tasks.py",), "digits.py"),
    "image-multi-label": Kind(
        _IMAGE, "image-classification", "file_name or image; label, a list, or a column per class",
        ("tests/fit/test_every_task.py",), "digits.py"),
    "image-regression": Kind(
        _IMAGE, "image-classification", "file_name or image; label, a number",
        ("tests/fit/test_every_task.py",), "digits.py"),
    "image-embedding": Kind(
        _IMAGE, "image-feature-extraction",
        "a folder of pictures per class; file_name or image, label",
        ("tests/fit/test_image_embeddings.py",), "digits.py"),
    "image-text-contrastive": Kind(
        "AutoModelForZeroShotImageClassification", "zero-shot-image-classification",
        "file_name or image, text; a .txt beside each picture", ("tests/fit/test_contrast.py",),
        "matching.py"),
    "image-generation": Kind(
        "DiffusionPipeline", "unconditional-image-generation",
        "a folder of pictures per class, or of pictures", ("tests/fit/test_diffusion.py",),
        "shapes.py"),
    "text-to-image": Kind(
        "DiffusionPipeline", "text-to-image",
        "file_name or image, text; a .txt beside each picture; pictures and instance_prompt",
        ("tests/fit/test_prompted.py",), "penmanship.py"),
    "image-captioning": Kind(
        "AutoModelForImageTextToText", "image-to-text",
        "file_name or image, text; a .txt beside each picture", ("tests/fit/test_captions.py",),
        "telling.py"),
    "audio-classification": Kind(
        _AUDIO, "audio-classification", "a folder of sounds per class; file_name or audio, label",
        ("tests/fit/test_sounds.py", "tests/e2e/test_sounds.py"), "pitch.py"),
    "audio-multi-label": Kind(
        _AUDIO, "audio-classification", "file_name or audio; label, a list, or a column per class",
        ("tests/fit/test_sounds.py",), "measured.py"),
    "audio-regression": Kind(
        _AUDIO, "audio-classification", "file_name or audio; label, a number",
        ("tests/fit/test_sounds.py",), "measured.py"),
    "speech-recognition": Kind(
        "AutoModelForCTC", "automatic-speech-recognition", "file_name or audio, transcription",
        ("tests/fit/test_speech.py", "tests/e2e/test_speech.py"), "spelling.py"),
    "speech-to-text": Kind(
        "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition",
        "file_name or audio, transcription", ("tests/fit/test_dictation.py",), "dictation.py"),
    "semantic-segmentation": Kind(
        "AutoModelForSemanticSegmentation", "image-segmentation",
        "images/ beside masks/; file_name, mask_file_name",
        ("tests/fit/test_masks.py", "tests/e2e/test_masks.py"), "pixels.py"),
    "text-segmentation": Kind(
        "AutoModelForImageSegmentation", "image-segmentation",
        "file_name, mask_file_name, text; image, mask, text",
        ("tests/fit/test_text_segmentation.py",), "named.py",
        (("CLIPSegConfig", "CLIPSegForImageSegmentation"),)),
    "object-detection": Kind(
        "AutoModelForObjectDetection", "object-detection",
        "images/ beside a COCO file; file_name, objects", ("tests/fit/test_boxes.py",),
        "objects.py"),
    "cloud-classification": Kind(
        "AutoModel", "other", "a folder of .off, .ply, .xyz or .npy per class; file_name, label",
        ("tests/fit/test_clouds.py",), "solids.py"),
    "cloud-multi-label": Kind(
        "AutoModel", "other", "file_name; label, a list, or a column per class",
        ("tests/fit/test_clouds.py",), "measured.py"),
    "cloud-regression": Kind(
        "AutoModel", "other", "file_name; label, a number", ("tests/fit/test_clouds.py",),
        "measured.py"),
    "graph-classification": Kind(
        "AutoModel", "graph-ml", "edge_index, node_feat or x, y; a folder of a TU data set",
        ("tests/fit/test_graphs.py",), "bonds.py"),
    "graph-multi-label": Kind(
        "AutoModel", "graph-ml", "edge_index, node_feat or x; label, a list of classes",
        ("tests/fit/test_graphs.py",), "measured.py"),
    "graph-regression": Kind(
        "AutoModel", "graph-ml", "edge_index, node_feat or x; y, a number; a TU data set",
        ("tests/fit/test_graphs.py",), "measured.py"),
    "time-series-forecasting": Kind(
        "AutoModelForTimeSeriesPrediction", "time-series-forecasting",
        "time, columns of numbers, perhaps series_id", ("tests/fit/test_series.py",), "forecast.py",
        (("PatchTSTConfig", "PatchTSTForPrediction"),
         ("PatchTSMixerConfig", "PatchTSMixerForPrediction"))),
    "text-classification": Kind(
        _SEQUENCE, "text-classification", "text (or a pair of texts), label",
        ("tests/fit/test_answers.py",), "docstrings.py"),
    "text-multi-label": Kind(
        _SEQUENCE, "text-classification", "text; label, a list, or a column per class",
        ("tests/fit/test_answers.py", "tests/e2e/test_tasks.py"), "docstrings.py"),
    "text-regression": Kind(
        _SEQUENCE, "text-classification", "text (or a pair of texts); label, a number",
        ("tests/fit/test_answers.py", "tests/e2e/test_tasks.py"), "docstrings.py"),
    "token-classification": Kind(
        "AutoModelForTokenClassification", "token-classification", "tokens, tags; CoNLL",
        ("tests/fit/test_answers.py", "tests/e2e/test_tasks.py"), "tags.py"),
    "question-answering": Kind(
        "AutoModelForQuestionAnswering", "question-answering",
        "context, question, answers; SQuAD",
        ("tests/fit/test_answers.py", "tests/e2e/test_tasks.py"), "docstrings.py"),
    "language-modelling": Kind(
        _CAUSAL, "text-generation", "text; plain text files", ("tests/fit/test_words.py",),
        "passages.py"),
    "masked-language-modelling": Kind(
        "AutoModelForMaskedLM", "fill-mask", "text; plain text files",
        ("tests/e2e/test_tasks.py",), "numerals.py"),
    "masked-instruction-tuning": Kind(
        "AutoModelForMaskedLM", "fill-mask", "the rows of instruction-tuning",
        ("tests/fit/test_masked_answers.py",), "numerals.py"),
    "instruction-tuning": Kind(
        _CAUSAL, "text-generation",
        "messages; conversations; instruction, output; prompt, completion",
        ("tests/fit/test_data.py",), "numerals.py"),
    "embedding": Kind(
        "AutoModel", "sentence-similarity",
        "anchor, positive, perhaps negative; sentence1, sentence2, score",
        ("tests/fit/test_embeddings.py",), "near.py"),
    "preference-tuning": Kind(
        _CAUSAL, "text-generation", "prompt, chosen, rejected", ("tests/fit/test_preferences.py",),
        "numerals.py"),
    "unpaired-preference-tuning": Kind(
        _CAUSAL, "text-generation", "prompt, completion, label (true or false)",
        ("tests/fit/test_marks.py",), "marked.py"),
    "sequence-to-sequence": Kind(
        "AutoModelForSeq2SeqLM", "text2text-generation",
        "prompt, completion; messages of one question", ("tests/e2e/test_tasks.py",),
        "numerals.py"),
}

TASKS = tuple(KINDS)

#: what rows are learnt as by a model that is not made for their first reading: an encoder fills
#: gaps in texts and answers behind its mask, an encoder-decoder answers prompts and writes down
#: what it hears and sees, masks are of classes where no text is read; the first that the model
#: serves
INSTEAD = {"language-modelling": ("masked-language-modelling",),
           "instruction-tuning": ("sequence-to-sequence", "masked-instruction-tuning"),
           "speech-recognition": ("speech-to-text",),
           "image-text-contrastive": ("image-captioning",),
           "text-segmentation": ("semantic-segmentation",)}

#: one answer to one prompt
SINGLE = ("sequence-to-sequence", "masked-instruction-tuning")


#: pairs of towers for pictures and texts, and those of them whose pairs are told one by one
TOWERS = frozenset({"clip", "metaclip_2", "siglip"})
SIGMOID = frozenset({"siglip"})


#: models that write what is on a picture: an encoder with any decoder, and two whose decoder takes
#: a text and its prompt as one
WRITERS = frozenset({"vision-encoder-decoder", "blip", "git"})


#: models that tell boxes by queries, one each, and learn them as DETR does; and those of them whose
#: classes are told one by one, without one for "no object"
DETECTORS = frozenset({"yolos", "detr", "table-transformer", "conditional_detr", "deformable_detr"})
FOCAL = frozenset({"conditional_detr", "deformable_detr"})


#: models that read so many steps of a series and foretell so many, as their config says
FORECASTERS = frozenset({"patchtst", "patchtsmixer"})


def tasks_said() -> str:
    """All tasks in a sentence: those of one pattern together."""
    forms = ("classification", "multi-label", "regression")
    among = {f"{k}-{f}": k for k in dict.fromkeys(t.split("-")[0] for t in TASKS) for f in forms}
    kinds = [k for k in dict.fromkeys(among.values()) if all(f"{k}-{f}" in KINDS for f in forms)]
    rest = [t for t in TASKS if among.get(t) not in kinds]
    return (f"expected {', '.join(f'{k}-' for k in kinds[:-1])} or {kinds[-1]}- and behind it "
            f"{', '.join(forms[:-1])} or {forms[-1]}; or {', '.join(rest[:-1])} or {rest[-1]}")


def pictured(task: str) -> bool:
    return task.startswith("image-") or generated(task)


def heard(task: str) -> bool:
    return task.startswith("audio-") or spoken(task)


def tells_classes(task: str) -> bool:
    """Is each answer one of several classes?"""
    return form_of_label(task) == "class" and task != "image-embedding"


def cloudy(task: str | None) -> bool:
    return (task or "").startswith("cloud-")


def graphed(task: str | None) -> bool:
    return (task or "").startswith("graph-")


def foreign_models(task: str) -> bool:
    """Are its models those of somebody's own code, since transformers has none?"""
    return cloudy(task) or graphed(task)


def drawn_by_text(task: str | None) -> bool:
    """Is the mask of what a text names learnt?"""
    return task == "text-segmentation"


def captioned(task: str) -> bool:
    return task in ("image-text-contrastive", "image-captioning")


def spoken(task: str) -> bool:
    return task in ("speech-recognition", "speech-to-text")


def in_time(task: str | None) -> bool:
    return task == "time-series-forecasting"


def generated(task: str) -> bool:
    """Are pictures made, by a pipeline of diffusers?"""
    return task in ("image-generation", "text-to-image")


def form_of_label(task: str) -> str | None:
    """"class", "several", "number" or "tags"; None where rows have no label."""
    ends = {"image-embedding": "class", "token-classification": "tags", "classification": "class",
            "multi-label": "several", "regression": "number", "embedding": "number"}
    return next((form for end, form in ends.items() if task.endswith(end)), None)
