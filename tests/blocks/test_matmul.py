"""Products by the library that is quickest are torch's own products but for rounding."""

import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks import matmul
from burnish.testing.ran import Living, Ran


def ran(fn):
    with Ran() as seen:
        out = fn()
    return out, "_linear_pointwise" in seen.names


@pytest.fixture
def always(monkeypatch):
    """oneDNN whatever the size; a machine without AVX-512 has it all the same, only slower."""
    monkeypatch.setattr(matmul, "_linear", torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(matmul, "LEAST", 0)


def close(got, exact):
    scale = exact.abs().max()
    assert (got.double() - exact).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("n,o,i", [(2, 1, 1), (7, 5, 3), (64, 8, 48), (33, 48, 8), (5, 130, 257)])
def test_each_product_is_the_exact_one_but_for_rounding(always, n, o, i):
    x, W, b = torch.randn(n, i), torch.randn(o, i), torch.randn(o)
    X, V = x.double(), W.double()
    for bias, exact in ((b, X @ V.t() + b.double()), (None, X @ V.t())):
        y, used = ran(lambda bias=bias: matmul.linear(x, W, bias))
        assert used
        assert y.is_contiguous()
        close(y, exact)
    g = torch.randn(n, o)
    y, used = ran(lambda: matmul.mm(g, W))
    assert used
    close(y, g.double() @ V)
    h = torch.randn(n, 2)
    y, used = ran(lambda: matmul.mm(h.t(), x))         # a sum over tokens: both given as they lie
    assert used == (i > 1)            # (else a copy would be larger than what is given)
    close(y, h.double().t() @ X)


@pytest.mark.parametrize("o,i", [(5, 3), (300, 700), (700, 300), (512, 600), (600, 512)])
def test_a_weights_gradient_is_exact_but_for_rounding_and_lies_as_the_weight_does(always, o, i):
    g, x = torch.randn(9, o), torch.randn(9, i)
    dW, used = ran(lambda: matmul.tn(g, x))
    assert used
    assert dW.shape == (o, i)
    assert dW.is_contiguous()
    close(dW, g.double().t() @ x.double())
    for a, b in ((g.double(), x.double()), (g.expand(2, 9, o)[0].t().contiguous().t(), x)):
        dW, used = ran(lambda a=a, b=b: matmul.tn(a, b))
        assert not used
        close(dW, g.double().t() @ x.double())


def test_what_is_copied_for_a_weights_gradient_is_a_strip(always):
    g, x = torch.randn(64, 2048), torch.randn(64, 1024)
    with Living() as memory:
        kept = matmul.tn(g, x)
    strip = matmul.STRIP * (64 + 2048) * 4
    assert memory.peak <= kept.nbytes + strip


def test_what_it_is_not_made_for_is_torchs_own_product(always):
    x, W = torch.randn(6, 4), torch.randn(3, 4)
    wide = torch.randn(6, 8)[:, ::2]                    # would be copied, larger than the weight
    for a, w in ((x.double(), W.double()), (x.bfloat16(), W.bfloat16()), (wide, W),
                 (x, torch.randn(3, 8)[:, ::2]), (torch.randn(2, 3, 4), W),
                 (x.to("meta"), W.to("meta"))):
        y, used = ran(lambda a=a, w=w: matmul.linear(a, w))
        assert not used
        if a.device.type == "cpu":
            assert torch.equal(y, F.linear(a, w))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not ran(lambda: matmul.linear(x, W))[1]
    y = torch.func.vmap(lambda a: matmul.linear(a, W))(torch.randn(2, 6, 4))
    assert y.shape == (2, 6, 3)


def test_small_products_are_left_where_they_are(monkeypatch):
    monkeypatch.setattr(matmul, "_linear", torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(matmul, "LEAST", 6 * 3 * 4)
    x, W = torch.randn(6, 4), torch.randn(3, 4)
    assert ran(lambda: matmul.linear(x, W))[1]
    assert not ran(lambda: matmul.linear(x[:5], W))[1]


@pytest.mark.parametrize("cpu,maker,there", [
    ("AVX512", "AuthenticAMD", True), ("AVX512", "vendor_id\t: GenuineIntel\n", False),
    ("AVX512", "", True), ("AVX2", "AuthenticAMD", False), ("DEFAULT", "", False)])
def test_it_is_used_where_it_was_measured(monkeypatch, cpu, maker, there):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setattr(matmul, "_maker", lambda: maker)
    assert (matmul._found() is not None) == there


def test_the_maker_of_the_cpu_is_the_one_the_system_names(monkeypatch, tmp_path):
    listed = Path("/proc/cpuinfo")
    if listed.exists() and "vendor_id" in listed.read_text():
        assert matmul._maker().split(":")[1].strip() in listed.read_text()

    def missing(name):
        raise FileNotFoundError(name)
    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert "Intel" in matmul._maker()
