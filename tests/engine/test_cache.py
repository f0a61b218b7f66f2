"""What evaluation makes of tensors that stay as they are is made once, and never answers stale.

Every answer is compared, bit for bit, with that of a copy of the model that has kept nothing.
"""

from __future__ import annotations

import copy
import random
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.folded import LIMIT
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.rotation import Rotation
from burnish.blocks.weight.sparse import SparseDelta
from burnish.blocks.weight.term import Term
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.call import context
from burnish.testing import stir
from burnish.testing.models import tiny

# findings 3.10: one token through two layers made a delta that had not changed again and again
D = 16
RECIPES = ["snell(rank=4)", "snella(rank=4)", "shira(rank=2)", "dora(rank=2)", "bone(rank=4)",
           "oft(block=4)", "nf4 + snell(rank=4)", "nf4 + pissa(rank=2)",
           "snell(rank=4) + dora(rank=2)", "lokr(rank=2)", "shira(rank=2) + oft(block=4)"]


class Net(nn.Module):
    """A linear, a convolution's weight, attention that reads past its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.conv = nn.Conv1d(D, D, 3, padding=1)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.last = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(x)


def stirred(tuned, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_((torch.randn(p.shape, generator=g) * 0.2).to(p.dtype))


def joined(recipe: str, net: nn.Module | None = None, targets: str | None = "first,last", **kw):
    torch.manual_seed(0)
    tuned = burnish.tune(net or Net(), recipe, targets=targets, head=False, **kw)
    stirred(tuned)
    tuned.model.eval()
    return tuned


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fresh(tuned, x: Tensor) -> Tensor:
    """The answer of a copy, which has kept nothing and keeps nothing."""
    twin = copy.deepcopy(tuned)
    assert not twin.state.room.held
    twin.state.room.limit = 0
    with torch.no_grad():
        return twin.model(x)


def answer(tuned, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tuned.model(x)


class Counted:
    """How often the costly part of every method runs."""

    def __init__(self, monkeypatch):
        self.n = 0
        for cls, name in [(KernelDelta, "prepare"), (KernelDelta, "tile"), (SparseDelta, "tile"),
                          (Magnitude, "gains"), (Rotation, "own")]:
            monkeypatch.setattr(cls, name, self._counting(getattr(cls, name)))
        from burnish.methods.delta.ofw.bone import Guide
        monkeypatch.setattr(Guide, "of", self._counting(Guide.of))

    def _counting(self, fn):
        def run(*args, **kw):
            self.n += 1
            return fn(*args, **kw)
        return run


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "pissa" not in r and "lokr" not in r])
def test_a_generation_makes_the_update_once(recipe, monkeypatch):  # findings 3.10
    tuned, counted = joined(recipe), Counted(monkeypatch)
    first = answer(tuned, batch())
    once = counted.n
    assert once
    for _ in range(5):
        assert torch.equal(answer(tuned, batch()), first)
    assert counted.n == once


@pytest.mark.parametrize("targets", ["conv", "attention.*"])
@pytest.mark.parametrize("recipe", ["snell(rank=4)", "dora(rank=2)", "lora(rank=2)"])
def test_a_weight_that_its_module_reads_by_itself_is_made_once(recipe, targets, monkeypatch):
    from burnish.blocks.weight.provided import Weighted

    tuned, n = joined(recipe, targets=targets), []
    effective = Weighted.effective
    monkeypatch.setattr(Weighted, "effective", lambda *a: n.append(1) or effective(*a))
    first = answer(tuned, batch())
    once = len(n)
    assert once
    assert torch.equal(answer(tuned, batch()), first) and len(n) == once
    assert torch.equal(first, fresh(tuned, batch()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_kept_answers_with_the_same_bits(recipe, dtype):
    tuned = joined(recipe, Net().to(dtype))
    x = batch(dtype)
    want = fresh(tuned, x)
    graph = tuned.model(x)                       # as a training step would have it, in evaluation
    for _ in range(3):
        assert torch.equal(answer(tuned, x), want)
    assert torch.equal(graph, want)


def test_panels_of_a_large_weight_are_kept_one_by_one(monkeypatch):
    monkeypatch.setattr("burnish.blocks.weight.panels.PANEL", 5 * D)
    tuned = joined("snell(rank=4) + dora(rank=2)")
    want = fresh(tuned, batch())
    assert torch.equal(answer(tuned, batch()), want)
    assert torch.equal(answer(tuned, batch()), want)


# -- never stale -----------------------------------------------------------------------------------
def own(tuned) -> nn.Parameter:
    """A parameter of a term, whether it trains now or not."""
    return next(p for m in tuned.model.modules() if isinstance(m, Term) for p in m.parameters())


def step(tuned, rng):
    tuned.model.train()
    step_in_evaluation_mode(tuned, rng)
    tuned.model.eval()


def step_in_evaluation_mode(tuned, rng):
    if tuned.training is not None:
        tuned.optimizer(lr=0.05)
        tuned.step((batch(tuned.model.first.bias.dtype), None),
                   loss=lambda out, b: out.float().square().mean())


def edit_an_adapter(tuned, rng):
    p = own(tuned)
    with torch.no_grad():
        p[(0,) * p.dim()] += rng.uniform(0.5, 1)


def edit_the_base(tuned, rng):
    held = [b for n, b in tuned.model.named_buffers() if "provided_" in n and b.is_floating_point()]
    w = tuned.model.first._parameters["weight"]
    with torch.no_grad():
        (held[0] if w is None else w).mul_(1.5)


def edit_in_inference_mode(tuned, rng):
    with torch.inference_mode():
        own(tuned).mul_(1.25)


def use(tuned, rng):
    if "other" not in tuned.adapters:
        tuned.add("other", "lora(rank=2)", targets="first,last", head=False)
    tuned.use(rng.choice(["default", "other"]))
    if tuned.training == "other":
        stirred(tuned, 5)


def mix(tuned, rng):
    use(tuned, rng)
    whole = any(w in str(tuned.adapters["default"].recipe) for w in ("dora", "bone", "oft"))
    tuned.use({"default": 1.0 if whole else rng.choice([0.25, 0.5]), "other": 0.5})


def rows(tuned, rng):
    use(tuned, rng)
    tuned.use(["default", rng.choice(["other", None])])


def to_dtype(tuned, rng):
    kind = rng.choice([torch.bfloat16, torch.float64])
    tuned.model.to(kind)
    tuned.model.to(torch.float32)                # the same addresses may come again


def load(tuned, rng):
    state = {k: v + 0.25 if v.is_floating_point() and ".burnish." in f".{k}" and "extra" not in k
             and "provided" not in k else v
             for k, v in tuned.model.state_dict().items() if isinstance(v, Tensor)}
    tuned.model.load_state_dict(state, strict=False, assign=rng.random() < 0.5)
    tuned.use(next(iter(tuned.adapters)))        # parameters may be others now


def replace_a_parameter(tuned, rng):
    for term in tuned.model.modules():
        if isinstance(term, Term):
            name, p = next(iter(term.named_parameters(recurse=False)), (None, None))
            if name:
                term._parameters[name] = nn.Parameter(p.detach() * 1.5)
                return


def change_a_setting(tuned, rng):
    for term in tuned.model.modules():
        if isinstance(term, KernelDelta):
            term.sparsity = rng.choice([0.1, 0.5, 0.9])
        elif isinstance(term, Term) and hasattr(term, "scale"):
            term.scale *= rng.choice([0.5, 2.0])


def data_after_eval(tuned, rng):
    own(tuned).data.mul_(1.5)    # no version counts this; the mode does
    tuned.model.eval()


def disabled(tuned, rng):
    with tuned.disabled():
        answer(tuned, batch(tuned.model.first.bias.dtype))


def merged_and_back(tuned, rng):
    if tuned.state.rows is None:
        tuned.merge()
        tuned.unmerge()


MOVES = [step, step_in_evaluation_mode, edit_an_adapter, edit_the_base,
         edit_in_inference_mode, use, mix, rows, to_dtype, load, replace_a_parameter,
         change_a_setting, data_after_eval, disabled, merged_and_back]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_changes_leaves_a_stale_answer(recipe, seed):
    rng = random.Random(f"{recipe}/{seed}")
    tuned, done = joined(recipe), []
    for _ in range(9):
        move = rng.choice(MOVES)
        try:
            move(tuned, rng)
            done.append(move.__name__)
        except burnish.BurnishError as refused:   # a mix of what does not mix: nothing has changed
            done.append(f"{move.__name__} refused: {refused}")
        x = batch(tuned.model.first.bias.dtype)
        want = fresh(tuned, x)
        for _ in range(2):
            assert torch.equal(answer(tuned, x), want), done


@pytest.mark.parametrize("move", MOVES)
def test_each_change_is_seen_by_the_next_forward(move):
    rng = random.Random(7)
    tuned = joined("snell(rank=4)")
    tuned.add("other", "lora(rank=2)", targets="first,last", head=False)
    answer(tuned, batch())
    move(tuned, rng)
    assert torch.equal(answer(tuned, batch()), fresh(tuned, batch()))


def test_an_address_that_is_used_again_is_another_tensor():
    tuned = joined("snell(rank=4)", targets="first")
    p = own(tuned)
    for _ in range(10):
        answer(tuned, batch())
        for _ in range(3):                       # freed memory comes back at once
            p.data = torch.randn_like(p)
            assert torch.equal(answer(tuned, batch()), fresh(tuned, batch()))
            p.data = p.data.half()
            p.data = torch.randn_like(p, dtype=torch.float32)
            p.data = torch.randn_like(p)
        assert torch.equal(answer(tuned, batch()), fresh(tuned, batch()))


def test_another_parameter_over_the_same_memory_is_another_tensor():
    tuned = joined("snell(rank=4)", targets="first")
    term = next(m for m in tuned.model.modules() if isinstance(m, Term))
    term._parameters["A"] = nn.Parameter(term.A.data)
    answer(tuned, batch())
    was = id(term.A)
    with torch.no_grad():
        term.A.mul_(3)
    for _ in range(50):                          # its count begins at 0, as the first one's did
        term._parameters["A"] = nn.Parameter(term.A.data)
        if id(term.A) == was:
            break
    assert term.A._version == 0
    assert torch.equal(answer(tuned, batch()), fresh(tuned, batch()))


def test_an_update_of_some_rows_beside_one_of_all_is_watched_too():
    net, inputs = tiny("gpt2")
    torch.manual_seed(0)
    tuned = burnish.tune(net, "lora(rank=2, targets='q') + snell(rank=4, targets='qkv')")
    stirred(tuned)
    net.eval()
    chain = next(m for m in net.modules() if isinstance(m, Chain))

    def logits(of) -> Tensor:
        with torch.no_grad():
            return of.model(**inputs).logits

    for change in (lambda: None, lambda: setattr(chain, "scale", 7.0),
                   lambda: nn.init.ones_(chain.B)):
        change()
        twin = copy.deepcopy(tuned)
        twin.state.room.limit = 0
        want = logits(twin)
        assert torch.equal(logits(tuned), want) and torch.equal(logits(tuned), want)
    assert tuned.state.room.used


# -- memory ----------------------------------------------------------------------------------------
def test_large_values_stay_within_the_limit_and_answers_are_the_same():
    tuned = joined("snell(rank=4)")
    room, want = tuned.state.room, fresh(tuned, batch())
    for limit in (0, D * D * 4, 2 * D * D * 4):
        with tuned.cached(limit):
            assert torch.equal(answer(tuned, batch()), want)
            assert torch.equal(answer(tuned, batch()), want)
            assert room.used == limit
        assert not room.held and room.used == 0 and room.limit == LIMIT


def test_all_that_a_model_of_some_hundred_mebibytes_makes_is_kept_without_a_word():
    """Both layers: with fewer kept, the others make their weight anew for every batch."""
    model = nn.Sequential(nn.Linear(4096, 3072, bias=False), nn.Linear(3072, 4096, bias=False))
    tuned = burnish.tune(model, "shira(rank=1)", targets="0,1", head=False)
    tuned.model.eval()
    with torch.no_grad():
        model(torch.randn(2, 4096))
    assert tuned.state.room.used == 2 * 4096 * 3072 * 4


def test_a_limit_is_bytes_or_text_and_nothing_else():
    tuned = joined("snell(rank=4)")
    for text, size in (("1KiB", 1024), ("0", 0), (4096, 4096)):
        with tuned.cached(text):
            assert tuned.state.room.limit == size
    for wrong in (-1, "much", 1.5, True):
        with pytest.raises(burnish.ConfigError, match="memory"):
            with tuned.cached(wrong):
                pass


@pytest.mark.parametrize("begin", [lambda t: t.model(batch()), lambda t: t.model.train(),
                                   lambda t: t.merge(), lambda t: t.detach()],
                         ids=["a forward with a graph", "train", "merge", "detach"])
def test_nothing_is_held_beside_what_training_needs(begin):
    tuned = joined("snell(rank=4) + dora(rank=2)")
    room = tuned.state.room
    answer(tuned, batch())
    kept = [weakref.ref(p) for made in room.held for v in made.values.values()
            for p in (v if isinstance(v, list) else [v]) if isinstance(p, Tensor)]
    assert room.used and kept
    begin(tuned)
    assert not room.held and room.used == 0
    assert all(r() is None for r in kept)


def test_evaluation_without_room_still_makes_the_threshold_once(monkeypatch):
    tuned, n = joined("snell(rank=4)"), []
    prepare = KernelDelta.prepare
    monkeypatch.setattr(KernelDelta, "prepare", lambda t: n.append(1) or prepare(t))
    with tuned.cached(0):
        for _ in range(3):
            answer(tuned, batch())
    assert len(n) == 2                           # two places


def test_training_mode_and_dropout_keep_nothing():
    tuned = joined("shira(rank=2)")
    tuned.model.train()
    answer(tuned, batch())
    assert not tuned.state.room.held


# -- what cannot be watched is not kept -----------------------------------------------------------
def test_a_term_that_reads_the_batch_is_asked_every_time():
    class Padded(Term):
        """A term whose matrix depends on how much of the batch is padding."""

        tiled = True

        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.ones(D, D))

        def dense(self) -> Tensor:
            return self.v * context().valid.float().mean()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, D)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.first(x)

    tuned = joined("snell(rank=4)", Net(), targets="first")
    slot = tuned.model.first.burnish
    slot.add("default", "padded", Padded().eval(), slot.parts[0].place)
    for ones in (1, 3, 5):
        mask = (torch.arange(5) < ones).long().expand(2, 5)
        with torch.no_grad():
            got = tuned.model(batch(), attention_mask=mask)
            want = nn.functional.linear(batch(), tuned.model.first.weight
                                        + slot.default["snell"].dense() + ones / 5,
                                        tuned.model.first.bias)
        torch.testing.assert_close(got, want)


def test_tensors_of_inference_mode_are_read_every_time():
    with torch.inference_mode():
        tuned = joined("snell(rank=4)")
        for _ in range(3):
            got = tuned.model(batch())
            assert torch.equal(got, fresh(tuned, batch()))
            own(tuned).mul_(1.5)                 # no count tells of it
        assert not tuned.state.room.used


def test_what_was_kept_in_inference_mode_serves_outside():
    tuned = joined("dora(rank=2) + snell(rank=4)")
    with torch.inference_mode():
        want = tuned.model(batch()).clone()
    x = batch().requires_grad_()
    assert not any(t.is_inference() for t in tuned.state.room.tensors())
    assert torch.equal(answer(tuned, x), want)
    tuned.model(x).sum().backward()
    assert x.grad is not None


def test_a_weight_that_somebody_computes_anew_is_read_every_time():
    tuned = joined("snell(rank=4)", targets="first")
    first = tuned.model.first
    whole = first._parameters.pop("weight").detach()     # as sharding by views of one flat tensor
    for factor in (1.0, 2.0, 3.0):
        first.weight = whole * factor
        assert torch.equal(answer(tuned, batch()), fresh(tuned, batch()))
        assert not tuned.state.room.used


def test_other_parameters_for_one_call_are_read():
    tuned = joined("snell(rank=4)")
    want = answer(tuned, batch())
    others = {n: nn.Parameter(p * 1.5) for n, p in tuned.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(tuned.model, others, (batch(),))
    assert not torch.equal(got, want)
    assert torch.equal(answer(tuned, batch()), want)


# -- threads ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["snell(rank=4) + dora(rank=2)", "shira(rank=2) + oft(block=4)",
                                    "bone(rank=4)"])
def test_threads_that_fill_it_together_answer_right(recipe):
    tuned, x = joined(recipe), batch()
    want, wrong = fresh(tuned, x), []
    start = threading.Barrier(5)

    def infer() -> None:
        for _ in range(15):
            start.wait()                         # all of them find it empty
            if not torch.equal(answer(tuned, x), want):
                wrong.append(1)

    def empty() -> None:
        for _ in range(15):
            start.wait()
            tuned.state.room.clear()

    threads = [threading.Thread(target=infer) for _ in range(4)]
    threads.append(threading.Thread(target=empty))
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    room = tuned.state.room
    assert room.used == sum(sum(m.sizes.values()) for m in room.held)
    room.clear()
    assert room.used == 0


def test_a_copy_and_a_pickle_have_nothing_kept(tmp_path):
    tuned = joined("snell(rank=4)")
    want = answer(tuned, batch())
    torch.save(tuned.model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    room = twin.burnish.state.room
    assert room is not tuned.state.room and not room.held
    with torch.no_grad():
        assert torch.equal(twin(batch()), want)
        assert torch.equal(copy.deepcopy(tuned.model)(batch()), want)


def test_backward_of_an_evaluating_model_keeps_nothing():
    """It makes weights again without a graph, which is no evaluation."""
    net, batch = tiny("mha")
    net.eval()
    tuned = stir(burnish.tune(net, "lora(rank=2)"))
    tuned.loss(batch).backward()
    assert not tuned.state.room.held
