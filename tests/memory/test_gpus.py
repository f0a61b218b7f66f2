"""Cards are found by the names people write, and show what programs find on them."""

from __future__ import annotations

import pytest

from burnish.core.errors import ConfigError
from burnish.memory.gpus import cards, gpu, smaller, smallest

GiB = 1 << 30


@pytest.mark.parametrize(("said", "name"), [
    ("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("4070 ti super", None), ("RTX-4070-Ti-SUPER", "RTX 4070 Ti Super"), ("Tesla T4", "T4"),
    ("A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
    ("v100 16 gb", "V100 16GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"),
    ("H100 PCIe", "H100 PCIe 80GB"), ("AMD Instinct MI300X", "MI300X"), ("l40s", "L40S"),
    ("RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"), ("Apple M2 Max", "M2 Max")])
def test_a_card_is_known_by_any_of_its_spellings(said, name):
    if name is None:
        with pytest.raises(ConfigError, match="RTX 4070 Ti Super"):
            gpu(said)
    else:
        assert gpu(said).name == name


@pytest.mark.parametrize(("said", "shows"), [
    ("RTX 4090", 23.5), ("RTX 3090", 23.69), ("RTX 3060 12GB", 11.76), ("T4", 14.58),
    ("A100 80GB", 79.1), ("A100 40GB", 39.39), ("H200", 139.7), ("L4", 22.03), ("V100 16GB", 15.77),
    ("RTX 5090", 31.36), ("A10G", 22.0)])
def test_no_card_shows_more_than_cudas_own_messages_say(said, shows):
    """"GPU 0 has a total capacity of 23.64 GiB": the least of them that is known."""
    assert 0.96 * shows * GiB < gpu(said).shows <= shows * GiB


def test_apples_chips_have_any_memory_and_give_three_quarters_of_it():
    assert gpu("M2 Max 32GB").shows == 24 * GiB and gpu("m2 max 32gb").kind == "mps"


@pytest.mark.parametrize(("said", "says"), [
    ("RTX 4909", "RTX 4090"), ("", "RTX 4090"), (4090, "RTX 4090"), ("A100", "40 or 80"),
    ("RTX 3090 16GB", "24 GB, not 16"), ("RTX 4060 Ti", "RTX 4060 Ti 16GB")])
def test_what_names_no_card_or_several_is_refused(said, says):
    with pytest.raises(ConfigError, match=says):
        gpu(said)


def test_the_smallest_card_that_holds_it_and_the_next_smaller_one():
    for card in cards():
        if card.kind == "cuda":
            assert smallest(card.shows).shows == card.shows
            assert smallest(card.shows + 1) is None or smallest(card.shows + 1).shows > card.shows
    assert smaller(gpu("RTX 4090").shows).shows < gpu("RTX 4090").shows
    assert smallest(10**15) is None and smaller(1) is None


def test_every_card_is_found_by_its_own_name_and_the_figures_are_of_this_world():
    for card in cards():
        assert gpu(card.name) == card
        assert card.single <= card.half < 3e15 and 5e10 < card.bandwidth < 1e13
