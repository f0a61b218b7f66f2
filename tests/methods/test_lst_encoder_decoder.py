"""LST beside encoder-decoders: two ladders, the decoder's reading the end of the encoder's; and the
start from squared gradients."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import burnish
from burnish.blocks.state.taps import Crown, Foot, Rung
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48, "max_position_embeddings": 32, "dropout": 0.0,
        "forced_eos_token_id": None}
#: model -> (encoder's blocks, decoder's, the encoder's last norm, the decoder's)
ENDS = {"t5": ("encoder.block", "decoder.block", "encoder.final_layer_norm",
               "decoder.final_layer_norm"),
        "whisper": ("model.encoder.layers", "model.decoder.layers", "model.encoder.layer_norm",
                    "model.decoder.layer_norm"),
        "bart": ("model.encoder.layers", "model.decoder.layers", None, None)}


def fresh(model, dtype=torch.float32):
    if model != "bart":
        return tiny(model, dtype=dtype)
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    net = BartForConditionalGeneration(BartConfig(**BART)).to(dtype)
    return net.train(), {"input_ids": torch.randint(3, 64, (2, 7)),
                         "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
                         "labels": torch.randint(3, 64, (2, 6))}


def make(model, recipe="lst(reduction=4)", dtype=torch.float64, **kw):
    net, batch = fresh(model, dtype)
    base = copy.deepcopy(net).requires_grad_(False).eval()
    tuned = burnish.tune(net, recipe, head=False, **kw)
    stir(tuned, size=0.2)
    return tuned, base, batch


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


# -- what it computes -----------------------------------------------------------------------------
class Seen:
    """What every block of a stock stack was given, by name, and what it returned."""

    def __init__(self, blocks):
        self.given, self.out = [], []
        for b in blocks:
            names = list(inspect.signature(b.forward).parameters)
            b.register_forward_pre_hook(
                lambda m, args, kw, names=names: self.given.append(
                    dict(zip(names, args, strict=False)) | kw), with_kwargs=True)
            b.register_forward_hook(lambda m, args, out: self.out.append(
                out[0] if isinstance(out, tuple) else out))


def climb(rungs, seen, encoded=None):
    """s <- g(w s + (1 - w) D h) from s = D_first h_0, written out over stock side blocks."""
    s, biases = rungs[0].first(seen.given[0]["hidden_states"]), (None, None)
    for r, given, h in zip(rungs, seen.given, seen.out, strict=True):
        if r.side is None:
            continue
        w = torch.sigmoid(r.gate.alpha / 0.1)
        kw = {"attention_mask": given.get("attention_mask"), "use_cache": False}
        if encoded is not None:
            kw |= {"encoder_hidden_states": encoded,
                   "encoder_attention_mask": given.get("encoder_attention_mask")}
        if "position_bias" in given:
            kw |= dict(zip(("position_bias", "encoder_decoder_position_bias"), biases, strict=True))
        out = r.side(w * s + (1 - w) * r.down(h), **kw)
        s, biases = (out[0], out[1:3]) if isinstance(out, tuple) else (out, biases)
    return s


def reference(base, tuned, model):
    """`base` with copies of the ladders beside it, the backbone detached (it needs no gradient)."""
    encoder, decoder, _, last = ENDS[model]
    rungs = [copy.deepcopy(r) for r in parts(tuned, Rung)]
    (foot,), (crown,) = (copy.deepcopy(parts(tuned, k)) for k in (Foot, Crown))
    n = len(base.get_submodule(encoder))
    enc, dec = (Seen(base.get_submodule(p)) for p in (encoder, decoder))

    def end(module, args, out):
        s = climb(rungs[n:], dec, foot.norm(climb(rungs[:n], enc)))
        w = torch.sigmoid(crown.gate.alpha / 0.1)
        return w * crown.up(crown.norm(s)) + (1 - w) * out

    at = base.get_submodule(last) if last else base.get_submodule(decoder)[-1]
    at.register_forward_hook(end)
    return [*rungs, foot, crown]


@pytest.mark.parametrize("model", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("recipe", ["lst(reduction=4)", "lst(reduction=4, layers=[1])"])
def test_it_is_two_ladders_over_a_detached_backbone(model, recipe):  # findings 3.9
    tuned, base, batch = make(model, recipe)
    copies = reference(base, tuned, model)
    loss, want = tuned.loss(batch), base(**batch, use_cache=False).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    loss.backward()
    for m in copies:
        m.requires_grad_(True)
    grads = iter(torch.autograd.grad(want_again(base, batch), [p for m in copies
                                                               for p in m.parameters()]))
    ours = [*parts(tuned, Rung), *parts(tuned, Foot), *parts(tuned, Crown)]
    assert sum(len(list(m.parameters())) for m in ours) == len(list(tuned.parameters()))
    for m in ours:
        for p in m.parameters():
            torch.testing.assert_close(p.grad, next(grads), rtol=1e-8, atol=1e-11)


def want_again(base, batch):
    for m in base.modules():
        for hook in m._forward_pre_hooks.values():
            seen = hook.__closure__ and next(
                (c.cell_contents for c in hook.__closure__
                 if isinstance(c.cell_contents, Seen)), None)
            if seen is not None:
                seen.given.clear()
                seen.out.clear()
    return base(**batch, use_cache=False).loss


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_no_block_has_a_graph_and_nothing_is_dropped(model):
    net, batch = fresh(model)
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.5
        if isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.5
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    seen = [[], []]
    for k, stack in enumerate(ENDS[model][:2]):
        blocks = list(net.get_submodule(stack))
        for b in blocks[:-1] if model == "bart" else blocks:     # its last one ends the ladder
            b.register_forward_hook(lambda m, a, out, k=k: seen[k].append(
                out[0] if isinstance(out, tuple) else out))
    net.train()
    tuned.loss(batch).backward()
    tuned.loss(batch).backward()
    for found in seen:
        assert not any(t.requires_grad for t in found)
        half = len(found) // 2
        assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    assert all(p.grad is None for n, p in net.named_parameters() if ".burnish." not in n)
    assert all(p.grad is not None for p in tuned.parameters())


# -- in parts, and in generation --------------------------------------------------------------
def inputs(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.mark.parametrize("model", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_is_the_full_forward(model, beams):
    tuned, _, batch = make(model, dtype=torch.float32)
    net = tuned.model.eval()
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    if model == "whisper":
        how |= {"decoder_input_ids": torch.ones(2, 1, dtype=torch.long)}
    generate = super(type(net), net).generate if model == "whisper" else net.generate
    made = generate(**inputs(batch), **how, use_cache=True)
    assert torch.equal(made, generate(**inputs(batch), **how, use_cache=False))
    with torch.no_grad():
        logits = net(**inputs(batch), decoder_input_ids=made).logits
        out = net(**inputs(batch), decoder_input_ids=made[:, :1], use_cache=True)
        steps, cache = [out.logits], out.past_key_values
        for i in range(1, made.shape[1]):
            out = net(encoder_outputs=(out.encoder_last_hidden_state,),
                      attention_mask=batch.get("attention_mask"),
                      decoder_input_ids=made[:, i : i + 1], past_key_values=cache)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-4, atol=1e-5)
    if beams == 1 and model != "whisper":            # which does not say all that it could
        assert torch.equal(logits[:, :-1].argmax(-1), made[:, 1:])
    for half in (cache.self_attention_cache, cache.cross_attention_cache):
        assert len(half.layers) == 4, "two of the backbone, two of the ladder"


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_an_encoder_that_is_run_by_itself_leaves_its_ladder_to_the_decoder(model):
    tuned, _, batch = make(model)
    net, given = tuned.model.eval(), inputs(batch)
    whole = tuned.loss(batch)
    whole.backward()
    want = [p.grad.clone() for p in tuned.parameters()]
    tuned.model.zero_grad()
    out = net.get_encoder()(**given)
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    loss = net(encoder_outputs=out, **rest).loss
    torch.testing.assert_close(loss, whole)
    loss.backward()
    for p, g in zip(tuned.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)
    with pytest.raises(burnish.RecipeError, match="not of the encoder's last run"):
        net(encoder_outputs=(out[0] + 1,), **rest)
    with pytest.raises(burnish.RecipeError, match="not of the encoder's last run"):
        net(encoder_outputs=(out[0][:1, :3],), labels=rest["labels"][:1])


def test_a_whole_forward_leaves_nothing_behind():
    tuned, _, batch = make("t5")
    tuned.loss(batch).backward()
    assert not tuned.state.tape.apart
    with torch.no_grad():
        out = tuned.model.get_encoder()(**inputs(batch))
    kept, s = tuned.state.tape.apart["encoded", "default"]
    assert kept is out[0] and not s.requires_grad


def test_the_base_answers_alone_when_it_is_asked_to():
    tuned, base, batch = make("t5")
    with tuned.disabled(), torch.no_grad():
        out = tuned.model.get_encoder()(**inputs(batch))
        assert torch.equal(out[0], base.get_encoder()(**inputs(batch))[0])
        assert torch.equal(tuned.model(**batch).logits, base(**batch).logits)
    assert not tuned.state.tape.apart


# -- the start --------------------------------------------------------------------------------
def top(score, n):
    return score.topk(n).indices.sort().values


def slices(net, score):
    """name of a matrix -> (rows, columns) of the side blocks of the tiny t5 at R = 4, by hand.

    score: name of a parameter -> its importance."""
    def rows(*names):
        product = 1
        for n in names:
            product = product * score(n)
        return product.sum(1)

    def heads(block, at):
        joint = rows(*(f"{block}.{at}.{n}.weight" for n in "qkv")).view(4, 8)
        return torch.cat([top(joint[h], 2) + 8 * h for h in range(4)])

    start = top(score("shared.weight").sum(0), 8)
    out, keep, encoded = {}, start, None
    for stack, sub in (("encoder", ("layer.0.SelfAttention",)),
                       ("decoder", ("layer.0.SelfAttention", "layer.1.EncDecAttention"))):
        keep = start
        for i in range(2):
            block = f"{stack}.block.{i}"
            for at in sub:
                inner, then = heads(block, at), top(rows(f"{block}.{at}.o.weight"), 8)
                read = encoded if "EncDec" in at else keep
                out[f"{block}.{at}.q"] = (inner, keep)
                out[f"{block}.{at}.k"] = out[f"{block}.{at}.v"] = (inner, read)
                out[f"{block}.{at}.o"] = (then, inner)
                out[f"{block}.{at.rpartition('.')[0]}.layer_norm"] = (keep,)
                keep = then
            ff = f"{block}.layer.{len(sub)}"
            inner, then = (top(rows(f"{ff}.DenseReluDense.{n}.weight"), k)
                           for n, k in (("wi", 16), ("wo", 8)))
            out[f"{ff}.DenseReluDense.wi"], out[f"{ff}.layer_norm"] = (inner, keep), (keep,)
            out[f"{ff}.DenseReluDense.wo"] = (then, inner)
            keep = then
        out[f"{stack}.final_layer_norm"], encoded = (keep,), keep
    return out


def cut_as(tuned, base, want):
    blocks = {path: r for path, _, slot in slots(tuned.model) for r in slot.modules()
              if isinstance(r, Rung | Foot | Crown)}
    for name, index in want.items():
        large = base.get_submodule(name).weight
        if name in blocks:
            small = blocks[name].norm.weight
        else:
            path = next(p for p in blocks if name.startswith(f"{p}."))
            small = blocks[path].side.get_submodule(name[len(path) + 1 :]).weight
        part = large[index[0]] if len(index) == 1 else large[index[0]][:, index[1]]
        assert torch.equal(small, part), name


def test_both_ladders_are_cut_out_of_their_own_blocks():  # findings 3.9
    net, _ = fresh("t5")
    base = copy.deepcopy(net)
    with torch.no_grad():
        for n, p in net.named_parameters():              # T5's norms all start at one
            if "layer_norm" in n:
                p.add_(torch.randn(p.shape))
    base.load_state_dict(net.state_dict())
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    cut_as(tuned, base, slices(base, lambda n: base.get_parameter(n).detach().abs()))
    for stack, first in (("encoder", 0), ("decoder", 2)):
        sides = [r.side for r in parts(tuned, Rung)]
        at = "layer.0.SelfAttention.relative_attention_bias"
        assert torch.equal(sides[first].get_submodule(at).weight,
                           base.get_submodule(f"{stack}.block.0.{at}").weight)
        assert at not in dict(sides[first + 1].named_modules())


def test_the_first_side_block_brings_the_relative_positions_whichever_it_is():
    net, _ = fresh("t5")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "lst(reduction=4, layers=[1])", head=False)
    (side,) = [r.side for r in parts(tuned, Rung)[:2] if r.side is not None]
    at = "layer.0.SelfAttention.relative_attention_bias"
    assert torch.equal(side.get_submodule(at).weight,
                       base.get_submodule(f"encoder.block.0.{at}").weight)


def fisher(base, batches):
    """name -> sum over samples of the squared gradient of that sample's loss, one by one."""
    total = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    for batch in batches:
        for i in range(len(batch["labels"])):
            loss = base(**{k: v[i : i + 1] for k, v in batch.items()}).loss
            grads = torch.autograd.grad(loss, list(base.parameters()), allow_unused=True)
            for t, g in zip(total.values(), grads, strict=True):
                t += 0 if g is None else g.square()
    return total


def data(model="t5", n=2):
    net, batch = fresh(model)
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 64, (n, 3, 8), generator=g)
    return net, [{"input_ids": x, "labels": x.flip(1)} for x in ids]


def test_the_fisher_start_cuts_by_the_squared_gradients_of_each_sample():  # findings 3.9
    net, batches = data()
    base = copy.deepcopy(net).eval()
    squares = fisher(base, batches)
    tuned = burnish.tune(net, "lst(reduction=4, init='fisher')", head=False, calibration=batches)
    want = slices(base, squares.__getitem__)
    cut_as(tuned, base, want)
    other = slices(base, lambda n: base.get_parameter(n).detach().abs())
    assert any(not torch.equal(a, b) for n in want for a, b in zip(want[n], other[n], strict=True))
    assert all(p.grad is None for p in net.parameters())
    squares = fisher(base, [batches[0], {k: v[:1] for k, v in batches[1].items()}])
    net = copy.deepcopy(base).train()
    tuned = burnish.tune(net, "lst(reduction=4, init='fisher', samples=4)", head=False,
                         calibration=batches)
    cut_as(tuned, base, slices(base, squares.__getitem__))


def test_a_fused_matrix_is_scored_by_the_rows_of_each_of_its_parts():
    net, _ = tiny("gpt2")
    base = copy.deepcopy(net).eval()
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "labels": ids}
    squares = fisher(base, [batch])
    tuned = burnish.tune(net, "lst(reduction=4, init='fisher')", head=False, calibration=[batch])
    q, k, v = squares["transformer.h.0.attn.c_attn.weight"].t().split(32)
    joint = (q * k * v).sum(1).view(4, 8)
    rows = torch.cat([top(joint[h], 2) + 8 * h for h in range(4)])
    keep = top(squares["transformer.wte.weight"].sum(0), 8)
    large = base.transformer.h[0].attn.c_attn.weight.t()
    side = parts(tuned, Rung)[0].side
    want = torch.cat([large[32 * j :][rows][:, keep] for j in range(3)])
    assert torch.equal(side.attn.c_attn.weight.t(), want)


def test_what_was_cut_is_in_the_file_and_a_load_reads_no_data(tmp_path):  # findings 3.9
    net, batches = data()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "lst(reduction=4, init='fisher')", head=False, calibration=batches)
    stir(tuned, size=0.1)
    tuned.save(tmp_path / "a")
    again = burnish.load(copy.deepcopy(base), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**batches[0]).logits,
                           net.eval()(**batches[0]).logits)
    report = burnish.simulate(base, "lst(reduction=4, init='fisher')", batches[0])
    assert report.peak_bytes == burnish.simulate(base, "lst(reduction=4)", batches[0]).peak_bytes


@pytest.mark.parametrize("recipe, more, error, why", [
    ("lst(reduction=4, init='fisher')", {}, burnish.ConfigError, "reads data before it starts"),
    ("nf4 + lst(reduction=4, init='fisher')", {"calibration": 1}, burnish.RecipeError,
     "holds encoder.* in another form.*init='prune'"),
    ("lst(reduction=4, init='prune') + norms", {}, burnish.RecipeError, "could not train"),
    ("lst(reduction=4, layers=[2])", {}, burnish.RecipeError, "no block 2"),
    ("lst(reduction=5)", {}, burnish.RecipeError, "not divisible"),
    ("lst(reduction=4, cache='taps')", {}, burnish.RecipeError, "keeps the states of one stack"),
])
def test_what_cannot_be_says_why(recipe, more, error, why):
    net, batches = data()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=why):
        burnish.tune(net, recipe, head=False, **({"calibration": batches} if more else {}))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_encoders_last_norm_cannot_train_the_decoders_may():
    from burnish.core.site import Selection
    from burnish.methods.select.full import Full

    class One(Full):
        name = "one"

        def select(self, anatomy):
            anatomy.asked.used(self)
            return [Selection(self.which)]

    for which, fits in (("encoder.final_layer_norm.weight", False),
                        ("decoder.final_layer_norm.weight", True)):
        net, batch = fresh("t5")
        one = type("One", (One,), {"which": which})()
        if not fits:
            with pytest.raises(burnish.RecipeError, match="could not train"):
                burnish.tune(net, [one, *burnish.parse("lst(reduction=4)")], head=False)
            continue
        tuned = burnish.tune(net, [one, *burnish.parse("lst(reduction=4)")], head=False)
        tuned.loss(batch).backward()
        assert net.get_parameter(which).grad is not None


def test_the_encoders_ladder_comes_first_whichever_stack_the_model_names_first():
    ends = []
    for turned in (False, True):
        net, batch = fresh("t5")
        if turned:
            net._modules = {k: net._modules[k] for k in ("shared", "decoder", "encoder", "lm_head")}
        tuned = burnish.tune(net, "lst(reduction=4)", head=False)
        (foot,), (crown,) = parts(tuned, Foot), parts(tuned, Crown)
        assert foot in list(net.encoder.modules()) and crown in list(net.decoder.modules())
        ends.append(net.decoder.block[0].burnish.get_submodule("default").state_dict())
        tuned.loss(batch).backward()
        assert all(p.grad is not None for p in tuned.parameters())
    cross = next(n for n in ends[0] if n.endswith("EncDecAttention.k.weight"))
    assert torch.equal(ends[0][cross], ends[1][cross])
