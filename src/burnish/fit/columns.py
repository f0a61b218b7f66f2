"""What columns mean: from a table's names to a task, and from its values to canonical rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..core.errors import DataError, nearest
from . import graphs, series
from .kinds import (
    SINGLE,
    captioned,
    cloudy,
    drawn_by_text,
    form_of_label,
    generated,
    graphed,
    heard,
    in_time,
    pictured,
    spoken,
)
from .labels import quantities
from .readings import (
    ambiguous,
    aside,
    heard_or_written,
    label_like,
    pictures,
    tabular,
    tagged,
    texts,
)
from .roles import Roles
from .table import Table

#: names people give these columns, likeliest first
TEXT = ("text", "sentence", "content", "document", "review", "comment", "body", "message",
        "utterance", "question", "premise", "sentence1", "question1", "tweet", "title")
PAIR = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2",
        "question": "sentence"}
LABEL = ("label", "labels", "class", "target", "category", "sentiment", "y", "intent", "topic")
IMAGE = ("image", "img", "picture", "photo", "pixel_values")
#: what was said in a recording
SPOKEN = ("transcription", "transcript", "sentence", "text", "normalized_text")
#: what is on a picture
CAPTION = ("text", "caption", "description", "sentence")
#: what a picture is made of
PROMPT = (*CAPTION, "prompt")
#: what a mask is of
PHRASE = ("text", "phrase", "sentence")
MASK = ("mask", "masks", "segmentation_mask", "annotation", "segmentation", "semantic_mask")
AUDIO = ("audio", "sound", "recording", "wav")
CLOUD = ("cloud", "point_cloud", "points")

#: what is looked for and what is to be near it, as data sets call them
NEAR = (("anchor", "positive"), ("query", "positive"), ("query", "passage"), ("query", "document"))
#: two texts whose nearness has a number
SCORED = (("sentence1", "sentence2", "score"), ("text1", "text2", "score"),
          ("sentence1", "sentence2", "similarity_score"))

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
         "function_call": "assistant", "observation": "tool"}


def assign(table: Table, flags: Roles) -> Roles:
    """The parts columns play, from their names; flags go before guesses."""
    names = list(table.columns)
    answers = {"chosen", "rejected"} <= set(names) and flags.completion is None
    if (flags.prompt is None) != (flags.completion is None) and not answers:
        raise DataError("prompt= and completion= name two columns that belong together; give both")
    for flag in ("text", "label", "image", "audio", "prompt", "completion"):
        given = getattr(flags, flag)
        if given is None or given in names:
            continue
        if flag == "label" and "," in given:              # several columns by name
            continue
        raise DataError(f"{flag}={given!r} is no column of the data; it has "
                        f"{', '.join(names)}{nearest(given, names)}")
    found = flags.task or _task(table, flags)
    if found in ("instruction-tuning", *SINGLE):
        form = "completion" if flags.prompt else _form(names, found)
        return replace(flags, task=found, form=form)
    if found == "question-answering":
        return replace(flags, task=found, form=_questions(names))
    if found == "unpaired-preference-tuning":
        return _marks(names, flags)
    if found == "preference-tuning":
        return replace(flags, task=found, form=_preferences(names))
    if found == "token-classification":
        return _words(table, flags)
    if found == "embedding":
        return _near(names, flags)
    if spoken(found):
        return _spoken(names, replace(flags, task=found))
    if found == "object-detection":
        return _detected(table, flags)
    if captioned(found):
        return _captioned(names, replace(flags, task=found))
    if found == "semantic-segmentation" or drawn_by_text(found):
        return _scenes(table, replace(flags, task=found))
    if in_time(found):
        time, of, _ = series.parts(table)
        return replace(flags, task=found, label=None, time=time, series=of,
                       channels=series.channels(table, flags.label))
    if generated(found):
        return _generated(names, replace(flags, task=found))
    if graphed(found):
        return _graphs(names, replace(flags, task=found))
    image = audio = label = text = pair = cloud = None
    labelled = form_of_label(found) is not None
    if pictured(found):
        image = flags.image or _first(names, IMAGE)
        if image is None:
            raise DataError(f"no column holds pictures; the data has {', '.join(names)}; name it "
                            "with image=")
    elif heard(found):
        audio = flags.audio or _first(names, AUDIO)
        if audio is None:
            raise DataError(f"no column holds sounds; the data has {', '.join(names)}; name it "
                            "with audio=")
    elif cloudy(found):
        cloud = _first(names, CLOUD)
        if cloud is None:
            raise DataError(f"no column holds clouds of points; the data has {', '.join(names)}; "
                            "call it file_name, or cloud")
    else:
        known = flags.label or label_of(names)
        told = bool(flags.task or flags.label)
        text = flags.text or _text(table, known if labelled else None, told)
        pair = PAIR.get(text) if PAIR.get(text) in names else None
    if labelled:
        label = flags.label or label_of(names)
        if label is None:
            raise DataError(f"cannot tell which column holds the label; the data has "
                            f"{', '.join(names)}; name it with label=")
    return Roles(found, text, label, image, audio, cloud, pair=pair)


def _task(table: Table, flags: Roles) -> str:
    """What the columns say. Raises AmbiguousError where they leave a choice."""
    names = list(table.columns)
    if flags.prompt and not flags.completion:
        return "preference-tuning"
    if flags.prompt:
        return "instruction-tuning"
    if not (flags.text or flags.label or flags.image or flags.audio) and series.recognised(table):
        return "time-series-forecasting"
    label = flags.label or label_of(names)
    if graphs.recognised(names) and not flags.text:
        return f"graph-{_learnt(table, label)}"
    if not flags.text and not flags.label:
        if _preferences(names, ask=True):
            return "preference-tuning"
        if form := _form(names):
            if form == "completion" and label is not None:
                if marked(table.columns[label]):
                    return "unpaired-preference-tuning"
                raise ambiguous(table)                      # marked otherwise, perhaps
            return "instruction-tuning"
        if _questions(names, ask=True):
            return "question-answering"
        if _pairs(names) is not None and label is None:
            return "embedding"
    if tagged(table, flags.text, flags.label):
        return "token-classification"
    if flags.image or _first(names, IMAGE):
        if _mask(table, flags) is not None:
            named = flags.text or not flags.label and _first(names, PHRASE)
            return "text-segmentation" if named else "semantic-segmentation"
        if not (flags.label or flags.text) and _objects(table) is not None:
            return "object-detection"
        if not flags.label and (flags.text or label is None and _first(names, CAPTION)):
            return "image-text-contrastive"
        return f"image-{_learnt(table, label)}"
    if _clouds(table):
        return f"cloud-{_learnt(table, label)}"
    if flags.audio or _first(names, AUDIO):
        said = flags.text or _first(names, SPOKEN)
        if said and label and not (flags.text or flags.label):
            raise heard_or_written(table, label, said)
        if said and not flags.label:
            return "speech-recognition"
        return f"audio-{_learnt(table, label)}"
    if flags.label or (label is not None and not _prose(table, label)):
        return f"text-{_learnt(table, label)}"
    text = flags.text or (texts(table) or [None])[0]
    others = [n for n in names if n != text and not aside(n)]
    if text is not None and (not others or (text.lower() == "text" and others == ["title"])):
        return "language-modelling"
    raise ambiguous(table)


def _learnt(table: Table, label: str | None) -> str:
    """What a label's values are: a class, several of them, or a quantity."""
    if label is None:
        return "classification"                            # said to be missing where it is read
    if label not in table.columns:
        return "multi-label"
    seen = [v for v in table.columns[label] if v is not None]
    if seen and all(isinstance(v, list | tuple) for v in seen):
        return "multi-label"
    return "regression" if quantities(seen) else "classification"


def _clouds(table: Table) -> bool:
    """Is there a column of files of points?"""
    from .media import CLOUD as MEDIUM

    name = _first(list(table.columns), CLOUD)
    seen = next((v for v in table.columns[name] if v is not None), None) if name else None
    return isinstance(seen, str) and MEDIUM.is_one(seen)


def _graphs(names: list[str], flags: Roles) -> Roles:
    """Which column holds edges, which the nodes, and which what is learnt."""
    label = flags.label or label_of(names)
    if not graphs.recognised(names) or label is None:
        raise DataError(f"a graph is read from edge_index, node_feat (or x) and y; the data has "
                        f"{', '.join(names)}" + ("; name what is learnt with label="
                                                 if label is None else ""))
    return replace(flags, edges=graphs.EDGES, nodes=graphs.node_column(names), label=label,
                   text=None)


def _spoken(names: list[str], flags: Roles) -> Roles:
    """Which column holds recordings, and which what is said in them."""
    audio, text = flags.audio or _first(names, AUDIO), flags.text or _first(names, SPOKEN)
    if audio is None or text is None:
        raise DataError(f"{flags.task} reads recordings and what is said in them; the data has "
                        f"{', '.join(names)}; name them with audio= and text=")
    return replace(flags, audio=audio, text=text, label=None)


def _objects(table: Table) -> str | None:
    """The column of boxes with their classes."""
    for name, values in table.columns.items():
        seen = next((v for v in values if v), None)
        first = seen[0] if isinstance(seen, list) else seen
        if isinstance(first, dict) and "bbox" in first:
            return name
    return None


def _detected(table: Table, flags: Roles) -> Roles:
    """Which column holds pictures, and which the objects on them."""
    names = list(table.columns)
    image = flags.image or _first(names, IMAGE)
    boxes = flags.label or _objects(table)
    if image is None or boxes is None:
        raise DataError("object detection reads pictures and their objects (bbox and category); "
                        f"the data has {', '.join(names)}; name them with image= and label=")
    return replace(flags, task="object-detection", image=image, objects=boxes, label=None)


def _captioned(names: list[str], flags: Roles) -> Roles:
    """Which column holds pictures, and which what is on them."""
    image, text = flags.image or _first(names, IMAGE), flags.text or _first(names, CAPTION)
    if image is None or text is None:
        raise DataError(f"{flags.task} reads pictures and a text for each; the data has "
                        f"{', '.join(names)}; name them with image= and text=")
    return replace(flags, image=image, text=text, label=None)


def _generated(names: list[str], flags: Roles) -> Roles:
    """Which column holds pictures, and which the class or the text of each, if any."""
    image = flags.image or _first(names, IMAGE)
    if image is None:
        raise DataError(f"no column holds pictures; the data has {', '.join(names)}; name it with "
                        "image=")
    if flags.task == "text-to-image":
        return replace(flags, image=image, label=None, text=flags.text or _first(names, PROMPT))
    return replace(flags, image=image, label=flags.label or label_of(names), text=None)


def _mask(table: Table, flags: Roles) -> str | None:
    """The column of masks: pictures, and called so or said to be the label."""
    image = flags.image or _first(list(table.columns), IMAGE)
    asked = [flags.label] if flags.label else [*MASK, "label", "labels"]
    lower = {n.lower(): n for n in reversed(list(table.columns)) if n != image}
    found = (lower.get(str(n).lower()) for n in asked)
    return next((n for n in found if n is not None and pictures(table.columns[n])), None)


def _scenes(table: Table, flags: Roles) -> Roles:
    """Which column holds pictures, and which a mask for each."""
    names = list(table.columns)
    image, mask = flags.image or _first(names, IMAGE), _mask(table, flags)
    if image is None or mask is None:
        raise DataError(f"{str(flags.task).replace('-', ' ')} reads pictures and a mask for each; "
                        f"the data has {', '.join(names)}; name them with image= and label=")
    text = flags.text or _first(names, PHRASE) if drawn_by_text(flags.task) else None
    if text is None and drawn_by_text(flags.task):
        raise DataError("text segmentation reads a text that names what a mask is of; the data has "
                        f"{', '.join(names)}; name it with text=")
    return replace(flags, image=image, mask=mask, text=text, label=None)


def _words(table: Table, flags: Roles) -> Roles:
    """Which column holds the words, and which a tag for each."""
    found = tagged(table, flags.text, flags.label)
    if not found:
        raise DataError(f"token classification reads two columns of lists of one length, words and "
                        f"their tags; the data has {', '.join(table.columns)}; name them with "
                        "text= and label=")
    if len(found) > 1:
        raise ambiguous(table)
    tokens, tags = found[0]
    return Roles("token-classification", label=tags, tokens=tokens)


def _preferences(names: list[str], ask: bool = False) -> str | None:
    if {"chosen", "rejected"} <= set(names):
        return "preferences"
    if ask:
        return None
    raise DataError("preference tuning reads prompt, chosen and rejected (or chosen and rejected "
                    f"turns that begin alike); the data has {', '.join(names)}")


def marked(values: list[object]) -> bool:
    """Whether a column is of true and false and nothing else."""
    return bool(values) and all(isinstance(v, bool) or (
        isinstance(v, str) and v.strip().lower() in ("true", "false")) for v in values)


def _marks(names: list[str], flags: Roles) -> Roles:
    asked, answer = flags.prompt or "prompt", flags.completion or "completion"
    label = flags.label or label_of(names)
    if not {asked, answer} <= set(names) or label is None:
        raise DataError("unpaired preference tuning reads prompt, completion and label (true or "
                        f"false); the data has {', '.join(names)}; name two columns with prompt= "
                        "and completion=, and the third with label=")
    return replace(flags, task="unpaired-preference-tuning", form="completion", label=label)


def _pairs(names: list[str]) -> tuple[str, ...] | None:
    """Columns of texts that are near each other: two, with a third that is not where it is there,
    or with a score."""
    have = set(names)
    for pair in NEAR:
        if set(pair) <= have:
            return (*pair, *(n for n in ("negative",) if n in have))
    return next((s for s in SCORED if set(s) <= have), None)


def _near(names: list[str], flags: Roles) -> Roles:
    found = _pairs(names)
    if found is None:
        raise DataError("an embedding is learnt from anchor and positive (and negative), query and "
                        "passage, or sentence1, sentence2 and score; the data has "
                        f"{', '.join(names)}")
    scored = found in SCORED
    return replace(flags, task="embedding", text=found[0], pair=found[1],
                   label=found[2] if scored else None,
                   negative=found[2] if not scored and len(found) > 2 else None)


def _questions(names: list[str], ask: bool = False) -> str | None:
    if {"context", "question", "answers"} <= set(names):
        return "questions"
    if ask:
        return None
    raise DataError("question answering reads context, question and answers; the data has "
                    f"{', '.join(names)}")


def _prose(table: Table, name: str) -> bool:
    """A column called target may hold whole sentences: nearly all different, and not short."""
    seen = [v for v in table.columns[name] if isinstance(v, str)]
    return len(seen) > 3 and not label_like(table, name) and (
        sum(" " in v.strip() for v in seen) > len(seen) // 2)


def label_of(names: list[str]) -> str | None:
    """The column called label, or the only one of a name that labels have."""
    lower = {n.lower(): n for n in reversed(names)}
    found = [lower[w] for w in LABEL if w in lower]
    if len(found) > 1 and found[0].lower() not in ("label", "labels"):
        raise DataError(f"cannot tell which column holds the label: {' or '.join(found)}; name it "
                        "with label=")
    return found[0] if found else None


def _text(table: Table, label: str | None, told: bool) -> str:
    """The column called text, the first of a known pair, or the only one of words.

    told: somebody said what is to be learnt, so that only this column is in question.
    """
    names = list(table.columns)
    lower = {n.lower(): n for n in reversed(names)}
    if "text" in lower:
        return lower["text"]
    for first, second in PAIR.items():
        if {first, second} <= set(names):
            return first
    words = [n for n in texts(table) if n != label]
    named = [lower[w] for w in TEXT if w in lower and lower[w] != label]
    for found in (words, named):
        if len(found) == 1:
            return found[0]
    if not words and not named:
        if (numbers := tabular(table, label)) is not None:
            raise numbers
        raise DataError(f"cannot tell which column holds the text; the data has "
                        f"{', '.join(names)}; name it with text=")
    if not told:
        raise ambiguous(table)
    raise DataError(f"cannot tell which column holds the text: {' or '.join(words or named)}; name "
                    "it with text=")


def _form(names: list[str], task: str | None = None) -> str | None:
    """Which form of conversation the columns are. Raises DataError where `task` reads one and there
    is none."""
    have = set(names)
    if "messages" in have:
        return "messages"
    if "conversations" in have:
        return "conversations"
    if {"instruction", "output"} <= have:
        return "alpaca"
    if {"prompt", "completion"} <= have:
        return "completion"
    if task is None:
        return None
    raise DataError(f"{task} reads messages, conversations, instruction and output, or prompt and "
                    f"completion; the data has {', '.join(names)}; name two columns with prompt= "
                    "and completion=")


def _first(names: list[str], wanted: Iterable[str]) -> str | None:
    lower = {n.lower(): n for n in reversed(names)}
    return next((lower[w] for w in wanted if w in lower), None)
