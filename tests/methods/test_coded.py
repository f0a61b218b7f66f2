"""Coded activations as a part of a recipe."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as foreign

import burnish
from burnish.blocks.tape.running import Sites
from burnish.core.errors import RecipeError
from burnish.memory import Ledger, measure, simulate
from burnish.testing.models import tiny

INP, HID, OUT, N = 24, 40, 8, 64


class Net(nn.Module):
    """relu between two linears: everything that is coded here is exact or linear."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INP, HID), nn.Linear(HID, OUT)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def mse(out, batch):
    return (out - batch[1]).square().mean()


def gradients(tuned, batch, loss=mse):
    for p in tuned.parameters():
        p.grad = None
    value = tuned.loss(batch, loss) if loss else tuned.loss(batch)
    value.backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


def test_the_mean_over_steps_is_the_exact_gradient_in_float64():
    """LoRA on both linears, inputs in one bit. Reference: the equation written out on dense
    weights, with autograd keeping everything."""
    torch.manual_seed(0)
    net = Net().double()
    x, y = torch.randn(N, INP, dtype=torch.float64), torch.randn(N, OUT, dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2, alpha=2) + coded(bits=1, group=64)", targets="a,b",
                         head=False)
    for p in tuned.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64) * 0.3
    leaves = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}

    def delta(layer):
        A, B = (next(p for n, p in leaves.items() if n.startswith(f"{layer}.")
                     and n.endswith(f".{f}")) for f in "AB")
        return B @ A

    h = torch.relu(x @ (net.a.weight.detach() + delta("a")).t() + net.a.bias.detach())
    out = h @ (net.b.weight.detach() + delta("b")).t() + net.b.bias.detach()
    ((out - y) ** 2).mean().backward()
    draws, total, square = 400, {}, {}
    policy = tuned.state.tape.policy
    for k in range(draws):
        policy.begin(k)
        for n, g in gradients(tuned, (x, y)).items():
            total[n] = total.get(n, 0) + g
            square[n] = square.get(n, 0) + g * g
    seen = 0
    for n, want in leaves.items():
        mean = total[n] / draws
        error = ((square[n] / draws - mean * mean).clamp_min(0) / draws).sqrt()
        noisy = error > 1e-6 * want.grad.abs().max()
        z = (mean - want.grad)[noisy] / error[noisy]
        assert z.numel() == 0 or float(z.abs().max()) < 5.5
        assert torch.allclose(mean[~noisy], want.grad[~noisy], rtol=1e-7, atol=1e-10)
        seen += z.numel()
    # A of both layers reads a code; B of both reads A x, which is exact
    assert seen == 2 * (INP + HID)


FUNCTIONS_OF_W = ["bone(rank=4)", "oft(block=4)"]


@pytest.mark.parametrize("recipe", FUNCTIONS_OF_W)
def test_the_input_of_a_function_of_the_weight_is_coded(recipe):           # findings 3.9
    """Bone and OFT are linear in x: of it one bit a number waits, and the ranges of its groups."""
    rows, net, kept = 1 << 12, nn.Sequential(nn.Linear(INP, OUT), nn.Linear(OUT, OUT)), []
    batch = torch.randn(rows, INP), torch.randn(rows, OUT)
    for more in ("", " + coded(bits=1)"):
        tuned = burnish.tune(net, f"{recipe}{more}", targets="0,1", head=False)
        with Ledger(net) as ledger:
            ledger.watch("weights", [*batch])
            loss = tuned.loss(batch, mse)
            kept.append(sum(e.bytes for e in ledger.entries
                            if e.death is None and ledger.category(e) != "weights"))
        assert loss.requires_grad
        tuned.detach()
    # the batch is there anyway; with it in codes too, the whole difference is what the second
    # layer's input was, less both codes
    numbers = rows * (INP + OUT)
    codes = numbers / 8 + math.ceil(numbers / 256) * 8
    assert kept[0] - kept[1] == pytest.approx(rows * OUT * 4 - codes, rel=0.02)


@pytest.mark.parametrize("recipe", FUNCTIONS_OF_W)
def test_the_mean_of_a_function_of_the_weight_is_exact_in_float64(recipe):  # findings 3.9
    """Inputs in one bit, 150 draws; reference: the equation written out, autograd keeps all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, OUT)).double()
    x, y = torch.randn(N, 8, dtype=torch.float64), torch.randn(N, OUT, dtype=torch.float64)
    tuned = burnish.tune(net, f"{recipe} + coded(bits=1, group=64)", targets="0,1", head=False)
    for p in tuned.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64) * 0.2
    leaves = [p.detach().clone().requires_grad_() for p in tuned.parameters()]

    def changed(W, leaf):
        if recipe.startswith("bone"):            # W_pq (I + D_p) + D_p
            blocks = W.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
            D = leaf.unsqueeze(1)
            return (blocks @ (torch.eye(4).double() + D) + D).transpose(1, 2).reshape(W.shape)
        I = torch.eye(4, dtype=W.dtype)  # noqa: E741
        turns = []
        for row in leaf:
            Q = torch.zeros(4, 4, dtype=W.dtype).index_put(tuple(torch.triu_indices(4, 4, 1)), row)
            turns.append((I + Q - Q.t()) @ torch.linalg.inv(I - Q + Q.t()))
        return W @ torch.block_diag(*turns).t()

    h = x @ changed(net[0].weight.detach(), leaves[0]).t() + net[0].bias.detach()
    out = h @ changed(net[1].weight.detach(), leaves[1]).t() + net[1].bias.detach()
    mse(out, (x, y)).backward()
    draws, got = 150, []
    for k in range(draws):
        tuned.state.tape.policy.begin(k)
        got.append(list(gradients(tuned, (x, y)).values()))
    for k, leaf in enumerate(leaves):
        each = torch.stack([g[k] for g in got])
        error = each.std(0) / draws ** 0.5
        assert float(error.min()) > 0            # every gradient is an estimate
        assert float(((each.mean(0) - leaf.grad) / error).abs().max()) < 5.5


def test_one_bit_alone_is_exact():
    """Nothing coded but the ReLU: the gradient of stock torch."""
    torch.manual_seed(0)
    net, x, y = Net().double(), torch.randn(N, INP).double(), torch.randn(N, OUT).double()
    stock = copy.deepcopy(net)
    tuned = burnish.tune(net, "full + coded(bits=0)", head=False)
    got = gradients(tuned, (x, y))
    mse(stock(x), (x, y)).backward()
    for n, p in stock.named_parameters():
        assert torch.allclose(got[n], p.grad, rtol=1e-12, atol=1e-15), n


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_layer_keeps_its_bits(bits):
    """bits / 8 bytes a number, ranges of 64 / group bits, and one bit for the ReLU."""
    net, batch = Net(), (torch.randn(N * 64, INP), torch.randn(N * 64, OUT))
    tuned = burnish.tune(net, f"full + coded(bits={bits})", head=False)
    rows = N * 64
    with Ledger(net) as ledger:
        for value in batch:
            ledger.watch("weights", [value])
        loss = tuned.loss(batch, mse)
        kept = sum(e.bytes for e in ledger.entries
                   if e.death is None and ledger.category(e) != "weights")
    numbers = rows * (INP + HID)                         # the inputs of both
    says = numbers * bits / 8 + math.ceil(numbers / 256) * 8 + rows * HID / 8
    others = rows * OUT * 4                            # the loss keeps out - y, exactly
    assert loss.requires_grad and kept - others == pytest.approx(says, rel=0.01)


@pytest.mark.parametrize("model", ["vit", "llama"])
@pytest.mark.parametrize("recipe", ["lora(rank=4)", "full", "lora(rank=4) + checkpoint",
                                    "full + lean(on=False)", "nf4 + lora(rank=4)"])
def test_the_promise_is_kept_and_the_loss_is_exact(model, recipe):
    net, batch = tiny(model, batch=4)
    promised = burnish.simulate(copy.deepcopy(net), f"{recipe} + coded", batch)
    plain = burnish.tune(copy.deepcopy(net), recipe)
    tuned = burnish.tune(net, f"{recipe} + coded")
    assert torch.equal(plain.loss(batch), tuned.loss(batch))
    measured = burnish.measure(tuned, batch)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


def test_a_block_that_runs_again_is_coded_then():
    """Beside checkpoint the forward keeps block inputs as they are; gradients stay estimates."""
    net, batch = tiny("vit", batch=4)
    stock = burnish.tune(copy.deepcopy(net), "full + checkpoint", head=False)
    tuned = burnish.tune(net, "full + checkpoint + coded", head=False)
    want, got = gradients(stock, batch, None), gradients(tuned, batch, None)
    off = sum(float((got[n] - w).square().sum()) for n, w in want.items()) ** 0.5
    size = sum(float(w.square().sum()) for w in want.values()) ** 0.5
    assert 0 < off < 0.2 * size


def test_dropout_masks_are_those_of_a_run_without_it():
    net, batch = tiny("vit", dropout=0.3)
    plain, tuned = burnish.tune(copy.deepcopy(net), "full"), burnish.tune(net, "full + coded")
    losses = []
    for t in (plain, tuned):
        t.model.train()
        torch.manual_seed(7)
        losses.append(t.loss(batch))
    assert torch.equal(*losses)


@pytest.mark.parametrize("reentrant", [True, False])
def test_somebody_elses_checkpointing_gets_exact_or_coded_gradients(reentrant):
    """Where he counts what is kept (not reentrant) all is stock; a reentrant one runs again with
    us, which codes."""
    torch.manual_seed(0)
    net, x, y = Net().double(), torch.randn(N, INP).double(), torch.randn(N, OUT).double()
    stock = copy.deepcopy(net)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return foreign(self.net, x, use_reentrant=reentrant)

    tuned = burnish.tune(Outer(), "full + coded(bits=8)", head=False)
    got = gradients(tuned, (x.requires_grad_(), y))
    mse(stock(x), (x, y)).backward()
    for n, p in stock.named_parameters():
        near = 0.03 if reentrant else 1e-12
        assert float((got[f"net.{n}"] - p.grad).abs().max()) <= near * float(p.grad.abs().max())


def test_under_autocast_what_is_cast_is_coded_and_the_weights_are_not():
    torch.manual_seed(0)
    net, batch = Net(), (torch.randn(N * 64, INP), torch.randn(N * 64, OUT))
    plain, tuned = burnish.tune(copy.deepcopy(net), "full", head=False), \
        burnish.tune(net, "full + coded", head=False)
    kept, grads = [], []
    for t in (plain, tuned):
        with Ledger(t.model) as ledger, torch.autocast("cpu", torch.bfloat16):
            for value in batch:
                ledger.watch("weights", [value])
            loss = t.loss(batch, mse)
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights"))
        loss.backward()
        grads.append({n: p.grad for n, p in t.named_parameters()})
    assert kept[1] < 0.55 * kept[0]
    for n, g in grads[0].items():
        assert float((grads[1][n] - g).norm()) < 0.2 * float(g.norm()), n


def test_two_forms_of_one_tensor_are_refused_beforehand():
    with pytest.raises(RecipeError, match="the form of kept tensors"):
        burnish.tune(Net(), "lora(rank=2) + coded + coded(bits=2)", targets="a")


def test_a_compiled_model_says_that_it_runs_uncompiled():
    net = Net()
    burnish.tune(net, "full + coded", head=False)
    with pytest.warns(UserWarning, match="coded"):
        torch.compile(net, backend="eager")(torch.randn(N, INP))


def test_removing_the_adapter_takes_the_codes_away():
    net = Net()
    tuned = burnish.tune(net, "full + coded", head=False)
    tuned.add("other", "lora(rank=2)", targets="a")
    tuned.use("other")
    tuned.remove("default")
    assert not tuned.state.tape.policy.roles


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_probabilities_of_attention_that_is_written_out_wait_in_bits(name):
    """The loss is exact; a square matrix of a head takes bits where it took its dtype."""
    found, n, rows = {}, [], []

    def seen(weights):                                # (batch, heads, tokens, tokens)
        n.append(weights.numel())
        rows.append(weights.numel() // weights.shape[-1])

    for recipe in ("coded", "coded(softmax_bits=4)"):
        torch.manual_seed(0)
        model, batch = tiny(name, batch=4)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            given = {k: v for k, v in batch.items() if k != "labels"}
            shapes = model(**given, output_attentions=True).attentions
        for weights in shapes if recipe == "coded" else ():
            seen(weights)
        tuned = burnish.tune(model, f"lora(rank=2) + {recipe}", head=False)
        with Ledger(model) as ledger:
            value = tuned.loss(batch)
            held = sum(e.bytes for e in ledger.entries
                       if e.death is None and ledger.category(e) != "weights")
        grads = torch.autograd.grad(value, list(tuned.parameters()))
        found[recipe] = float(value.detach()), held, grads
    (plain, most, exact), (loss, few, coded) = found.values()
    assert loss == plain and n
    took = 4 * sum(n)                                  # once, for the softmax and the product
    takes = sum(n) / 2 + 4 * sum(rows) + sum(n) / 2 + 8 * sum(math.ceil(k / 256) for k in n)
    assert most - few == pytest.approx(took - takes, rel=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(exact, coded, strict=True))


def test_a_code_that_would_save_nothing_is_refused():
    with pytest.raises(RecipeError, match="keeps its probabilities as they are"):
        burnish.parse("coded(bits=0, softmax_bits=4)")


def test_bits_that_are_not_given_are_those_of_the_description():
    given = burnish.parse("coded(bits=4, norm_bits=8, derivative_bits=4, "
                          "softmax_bits=0, group=256)")[0]
    assert burnish.parse("coded")[0] == given


# -- bits by ranges -------------------------------------------------------------------------------
def test_the_mean_with_allocated_bits_is_the_exact_gradient_in_float64():
    """Groups of one, two and four bits; reference: plain torch, which keeps everything."""
    torch.manual_seed(0)
    net = nn.Linear(INP, OUT).double()
    x, y = torch.randn(N, INP, dtype=torch.float64), torch.randn(N, OUT, dtype=torch.float64)
    x *= torch.logspace(-1, 0.5, N, dtype=torch.float64)[:, None]
    stock = copy.deepcopy(net)
    mse(stock(x), (x, y)).backward()
    tuned = burnish.tune(nn.Sequential(net), "full + coded(mean_bits=2.0, group=64)", head=False)
    each = []
    for k in range(300):
        tuned.state.tape.policy.begin(k)
        each.append(gradients(tuned, (x, y))["0.weight"])
    each = torch.stack(each)
    error = each.std(0) / 300 ** 0.5
    assert float(error.min()) > 0
    assert float(((each.mean(0) - stock.weight.grad) / error).abs().max()) < 5.5


def test_allocated_bits_take_what_they_say_and_vary_less_than_even_ones():
    """Tokens of different sizes, two bits in the mean against two bits each."""
    torch.manual_seed(0)
    rows, found = 2048, {}
    x = torch.randn(rows, 64) * torch.logspace(-1.5, 0.5, rows)[torch.randperm(rows)][:, None]
    y = torch.randn(rows, OUT)
    stock = nn.Linear(64, OUT)
    want = None
    for how in ("bits=2", "mean_bits=2.0"):
        net = copy.deepcopy(stock)
        tuned = burnish.tune(nn.Sequential(net), f"full + coded({how}, group=64)", head=False)
        with Ledger(net) as ledger:
            ledger.watch("weights", [x, y])
            loss = tuned.loss((x, y), mse)
            kept = sum(e.bytes for e in ledger.entries
                       if e.death is None and ledger.category(e) != "weights")
        assert loss.requires_grad
        if want is None:
            plain = copy.deepcopy(stock)
            mse(plain(x), (x, y)).backward()
            want = plain.weight.grad
        off = 0.0
        for k in range(20):
            tuned.state.tape.policy.begin(k)
            off += float((gradients(tuned, (x, y))["0.weight"] - want).square().sum())
        found[how] = kept, off
    (even, more), (few, less) = found.values()
    assert few - even == pytest.approx(rows + 8, abs=64)      # which bits a group has
    assert less < 0.5 * more


@pytest.mark.parametrize("model", ["vit", "llama"])
def test_the_promise_holds_with_allocated_bits(model):
    net, batch = tiny(model, batch=4)
    recipe = "full + coded(mean_bits=2.5)"
    promised = burnish.simulate(copy.deepcopy(net), recipe, batch)
    measured = burnish.measure(burnish.tune(net, recipe), batch)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


def test_allocated_bits_wait_elsewhere_and_come_back_the_same():
    grads = []
    for more in ("", " + offload"):
        torch.manual_seed(0)
        net, batch = tiny("vit", batch=4)
        tuned = burnish.tune(net, f"full + coded(mean_bits=2.0){more}", head=False)
        grads.append(gradients(tuned, batch, None))
    for n, g in grads[0].items():
        assert torch.equal(g, grads[1][n]), n


@pytest.mark.parametrize("said, why", [
    ("mean_bits=1.0", "between 1 and 4"), ("mean_bits=4.0", "between 1 and 4"),
    ("mean_bits=-2.0", "between 1 and 4"), ("bits=8, mean_bits=2.0", "leave one out")])
def test_a_mean_that_no_groups_can_have_is_refused(said, why):
    with pytest.raises(RecipeError, match=why):
        burnish.parse(f"coded({said})")


def test_any_mean_between_one_bit_and_four_is_possible():
    for mean in (1.01, 3.0, 3.99):
        assert burnish.parse(f"coded(mean_bits={mean})")[0].mean_bits == mean


# -- ranges that steps share ---------------------------------------------------------------------
def test_the_mean_on_running_ranges_is_the_gradient_of_what_was_cut_in_float64():
    """Two linears behind a relu, ranges that lag behind. Reference: dense, in float64, with every
    kept input cut to d lo + (1 - d) min and d hi + (1 - d) max over all tokens and channels."""
    torch.manual_seed(0)
    net = Net().double()
    near, far = (torch.randn(N, INP, dtype=torch.float64) * s for s in (1.0, 3.0))
    y, d = torch.randn(N, OUT, dtype=torch.float64), 0.75
    tuned = burnish.tune(net, f"full + coded(bits=2, running={d}, group=64)", head=False)
    policy = tuned.state.tape.policy
    policy.begin(0)
    gradients(tuned, (near, y))
    policy.begin(1)
    gradients(tuned, (far, y))
    policy.ranges.decay = 1.0                        # as they are from here on
    steps, total = 3000, None
    for k in range(steps):
        policy.begin(2 + k)
        made = gradients(tuned, (far, y))
        total = made if total is None else {n: total[n] + g for n, g in made.items()}

    def cut(then, now):
        lo, hi = d * then.min() + (1 - d) * now.min(), d * then.max() + (1 - d) * now.max()
        return now.clamp(lo, hi)

    with torch.no_grad():
        h_near, h = (F.relu(net.a(x)) for x in (near, far))
        g = 2 * (net.b(h) - y) / y.numel()
        dh = g @ net.b.weight * (h > 0)
        want = {"a.weight": dh.T @ cut(near, far), "a.bias": dh.sum(0),
                "b.weight": g.T @ cut(h_near, h), "b.bias": g.sum(0)}
        full = dh.T @ far
    assert sorted(policy.ranges.held) == [("", 0), ("", 1)]
    for n, w in want.items():
        off = (total[n] / steps - w).norm() / w.norm()
        assert off < 0.02, f"{n}: {off}"
    assert (want["a.weight"] - full).norm() / full.norm() > 0.04


@pytest.mark.parametrize("more", ["", " + checkpoint"])
@pytest.mark.parametrize("model", ["vit", "llama"])
def test_with_running_ranges_sites_are_the_same_in_every_step(model, more):
    net, batch = tiny(model)
    plain, _ = tiny(model)
    want = burnish.tune(plain, f"full{more}").loss(batch)
    recipe = f"full + coded(bits=8, running=0.9, group=64){more}"
    promise = simulate(tiny(model)[0], recipe, batch).peak_bytes
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-3)
    held = tuned.state.tape.policy.ranges.held
    assert torch.equal(tuned.step(batch), want.detach())
    sites, first = list(held), {k: t.clone() for k, t in held.items()}
    blocks = {b.path for b in tuned.anatomy.blocks}
    assert {path for path, _ in sites} - {""} == blocks
    kept = [sorted(n for p, n in sites if p == b) for b in blocks]
    assert all(k == list(range(len(k))) for k in kept) and len({len(k) for k in kept}) == 1
    tuned.step(batch)
    assert list(held) == sites
    assert all(not torch.equal(first[k], held[k]) for k in sites if k[0])   # (pictures stay)
    assert measure(tuned, batch).peak_bytes == promise


def test_a_run_that_goes_on_has_its_ranges(tmp_path):
    from burnish.fit import state

    ends = []
    for stop in (False, True):
        net, batch = tiny("llama")
        tuned = burnish.tune(net, "full + coded(running=0.9, group=64)", head=False)
        tuned.optimizer(lr=1e-2)
        for k in range(4):
            if stop and k == 2:
                state.save_tree({"timeline": tuned.timeline.state()}, tmp_path, "run")
                tuned.state.tape.policy.ranges.load({})
                tuned.timeline.load(state.load_tree(tmp_path, "run")["timeline"])
                assert tuned.state.tape.policy.ranges.held
            tuned.step(batch)
        ends.append([p.detach().clone() for p in tuned.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_nobody_listens_to_blocks_whose_groups_have_their_own_ranges():
    for recipe, count in (("coded", 0), ("coded(running=0.9)", 3)):       # the model, two blocks
        tuned = burnish.tune(tiny("vit")[0], f"lora(rank=2) + {recipe}", head=False)
        assert sum(isinstance(m, Sites) for m in tuned.model.modules()) == count


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_running_ranges_cost_nothing_a_token(bits):
    """bits / 8 bytes a number, one bit for the ReLU, and ranges of inputs whatever the rows."""
    kept = {}
    for rows in (N * 8, N * 64):
        net, batch = Net(), (torch.randn(rows, INP), torch.randn(rows, OUT))
        tuned = burnish.tune(net, f"full + coded(bits={bits}, running=0.9)", head=False)
        with Ledger(net) as ledger:
            for value in batch:
                ledger.watch("weights", [value])
            loss = tuned.loss(batch, mse)
            kept[rows] = sum(e.bytes for e in ledger.entries
                             if e.death is None and ledger.category(e) != "weights")
        assert loss.requires_grad
        kept[rows] -= rows * OUT * 4                   # the loss keeps out - y, exactly
    more = N * 56
    assert kept[N * 64] - kept[N * 8] == more * (INP + HID) * bits / 8 + more * HID / 8
    assert kept[N * 8] - N * 8 * ((INP + HID) * bits + HID) / 8 < 100


@pytest.mark.parametrize("said, why", [
    ("running=1.0", "less than 1"), ("running=-0.1", "0 or more"),
    ("running=0.9, mean_bits=2.5", "leave one out")])
def test_running_ranges_that_cannot_be_are_refused(said, why):
    with pytest.raises(RecipeError, match=why):
        burnish.parse(f"coded({said})")
