"""Write by hand what a text says: a small pipeline that draws printed figures learns handwriting.

    pip install diffusers
    python examples/penmanship.py             # about four minutes of one core

Pre-training makes a pipeline of Stable Diffusion's kind, of a few hundred thousand parameters: an
autoencoder, and a U-Net that reads "a printed seven" through a text encoder that learns with it.
Then ``burnish fit`` shows it a few of scikit-learn's scanned figures, each with its text ("a
handwritten seven"), and trains a LoRA; diffusers loads what was exported and draws. A classifier of
other scans and other prints tells how many of the drawn figures are what the text asked for: that
figure, and in that hand.
With a pipeline and pictures of your own it is ``burnish fit --model m/pipeline --data pictures/``.
"""

from __future__ import annotations

import csv
import itertools
import tempfile
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import nn

import burnish
from burnish.fit.finished import Finished
from burnish.formats.diffusers_lora import export_diffusers
from burnish.testing.pipelines import reader, worded

FIGURES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", "printed", "handwritten", *FIGURES)
SIDE, STEPS, TOKENS = 16, 200, 6


# -- the pipeline, and what it learns first -------------------------------------------------------
def printed(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 1, SIDE, SIDE) between -1 and 1, and what they are."""
    g, rows = np.random.default_rng(seed), []
    for i in range(count):
        page = Image.new("L", (64, 64))
        ImageDraw.Draw(page).text(32 + g.uniform(-5, 5, 2), str(i % 10), 255,
                                  ImageFont.load_default(g.uniform(66, 80)), anchor="mm",
                                  stroke_width=int(g.integers(0, 3)))
        page = page.resize((SIDE, SIDE), Image.Resampling.BOX)
        rows.append(np.asarray(page, np.float32) / 127.5 - 1)
    return torch.tensor(np.stack(rows)).unsqueeze(1), [f"a printed {FIGURES[i % 10]}"
                                                       for i in range(count)]


def made() -> Any:
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return d.StableDiffusionPipeline(
        vae=d.AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 16),
            norm_num_groups=8, sample_size=SIDE, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=reader(longest=TOKENS, hidden_size=32, vocab_size=len(worded(WORDS))),
        tokenizer=worded(WORDS, TOKENS),
        unet=d.UNet2DConditionModel(
            sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1,
            norm_num_groups=8, block_out_channels=(32, 64), attention_head_dim=8,
            cross_attention_dim=32, **levels),
        scheduler=d.DDIMScheduler(
            num_train_timesteps=STEPS, beta_start=1e-3, beta_end=0.06, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def batches(count: int, size: int, steps: int, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(count, (size,), generator=g) for _ in range(steps))


def coded(vae: Any, pictures: torch.Tensor, steps: int) -> None:
    """Teaches the autoencoder, and it how wide its latents are."""
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3)
    for i in batches(len(pictures), 32, steps, 0):
        there = vae.encode(pictures[i]).latent_dist
        loss = (vae.decode(there.sample()).sample - pictures[i]).square().mean() \
            + 1e-4 * there.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0                # the spread has done its work: from here on a
        vae.quant_conv.bias[4:] = -12                # picture is the middle of what it is coded as
        spread = vae.encode(pictures[:256]).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=1 / float(spread))


def taught(pipe: Any, many: int, steps: int) -> None:
    """Pre-training on printed figures: the autoencoder, then U-Net and text encoder together."""
    pictures, texts = printed(many, 0)
    # the autoencoder sees pictures of any kind, so that it is none of printed figures alone
    noise = torch.nn.functional.interpolate(torch.randn(many, 1, 5, 5), SIDE, mode="bicubic")
    coded(pipe.vae, torch.cat([pictures, noise.clamp(-1, 1)]), steps // 2)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(p).latent_dist.mean for p in pictures.split(100)])
        latents = latents * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer(["", *texts], padding="max_length", return_tensors="pt").input_ids
    learnt = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(learnt, 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for i in batches(many, 32, steps, 1):
        told = torch.where(torch.rand(len(i)) < 0.1, 0, i + 1)      # nothing, now and then
        noise, t = torch.randn_like(latents[i]), torch.randint(STEPS, (len(i),))
        said = pipe.unet(pipe.scheduler.add_noise(latents[i], noise, t), t,
                         pipe.text_encoder(ids[told])[0]).sample
        loss = nn.functional.mse_loss(said, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


# -- handwriting ----------------------------------------------------------------------------------
def scans(folder: Path, few: int) -> Path:
    """A few scanned figures, each with its text."""
    digits, lines = load_digits(), [("file_name", "text")]
    folder.mkdir()
    for i, (x, figure) in enumerate(zip(digits.images[:few], digits.target[:few], strict=True)):
        page = Image.fromarray(np.uint8(x * (255 / 16))).resize((SIDE, SIDE),
                                                                Image.Resampling.BILINEAR)
        page.save(folder / f"{i}.png")
        lines.append((f"{i}.png", f"a handwritten {FIGURES[figure]}"))
    with (folder / "metadata.csv").open("w", newline="") as f:
        csv.writer(f).writerows(lines)
    return folder


def judge() -> Any:
    """Tells figures, and whether they are written or printed (10 and more), by scans and prints
    that nothing else has learnt from."""
    digits, (prints, _) = load_digits(), printed(900, 7)
    return SVC(C=10).fit(np.concatenate([digits.data[900:] / 16, small(prints.numpy() / 2 + 0.5)]),
                         np.concatenate([digits.target[900:], np.arange(900) % 10 + 10]))


def small(pictures: np.ndarray) -> np.ndarray:
    """As the scans are: 8 x 8, in a row."""
    return pictures.reshape(-1, 8, SIDE // 8, 8, SIDE // 8).mean((2, 4)).reshape(-1, 64)


def drawn(pipe: Any, word: str, each: int, seed: int = 0) -> np.ndarray:
    """(10 each, SIDE, SIDE) from 0 to 1: `each` of every figure, in their order."""
    pipe.set_progress_bar_config(disable=True)
    asked = [f"a {word} {f}" for f, _ in itertools.product(FIGURES, range(each))]
    return pipe(asked, num_inference_steps=20, guidance_scale=2.0, output_type="np",
                generator=torch.Generator().manual_seed(seed)).images[..., 0]


def right(pictures: np.ndarray, word: str, knows: Any) -> float:
    """The share of figures that the judge takes for what was asked."""
    asked = np.repeat(np.arange(10), len(pictures) // 10) + 10 * (word == "printed")
    return float((knows.predict(small(pictures)) == asked).mean())


def main(many: int = 2000, steps: int = 800, few: int = 400, epochs: int = 12, each: int = 10,
         picture: str | None = None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        base, out, lora = (str(Path(folder, n)) for n in ("base", "out", "lora"))
        pipe = made()
        taught(pipe, many, steps)
        pipe.save_pretrained(base)
        data = str(scans(Path(folder, "scans"), few))
        run = burnish.fit(base, data, "lora(rank=16)", output=out, lr=3e-3, epochs=epochs,
                          batch_size=20, proportion_empty_prompts=0.1, quiet=True)
        export_diffusers(run.tuned, lora, base=base)
        errors = Finished.open(run.folder).evaluate(data)
        print(f"a step: {run.promise.peak_bytes:,} bytes promised, "
              f"{run.truth.peak_bytes:,} measured; {run.facts['trainable']:,} of "
              f"{run.facts['parameters']:,} parameters train")
        found = {"error": errors["tuned"]["loss"] / errors["base"]["loss"]}
        print(f"error of the noise that is told of scans held out: {found['error']:.2f} of the "
              "base's")
        knows, rows = judge(), []
        pipe = d.DiffusionPipeline.from_pretrained(base)
        for name, word in (("printed", "printed"), ("before", "handwritten"),
                           ("after", "handwritten")):
            if name == "after":
                pipe.load_lora_weights(lora)
            rows.append(drawn(pipe, word, each))
            found[name] = right(rows[-1], word, knows)
            print(f"{name:8} 'a {word} ...': {100 * found[name]:.0f} % are what was asked")
        if picture is not None:
            sheet = np.concatenate([np.concatenate(list(r[::each]), 1) for r in rows])
            Image.fromarray(np.uint8(255 * sheet)).resize(
                (sheet.shape[1] * 4, sheet.shape[0] * 4), 0).save(picture)
    return found


if __name__ == "__main__":
    import sys

    main(picture=next(iter(sys.argv[1:]), None))
