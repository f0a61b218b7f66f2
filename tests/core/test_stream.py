"""Which way matrices meet the residual stream, and what a config says of its width."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from burnish.core import stream as module
from burnish.core.anatomy import Anatomy
from burnish.core.site import Place
from burnish.core.stream import Stream, say_width, stream, taken
from burnish.testing.models import tiny

D = 32


@pytest.mark.parametrize("role, kind, out, inp, more, side", [
    ("embed", "embedding", D, 9, {}, "table"), ("position", "embedding", D, 9, {}, "table"),
    ("type", "embedding", D, 2, {}, "table"),
    ("embed", "embedding", 16, 9, {}, "strange"),            # a table of another width
    ("other", "embedding", D, 9, {}, "strange"),             # of its width, and nobody knows it
    ("relative", "embedding", 4, 9, {"block": 0}, None),     # positions inside attention
    ("embed", "embedding", D, 9, {"block": 0}, "strange"),
    ("o", "linear", D, 48, {"block": 0}, "writer"), ("down", "conv1d", D, 48, {}, "writer"),
    ("cross_o", "linear", D, 48, {"block": 0}, "writer"),
    ("o", "linear", 48, 48, {"block": 0}, "strange"),
    ("other", "linear", D, 48, {"block": 0}, "strange"),
    ("q", "linear", 48, D, {"block": 0}, "reader"), ("cross_kv", "conv1d", 8, D, {}, "reader"),
    ("head", "linear", 64, D, {}, "reader"), ("q", "linear", 48, 40, {}, "strange"),
    ("other", "linear", 48, D, {}, "strange"),
    ("o", "conv", D, 48, {}, "strange"), ("q", "linear", 48, D, {"param": "other"}, "strange")])
def test_the_side_of_a_matrix(role, kind, out, inp, more, side):
    place = Place("a", **{"param": "weight", **more}, kind=kind, out=out, inp=inp, role=role)
    if side != "strange":
        assert module._side(place, D) == side
        return
    with pytest.raises(module._Strange, match=rf"\({out} x {inp}, {kind}\) is in no known way"):
        module._side(place, D)


def test_what_stands_on_a_norm_is_none_of_its_own():
    net, _ = tiny("llama")
    net.model.norm.burnish = nn.Module()
    net.model.norm.burnish.gain = nn.Parameter(torch.ones(D))
    assert isinstance(stream(Anatomy.of(net)), Stream)


@pytest.mark.parametrize("where", ["self_attn", "mlp"])
def test_parameters_inside_a_sub_layer_are_its_own(where):
    net, _ = tiny("llama")
    net.model.layers[1].get_submodule(where).sinks = nn.Parameter(torch.ones(4))
    assert isinstance(stream(Anatomy.of(net)), Stream)
    net.model.layers[1].gain = nn.Parameter(torch.ones(4))
    assert "layers.1.gain is in no known way" in stream(Anatomy.of(net))


@pytest.mark.parametrize("blocks, width, why", [
    ([], D, "no blocks of a known width"), ([1], None, "no blocks of a known width")])
def test_no_blocks_and_no_width(blocks, width, why):
    assert why in stream(SimpleNamespace(blocks=blocks, hidden_size=width))


def made(name, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_key_value_heads=2, pad_token_id=0, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("make, why", [
    (lambda: tiny("t5")[0], "it has several stacks of blocks"),
    (lambda: made("Cohere", use_qk_norm=False), "does not have one norm before each"),
    (lambda: made("Olmo2"), "does not have one norm before each"),
    (lambda: tiny("gpt2")[0], r"LayerNorm) subtracts a mean or adds a shift")])
def test_models_without_such_a_stream(make, why):
    assert why in stream(Anatomy.of(make()))


def test_a_norm_is_asked_what_it_answers_where_it_has_values():
    net = tiny("llama", meta=True)[0]
    assert isinstance(stream(Anatomy.of(net)), Stream)
    net = made("Llama")
    assert isinstance(stream(Anatomy.of(net)), Stream)

    class CentredRMSNorm(type(net.model.norm)):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    net.model.norm.__class__ = CentredRMSNorm
    assert "model.norm (CentredRMSNorm) subtracts a mean" in stream(Anatomy.of(net))


class Head(nn.Embedding):
    """A table that is read as a head is."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, D))

    def forward(self, x):
        return F.linear(x, self.weight) / 2


@pytest.mark.parametrize("make, at, why", [
    (lambda: Head(64, D), "lm_head", "lm_head.weight is one with"),
    (lambda: nn.Linear(D, 64, bias=False), "model.other", "model.other.weight is one with"),
    (Halved, "lm_head", "lm_head.weight is one with")])
def test_who_else_reads_a_table_is_a_linear_head_or_refused(make, at, why):
    net, _ = tiny("llama", tie_word_embeddings=True)
    found = stream(Anatomy.of(net))
    assert isinstance(found, Stream) and found.tied
    module = make()
    module.weight = net.model.embed_tokens.weight
    net.set_submodule(at, module)
    assert why in stream(Anatomy.of(net))


# -- a config of another width ------------------------------------------------------------------
class Config:
    """Takes some widths, and says them by `word`."""

    def __init__(self, takes, word="hidden_size", **more):
        self.takes, self.word = takes, word
        setattr(self, word, 8)
        vars(self).update(more)

    def validate(self):
        if getattr(self, self.word) not in self.takes:
            raise ValueError("no")


def anatomy(config, heads=2, roles=("k", "q"), blocks=1):
    places = [Place(f"{i}.{r}", "weight", "linear", 12 * (2 if r == "q" else 1) + i, 8, role=r,
                    block=i) for i in range(blocks) for r in roles]
    places.insert(0, Place("e", "weight", "embedding", 8, 5, role="q"))
    return SimpleNamespace(model=SimpleNamespace(config=config), places=places,
                           blocks=[SimpleNamespace(heads=heads)] * blocks)


@pytest.mark.parametrize("takes, most", [({1}, 1), ({3}, 3), ({4, 2}, 4), ({5}, 0), (set(), 0)])
@pytest.mark.parametrize("word", ["hidden_size", "d_model"])
def test_the_largest_width_that_a_config_takes(takes, most, word):
    config = Config(takes, word)
    assert taken(anatomy(config), 4) == most
    assert getattr(config, word) == 8 and not hasattr(config, "head_dim"), "a copy was asked"


def test_where_no_config_says_anything_all_is_taken():
    assert taken(SimpleNamespace(model=nn.Linear(2, 2)), 5) == 5


@pytest.mark.parametrize("heads, roles, had, want", [
    (2, ("k", "q"), {}, 12), (2, ("k", "q"), {"head_dim": None}, 12),
    (2, ("k", "q"), {"head_dim": 5}, 5), (2, ("qkv",), {}, None), (0, ("q",), {}, None),
    (2, ("qkv",), {"head_dim": 5}, 5)])
def test_heads_keep_the_width_they_have(heads, roles, had, want):
    """Of the first block's queries, over its heads; of a fused matrix nobody knows."""
    config = Config({4}, **had)
    say_width(config, anatomy(config, heads, roles, blocks=1), 4)
    assert config.hidden_size == 4 and getattr(config, "head_dim", None) == want
    if roles == ("k", "q") and not had:              # the first block says it, not another
        say_width(config := Config({4}), anatomy(config, heads, roles, blocks=2), 4)
        assert config.head_dim == 12


def test_the_first_word_alone_is_changed():
    config = Config({4}, d_model=8, head_dim=4)
    say_width(config, anatomy(config), 4)
    assert (config.hidden_size, config.d_model) == (4, 8)
