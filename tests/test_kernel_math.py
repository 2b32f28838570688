"""The functions that cells and kernels share, against PyTorch in float64."""

import torch
import triton
import triton.language as tl

from novolstm_triton.kernels.math import (
    mean_and_m2,
    mean_m2_and_sumexp,
    merge_mean_and_m2,
    merge_sumexp,
    tanh,
)
from novolstm_triton.testing import cooperative


@triton.jit
def tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(y_ptr + place, tanh(tl.load(x_ptr + place)))


def test_tanh_keeps_its_relative_precision_near_zero():
    """With a gate of O(1/H) c is small, and a tanh that is good to an absolute error would lose its digits."""
    magnitudes = torch.logspace(-30, 2, 2047)
    x = torch.cat([magnitudes, -magnitudes, torch.zeros(2)])
    y = torch.full_like(x, float("nan"))
    with cooperative():
        tanh_kernel[(1,)](x, y, N=4096)
    exact = torch.tanh(x.double())
    assert ((y - exact).abs() <= 1e-6 * exact.abs()).all()


@triton.jit
def statistics_kernel(x_ptr, out_ptr, UNITS: tl.constexpr, SLICES: tl.constexpr, N: tl.constexpr):
    """Merge the statistics of one row of UNITS values in SLICES parts, of which the last may be short or empty."""
    rows = tl.arange(0, SLICES)
    place = rows[:, None] * N + tl.arange(0, N)[None, :]
    mask = place < UNITS
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    counts = tl.sum(mask.to(tl.float32), 1)
    mean, m2, maximum, sumexp = mean_m2_and_sumexp(x, x, counts, mask)
    merged_mean, merged_m2 = merge_mean_and_m2(mean[None, :], m2[None, :], counts, UNITS)
    one = tl.arange(0, 1)
    tl.store(out_ptr + one, merged_mean)
    tl.store(out_ptr + 1 + one, merged_m2)
    merged_maximum, merged_sumexp = merge_sumexp(maximum[None, :], sumexp[None, :])
    tl.store(out_ptr + 2 + one, merged_maximum + tl.log(merged_sumexp))
    whole_mean, whole_m2 = mean_and_m2(tl.reshape(x, (1, SLICES * N)), UNITS * 1.0, tl.reshape(mask, (1, SLICES * N)))
    tl.store(out_ptr + 3 + one, whole_mean)
    tl.store(out_ptr + 4 + one, whole_m2)


def test_statistics_merge_without_cancellation():
    """Values close together, far from zero, in four parts of which one is short and one empty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((64,), float("nan"))
    x[:39] = 0.5 + 1e-4 * torch.randn(39, generator=generator)
    out = torch.full((5,), float("nan"))
    with cooperative():
        statistics_kernel[(1,)](x, out, UNITS=39, SLICES=4, N=16)
    values = x[:39].double()
    m2 = (values - values.mean()).square().sum()
    expected = torch.stack([values.mean(), m2, values.logsumexp(0), values.mean(), m2])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=0)
