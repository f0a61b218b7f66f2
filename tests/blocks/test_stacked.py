"""Weights of experts that are made one by one, against the dense stack in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape.saved import Tape
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.grids import Fp8Provider, WholeProvider
from burnish.blocks.weight.pruned import Pruned
from burnish.blocks.weight.quantise import Bf16Provider, Nf4Provider, Quantiser
from burnish.blocks.weight.stacked import Source, Stack, stack
from burnish.core.site import Place
from burnish.memory import measure, simulate
from burnish.testing.models import tiny

E, OUT, INP = 4, 6, 10
ENDS = [3, 3, 8, 9]                              # expert 1 is sent nothing


def place_of(transposed=False, out=OUT, inp=INP):
    return Place("e", "w", "experts", out, inp, experts=E, transposed=transposed)


def made(transposed=False, terms=(), dtype=torch.float64):
    """(a stack, the parameter it stands for, which matrices it asked for)."""
    place, asked = place_of(transposed), []
    W = nn.Parameter(torch.randn(E, *((INP, OUT) if transposed else (OUT, INP)), dtype=dtype),
                     requires_grad=False)

    def matrix(e):
        asked.append(e)
        return W[e]

    def whole():
        V = place.view(W)
        for t, s in terms:
            V = V + s * t.dense()
        return place.unview(V, W)

    return stack(Source(place, W, matrix, whole, lambda: [W], list(terms), Tape())), W, asked


def chain(transposed=False):
    term = Chain(place_of(transposed), 2, 0.7, dtype=torch.float64)
    nn.init.normal_(term.B)
    return term


def grouped(x, W, transposed):
    W = W if transposed else W.transpose(-2, -1)
    return torch._grouped_mm(x, W, offs=torch.tensor(ENDS, dtype=torch.int32))


def fallback(x, W, transposed):
    import transformers.integrations.moe  # noqa: F401
    W = W if transposed else W.mT
    return torch.ops.transformers.grouped_mm_fallback(x, W, offs=torch.tensor(ENDS))


def one_by_one(x, W, transposed):
    out, a = [], 0
    for e, b in enumerate(ENDS):
        one = W[torch.tensor(e)]
        if b > a:
            out.append(x[a:b] @ one if transposed else F.linear(x[a:b], one))
        a = b
    return torch.cat(out)


def stock(x, V):
    """y_n = V_e x_n of a dense (E, out, in)."""
    out, a = [], 0
    for e, b in enumerate(ENDS):
        out.append(x[a:b] @ V[e].t())
        a = b
    return torch.cat(out)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("run", [grouped, fallback, one_by_one])
@pytest.mark.parametrize("updated", [False, True])
def test_products_and_gradients_are_those_of_the_dense_stack(run, transposed, updated):
    torch.manual_seed(0)
    term = chain(transposed)
    W, dense, asked = made(transposed, [(term, 0.5)] if updated else [])
    x = torch.randn(ENDS[-1], INP, dtype=torch.float64, requires_grad=True)
    y = run(x, W, transposed)
    assert asked == [0, 2, 3]                    # each once, and none that nobody was sent to
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, term.A, term.B] if updated else [x], g)
    assert asked == [0, 2, 3] * 2 or run is one_by_one and sorted(asked) == [0, 0, 2, 2, 3, 3]

    V = dense.mT if transposed else dense
    V = V + 0.5 * 0.7 * term.B @ term.A if updated else V
    want_y = stock(x, V)
    torch.testing.assert_close(y, want_y)
    want = torch.autograd.grad(want_y, [x, term.A, term.B] if updated else [x], g)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_as_many_rows_for_each_expert(transposed):
    torch.manual_seed(0)
    term = chain(transposed)
    W, dense, _ = made(transposed, [(term, 1.0)])
    x = torch.randn(E, 3, INP, dtype=torch.float64, requires_grad=True)
    y = torch.bmm(x, W if transposed else W.transpose(1, 2))
    V = (dense.mT if transposed else dense) + 0.7 * term.B @ term.A
    want = torch.einsum("eni,eoi->eno", x, V)
    torch.testing.assert_close(y, want)
    g = torch.randn_like(y)
    of = [x, term.A, term.B]
    torch.testing.assert_close(torch.autograd.grad(y, of, g), torch.autograd.grad(want, of, g))


def test_against_its_grain_a_frozen_matrix_multiplies_too():
    W, dense, _ = made()
    x = torch.randn(5, OUT, dtype=torch.float64, requires_grad=True)
    y = x @ W[2]
    torch.testing.assert_close(y, x @ dense[2])
    g = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, g) for t in (y, x @ dense[2])))


def test_rows_behind_the_last_expert_are_zero_and_pass_nothing_back():
    W, _, _ = made()
    x = torch.randn(ENDS[-1] + 2, INP, dtype=torch.float64, requires_grad=True)
    y = grouped(x, W, False)
    y.sum().backward()
    assert y[ENDS[-1]:].eq(0).all() and x.grad[ENDS[-1]:].eq(0).all()
    assert x.grad[:ENDS[-1]].ne(0).all()


def test_no_rows_at_all():
    W, _, asked = made()
    none = torch.zeros(E, dtype=torch.int32)
    assert torch._grouped_mm(torch.empty(0, INP).double(), W.mT, offs=none).shape == (0, OUT)
    assert F.linear(torch.empty(2, 0, INP).double(), W[1]).shape == (2, 0, OUT) and not asked


@pytest.mark.parametrize("updated", [False, True])
def test_nothing_of_a_matrix_s_size_is_kept(updated):
    W, _, _ = made(terms=[(chain(), 1.0)] if updated else [])
    kept = []
    x = torch.randn(ENDS[-1], INP, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped(x, W, False)
    assert sum(t.numel() for t in kept) == (ENDS[-1] * (INP + 2) if updated else 0)


class Doubled(torch.autograd.Function):
    """Somebody's own function of a weight."""

    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("read", [
    lambda W: W * 3, lambda W: W[torch.tensor([2, 0, 2])], lambda W: W[1] + 1,
    lambda W: W.mT[3].t(), lambda W: Doubled.apply(W), lambda W: Doubled.apply(W[2].mT),
    lambda W: W.permute(1, 0, 2),
    lambda W: W[-1].float(), lambda W: torch.stack([W[0], W[1]]), lambda W: W[:, 1:3]])
def test_whatever_else_reads_it_gets_the_tensor(read):
    torch.manual_seed(0)
    term = chain()
    W, dense, _ = made(terms=[(term, 0.5)])
    assert isinstance(W, Stack) and W.shape == dense.shape and W.requires_grad
    y, want = read(W), read(dense + 0.5 * 0.7 * term.B @ term.A)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want)
    g = torch.randn_like(want)
    of = [term.A, term.B]
    torch.testing.assert_close(torch.autograd.grad(y, of, g), torch.autograd.grad(want, of, g))


def test_what_backward_reads_again_must_not_change():
    term = chain()
    for change in ("base", "update"):
        W, dense, _ = made(terms=[(term, 1.0)])
        y = grouped(torch.randn(ENDS[-1], INP).double().requires_grad_(), W, False)
        with torch.no_grad():
            (dense if change == "base" else term.A).add_(1)
        with pytest.raises(RuntimeError, match="modified in place"):
            y.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out, inp", [(OUT, INP), (64, 64), (7, 9), (200, 100), (128, 128)])
def test_one_expert_is_decoded_as_in_the_whole(out, inp, transposed):
    torch.manual_seed(0)
    place = place_of(transposed, out, inp)
    w = torch.randn(E, *((inp, out) if transposed else (out, inp)))
    for held in (Nf4Provider(w), Nf4Provider(w, double_quant=False), Bf16Provider(w),
                 Pruned(w, w > 0), Fp8Provider(w, place, 8, "e4m3"),
                 *(WholeProvider(w, place, Quantiser(bits, 8, symmetric=bits == 4))
                   for bits in (2, 3, 4, 5, 8))):
        whole = held.weight()
        for e in range(E):
            assert torch.equal(held.matrix(e), whole[e]), held


@pytest.mark.parametrize("storage, targets, model", [
    ("nf4 + ", None, "mixtral"), ("rtn(bits=3, group=8) + ", "experts", "qwen_moe"),
    ("fp8 + ", "experts", "qwen_moe"), ("magnitude + ", "experts", "mixtral"),
    ("", "experts", "qwen_moe")])
def test_the_promise_is_what_is_measured(storage, targets, model):
    net, batch = tiny(model)
    recipe = storage + "lora(rank=2)"
    promise = simulate(copy.deepcopy(net), recipe, batch, targets=targets, head=False)
    tuned = burnish.tune(net, recipe, targets=targets, head=False)
    tuned.optimizer(lr=1e-3)
    assert promise.peak_bytes == measure(tuned, batch).peak_bytes


def beside_the_weights(experts, recipe, targets):
    """What a step has at its peak beside weights and what trains."""
    net, batch = tiny("mixtral", num_local_experts=experts, hidden_size=64, intermediate_size=128)
    tuned = burnish.tune(net, recipe, targets=targets, head=False)
    tuned.optimizer(lr=1e-3)
    at = measure(tuned, batch).by_category
    return at["activations"] + at["temporary"]


@pytest.mark.parametrize("recipe, targets", [
    ("nf4 + lora(rank=2)", None),
    ("nf4 + lora(rank=2) + lean(on=False)", None),
    ("rtn(bits=4, group=8) + lora(rank=2)", "gate_up"),       # the other stack is held in codes
    ("lora(rank=2) + sgd", "experts")])
def test_a_step_s_peak_grows_with_one_expert_and_not_with_their_number(recipe, targets):
    few, many = (beside_the_weights(n, recipe, targets) for n in (4, 12))
    one = 4 * 128 * 64
    assert many - few < one                      # routing is a number a token and an expert
    assert few < 32 * one


def test_what_a_whole_model_makes_is_what_the_decoded_one_makes():
    """Mixtral's own per-expert forward and its grouped one, in float64 on decoded weights."""
    net, batch = tiny("mixtral", dtype=torch.float64)
    tuned = burnish.tune(net, "nf4 + lora(rank=2)", targets="experts", head=False)
    for p in tuned.parameters():
        nn.init.normal_(p, std=0.1)
    loss = tuned.loss(batch)
    loss.backward()
    plain, _ = tiny("mixtral", dtype=torch.float64)
    plain.requires_grad_(False)
    terms = []
    for name, module in net.named_modules():
        if (slot := module._modules.get("burnish")) is None or not slot.parts:
            continue
        for part in slot.parts:
            dense = plain.get_submodule(name)
            W, term = getattr(module, part.place.param).detach(), slot.module_of(part)
            A, B = (p.detach().clone().requires_grad_() for p in (term.A, term.B))
            terms.append((term, A, B))
            del dense._parameters[part.place.param]
            setattr(dense, part.place.param, W + term.scale * B @ A)
    want = plain(**batch).loss
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(want, [t for _, A, B in terms for t in (A, B)])
    torch.testing.assert_close([t.grad for term, _, _ in terms for t in (term.A, term.B)],
                               list(grads))
