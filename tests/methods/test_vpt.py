"""Visual prompt tuning: the states of every block written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.methods.prompt.vpt import patch_inputs, special_tokens
from burnish.testing.models import tiny

BLOCKS = {"vit": "vit.layers", "deit": "deit.layers", "timm_qkv": "blocks", "encoder": None}


def blocks_of(one, model):
    if BLOCKS[model]:
        return one.base.get_submodule(BLOCKS[model])
    return next(m for m in one.base.modules() if isinstance(m, torch.nn.ModuleList))


def shallow(blocks, P, after, p=0.0):
    """[cls; P; E] enters the first block; the tokens are carried on, and leave behind the last."""
    L = len(P)

    def enter(m, args):
        x, *rest = args
        rows = F.dropout(P.expand(len(x), -1, -1), p, p > 0)
        return torch.cat([x[:, :after], rows, x[:, after:]], 1), *rest

    def leave(m, args, out):
        x = out[0] if isinstance(out, tuple) else out
        x = torch.cat([x[:, :after], x[:, after + L:]], 1)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    blocks[0].register_forward_pre_hook(enter)
    blocks[-1].register_forward_hook(leave)


@pytest.mark.parametrize("model, after", [("vit", 1), ("deit", 2), ("timm_qkv", 1),
                                          ("encoder", 0)])
def test_shallow_written_out(beside, model, after):                            # findings 6
    one = beside(model, "vpt(length=3)")
    (_, P), = one.at("rows")
    shallow(blocks_of(one, model), P, after)
    one.agree()


@pytest.mark.parametrize("model, after", [("vit", 1), ("deit", 2), ("timm_qkv", 1),
                                          ("encoder", 0)])
def test_deep_written_out(beside, model, after):                               # findings 6
    """[cls_i; _; E_i] = L_i([cls; P_i; E]): what came out at their place is dropped."""
    one = beside(model, "vpt(length=3, deep=True)")
    rows = [P for _, P in one.at("rows")]
    assert len(rows) == 2
    for block, P in zip(blocks_of(one, model), rows, strict=True):
        shallow([block], P, after)
    one.agree()


def test_tokens_may_stand_elsewhere(beside):
    one = beside("vit", "vpt(length=2, after=4)")
    (_, P), = one.at("rows")
    shallow(blocks_of(one, "vit"), P, 4)
    one.agree()


def test_dropout_is_drawn_for_every_sample(beside):                            # findings 3.8
    """Stock dropout of the rows of each picture, the same seed."""
    one = beside("vit", "vpt(length=4, dropout=0.5)")
    (_, P), = one.at("rows")
    shallow(blocks_of(one, "vit"), P, 1, 0.5)
    one.tuned.model.train()
    torch.manual_seed(5)
    want = one.base(**one.batch).logits
    torch.manual_seed(5)
    one.agree(want)


@pytest.mark.parametrize("model, fan", [("vit", 3 * 4 * 4), ("timm_qkv", 3 * 4 * 4),
                                        ("encoder", 32)])
@pytest.mark.parametrize("deep", [False, True])
def test_the_start_is_uniform(model, fan, deep):
    """U(-v, v), v = sqrt(6 / (3 patch^2 + d)); d stands for the patch where there is none."""
    tuned = burnish.tune(tiny(model)[0], f"vpt(length=60, deep={deep})", head=False)
    v = math.sqrt(6 / (fan + 32))
    rows = [p.detach() for p in tuned.parameters()]
    assert len(rows) == 1 + deep
    for P in rows:
        assert v * 0.97 < float(P.max()) <= v and -v <= float(P.min()) < -0.97 * v
        assert float(P.std()) == pytest.approx(v / math.sqrt(3), rel=0.05)


def test_counts_and_defaults():
    m = parse("vpt")[0]
    assert (m.length, m.deep, m.dropout, m.after) == (50, False, 0.1, None)
    assert m.count(8, 3) == 400 and parse("vpt(length=2, deep=True)")[0].count(8, 3) == 48


class Sum(torch.nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, t in tensors.items():
            setattr(self, name, torch.nn.Parameter(t))


def test_what_counts_as_a_special_token():
    """By what the model says, else by the names of its parameters; registers count one by one."""
    D = 4
    one = torch.zeros(1, 1, D)
    assert special_tokens(Sum(cls_token=one), "blocks") == 1
    assert special_tokens(Sum(class_embedding=torch.zeros(D)), "blocks") == 1
    assert special_tokens(Sum(cls_token=one, register_tokens=torch.zeros(1, 5, D)), "blocks") == 6
    assert special_tokens(Sum(cls_token=one, dist_token=one), "blocks") == 2
    assert special_tokens(Sum(reg_token=torch.zeros(D)), "blocks") == 1
    assert special_tokens(Sum(reg_token=torch.zeros(4, D)), "blocks") == 4
    assert special_tokens(Sum(pos_embed=one), "blocks") == 0
    told = Sum(cls_token=one)
    told.num_prefix_tokens = 7
    assert special_tokens(told, "blocks") == 7


def test_tokens_of_another_tower_do_not_count():
    net = torch.nn.Module()
    net.vision, net.text = Sum(class_embedding=torch.zeros(4)), Sum(class_embedding=torch.zeros(4))
    assert special_tokens(net, "vision.encoder.layers") == 1
    assert special_tokens(net, "layers") == 2, "a stack at the root has all of the model above it"


def test_the_inputs_of_the_patch_embedding():
    vit = Anatomy.of(tiny("vit")[0])
    assert patch_inputs(vit, vit.blocks[0].stack) == 48
    clip = Anatomy.of(tiny("clip")[0])
    stacks = {s.split(".")[0]: patch_inputs(clip, s) for s in clip.stacks()}
    assert stacks == {"text_model": None, "vision_model": 48}


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "vpt(targets='q')", "no targets"), ("mlp", "vpt", "no transformer blocks"),
    ("bert", "vpt", "read text"), ("swin", "vpt", "windows of a map"),
    ("vit", "vpt(dropout=-0.1)", "vpt: dropout is a probability"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_a_network_of_one_block():
    """It is the first and the last: tokens enter and leave around it."""
    net, batch = tiny("vit", num_hidden_layers=1)
    before = []
    net.vit.layernorm.register_forward_pre_hook(lambda m, args: before.append(args[0].shape[1]))
    tuned = burnish.tune(net, "vpt(length=3)", head=False)
    net(**batch)
    assert before == [17] and [tuple(p.shape) for p in tuned.parameters()] == [(3, 32)]


def test_text_of_one_block_is_refused():
    with pytest.raises(burnish.RecipeError, match="read text"):
        burnish.tune(tiny("bert", num_hidden_layers=1)[0], "vpt")
