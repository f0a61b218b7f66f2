"""Named combinations of the literature. A preset is one line that expands to an expression."""

PRESETS: dict[str, str] = {
    # QLoRA (2023): 4-bit frozen weights, LoRA on every linear
    "qlora": "nf4 + lora(rank=64, alpha=16, dropout=0.05)",
    # Quantized Side Tuning (2024): a ladder beside a 4-bit backbone
    "qst": "nf4 + lst(reduction=16)",
    # MAM adapter (2022): prefix in attention, scaled parallel adapter on the feed-forward part
    "mam": "prefix(length=30) + parallel(bottleneck=512, scale=4.0)",
}
