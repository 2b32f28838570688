"""The functions that cells and kernels share, against PyTorch in float64."""

import functools

import numpy as np
import pytest
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

FUNCTIONS = {
    "tanh": (0, np.tanh),
    "sigmoid": (1, lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))),
    "exp": (2, np.exp),
}
"""What the kernels use, with its number below and itself in float64."""

TINY = 2.0**-126
"""The smallest normal number: an exponential that overflows leaves a sigmoid of zero, where it would be less."""


@triton.jit
def elementary_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    x = tl.load(x_ptr + place)
    if FUNCTION == 0:
        y = tanh(x)
    elif FUNCTION == 1:
        y = tl.sigmoid(x)
    else:
        y = tl.exp(x)
    tl.store(y_ptr + place, y)


def evaluate(function: str, x: np.ndarray) -> np.ndarray:
    """Return what the interpreted kernels make of fp32 numbers, of which there are a power of two."""
    given, y = torch.from_numpy(x), torch.full((len(x),), float("nan"))
    with cooperative():
        elementary_kernel[(1,)](given, y, FUNCTION=FUNCTIONS[function][0], N=len(x))
    return y.numpy()


@functools.cache
def sample() -> np.ndarray:
    """Return 2**20 fp32 numbers in ascending order: of every binade, subnormal ones, all around some, and both ends."""
    dense = [np.float32(center).view(np.int32) + np.arange(-4096, 4096) for center in (0.5, 8.66, 9.01, 87.34, 88.72)]
    bits = np.concatenate([np.arange(4096), *dense, [0x7F7FFFFF, 0x7F800000]])
    stride = np.linspace(0, 0x7F800000, 2**19 - len(bits), endpoint=False).astype(np.int64)
    positive = np.sort(np.concatenate([bits, stride])).astype(np.int32).view(np.float32)
    return np.concatenate([-positive[::-1], positive])


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return the distance of fp32 numbers from exact ones in units of the exact one's last place; 0 if both are ∞."""
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    infinite = np.isinf(rounded)
    unit = np.spacing(np.where(infinite, np.float32(1), np.abs(rounded))).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(infinite & (y == rounded), 0, np.abs(y.astype(np.float64) - exact) / unit)


def exactly(function: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return FUNCTIONS[function][1](x.astype(np.float64))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_elementary_function_within_four_ulp(function):
    x = sample()
    y, exact = evaluate(function, x), exactly(function, x)
    error = ulps(y, exact)
    if function == "sigmoid":
        small = exact < TINY
        assert (np.abs(y[small] - exact[small]) <= TINY).all()
        error = error[~small]
    assert error.max() <= 4


def test_tanh_is_odd_and_monotone_and_ends_at_one():
    x = sample()
    y = evaluate("tanh", x)
    np.testing.assert_array_equal(y, -y[::-1])
    assert y[0] == -1
    assert y[-1] == 1
    # Of neighbouring numbers, rounding may put one a unit in the last place below the other: not more.
    assert (np.diff(y) >= -np.spacing(np.abs(y[1:]))).all()
    assert (np.diff(y[::64]) >= 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_elementary_function_keeps_nan(function):
    assert np.isnan(evaluate(function, np.full(2, np.nan, np.float32))).all()


def on_a_gpu(function: str, x: np.ndarray, exponential: np.ndarray, division: np.ndarray) -> np.ndarray:
    """Model what PTX says of the instructions that the kernels become: see docs/verification/numerics.md.

    Args:
        function: its name.
        x: fp32 numbers.
        exponential: the share, from −1 to 1, of the error that ex2.approx.ftz may make of each.
        division: that of the error that div.full may.
    """
    x = x.astype(np.float32)

    def exp(a: np.ndarray) -> np.ndarray:
        product = a * np.float32(1.4426950408889634)
        power = np.exp2(product.astype(np.float64)) * (1 + exponential * 2.0**-22.5)
        return np.where(power < TINY, 0, power).astype(np.float32)

    def divide(a, b: np.ndarray) -> np.ndarray:
        quotient = a / b.astype(np.float64)
        quotient += division * 2 * np.spacing(np.abs(quotient.astype(np.float32)))
        return np.where(b > 2.0**126, 0, quotient).astype(np.float32)

    with np.errstate(over="ignore", under="ignore"):
        if function == "exp":
            return exp(x)
        if function == "sigmoid":
            return divide(1.0, np.float32(1) + exp(-x))
        e = exp(np.float32(-2) * np.abs(x))
        return np.copysign(divide(np.float32(1) - e, np.float32(1) + e), x)


GPU_BOUNDS = {
    "tanh": lambda x: np.full(x.shape, 7.0),
    "sigmoid": lambda x: np.where(x < 0, 7 + 1.25 * np.abs(x.astype(np.float64)), 5),
    "exp": lambda x: 4 + 1.25 * np.abs(x.astype(np.float64)),
}
"""Units in the last place, derived in docs/verification/numerics.md."""


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bound_for_a_gpu_holds_for_the_worst_errors_its_instructions_may_make(function):
    x = sample()[::4]
    # Of tanh what is not the polynomial.
    x = x[np.abs(x) >= 0.5] if function == "tanh" else x
    exact, allowed = exactly(function, x), GPU_BOUNDS[function](x)
    normal, small = (np.abs(exact) >= TINY) & (exact < 3.4e38), np.abs(exact) < TINY
    shares = np.random.default_rng(0).uniform(-1, 1, (2, len(x)))
    for exponential, division in ((1, 1), (1, -1), (-1, 1), (-1, -1), shares):
        y = on_a_gpu(function, x, np.broadcast_to(exponential, x.shape), np.broadcast_to(division, x.shape))
        assert (ulps(y, exact)[normal] <= allowed[normal]).all()
        assert (np.abs(y[small] - exact[small]) <= TINY).all()


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
