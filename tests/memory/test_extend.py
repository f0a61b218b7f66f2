"""A deep model simulated by a few of its blocks: the report of the whole one, to the byte."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from burnish.core.recipe import parse
from burnish.memory import depth, extend, simulate
from burnish.memory.deeper import Rule, _insertions, _numbers, _telling
from burnish.memory.depth import Paths, Stack, Unlike, order_of, shallow, stacks_of
from burnish.memory.fakes import from_config
from burnish.memory.stream import Signs, Stream
from burnish.testing import changed, choose

module = import_module("burnish.memory.simulate")

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64}


def config(family: str, blocks: int):
    """A narrow model of `blocks` blocks (of each kind of stack)."""
    c = transformers
    return {
        "llama": lambda: c.LlamaConfig(**SMALL, num_hidden_layers=blocks),
        "mixtral": lambda: c.MixtralConfig(**SMALL, num_hidden_layers=blocks,
                                           num_local_experts=2),
        # every third layer attends to everything, the others to a window
        "sliding": lambda: c.Gemma3TextConfig(**SMALL, head_dim=16, num_hidden_layers=blocks,
                                              sliding_window=4, layer_types=[
                                                  "sliding_attention", "sliding_attention",
                                                  "full_attention"] * (blocks // 3)),
        # every second layer is a mixture of experts
        "every second": lambda: c.Qwen2MoeConfig(
            **SMALL, num_hidden_layers=blocks, num_experts=2, num_experts_per_tok=1,
            decoder_sparse_step=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16),
        "vit": lambda: c.ViTConfig(hidden_size=32, num_hidden_layers=blocks, image_size=16,
                                   num_attention_heads=2, intermediate_size=48, patch_size=8),
        "gpt2": lambda: c.GPT2Config(n_embd=32, n_layer=blocks, n_head=2, vocab_size=96,
                                     n_positions=64),
        "t5": lambda: c.T5Config(d_model=32, d_kv=16, d_ff=48, num_heads=2, vocab_size=96,
                                 num_layers=blocks - 1, num_decoder_layers=blocks,
                                 decoder_start_token_id=0),
        "mamba": lambda: c.MambaConfig(hidden_size=32, num_hidden_layers=blocks, vocab_size=96,
                                       state_size=4),
    }[family]()


def batch(family: str):
    return 2 if family == "vit" else (2, 12)


@pytest.fixture
def outcomes(monkeypatch):
    """Extends whatever can be extended; tells what became of each try."""
    seen: list[bool] = []

    def told(*args, **kw):
        found = extend.extended(*args, **kw, always=True)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(module, "extended", told)
    return seen


def agree(ours, whole):
    a, b = ours.to_dict(), whole.to_dict()
    for phase, seconds in b.pop("seconds").items():      # sums of floats, in another order
        assert math.isclose(a["seconds"][phase], seconds, rel_tol=1e-9)
    a.pop("seconds")
    assert a == b


QUICK = [("llama", 7, "lora(rank=2)"), ("llama", 7, "full + checkpoint"),
         ("every second", 8, "lora(rank=2)"), ("vit", 5, "linear_probe"),
         ("llama", 7, "full + galore(rank=4)"), ("llama", 9, "lora(rank=2) + adam8bit"),
         ("mixtral", 7, "vera(rank=4)")]
MANY = [(f, n, r) for f, n in (("llama", 11), ("mixtral", 8), ("sliding", 12),
                               ("every second", 10), ("vit", 12), ("gpt2", 9), ("t5", 7),
                               ("mamba", 6))
        for r in ("full", "lora(rank=2)", "nf4 + lora(rank=2) + checkpoint", "houlsby",
                  "lora(rank=2) + checkpoint(every=2)", "mezo + lora(rank=2)",
                  "full + galore(rank=4)", "lst(reduction=4)", "lora(rank=2) + adam8bit",
                  "lora(rank=2) + step_in_backward")]
if not choose.everything() and not any("burnish/memory/" in f for f in changed.files()):
    MANY = [cell for k, cell in enumerate(MANY)      # a third of each family and each recipe
            if (k // 10 + k % 10 + changed.seed()) % 3 == 0]


#: what is simulated whole: too shallow here for its period, or not what a rule of insertions says
WHOLE = {("sliding", "lora(rank=2) + checkpoint(every=2)"),
         ("t5", "lora(rank=2) + checkpoint(every=2)"), ("mamba", "lst(reduction=4)"),
         ("mamba", "lora(rank=2) + checkpoint(every=2)"),
         *((f, "nf4 + lora(rank=2) + checkpoint") for f in ("vit", "gpt2", "t5", "mamba"))}


def check(family, blocks, recipe, outcomes):
    made, size = config(family, blocks), batch(family)
    try:
        whole = simulate(made, recipe, size, count=True, whole=True)
    except Exception as error:                # what the whole model refuses, both refuse alike
        with pytest.raises(type(error)) as ours:
            simulate(made, recipe, size, count=True)
        assert str(ours.value) == str(error)
        return False
    agree(simulate(made, recipe, size, count=True), whole)
    return True


@pytest.mark.parametrize(("family", "blocks", "recipe"), QUICK)
def test_the_extended_report_is_the_whole_one(family, blocks, recipe, outcomes):
    check(family, blocks, recipe, outcomes)
    assert outcomes == [True]


@pytest.mark.parametrize("update", ["lion", "adafactor"])
def test_small_tensors_fill_strips_as_in_the_whole_model(update, outcomes, monkeypatch):
    """Strips that hold more tensors than the few blocks have, and fewer than all have."""
    for size in (150, 400, 1000):
        monkeypatch.setattr("burnish.blocks.update.composed.strip", lambda device, n=size: n)
        check("llama", 11, f"lora(rank=2) + {update}", outcomes)
    assert outcomes == [True] * 3


def test_the_order_of_a_longer_list_is_refused_where_blocks_are_mixed():
    stacks = (Stack("h", 0, 1, 5, 0),)
    few, whole = Paths(stacks, (2,)), Paths(stacks, (5,))
    assert order_of(["wte", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "ln"], few, whole) == [
        0, *[1, 2] * 5, 5]
    for names in (["h.0.a", "h.1.a", "h.0.b", "h.1.b"], ["h.0.a", "ln", "h.1.a"],
                  ["h.0.a", "h.1.b"], ["h.1.a", "h.0.a"], ["h.0.a", "h.0.b", "h.1.a"]):
        with pytest.raises(Unlike):
            order_of(names, few, whole)


def test_numbers_in_notes_are_those_of_the_whole_model(outcomes):
    """Seven matrices a block; the path named is of the first block in every depth."""
    said = simulate(config("llama", 7), "full + galore(rank=4)", batch("llama"))
    assert outcomes == [True]
    (note,) = said.notes
    assert note.startswith("galore projects 49 of 66 trained tensors to rank 4: model.layers.0.")
    assert note.endswith(" and 46 more")


def test_a_number_in_a_path_or_a_fraction_is_no_count():
    facts = {"notes": ["h.0.fc2 x2 0.5 of 84, 3. (10 x 64)"], "device": "cpu"}
    assert _numbers(facts) == [84, 3, 10, 64]
    assert _telling(facts, [1, 2, 3, 4]) == {"notes": ["h.0.fc2 x2 0.5 of 1, 2. (3 x 4)"],
                                             "device": "cpu"}
    assert _telling({"device": "cpu"}, []) == {"device": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "blocks", "recipe"), MANY)
def test_every_family_and_recipe_agrees_whether_extended_or_not(family, blocks, recipe, outcomes):
    if check(family, blocks, recipe, outcomes):
        assert outcomes == [(family, recipe) not in WHOLE]


# -- what has to be refused -----------------------------------------------------------------------
@pytest.mark.parametrize(("recipe", "targets"), [
    ("lisa(layers=2)", None), ("mola(rank=2)", None), ("lora(rank=2)", "q@0:3"),
    ("lora(rank=2)", "re:.*layers\\.[0-2]\\..*q_proj"), ("lora(rank=2)", ["layers.1.mlp"]),
    ("lst(layers=[0,1,5])", None), ("checkpoint(every=None) + full", None),
    ("greentrainer + full", None)])
def test_what_tells_blocks_apart_is_never_extended(recipe, targets):
    assert extend.repeats(parse(recipe), targets) is None


@pytest.mark.parametrize(("recipe", "targets", "period"), [
    ("lora(rank=2)", None, 1), ("lora(rank=2)", "q_proj,fc1", 1), ("full + checkpoint", None, 1),
    ("lora(rank=2) + checkpoint(every=3)", None, 3), ("mola(allocation='4-4')", None, 1)])
def test_what_does_the_same_to_each_says_after_how_many(recipe, targets, period):
    assert extend.repeats(parse(recipe), targets) == period


def test_a_recipe_that_draws_blocks_takes_the_whole_model(outcomes):
    made = config("llama", 6)
    agree(simulate(made, "lisa(layers=2)", (2, 12), count=True),
          simulate(made, "lisa(layers=2)", (2, 12), count=True, whole=True))
    assert outcomes == [False]


class Depthwise(nn.Module):
    """A body whose run depends on how many blocks there are: what no few blocks can tell."""

    def __init__(self, blocks: int, every: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
                                    for _ in range(blocks))
        self.every = every

    def forward(self, x):
        seen = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            seen.append(x)
        return torch.cat(seen, -1).sum()      # one tensor of a size that grows with the depth


def test_a_run_that_no_insertion_describes_is_simulated_whole(outcomes):
    model = Depthwise(8)
    x = {"x": torch.zeros(2, 8)}
    agree(simulate(model, "full", x, count=True), simulate(model, "full", x, count=True,
                                                           whole=True))
    assert outcomes == [False]


# -- stacks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "blocks", "found"), [
    ("llama", 9, [(1, 9)]), ("every second", 8, [(2, 4)]), ("sliding", 12, [(3, 4)]),
    ("t5", 6, [(1, 4), (1, 5)])])
def test_stacks_are_the_longest_runs_of_equal_blocks(family, blocks, found):
    stacks = stacks_of(from_config(config(family, blocks)))
    assert [(s.period, s.rounds) for s in stacks] == found


def test_blocks_that_differ_in_a_rate_are_not_equal():
    model = from_config(config("vit", 6))
    assert stacks_of(model)
    for n, block in enumerate(model.vit.layers):
        block.rate = n / 10
    assert stacks_of(model) == ()


def test_a_block_of_its_own_stands_outside_the_pattern():
    model = from_config(config("llama", 9))
    model.model.layers[0].mlp = nn.Identity()
    stack = stacks_of(model)[0]
    assert (stack.before, stack.rounds, stack.after) == (1, 8, 0)
    assert stack.kept(2) == [0, 1, 2]


def test_a_shallow_copy_is_what_the_config_builds_and_leaves_the_model_alone():
    deep = from_config(config("every second", 10))
    stacks = stacks_of(deep)
    twin = shallow(deep, stacks, (2,))
    built = from_config(config("every second", 4))
    names = {n: p.shape for n, p in built.named_parameters()}
    assert {n: p.shape for n, p in twin.named_parameters()} == names
    assert twin.config.num_hidden_layers == 4 and deep.config.num_hidden_layers == 10
    assert len(deep.model.layers) == 10
    assert [m.layer_idx for m in twin.modules() if hasattr(m, "layer_idx")] == [
        m.layer_idx for m in built.modules() if hasattr(m, "layer_idx")]


def test_paths_come_back_from_their_signs():
    stack = Stack("a.layers", before=1, period=2, rounds=3, after=1)
    paths = Paths((stack,), (3,))
    for n in range(stack.length):
        for path in (f"a.layers.{n}", f"a.layers.{n}.mlp.fc1"):
            assert paths.join(*paths.split(path)) == path
    assert paths.split("a.layers.4.x") == ("a.layers.<each 1>.x", 1)
    assert paths.split("a.norm") == ("a.norm", -1)


# -- texts ----------------------------------------------------------------------------------------
def test_insertions_are_found_or_there_are_none():
    short, long = np.array([1, 2, 3, 9]), np.array([1, 2, 3, 2, 3, 9, 9])
    kept, spans = _insertions(short, long)
    assert [int(long[k]) for k in kept] == short.tolist()
    assert sum(n for *_, n in spans) == 3
    assert _insertions(np.array([1, 2]), np.array([2, 2, 2])) is None
    assert _insertions(np.array([1, 2, 3]), np.array([1])) is None


def text(signs: Signs, blocks: int, extra: int = 0) -> Stream:
    """Forward counts the blocks up, backward down."""
    from burnish.memory.stream import Sign

    turns = [*range(blocks), *reversed(range(blocks))]
    numbers = [signs.number(Sign(1, 8, module="l.<each 0>", phase="f" if i < blocks else "b"))
               for i in range(2 * blocks)]
    return Stream(signs, np.array(numbers), np.array(turns), {}, {"trainable": blocks + extra})


def test_a_rule_counts_up_and_down_and_is_held_against_a_third_text():
    signs, stack = Signs(), Stack("l", 0, 1, 9, 0)
    paths = {n: Paths((stack,), (n,)) for n in (1, 2, 3, 9)}
    rule = Rule.of(text(signs, 1), (1,), [text(signs, 2)], paths[1])
    assert rule.proves(text(signs, 3), (3,), paths[3])
    deep = rule.at((9,), paths[9])
    assert deep.rounds.tolist() == text(signs, 9).rounds.tolist()
    assert deep.counts == {"trainable": 9}
    assert not rule.proves(text(signs, 3, extra=1), (3,), paths[3])
    assert not rule.proves(text(signs, 4), (3,), paths[3])


def test_layers_told_by_a_config_belong_to_the_look_of_a_block():
    model = from_config(config("llama", 6))
    model.config.told = [0, 0, 0, 1, 1, 1]
    assert all(s.rounds == 3 for s in stacks_of(model))
    assert depth._pattern(list("abababab")) == (0, 2, 4, 0)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "full"])
def test_the_allocator_is_replayed_alike(recipe):
    made = config("llama", 8)
    whole = simulate(made, recipe, (2, 12), count=True, device="cuda", whole=True)
    ours = simulate(made, recipe, (2, 12), count=True, device="cuda")
    agree(ours, whole)
    assert ours.allocator["reserved"] >= ours.peak_bytes


@pytest.mark.parametrize("recipe", ["vpt", "nf4 + vpt", "mezo + lora(rank=2) + checkpoint"])
def test_what_a_few_blocks_refuse_the_whole_model_refuses_in_the_same_words(recipe, outcomes):
    check("llama", 9, f"{recipe} + chunked_loss", outcomes)
