"""The backbone of LST: its mode inside a step, what may train beside it, blocks no ladder fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.sideblocks import Plain
from burnish.blocks.state.taps import Rung
from burnish.engine.slot import slots
from burnish.testing.models import tiny


def sides(tuned):
    return [m.side for _, _, slot in slots(tuned.model) for m in slot.modules()
            if isinstance(m, Rung)]


class Inner(nn.Module):
    """A model whose head stands in the same module as its blocks."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, **batch):
        return self.net(**batch)


# -- modes ----------------------------------------------------------------------------------------
def modes(net, run):
    """path -> training, of every module of the model and its ladder, while `run` runs."""
    seen = {}
    deepest = next(m for p, m in net.named_modules() if p.endswith(("norm1", "layer_norm"))
                   or "layernorm" in p.lower())
    handle = deepest.register_forward_hook(
        lambda *_: seen.update({p: m.training for p, m in net.named_modules()}))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("model, inside", [
    ("vit", "vit"), ("bert", "bert"), ("roberta", "roberta"), ("t5", "encoder decoder"),
    ("timm_qkv", "patch_embed blocks norm"), ("inner", "net"),
    ("whisper", "model"),
])
def test_the_backbone_is_in_evaluation_mode_the_rest_as_it_was(model, inside):
    """Ladder, head and the model itself keep training; behind the step everything trains again."""
    net, batch = tiny("timm_qkv" if model == "inner" else model)
    if model in ("timm_qkv", "inner"):
        net.head = nn.Sequential(nn.Dropout(0.5), net.head)
    net = Inner(net) if model == "inner" else net
    tuned = burnish.tune(net, "lst(reduction=4)")
    net.train()
    seen = modes(net, lambda: tuned.loss(batch))
    assert seen
    for path, training in seen.items():
        ladder = "burnish" in path.split(".")
        head = path.startswith("net.head")
        frozen = path.split(".")[0] in inside.split() and not ladder and not head
        assert training != frozen, path
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_that_is_run_by_itself_is_in_evaluation_mode_its_ladder_is_not(part):
    net, batch = tiny("t5")
    tuned = burnish.tune(net, "lst(reduction=4)")
    net.train()
    ids = batch["input_ids"]
    run = {"encoder": lambda: net.encoder(ids), "decoder": lambda: net.decoder(ids)}[part]
    if part == "decoder":
        with torch.no_grad():
            states = net.encoder(ids)[0]
        run = lambda: net.decoder(ids, encoder_hidden_states=states)  # noqa: E731
    seen = modes(net.get_submodule(part), run)
    assert seen
    for path, training in seen.items():
        assert training == ("burnish" in path.split(".")), path
    assert all(m.training for m in net.modules())
    assert tuned


@pytest.mark.parametrize("model, inner", [
    ("bert", "bert"), ("vit", "vit"), ("llama", "model"), ("whisper", "model")])
def test_the_model_without_its_head_may_be_run_by_itself(model, inner):
    """The same states as within the whole, from a backbone that drops nothing."""
    net, batch = tiny(model, dropout=0.5)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    rates = ("p", "dropout", "attention_dropout", "activation_dropout")
    for m in (m for side in sides(tuned) for m in side.modules()):
        m.__dict__.update({n: 0.0 for n in rates if isinstance(m.__dict__.get(n), float)})
    net.train()
    batch.pop("labels")
    if model == "whisper":
        batch["decoder_input_ids"] = torch.tensor([[1, 5, 3], [1, 2, 9]])
    one, states = net.get_submodule(inner), []
    handle = one.register_forward_hook(lambda m, a, out: states.append(out[0]))
    net(**batch)
    handle.remove()
    states += [one(**batch)[0], one(**batch)[0]]
    assert torch.equal(states[1], states[2])
    torch.testing.assert_close(states[0], states[1])
    states[1].sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


# -- what trains beside it ------------------------------------------------------------------------
def test_a_ladder_is_added_beside_an_adapter_that_stands_on_the_norms():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "ssf", head=False)
    first = {n for n, _ in tuned.named_parameters()}
    tuned.add("ladder", "lst(reduction=4)")
    tuned.use("ladder")
    tuned.loss(batch).backward()
    assert all(p.grad is not None for p in tuned.parameters())
    assert not first & {n for n, _ in tuned.named_parameters()}


# -- blocks ---------------------------------------------------------------------------------------
def test_a_plain_block_is_mentioned_once_and_is_as_wide_inside_as_the_reduction_says():
    tuned = burnish.tune(tiny("timm_qkv")[0], "lst(reduction=4)")
    assert sum("plain pre-norm blocks" in n for n in tuned.summary()["notes"]) == 1
    for side in sides(tuned):
        assert isinstance(side, Plain) and side.heads == 4
        assert (side.fc1.in_features, side.fc1.out_features) == (8, 16)


class Gated(nn.Module):
    """A gated MLP with both of its first matrices in one."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 96), nn.Linear(48, 32)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(gate.sigmoid() * up)


def with_blocks(change):
    """The small ViT of timm's names, its blocks changed."""
    net, batch = tiny("timm_qkv")
    for block in net.blocks:
        change(block)
    return net, batch


def test_the_inner_width_beside_a_gated_block_is_that_of_its_state():
    net, batch = with_blocks(lambda b: setattr(b, "mlp", Gated()))
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    assert [side.fc1.out_features for side in sides(tuned)] == [12, 12]
    tuned.loss(batch).backward()


class Alone(nn.Module):
    """Attention whose number of heads nothing says."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("change", [
    lambda b: setattr(b, "attn", Alone()), lambda b: setattr(b, "mlp", nn.Identity())])
def test_a_block_nothing_could_be_modelled_on_is_refused(change):
    net, _ = with_blocks(change)
    with pytest.raises(burnish.RecipeError, match="no transformer block a side block could be"):
        burnish.tune(net, "lst(reduction=4)")


class Pair(nn.Module):
    """`nn.Transformer`: an encoder, and a decoder whose blocks attend to it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    def forward(self, x):
        return self.net(x, x)


def test_an_encoder_and_a_decoder_that_no_config_builds_are_refused():
    with pytest.raises(burnish.RecipeError, match="no transformer block a side block could be"):
        burnish.tune(Pair(), "lst(reduction=4)", head=False)


@pytest.mark.parametrize("config, model", [("Bart", "BartForCausalLM"),
                                           ("GPT2", "GPT2LMHeadModel")])
def test_blocks_that_attend_to_an_encoder_elsewhere_are_refused(config, model):
    import transformers

    from burnish.core.anatomy import Anatomy
    from burnish.core.needs import NEEDS

    made = {"Bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
                     "decoder_ffn_dim": 64, "is_decoder": True, "is_encoder_decoder": False},
            "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True,
                     "bos_token_id": 1, "eos_token_id": 2}}[config]
    net = getattr(transformers, model)(getattr(transformers, f"{config}Config")(
        vocab_size=64, max_position_embeddings=32, **made))
    with pytest.raises(burnish.RecipeError, match="attend to an encoder that is no part"):
        burnish.tune(net, "lst(reduction=4)")
    assert not NEEDS["ladder"][1](Anatomy.of(net))


def test_a_random_start_is_that_of_the_models_own_class():
    net, _ = tiny("vit", hidden_size=64, intermediate_size=256, initializer_range=0.3)
    for side in sides(burnish.tune(net, "lst(reduction=1, init='random')")):
        for name in ("mlp.fc1", "mlp.fc2", "attention.q_proj"):
            one = side.get_submodule(name)
            assert float(one.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
            assert not one.bias.any()
