"""Pictures of shapes with what is on them, and small models of both, drawn at random."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 60, 50), "green": (60, 180, 80), "blue": (60, 90, 220)}
SHAPES = ("disc", "box", "cross")
WORDS = ("<pad>", "<start>", "<end>", "<unk>", "a", *COLOURS, *SHAPES)
CLIP, SIGLIP, WRITES, DRAWS, BLIP, GIT = "clip", "siglip", "writes", "draws", "blip", "git"
SIDE = 24


def words() -> Any:
    """A tokenizer of the words of captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<start>",
                                   eos_token="<end>", unk_token="<unk>")


def made(kind: str, seed: int = 0, **config: Any) -> tuple[Any, Any, Any]:
    """(model, what reads its pictures, its tokenizer): two towers (CLIP, SIGLIP), an encoder of
    pictures with a decoder (WRITES, BLIP, GIT), or two towers with a decoder of masks (DRAWS:
    CLIPSeg)."""
    import torch
    import transformers as t

    from ..fit.pictures import Picture

    torch.manual_seed(seed)
    body = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48,
            "intermediate_size": 96}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = body | ids | {"vocab_size": len(WORDS), "max_position_embeddings": 8}
    seen = body | {"image_size": SIDE, "patch_size": 6}
    reads = Picture(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3), words()
    if kind == CLIP:
        return t.CLIPModel(t.CLIPConfig(
            text_config=text | {"projection_dim": 32}, vision_config=seen | {"projection_dim": 32},
            projection_dim=32, **config)), *reads
    if kind == SIGLIP:
        return t.SiglipModel(t.SiglipConfig(text_config=text | {"projection_size": 48},
                                            vision_config=seen, **config)), *reads
    if kind == DRAWS:
        small = {"extract_layers": [0, 1], "reduce_dim": 32, "decoder_num_attention_heads": 2,
                 "decoder_intermediate_size": 64, "projection_dim": 32}
        return t.CLIPSegForImageSegmentation(t.CLIPSegConfig(
            text_config=text, vision_config=seen, **(small | config))), *reads
    if kind == BLIP:
        return t.BlipForConditionalGeneration(t.BlipConfig(
            text_config=text | {"max_position_embeddings": 16, "sep_token_id": 2,
                                "encoder_hidden_size": 48} | config, vision_config=seen)), *reads
    if kind == GIT:
        return t.GitForCausalLM(t.GitConfig(**(
            text | {"vision_config": seen, "max_position_embeddings": 16,
                    "hidden_dropout_prob": 0.0} | config))), *reads
    whole = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        t.ViTConfig(**seen), t.BertConfig(**(text | {"max_position_embeddings": 16}
                                             | config)))
    whole.decoder_start_token_id, whole.pad_token_id, whole.eos_token_id = 1, 0, 2
    return t.VisionEncoderDecoderModel(whole), *reads


def named(folder: Path, each: int = 10, seed: int = 0, before: str = "a") -> Path:
    """Pictures of a red and a blue shape, each once with the name and the mask of either, `before`
    its colour: `metadata.csv` has `file_name`, `mask_file_name` and `text`; a mask is 255 there and
    else 0."""
    import numpy as np
    from PIL import Image

    g, lines = np.random.default_rng(seed), ["file_name,mask_file_name,text"]
    for kind in ("pictures", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(each):
        picture, found = np.full((SIDE, SIDE, 3), g.uniform(100, 230)), []
        for k, colour in enumerate(g.permutation(["red", "blue"]).tolist()):
            y, x = np.mgrid[:SIDE, :SIDE] - np.array([g.uniform(5, 19), 5.5 + 12 * k])[:, None,
                                                                                       None]
            shape = SHAPES[int(g.integers(2))]
            inside = np.hypot(y, x) < 5 if shape == "disc" else np.maximum(abs(y), abs(x)) < 4.5
            picture[inside] = COLOURS[colour]
            found.append((f"{before} {colour} {shape}", inside))
        picture = np.clip(picture + 10 * g.standard_normal(picture.shape), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "pictures" / f"{i}.png")
        for k, (text, inside) in enumerate(found):
            Image.fromarray((inside * 255).astype(np.uint8)).save(
                folder / "masks" / f"{i}-{k}.png")
            lines.append(f"pictures/{i}.png,masks/{i}-{k}.png,{text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def captioned(folder: Path, each: int = 10, seed: int = 0) -> Path:
    """Pictures beside a `metadata.csv` of `file_name` and `text`: "a red disc", `each` of the nine
    kinds, anywhere, in noise."""
    import numpy as np
    from PIL import Image

    g, lines = np.random.default_rng(seed), ["file_name,text"]
    folder.mkdir(parents=True)
    kinds = list(itertools.product(COLOURS, SHAPES)) * each
    for i, (colour, shape) in enumerate(kinds):
        y, x = np.mgrid[:SIDE, :SIDE] - g.uniform(9, 15, 2)[:, None, None]
        r = g.uniform(5, 8)
        inside = {"disc": np.hypot(y, x) < r, "box": np.maximum(abs(y), abs(x)) < 0.85 * r,
                  "cross": (np.minimum(abs(x), abs(y)) < 1.6) & (np.hypot(y, x) < 1.2 * r)}[shape]
        picture = np.full((SIDE, SIDE, 3), g.uniform(100, 230))
        picture[inside] = COLOURS[colour]
        picture = np.clip(picture + 10 * g.standard_normal(picture.shape), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,a {colour} {shape}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
