"""CSP: rows in the place of words, written out in float64 with a table that has them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.placed import Words
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

TABLE = "text_model.embeddings.token_embedding"
THINGS = (20, 21, 22, 30, 31)


def pairs(*of):
    """ "a photo of [a][o]": five tokens and the end."""
    return torch.tensor([[1, 5, 6, a, o, 63] for a, o in of])


def pixels(batch):
    return {"pixel_values": batch["pixel_values"]}


def test_the_equation_written_out(beside):
    """A table with theta in it, in any order of the ids; what is not asked for has no gradient."""
    one = beside("clip", f"csp(ids={(31, 20, 22, 30, 21)}, dropout=0.0)")
    (_, theta), = one.at("rows")
    one.batch = {"input_ids": pairs((20, 30), (21, 30), (20, 31)), **pixels(one.batch)}
    index = torch.tensor([31, 20, 22, 30, 21])
    table = one.base.get_submodule(TABLE)
    W = table.weight.detach()
    table.register_forward_hook(lambda m, args, out: F.embedding(
        args[0], W.index_copy(0, index, theta)))
    want, got = (m(**one.batch).logits_per_image for m in (one.base, one.tuned.model))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    (mine,), (ref,) = (torch.autograd.grad(one.score(y), list(p.values())) for y, p in
                       ((got, one.own), (want, one.theta)))
    torch.testing.assert_close(mine, ref, rtol=1e-8, atol=1e-10)
    assert not mine[2].any() and mine[[0, 1, 3, 4]].any(1).all()


def test_the_start_is_the_base():
    net, batch = tiny("clip")
    base = copy.deepcopy(net).eval()
    burnish.tune(net, f"csp(ids={THINGS})", head=False)
    given = {"input_ids": pairs((20, 30), (22, 31)), **pixels(batch)}
    assert torch.equal(net.eval()(**given).logits_per_image, base(**given).logits_per_image)


def test_words_of_several_tokens_begin_as_their_mean():
    net, batch = tiny("clip")
    table = net.get_submodule(TABLE).weight.detach()
    tuned = burnish.tune(net, "csp(ids=[20, 30], spelt=[[7, 8, 9], [4]])", head=False)
    (theta,) = tuned.parameters()
    torch.testing.assert_close(theta.detach(), torch.stack([table[[7, 8, 9]].mean(0), table[4]]))
    (theta,) = burnish.tune(tiny("clip")[0], "csp(ids=[0, 63], spelt=[[63], [0]])",
                            head=False).parameters()
    assert torch.equal(theta.detach(), table[[63, 0]]), "the first token and the last"


def test_swapping_rows_swaps_classes():
    net, batch = tiny("clip")
    tuned = burnish.tune(net, f"csp(ids={THINGS})", head=False)
    stir(tuned, size=0.5)
    net.eval()
    given = {"input_ids": pairs((20, 30), (21, 30)), **pixels(batch)}
    before = net(**given).logits_per_image
    (theta,) = tuned.parameters()
    theta.data[[0, 1]] = theta.data[[1, 0]]
    torch.testing.assert_close(net(**given).logits_per_image, before.flip(1))


def test_a_pair_that_was_never_seen_is_read_from_the_same_rows():
    """Trained on two pairs, the third of the same words moves too, with no new parameter."""
    net, batch = tiny("clip")
    tuned = burnish.tune(net, f"csp(ids={THINGS}, dropout=0.0)", head=False)
    names = [n for n, _ in tuned.named_parameters()]
    unseen = {"input_ids": pairs((20, 31), (22, 31)), **pixels(batch)}
    before = net(**unseen).logits_per_image.detach()
    seen = {"input_ids": pairs((20, 30), (21, 31)), **pixels(batch)}
    label = torch.tensor([0, 1])
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(seen, loss=lambda out, b: F.cross_entropy(out.logits_per_image, label))
    after = net(**unseen).logits_per_image.detach()
    assert [n for n, _ in tuned.named_parameters()] == names
    assert (after - before).abs().min() > 1e-3
    (theta,) = tuned.parameters()
    assert torch.equal(theta[2], net.get_submodule(TABLE).weight[22]), "no text had this word"


def test_dropout_is_one_for_all_texts():
    net, batch = tiny("clip")
    burnish.tune(net, f"csp(ids={THINGS}, dropout=0.5)", head=False)
    table = net.get_submodule(TABLE)
    ids = pairs((20, 30), (20, 31))
    net.train()
    torch.manual_seed(0)
    x = table(ids)
    assert torch.equal(x[0, 3], x[1, 3]) and (x[0, 3] == 0).any() and not (x[0, 1] == 0).any()
    (words,) = (m for m in net.modules() if isinstance(m, Words))
    kept = x[0, 3] != 0
    torch.testing.assert_close(x[0, 3][kept], 2 * words.rows[0][kept])
    net.eval()
    assert torch.equal(table(ids)[0, 3], words.rows[0])


def test_without_dropout_it_is_trainable_tokens():
    ends = []
    for recipe in (f"csp(ids={THINGS}, dropout=0.0)", f"trainable_tokens(ids={THINGS})"):
        net, batch = tiny("clip", dtype=torch.float64)
        tuned = burnish.tune(net, recipe, head=False)
        given = {"input_ids": pairs((20, 30), (21, 30)), **pixels(batch)}
        out = net(**given).logits_per_image
        rows = [p for n, p in tuned.named_parameters() if n.endswith("rows")]
        ends.append((out.detach(), torch.autograd.grad(out.square().sum(), rows)[0].double()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_count_of_the_paper(published):
    """276,480: 115 attributes and 245 objects of MIT-States at the width of ViT-L/14's text."""
    clip, _ = published("CLIPConfig", "CLIPModel",
                        text_config={"hidden_size": 768, "num_hidden_layers": 2,
                                     "num_attention_heads": 12})
    d = clip.model.get_submodule(towers(clip).table).embedding_dim
    m = parse(f"csp(ids={tuple(range(115 + 245))})")[0]
    assert (m.count(d), m.dropout, m.spelt) == (276_480, 0.3, None)
    tuned = burnish.tune(tiny("clip")[0], f"csp(ids={THINGS})", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 5 * 32


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "csp", "none is named"), ("clip", "csp(dropout=0.1)", "none is named"),
    ("clip", "csp(ids=[])", "each once"), ("clip", "csp(ids=[3, 3])", "each once"),
    ("clip", "csp(ids=[-1])", "from 0"), ("clip", "csp(ids=[64])", "so none is 64"),
    ("clip", "csp(ids=[3], spelt=[[64]])", "so none is 64"),
    ("clip", "csp(ids=[3], spelt=[[-1]])", "tokens 0 to 63"),
    ("clip", "csp(ids=[3], spelt=[[1], [2]])", "1 ids, and spellings of 2"),
    ("clip", "csp(ids=[3], spelt=[[]])", "one at least"),
    ("clip", "csp(dropout=1.0)", "below 1"), ("clip", "csp(targets='q')", "no targets"),
    ("llama", "csp", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
