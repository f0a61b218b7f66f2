"""aLoRA: an update that counts from the tokens on that call for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.weight.invoked import Invoked, counted
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.testing import stir, tiny

F64 = torch.float64
CALL = (57, 52)
SMALL = "alora(rank=3, alpha=6, invocation=(57, 52){})"


def made(more="", model="llama", **kw):
    net, batch = tiny(model, dtype=F64, batch=3)
    ids = batch["input_ids"] % 50                    # none of the tokens by chance
    ids[0, 2:4] = ids[1, 1:3] = ids[1, 5:7] = torch.tensor(CALL)
    ids[2, 4] = CALL[0]
    tuned = burnish.tune(net, SMALL.format(more), head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.5), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


#: the first token that counts of each sample
STARTS = (2, 5, None)


def test_which_tokens_count():
    ids = torch.tensor([[1, 2, 3, 1, 2], [2, 1, 3, 3, 1], [0, 0, 0, 1, 2], [1, 2, 1, 2, 0]])
    assert counted(ids, (1, 2)).tolist() == [2, 0, 2, 3]
    assert counted(ids, (1,)).tolist() == [2, 1, 2, 3]
    assert counted(ids, (1, 2, 3, 1, 2)).tolist() == [5, 0, 0, 0]
    assert counted(ids, (1, 2, 3, 1, 2, 3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_equation_written_out(model):
    tuned, batch = made(model=model)
    mine = dict(tuned.branches(Invoked))
    base = tiny(model, dtype=F64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            x, rows = args[0], []
            for i, start in enumerate(STARTS):
                y = F.linear(F.linear(x[i], m.A), m.B) * 2.0
                before = x.shape[1] if start is None else start
                rows.append(torch.cat([torch.zeros_like(y[:before]), y[before:]]))
            return out + torch.stack(rows)
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
    want, got = base(**batch).logits, tuned.model(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n
    with tuned.disabled():
        off = tuned.model(**batch).logits
    torch.testing.assert_close(got[2], off[2])
    torch.testing.assert_close(got[0, :2], off[0, :2])
    assert (got[0, 2:] - off[0, 2:]).abs().amin(0).max() > 1e-3


def test_token_by_token_from_a_cache_is_the_whole_text():
    tuned, batch = made()
    ids = batch["input_ids"]
    with torch.no_grad():
        whole = tuned.model(**batch).logits
        for cuts, same in ((range(4, 8), [0, 2]), ([5], [0, 2]), ([7], [0, 1, 2])):
            out, got, at = None, [], 0
            for to in [*cuts, ids.shape[1]]:
                out = tuned.model(input_ids=ids[:, at:to], use_cache=True,
                                  past_key_values=None if out is None else out.past_key_values)
                got.append(out.logits)
                at = to
            torch.testing.assert_close(torch.cat(got, 1)[same], whole[same])


def test_a_later_piece_of_text_calls_for_it_as_well():
    tuned, batch = made()
    ids = batch["input_ids"][2:]                     # the first piece does not have the tokens
    more = torch.tensor([[7, *CALL, 9]])
    with torch.no_grad():
        whole = tuned.model(input_ids=torch.cat([ids, more], 1)).logits
        first = tuned.model(input_ids=ids, use_cache=True)
        behind = tuned.model(input_ids=more, past_key_values=first.past_key_values)
    torch.testing.assert_close(behind.logits, whole[:, ids.shape[1]:])


def test_the_bases_cache_serves():
    """The text before the tokens has the base's keys and values."""
    tuned, batch = made()
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        whole = tuned.model(input_ids=ids).logits
        with tuned.disabled():
            before = tuned.model(input_ids=ids[:, :2], use_cache=True)
        behind = tuned.model(input_ids=ids[:, 2:], past_key_values=before.past_key_values)
    torch.testing.assert_close(behind.logits, whole[:, 2:])


@pytest.mark.parametrize("model, beams", [("llama", 1), ("llama", 3), ("gpt2", 1), ("mamba", 1)])
def test_it_writes_on(model, beams):
    """Greedy steps are those of the whole text asked again; beams have their samples' tokens, and
    a scan's state says which count as a cache does."""
    tuned, batch = made(model=model)
    ids = batch["input_ids"]
    made_on = tuned.model.generate(**batch, max_new_tokens=4, num_beams=beams, do_sample=False,
                                   pad_token_id=0, eos_token_id=None)
    assert made_on.shape == (3, ids.shape[1] + 4)
    with torch.no_grad():
        for step in range(4 if beams == 1 else 0):
            text = made_on[:, : ids.shape[1] + step]
            logits = tuned.model(input_ids=text).logits[:, -1]
            assert torch.equal(logits.argmax(-1), made_on[:, ids.shape[1] + step])


def test_each_sample_its_own_adapter():
    tuned, batch = made()
    tuned.add("other", "alora(rank=2, invocation=(57,))", head=False)
    tuned.model.double()
    with torch.no_grad():
        for n, p in tuned.model.named_parameters():
            if ".other." in n:
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        each = {}
        for name in ("default", "other"):
            tuned.use(name)
            each[name] = tuned.model(**batch).logits
        with tuned.disabled():
            each[None] = tuned.model(**batch).logits
        tuned.use(["default", None, "other"])
        got = tuned.model(**batch).logits
    for i, name in enumerate(["default", None, "other"]):
        torch.testing.assert_close(got[i], each[name][i])
    assert not torch.allclose(each["default"][0], each["other"][0])


def test_checkpointed_blocks_count_the_same_tokens():
    grads = []
    for recipe in ("", " + checkpoint"):
        net, _ = tiny("llama", dtype=F64, batch=3)
        tuned = burnish.tune(net, SMALL.format("") + recipe, head=False)
        net.double().train()
        stir(tuned, size=0.5)
        _, batch = made()
        out = net(**batch).logits
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out)).sum()
        grads.append(torch.autograd.grad(loss, list(tuned.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_in_front_of_a_text_move_nothing():
    net, _ = tiny("llama", dtype=F64, batch=3)
    tuned = burnish.tune(net, SMALL.format("") + " + prompt_tuning(length=2)", head=False)
    net.double().eval()
    stir(tuned, size=0.5)
    _, batch = made()
    with torch.no_grad():
        with_it = net(**batch).logits
        for _, m in tuned.branches(Invoked):
            m.B.zero_()
        without = net(**batch).logits
    torch.testing.assert_close(with_it[2], without[2])
    torch.testing.assert_close(with_it[0, :2], without[0, :2])
    assert not torch.allclose(with_it[0, 2], without[0, 2])


def test_start_count_and_defaults():
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "alora(invocation=(3,), rank=4)", head=False)
    assert torch.equal(net(**batch).logits, want)
    for _, m in tuned.branches(Invoked):
        bound = m.A.shape[1] ** -0.5
        assert not m.B.any() and 0.8 * bound < float(m.A.detach().abs().max()) <= bound
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}
    (m,) = burnish.parse("alora(invocation=(3,))")
    assert m.count(Place("a", "weight", "linear", 4096, 11008)) == 32 * 15104
    assert m.settings() == {"targets": None, "invocation": (3,), "rank": 32, "alpha": 32.0,
                            "dropout": 0.0}


@pytest.mark.parametrize("model, recipe, words", [
    ("llama", "alora", "needs the token ids that call for it"),
    ("llama", "alora(invocation=(-1,))", "expected token ids"),
    ("llama", "alora(invocation=(3,), dropout=1.0)", "a probability"),
    ("llama", "alora(invocation=(3,), rank=64)", "rank 64 does not fit"),
    ("mixtral", "alora(invocation=(3,), targets='experts')", "of kind experts|given the tokens"),
    ("vit", "alora(invocation=(3,))", "alora needs"),
    ("t5", "alora(invocation=(3,))", "alora needs")])
def test_what_cannot_be_is_refused(model, recipe, words):
    with pytest.raises(burnish.BurnishError, match=words):
        burnish.tune(tiny(model)[0], recipe, head=False)


def test_targets_and_the_first_token_id():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "alora(rank=2, invocation=(0,), targets='q@0,up@1')", head=False)
    assert [path for path, _ in tuned.branches(Invoked)] == ["model.layers.0.self_attn.q_proj",
                                                             "model.layers.1.mlp.up_proj"]
    stir(tuned, size=0.5)
    ids = batch["input_ids"].clamp(min=1)
    ids[0, 3] = 0
    on = net.eval()(input_ids=ids).logits
    with tuned.disabled():
        off = net(input_ids=ids).logits
    moved = (on - off).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False] * 3 + [True] * (ids.shape[1] - 3) and not moved[1].any()


class Routed(torch.nn.Module):
    """An MLP that is the only one of its experts."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp])

    def forward(self, x):
        return self.experts[0](x)


def test_experts_that_are_given_the_tokens_of_all_samples_are_none_of_its_linears():
    def net():
        net, _ = tiny("llama")
        net.model.layers[0].mlp = Routed(net.model.layers[0].mlp)
        return net

    tuned = burnish.tune(net(), "alora(rank=2, invocation=(3,))", head=False)
    paths = [path for path, _ in tuned.branches(Invoked)]
    assert not [p for p in paths if ".experts." in p]
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} < set(paths)
    with pytest.raises(burnish.TargetError, match="given the tokens of all samples together"):
        burnish.tune(net(), "alora(rank=2, invocation=(3,), targets='up')", head=False)


def test_embeddings_in_place_of_ids_are_refused():
    tuned, batch = made()
    table = tuned.model.get_input_embeddings()
    with pytest.raises(RecipeError, match="give input_ids"):
        tuned.model(inputs_embeds=table(batch["input_ids"]))


def test_a_single_token_calls_for_it_whoever_wrote_it():
    """Several have to come in one piece."""
    for call, counts in (((57,), True), (CALL, False)):
        net, _ = tiny("llama", dtype=F64)
        tuned = burnish.tune(net, f"alora(rank=3, alpha=6, invocation={call})", head=False)
        net.double().eval()
        stir(tuned, size=0.5)
        with torch.no_grad():
            out = net(input_ids=torch.tensor([[3, 4]]), use_cache=True)
            for token in call:
                out = net(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values,
                          use_cache=True)
            with tuned.disabled():
                base = net(input_ids=torch.tensor([[3, 4, *call]])).logits[:, -1:]
        assert torch.allclose(out.logits, base) is not counts
