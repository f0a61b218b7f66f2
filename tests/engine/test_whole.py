"""All or nothing: whatever interrupts a change of a tuned model, every bit is as it was."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import burnish
from burnish.engine import originals

OURS = ("burnish/engine/", "burnish/formats/adapter", "burnish/formats/placed")
#: what runs after a change was made, or takes it back
BACK = {"roll_back", "put_back", "_put", "run", "whole", "to_the_end", "clear"}


class Small(nn.Module):
    """Linears, a normalisation with running statistics, a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
                                  nn.Linear(64, 64))
        self.classifier = nn.Linear(64, 4)

    def forward(self, x):
        return self.classifier(self.body(x))


def base():
    torch.manual_seed(0)
    return Small()


X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


def loss(out, _):
    return out.square().mean()


def interrupted(call, at):
    """Lines run by `call` in our code; KeyboardInterrupt at line `at` (none: run through)."""
    seen = 0

    def local(frame, event, arg):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def watch(frame, event, arg):
        code = frame.f_code
        ours = any(o in code.co_filename for o in OURS) and code.co_name not in BACK
        return local if ours else None

    sys.settrace(watch)
    try:
        call()
    finally:
        sys.settrace(None)
    return seen


def picture(model, *handles):
    """Everything that can be told of a model and its handles; identities are held by `id`."""
    def bits(t):
        return None if t is None else (id(t), t.requires_grad, tuple(t.shape), t.dtype,
                                       t.detach().double().flatten().tolist(), sorted(vars(t)))

    modules = []
    for n, m in model.named_modules():
        modules.append((n, type(m), id(m), list(m._modules), m.training,
                        {k: bits(p) for k, p in m._parameters.items()},
                        {k: bits(b) for k, b in m._buffers.items()}))
        if n.endswith("burnish"):
            modules.append((m.mode, sorted(m.reads), [id(x) for x in m.listeners],
                            [(p.adapter, p.key) for p in m.parts], dict(m.providers),
                            {k: tuple(s.shape) for k, s in m.shells.items()}))
    told = []
    for t in handles:
        told.append((list(t.adapters), t.state.active, t.state.rows, t.state.off,
                     t.state.tape.lean, id(t.state.tape.policy), set(t.originals), t.gone, t.undo,
                     t.merged is None, sorted(map(str, t.state.readers.items()))))
        for a in t.adapters.values():
            told.append((a.name, sorted(a.selected), None if a.away is None else
                         {k: v.double().flatten().tolist() for k, v in a.away.items()}))
    return modules, told


def two():
    """A trained model with two adapters; the first is in use."""
    model = base()
    tuned = burnish.tune(model, "nf4 + lora(rank=2) + bitfit", head=True)
    tuned.add("other", "lora(rank=2) + lean(on=False)", head=True, seed=1)
    for name in ("other", "default"):
        tuned.use(name)
        tuned.optimizer(lr=1e-2)
        tuned.step((X, None), loss=loss)
    return model, tuned


def folder_of(tmp):
    if not (tmp / "a").exists():
        two()[1].save(tmp / "a")
    return tmp / "a"


CHANGES = {
    "tune": lambda tmp: (lambda m: (m, lambda: burnish.tune(
        m, "nf4 + pissa(rank=2) + bitfit", head=True)))(base()),
    "load": lambda tmp: (lambda m: (m, lambda: burnish.load(m, folder_of(tmp))))(base()),
    "add": lambda tmp: (lambda m, t: (m, lambda: t.add(
        "third", "lora(rank=2) + bitfit + lean(on=False)", head=True), t))(*two()),
    "use": lambda tmp: (lambda m, t: (m, lambda: t.use("other"), t))(*two()),
    "mix": lambda tmp: (lambda m, t: (m, lambda: t.use({"other": .5, "default": .25}), t))(*two()),
    "remove": lambda tmp: (lambda m, t: (m, lambda: t.remove("default"), t))(*two()),
    "merge": lambda tmp: (lambda m, t: (m, t.merge, t))(*two()),
}


@pytest.fixture(autouse=True)
def some_wait_on_disk(monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", 1 << 12)


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(change, tmp_path):
    # findings 4.2
    folder_of(tmp_path)
    for _ in range(2):                           # the first makes classes that are kept
        _, call, *_ = CHANGES[change](tmp_path)
        lines = interrupted(call, 0)
    assert lines > 20
    step = max(1, lines // 24)
    last = {lines} if change != "load" else set()    # load ends in the exit of a context
    for at in sorted({*range(1, lines, step), *last}):
        model, call, *handles = CHANGES[change](tmp_path)
        before = picture(model, *handles)
        with pytest.raises(KeyboardInterrupt):
            interrupted(call, at)
        assert torch.is_grad_enabled(), f"line {at} of {lines}"
        assert picture(model, *handles) == before, f"line {at} of {lines}"
        call()                                   # and it can be done after all


@pytest.mark.parametrize("way", ["detach", "unmerge", "merged, detach"])
def test_an_interrupt_on_the_way_back_comes_after_it(way, tmp_path):
    # findings 4.2
    def made():
        model, tuned = two()
        before = picture(model, tuned)
        if "merge" in way:
            tuned.merge()
        return model, tuned, before, tuned.unmerge if way == "unmerge" else tuned.detach

    lines = interrupted(made()[3], 0)
    plain = {k: v.clone() for k, v in base().state_dict().items()}
    for at in range(3, lines, max(1, lines // 24)):
        model, tuned, before, call = made()
        with pytest.raises(KeyboardInterrupt):
            interrupted(call, at)
        if way == "unmerge":
            assert picture(model, tuned) == before or tuned.merged is not None
            continue
        call()                                   # nothing to do, or all of it
        assert list(model.state_dict()) == list(plain), f"line {at} of {lines}"
        for k, v in model.state_dict().items():
            assert torch.equal(v, plain[k]), f"{k}: line {at} of {lines}"
        assert tuned.gone and not any(type(m).__name__ == "Slot" for m in model.modules())


@pytest.mark.parametrize("recipe", ["nf4 + lora(rank=2)", "full", "lora(rank=2) + bitfit"])
def test_a_bad_second_adapter_in_a_folder_leaves_the_base(recipe, tmp_path):
    # findings 4.2
    import json

    tuned = burnish.tune(base(), recipe)
    tuned.add("other", "lora(rank=2)")
    tuned.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["adapters"]["other"]["recipe"] = "lora(rank=999)"
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    model = base()
    before = picture(model)
    with pytest.raises(burnish.BurnishError, match="999"):
        burnish.load(model, tmp_path / "a")
    assert picture(model) == before
    burnish.tune(model, recipe)


def test_tensors_that_do_not_fit_leave_the_base(tmp_path):
    # findings 4.2
    tuned = burnish.tune(base(), "full")
    tuned.save(tmp_path / "a")
    model = base()
    model.classifier = nn.Linear(64, 7)
    before = picture(model)
    with pytest.raises(burnish.FormatError):
        burnish.load(model, tmp_path / "a", force=True)
    assert picture(model) == before
