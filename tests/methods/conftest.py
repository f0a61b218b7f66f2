"""What a recipe's tests share: bytes that wait for backward, models of published shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny


class Beside:
    """A tuned model and an untouched copy of its base in float64, for a reference written out.

    `theta` holds copies of everything that trains, by (path of the module, name in the file):
    the letters of the reference. `tuned`, `base`, `batch` are what they say. No equation stands
    here: the tests write them, in plain torch, and put them on `base` with stock hooks.
    """

    def __init__(self, model, recipe, size=0.2, head=False, **kw):
        net, self.batch = tiny(model, dtype=torch.float64, **kw)
        self.base = copy.deepcopy(net).requires_grad_(False)
        self.tuned = burnish.tune(net, recipe, head=head)
        for m in (net, self.base):
            m.eval()
        g = torch.Generator().manual_seed(7)
        self.theta, self.own = {}, {}
        names = [m.name for m in parse(recipe)]
        for name, p in self.tuned.named_parameters():
            p.data = p.double()
            p.data.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64))
            path, _, rest = f".{name}".partition(".burnish.default.")
            key = path[1:], rest.removeprefix(next((f"{n}." for n in names
                                                if rest.startswith(f"{n}.")), ""))
            self.own[key] = p
            self.theta[key] = p.detach().clone().requires_grad_()
        for (path, rest), p in self.theta.items():
            if not rest:                                   # a tensor of the model itself
                module, _, leaf = path.rpartition(".")
                self.base.get_submodule(module)._parameters[leaf] = p

    def at(self, name):
        """(path, tensor) of every tensor of this name, in model order."""
        return [(path, p) for (path, rest), p in self.theta.items() if rest == name]

    def score(self, logits):
        """A scalar that every entry of the logits enters in a way of its own."""
        g = torch.Generator().manual_seed(3)
        w = torch.randn(logits.shape, generator=g, dtype=torch.float64)
        return (w * logits + 0.3 * logits.square()).sum()

    def agree(self, want=None):
        """Outputs, and the gradient of every tensor, are the reference's to rounding."""
        want = self.base(**self.batch).logits if want is None else want
        got = self.tuned.model(**self.batch).logits
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-9, atol=1e-11)
        mine = torch.autograd.grad(self.score(got), list(self.own.values()))
        ref = torch.autograd.grad(self.score(want), list(self.theta.values()))
        top = max(float(r.abs().max()) for r in ref)
        for k, a, r in zip(self.own, mine, ref, strict=True):
            assert float(r.abs().max()) > 1e-9 * top or "k_proj" in k[0] or "key" in k[0], \
                f"{k}: the reference does not depend on it"
            assert float((a - r).abs().max()) <= 1e-8 * top, k


@pytest.fixture
def beside():
    """beside(model, recipe, **sizes): see :class:`Beside`."""
    return Beside


@pytest.fixture
def uniform():
    """uniform(t, bound): entries lie within +-bound and come near both ends."""

    def look(t, bound):
        low, high = map(float, t.detach().aminmax())
        assert -bound <= low < -0.6 * bound and 0.6 * bound < high <= bound

    return look


@pytest.fixture
def kept():
    """kept(tuned, batch): bytes alive between forward and backward, weights left out."""

    def measure(tuned, batch):
        with Ledger(tuned.model) as ledger:
            for value in batch.values():
                ledger.watch("weights", [value])
            loss = tuned.loss(batch)
            alive = sum(e.bytes for e in ledger.entries
                        if e.death is None and ledger.category(e) != "weights")
        del loss
        return alive

    return measure


@pytest.fixture
def published():
    """published(config class, model class, **settings): (anatomy, config) without any memory."""

    def build(config, model, **settings):
        import transformers
        from transformers import initialization

        from burnish.core.anatomy import Anatomy

        made = getattr(transformers, config)(**settings)
        with torch.device("meta"), initialization.meta_device_safe_creation_ops():
            return Anatomy.of(getattr(transformers, model)._from_config(made)), made

    return build


@pytest.fixture
def bases_of_a_folder(tmp_path):
    """bases_of_a_folder(recipe): PEFT's folder of it read here, saved as ours and loaded again,
    with equal answers; the shapes of the bases in our file."""

    def carried(recipe):
        (net, batch), other, third = tiny("llama"), tiny("llama")[0], tiny("llama")[0]
        tuned = stir(burnish.tune(net, recipe, seed=3, head=False))
        counted = [t for _, t in tuned.terms(Term) if hasattr(t, "counted")]
        assert counted and all(t.counted is None for t in counted)
        burnish.export_peft(tuned, tmp_path / "peft")
        again = burnish.load_peft(other, tmp_path / "peft")
        assert again.recipe[0].bases == "stored"
        assert all(t.counted == {"bases": True} for _, t in again.terms(type(counted[0])))
        again.save(tmp_path / "a")
        burnish.load(third, tmp_path / "a")
        for m in (net, other, third):
            m.eval()
        torch.testing.assert_close(other(**batch).logits, net(**batch).logits, rtol=1e-5,
                                   atol=1e-6)
        assert torch.equal(third(**batch).logits, other(**batch).logits)
        file = load_file(tmp_path / "a" / "adapter_model.safetensors")
        return {k.rpartition(".")[2]: t.shape for k, t in file.items()
                if k.rpartition(".")[2] in ("A", "B")}

    return carried
