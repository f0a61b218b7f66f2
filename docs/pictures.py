"""Draw docs/img: a plan for a model of 8 billion parameters, and the result of `burnish demo`.

    python docs/pictures.py plan            # a few minutes, no GPU, no weights
    python docs/pictures.py result OUT      # OUT: the folder `burnish demo` wrote
    python docs/pictures.py frontier FILE   # FILE: what benchmarks/frontier.py wrote
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

import burnish

IMG = Path(__file__).with_name("img")
BUDGET, BATCH = 24e9, (4, 512)
RECIPES = ("full", "lora(rank=16)", "lora(rank=16) + checkpoint", "nf4 + lora(rank=16)",
           "nf4 + lora(rank=16) + checkpoint")
COLOURS = {"weights": "#33658a", "gradients": "#86bbd8", "optimizer": "#758e4f",
           "activations": "#f6ae2d", "temporary": "#f26419"}


def style() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.hashsalt": "burnish", "figure.dpi": 100})


def save(figure: plt.Figure, name: str) -> None:
    IMG.mkdir(exist_ok=True)
    figure.savefig(IMG / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    print(IMG / f"{name}.svg")


def llama_8b():
    """The shapes of Llama 3.1 8B."""
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                       max_position_embeddings=131072, tie_word_embeddings=False,
                       architectures=["LlamaForCausalLM"])


def plan() -> None:
    """Stacked bars of a step's peak by category, and the memory there is."""
    reports = [burnish.simulate(llama_8b(), r, BATCH, dtype="bf16") for r in RECIPES]
    figure, axes = plt.subplots(figsize=(8, 2.7))
    left = [0.0] * len(reports)
    for category, colour in COLOURS.items():
        width = [r.by_category[category] / 1e9 for r in reports]
        axes.barh(range(len(reports)), width, left=left, color=colour, label=category, height=0.62)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for k, total in enumerate(left):
        fits = "fits" if total * 1e9 <= BUDGET else "does not fit"
        axes.text(total + 0.8, k, f"{total:.1f} GB, {fits}", va="center", fontsize=9,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(BUDGET / 1e9, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.text(BUDGET / 1e9 + 0.4, -0.75, f"{BUDGET / 1e9:.0f} GB", fontsize=9)
    axes.set_yticks(range(len(reports)), RECIPES, family="monospace", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.22)
    axes.set_xlabel(f"GB at the peak of a step, Llama 3.1 8B, {BATCH[0]} x {BATCH[1]} tokens, bf16")
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.4, 1.2), frameon=False, fontsize=9)
    figure.text(0.99, -0.14, "simulated for CPU kernels, without weights; "
                f"burnish {burnish.__version__}, torch {torch.__version__}, {date.today()}",
                ha="right", fontsize=7, color="grey")
    save(figure, "plan")


def result(folder: Path) -> None:
    """Each recipe of the demo: accuracy on test, memory promised and measured."""
    done = json.loads((folder / "demo.json").read_text())
    rows = sorted(done["rows"], key=lambda r: r["accuracy"])
    names = [r["recipe"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.1), sharey=True)
    score = [100 * r["accuracy"] for r in rows]     # points: an axis need not begin at nought
    low, span = min(score), max(max(score) - min(score), 1.0)
    left.hlines(names, low - 0.2 * span, score, color="#c9d3dc", linewidth=1)
    left.plot(score, names, "o", color="#33658a", markersize=7)
    for r, at in zip(rows, score, strict=True):
        left.annotate(f"{at:.1f} % ({r['trained']:,} trained)", (at, r["recipe"]), xytext=(7, 0),
                      textcoords="offset points", va="center", fontsize=8)
    left.set(xlim=(low - 0.2 * span, low + 2.3 * span), xlabel="test accuracy, %")
    left.set_xticks([t for t in range(100) if low - 0.2 * span <= t <= max(score) + 0.3 * span])
    left.set_yticks(range(len(names)), names, family="monospace", fontsize=9)
    place = range(len(rows))
    for shift, key, label, colour in ((0.17, "simulated", "promised", "#f6ae2d"),
                                      (-0.17, "measured", "measured", "#758e4f")):
        right.barh([k + shift for k in place], [r[key] / 2**20 for r in rows], height=0.3,
                   label=label, color=colour)
    right.set_xlabel("MiB at the peak of a step")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    right.set_xlim(0, 1.35 * max(r["measured"] for r in rows) / 2**20)
    chosen = json.loads((Path(rows[-1]["folder"]) / "run.json").read_text())["environment"]
    figure.text(0.99, -0.06, f"burnish demo; burnish {burnish.__version__}, torch "
                f"{chosen['torch']}, {chosen['device']}, {date.today()}",
                ha="right", fontsize=7, color="grey")
    figure.tight_layout()
    save(figure, "result")


#: families by what a recipe's dearest word is, for colours: the first that is in it
KINDS = (("the update", ("galore", "adam8bit", "lisa", "badam", "mezo"), "#758e4f"),
         ("storage", ("nf4", "rtn"), "#86bbd8"),
         ("the tape", ("checkpoint", "coded", "lean"), "#f6ae2d"),
         ("at the side", ("lst", "unipt", "sherl"), "#f26419"),
         ("beside weights", ("houlsby", "ssf", "ia3", "prefix", "vpt"), "#a45ee5"),
         ("a part as it is", ("linear_probe", "bitfit", "norms", "full"), "#444444"),
         ("on weights", ("",), "#33658a"))


def frontier(file: Path) -> None:
    """Accuracy over the measured peak of a step, a point a recipe, and the planner's choices."""
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    rows = sorted((r for r in lines if "mean" in r), key=lambda r: (r["peak"], -r["mean"]))
    figure, axes = plt.subplots(figsize=(8, 4.6))
    edge, best = [], 0.0
    for r in rows:
        if r["mean"] > best:
            edge, best = [*edge, r], r["mean"]
    axes.step([r["peak"] / 1e6 for r in edge], [100 * r["mean"] for r in edge], where="post",
              color="#c9d3dc", zorder=0)
    for label, _, colour in KINDS:
        own = [r for r in rows if next(k for k, w, _ in KINDS if any(
            x in r["recipe"] for x in w)) == label]
        if own:
            axes.errorbar([r["peak"] / 1e6 for r in own], [100 * r["mean"] for r in own],
                          [100 * r["sd"] for r in own], fmt="o", color=colour, label=label,
                          markersize=5, elinewidth=0.6)
    for k, r in enumerate(edge):                     # above and below in turn: some are near
        axes.annotate(r["recipe"], (r["peak"] / 1e6, 100 * r["mean"]),
                      xytext=(-4, 8) if k % 2 else (4, -11), textcoords="offset points",
                      fontsize=7, family="monospace", ha="right" if k % 2 else "left")
    low = sorted(r["mean"] for r in rows)[len(rows) // 10] - 0.01
    under = [f"{r['recipe']}: {100 * r['mean']:.0f} % at {r['peak'] / 1e6:.1f} MB"
             for r in rows if r["mean"] < low]
    if under:
        axes.text(0.99, 0.02, "below: " + ", ".join(under), transform=axes.transAxes, ha="right",
                  fontsize=7, color="grey")
    high = max(r["mean"] + r["sd"] for r in rows) + 0.002
    axes.set(xscale="log", xlabel="MB at the peak of a step, measured",
             ylim=(100 * low, 100 * high), ylabel="test accuracy, %, five seeds")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.text(0.99, -0.17, f"printed figures to handwriting, {len(rows)} recipes; burnish "
                f"{burnish.__version__}, torch {torch.__version__}, {date.today()}", ha="right",
                fontsize=7, color="grey")
    save(figure, "frontier")


if __name__ == "__main__":
    style()
    if sys.argv[1:2] == ["plan"]:
        plan()
    elif sys.argv[1:2] == ["result"] and len(sys.argv) == 3:
        result(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["frontier"] and len(sys.argv) == 3:
        frontier(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
