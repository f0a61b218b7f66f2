"""Letter B: a tuned model's change in few bytes, and what is left of its accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .letter import Claim, Letter, Row, Rows, number, one, percent

#: a star: the size that held-out rows choose
HOW = ("compeft(density=0.05)", "compeft(density=0.05)*", "compeft(density=0.1)*",
       "compeft(density=0.2)", "compeft(density=0.2)*", "compeft(density=0.5)*",
       "delta_quant(bits=8)", "delta_quant", "delta_quant(bits=2)", "delta_quant(bits=1)",
       "signature", "signature(bits=4)", "signature(bits=2)", "signature(layers=2)")
#: sizes that the authors try
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def rows() -> Iterator[Row]:
    from .merging import TURNED, Bench, turned

    bench = Bench(turned(), TURNED[0] / sum(TURNED[:2]))
    side = 1                                     # turned by 90: the base knows these least
    for recipe in ("full", "lora(rank=8)"):
        yield from squeezed(bench, recipe, side)


def squeezed(bench: Any, recipe: str, side: int) -> Iterator[Row]:
    """A model's change and, of an adapter, that of its factors."""
    from burnish.blocks.weight.golomb import entropy
    from burnish.blocks.weight.taskvector import TaskVector, combine
    from burnish.core.recipe import parse

    tuned = bench.tune(recipe, bench.train[side])
    own = {n: t.detach().clone() for n, t in tuned.tensors().items()}
    heads = {n: t.detach().clone() for n, t in tuned.merge().state_dict().items()
             if n not in bench.body}
    if recipe == "full":
        after = {n: tuned.model.state_dict()[n].detach().clone() for n in bench.body}
        first = bench.body
    else:                                        # as it began: its A is drawn, its B is 0
        import burnish

        after = {n: t for n, t in own.items() if ".lora." in n}
        bench.model = tuned.detach()
        bench.model.load_state_dict(bench.base)
        fresh = burnish.tune(bench.model, recipe, head=bench.stream.head, seed=0)
        first = {n: t.detach().clone() for n, t in fresh.tensors().items() if n in after}
        bench.model = fresh.detach()
    start = TaskVector(first, after)

    def score(change: Any, on: Any = None) -> float:
        import burnish

        on = bench.test[side] if on is None else on
        if recipe == "full":
            return float(bench.score(dict(change), [heads], [on])[0])
        bench.model.load_state_dict(bench.base)
        again = burnish.tune(bench.model, recipe, head=bench.stream.head, seed=0)
        held = again.tensors()
        for name, t in change.items():
            held[name].data.copy_(t)
        body = {n: t.detach().clone() for n, t in again.merge().state_dict().items()
                if n in bench.body}
        bench.model = again.detach()
        return float(bench.score(body, [heads], [on])[0])

    bits = 8 * next(iter(after.values())).element_size()
    many = start.numel
    whole = many * bits // 8
    table = f"digits turned by 90, {recipe}: {many:,} entries"
    yield {"table": table, "how": "*as it is*", "accuracy": round(score(after), 4), "bits": bits,
           "bytes": whole, "smaller": 1.0}
    yield {"table": table, "how": "*the base under its head*", "accuracy": round(score(first), 4),
           "bits": 0.0, "bytes": 0}
    def there_and_back(part: Any) -> tuple[Any, dict[str, Any]]:
        coded = part.encode(start)
        back = part.decode(coded, start.shapes)
        back.tied = start.tied
        return coded, dict(combine(first, [back], lambda taus, *_: taus[0]))

    for how in HOW:
        part, more = parse(how.rstrip("*"))[0], {}
        if how.endswith("*"):
            tried = {a: replace(part, alpha=a) for a in ALPHAS}
            held = {a: score(there_and_back(p)[1], bench.held[side]) for a, p in tried.items()}
            best = max(held, key=lambda a: (held[a], -a))
            part, more = tried[best], {"alpha": best}
        coded, made = there_and_back(part)
        if part.name == "compeft":
            more["entropy"] = round(entropy(part.density), 3)
        yield {"table": table, "how": how, "accuracy": round(score(made), 4),
               "bits": round(8 * coded.nbytes / many, 3), "bytes": coded.nbytes,
               "smaller": round(whole / coded.nbytes, 1), **more}


def belongs(cls: type) -> bool:
    from burnish.blocks.weight.coded import Codes

    return issubclass(cls, Codes)


def near(rows: Rows) -> tuple[bool, str]:
    some = [r for r in rows if "entropy" in r]
    most = max(r["bits"] / r["entropy"] for r in some)
    return most < 1.04, f"at most {100 * (most - 1):.1f} % above it"


def loses(how: str, most: float) -> Any:
    def found(rows: Rows) -> tuple[bool, str]:
        tables = dict.fromkeys(r["table"] for r in rows)
        pairs = [(one(rows, how, table=t)["accuracy"],
                  one(rows, "*as it is*", table=t)["accuracy"]) for t in tables]
        return all(a >= b - most for a, b in pairs), "; ".join(
            f"{100 * a:.1f} beside {100 * b:.1f}" for a, b in pairs)

    return found


LETTER = Letter(
    title="Compressing what tuning changed",
    words="""
The glyph transformer tuned on scikit-learn's scanned digits that lie on their side, once whole
and once by a LoRA. Its change is written in few bytes, read again and put on the base, under the
head that was trained beside it; accuracy on 300 test scans in per cent. *bits* are of the code,
per entry of the change; *entropy* is the least that a code of signs at this density can take. A
star: the size of the signs is the best on 80 held-out scans, among those that ComPEFT's authors
try. Of an adapter it is the factors that are coded, as a difference from what they began as. On a
command line it is `burnish compress`.""",
    belongs=belongs, rows=rows,
    columns={"accuracy": percent("accuracy"), "bits": number("bits", "{:.3g}"),
             "entropy": number("entropy", "{:.3f}"), "bytes": number("bytes"),
             "times smaller": number("smaller", "{:.1f}"), "size": number("alpha", "{:g}")},
    claims=(
        Claim("Golomb codes take next to nothing more than the entropy (ComPEFT)",
              near),
        Claim("A twentieth of the entries, as signs and one size, answers as well as the model: "
              "within two points, at the size that held-out rows choose (ComPEFT)",
              loses("compeft(density=0.05)*", 0.02)),
        Claim("A fifth of the entries does so",
              loses("compeft(density=0.2)*", 0.02)),
        Claim("Half of the entries does so",
              loses("compeft(density=0.5)*", 0.02)),
        Claim("Four bits lose nothing: within half a point (delta quantisation)",
              loses("delta_quant", 0.005)),
        Claim("Signs alone with one size a matrix lose little: within two points (BitDelta)",
              loses("delta_quant(bits=1)", 0.02)),
        Claim("Eight bits of what points away from the weights lose nothing: within half a point "
              "(robust weight signatures)",
              loses("signature", 0.005))))
