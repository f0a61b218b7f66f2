"""Small models of sound, drawn at random, with the feature extractors that belong to them, and
recordings of tones that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAV2VEC2, AST, WHISPER, CTC, WRITES = "wav2vec2", "ast", "whisper", "ctc", "writes"
KINDS = (WAV2VEC2, AST, WHISPER)

_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64}


_CONVOLVED = {"conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4),
              "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
              "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
_STEADY = {f"{k}_dropout": 0.0 for k in ("hidden", "attention", "activation", "final", "feat_proj")
           } | {"apply_spec_augment": False, "layerdrop": 0.0}


def made(kind: str, seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """(model with a head of two classes, or one that spells (CTC), or writes (WRITES: Whisper with
    its decoder), its feature extractor)."""
    import torch
    import transformers as t

    torch.manual_seed(seed)
    if kind in (WAV2VEC2, CTC):
        if kind == CTC:                              # fewer frames, and nothing left to chance
            config = _STEADY | {"conv_stride": (16, 10, 2), "conv_kernel": (32, 20, 4)} | config
        of = t.Wav2Vec2ForCTC if kind == CTC else t.Wav2Vec2ForSequenceClassification
        return (of(t.Wav2Vec2Config(**(_BODY | _CONVOLVED | config))),
                t.Wav2Vec2FeatureExtractor(return_attention_mask=True))
    if kind == AST:
        seen = {"max_length": 64, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8,
                "time_stride": 8}
        return (t.ASTForAudioClassification(t.ASTConfig(**(_BODY | seen | config))),
                t.ASTFeatureExtractor(num_mel_bins=16, max_length=64))
    heard = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "num_mel_bins": 16, "max_source_positions": 50, "classifier_proj_size": 16,
             "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "decoder_start_token_id": 1}
    if kind == WRITES:
        config = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
                  "decoder_start_token_id": 1, "max_target_positions": 24} | config
        return (t.WhisperForConditionalGeneration(t.WhisperConfig(**(heard | config))),
                t.WhisperFeatureExtractor(feature_size=16, chunk_length=1))
    return (t.WhisperForAudioClassification(t.WhisperConfig(**(heard | config))),
            t.WhisperFeatureExtractor(feature_size=16, chunk_length=1))


def letters() -> Any:
    """Whisper's tokenizer with three letters and a blank."""
    import transformers as t

    marks = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|transcribe|>",
             "<|translate|>", "<|notimestamps|>")
    made = t.WhisperTokenizer(vocab={w: i for i, w in enumerate((*marks, "Ġ", "a", "b", "c"))},
                              merges=[])
    made.add_special_tokens({"additional_special_tokens": list(marks[1:]),
                             "pad_token": marks[0]})
    return made


def tones(folder: Path, each: int = 30, seed: int = 0, rate: int = 8000) -> Path:
    """A folder of three classes, each an octave above the one before: tones of unlike length,
    phase and pitch in noise, as 16-bit WAV."""
    import numpy as np
    from scipy.io import wavfile

    g = np.random.default_rng(seed)
    for name, pitch in (("low", 220), ("middle", 440), ("high", 880)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            t = np.arange(int(rate * g.uniform(0.25, 0.5))) / rate
            x = 0.4 * np.sin(2 * np.pi * pitch * g.uniform(0.9, 1.1) * t + g.uniform(0, 6))
            x = np.clip(x + 0.05 * g.standard_normal(len(t)), -1, 1)
            wavfile.write(folder / name / f"{i}.wav", rate, np.int16(32767 * x))
    return folder


def spelt(folder: Path, each: int = 100, seed: int = 0, rate: int = 16000,
          among: Sequence[str] = ()) -> Path:
    """Recordings beside a `metadata.csv` of what is said: a letter is a tone of its own, a space a
    rest; letters are of unlike length, in noise. among: texts that are said, instead of any."""
    import numpy as np
    from scipy.io import wavfile

    g = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = ["file_name,transcription"]
    for i in range(each):
        words = ["".join(g.choice(list("abc"), g.integers(1, 4))) for _ in range(g.integers(1, 3))]
        text = str(g.choice(list(among))) if among else " ".join(words)
        parts = []
        for letter in text:
            t = np.arange(int(rate * g.uniform(0.05, 0.08))) / rate
            pitch = {" ": 0, "a": 300, "b": 800, "c": 2000}[letter]
            parts += [0.4 * np.sin(2 * np.pi * pitch * t), np.zeros(int(rate * 0.02))]
        x = np.concatenate(parts)
        x = np.clip(x + 0.01 * g.standard_normal(len(x)), -1, 1)
        wavfile.write(folder / f"{i}.wav", rate, np.int16(32767 * x))
        lines.append(f"{i}.wav,{text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
