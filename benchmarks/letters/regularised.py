"""Letter I: tuning that is held to where it began, on few rows, and under noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

LORA = "lora(rank=8)"
#: learning rates by what a recipe begins with, fixed beforehand
RATES = {"full": 1e-3, "lora": 3e-3, "linear_probe": 1e-2, "nmtune": 1e-2}
#: recipes, and how far of the way from the start the tuned weights count (None: all of it)
WAYS: tuple[tuple[str, float | None], ...] = (
    ("linear_probe", None), ("full", None), ("full", 0.5), ("full + l2_sp", None),
    ("full + l2_sp(alpha=0.01)", None), ("full + dr_tune(buffer=64)", None),
    (LORA, None), (LORA, 0.5), (f"{LORA} + l2_sp", None))
FROZEN: tuple[tuple[str, float | None], ...] = (
    ("linear_probe", None), ("nmtune(weight=0.0)", None), ("nmtune", None), ("full", None),
    ("full + dr_tune(buffer=64)", None), ("full + l2_sp(alpha=0.01)", None))
#: rows that train -> draws of them; passes, rows of an update, test rows
FEW, PASSES, BATCH, TEST = {50: 2, 150: 1}, 6, 25, 300
CORRUPT, SEVERITY = ("noise", "contrast", "fog", "pixelate"), 3
#: labels of the second base's training that are another digit, its rows and passes
WRONG, NOISY, LEARNT = 0.4, 600, 3


class Bench:
    """Scans, upright and on their side, some of the test made worse; a model of digits."""

    def __init__(self) -> None:
        from burnish.fit.assets import GLYPH_VIT
        from burnish.fit.corruptions import Corrupted
        from burnish.fit.data import read
        from burnish.fit.tasks import task_for

        task = task_for(read("digits"), str(GLYPH_VIT))
        clean = task.data.splits["test"]
        self.sets = {}
        for name in (None, *CORRUPT):
            task.data.splits["test"] = clean if name is None else Corrupted(clean, name, SEVERITY,
                                                                            0)
            some = task.rows("test")
            batch = task.collate([some[i] for i in range(TEST)])
            self.sets[name or "clean"] = batch["pixel_values"], batch["labels"]
        task.data.splits["test"] = clean
        rows = task.rows("train")
        batch = task.collate([rows[i] for i in range(len(rows))])
        self.x, self.y = batch["pixel_values"], batch["labels"]

    @staticmethod
    def base() -> Any:
        """The glyph transformer under the ten digits of its own head."""
        import torch
        from transformers import ViTForImageClassification

        from burnish.fit.assets import GLYPH_VIT

        model = ViTForImageClassification.from_pretrained(str(GLYPH_VIT))
        head = torch.nn.Linear(model.classifier.in_features, 10)
        head.load_state_dict({n: t[:10] for n, t in model.classifier.state_dict().items()})
        model.classifier, model.num_labels, model.config.num_labels = head, 10, 10
        return model.eval()

    def noisy(self) -> Any:
        """The same after scans of which some had another digit's label."""
        import torch

        draw = torch.Generator().manual_seed(5)
        x, y = self.x[:NOISY], self.y[:NOISY].clone()
        gone = torch.rand(len(y), generator=draw) < WRONG
        y[gone] = (y[gone] + torch.randint(1, 10, (int(gone.sum()),), generator=draw)) % 10
        return tuned(self.base(), "full", x, y, LEARNT).merge().eval()


def tuned(model: Any, recipe: str, x: Any, y: Any, passes: int = PASSES) -> Any:
    """A handle on this very model, tuned on these rows."""
    import torch

    import burnish

    torch.manual_seed(0)
    rate = RATES[recipe.partition("(")[0].partition(" ")[0]]
    made = burnish.tune(model, recipe, head=True, seed=0)
    total = passes * -(-len(y) // BATCH)
    made.total_steps = total
    optimizer = made.optimizer(lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / total)
    made.model.train()
    for epoch in range(passes):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch))
        for some in order.split(BATCH):
            made.step({"pixel_values": x[some], "labels": y[some]})
            schedule.step()
    made.model.eval()
    return made


def score(model: Any, x: Any, y: Any) -> float:
    import torch

    with torch.no_grad():
        return float((model(pixel_values=x).logits.argmax(-1) == y).float().mean())


def away(start: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """How far the body has moved, over its length."""
    import torch

    moved = [(state[n] - t).flatten() for n, t in start.items() if not n.startswith("classifier")]
    whole = [t.flatten() for n, t in start.items() if not n.startswith("classifier")]
    return float(torch.cat(moved).norm() / torch.cat(whole).norm())


def half(model: Any, start: Mapping[str, Any], scale: float) -> Any:
    """The model at so much of the way from the start, head and all (WiSE-FT)."""
    import burnish
    from burnish.blocks.weight.taskvector import merged

    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    part = list(burnish.parse(f"task_arithmetic(scale={scale})"))
    made = dict(merged(start, [state], part))
    for n, p in model.named_parameters():
        p.data.copy_(made[n])
    return model


def rows() -> Iterator[Row]:
    import torch

    bench = Bench()
    start = {n: p.detach().clone() for n, p in bench.base().named_parameters()}
    for many, draws in FEW.items():
        table = f"{many} scans" + (f", mean of {draws} draws" if draws > 1 else "")
        yield {"table": table, "how": "*the base as it is*", **shown([bench.base()], bench)}
        for recipe, scale in WAYS:
            models = []
            for draw in range(draws):
                some = torch.randperm(len(bench.y), generator=torch.Generator().manual_seed(draw))
                made = tuned(bench.base(), recipe, bench.x[some[:many]], bench.y[some[:many]])
                models.append(made.merge().eval())
            if scale is not None:
                models = [half(m, start, scale) for m in models]
            moved = mean(away(start, dict(m.named_parameters())) for m in models)
            yield {"table": table, "how": named(recipe, scale), **shown(models, bench),
                   "moved": round(moved, 4)}
    yield from under_noise(bench)


def named(recipe: str, scale: float | None) -> str:
    return recipe if scale is None else f"{recipe}, task_arithmetic(scale={scale})"


def shown(models: Sequence[Any], bench: Bench) -> dict[str, float]:
    each = {n: mean(score(m, x, y) for m in models) for n, (x, y) in bench.sets.items()}
    return {"clean": round(each["clean"], 4),
            "worse": round(mean(each[n] for n in CORRUPT), 4)}


def under_noise(bench: Bench) -> Iterator[Row]:
    """Scans on their side, with right labels, on a base that has learnt wrong ones."""
    base = bench.noisy()
    side = [(x.rot90(1, (-2, -1)), y) for x, y in ((bench.x[-200:], bench.y[-200:]),
                                                  bench.sets["clean"])]
    table = f"scans on their side, {WRONG:.0%} of the base's labels were wrong"
    yield {"table": table, "how": "*the base as it is*", "clean": round(score(base, *side[1]), 4)}
    for recipe, _ in FROZEN:
        made = tuned(copy.deepcopy(base), recipe, *side[0])
        yield {"table": table, "how": recipe, "clean": round(score(made.model, *side[1]), 4),
               "trained": sum(p.numel() for p in made.parameters())}


def belongs(cls: type) -> bool:
    """What its source says: it holds a tuned model to what it was."""
    paper = getattr(cls, "paper", "").lower()
    return any(w in paper for w in ("inductive bias for transfer", "distribution regularization",
                                    "label noise in pre-training"))


def compared(key: str, first: str, second: str, least: float = 0.0,
             tables: Callable[[str], bool] = lambda t: "scans" in t and "side" not in t
             ) -> Callable[[Rows], tuple[bool, str]]:
    """Is the first above the second by so much, in each of these tables?"""
    def found(rows: Rows) -> tuple[bool, str]:
        names = [t for t in dict.fromkeys(r["table"] for r in rows) if tables(t)]
        each = [[one(rows, how, table=t)[key] for how in (first, second)] for t in names]
        return all(a - b >= least - 1e-9 for a, b in each), "; ".join(
            f"{100 * a:.1f} beside {100 * b:.1f}" for a, b in each)

    return found


def few(t: str) -> bool:
    return t.startswith("50 ")


def side(t: str) -> bool:
    return "side" in t


FULL, WISE = "full", "full, task_arithmetic(scale=0.5)"
LETTER = Letter(
    title="Tuning held to where it began",
    words=f"""
The glyph transformer under the ten digits of its own head reads scikit-learn's scanned digits, of
which few train ({PASSES} passes, batches of {BATCH}), at rates that were fixed beforehand (1e-3 of
whole weights, 3e-3 of factors, 1e-2 of heads). *clean*: {TEST} test scans; *worse*: the mean over
these in four corruptions of severity {SEVERITY} (noise, contrast, fog, pixelate), which nothing has
trained on; *moved*: how far the body has gone, in per cent of its length. `l2_sp` has the paper's
strength and a tenth of it; WiSE-FT is `task_arithmetic(scale=0.5)` of one tuned model, half way
back, head and all. In the last table the base has first learnt {NOISY} scans, {100 * WRONG:.0f} of
100 labels another digit's, and is then tuned on 200 scans on their side whose labels are right:
`nmtune` remaps features of a frozen encoder for the head, `nmtune(weight=0.0)` is its MLP
alone.""",
    belongs=belongs, rows=rows,
    columns={"clean": percent("clean"), "worse": percent("worse"), "moved": percent("moved"),
             "trained": number("trained")},
    claims=(
        Claim("A pull to the start is better than plain tuning on 50 rows (L2-SP)",
              compared("clean", "full + l2_sp", FULL, 1e-6, few)),
        Claim("So it is at a tenth of its strength",
              compared("clean", "full + l2_sp(alpha=0.01)", FULL, 1e-6, few)),
        Claim("On a LoRA, too", compared("clean", f"{LORA} + l2_sp", LORA, 1e-6, few)),
        Claim("Half way back is better than all the way on rows that are worse than what trained "
              "(WiSE-FT)", compared("worse", WISE, FULL, 1e-6)),
        Claim("It loses nothing on clean ones, within a point (WiSE-FT)",
              compared("clean", WISE, FULL, -0.01)),
        Claim("So it is of a LoRA, on worse ones",
              compared("worse", f"{LORA}, task_arithmetic(scale=0.5)", LORA, 1e-6)),
        Claim("A head that must also classify the base's features, calibrated, is better than "
              "plain tuning (DR-Tune)",
              compared("clean", "full + dr_tune(buffer=64)", FULL, 1e-6)),
        Claim("Remapped features are better for a head than those of the noisy base (NMTune)",
              compared("clean", "nmtune", "linear_probe", 1e-6, side)),
        Claim("Its three terms add to what the MLP does alone (NMTune)",
              compared("clean", "nmtune", "nmtune(weight=0.0)", 1e-6, side))),
    after="""
A point is three scans, and most rows of a table lie within two. The base knows print, not scans,
and is wrong on a good part of them: what pulls towards it pulls towards that, so half way back and
`l2_sp` help, where at all, on the fewest rows. WiSE-FT is of bases that are good at what is asked
before anything is tuned, which this one is not. The second term of `dr_tune` trains the head alone,
which on rows as few as these already says what the buffer holds. Over a base of wrong labels an MLP
before the head and the three terms of `nmtune` are worth about as much as each other, and together
a little more than all weights; these are few scans, and one seed.""")
