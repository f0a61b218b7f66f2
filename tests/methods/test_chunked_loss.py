"""chunked_loss: models of transformers and hand-written ones against themselves without it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape.unmade import Logits
from burnish.core.errors import RecipeError
from burnish.memory import measure, simulate
from burnish.testing.models import tiny

WORDS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 32}
#: models with a form of their own between head and loss
FAMILIES = {
    "Gemma2": {**WORDS, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": {**WORDS, "num_key_value_heads": 2, "logit_scale": 0.3},
    "Granite": {**WORDS, "num_key_value_heads": 2, "logits_scaling": 4.0},
    "Bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0,
             "decoder_start_token_id": 1},
    "Bert": WORDS, "Roberta": WORDS, "DistilBert": {"vocab_size": 64, "dim": 32, "n_layers": 1,
                                                    "n_heads": 4, "hidden_dim": 48},
}
KINDS = {"Bart": "BartForConditionalGeneration", "Bert": "BertForMaskedLM",
         "Roberta": "RobertaForMaskedLM", "DistilBert": "DistilBertForMaskedLM"}


def family(name: str) -> tuple[nn.Module, dict]:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    model = getattr(transformers, KINDS.get(name, f"{name}ForCausalLM"))(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-1, 1, 64)[None])
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, ::3] = -100
    return model, {"input_ids": ids, "labels": labels}


def step(model: nn.Module, batch: dict, recipe: str, **kw):
    """(loss, gradients, tuned) with whatever starts at zero moved off it."""
    tuned = burnish.tune(copy.deepcopy(model), recipe, seed=3, **kw)
    with torch.no_grad():
        for k, p in enumerate(tuned.parameters()):
            if ".burnish." in list(dict(tuned.named_parameters()))[k]:
                p.add_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).view(p.shape))
    tuned.model.eval()
    loss = tuned.loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in tuned.named_parameters()}, tuned


def whole(tuned) -> bool:
    """Did the loss leave the logits unmade?"""
    heads = [m for m in tuned.model.modules() if type(m).__name__ == "Rows"]
    return not heads or any(m.made != m.taken or not m.made for m in heads)


def same(model, batch, recipe, chunk=5, **kw) -> None:
    loss, grads, _ = step(model, batch, recipe, **kw)
    mine, got, tuned = step(model, batch, f"{recipe} + chunked_loss(chunk={chunk})", **kw)
    assert not whole(tuned)
    torch.testing.assert_close(mine, loss, rtol=2e-6, atol=2e-6)
    top = max(float(g.abs().max()) for g in grads.values() if g is not None)
    assert grads.keys() == got.keys()
    for n, g in grads.items():
        if g is not None:
            assert float((got[n] - g).abs().max()) <= 5e-6 * top, n


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_a_form_of_their_own_between_head_and_loss(name):
    model, batch = family(name)
    for recipe in ("lora(rank=2)", "full"):
        same(model, batch, recipe)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper", "mamba"])
def test_the_zoo_of_language_models(name):
    model, batch = tiny(name)
    same(model, batch, "lora(rank=2)")


@pytest.mark.parametrize("head", ["lora(rank=2, targets='lm_head')",
                                  "dora(rank=2, targets='lm_head')",
                                  "nf4 + lora(rank=2, targets='lm_head')",
                                  "nf4 + lora(rank=2, targets='q_proj')",
                                  "snell(targets='lm_head')", "full", "linear_probe"])
def test_every_term_on_the_head_has_its_gradient(head):
    model, batch = tiny("llama")
    same(model, batch, head, head=True)


def test_a_tied_head_has_the_sum_of_both_gradients():
    model, batch = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    same(model, batch, "full")


@pytest.mark.parametrize("beside", ["checkpoint", "lean(on=False)", "checkpoint(every=2)", "coded",
                                    "offload(to='disk', threshold=1)"])
def test_beside_the_other_ways_to_keep_less(beside):
    model, batch = tiny("llama")
    if beside == "coded":                            # estimates: the loss is exact
        a, _, _ = step(model, batch, f"lora(rank=2) + {beside}")
        b, _, tuned = step(model, batch, f"lora(rank=2) + {beside} + chunked_loss")
        torch.testing.assert_close(a, b)
        assert not whole(tuned)
    else:
        same(model, batch, f"lora(rank=2) + {beside}")


def test_a_step_inside_backward_and_zeroth_order_ones_do_the_same():
    for recipe in ("full + sgd + step_in_backward", "lora(rank=2) + mezo"):
        ends = []
        for more in ("", " + chunked_loss(chunk=4)"):
            model, batch = tiny("llama")
            tuned = burnish.tune(model, recipe + more, seed=1)
            tuned.optimizer(lr=1e-2)
            losses = [float(tuned.step(batch)) for _ in range(3)]
            ends.append((losses, [p.detach().clone() for p in tuned.parameters()]))
        assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-4)
        for a, b in zip(ends[0][1], ends[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_multiplies_and_rounds_as_without_it():
    model, batch = tiny("llama")
    for recipe in ("lora(rank=2)", "full", "lora(rank=2, targets='lm_head')"):
        with torch.autocast("cpu", torch.bfloat16):
            loss, grads, _ = step(model, batch, recipe)
            mine, got, tuned = step(model, batch, recipe + " + chunked_loss(chunk=5)")
            assert tuned.model(**batch).logits.dtype == torch.bfloat16
        assert not whole(tuned)
        torch.testing.assert_close(mine, loss, rtol=1e-4, atol=1e-4)
        top = max(float(g.abs().max()) for g in grads.values())
        for n, g in grads.items():
            assert got[n].dtype == g.dtype and float((got[n] - g).abs().max()) <= 0.02 * top


def test_whole_sums_are_divided_by_the_items_of_all_micro_batches():
    model, batch = tiny("llama")
    tuned = burnish.tune(model, "lora(rank=2) + chunked_loss(chunk=4)")
    n = int((batch["labels"][:, 1:] != -100).sum())
    mean = float(tuned.loss(batch).detach())
    assert float(tuned.loss({**batch, "num_items_in_batch": torch.tensor(4 * n)}).detach()) \
        == pytest.approx(mean / 4, rel=1e-5)


class Written(nn.Module):
    """A language model by hand, whose loop makes the loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 40)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def test_a_model_by_hand_and_a_loss_in_its_loop():
    torch.manual_seed(0)
    net, ids = Written(), torch.arange(24).view(2, 12)
    found = []
    for more in ("", " + chunked_loss(chunk=5)"):
        tuned = burnish.tune(copy.deepcopy(net), "lora(rank=2, targets='body.0') + sgd" + more)
        z = tuned.model(ids)
        assert isinstance(z, Logits) == bool(more)
        F.cross_entropy(z[:, :-1].reshape(-1, 40), ids[:, 1:].reshape(-1)).backward()
        found.append([p.grad for p in tuned.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_logits_are_there_for_whoever_reads_them():
    model, batch = tiny("llama")
    tuned = burnish.tune(copy.deepcopy(model), "lora(rank=2) + chunked_loss")
    plain = burnish.tune(model, "lora(rank=2)")
    with torch.no_grad():
        got, want = tuned.model(**batch), plain.model(**batch)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits.softmax(-1), want.logits.softmax(-1))
    with tuned.disabled():
        assert type(tuned.model(**batch).logits) is torch.Tensor
    ids = batch["input_ids"][:1, :3]
    tuned.model.eval(), plain.model.eval()
    made = [t.model.generate(ids, max_new_tokens=4, do_sample=False) for t in (tuned, plain)]
    assert torch.equal(*made)


def test_distillation_reads_them_and_the_sum_is_the_plain_one():
    model, batch = tiny("llama")
    ends = []
    for more in ("", " + chunked_loss(chunk=5)"):
        tuned = burnish.tune(copy.deepcopy(model), "lora(rank=2) + distill(weight=2.0)" + more)
        tuned.optimizer(lr=0.05)
        ends.append([float(tuned.step(batch)) for _ in range(3)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_a_loss_that_reads_all_logits_is_told_once_that_nothing_is_saved():
    model, batch = tiny("llama")
    tuned = burnish.tune(model, "lora(rank=2) + chunked_loss")
    tuned.optimizer(lr=1e-3)
    bare = {"input_ids": batch["input_ids"]}
    with pytest.warns(UserWarning, match="chunked_loss saves nothing here: whole logits were read"):
        tuned.step(bare, lambda out, b: out.logits.square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.step(bare, lambda out, b: out.logits.square().mean())
        tuned.step(batch)


def test_a_head_that_never_runs_is_told_too():
    class Past(Written):
        def forward(self, ids):
            return self.body(self.embed(ids)) @ self.head.weight.t()

    tuned = burnish.tune(Past(), "lora(rank=2, targets='body.0') + chunked_loss")
    tuned.optimizer(lr=1e-3)
    ids = torch.arange(8).view(1, 8)
    with pytest.warns(UserWarning, match="the model never ran its head by itself"):
        tuned.step((ids, ids), lambda z, b: F.cross_entropy(z.view(-1, 40), b[1].view(-1)))


@pytest.mark.parametrize("model", ["vit", "bert", "mlp", "clip"])
def test_a_model_without_a_vocabulary_is_refused(model):
    net, _ = tiny(model)
    with pytest.raises(RecipeError, match="chunked_loss needs a linear head over a vocabulary"):
        burnish.tune(net, "full + chunked_loss")


def test_what_would_draw_once_for_all_rows_is_refused_on_the_head():
    net, _ = tiny("llama")
    with pytest.raises(RecipeError, match="lm_head in chunks, and lora drops at random there"):
        burnish.tune(net, "lora(rank=2, targets='lm_head', dropout=0.1) + chunked_loss")
    with pytest.raises(RecipeError, match=r"chunked_loss\(chunk=0\): 1 token or more"):
        burnish.tune(net, "full + chunked_loss(chunk=0)")


def test_switched_off_it_leaves_the_model_alone():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + chunked_loss(on=False)")
    assert type(tuned.model(**batch).logits) is torch.Tensor and not tuned.state.tape.beside
    tuned.detach()
    tuned = burnish.tune(net, "lora(rank=2) + chunked_loss")
    assert type(tuned.model(**batch).logits) is Logits
    tuned.detach()
    assert type(net(**batch).logits) is torch.Tensor


def test_a_head_that_changed_before_its_logits_were_read_is_an_error():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "full + chunked_loss", head=True)
    tuned.optimizer(lr=1e-3)
    out = tuned.model(**batch)
    out.loss.backward()
    tuned.current_optimizer.step()
    with pytest.raises(RuntimeError, match="head or its input has changed"):
        out.logits.softmax(-1)


def test_a_frozen_head_that_is_written_to_counts_as_changed():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + chunked_loss")
    out = tuned.model(**batch)
    with torch.no_grad():
        net.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="head or its input has changed"):
        out.logits.softmax(-1)


def test_a_head_of_another_precision_than_its_input_fails_as_without_it():
    torch.manual_seed(0)
    for more in ("", " + chunked_loss"):
        net = Written()
        net.head.to(torch.bfloat16)
        tuned = burnish.tune(net, "lora(rank=2, targets='body.0')" + more)
        with pytest.raises(RuntimeError, match="dtype"):
            F.cross_entropy(tuned.model(torch.arange(4)[None])[0], torch.arange(4))
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(tuned.model(torch.arange(4)[None]), Logits) == bool(more)


def test_under_torch_func_logits_are_whole():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + chunked_loss")
    params = {n: p.detach() for n, p in tuned.named_parameters()}

    def loss(p):
        return torch.func.functional_call(tuned.model, p, (), batch).loss

    got = torch.func.grad(loss)(params)
    tuned.loss(batch).backward()
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(got[n], p.grad)


@pytest.mark.parametrize("dtype, each", [(torch.float32, 4), (torch.bfloat16, 6)])
def test_memory_grows_by_one_chunk_of_logits_in_the_promise_and_in_the_run(dtype, each):
    """The form in the docstring: of two chunks so large that the loss is the peak, the difference
    in bytes is that in rows x words x (4 or 6)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = 6000
    config = LlamaConfig(**{**WORDS, "vocab_size": words, "max_position_embeddings": 130})
    model = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(3, words, (4, 128))
    batch = {"input_ids": ids, "labels": ids}
    peaks = {}
    for chunk in (128, 256):
        recipe = f"lora(rank=2) + checkpoint + chunked_loss(chunk={chunk})"
        promise = simulate(model, recipe, batch)
        truth = measure(burnish.tune(copy.deepcopy(model), recipe), batch)
        assert abs(promise.peak_bytes / truth.peak_bytes - 1) < 0.01
        peaks[chunk] = promise.peak_bytes
    per = (peaks[256] - peaks[128]) / (128 * words)
    assert per == pytest.approx(each, abs=0.1)
    plain = simulate(model, "lora(rank=2) + checkpoint", batch).peak_bytes
    assert plain - peaks[128] > 8 * 4 * 127 * words - 128 * words * each


@pytest.mark.parametrize("part", ["chunked_loss", "offload(to='disk')"])
def test_what_only_decides_what_is_kept_is_no_part_of_a_file_for_others_nor_of_a_merge(
        part, tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"lora(rank=2) + {part}")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.05)
        want = tuned.model(**batch).logits + 0
    burnish.export_peft(tuned, tmp_path / "peft")
    tuned.save(tmp_path / "own")
    other = burnish.load(copy.deepcopy(base), tmp_path / "own")
    theirs = burnish.load_peft(base, tmp_path / "peft")
    merged = tuned.merge()
    with torch.no_grad():
        for model in (other.model, theirs.model, merged):
            torch.testing.assert_close(model(**batch).logits + 0, want, rtol=1e-4, atol=1e-5)
    assert type(merged(**batch).logits) is torch.Tensor


def test_a_compiled_model_runs_uncompiled_and_says_why():
    net, batch = tiny("llama")
    burnish.tune(net, "lora(rank=2) + chunked_loss", targets="q,v")
    with pytest.warns(UserWarning, match="uncompiled, since the loss takes the head's logits"):
        torch.compile(net, backend="eager")(**batch)


def test_left_out_it_has_nothing_to_say():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + chunked_loss(on=False)", targets="q,v")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            tuned.step(batch)
    assert not isinstance(net(**batch).logits, Logits)
