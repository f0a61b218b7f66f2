"""Which linears a mixture stands beside, of which rows, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from burnish.core.errors import RankError, RecipeError, TargetError
from burnish.core.site import Place
from burnish.methods.mixture._linears import linears

METHOD = SimpleNamespace(name="mix", kinds=frozenset({"linear"}))


def place(path, out=12, inp=10, kind="linear", block=0, rows=None, role=""):
    return Place(path, "weight", kind, out if rows is None else rows[1] - rows[0], inp, block=block,
                 rows=rows, role=role)


Q, K, V = (place("b.qkv", rows=(i, i + 4), role=n) for n, i in (("q", 0), ("k", 4), ("v", 8)))
FUSED, ONE, HEAD = place("b.qkv"), place("b.one", 7, 9), place("head", 3, block=None)
CONV = place("b.conv", kind="conv")
EXPERT = place("b.experts.0")


def found(places, asked=False, **how):
    places = list(places)
    anatomy = SimpleNamespace(asked=SimpleNamespace(of=lambda m: (places if asked else None, 1),
                                                    notes=[]),
                              places=[HEAD, ONE, Q, K, V, FUSED, CONV, EXPERT])
    return list(linears(anatomy, METHOD, places, **how))


def test_those_inside_blocks_and_nobody_asked_for_others():
    every = [ONE, HEAD, CONV, EXPERT]
    assert found(every) == [(ONE, None, 7), (EXPERT, None, 12)]
    assert found(every, anywhere=True) == [(ONE, None, 7), (HEAD, None, 3), (EXPERT, None, 12)]
    assert found(every, samples=True) == [(ONE, None, 7)]
    assert found([ONE, EXPERT], asked=True) == [(ONE, None, 7), (EXPERT, None, 12)]


@pytest.mark.parametrize("asked, how, why", [
    (HEAD, {}, "mix acts on linears inside blocks; head.weight is outside them"),
    (CONV, {}, "mix acts on linears inside blocks; b.conv.weight is of kind conv"),
    (CONV, {"anywhere": True}, "mix acts on linears; b.conv.weight is of kind conv"),
    (EXPERT, {"samples": True}, "mix acts on linears inside blocks; b.experts.0.weight is given "
                                "the tokens of all samples together")])
def test_what_is_asked_for_and_none_of_them_is_refused(asked, how, why):
    with pytest.raises(TargetError) as e:
        found([ONE, asked], asked=True, **how)
    assert str(e.value) == why
    assert found([ONE, asked], **how) == [(ONE, None, 7)]


@pytest.mark.parametrize("how, where", [({}, "linears inside blocks"),
                                        ({"anywhere": True}, "linears")])
def test_none_at_all_is_an_error(how, where):
    with pytest.raises(RecipeError) as e:
        found([CONV], **how)
    assert str(e.value) == f"mix: none of the targets is one of the {where}"


@pytest.mark.parametrize("places, rows", [
    ([Q, V], ((0, 4), (8, 12))), ([V, Q], ((0, 4), (8, 12))), ([K], ((4, 8),)), ([Q], ((0, 4),)),
    ([V], ((8, 12),)), ([K, V], ((4, 8), (8, 12))), ([Q, K, V], None), ([V, K, Q], None),
    ([FUSED], None)])
def test_rows_of_a_fused_one(places, rows):
    (one,) = found(places)
    assert one == (places[0], rows, 12)


def test_one_too_small_for_the_rank_is_left_out_unless_it_is_asked_for_or_the_largest():
    small, wide = place("b.z", 3, 20), place("b.a", 6, 5)
    every, notes = [small, place("b.m", 20, 2), wide], []

    def run(**how):
        notes.clear()
        places = how.pop("of", every)
        anatomy = SimpleNamespace(places=places, asked=SimpleNamespace(
            of=lambda m: (places if how.pop("asked", False) else None, 1), notes=notes))
        return [p.path for p, *_ in linears(anatomy, METHOD, places, **how)]

    assert run() == ["b.z", "b.m", "b.a"], "of no rank all are"
    assert run(rank=2) == ["b.z", "b.m", "b.a"] and not notes
    assert run(rank=3) == ["b.z", "b.a"]
    assert notes == ["mix leaves 1 of 3 weights alone, too small for its rank, e.g. b.m.weight "
                     "(20 x 2)"]
    assert run(rank=5) == ["b.a"]
    assert notes == ["mix leaves 2 of 3 weights alone, too small for its rank, e.g. b.z.weight "
                     "(3 x 20)"]
    with pytest.raises(RankError, match="rank 6 does not fit.*b.a"):
        run(rank=6)
    with pytest.raises(RankError, match="rank 4 does not fit.*b.z"):
        found([small, wide], asked=True, rank=4)
