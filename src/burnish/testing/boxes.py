"""A small model that tells objects in boxes, drawn at random, and pictures with objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIDE = 32


#: detectors with a backbone of convolutions, as transformers calls them
DETRS = ("Detr", "ConditionalDetr", "DeformableDetr")


def detr(kind: str = "Detr", seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """(a detector of two classes behind a small ResNet, what reads its pictures)."""
    import torch
    import transformers as t

    from ..fit.pictures import Picture

    torch.manual_seed(seed)
    back = t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                          layer_type="basic", out_features=["stage2"])
    body = {"backbone_config": back, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "num_queries": 6, "num_labels": 2, "dropout": 0.0}
    if kind == "DeformableDetr":
        body["num_feature_levels"] = 2
    made = getattr(t, f"{kind}Config")(**(body | config))
    return getattr(t, f"{kind}ForObjectDetection")(made), Picture(64, 64, (0.5,) * 3, (0.5,) * 3)


def made(seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """(YOLOS of two classes, what reads its pictures)."""
    import torch
    import transformers as t

    from ..fit.pictures import Picture

    torch.manual_seed(seed)
    body = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 96, "image_size": [SIDE, SIDE], "patch_size": 8,
            "num_detection_tokens": 4, "use_mid_position_embeddings": False, "num_labels": 2,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.15}
    return (t.YolosForObjectDetection(t.YolosConfig(**(body | config))),
            Picture(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3))


def shapes(folder: Path, each: int = 40, seed: int = 0, form: str = "coco") -> Path:
    """``images/`` and an `annotations.json` of COCO's form (or a `metadata.jsonl`): one disc or box
    or one of each, of its colour, anywhere, in noise."""
    import numpy as np
    from PIL import Image

    g = np.random.default_rng(seed)
    side = 40
    y, x = np.mgrid[:side, :side]
    told: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [
        {"id": 1, "name": "disc"}, {"id": 7, "name": "box"}]}
    rows = []
    inside = folder / "images" if form == "coco" else folder
    inside.mkdir(parents=True)
    for i in range(each):
        picture = np.full((side, side, 3), 120.0)
        boxes, kinds = [], []
        for kind in [("disc",), ("box",), ("disc", "box")][int(g.integers(3))]:
            cy, cx, r = *g.uniform(11, side - 11, 2), g.uniform(6, 10)
            far = np.hypot(y - cy, x - cx) if kind == "disc" else np.maximum(abs(y - cy),
                                                                             abs(x - cx))
            picture[far < r] = (220, 60, 60) if kind == "disc" else (60, 80, 220)
            boxes.append([round(float(v), 2) for v in (cx - r, cy - r, 2 * r, 2 * r)])
            kinds.append(kind)
        picture = np.clip(picture + 10 * g.standard_normal(picture.shape), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(inside / f"{i}.png")
        told["images"].append({"id": i, "file_name": f"{i}.png", "width": side, "height": side})
        told["annotations"] += [{"id": len(told["annotations"]) + k, "image_id": i, "bbox": box,
                                 "category_id": {"disc": 1, "box": 7}[kind], "iscrowd": 0}
                                for k, (box, kind) in enumerate(zip(boxes, kinds, strict=True))]
        rows.append({"file_name": f"{i}.png", "objects": {"bbox": boxes, "categories": kinds}})
    if form == "coco":
        (folder / "annotations.json").write_text(json.dumps(told))
    else:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
