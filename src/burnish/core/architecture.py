"""Which class a transformers config stands for.

A config that came with weights lists its architectures, and the first is meant. One that was just
made lists none; then it stands for what people train of its type: a causal language model with its
head, a sequence-to-sequence model, a classifier of pictures. Where a type is trained in several
ways (an encoder of text), nothing is guessed: the error names them.
"""

from __future__ import annotations

from typing import Any

from .errors import ConfigError, nearest
from .extras import worded
from .reading import shown

#: transformers' tables of headed classes in the order in which one settles the question, and the
#: table whose types it does not settle: a decoder made of an encoder of text is the rarer wish
_SETTLES = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", None),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", None),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", None),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING"),
    ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING", None),
    ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", None),
)
#: other heads that people train
_OTHERS = ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
           "MODEL_FOR_QUESTION_ANSWERING_MAPPING", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
           "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING",
           "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "MODEL_FOR_CTC_MAPPING",
           "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING", "MODEL_FOR_OBJECT_DETECTION_MAPPING",
           "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING")


@worded()
def architecture(config: Any) -> Any:
    """The class that `config` stands for.

    Raises ConfigError for a listed one that transformers lacks, a type that is trained in several
    ways and says not which, and a config of no model.
    """
    import transformers

    listed = list(getattr(config, "architectures", None) or [])
    if listed:
        found = getattr(transformers, str(listed[0]), None)
        if not isinstance(found, type):
            raise ConfigError(
                f"transformers {transformers.__version__} has no {shown(listed[0], 80)} (first of "
                f"the config's architectures){nearest(str(listed[0]), dir(transformers))}; pass "
                "the model itself on meta")
        return found
    for table, unless in _SETTLES:
        if _of(transformers, table, config) and not (unless and _of(transformers, unless, config)):
            return _of(transformers, table, config)[0]
    ways = list(dict.fromkeys(c for table in _OTHERS for c in _of(transformers, table, config)))
    if not ways:
        ways = _of(transformers, "MODEL_MAPPING", config)[:1]
    if len(ways) == 1:
        return ways[0]
    name = type(config).__name__
    if not ways:
        raise ConfigError(f"{name} names no architecture; set config.architectures, e.g. "
                          "['ViTForImageClassification']")
    raise ConfigError(f"{name} lists no architecture and is trained in several ways; set "
                      f"config.architectures to one of "
                      f"{', '.join(repr([c.__name__]) for c in ways)}")


def _of(transformers: Any, table: str, config: Any) -> list[Any]:
    """The classes that one of transformers' tables has for this config's type."""
    known = getattr(transformers, table, None)
    if known is None or type(config) not in known:
        return []
    found = known[type(config)]
    return list(found) if isinstance(found, tuple | list) else [found]
