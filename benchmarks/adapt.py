"""Test-time adaptation on corrupted digits, every method beside the source (see README.md).

    python benchmarks/adapt.py [--severity 3] [--glyphs] [--out FILE]

A residual network with batch norms learns scikit-learn's scanned digits from nothing; --glyphs:
the glyph transformer that ships with the package does so too, by LoRA. Then the 899 test scans come
in nine corruptions, once shuffled and once class by class, and each method adapts from the source.
One seed; the settings are the methods' own defaults, nothing was chosen on these rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path

BATCH_NORMS = ["alpha_bn(alpha=0.0)", "alpha_bn", "alpha_bn(updates=1)", "tent(guess=True)", "tent",
               "lame"]
LAYER_NORMS = ["tent(guess=True)", "tent", "lame"]


def residual(folder: Path) -> Path:
    """A small ResNet with random weights, and how it reads pictures."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from burnish.fit.pictures import Picture

    torch.manual_seed(0)
    ResNetForImageClassification(ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
        layer_type="basic", num_labels=10)).save_pretrained(folder)
    Picture(32, 32, (0.5,), (0.5,)).save_pretrained(folder)
    return folder


def table(run: Path, how: list[str], severity: int, order: str) -> dict:
    from burnish.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(["adapt", str(run), "digits", "--corrupt", "all", "--severity", str(severity),
                     "--order", order, "--json", *(a for h in how for a in ("--how", h))])
    assert code == 0, said.getvalue()
    return json.loads(said.getvalue())


def shown(told: dict, how: list[str]) -> str:
    rows = [*told["figures"], {"corruption": "**mean**", **told["mean"]}]
    cells = [[r["corruption"], *(f"{100 * f['accuracy']:.1f}" for f in
                                 (r["before"], *(r["after"][h] for h in how)))] for r in rows]
    head = ["", "source", *(f"`{h}`" for h in how)]
    return "\n".join("| " + " | ".join(row) + " |" for row in
                     (head, ["---"] * len(head), *cells))


def main() -> None:
    import torch

    import burnish
    from burnish.core.recipe import parse
    from burnish.fit.assets import GLYPH_VIT

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--glyphs", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as top:
        nets = {"resnet": (residual(Path(top, "net")), "full", 3e-3, BATCH_NORMS),
                "glyph-vit": (GLYPH_VIT, "lora(rank=8)", 3e-3, LAYER_NORMS)}
        for name, (base, recipe, rate, how) in list(nets.items())[: 1 + asked.glyphs]:
            run = Path(top, name)
            burnish.fit(str(base), "digits", recipe, output=run, quiet=True, report=False,
                        learning_rate=rate, epochs=6, batch_size=32, seed=0)
            said = [str(parse(h)) for h in how]
            for order in ("shuffled", "class"):
                told = table(run, said, asked.severity, order)
                print(f"\n{name}, {order}, severity {asked.severity}\n\n{shown(told, said)}",
                      flush=True)
                if asked.out:
                    fact = {"model": name, "recipe": recipe, "torch": torch.__version__,
                            "machine": platform.machine(), "cores": os.cpu_count(),
                            **{k: v for k, v in told.items() if k != "source"}}
                    with asked.out.open("a") as file:
                        file.write(json.dumps(fact) + "\n")
    print(f"\n{time.perf_counter() - began:.0f} s, of a processor {time.process_time():.0f} s")


if __name__ == "__main__":
    main()
