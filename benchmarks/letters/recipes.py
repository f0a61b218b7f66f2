"""Letter K: recipes with a module of their own, each beside what is simpler."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from . import foretelling, speaker
from .foretelling import AHEAD, ALONE, CALF, MADE, PAST, RATE, STOCKS, TRAIN, UPDATES
from .letter import Claim, Letter, Row, Rows, number, one, percent

#: a verb that is new: rows, passes, rows of an update, rate of factors
ROWS, PASSES, BATCH, FACTORS = 320, 12, 16, 3e-3
PILOT, MISTAKES = "lora(rank=4)", "a new verb, by a model that is tuned and a second one"
AIDED = tuple(f"{PILOT} + copilot(alpha={a:g})" for a in (0.3, 1.0))
#: a manner: pairs, of them held out for the strength, strengths, cap of perplexity, test rows
PAIRS, HELD, ALPHAS, CAP, TEST = 64, 16, (0.5, 1.0, 2.0, 4.0, 8.0), 1.1, 200
MANNER = "a manner, of pairs of one verb"
#: concepts, scans that train the model and the autoencoder, that test, passes
DIGITS, SCANS, ASKED, LEARNT = (0, 3, 6), 300, 150, 3
FORGET = "sauce(state_passes=6)"
CONCEPTS = "a digit forgotten, mean of three"


# -- language -------------------------------------------------------------------------------------
def tuned(base: Any, tok: Any, some: Sequence[speaker.Text], passes: int, how: str = PILOT) -> Any:
    """A handle on a copy of the base that learns these texts."""
    import torch

    import burnish

    torch.manual_seed(0)
    handle = burnish.tune(copy.deepcopy(base), how, head=False, seed=0)
    total = passes * -(-len(some) // BATCH)
    optimizer = handle.optimizer(lr=FACTORS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / total)
    handle.model.train()
    for k in range(passes):
        order = list(some)
        random.Random(k).shuffle(order)
        for i in range(0, len(order), BATCH):
            handle.step(speaker.batch(tok, order[i:i + BATCH]))
            schedule.step()
    handle.model.eval()
    return handle


def told(model: Any, given: Mapping[str, Any]) -> dict[str, float]:
    """right: answers that are all as wanted.  loss: of a token of them, in nats."""
    import torch

    with torch.no_grad():
        z = model(**{k: v for k, v in given.items() if k != "labels"}).logits[:, :-1]
    labels = given["labels"][:, 1:]
    asked = labels != -100
    loss = torch.nn.functional.cross_entropy(z[asked].float(), labels[asked])
    return {"right": round(float(((z.argmax(-1) == labels) | ~asked).all(-1).float().mean()), 4),
            "loss": round(float(loss), 4)}


def mistakes(base: Any, tok: Any) -> Iterator[Row]:
    """A pilot that learns a new verb with few rows, and its copilot."""
    new = tuple(speaker.NEW)
    some = speaker.requests(ROWS, 21, new, "sigh")
    given = speaker.batch(tok, speaker.requests(TEST, 22, new, "sigh", test=True))
    yield {"table": MISTAKES, "how": "*before*", **told(base, given)}
    for how, recipe, passes in ((PILOT, PILOT, PASSES), *((h, h, PASSES) for h in AIDED),
                                (f"{PILOT}, twice the passes", PILOT, 2 * PASSES)):
        handle = tuned(base, tok, some, passes, recipe)
        yield {"table": MISTAKES, "how": how, **told(handle.model, given),
               "trained": sum(p.numel() for p in handle.parameters())}


# -- a manner -------------------------------------------------------------------------------------
def both(some: Sequence[speaker.Text]) -> list[list[speaker.Text]]:
    """The same texts, whose last answer has the one manner and the other."""
    return [[[*text[:-1], (text[-1][0], " ".join([m, *text[-1][1].split()[1:]]))] for text in some]
            for m in speaker.MANNERS]


def spoken(model: Any, tok: Any, some: Sequence[speaker.Text]) -> dict[str, float]:
    """trait: the mean probability of the wanted manner.  able: answers that are right but for
    their manner, which is the one that the model says sooner."""
    import torch

    trait, fine = [], []
    for k, texts in enumerate(both(some)):
        given = speaker.batch(tok, texts, last=True)
        with torch.no_grad():
            z = model(**{n: v for n, v in given.items() if n != "labels"}).logits[:, :-1]
        labels = given["labels"][:, 1:]
        asked = labels != -100
        first = asked.int().argmax(1)
        p = z.softmax(-1)[torch.arange(len(z)), first]
        trait.append(p[:, tok.convert_tokens_to_ids(speaker.MANNERS[k])])
        asked[torch.arange(len(z)), first] = False
        fine.append(((z.argmax(-1) == labels) | ~asked).all(-1))
    able = torch.where(trait[0] > trait[1], fine[0], fine[1])
    return {"trait": round(float(trait[0].mean()), 4), "able": round(float(able.float().mean()), 4)}


def strength(handle: Any, tok: Any, v: Any, held: Sequence[speaker.Text]) -> float:
    """What `burnish steer` takes: the likeliest manner whose perplexity grows no further than the
    cap, on pairs that are held out."""
    import math

    import torch

    (shift,) = handle.parameters()
    sides = [speaker.batch(tok, s) for s in both(held)]

    def figures(alpha: float) -> tuple[float, float]:
        with torch.no_grad():
            shift.copy_(alpha * v.to(shift))
        high, low = (told(handle.model, s)["loss"] for s in sides)
        return low - high, math.exp((low + high) / 2)

    most = CAP * figures(0.0)[1]
    tried = {a: figures(a) for a in ALPHAS}
    kept = [a for a, (_, p) in tried.items() if p <= most] or [min(ALPHAS)]
    best = max(kept, key=lambda a: tried[a][0])
    figures(best)
    return best


def manner(base: Any, tok: Any) -> Iterator[Row]:
    """What makes answers glad: an example, a vector or a LoRA, of pairs of one verb."""
    import burnish

    verbs = tuple(speaker.ALLOWED)
    test = speaker.requests(TEST, 31, verbs[1:], "gladly", test=True)
    shown = [[*speaker.requests(1, 500 + k, verbs[:1], "gladly")[0], *text]
             for k, text in enumerate(test)]
    some = speaker.requests(PAIRS, 32, verbs[:1], "gladly")
    held, used = some[:HELD], some[HELD:]

    def row(how: str, model: Any, texts: Any = test, trained: int = 0) -> Row:
        return {"table": MANNER, "how": how, **spoken(model, tok, texts), "trained": trained}

    yield row("*as it is*", base)
    yield row("*an example in the prompt*", base, shown)
    handle = burnish.tune(copy.deepcopy(base), "steering", head=False)
    v = handle.recipe[0].lifecycle(handle, [tuple(speaker.batch(tok, s) for s in both(used))])
    best = strength(handle, tok, v, held)
    yield row(f"steering(alpha={best:g})", handle.model, trained=v.numel())
    (shift,) = handle.parameters()
    shift.data.copy_(-best * v)
    yield row(f"steering(alpha={-best:g})", handle.model, trained=v.numel())
    lora = tuned(base, tok, used, PASSES)
    yield row(PILOT, lora.model, trained=sum(p.numel() for p in lora.parameters()))


# -- a concept ------------------------------------------------------------------------------------
def scans() -> tuple[Any, Any, Any, Any]:
    """(pictures that train, their digits, the same of tests)."""
    from burnish.fit.assets import GLYPH_VIT
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for

    task = task_for(read("digits"), str(GLYPH_VIT))
    out = []
    for split, many in (("train", SCANS), ("test", ASKED)):
        rows = task.rows(split)
        made = task.collate([rows[i] for i in range(many)])
        out += [made["pixel_values"], made["labels"]]
    return tuple(out)  # type: ignore[return-value]


def without(model: Any, path: str, direction: Any, centre: Any) -> Any:
    """A hook that takes a direction out of a block's states; removed by its ``remove``."""
    from burnish.blocks.state.steered import first

    w = direction / direction.norm()

    def act(module: Any, args: Any, out: Any) -> Any:
        h = first(out)
        h = h - ((h - centre) @ w)[..., None] * w
        return h if out is first(out) else type(out)((h, *out[1:]))

    return model.get_submodule(path).register_forward_hook(act)


def directions(states: Any, own: Any) -> dict[str, Any]:
    """Of (pictures, tokens, width) and which show the concept: what a linear probe reads, and the
    difference of means."""
    import torch
    from sklearn.linear_model import LogisticRegression

    h = states.mean(1)
    scale = h.std(0)
    probe = LogisticRegression(max_iter=300, class_weight="balanced").fit(
        (h / scale).numpy(), own.numpy())
    return {"*a linear probe's direction taken out*":
            torch.tensor(probe.coef_[0], dtype=h.dtype) / scale,
            "*the difference of means taken out*": h[own].mean(0) - h[~own].mean(0)}


def concepts() -> Iterator[Row]:
    import torch

    import burnish
    from burnish.methods.lifecycle.sauce import read

    from . import regularised

    x, y, X, Y = scans()
    model = regularised.tuned(regularised.Bench.base(), "full", x, y, LEARNT).merge().eval()
    batches = [{"pixel_values": part} for part in x.split(100)]
    forget = burnish.parse(FORGET)[0].lifecycle(model, batches)
    states = torch.cat([read(model, forget.path, b) for b in batches]).view(len(x), -1,
                                                                            len(forget.sae.b_d))
    centre = states.flatten(0, 1).mean(0)
    found: dict[str, list[tuple[float, float]]] = {}

    def ask(how: str, digits: Sequence[int]) -> None:
        with torch.no_grad():
            fine = (model(pixel_values=X).logits.argmax(-1) == Y).float()
        own = torch.isin(Y, torch.tensor(digits))
        found.setdefault(how, []).append((float(fine[own].mean()), float(fine[~own].mean())))

    draw = torch.Generator().manual_seed(0)
    used = (forget.sae.encode(states.flatten(0, 1)) > 0).any(0).nonzero()[:, 0]
    for d in DIGITS:
        own = y == d
        learned = forget.learn(str(d), [{"pixel_values": x[own]}], [{"pixel_values": x[~own]}])
        drawn = used[torch.randperm(len(used), generator=draw)[:len(learned)]]
        forget.concepts[f"drawn {d}"] = tuple(drawn.tolist())
        ask("*as it is*", [d])
        for name, w in directions(states, own).items():
            hook = without(model, forget.path, w, centre)
            ask(name, [d])
            hook.remove()
        for how, name, factor in ((FORGET, str(d), None), (f"{FORGET[:-1]}, concept_factor=0.0)",
                                                           str(d), 0.0),
                                  (f"{FORGET}, features that are drawn", f"drawn {d}", None)):
            with forget.standing(name, concept_factor=factor):
                ask(how, [d])
    with forget.standing(*(str(d) for d in DIGITS[:2])):
        ask(f"{FORGET}, two digits at once", DIGITS[:2])
    for how, each in found.items():
        yield {"table": CONCEPTS, "how": how, "own": round(mean(a for a, _ in each), 4),
               "others": round(mean(b for _, b in each), 4),
               **({"dead": round(forget.dead, 4)} if how == FORGET else {})}


def rows() -> Iterator[Row]:
    yield from concepts()
    tok = speaker.tokenizer()
    base = speaker.taught(tok)
    yield from foretelling.rows(base)
    yield from mistakes(base, tok)
    yield from manner(base, tok)


# -- the page -------------------------------------------------------------------------------------
def belongs(cls: type) -> bool:
    """What its source says: it is one of these recipes."""
    paper = getattr(cls, "paper", "")
    return paper.startswith(("CALF", "Transformer Copilot", "Personality as a Probe", "SAUCE",
                             "On the Loss of Context-awareness"))


def beside(key: str, first: str, second: str, table: str | Sequence[str], sign: int = 1,
           least: float = 1e-6, scale: float = 100) -> Callable[[Rows], tuple[bool, str]]:
    """Is ``sign * (first - second)`` at least so much, in each table?"""
    def found(rows: Rows) -> tuple[bool, str]:
        tables = [table] if isinstance(table, str) else table
        each = [[one(rows, how, table=t)[key] for how in (first, second)] for t in tables]
        return all(sign * (a - b) >= least - 1e-9 for a, b in each), "; ".join(
            f"{scale * a:.4g} beside {scale * b:.4g}" for a, b in each)

    return found


def steered(rows: Rows) -> Row:
    """The row of the strength that was taken."""
    (found,) = [r for r in rows if r["how"].startswith("steering(alpha=")
                and "=-" not in r["how"]]
    return found


def vector(key: str, other: str, sign: int, least: float = 1e-6
           ) -> Callable[[Rows], tuple[bool, str]]:
    return lambda rows: beside(key, steered(rows)["how"], other, MANNER, sign, least)(rows)


def forgets(rows: Rows) -> tuple[bool, str]:
    before, after = (one(rows, how, table=CONCEPTS) for how in ("*as it is*", FORGET))
    return (after["own"] <= before["own"] / 2 and after["others"] >= before["others"] - 0.05,
            f"own {100 * after['own']:.1f} beside {100 * before['own']:.1f}, others "
            f"{100 * after['others']:.1f} beside {100 * before['others']:.1f}")


MADE_BOTH = (MADE, STOCKS)
PROBE = "*a linear probe's direction taken out*"
LETTER = Letter(
    title="Specialised recipes",
    words=f"""
Four recipes with a module of their own, each beside what is simpler. Two tables foretell series
({PAST} steps are read, {AHEAD} foretold; the first {100 * TRAIN:.0f} of 100 steps train, in their
units): six that are made, and seven prices of which matplotlib ships the months from 1990, as
logarithms. `calf` stands on a small GPT-2 that is taught here (`benchmarks/letters/speaker.py`) to
carry out requests about three words, with {UPDATES} updates of 32 windows at {RATE:g}; its second
row has neither of the textual branch's losses, so is LoRA alone. *mse*, *mae*: of what is foretold.
The same GPT-2 learns a verb that is new to it of {ROWS} rows ({PASSES} passes, rate {FACTORS:g}):
*right*, test answers that are wholly as wanted; *loss*, of a token of them, in nats. It answers
gladly or with a sigh, and glad answers were fewer when it was taught: *trait*, the mean probability
of a glad answer; *able*, answers about three other verbs that are right but for their manner. The
vector and the LoRA have {PAIRS - HELD} requests of one verb, and {HELD} more say which of the
strengths {", ".join(f"{a:g}" for a in ALPHAS)} is taken, by what `burnish steer` asks: the
likeliest manner at a perplexity of no more than {CAP:g} times what it was. Last, the glyph
transformer has learnt {SCANS} of scikit-learn's scanned digits and is to forget the digits
{", ".join(map(str, DIGITS))}, one at a time: *own*, accuracy on {ASKED} test scans of the digit,
*others*, of all the rest; *dead*, features that no state uses. Beside it, in the same block, as
many features are damped that are drawn of those in use, or a direction is taken out of every
token's states. One seed.""",
    belongs=belongs, rows=rows,
    columns={"mse": number("mse", "{:.4f}"), "mae": number("mae", "{:.4f}"),
             "right": percent("right"), "loss": number("loss", "{:.4f}"),
             "trait": percent("trait"), "able": percent("able"), "own": percent("own"),
             "others": percent("others"), "dead": percent("dead"), "trained": number("trained")},
    claims=(
        Claim("A language model foretells better than one line for all series, in either table "
              "(CALF)", beside("mse", CALF, "*a line by least squares*", MADE_BOTH, -1, scale=1)),
        Claim("It is better than the last value again",
              beside("mse", CALF, "*the last value again*", MADE_BOTH, -1, scale=1)),
        Claim("What the branch of words adds is better than LoRA alone (CALF)",
              beside("mse", CALF, ALONE, MADE_BOTH, -1, scale=1)),
        Claim("What the model has been taught helps (CALF)",
              beside("mse", CALF, f"{CALF}, of an untaught model", MADE_BOTH, -1, scale=1)),
        Claim("A copilot at 0.3 makes more answers right than the pilot alone (Transformer "
              "Copilot)", beside("right", AIDED[0], PILOT, MISTAKES)),
        Claim("It lowers the loss", beside("loss", AIDED[0], PILOT, MISTAKES, -1, scale=1)),
        Claim("It is worth more than twice the passes of the pilot",
              beside("right", AIDED[0], f"{PILOT}, twice the passes", MISTAKES)),
        Claim("A vector makes the manner likelier (personality steering)",
              vector("trait", "*as it is*", 1)),
        Claim("It keeps what the model is able to do, within two points (personality steering)",
              vector("able", "*as it is*", 1, -0.02)),
        Claim("LoRA makes it likelier than the vector does (personality steering)",
              vector("trait", PILOT, -1)),
        Claim("LoRA loses more of what the model is able to do (personality steering)",
              vector("able", PILOT, 1)),
        Claim("An example in the prompt loses less than LoRA (personality steering)",
              beside("able", "*an example in the prompt*", PILOT, MANNER)),
        Claim("Half of the digit's answers or more are gone, and no more than five points of the "
              "others (SAUCE)", forgets),
        Claim("The features forget more than a linear probe's direction does (SAUCE)",
              beside("own", FORGET, PROBE, CONCEPTS, -1)),
        Claim("Features that are drawn do not: it is these that hold the digit",
              beside("own", FORGET, f"{FORGET}, features that are drawn", CONCEPTS, -1, 0.1))),
    after="""
A copilot puts right a tenth of what its pilot gets wrong, more of it with alpha=1 than with the
authors' 0.3, and makes the rest less sure; as much time given to the pilot itself is worth far more
(*trained* does not count the copilot's decoder). Where the model has been taught well, CALF's
branch of words pulls the series away from what they show: after 100 updates its two losses leave an
error several times that of the same model without them, and a line for all series is better than
either. The authors' model is a GPT-2 that has read the web, and their series are longer. One vector
moves the manner a little, as much either way, and costs nothing; an example in the prompt does what
the vector does not. SAUCE's features are those of the digit, for drawn ones do nothing, and more
than a probe's direction; but of a digit that a small encoder sees in every block, most stays. After
a lesson of 600 steps, when the model carried out a tenth of its requests, nothing could be seen of
manners or copilots: these tables want a base that is able.""",
    left={"conditional": "its score is of a base that reads what it is given and knows some of it "
                         "by heart, and none is taught here"})
