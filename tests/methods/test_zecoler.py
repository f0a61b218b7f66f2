"""Zecoler: the encoder against torch's LSTM, its rows in a text and in front of one, its file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.pseudo import PromptEncoder
from burnish.core.recipe import parse
from burnish.testing.models import tiny

MARK = 9                                                     # the placeholder


def text(batch):
    """Two samples with three placeholders each, in other places."""
    ids = batch["input_ids"].clone()
    ids[ids == MARK] = 10
    for row, places in enumerate([(0, 2, 5), (1, 2, 6)]):
        ids[row, list(places)] = MARK
    return {**batch, "input_ids": ids}


def joined(model="bert", recipe=f"zecoler(length=3, placeholder={MARK})", **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, recipe, head=False)
    g = torch.Generator().manual_seed(5)
    for n, p in net.named_parameters():
        if ".burnish." in f".{n}":
            p.data = p.data.double() + 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return tuned, text(batch), base


def theta(tuned):
    """name below the part -> a leaf with its value."""
    return {n.partition(".burnish.default.zecoler.")[2].removeprefix("maker."):
            p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}


def rows(t, hidden):
    """torch's own LSTM of two layers in both directions, and the MLP."""
    if "layers.0.0.given" not in t:
        return t["rows"]
    lstm = nn.LSTM(t["rows"].shape[1], hidden, num_layers=2, bidirectional=True).double()
    given = {}
    for layer in (0, 1):
        for k, end in enumerate(("", "_reverse")):
            given[f"weight_ih_l{layer}{end}"] = t[f"layers.{layer}.{k}.given"]
            given[f"weight_hh_l{layer}{end}"] = t[f"layers.{layer}.{k}.state"]
            given[f"bias_ih_l{layer}{end}"] = t[f"layers.{layer}.{k}.bias"]
            given[f"bias_hh_l{layer}{end}"] = torch.zeros(4 * hidden, dtype=torch.float64)
    x, _ = torch.func.functional_call(lstm, given, (t["rows"],))
    x = torch.relu(x @ t["up.weight"].t() + t["up.bias"])
    return x @ t["out.weight"].t() + t["out.bias"]


def inside(base, batch, P):
    """The base's loss with P at the placeholders, put into its embeddings by hand."""
    def put(module, args, out):
        ids = args[0]
        out = out.clone()
        for b in range(len(ids)):
            k = 0
            for t in range(ids.shape[1]):
                if ids[b, t] == MARK:
                    out[b, t] = P[k]
                    k += 1
        return out

    reads = base.encoder if hasattr(base, "encoder") else base
    hook = reads.get_input_embeddings().register_forward_hook(put)
    try:
        return base(**batch).loss
    finally:
        hook.remove()


def compare(tuned, batch, want, t):
    got = tuned.loss(batch)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)       # some losses are fp32
    got.backward()
    wanted = torch.autograd.grad(want, list(t.values()))
    top = max(float(g.abs().max()) for g in wanted)
    for (n, p), g in zip(tuned.named_parameters(), wanted, strict=True):
        assert float(g.abs().max()) > 0, n
        assert float((p.grad - g).abs().max()) <= 1e-6 * top, n


@pytest.mark.parametrize("model", ["bert", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("more, hidden", [("", 32), (", hidden=5", 5), (", made_by='none'", 0)])
def test_in_the_text(model, more, hidden):
    tuned, batch, base = joined(model, f"zecoler(length=3, placeholder={MARK}{more})")
    t = theta(tuned)
    compare(tuned, batch, inside(base, batch, rows(t, hidden)), t)


@pytest.mark.parametrize("more, hidden", [("", 32), (", made_by='none'", 0)])
def test_in_front_it_is_a_prompt_of_these_rows(more, hidden):
    tuned, batch, base = joined("gpt2", f"zecoler(length=3{more})")
    t = theta(tuned)
    table = base.get_input_embeddings().weight
    x = torch.cat([rows(t, hidden).expand(2, -1, -1), table[batch["input_ids"]]], 1)
    labels = torch.cat([torch.full((2, 3), -100), batch["labels"]], 1)
    labels[:, 3] = -100                                      # nothing of the text said the first
    mask = batch.get("attention_mask")
    mask = None if mask is None else nn.functional.pad(mask, (3, 0), value=1)
    at = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    compare(tuned, batch, base(inputs_embeds=x, attention_mask=mask, labels=labels,
                               position_ids=at).loss, t)


@pytest.mark.parametrize("where", [f", placeholder={MARK}", ""])
def test_the_file_holds_what_the_encoder_made(where, tmp_path):
    tuned, batch, _ = joined("gpt2", f"zecoler(length=3{where})")
    tuned.model.eval()
    with torch.no_grad():
        want = tuned.model(**batch).logits
    made = rows(theta(tuned), 32)
    tuned.save(tmp_path)
    from safetensors.torch import load_file

    (held,) = load_file(tmp_path / "adapter_model.safetensors").values()
    torch.testing.assert_close(held, made.detach())
    net, _ = tiny("gpt2", dtype=torch.float64)
    again = burnish.load(net, tmp_path)
    assert again.recipe[0].made_by == "none"
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(**batch).logits, want)
    tuned.save(tmp_path / "whole", whole=True)
    whole = burnish.load(tiny("gpt2", dtype=torch.float64)[0], tmp_path / "whole")
    assert len(list(whole.parameters())) == len(list(tuned.parameters())) == 17


def test_a_mask_is_asked_for_a_word():
    """The loss of the paper: which of two words stands at the mask."""
    yes, no = 20, 21
    net, batch = tiny("gpt2")
    batch = text(batch)
    tuned = burnish.tune(net, f"zecoler(length=3, placeholder={MARK})", head=False)

    def loss(out, batch):
        return nn.functional.cross_entropy(out.logits[:, -1, [yes, no]], torch.tensor([1, 1]))

    tuned.optimizer(lr=2e-2)
    losses = [float(tuned.step({"input_ids": batch["input_ids"]}, loss)) for _ in range(60)]
    assert losses[-1] < 0.96 * losses[0]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_text_is_written_on_from_a_cache(model):
    """Steps behind the text have no placeholder: their words are those of a run without cache."""
    tuned, batch, _ = joined(model)
    net, made = tuned.model.eval(), []
    for cached in (True, False):
        made.append(net.generate(batch["input_ids"], max_new_tokens=4, do_sample=False,
                                 use_cache=cached, suppress_tokens=[MARK, 2], pad_token_id=0))
    assert torch.equal(*made) and made[0].shape[1] == batch["input_ids"].shape[1] + 4
    with pytest.raises(burnish.RecipeError, match="every sample needs 3 of it.*have 0"):
        net(input_ids=made[0][:, -1:])                   # a text of its own


def test_embeddings_in_place_of_ids_are_refused():
    for model in ("bert", "llama"):
        tuned, batch, _ = joined(model)
        x = tuned.model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(burnish.RecipeError, match="inputs_embeds has none: give input_ids"):
            tuned.model(inputs_embeds=x)
        with tuned.disabled():
            tuned.model(inputs_embeds=x)


def test_counts_at_codebert_s_width():
    made = PromptEncoder(768, 768)
    count = 7680 + sum(p.numel() for p in made.parameters())
    assert parse("zecoler")[0].count(768) == count == 10 * 768 + 8 * 768 * 1537 + 8 * 768 * 2305 \
        + 2 * 768 * 768 + 768 + 768 * 769
    assert parse("zecoler(made_by='none')")[0].count(768) == 7680
    small = PromptEncoder(6, 3)
    assert parse("zecoler(length=4, hidden=3)")[0].count(6) == \
        24 + sum(p.numel() for p in small.parameters())


def test_its_settings():
    made = parse("zecoler")[0]
    assert (made.length, made.hidden, made.made_by, made.placeholder) == (10, 0, "lstm", None)
    done = parse("zecoler(hidden=8, placeholder=3)")[0].finished()
    assert (done.made_by, done.hidden, done.placeholder, done.length) == ("none", 0, 3, 10)


def test_a_decoder_may_have_none_and_an_encoder_all_or_an_error():
    tuned, batch, _ = joined("t5")
    assert not (batch["labels"] == MARK).any()
    tuned.loss(batch)
    for places in ([0], [0, 1, 2, 3]):
        short = {**batch, "input_ids": batch["input_ids"].clone()}
        short["input_ids"][0] = 11
        short["input_ids"][0, places] = MARK
        with pytest.raises(burnish.RecipeError, match="every sample needs 3 of it, and here they "
                                                      f"have {min(3, len(places))}, "
                                                      f"{max(3, len(places))}"):
            tuned.loss(short)
    tuned, batch, _ = joined("bert")
    none = {**batch, "input_ids": torch.full_like(batch["input_ids"], 11)}
    with pytest.raises(burnish.RecipeError, match="here they have 0 .truncation must leave"):
        tuned.loss(none)


@pytest.mark.parametrize("model, recipe, says", [
    ("bert", "zecoler(length=0)", "at least one row"),
    ("bert", "zecoler(hidden=-1)", "a width of at least 0"),
    ("bert", "zecoler(hidden=4, made_by='none')", "leave one of them out"),
    ("bert", "zecoler(placeholder=64)", "from 0 to 63"),
    ("bert", "zecoler(placeholder=-1)", "expected 0 or more"),
    ("bert", "zecoler(targets='q')", "takes no targets"),
    ("vit", "zecoler(placeholder=3)", "takes inputs_embeds"),
    ("vit", "zecoler", "takes inputs_embeds")])
def test_what_cannot_act_is_refused(model, recipe, says):
    with pytest.raises(burnish.RecipeError, match=says):
        burnish.tune(tiny(model)[0], recipe)
