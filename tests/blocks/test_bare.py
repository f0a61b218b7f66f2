"""States between blocks are handed out at their own length, whatever rows stand among tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import burnish
from burnish.blocks.state.bare import Bare
from burnish.core import registry
from burnish.testing import stir
from burnish.testing.models import tiny

#: recipe, model, the tower in which its rows stand, rows, behind how many tokens (None: all)
ROWS = [("vpt(length=3)", "vit", "vit", 3, 1), ("vpt(length=3, deep=True)", "deit", "deit", 3, 2),
        ("vpt(length=2, after=0)", "vit", "vit", 2, 0), ("vpt(length=3)", "clip", "vision", 3, 1),
        ("maple(length=2, layers=2)", "clip", "vision", 2, None),
        ("cpe_clip(length=2, layers=2)", "clip", "vision", 2, None),
        ("mvlpt(length=2)", "clip", "vision", 2, None),
        ("tunevlseg(length=2, layers=1)", "clip", "vision", 2, None),
        ("mmrl(length=2, layers=1)", "clip", "vision", 2, 1),
        ("idpt", "vit", "vit", 1, 1)]


def states(out):
    """name -> the states among an output and those within it."""
    found = {}
    for name, value in out.items():
        if name.endswith("hidden_states") and value is not None:
            found[name] = value
        elif isinstance(value, transformers.utils.ModelOutput):
            found |= {f"{name}.{k}": v for k, v in states(value).items()}
    return found


def blocks_of(net, tower):
    path = {"vit": "vit", "deit": "deit", "vision": "vision_model"}[tower]
    return next(m for n, m in net.named_modules()
                if n.startswith(path) and isinstance(m, nn.ModuleList) and len(m) > 1)


@pytest.mark.parametrize("recipe, name, tower, length, after", ROWS)
def test_states_are_those_of_the_models_own_tokens(recipe, name, tower, length, after):
    """Of every block what it gave on, less the rows, at the place where they stand."""
    net, batch = tiny(name)
    net.eval()
    want = {k: [h.shape for h in v] for k, v in states(
        net(**batch, output_hidden_states=True)).items()}
    assert want
    tuned = burnish.tune(net, recipe, head=False)
    stir(tuned)
    net.eval()
    seen = []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(
        out[0] if isinstance(out, tuple) else out)) for b in blocks_of(net, tower)]
    out = net(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    got = states(out)
    assert {k: [h.shape for h in v] for k, v in got.items()} == want
    own = got["vision_model_output.hidden_states" if tower == "vision" else "hidden_states"]
    T, longer = own[0].shape[1], 0
    for made, h in zip(seen, own[1:], strict=True):
        if made.shape[1] > T:
            longer += 1
            first = made.shape[1] - length if after is None else after
            made = torch.cat([made[:, :first], made[:, first + length:]], 1)
        if h is not own[-1]:                         # behind the last there may be a norm
            assert torch.equal(h, made)
    assert longer                                    # rows were there
    with tuned.disabled():
        assert {k: [h.shape for h in v] for k, v in states(
            net(**batch, output_hidden_states=True)).items()} == want


def test_the_kind_is_every_method_that_puts_rows_among_tokens():
    """A method of prompts that is not among those above lengthens nothing that it should not."""
    tried = {r.partition("(")[0] for r, *_ in ROWS}
    for entry in registry.catalogue():
        if "prompt" not in entry.axes or entry.name in tried \
                or not entry.cls.__module__.startswith("burnish."):
            continue
        for name in ("vit", "clip", "bert", "gpt2"):
            net, batch = tiny(name)
            net.eval()
            want = {k: [h.shape for h in v] for k, v in states(
                net(**batch, output_hidden_states=True)).items()}
            how = dict(entry.cls.small)
            if "length" in entry.cls.__dataclass_fields__ and "length" not in how:
                how["length"] = 2
            try:
                tuned = burnish.tune(net, entry.cls(**how), head=False)
                net.eval()
                out = net(**batch, output_hidden_states=True)
            except burnish.RecipeError:
                continue                             # not for this model, or reads more
            assert {k: [h.shape for h in v] for k, v in states(out).items()} == want, \
                (entry.name, name)
            tuned.detach()


def test_tuples_are_handed_out_alike():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "vpt(length=3)", head=False)
    net.eval()
    named = net(**batch, output_hidden_states=True, output_attentions=False)
    bare = net(**batch, output_hidden_states=True, return_dict=False)
    assert isinstance(bare, tuple)
    for a, b in zip(bare[-1], named.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert tuned is not None


def test_two_parts_leave_each_its_own_rows_out():
    net, batch = tiny("clip")
    want = net.eval()(**batch, output_hidden_states=True).vision_model_output.hidden_states
    tuned = burnish.tune(net, "vpt(length=3) + maple(length=2, layers=2)", head=False)
    net.eval()
    got = net(**batch, output_hidden_states=True).vision_model_output.hidden_states
    assert [h.shape for h in got] == [h.shape for h in want]
    tuned.detach()
    assert not any(isinstance(m, Bare) for m in net.modules())


def test_what_is_no_tuple_of_states_is_left_alone():
    one = Bare(None, "default", 2, 1)
    h = [torch.arange(5.0).view(1, 5, 1), torch.arange(7.0).view(1, 7, 1)]
    assert one.bare((h[0], None, h[1]))[2].flatten().tolist() == [0, 3, 4, 5, 6]
    assert one.bare((None, h[1]), h[0])[1].flatten().tolist() == [0, 3, 4, 5, 6]
    weights = (torch.ones(1, 2, 7, 7),) * 2
    assert one.bare(weights) is weights and one.bare(h[1]) is h[1]
    assert one.bare((None, None)) == (None, None)
    last = Bare(None, "default", 2, None)
    assert last.bare(tuple(h))[1].flatten().tolist() == [0, 1, 2, 3, 4]
