"""PAT against its equations in plain float64, its schedule, and the narrower model it leaves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.stream import Hybrid, StreamMask
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, ConfigError
from burnish.core.stream import Stream, stream, taken
from burnish.methods.controller.pat import Search, mask_of
from burnish.testing.models import tiny
from burnish.testing.stir import stir

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "pad_token_id": 0}


def made(name, **settings):
    """A small model of another family, in evaluation mode, and a batch."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    config.architectures = [f"{name}ForCausalLM"]
    net = getattr(transformers, f"{name}ForCausalLM")(config)
    ids = torch.randint(3, 64, (2, 8))
    return net, {"input_ids": ids, "labels": ids}


def handler(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "pat")


def trained(net, batch, recipe="lora(rank=4) + pat(rank=4)", steps=10, lr=1e-2):
    tuned = burnish.tune(net, recipe)
    tuned.total_steps = steps
    tuned.optimizer(lr=lr)
    for _ in range(steps):
        tuned.step(batch)
    net.eval()
    return tuned


# -- the equation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kappa, rest", [(1.0, 0.5), (3.0, 0.25)])
def test_the_equation_written_out(beside, kappa, rest):
    """v * (sigmoid(kappa m) + rest) * (x + W_u W_d x) behind table, attention and MLP."""
    one = beside("llama", "pat(rank=4)")
    mask = mask_of(one.tuned)
    mask.kappa.fill_(kappa), mask.rest.fill_(rest)
    (m,) = [p for _, p in one.at("mask.m")]
    assert m.shape == (32,)
    sites = [path for path, _ in one.at("v")]
    assert sites == ["model.embed_tokens"] + [f"model.layers.{i}.{n}" for i in range(2)
                                              for n in ("self_attn.o_proj", "mlp.down_proj")]
    for path in sites:
        def hook(module, args, x, path=path):
            W_d, W_u, v = (one.theta[path, n] for n in ("A", "B", "v"))
            assert (W_d.shape, W_u.shape) == ((4, 32), (32, 4))
            return v * (torch.sigmoid(kappa * m) + rest) * (x + x @ W_d.t() @ W_u.t())

        one.base.get_submodule(path).register_forward_hook(hook)
    one.agree()


def test_once_settled_it_is_ones_and_zeros_and_m_gets_nothing(beside):
    one = beside("llama", "pat(rank=4)")
    mask = mask_of(one.tuned)
    mask.settle(24)
    m = mask.m.detach()
    assert set(mask.alive.nonzero().flatten().tolist()) == set(m.topk(24).indices.tolist())
    alive = mask.alive.double()
    for path, _ in one.at("v"):
        def hook(module, args, x, path=path):
            W_d, W_u, v = (one.theta[path, n] for n in ("A", "B", "v"))
            return v * alive * (x + x @ W_d.t() @ W_u.t())

        one.base.get_submodule(path).register_forward_hook(hook)
    want, got = one.base(**one.batch).logits, one.tuned.model(**one.batch).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    one.score(got).backward()
    assert not mask.m.grad.any()


def test_the_start_is_the_function_itself():
    net, batch = tiny("llama")
    want = net(**batch).logits
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    tuned.total_steps = 10
    tuned.optimizer(lr=1e-3)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-6, atol=1e-7)
    for h in (h for _, h in tuned.branches(Hybrid)):
        assert not h.B.any() and bool((h.v == 1).all()) and float(h.A.detach().std()) > 0.05
        assert 0.9 < float(h.A.detach().abs().max()) * 32 ** 0.5 <= 1


def test_the_penalties_are_the_published_ones():
    """Gradients of |sum [m >= 0] - keep| / keep (straight through), of the two poles, of W_d."""
    net, batch = tiny("llama", dtype=torch.float64)
    tuned = stir(burnish.tune(net, "pat(rank=4, weight=7.0, ortho=0.3)", head=False))
    for _, h in tuned.branches(Hybrid):
        h.double()
    tuned.total_steps = 10
    tuned.optimizer(lr=0.0)
    mask = mask_of(tuned)
    sites = [h for _, h in tuned.branches(Hybrid)]
    plain = torch.autograd.grad(tuned.model(**batch).loss, [mask.m, *(h.A for h in sites)])
    tuned.loss(batch).backward()
    m = mask.m.detach().clone().requires_grad_()
    hard = (m.detach() >= 0).double()
    count = int(hard.sum())
    assert 0 < count != 24
    term = 7 * (count - 24) / 24 * (1 if count > 24 else -1) + 0 * m.sum()
    up, down = m[m > 0], m[m <= 0]
    term = term + (up - 0.5).square().mean() + (down + 0.5).square().mean()
    (poles,) = torch.autograd.grad(term, m)
    through = 7 / 24 * (1 if count > 24 else -1)
    torch.testing.assert_close(mask.m.grad - plain[0], poles + through, rtol=1e-9, atol=1e-12)
    own = 7 * mask.undecided(24) + mask.poles()
    torch.testing.assert_close(own.detach(), term.detach())
    for h, base in zip(sites, plain[1:], strict=True):
        A = h.A.detach().clone().requires_grad_()
        want = 0.3 * nn.functional.mse_loss(A @ A.t(), torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(h.A.grad - base, torch.autograd.grad(want, A)[0], rtol=1e-8,
                                   atol=1e-12)


def test_with_all_on_one_side_the_other_pole_is_nothing():
    mask = StreamMask(4)
    with torch.no_grad():
        assert float(mask.poles()) == 0.25                   # m = 0: half away, all below
        mask.m.fill_(0.25)
        assert float(mask.poles()) == 0.0625 and float(mask.undecided(3)) == pytest.approx(1 / 3)
        mask.m[1:] = -0.5                                    # each side has a mean of its own
        assert float(mask.poles()) == 0.0625 and float(mask.undecided(2)) == 0.5


def test_penalties_end_with_the_search():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    tuned.total_steps = 10
    tuned.optimizer(lr=1e-3)
    mask_of(tuned).settle(24)
    tuned.loss(batch).backward()
    assert not mask_of(tuned).m.grad.any()


# -- the schedule ---------------------------------------------------------------------------------
def test_kappa_rises_and_the_rest_fades_until_the_mask_is_settled():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    tuned.total_steps = T = 10
    tuned.optimizer(lr=1e-2)
    mask = mask_of(tuned)
    for t in range(T):
        if t < 8:
            assert not mask.settled and bool(mask.alive.all())
            assert float(mask.kappa) == pytest.approx(
                1 / (1 - math.log(max(1, t)) / math.log(T) + 1e-6), rel=1e-5)
            assert float(mask.rest) == pytest.approx(max(0.5 - t / T, 0))
        else:
            assert mask.settled and int(mask.alive.sum()) == 24
        tuned.step(batch)
    assert set(mask().unique().tolist()) == {0.0, 1.0} and int(mask().sum()) == 24


@pytest.mark.parametrize("search, when", [(0.5, 5), (1.0, 10), (0.05, 0)])
def test_the_share_of_the_run_in_which_the_mask_is_looked_for(search, when):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"pat(rank=4, search={search})", head=False)
    tuned.total_steps = 10
    tuned.optimizer(lr=1e-2)
    for t in range(10):
        tuned.model(**batch)                         # the first forward begins
        assert bool(mask_of(tuned).settled) == (t >= when)
        tuned.step(batch)
    assert mask_of(tuned).settled


def test_a_share_that_is_a_whole_number_is_not_one_less():
    """0.29 of 100 is 28.999999999999996 and (1 - 0.9) 40 is 3.9999999999999996, in binary."""
    mask = StreamMask(4)
    search = Search(mask, 2, 0.29)
    search.start(100)
    search.step_begin(28)
    assert not mask.settled
    search.step_begin(29)
    assert mask.settled
    wide = Anatomy.of(made("Qwen3", hidden_size=40, head_dim=8)[0])
    assert burnish.parse("pat(rank=4, ratio=0.9)")[0].keep(wide)[1] == 4


def test_at_the_end_of_the_run_the_sigmoid_is_a_step():
    mask = StreamMask(4)
    mask.at(10, 10)
    assert float(mask.kappa) == pytest.approx(1e6) and float(mask.rest) == 0
    mask.at(2, 2)
    assert float(mask.kappa) == pytest.approx(1e6)


def test_one_channel_is_the_least():
    narrow = Anatomy.of(made("Qwen3", head_dim=8)[0])
    assert burnish.parse("pat(rank=4, ratio=0.96)")[0].keep(narrow)[1] == 1
    with pytest.raises(burnish.RecipeError, match="ratio=0.97.: the model's config takes no"):
        burnish.parse("pat(rank=4, ratio=0.97)")[0].keep(narrow)


def test_what_is_settled_stays():
    mask = StreamMask(4)
    with torch.no_grad():
        mask.m.copy_(torch.tensor([0.0, 3.0, -1.0, 0.0]))
    mask.settle(2)
    assert mask.alive.tolist() == [True, True, False, False]         # of equals the first
    with torch.no_grad():
        mask.m.neg_()
    mask.settle(2)
    assert mask.alive.tolist() == [True, True, False, False]
    level = StreamMask(200)                          # sorts of many are not stable by themselves
    level.settle(77)
    assert level.alive.tolist() == [True] * 77 + [False] * 123


def test_of_one_update_there_is_no_logarithm():
    net, batch = tiny("llama")
    assert mask_of(trained(net, batch, "pat(rank=4, search=1.0)", steps=1)).settled


def test_without_the_number_of_steps_nothing_is_pruned():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    mask = mask_of(tuned)
    assert not mask.settled and float(mask.rest) == 0.5 and float(mask.kappa) == 1
    with pytest.raises(ConfigError, match="nothing is switched off.*pat channels"):
        tuned.shrink()


def test_the_schedule_comes_before_other_handlers_and_goes_on_where_it_was():
    net, batch = tiny("llama")
    tuned = trained(net, batch, steps=10)
    search = handler(tuned)
    assert search.phase < 50 and search.state_dict() == {"total": 10}
    again = burnish.tune(tiny("llama")[0], "lora(rank=4) + pat(rank=4)")
    again.optimizer(lr=1e-3)
    fresh = handler(again)
    fresh.load_state_dict({"total": 4})
    fresh.step_begin(2)
    assert float(mask_of(again).rest) == 0 and not mask_of(again).settled
    fresh.step_begin(3)
    assert mask_of(again).settled
    mask_of(again).kappa.fill_(9)
    fresh.step_begin(1)                              # over is over
    assert float(mask_of(again).kappa) == 9


# -- the narrower model ---------------------------------------------------------------------------
FAMILIES = [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Mistral", {}),
            ("Qwen2", {}), ("Qwen3", {"head_dim": 8, "rms_norm_eps": 1e-2}),
            ("Gemma", {"head_dim": 8, "rms_norm_eps": 1e-2})]


@pytest.mark.parametrize("name, settings", FAMILIES)
def test_the_narrower_model_saves_and_loads_with_transformers(name, settings, tmp_path):
    """Grouped queries in all; tied tables, biases, norms of queries and keys, 1 + gamma."""
    net, batch = made(name, **settings)
    with torch.no_grad():                            # no norm at its start, none like another
        for n, p in net.named_parameters():
            if "norm" in n:
                p.add_(torch.randn_like(p) * 0.3)
    base = copy.deepcopy(net.state_dict())
    config = net.config.to_dict() | {"dtype": None}          # save_pretrained names it
    tuned = trained(net, batch)
    want = net(**batch).logits
    small = tuned.shrink()
    assert small.config.hidden_size == 24 and small.config.head_dim == 8
    assert {tuple(p.shape)[-1] for n, p in small.named_parameters() if "q_proj.weight" in n} == {24}
    torch.testing.assert_close(small(**batch).logits, want, rtol=1e-4, atol=1e-6)
    small.save_pretrained(tmp_path / "small")
    again = type(small).from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(again(**batch).logits, want, rtol=1e-4, atol=1e-6)
    tied = settings.get("tie_word_embeddings", name == "Gemma")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    tuned.unmerge()
    assert torch.equal(net(**batch).logits, want)
    assert net.config.to_dict() | {"dtype": None} == config
    tuned.detach()
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_what_modules_say_of_themselves_follows(tied):
    net, batch = tiny("llama", tie_word_embeddings=tied)
    small = trained(net, batch).shrink()
    for m in small.modules():
        assert getattr(m, "hidden_size", 24) == 24
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        if isinstance(m, nn.Embedding):
            assert m.embedding_dim == 24


def test_a_scale_of_the_width_is_of_the_width_that_is_left():
    net, batch = made("Gemma", head_dim=8)
    tuned = trained(net, batch, steps=2)
    table = net.model.embed_tokens
    for hidden, do in ((32, lambda: None), (24, tuned.shrink), (32, tuned.unmerge)):
        do()
        assert float(table.embed_scale) == pytest.approx(hidden**0.5)
        assert table.scalar_embed_scale == pytest.approx(hidden**0.5)


def test_a_narrower_model_that_trains_on():
    net, batch = tiny("llama")
    small = trained(net, batch).shrink()
    again = burnish.tune(copy.deepcopy(small), "lora(rank=4)")
    again.optimizer(lr=1e-2)
    losses = [float(again.step(batch)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_units_and_channels_leave_together(tmp_path):
    """Heads and inner channels by LoRAPrune, the stream by PAT: one smaller model."""
    net, batch = tiny("llama")
    tuned = trained(net, batch, "loraprune(rank=4, every=1, spare=0) + pat(rank=4)")
    want = net(**batch).logits
    small = tuned.shrink()
    c = small.config
    assert (c.hidden_size, c.num_key_value_heads, c.intermediate_size, c.head_dim) == (24, 1, 24, 8)
    torch.testing.assert_close(small(**batch).logits, want, rtol=1e-4, atol=1e-6)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, want, rtol=1e-4, atol=1e-6)


def test_a_norm_of_torch_itself():
    """nn.RMSNorm says its shape, a plain module has no config."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(16), nn.RMSNorm(16)
            self.attn = nn.Module()
            for n in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self.attn, n, nn.Linear(16, 16))
            self.attn.num_heads = 2
            self.mlp = nn.Module()
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            a, h = self.attn, self.norm1(x)
            q, k, v = (p(h) for p in (a.q_proj, a.k_proj, a.v_proj))
            x = x + a.o_proj(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
            return x + self.mlp.fc2(torch.relu(self.mlp.fc1(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 16)
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 3)

        def forward(self, x):
            h = self.embed(x)
            for block in self.layers:
                h = block(h)
            return self.head(self.norm(h))

    net, x = Net(), torch.arange(8).view(2, 4)
    tuned = stir(burnish.tune(net, "pat(rank=2, ratio=0.3)", head=False))
    mask = mask_of(tuned)
    mask.settle(11)
    want = net(x)
    small = tuned.shrink(ragged=True)
    torch.testing.assert_close(small(x), want, rtol=1e-4, atol=1e-6)
    assert small.norm.normalized_shape == (11,) and small.head.in_features == 11


def test_bf16_is_as_close_as_bf16_is():
    net, batch = tiny("llama", dtype=torch.bfloat16)
    tuned = trained(net, batch)
    want = net(**batch).logits.float()
    small = tuned.shrink()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    off = (small(**batch).logits.float() - want).abs().max() / want.abs().max()
    assert off < 0.03


# -- before the end -------------------------------------------------------------------------------
def test_a_mask_that_is_still_soft_merges_where_nothing_is_tied():
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net, "pat(rank=4)", head=False))
    mask_of(tuned).kappa.fill_(2)
    net.eval()
    want = net(**batch).logits
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-6)


def test_behind_a_tied_table_it_merges_once_it_is_settled():
    net, batch = tiny("llama", tie_word_embeddings=True)
    tuned = stir(burnish.tune(net, "pat(rank=4)", head=False))
    net.eval()
    with pytest.raises(CheckError, match="embedding is tied to the head.*untie"):
        tuned.merge()
    mask_of(tuned).settle(24)
    want = net(**batch).logits
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-6)


def test_behind_a_tied_table_stands_the_mask_alone():
    net, _ = tiny("llama", tie_word_embeddings=True)
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    at = {p: sorted(n for n, _ in h.named_parameters()) for p, h in tuned.branches(Hybrid)}
    assert at.pop("model.embed_tokens") == ["mask.m"]
    assert set(map(tuple, at.values())) == {("A", "B", "v")}


def test_files_answer_as_the_model_did(tmp_path):
    net, batch = tiny("llama")
    tuned = trained(net, batch)
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    assert torch.equal(other.eval()(**batch).logits, want)


def test_one_tensor_a_site_waits_for_backward(kept):
    """x, and not what it becomes: against sites without any rank, nothing more is kept."""
    net, batch = tiny("llama")
    sites, tokens = 5, batch["input_ids"].numel()
    bytes_ = {}
    for rank in (2, 16):
        tuned = burnish.tune(tiny("llama")[0], f"pat(rank={rank})", head=False)
        tuned.optimizer(lr=1e-3)
        bytes_[rank] = kept(tuned, batch)
    assert bytes_[16] - bytes_[2] < sites * tokens * 14          # a fourth of R numbers a token


# -- who can --------------------------------------------------------------------------------------
def test_the_width_is_one_that_the_config_takes():
    """Of a Llama a multiple of its heads; of others what the share says."""
    net, _ = made("Llama", hidden_size=40, num_attention_heads=8, head_dim=4)
    assert taken(Anatomy.of(net), 30) == 24
    assert taken(Anatomy.of(net), 7) == 0
    assert burnish.parse("pat(rank=4)")[0].keep(Anatomy.of(net))[1] == 24
    with pytest.raises(burnish.RecipeError, match=r"ratio=0.9\): the model's config takes no"):
        burnish.tune(net, "pat(rank=4, ratio=0.9)")
    assert taken(Anatomy.of(made("Qwen3", head_dim=8)[0]), 29) == 29
    assert burnish.parse("pat(rank=4, ratio=0.1)")[0].keep(
        Anatomy.of(made("Mistral", hidden_size=30, head_dim=8)[0]))[1] == 27


@pytest.mark.parametrize("make, why", [
    (lambda: tiny("gpt2")[0], "ln_1 .LayerNorm. subtracts a mean or adds a shift"),
    (lambda: tiny("bert")[0], "one norm before each"),
    (lambda: tiny("t5")[0], "several stacks"),
    (lambda: tiny("mixtral")[0], "mlp.gate.weight .4 x 32, linear. is in no known way"),
    (lambda: tiny("mlp")[0], "no blocks"),
    (lambda: made("Cohere", use_qk_norm=False)[0], "one norm before each"),
    (lambda: made("Gemma2", head_dim=8)[0], "one norm before each"),
    (lambda: made("Olmo2")[0], "one norm before each"),
    (lambda: made("Olmo")[0], "subtracts a mean|one norm before each")])
def test_models_whose_channels_cannot_be_taken_out_are_refused(make, why):
    net = make()
    assert isinstance(stream(Anatomy.of(net)), str)
    with pytest.raises(burnish.RecipeError, match=f"pat: this model.*{why}"):
        burnish.tune(net, "pat(rank=4)")


def test_a_norm_that_subtracts_is_found_by_what_it_answers():
    net, _ = made("Llama")

    class CentredRMSNorm(type(net.model.norm)):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    net.model.norm.__class__ = CentredRMSNorm
    with pytest.raises(burnish.RecipeError, match="model.norm .CentredRMSNorm. subtracts a mean"):
        burnish.tune(net, "pat(rank=4)")


def test_a_parameter_that_nobody_knows_is_refused():
    net, _ = made("Llama")
    net.model.register_parameter("soft", nn.Parameter(torch.zeros(3, 32)))
    with pytest.raises(burnish.RecipeError, match="model.soft is in no known way"):
        burnish.tune(net, "pat(rank=4)")


def test_a_table_that_two_read_is_refused():
    net, _ = made("Llama")
    net.model.second = nn.Embedding(64, 32)
    net.model.second.weight = net.model.embed_tokens.weight
    with pytest.raises(burnish.RecipeError, match="second.weight is one with"):
        burnish.tune(net, "pat(rank=4)")


def test_a_config_without_the_words_is_refused_with_the_way_out():
    """Phi-3 takes the width of its heads from the hidden size."""
    net, batch = made("Phi3")
    tuned = trained(net, batch)
    want = net(**batch).logits
    with pytest.raises(CheckError, match="Phi3Config has no words.*ragged=True"):
        tuned.shrink()
    assert torch.equal(net(**batch).logits, want)
    torch.testing.assert_close(tuned.shrink(ragged=True)(**batch).logits, want, rtol=1e-4,
                               atol=1e-6)


def test_the_stream_of_a_llama():
    found = stream(Anatomy.of(tiny("llama")[0]))
    assert isinstance(found, Stream) and found.width == 32 and not found.tied
    assert [p.role for p in found.tables] == ["embed"]
    assert [p.role for p in found.writers] == ["o", "down"] * 2
    assert [p.role for p in found.readers] == ["q", "k", "v", "gate", "up"] * 2 + ["head"]
    assert len(found.norms) == 5 and found.final == ("model.norm",)


# -- settings -------------------------------------------------------------------------------------
def test_the_count_on_llama(published):
    anatomy, _ = published("LlamaConfig", "LlamaForCausalLM")
    found, keep = burnish.parse("pat")[0].keep(anatomy)
    sites = len(found.tables) + len(found.writers)
    assert (sites, keep) == (65, 3072)
    assert burnish.parse("pat")[0].count(4096, sites) == 65 * (2 * 200 * 4096 + 4096) + 4096
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "pat(rank=4)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == \
        burnish.parse("pat(rank=4)")[0].count(32, 5)


def test_defaults_are_the_published_ones():
    assert burnish.parse("pat")[0].settings() == {
        "targets": None, "rank": 200, "ratio": 0.25, "search": 0.8, "weight": 10.0, "ortho": 1.0}


def test_decay_leaves_the_mask_and_v_alone():
    tuned = burnish.tune(tiny("llama")[0], "pat(rank=4)", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    names = {p: n.rpartition(".")[2] for n, p in tuned.named_parameters()}
    decay = {names[p]: g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    assert decay == {"A": 0.5, "B": 0.5, "v": 0.0, "m": 0.0}


@pytest.mark.parametrize("settings", ["rank=1", "ratio=0.001", "ratio=0.999", "search=0.001",
                                      "search=1.0"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"pat({settings})")


@pytest.mark.parametrize("settings", ["rank=0", "ratio=0.0", "ratio=1.0", "search=0.0",
                                      "search=1.01"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^pat"):
        burnish.parse(f"pat({settings})")


def test_a_rank_above_the_stream_is_refused():
    with pytest.raises(burnish.RecipeError, match=r"pat\(rank=33\): the stream has 32 channels"):
        burnish.tune(tiny("llama")[0], "pat(rank=33)")
    burnish.tune(tiny("llama")[0], "pat(rank=32)")


def test_one_stream_has_one_mask():
    with pytest.raises(burnish.RecipeError, match="the width of the residual stream"):
        burnish.parse("pat + pat(rank=4)")
