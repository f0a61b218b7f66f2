"""What several recipes would cost, before any weight is loaded.

    python examples/before.py
"""

from __future__ import annotations

from transformers import ViTConfig

import burnish
from burnish.memory import format_bytes

RECIPES = ("full", "bitfit", "lora(rank=8)", "lora(rank=8) + checkpoint", "nf4 + snella(rank=8)")


def main(batch: int = 32) -> dict[str, int]:
    config = ViTConfig(num_labels=100, architectures=["ViTForImageClassification"])   # ViT-B/16
    peaks = {}
    for recipe in RECIPES:
        report = burnish.simulate(config, recipe, batch)
        peaks[recipe] = report.peak_bytes
        print(f"{recipe:<28} {format_bytes(report.peak_bytes):>10} at the peak, "
              f"{report.trainable:>11,} trainable, reached in {report.peak_at[0]}")
    return peaks


if __name__ == "__main__":
    main()
