"""Elementwise and row-wise functions that cells and kernels share, all in fp32."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Return tanh(x) to a few roundings of its own size, odd, without overflow at either end.

    (1 − e)/(1 + e) with e = exp(−2|x|) cancels near zero, and with a gate of O(1/H) that is where c lives: below 1/2 a
    polynomial serves, whose relative error is least in the maximum, 1.5e-8.
    """
    square = x * x
    near_zero = -0.053045495 + square * 0.017241492
    near_zero = x * (1.0 + square * (-0.33333144 + square * (0.13325879 + square * near_zero)))
    e = tl.exp(-2.0 * tl.abs(x))
    away = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.25, near_zero, tl.where(x < 0, -away, away))


@triton.jit
def add_pairs(a, b, a_other, b_other):
    """Combine two pairs by addition; for tl.reduce."""
    return a + a_other, b + b_other


@triton.jit
def add_triples(a, b, c, a_other, b_other, c_other):
    """Combine two triples by addition; for tl.reduce."""
    return a + a_other, b + b_other, c + c_other


@triton.jit
def add_and_maximum(total, maximum, total_other, maximum_other):
    """Combine two pairs, the first by addition, the second by the maximum; for tl.reduce."""
    return total + total_other, tl.maximum(maximum, maximum_other)


@triton.jit
def row_sums(tiles):
    """Return the row sums of a tuple of tiles [R, N] in one reduction, however many they are (one to three)."""
    if len(tiles) == 1:
        sums = (tl.sum(tiles[0], 1),)
    elif len(tiles) == 2:
        sums = tl.reduce(tiles, 1, add_pairs)
    else:
        sums = tl.reduce(tiles, 1, add_triples)
    return sums


@triton.jit
def mean_and_m2(x, count, mask):
    """Return the mean and the sum of squared deviations of each row of x [R, N], over its `count` unmasked columns.

    The deviations make good the mean's own rounding error, which r = 1/√(variance + ε) would magnify by up to 1/√ε: of
    equal values the mean is exactly their value.
    """
    count = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(mask, x, 0.0), 1) / count
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    rest, m2 = tl.reduce((deviation, deviation * deviation), 1, add_pairs)
    return mean + rest / count, m2


@triton.jit
def mean_m2_and_sumexp(x, y, count, mask):
    """Return `mean_and_m2` of x, then the maximum of y and Σ exp(y − maximum) [R], by two reductions of both tiles."""
    x = tl.where(mask, x, 0.0)
    y = tl.where(mask, y, float("-inf"))
    count = tl.maximum(count, 1.0)
    total, maximum = tl.reduce((x, y), 1, add_and_maximum)
    mean = total / count
    # Finite even when every column is masked, so that no −∞ − (−∞) arises.
    maximum = tl.maximum(maximum, -3.0e38)
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    tiles = (deviation, deviation * deviation, tl.exp(y - maximum[:, None]))
    rest, m2, sumexp = tl.reduce(tiles, 1, add_triples)
    return mean + rest / count, m2, maximum, sumexp


@triton.jit
def merge_mean_and_m2(mean, m2, count, total):
    """Merge means and M2s [R, S] of parts of `count` [S] columns into those of all `total` columns (Chan et al. 1983).

    Unlike Σx² − mean², nothing cancels when the values sit close together; as in `mean_and_m2`, the deviations make
    good the mean's rounding error.
    """
    merged = tl.sum(mean * count[None, :], 1) / total
    deviation = mean - merged[:, None]
    weighted = deviation * count[None, :]
    rest, m2 = tl.reduce((weighted, m2 + deviation * weighted), 1, add_pairs)
    return merged + rest / total, m2


@triton.jit
def merge_sumexp(maximum, sumexp):
    """Merge maxima [R, S] of parts and their Σ exp(· − maximum) into those of all columns.

    They stay apart: in maximum + log Σexp the logarithm would be lost beside a large maximum.
    """
    merged = tl.max(maximum, 1)
    return merged, tl.sum(sumexp * tl.exp(maximum - merged[:, None]), 1)
