"""ComPEFT and delta quantisation against dense computations, and the sizes their papers print."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.weight import golomb
from burnish.blocks.weight.taskvector import TaskVector
from burnish.core.errors import ConfigError, FormatError
from burnish.methods.lifecycle.compeft import Compeft
from burnish.methods.lifecycle.delta_quant import DeltaQuant

SHAPES = {"embed.weight": (40, 30), "a.weight": (31, 70), "a.bias": (31,), "b.weight": (9, 5, 3)}


@pytest.fixture
def models():
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return base, {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()}


def tau_of(base, tuned):
    return {n: tuned[n].double() - base[n].double() for n in base}


# -- ComPEFT --------------------------------------------------------------------------------------
@pytest.mark.parametrize("density, alpha", [(0.05, 1.0), (0.3, 2.5), (1.0, 0.5)])
def test_compeft_is_its_equation_and_comes_back_bit_for_bit(models, density, alpha):
    base, tuned = models
    task = TaskVector(base, tuned)
    flat = torch.cat([t.flatten() for t in tau_of(base, tuned).values()])
    k = math.ceil(density * len(flat))
    least = flat.abs().sort(descending=True).values[k - 1].float()
    size = torch.tensor(alpha * float(flat.std(unbiased=False)), dtype=torch.float32)
    want = torch.where(flat.float().abs() >= least, size * flat.sign().float(), 0.0)
    how = Compeft(density=density, alpha=alpha)
    coded = how.encode(task)
    assert coded.number("count") == k
    back = how.decode(coded, task.shapes)
    got = torch.cat([back.tensor(n).flatten() for n in back.names])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert torch.equal(got.sign(), want.sign()) and len(got.abs().unique()) == 1 + (density < 1)
    assert torch.equal(got, torch.cat(list(back.pieces())))
    out = how.lifecycle(base, tuned)
    for n, t in base.items():
        torch.testing.assert_close(out[n], (t.double() + back.tensor(n).double()).float(),
                                   rtol=0, atol=0)


def test_tensors_come_back_in_any_order(models, monkeypatch):
    base, tuned = models
    monkeypatch.setattr(golomb, "READ", 3)
    how, task = Compeft(density=0.3), TaskVector(base, tuned)
    back = how.decode(how.encode(task), task.shapes)
    first = {n: back.tensor(n) for n in back.names}
    for n in (*reversed(back.names), "a.bias", "a.bias", "b.weight", "embed.weight"):
        assert torch.equal(back.tensor(n), first[n]), n


def test_a_file_is_decoded_once_in_its_order_and_again_for_what_has_passed(monkeypatch):
    monkeypatch.setattr(golomb, "READ", 1)                       # 8 entries at a time
    decoded, decode = [0], golomb.decode

    def counted(*args):
        decoded[0] += 1
        return decode(*args)

    monkeypatch.setattr(golomb, "decode", counted)
    for sizes in ((8, 8, 3, 20), (7, 2, 30), (5, 4, 1, 1, 16)):
        base = {f"{i}": torch.zeros(n) for i, n in enumerate(sizes)}
        g = torch.Generator().manual_seed(0)
        tuned = {n: torch.randn(t.shape, generator=g) for n, t in base.items()}
        how, task = Compeft(density=1.0), TaskVector(base, tuned)
        back = how.decode(how.encode(task), task.shapes)
        decoded[0] = 0
        for n in base:
            for _ in range(2):                                   # asked twice
                assert torch.equal(back.values(n).sign(), tuned[n].sign()), (sizes, n)
        once = how.decode(how.encode(task), task.shapes)
        decoded[0] = 0
        for n in base:
            once.values(n)
        assert decoded[0] == 0, sizes


@pytest.mark.parametrize("apart", [False, True])                 # as files that say it twice
@pytest.mark.parametrize("how", [Compeft(density=0.5), DeltaQuant()])
def test_tied_tensors_change_together_and_what_did_not_change_stays(how, apart):
    g = torch.Generator().manual_seed(0)
    one = torch.randn(8, 8, generator=g)
    two = one + torch.randn(8, 8, generator=g)
    base = {"a.weight": one, "b.weight": one, "c.weight": torch.ones(4, 4)}
    out = how.lifecycle(base, {"a.weight": two, "b.weight": two.clone() if apart else two,
                               "c.weight": torch.ones(4, 4)})
    assert torch.equal(out["a.weight"], out["b.weight"]) and not torch.equal(out["a.weight"], one)
    assert torch.equal(out["c.weight"], base["c.weight"])


def test_an_adapter_of_llama_7b_takes_what_the_paper_says():
    """LoRA of rank 16 on q and v of 32 blocks: 8,388,608 numbers, 16.8 MB in bf16."""
    n = 2 * 32 * 2 * 16 * 4096
    assert n == 8_388_608
    start = {"w": torch.zeros(n)}
    tuned = {"w": torch.randn(n, generator=torch.Generator().manual_seed(0))}
    coded = Compeft(density=0.05).encode(TaskVector(start, tuned))
    assert coded.nbytes <= 0.36e6 and 2 * n / coded.nbytes > 46
    bits = 0.05 * (golomb.bits_per_gap(0.05) + 1)
    assert 8 * coded.nbytes / n == pytest.approx(bits, rel=0.02)


def test_what_stands_in_the_paper_is_the_default_and_shares_are_shares():
    assert (Compeft().density, Compeft().alpha) == (0.05, 1.0)
    assert (DeltaQuant().bits, DeltaQuant().group) == (4, 64)
    for wrong in (0.0, -0.1, 1.5, 20):
        with pytest.raises(ConfigError, match="share"):
            Compeft(density=wrong)


def test_an_update_of_another_size_or_cut_short_is_refused(models):
    base, tuned = models
    how, task = Compeft(), TaskVector(base, tuned)
    coded = how.encode(task)
    with pytest.raises(FormatError, match="entries"):
        how.decode(coded, {**task.shapes, "more": torch.Size((2,))})
    coded.tensors["payload/unary"] = coded.tensors["payload/unary"][:5]
    with pytest.raises(FormatError, match="cut short"):
        list(how.decode(coded, task.shapes).pieces())
    coded.told["b"] = "x"
    with pytest.raises(FormatError, match="'b'"):
        how.decode(coded, task.shapes)
    tuned["a.bias"][0] = math.nan
    with pytest.raises(ConfigError, match="inf or nan"):
        how.encode(task)


# -- steps ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 16, 64, 1000])
def test_an_entry_is_off_by_half_a_step_at_most(models, bits, group):
    base, tuned = models
    how, task = DeltaQuant(bits=bits, group=group, whole=("embed",)), TaskVector(base, tuned)
    coded = how.encode(task)
    back, top = how.decode(coded, task.shapes), 2 ** (bits - 1) - 1
    for n, tau in tau_of(base, tuned).items():
        got = back.tensor(n, torch.float64)
        if n in ("a.bias", "embed.weight"):
            assert torch.equal(got, tau.to(torch.bfloat16).double())
            continue
        lead = 1 if tau[0].numel() < group else len(tau)         # thin rows are taken as one
        rows, there = tau.view(lead, -1), got.view(lead, -1)
        for i in range(0, rows.shape[1], group):
            part = rows[:, i:i + group]
            step = coded.tensors[f"scale/{n}"].double()[:, i // group].unsqueeze(1)
            exact = part.abs().amax(1, keepdim=True) / top
            assert (step >= exact).all() and (step <= exact * (1 + 2**-10) + 2**-24).all()
            assert ((there[:, i:i + group] - part).abs() <= step / 2 + 1e-12).all(), n
            levels = there[:, i:i + group] / step
            torch.testing.assert_close(levels, levels.round().clamp(-top, top), rtol=0, atol=1e-9)
        assert float((there - rows).abs().max()) > 0
    assert coded.tensors["payload/a.weight"].numel() == math.ceil(31 * 70 * bits / 8)


def test_four_bits_in_groups_of_64_are_four_and_a_quarter():
    base = {"w": torch.zeros(256, 1024)}
    tuned = {"w": torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))}
    assert 8 * DeltaQuant().encode(TaskVector(base, tuned)).nbytes == 4.25 * 256 * 1024


def test_a_thin_factor_takes_no_more_bits_than_a_wide_one():
    base = {"lora.B": torch.zeros(256, 8)}
    tuned = {"lora.B": torch.randn(256, 8, generator=torch.Generator().manual_seed(0))}
    assert 8 * DeltaQuant().encode(TaskVector(base, tuned)).nbytes == 4.25 * 256 * 8


def test_one_bit_is_the_sign_and_the_best_size(models):
    base, tuned = models
    tuned["a.weight"][0, 0] = base["a.weight"][0, 0]             # no change: the sign is +1
    how, task = DeltaQuant(bits=1), TaskVector(base, tuned)
    back = how.decode(how.encode(task), task.shapes)
    tau, got = tau_of(base, tuned)["a.weight"], back.tensor("a.weight", torch.float64)
    a = tau.abs().mean()
    torch.testing.assert_close(got, torch.where(tau >= 0, a, -a), rtol=1e-6, atol=0)
    error = (tau - got).square().sum()
    for other in (0.9, 0.99, 1.01, 1.1):
        assert (tau - other * got).square().sum() > error
    assert how.encode(task).tensors["payload/a.weight"].numel() == math.ceil(31 * 70 / 8)


def test_steps_of_other_tensors_are_refused_and_come_back_in_the_models_dtype(models):
    base, tuned = ({n: t.bfloat16() for n, t in m.items()} for m in models)
    how, task = DeltaQuant(), TaskVector(base, tuned)
    coded = how.encode(task)
    with pytest.raises(FormatError, match="a.weight"):
        list(how.decode(coded, {**task.shapes, "a.weight": torch.Size((31, 90))}).pieces())
    with pytest.raises(FormatError, match="other"):
        list(how.decode(coded, {"other": torch.Size((3, 3))}).pieces())
    out = how.lifecycle(base, tuned)
    assert all(out[n].dtype == torch.bfloat16 for n in base)
    assert float((out["a.weight"] - tuned["a.weight"]).abs().max()) < 0.02
    with pytest.raises(ConfigError, match="group"):
        DeltaQuant(group=0)
    tuned["a.weight"][0, 0] = math.inf
    with pytest.raises(ConfigError, match="inf or nan"):
        how.encode(task)
