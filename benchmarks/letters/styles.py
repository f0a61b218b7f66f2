"""Letter C once more: styles of pictures that come one after the other, and a denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one

STYLES = ("negative", "hollow", "striped")
#: steps of the noise, pictures and updates of a style, pictures of an update, a side
STEPS, FEW, UPDATES, BATCH, SIDE = 100, 60, 120, 20, 12
LORA = "lora(rank=4) + trainable_tokens(ids=(1, 2, 3))"
MUSEUM = "museum_maker"
TABLE = "three styles of printed figures"
#: what the method is made of, by leaving the rest out
ALONE = ("museum_maker(weight=0, feature=0)", "museum_maker(style=0, feature=0)",
         "museum_maker(style=0, weight=0)")


def drawn(style: str, count: int, seed: int) -> Any:
    """(count, 1, SIDE, SIDE) between -1 and 1: printed figures from 0 to 9, shifted, in a style."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    g, rows = np.random.default_rng(seed), []
    for _ in range(count):
        page = Image.new("L", (4 * SIDE, 4 * SIDE))
        pen, at = ImageDraw.Draw(page), tuple(g.uniform(SIDE, 1.6 * SIDE, 2))
        font, figure = ImageFont.load_default(g.uniform(26, 34)), str(g.integers(10))
        if style == "hollow":
            pen.text(at, figure, 255, font, stroke_width=3)
        pen.text(at, figure, 0 if style == "hollow" else 255, font)
        x = np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 127.5 - 1
        if style == "striped":
            x = np.where(np.arange(SIDE)[:, None] % 3 == 0, 0.6, x)
        rows.append(-x if style == "negative" else x)
    return torch.tensor(np.stack(rows), dtype=torch.float32).unsqueeze(1)


def noised(pictures: Any, kind: int, times: int, seed: int) -> Iterator[Any]:
    """Batches without end but for `times`: what the model is given, and the noise it is to tell."""
    import torch
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(num_train_timesteps=STEPS)
    g = torch.Generator().manual_seed(seed)
    for _ in range(times):
        x = pictures[torch.randperm(len(pictures), generator=g)[:BATCH]]
        noise, t = torch.randn(x.shape, generator=g), torch.randint(STEPS, (len(x),), generator=g)
        yield ({"hidden_states": schedule.add_noise(x, noise, t), "timestep": t,
                "class_labels": torch.full((len(x),), kind),
                "signal": schedule.alphas_cumprod[t]}, noise)


def loss(out: Any, batch: Any) -> Any:
    return (out.sample - batch[1]).square().mean()


def pretrained() -> Any:
    """A diffusion transformer that draws plain figures, its class 0."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=3,
        sample_size=SIDE, patch_size=2, num_embeds_ada_norm=4, norm_num_groups=1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for given, noise in noised(drawn("plain", 2000, 0), 0, 500, 0):
        given.pop("signal")
        optimizer.zero_grad()
        loss(model(**given), (given, noise)).backward()
        optimizer.step()
    return model.eval()


class Judge:
    """Mean squared error of the noise on pictures that nobody has learnt, over that of no guess."""

    def __init__(self) -> None:
        import torch

        self.looks = {}
        for kind, style in enumerate(("plain", *STYLES)):
            many = list(noised(drawn(style, 300, 100 + kind), kind, 15, 200 + kind))
            given = {k: torch.cat([b[0][k] for b in many]) for k in many[0][0] if k != "signal"}
            self.looks[style] = given, torch.cat([b[1] for b in many])

    def __call__(self, model: Any) -> dict[str, float]:
        import torch

        model.eval()
        with torch.no_grad():
            return {s: round(float((model(**given).sample - noise).square().mean()
                                   / noise.square().mean()), 4)
                    for s, (given, noise) in self.looks.items()}


def data(style: str) -> Any:
    kind = 1 + STYLES.index(style)
    return noised(drawn(style, FEW, kind), kind, UPDATES, 10 + kind)


def rows() -> Iterator[Row]:
    import warnings

    warnings.simplefilter("ignore")
    base, judge = pretrained(), Judge()
    yield {"table": TABLE, "how": "*as it was pre-trained*", "end": judge(base)}
    for how, run in {f"{LORA}, sequential": sequential, f"{LORA}, joint": joint,
                     f"{LORA}, one a style": apart}.items():
        yield {"table": TABLE, "how": how, **run(copy.deepcopy(base), judge)}
    for part in (MUSEUM, *ALONE):
        yield {"table": TABLE, "how": f"{LORA} + {part}", **museum(copy.deepcopy(base), judge,
                                                                   part)}


def stepped(tuned: Any, batches: Any) -> None:
    tuned.optimizer(lr=3e-3)
    tuned.model.train()
    for b in batches:
        tuned.step(b, loss)


def told(tuned: Any, own: dict[str, float], end: dict[str, float]) -> Row:
    """Figures of a run: each style right after it was learnt, and all at the end."""
    lost = [end[s] - own[s] for s in STYLES[:-1] if s in own]
    return {"own": own, "end": end, "trained": sum(p.numel() for p in tuned.parameters()),
            "forgetting": round(sum(lost) / len(lost), 4) if lost else None,
            "mean": round(sum(end[s] for s in STYLES) / len(STYLES), 4)}


def tune(model: Any, recipe: str, name: str = "default") -> Any:
    import burnish

    return burnish.tune(model, recipe, head=False, name=name)


def sequential(model: Any, judge: Judge) -> Row:
    tuned, own = tune(model, LORA), {}
    for style in STYLES:
        stepped(tuned, bare(data(style)))
        own[style] = judge(model)[style]
    return told(tuned, own, judge(model))


def joint(model: Any, judge: Judge) -> Row:
    tuned = tune(model, LORA)
    stepped(tuned, bare(b for three in zip(*map(data, STYLES), strict=True) for b in three))
    return told(tuned, {}, judge(model))


def apart(model: Any, judge: Judge) -> Row:
    tuned, own = tune(model, LORA, STYLES[0]), {}
    for style in STYLES:
        if style not in tuned.adapters:
            tuned.add(style, LORA, seed=len(tuned.adapters))
        tuned.use(style)
        stepped(tuned, bare(data(style)))
        own[style] = judge(model)[style]
    return told(tuned, own, {**judge(model), **own, "plain": judge_base(tuned, judge)})


def judge_base(tuned: Any, judge: Judge) -> float:
    with tuned.disabled():
        return judge(tuned.model)["plain"]


def museum(model: Any, judge: Judge, part: str) -> Row:
    tuned, own = tune(model, f"{LORA} + {part}", STYLES[0]), {}
    stages = tuned.recipe.named("museum_maker").stages(tuned, STYLES)
    for stage, n, _ in tuned.run(stages, lambda s: data(s.data), loss, lr=3e-3):
        if n == UPDATES - 1:                         # a stage is over before the next begins
            own[stage.data] = judge(model)[stage.data]
            model.train()
    return told(tuned, own, judge(model))


def bare(batches: Any) -> Iterator[Any]:
    """Without what only `museum_maker` reads."""
    for given, noise in batches:
        yield {k: v for k, v in given.items() if k != "signal"}, noise


def belongs(cls: type) -> bool:
    """What its source says: it is of styles that come one after the other."""
    return "Continual Style" in getattr(cls, "paper", "")


def less(how: str, than: str, of: Callable[[Row], float]) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        a, b = (of(one(rows, h)) for h in (how, than))
        return a < b, f"{a:.3f} beside {b:.3f}"

    return found


def forgotten(row: Row) -> float:
    return float(row["forgetting"])


def ended(row: Row) -> float:
    return float(row["mean"])


def learnt(row: Row) -> float:
    return sum(row["own"].values()) / len(row["own"])


def lost(rows: Rows) -> tuple[bool, str]:
    row = one(rows, SEQUENTIAL)
    return row["forgetting"] > 0.1, f"an error more of {row['forgetting']:.3f}"


def of(where: str, style: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        found: Mapping[str, float] = row.get(where, {})
        return f"{found[style]:.3f}" if style in found else ""

    return show


SEQUENTIAL, JOINT, APART = (f"{LORA}, {how}" for how in ("sequential", "joint", "one a style"))
WHOLE, STYLE, WEIGHT, FEATURE = (f"{LORA} + {part}" for part in (MUSEUM, *ALONE))
LETTER = Letter(
    title="Styles that come one after the other",
    words=f"""
A diffusion transformer of three blocks that draws plain printed figures learns to draw them
{", ".join(STYLES[:-1])} and {STYLES[-1]}, a style after the other: {FEW} pictures of each,
{UPDATES} updates of {BATCH} pictures, and a class of the model's as the token of a style. Errors
are mean squared errors of the noise that is told, on pictures that nobody has learnt, over those
of a guess of none: lower is better, and 1 is nothing. *own*: of a style right after it was learnt;
*end*: after the last; *forgetting*: end less own, over all styles but the last. `joint` has all
pictures at once, `one a style` an adapter for each, used by its name. One rate for all rows, one
seed.""",
    belongs=belongs, rows=rows,
    columns={**{f"own {s}": of("own", s) for s in STYLES},
             **{f"end {s}": of("end", s) for s in ("plain", *STYLES)},
             "mean of styles": number("mean", "{:.3f}"),
             "forgetting": number("forgetting", "{:+.3f}"), "trained": number("trained")},
    claims=(
        Claim("One LoRA for a sequence of styles forgets them", lost),
        Claim("MuseumMaker forgets less", less(WHOLE, SEQUENTIAL, forgotten)),
        Claim("It ends with less error over all styles", less(WHOLE, SEQUENTIAL, ended)),
        Claim("Its weight regulariser alone forgets less than nothing",
              less(WEIGHT, SEQUENTIAL, forgotten)),
        Claim("So does its feature regulariser alone", less(FEATURE, SEQUENTIAL, forgotten)),
        Claim("A new style is learnt better from few pictures with the style's mean as a target",
              less(STYLE, SEQUENTIAL, learnt)),
        Claim("It comes nearer to all styles at once than to nothing against forgetting",
              lambda rows: (2 * one(rows, WHOLE)["mean"] < one(rows, SEQUENTIAL)["mean"]
                            + one(rows, JOINT)["mean"],
                            "; ".join(f"{one(rows, h)['mean']:.3f}"
                                      for h in (WHOLE, SEQUENTIAL, JOINT))))),
    after="""
What keeps the update's direction does most of what is kept; states that are to stay near those of
the model before, on the new style's pictures and under a token that it has not learnt, hold the
new style back and keep little of the old ones. None of it comes near all pictures at once, and an
adapter a style forgets nothing, for as many numbers each. Errors above 1 (a negative drawn by what
has learnt stripes) move by tenths from run to run: with 150 updates a style the whole method
forgot more than nothing against it (1.20 beside 0.86), the weight regulariser alone still less
(0.59). How the parts are written is our reading of the paper's text, and unconfirmed.""")
