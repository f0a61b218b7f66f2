"""Where a model and what reads its data lie, and what a model can be trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import ConfigError, nearest
from ..core.reading import beside, reading
from ..formats.hub import local, near
from ..formats.model_files import loading, unfound
from .autos import auto_of
from .data import Data
from .kinds import (
    DETECTORS,
    FORECASTERS,
    INSTEAD,
    KINDS,
    TOWERS,
    WRITERS,
    captioned,
    cloudy,
    drawn_by_text,
    foreign_models,
    generated,
    heard,
    in_time,
    pictured,
    spoken,
)
from .pipelines import READS, Pipeline, is_pipeline, tasks_of


def check_there(name: str) -> Path:
    """The path of `name`; raises ConfigError where it can only be a path and nothing is there."""
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"there is no model at {path}{nearest(path.name, beside(path))}")
    return path


def check_local(name: str) -> None:
    """A folder without a config is no model; say so before a library asks the network."""
    path = check_there(name)
    if path.is_file():
        raise ConfigError(f"{path} is a file; expected a model folder or a name on the hub")
    if path.is_dir() and not is_pipeline(path) and not (path / "config.json").exists():
        has = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise ConfigError(f"{path} is no model folder: it lacks config.json (it holds {has})")


def processor_for(task: str, model: str | nn.Module, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor or feature extractor that lies with `model`: a folder, a name
    or a module."""
    from .pictures import processor_of

    if in_time(task) or foreign_models(task):       # they are read as they stand
        return None
    if generated(task):
        if not is_pipeline(model):
            raise ConfigError(f"{task} takes the folder of a pipeline of diffusers, with a "
                              "model_index.json")
        return Pipeline(str(model))
    if captioned(task) or drawn_by_text(task):
        from .captioned import Captioned

        return Captioned(processor_of(model, trust_remote_code),
                         processor_for("text", model, trust_remote_code))
    if pictured(task) or task == "object-detection":
        return processor_of(model, trust_remote_code)
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if spoken(task):
        from .alphabet import with_tokenizer

        return with_tokenizer(_prepares(name, "AutoFeatureExtractor", "feature extractor",
                                        trust_remote_code), name, trust_remote_code)
    if heard(task):
        return _prepares(name, "AutoFeatureExtractor", "feature extractor", trust_remote_code)
    if task == "semantic-segmentation":       # on every machine the same, whatever is installed
        return _prepares(name, "AutoImageProcessor", "image processor", trust_remote_code,
                         backend="pil")
    if not name:
        raise ConfigError("a text task needs a tokenizer: give the model by folder or name, or "
                          "processor=")
    import transformers

    with reading(f"the tokenizer of {name}", ConfigError, "give processor="):
        how = {"trust_remote_code": trust_remote_code}
        where = local(name, code=trust_remote_code)
        try:
            found = transformers.AutoTokenizer.from_pretrained(where, **how)
            if task == "token-classification" and getattr(found, "add_prefix_space", None) is False:
                found = transformers.AutoTokenizer.from_pretrained(where, add_prefix_space=True,
                                                                   **how)
            found.name_or_path = name
            return found
        except (OSError, ValueError) as e:
            raise ConfigError(f"no tokenizer could be loaded from {name}: {unfound(name, e)}"
                              f"{near(name) or '; give processor='}") from None


def _prepares(name: str, auto: str, what: str, trust_remote_code: bool, **how: Any) -> Any:
    """What transformers prepares pictures or sounds with for a model."""
    import transformers

    if not name:
        raise ConfigError(f"this task needs the model's {what}: give the model by folder or name, "
                          "or processor=")
    with reading(f"the {what} of {name}", ConfigError, "give processor="):
        try:
            return getattr(transformers, auto).from_pretrained(
                local(name, code=trust_remote_code), trust_remote_code=trust_remote_code, **how)
        except (OSError, ValueError) as e:
            raise ConfigError(f"no {what} could be loaded from {name}: "
                              f"{unfound(name, e)}{near(name) or '; give processor='}") from None


#: an encoder under this head would read the token it is to foretell
_BOTH_WAYS = "AutoModelForMaskedLM"


def suited(data: Data, model: str | nn.Module, trust_remote_code: bool = False) -> Data:
    """`data` as the model can learn it: an encoder fills gaps in texts that a decoder would go on
    with, an encoder-decoder answers prompts. Where somebody has said the task it stays, and masks
    of a text that somebody has named."""
    if data.reading.get("task") is not None or data.task not in INSTEAD:
        return data
    if drawn_by_text(data.task) and data.reading.get("text") is not None:
        return data
    if is_pipeline(model):
        return data
    config = config_of(model, data.task, trust_remote_code)
    named = isinstance(model, str)
    if config is None or _unserved(data.task, config, named) is None:
        return data
    instead = next((t for t in INSTEAD[data.task] if _unserved(t, config, named) is None), None)
    return data if instead is None else data.as_task(instead)


def config_of(model: str | nn.Module, task: str, trust_remote_code: bool) -> Any:
    """The model's configuration, None where it is no model of transformers."""
    import transformers

    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        return config if isinstance(config, transformers.PretrainedConfig) else None
    with loading(model, "the configuration of", code=trust_remote_code) as where:
        try:
            return transformers.AutoConfig.from_pretrained(
                where, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"{model} cannot be loaded for {task}: {unfound(model, e)}"
                              f"{near(model)}") from None


def check_served(task: str, model: str | nn.Module, trust_remote_code: bool = False) -> None:
    """Raises ConfigError, with what the model could be trained for, where `task` is not for it."""
    if is_pipeline(model):
        if task not in tasks_of(model):
            part, served = Pipeline(str(model)).part, " or ".join(tasks_of(model))
            raise ConfigError(f"{model} is a pipeline of diffusers with a {part}, and {task} is "
                              "not for it; "
                              + (f"fit can train it for {served}" if served else
                                 "fit serves no task of it yet"
                                 + (f" (of pipelines that read texts: {', '.join(READS)})"
                                    if Pipeline(str(model)).reads_texts else "")))
        return
    config = config_of(model, task, trust_remote_code)
    if config is None:
        return
    named = isinstance(model, str)
    reason = _unserved(task, config, by_name=named)
    if reason is None:
        return
    fits = [t for t in KINDS if t != task and _unserved(t, config, by_name=True) is None]
    name = model if named else type(model).__name__
    served = " or ".join(filter(None, [", ".join(fits[:-1]), *fits[-1:]]))
    tail = f"fit can train it for {served}" if fits else "fit serves no task of it yet"
    raise ConfigError(f"{name} is {config.model_type}, {reason}; {tail}")


def _causal(config: Any) -> bool:
    """Does the model read one way only?"""
    import transformers

    one_way = type(config) in transformers.AutoModelForCausalLM._model_mapping
    both = type(config) in getattr(transformers, _BOTH_WAYS)._model_mapping
    return one_way and not both and not getattr(config, "is_encoder_decoder", False)


def _hears(config: Any) -> bool:
    import transformers

    return any(type(config) in getattr(transformers, auto)._model_mapping
               for auto in ("AutoModelForAudioClassification", "AutoModelForCTC"))


def _unserved(task: str, config: Any, by_name: bool) -> str | None:
    import transformers

    if generated(task):
        return f"no pipeline of diffusers, and {task} is for those"
    auto = KINDS[task].auto
    own = getattr(config, "auto_map", None) or {}
    if auto in own:
        return None
    if foreign_models(task):
        what = "clouds of points" if cloudy(task) else "graphs"
        return None if not by_name else (
            f"a model of transformers, which has none of {what}; {task} takes a folder whose code "
            "comes with it (AutoModel in auto_map, and trust_remote_code=True) or, in Python, a "
            "module")
    if task in ("language-modelling", "instruction-tuning"):
        if getattr(config, "is_encoder_decoder", False):
            return f"an encoder-decoder, and {task} is served for decoders"
        both = type(config) in getattr(transformers, _BOTH_WAYS)._model_mapping
        if both and not getattr(config, "is_decoder", False):
            return f"an encoder that reads in both directions, and {task} is served for decoders"
    if task == "question-answering" and _causal(config):
        return (f"a decoder, in which the context does not see the question, and {task} is for "
                "encoders")
    if task == "embedding" and (getattr(config, "is_encoder_decoder", False)
                                or not hasattr(config, "vocab_size") or _hears(config)):
        return f"no encoder or decoder of text, and {task} is for those"
    if task == "image-text-contrastive" and config.model_type not in TOWERS:
        return f"no pair of towers such as CLIP or SigLIP, and {task} is for those"
    if task == "image-captioning" and config.model_type not in WRITERS:
        return (f"no encoder of pictures with a decoder of text, BLIP or GIT, and {task} is for "
                "those")
    if drawn_by_text(task) and config.model_type != "clipseg":
        return ("no model that draws the mask of what a text names (CLIPSeg), and "
                f"{task} is for those")
    if task == "object-detection" and config.model_type not in DETECTORS:
        return f"no model that tells boxes as YOLOS and DETR do, and {task} is for those"
    if in_time(task) and config.model_type not in FORECASTERS:
        return f"no forecaster such as PatchTST or PatchTSMixer, and {task} is for those"
    both = getattr(config, "is_encoder_decoder", False)
    if task == "speech-recognition" and both:
        return f"an encoder-decoder, and {task} is served for models with a CTC head"
    if task in ("sequence-to-sequence", "speech-to-text") and not both:
        return f"no encoder-decoder, and {task} is for those"
    if task == "masked-instruction-tuning" and both:
        return f"an encoder-decoder, and {task} is for encoders"
    if by_name and type(config) not in auto_of(task)._model_mapping:
        return f"for which transformers has no model for {task}"
    return None
