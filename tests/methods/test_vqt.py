"""VQT: queries among the tokens under a mask, which nothing but themselves feels, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.queries import Columns, read
from burnish.core.recipe import parse
from burnish.memory import measure
from burnish.testing import stir
from burnish.testing.models import config, tiny

BLOCKS = {"vit": "vit.layers", "deit": "deit.layers", "timm_qkv": "blocks",
          "bert": "bert.encoder.layer"}
HEAD = {"vit": "classifier", "deit": "classifier", "timm_qkv": "head", "bert": "classifier"}
VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
       "intermediate_size": 3072, "image_size": 224, "patch_size": 16}


def stock(one, model, monkeypatch, weights=None):
    """Logits of the base whose blocks are given [Z; Q], where a mask hides Q from everybody: S is
    what comes out at the place of Q, and the head has further columns."""
    rows, ((_, V),) = [Q for _, Q in one.at("rows")], one.at("vqt_head.weight")
    T, found, real = len(rows[0]), [], F.scaled_dot_product_attention

    def sdpa(q, k, v, attn_mask=None, is_causal=False, **kw):
        assert not is_causal
        n = k.shape[-2] - T
        mask = torch.zeros(n, dtype=q.dtype)
        if attn_mask is not None:                # made for [Z; Q], see below
            mask = mask.masked_fill(~attn_mask[..., :1, :n], -math.inf)
        return real(q, k, v, attn_mask=F.pad(mask, (0, T), value=-math.inf).expand(
            len(q), q.shape[1], n + T, -1), **kw)

    def enter(Q):
        def hook(module, args, kw):
            x, *rest = args
            if kw.get("attention_mask") is not None:
                kw["attention_mask"] = F.pad(kw["attention_mask"], (0, T))
            return (torch.cat([x, Q.expand(len(x), -1, -1)], 1), *rest), kw
        return hook

    def leave(i):
        def hook(module, args, out):
            x = out[0] if isinstance(out, tuple) else out
            w = torch.ones(T).to(x) / T if weights is None else weights[i].softmax(0)
            found.append(torch.einsum("t,btd->bd", w.to(x), x[:, -T:]))
            return (x[:, :-T], *out[1:]) if isinstance(out, tuple) else x[:, :-T]
        return hook

    for i, (block, Q) in enumerate(zip(one.base.get_submodule(BLOCKS[model]), rows, strict=True)):
        block.register_forward_pre_hook(enter(Q), with_kwargs=True)
        block.register_forward_hook(leave(i))
    one.base.get_submodule(HEAD[model]).register_forward_hook(
        lambda m, args, y: y + torch.cat(found, -1) @ V.t())
    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        return one.base(**one.batch).logits


@pytest.mark.parametrize("model", [*BLOCKS])
@pytest.mark.parametrize("length", [1, 5])
def test_it_is_masked_attention_and_so_are_its_gradients(beside, monkeypatch, model, length):
    """One query keeps how keys and values vary together, five in nine tokens keep these."""
    one = beside(model, f"vqt(length={length})")
    if model == "bert":
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -3:] = 0
    one.agree(stock(one, model, monkeypatch))


def test_a_mean_by_weights_that_train(beside, monkeypatch):
    one = beside("vit", "vqt(length=3, weighted=True)")
    one.agree(stock(one, "vit", monkeypatch, [w for _, w in one.at("share")]))


@pytest.mark.parametrize("N", [40, 11, 3])
@pytest.mark.parametrize("masked", [None, "open", "added"])
def test_what_queries_find(N, masked):
    """Whichever is kept for backward, C or keys and values: plain attention in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (4, N, N))
    q.requires_grad_()
    mask = None
    if masked:
        mask = torch.randn(2, 1, 1, N, dtype=torch.float64)
        mask = mask.abs() < 1.5 if masked == "open" else mask
        mask[..., 0] = True
    scores = 0.3 * q @ k.transpose(-1, -2)
    if masked == "open":
        scores = scores.masked_fill(~mask, -math.inf)
    elif masked:
        scores = scores + mask
    want = scores.softmax(-1) @ v
    got = read(q, k, v, 0.3, mask)
    g = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, q, g)[0] for y in (got, want)))
    torch.testing.assert_close(read(q, k, v), (q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
    like = torch.func.vmap(lambda q, k, v: read(q, k, v, 0.3))(q, k, v)
    torch.testing.assert_close(like, (0.3 * q @ k.mT).softmax(-1) @ v)


@pytest.mark.parametrize("model", [*BLOCKS])
def test_the_tokens_never_see_it(model):
    """States of every block, bit by bit, and the start is the base's answer."""
    net, batch = tiny(model)
    net.eval()
    states = []
    for block in net.get_submodule(BLOCKS[model]):
        block.register_forward_hook(lambda m, a, out: states.append(
            (out[0] if isinstance(out, tuple) else out).detach()))
    with torch.no_grad():
        before = net(**batch).logits
        tuned = burnish.tune(net, "vqt(length=3)", head=False)
        net.eval()
        assert torch.equal(net(**batch).logits, before)
        stir(tuned, size=1.0)
        assert not torch.allclose(net(**batch).logits, before, atol=1e-2)
    tokens = [s for s in states if s.shape[1] != 3]
    for a, b in zip(tokens[:2], tokens[-2:], strict=True):
        assert torch.equal(a, b)


def test_what_waits_for_backward_follows_the_queries_and_not_the_tokens(kept):
    """To the byte as many for four times the patches; in proportion to the queries."""
    waits = {}
    for size, length in ((16, 1), (32, 1), (32, 2), (32, 3)):
        net, batch = tiny("vit", image_size=size, batch=4)
        waits[size, length] = kept(burnish.tune(net, f"vqt(length={length})", head=False), batch)
    assert waits[16, 1] == waits[32, 1]
    each = waits[32, 2] - waits[32, 1]
    assert waits[32, 3] - waits[32, 2] == each > 0.8 * waits[32, 1]


def test_where_tokens_are_few_their_keys_and_values_are_kept_and_nothing_else(kept):
    """17 tokens and heads of 8: from five queries on 2 x 17 numbers per channel are fewer."""
    per = []
    for layers in (1, 3):
        net, batch = tiny("vit", batch=4, num_hidden_layers=layers)
        per.append(kept(burnish.tune(net, "vqt(length=20)", head=False), batch))
    net, batch = tiny("vit", batch=4, num_hidden_layers=3)
    assert per[1] - per[0] < kept(burnish.tune(net, "vpt(length=20, deep=True)", head=False),
                                  batch) / 2


def test_the_saving_in_the_simulator_and_in_truth():
    """The paper's: intermediate features stay as they are, so their back-propagation is bypassed,
    where VPT's prompts need it. ViT-B/16, 64 pictures, ten tokens: activations of a step."""
    made = config("vit", **VIT)
    peaks = {r: burnish.simulate(made, f"{r}(length=10{more})", 64).by_category["activations"]
             for r, more in (("vqt", ""), ("vpt", ", deep=True"))}
    assert peaks["vqt"] < 0.25 * peaks["vpt"]
    truth = {}
    for r, more in (("vqt", ""), ("vpt", ", deep=True")):
        net, batch = tiny("vit", batch=32, num_hidden_layers=6, image_size=32)
        tuned = burnish.tune(net, f"{r}(length=3{more})", head=False)
        truth[r] = measure(tuned, batch).by_category["activations"]
    assert truth["vqt"] < 0.25 * truth["vpt"]


def test_the_group_lasso():
    """weight * sum of the lengths of columns, and its gradient; 0 where a column is."""
    net, batch = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, "vqt(length=2, weight=0.3)", head=False)
    (columns,) = (m for m in net.modules() if isinstance(m, Columns))
    with torch.no_grad():
        columns.double()
        columns.weight.normal_()[:, 3] = 0
    plain = torch.autograd.grad(net(**batch).loss, columns.weight)[0]
    tuned.optimizer()                                    # asks for what is minimised besides
    tuned.loss(batch).backward()
    V = columns.weight.detach().clone().requires_grad_()
    term = 0.3 * sum(V[:, j].square().sum().sqrt() for j in range(V.shape[1]) if j != 3)
    (beside,) = tuned.recipe[0].objective(tuned, None)
    assert beside.value().item() == pytest.approx(term.item())
    assert not list(parse("vqt(length=2)")[0].objective(tuned, None))
    torch.testing.assert_close(columns.weight.grad - plain, torch.autograd.grad(term, V)[0])


def test_features_are_chosen_between_two_stages(tmp_path):
    """Those with the longest columns, of which V begins again; files hold which."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "vqt(length=2, weight=0.01, density=0.25, search=0.5)", head=False)
    (columns,), (method,) = (m for m in net.modules() if isinstance(m, Columns)), tuned.recipe
    stages = list(method.stages(tuned, ()))
    assert [(s.trains, s.until) for s in stages] == [("default", 0.5), ("default", None)]
    with torch.no_grad():
        columns.weight.normal_()
    best = columns.weight.norm(dim=0).sort(descending=True).indices[:16]
    stages[0].then(tuned)
    assert torch.equal(columns.alive.nonzero().flatten(), best.sort().values)
    assert not columns.weight.any()
    for _ in range(3):
        tuned.step(batch)
    moved = columns.weight.detach().any(0)
    assert torch.equal(moved, columns.alive)
    tuned.save(tmp_path)
    other = tiny("vit")[0]
    again = burnish.load(other, tmp_path)
    (copied,) = (m for m in other.modules() if isinstance(m, Columns))
    assert torch.equal(copied.alive, columns.alive)
    net.eval(), other.eval()
    assert torch.equal(again.model(**batch).logits, net(**batch).logits)
    assert not list(parse("vqt")[0].stages(tuned, ()))


def test_counts_and_defaults(published):
    """92,160 numbers in queries on ViT-B/16, and a head of (L + 1) d columns a class."""
    m = parse("vqt")[0]
    assert (m.length, m.weighted, m.weight, m.density, m.search) == (10, False, 0.0, 1.0, 0.5)
    vit, _ = published("ViTConfig", "ViTForImageClassification", num_labels=100)
    blocks, d = len(vit.blocks), vit.hidden_size
    head = sum(p.numel() for p in vit.model.classifier.parameters())
    assert m.count(blocks, d, 0) == 92_160
    assert m.count(blocks, d, 100) + head == 92_160 + 13 * 768 * 100 + 100
    tuned = burnish.tune(tiny("vit")[0], "vqt(length=3, weighted=True)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == \
        parse("vqt(length=3, weighted=True)")[0].count(2, 32, 3)


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "vqt(length=0)", "at least one query"), ("vit", "vqt(targets='q')", "no targets"),
    ("vit", "vqt(density=0.0)", "density above 0"), ("vit", "vqt(density=1.5)", "and up to 1"),
    ("vit", "vqt(weight=-1.0)", "weight of 0"),
    ("vit", "vqt(search=1.0)", "between 0 and 1"), ("vit", "vqt(search=0.3)", "density=1 chooses"),
    ("llama", "vqt", "a task head of one linear"),
    ("vit", "vqt + lora(rank=2)", "without a graph"), ("vit", "vqt + checkpoint", "cannot be join"),
    ("clip", "vqt", "needs"), ("encoder", "vqt", "open|MultiheadAttention|queries and keys"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_a_part_that_puts_tokens_before_samples_is_refused():
    net, _ = tiny("vit")
    net.vit.recurrent = torch.nn.GRU(4, 4)
    with pytest.raises(burnish.RecipeError, match="vqt tells the samples.*batch_first=False"):
        burnish.tune(net, "vqt")


@pytest.mark.parametrize("model, reads", [("vit", 3 * 4 * 4), ("bert", 32)])
def test_queries_start_as_the_prompts_of_vpt(model, reads):
    """Uniform within sqrt(6 / (what a patch reads + d)); d where there are no patches."""
    net, _ = tiny(model)
    patch = net.vit.embeddings.patch_embeddings.projection.weight[0] if model == "vit" else None
    assert patch is None or patch.numel() == reads
    tuned = burnish.tune(net, "vqt(length=400)", head=False)
    rows = torch.cat([p for n, p in tuned.named_parameters() if n.endswith("rows")])
    bound = math.sqrt(6 / (reads + 32))
    assert rows.shape == (800, 32) and 0.99 * bound < float(rows.detach().abs().max()) <= bound


def test_a_bias_that_goes_by_the_query_is_refused():
    """BEiT's relative positions: queries stand nowhere. A mask of keys, whose rows are alike, is
    read however it is laid out."""
    from transformers import BeitConfig, BeitForImageClassification

    made = BeitConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
                      intermediate_size=64, image_size=16, patch_size=4,
                      use_relative_position_bias=True)
    net = BeitForImageClassification(made).eval()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "relative_position" in n:
                p.normal_()
    burnish.tune(net, "vqt(length=2)", head=False)
    with pytest.raises(burnish.RecipeError, match="BeitLayer adds .* by the place of the query"):
        net(torch.randn(2, 3, 16, 16))
    from burnish.blocks.state.queries import _of_keys

    row = torch.randn(2, 1, 1, 5)
    for mask in (row, row.expand(-1, 4, 7, -1), row.expand(-1, 4, 7, -1).clone()):
        assert torch.equal(_of_keys(mask, net), mask[..., :1, :])
    assert _of_keys(None, net) is None and _of_keys(row[0, 0, 0], net) is not None


def test_eager_attention_is_refused():
    with pytest.raises(burnish.RecipeError, match="attn_implementation='sdpa'"):
        burnish.tune(tiny("vit", attn_implementation="eager")[0], "vqt")
    net, batch = tiny("vit")
    burnish.tune(net, "vqt(length=2)")
    net.set_attn_implementation("eager")
    with pytest.raises(burnish.RecipeError, match="without one F.scaled_dot_product_attention"):
        net(**batch)


def test_switched_off_it_is_the_base():
    net, batch = tiny("vit", dropout=0.3)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "vqt(length=2)", head=False)
    stir(tuned)
    first = net.train()(**batch).logits
    assert torch.equal(first, net(**batch).logits), "the backbone drops nothing"
    with tuned.disabled(), torch.no_grad():
        torch.testing.assert_close(net.eval()(**batch).logits, base(**batch).logits)
