"""UniPT: one head over the detached states of all layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.parallel_head import InPlaceOf, ParallelHead, Tapped, alike
from burnish.core.errors import RecipeError
from burnish.engine.slot import slots
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCKS = {"vit": ("vit.layers", "vit.layernorm"), "bert": ("bert.encoder.layer", None),
          "timm_qkv": ("blocks", "norm")}


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


# -- what it computes -----------------------------------------------------------------------------
def written_out(p, states, valid=None):
    """The equation, sample by sample, token by token where it says sums; p: tensors by name."""
    def norm(x, at):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * p[f"{at}.weight"] + p[f"{at}.bias"]

    def linear(x, at):
        return x @ p[f"{at}.weight"].t() + p[f"{at}.bias"]

    X = [norm(linear(h, f"down.{k}"), f"norm.{k}") for k, h in enumerate(states)]
    out = []
    for b in range(len(states[0])):
        seen = torch.ones(X[0].shape[1], dtype=torch.bool) if valid is None else valid[b].bool()
        top, rows = X[-1][b], []
        for x in X[:-1]:
            rows.append((top[seen].mean(0) * x[b][seen].mean(0)) @ p["sure.weight"].t() + 3.7)
        share = torch.softmax(torch.cat(rows), 0)
        total = 0
        for w, x in zip(share, X[:-1], strict=True):
            C = (top @ x[b].t()).clamp_min(0) * seen
            C = C / (C.sum(1, keepdim=True) + 1e-8) + torch.eye(len(top)).double()
            total = total + w * (C @ x[b])
        inner = top + norm(linear(total, "mix"), "mix_norm")
        out.append(linear(inner.clamp_min(0), "up"))
    return torch.stack(out)


@pytest.mark.parametrize("padded", [False, True])
def test_the_head_is_the_equation_and_so_are_its_gradients(padded):
    torch.manual_seed(0)
    head = ParallelHead(4, 12, 6).double()
    for q in head.parameters():
        nn.init.normal_(q, std=0.5)
    states = [torch.randn(3, 7, 12, dtype=torch.float64) for _ in range(4)]
    valid = None
    if padded:
        valid = torch.ones(3, 7, dtype=torch.long)
        valid[0, 4:], valid[2, 6:] = 0, 0
    leaves = {n: q.detach().clone().requires_grad_() for n, q in head.named_parameters()}
    got, want = head(states, valid), written_out(leaves, states, valid)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for n, q in head.named_parameters():
        torch.testing.assert_close(q.grad, leaves[n].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", ["vit", "bert", "timm_qkv"])
def test_it_reads_all_states_of_a_detached_backbone(model):
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).requires_grad_(False)
    if model == "bert":
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -3:] = 0
        batch["attention_mask"] = mask
    tuned = burnish.tune(net, "unipt(reduction=4)", head=False)
    stir(tuned, size=0.2)
    (end,) = parts(tuned, InPlaceOf)
    leaves = {n: q.detach().clone().requires_grad_() for n, q in end.head.named_parameters()}
    path, norm = BLOCKS[model]
    blocks, states = base.get_submodule(path), []
    blocks[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    for b in blocks:
        b.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    valid = batch.get("attention_mask")

    def instead(m, a, out):
        y = written_out(leaves, states, valid)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    (base.get_submodule(norm) if norm else blocks[-1]).register_forward_hook(instead)
    loss, want = tuned.loss(batch), base(**batch).loss
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-11)
    loss.backward()
    want.backward()
    for n, q in end.head.named_parameters():
        torch.testing.assert_close(q.grad, leaves[n].grad, rtol=1e-7, atol=1e-10)


def test_taps_carry_no_graph_and_blocks_run_without_one():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "unipt", head=False)
    (end,), seen, ran = parts(tuned, InPlaceOf), [], []
    end.head.register_forward_pre_hook(lambda m, args: seen.extend(args[0]))
    net.vit.layers[0].attention.register_forward_hook(
        lambda m, a, out: ran.append(torch.is_grad_enabled()))
    loss = tuned.loss(batch)
    assert len(seen) == 3 and not any(t.requires_grad for t in seen) and ran == [False]
    assert loss.requires_grad
    assert end.head is not None and len(parts(tuned, Tapped)) == 2


def test_with_one_layer_chosen_and_nothing_alike_it_is_an_adapter_of_two_layers():
    """b one-hot, C = I: U relu(X_L + Norm(P X_l))."""
    torch.manual_seed(0)
    head = ParallelHead(3, 8, 4).double()
    states = [torch.randn(2, 1, 8, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        head.sure.weight.zero_()
        # one token: C = 1 + 1 where the product is positive, 1 where it is not
        for k in (0, 1):
            head.norm[k].weight.copy_(-head.norm[2].weight)
            head.down[k].weight.copy_(head.down[2].weight)
            head.down[k].bias.copy_(head.down[2].bias)
        states[0] = states[1] = states[2]
    anchor = head.norm[2](head.down[2](states[2]))
    assert bool((alike(anchor, -anchor, None) == torch.eye(1).double()).all())
    want = head.up(F.relu(anchor + head.mix_norm(head.mix(-anchor))))
    torch.testing.assert_close(head(states), want, rtol=1e-12, atol=1e-13)


def test_a_row_that_is_like_nothing_is_its_own_token():
    anchor = torch.zeros(1, 5, 4)
    assert torch.equal(alike(anchor, torch.randn(1, 5, 4), None), torch.eye(5).unsqueeze(0))


@pytest.mark.parametrize("model", ["vit", "bert"])         # with a last norm and without
def test_a_backbone_of_one_block_has_two_states(model):
    net, batch = tiny(model, num_hidden_layers=1)
    tuned = burnish.tune(net, "unipt", head=False)
    assert bool(tuned.anatomy.final_norms) == (model == "vit")
    assert sum(p.numel() for p in tuned.parameters()) == burnish.parse("unipt")[0].count(1, 32)
    assert torch.isfinite(tuned.step(batch))


def test_the_count_is_the_papers_without_the_bias_that_does_nothing():
    assert burnish.parse("unipt")[0].count(12, 768, small=512, out=1024) == 5_921_281 - 1
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "unipt(reduction=4)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == tuned.recipe.named("unipt").count(2, 32)
    names = {n.rpartition("head.")[2] for n, _ in tuned.named_parameters()}
    assert {"down.2.weight", "sure.weight", "mix_norm.weight", "up.bias"} <= names


def test_what_is_kept_grows_with_tokens_and_not_with_their_square():
    """Per layer H_l once and D_l H_l; X_l is made again."""
    d, s, states = 32, 8, 3
    kept = []
    for tokens in (64, 128):
        head = ParallelHead(states, d, s)
        from burnish.blocks.tape.saved import Tape
        tape = Tape()
        given = [torch.randn(2, tokens, d) for _ in range(states)]
        with Ledger(head) as ledger, tape.recording():
            ledger.watch("weights", given)
            y = head(given, None, tape)
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights") - y.nbytes)
    more = (kept[1] - kept[0]) / (2 * 64 * 4)            # numbers a token
    assert states * s < more <= (2 * states + 5) * s
    assert kept[1] < 2.1 * kept[0]


# -- where it stands ------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["gpt2", "llama", "t5", "clip", "swin", "mlp", "mamba"])
def test_models_that_it_cannot_read_are_refused(model):
    with pytest.raises(RecipeError, match="unipt needs a single stack of blocks of one width, in a "
                                          "model that reads its input as a whole"):
        burnish.tune(tiny(model)[0], "unipt", head=False)


def test_tokens_before_samples_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=False)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(0))

    with pytest.raises(RecipeError, match="tokens before samples"):
        burnish.tune(Net(), "unipt")


@pytest.mark.parametrize("recipe, said", [
    ("unipt(reduction=3)", "the width = 32 is not divisible by it; 1, 2, 4, 8, 16 are possible"),
    ("unipt + lora(rank=2)", "could not train"), ("unipt + norms", "could not train"),
])
def test_what_cannot_be_is_refused(recipe, said):
    with pytest.raises(RecipeError, match=said):
        burnish.tune(tiny("vit")[0], recipe, head=False)


def test_settings_that_are_none_are_refused():
    with pytest.raises(RecipeError, match="1 or more"):
        burnish.parse("unipt(reduction=0)")
    assert burnish.parse("unipt(reduction=1)")[0].reduction == 1
    with pytest.raises(RecipeError, match="there is none"):
        burnish.parse("unipt(cache_gb=1)")
    with pytest.raises(RecipeError, match="takes no targets"):
        burnish.tune(tiny("vit")[0], "unipt(targets='fc1')")
    assert burnish.parse("unipt")[0].reduction == 2


def test_switched_off_it_is_the_base_and_dropout_of_the_backbone_does_nothing():
    net, batch = tiny("vit", dropout=0.5)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "unipt", head=False)
    net.train()
    assert torch.equal(tuned.loss(batch), tuned.loss(batch))
    with tuned.disabled(), torch.no_grad():
        assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)
