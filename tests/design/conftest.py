"""Small random models that stand in for the hub names the documentation uses."""

from __future__ import annotations

import pytest


def vit():
    import transformers as t

    return t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, image_size=32, patch_size=8, num_labels=10,
                       architectures=["ViTForImageClassification"])


def llama():
    import transformers as t

    return t.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=64, vocab_size=128,
                         max_position_embeddings=256, architectures=["LlamaForCausalLM"])


MODELS = {"google/vit-base-patch16-224": vit, "meta-llama/Llama-3.1-8B": llama}


@pytest.fixture
def stand_ins(monkeypatch):
    """A function that gives every hub name in MODELS a tiny model in a folder.

    It returns the names a page takes for granted: some batches of tokens.
    """
    import torch
    import transformers

    def install(folder):
        places = {}
        for name, make in MODELS.items():
            config = make()
            place = folder / name
            getattr(transformers, config.architectures[0])(config).save_pretrained(place)
            places[name] = str(place)
        for auto in (transformers.AutoConfig, transformers.AutoModelForImageClassification,
                     transformers.AutoModelForCausalLM):
            real = auto.from_pretrained.__func__

            def local(cls, name, *args, _real=real, **kw):
                return _real(cls, places.get(str(name), name), *args, **kw)

            monkeypatch.setattr(auto, "from_pretrained", classmethod(local))
        ids = torch.randint(1, 128, (2, 4, 16))
        return {"batches": [{"input_ids": i, "labels": i} for i in ids]}

    return install
