"""What a device's own kernels keep is counted where the CPU's stand in for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.memory import simulate
from burnish.memory.devices import attention, kernels_of

B, H, T, D = 2, 4, 256, 32
MiB = 1 << 20


class Attend(nn.Module):
    """One product per head set, then attention; `shared` query heads read one pair of keys."""

    def __init__(self, shared: int = 1, **how):
        super().__init__()
        self.shared, self.how = shared, how
        self.q = nn.Linear(H * D, H * D, bias=False)
        self.kv = nn.Linear(H * D, 2 * H * D // shared, bias=False)

    def forward(self, x):
        q = self.q(x).view(B, T, H, D).transpose(1, 2)
        k, v = self.kv(x).view(B, T, 2, H // self.shared, D).permute(2, 0, 3, 1, 4)
        if self.shared > 1:
            self.how["enable_gqa"] = True
        return F.scaled_dot_product_attention(q, k, v, **self.how).sum()


def peak(module: nn.Module, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    x = (torch.zeros(B, T, H * D, dtype=dtype),)
    return simulate(module.to(dtype), "as_is + lean(on=False) + sgd", x, device=device).by_category


def test_flash_keeps_no_scores_under_dropout_on_cuda_and_the_cpu_writes_them_out():
    scores = B * H * T * T * 2
    module = Attend(dropout_p=0.1)
    assert peak(module, "cpu")["activations"] > 2 * scores
    kept = peak(module, "cuda")["activations"]
    x = B * T * H * D * 2
    statistics = B * H * T * 4
    assert 5 * x + statistics <= kept < 5 * x + statistics + 4096      # x, q, k, v, out


def test_flash_sums_dq_in_single_precision_inside_its_backward():
    """B H T (D + 1) numbers beside the gradients; dk and dv of each query head where shared."""
    plain = peak(Attend(), "cuda")["temporary"]
    shared = peak(Attend(shared=4), "cuda")["temporary"]
    assert plain >= 4 * B * H * T * (D + 1)
    x = B * T * H * D * 2
    assert shared - plain == pytest.approx(2 * x - 2 * (x - x // 4), abs=4096)


@pytest.mark.parametrize(("dtype", "mask", "width", "heads", "way"), [
    (torch.bfloat16, False, 64, 4, "flash"), (torch.float16, False, 64, 4, "flash"),
    (torch.float32, False, 64, 4, "efficient"), (torch.bfloat16, True, 64, 4, "efficient"),
    (torch.bfloat16, False, 288, 4, "efficient"), (torch.float32, False, 63, 4, "written out"),
    (torch.float64, False, 64, 4, "written out"), (torch.bfloat16, True, 64, 2, "written out")])
def test_the_kernel_is_chosen_as_cuda_chooses(dtype, mask, width, heads, way):
    q = torch.empty(1, 4, 8, width, dtype=dtype)
    k = torch.empty(1, heads, 8, width, dtype=dtype)
    assert attention(q, k, k, torch.zeros(8, 8) if mask else None, grouped=True) == way


def test_dropout_keeps_one_byte_an_entry_on_cuda_and_the_noise_on_the_cpu():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return F.dropout(x + self.w, 0.1, self.training).sum()

    n = 1 << 20
    x = (torch.zeros(n, dtype=torch.float32),)
    kept = {d: simulate(Drop(), "as_is + lean(on=False) + sgd", x, device=d)
            .by_category["activations"] for d in ("cpu", "cuda")}
    assert kept["cpu"] >= 2 * 4 * n
    assert kept["cuda"] - 4 * n == pytest.approx(n, abs=4096)         # beside the batch


def test_rms_norm_keeps_its_input_and_one_number_a_row_on_cuda():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(D, D, bias=False), nn.RMSNorm(D)

        def forward(self, x):
            return self.norm(self.fc(x)).square().sum()

    rows = 4096
    x = (torch.zeros(rows, D, dtype=torch.bfloat16),)
    kept = simulate(Norm().bfloat16(), "as_is + lean(on=False) + sgd", x, device="cuda")
    assert kept.by_category["activations"] <= 4 * rows * D * 2 + 4 * rows + 4096


def test_the_library_of_products_has_a_workspace_for_each_thread_on_cuda():
    model, x = nn.Linear(8, 8).requires_grad_(True), (torch.zeros(4, 8),)
    on = {d: simulate(model, "full + sgd", x, device=d) for d in ("cpu", "cuda")}
    assert on["cpu"].peak_bytes < MiB
    assert 16.25 * MiB <= on["cuda"].peak_bytes < 16.25 * MiB + MiB
    alone = simulate(model, "full", x, device="cuda", evaluate=True)
    assert 8.125 * MiB <= alone.peak_bytes < 8.125 * MiB + MiB


def test_real_tensors_and_what_comes_after_run_the_cpus_kernels():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with kernels_of("cuda"):
        inside = F.scaled_dot_product_attention(q, q, q)
        dropped = F.dropout(q, 0.5)
    after = F.scaled_dot_product_attention(q, q, q)
    assert type(inside.grad_fn) is type(after.grad_fn)
    assert torch.equal(inside, after)
    assert set(dropped.unique().tolist()) <= {0.0, *(2 * q).unique().tolist()}
