"""Compressor: counts against real models and by hand, the search against all there is."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from torch import nn

import burnish
from burnish.blocks.choose.genes import Sizes, climbed, genetic
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.compressor import SPACE
from burnish.testing import tiny


@pytest.mark.parametrize("sizes", [Sizes(1000, 8, 96, 64, 12), Sizes(2000, 4, 32, 320, 1),
                                   Sizes(50265, 12, 768, 3072, 12)])
def test_parameters_are_those_of_a_roberta(sizes):
    v, heads, h, m, layers = sizes
    config = transformers.RobertaConfig(
        vocab_size=v, num_attention_heads=heads, hidden_size=h, intermediate_size=m,
        num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        net = transformers.RobertaForSequenceClassification(config)
    assert sizes.parameters() == sum(p.numel() for p in net.parameters())


def test_the_fitness_of_a_genome_is_the_value_by_hand():
    """v 1000, 2 heads, h 16, m 32, 3 blocks, over 10 tokens."""
    qkv, scores, soft, average = 3 * (512 + 16), 2 * 16 * 10, (5 + 4 + 1) * 10 * 2, 2 * 16 * 10
    out = 512 + 16 + 4 * 16 + 16
    mlp = 1024 + (8 + 1) * 32 + 1024 + 16 + 4 * 16 + 16 + 5 * 16
    head = 512 + 16 + 12 * 16 + 2 * (32 + 1)
    rest = 2 * 16 + 5 * 16 + 4 * 16
    literal = 10 * (3 * (qkv + scores + soft + average + out + 5 + mlp) + rest + 32_000) + head
    corrected = 10 * (3 * (qkv + scores + soft + average + out + 80 + mlp) + rest) + head
    params = 1000 * 16 + 514 * 16 + 3 * 16 + 3 * (
        4 * (256 + 16) + 2 * 32 + 512 + 32 + 512 + 16) + 256 + 16 + 2 * 17
    genes = (1000, 2, 16, 32, 3)
    assert Sizes(*genes).parameters() == params
    for how, work in (("literal", literal), ("corrected", corrected)):
        assert Sizes(*genes).operations(10, literal=how == "literal") == work
        m = parse(f"compressor(counting='{how}', text_length=10, megabytes=0.5)")[0]
        assert m.fitness(genes) == pytest.approx(work / 1e9 - abs(125_000 - params) * 4 / 1e6,
                                                 rel=1e-12)


@pytest.mark.parametrize("counting", ["literal", "corrected"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_genome_has_the_size_that_is_asked_for(counting, seed):
    m = parse(f"compressor(counting='{counting}', seed={seed})")[0]
    sizes = m.lifecycle()
    assert sizes.parameters() * 4 / 1e6 == pytest.approx(3.0, rel=0.01)
    assert all(value in values for value, values in zip(sizes, SPACE, strict=True))
    assert m.lifecycle() == sizes


def test_the_search_finds_what_looking_at_all_finds():
    space = (range(1000, 7001, 1000), (1, 2, 4, 8), range(16, 65, 16), (32, 64, 96), (1, 2, 3))
    for megabytes in (0.2, 0.5, 1.0):
        m = parse(f"compressor(megabytes={megabytes}, counting='corrected')")[0]
        every = list(itertools.product(*space))
        assert len(every) == 1008
        want = max(m.fitness(g) for g in every)
        got = genetic(space, m.fitness, population=20, rounds=30, seed=1)
        assert m.fitness(got) == want


def test_a_climb_ends_where_no_two_sizes_have_better_values():
    m = parse("compressor(climb=False)")[0]
    found = m.lifecycle()
    top = climbed(SPACE, m.fitness, found)
    assert parse("compressor")[0].lifecycle() == top and m.fitness(top) > m.fitness(found)
    for i, j in itertools.combinations(range(5), 2):
        for a, b in itertools.product(SPACE[i], SPACE[j]):
            other = [*top]
            other[i], other[j] = a, b
            assert m.fitness(tuple(other)) <= m.fitness(top)
    assert climbed(((3, 5, 4),), lambda g: -g[0], (5,)) == (3,)


def test_every_genome_is_looked_at_once_and_a_space_may_be_smaller_than_the_population():
    asked = []
    got = genetic(((1, 11), (1, 2, 3)), lambda g: asked.append(g) or -abs(g[0] * g[1] - 22),
                  population=50, rounds=2)
    assert got == (11, 2) and sorted(asked) == sorted(itertools.product((1, 11), (1, 2, 3)))
    assert genetic(((3, 5, 4),), lambda g: -g[0], population=2, rounds=3) == (3,)
    # of equals the smallest
    assert genetic(((2, 1), (7, 6)), lambda g: 0.0, population=9, rounds=1) == (1, 6)


def test_children_have_parents():
    """With crossover alone no gene appears that no parent had; with mutation they do."""
    seen = {}
    for crossover in (1.0, 0.0):
        met = []
        genetic((range(1000),) * 3, lambda g, met=met: met.append(g) or sum(g), population=6,
                rounds=1, crossover=crossover, seed=2)
        first, born = met[:6], met[6:]
        seen[crossover] = sum(all(v in {p[i] for p in first} for i, v in enumerate(g))
                              for g in born)
    assert seen[1.0] >= 4 and seen[0.0] <= 1
    a = [genetic((range(50),) * 4, sum, population=4, rounds=2, seed=s) for s in (0, 0, 1)]
    assert a[0] == a[1]


@pytest.mark.parametrize("model", ["roberta", "bert"])
def test_the_student_is_of_the_teachers_class_and_learns_its_answers(model):
    teacher, batch = tiny(model)
    teacher.train()
    method = parse("compressor(temperature=4.0)")[0]
    torch.manual_seed(0)
    small = method.student(teacher, Sizes(64, 2, 16, 32, 1))
    assert type(small) is type(teacher) and small.config.num_labels == teacher.config.num_labels
    assert (small.config.hidden_size, small.config.intermediate_size, small.config.vocab_size,
            small.config.num_attention_heads, small.config.num_hidden_layers) == (16, 32, 64, 2, 1)
    assert teacher.config.hidden_size == 32
    with torch.no_grad():
        for p in teacher.classifier.parameters():
            p.mul_(20)
    (known,) = method.answers(teacher, [batch])
    assert teacher.training and not known.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(known, teacher.eval()(**batch).logits)
    tuned = burnish.tune(small, "full", head=True)
    assert sum(p.numel() for p in tuned.parameters()) == sum(p.numel() for p in small.parameters())
    tuned.optimizer(lr=1e-2)
    text = {k: v for k, v in batch.items() if k != "labels"}
    small.eval()
    z = small(**text).logits.detach()
    p, q = (known.double() / 4).softmax(-1), (z.double() / 4).softmax(-1)
    want = 16 * (p * (p.log() - q.log())).sum(-1).mean()
    losses = [float(tuned.step(text, loss=method.loss(known))) for _ in range(30)]
    assert losses[0] == pytest.approx(float(want), rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]


def test_a_model_whose_config_has_no_words_is_refused():
    with pytest.raises(ConfigError, match="has no config with vocab_size"):
        parse("compressor")[0].student(nn.Linear(2, 2), Sizes(64, 2, 16, 32, 1))


@pytest.mark.parametrize("text, why", [
    ("megabytes=0.0", "above 0"), ("temperature=0.0", "above 0"), ("crossover=1.5", "from 0 to 1"),
    ("population=0", "at least 1"), ("generations=0", "at least 1"),
    ("text_length=0", "at least 1"), ("labels=0", "at least 1"),
    ("targets='q'", "targets do nothing")])
def test_settings_are_checked(text, why):
    with pytest.raises(ConfigError, match=why):
        parse(f"compressor({text})")


def test_the_least_of_each_is_legal_and_the_search_is_as_long_as_is_said():
    m = parse("compressor(population=1, generations=1, text_length=1, labels=1, temperature=0.5, "
              "megabytes=0.1, crossover=1.0)")[0]
    assert m.lifecycle() and m.temperature == 0.5
    for population, rounds in ((3, 2), (9, 2), (3, 7)):
        m = parse(f"compressor(population={population}, generations={rounds}, climb=False, "
                  "crossover=0.3, seed=4)")[0]
        looked = []
        object.__setattr__(m, "fitness", lambda g, own=m.fitness, to=looked: to.append(g) or own(g))
        found = m.lifecycle()
        assert len(looked) == population * (1 + rounds)
        assert found == genetic(SPACE, parse("compressor")[0].fitness, population=population,
                                rounds=rounds, crossover=0.3, seed=4)


def test_the_defaults_are_the_papers():
    m = parse("compressor")[0]
    assert (m.megabytes, m.population, m.generations, m.crossover, m.temperature) == \
        (3.0, 50, 100, 0.6, 10.0)
    assert (m.text_length, m.labels, m.seed, m.climb, m.counting) == (512, 2, 0, True, "literal")
    assert SPACE[1] == (1, 2, 4, 8)
    assert [len(v) for v in SPACE] == [50, 4, 48, 95, 12]
    assert [v[0] for v in SPACE] == [1000, 1, 16, 32, 1]
    assert [v[-1] for v in SPACE] == [50000, 8, 768, 3040, 12]
    assert parse("compressor(T=2.0)")[0].temperature == 2.0
