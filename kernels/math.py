"""Elementwise and row-wise functions that cells and kernels share, all in fp32."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Return tanh(x) to a few roundings of its own size, without overflow at either end.

    2σ(2x) − 1 cancels near zero, and with a gate of O(1/H) that is where c lives: there a Taylor polynomial serves.
    """
    square = x * x
    near_zero = -17.0 / 315.0 + square * (62.0 / 2835.0)
    near_zero = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * near_zero)))
    return tl.where(square < 0.0625, near_zero, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


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
    """Return the mean and the sum of squared deviations of each row of x [R, N], over its `count` unmasked columns."""
    mean = tl.sum(tl.where(mask, x, 0.0), 1) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def mean_m2_and_logsumexp(x, y, count, mask):
    """Return `mean_and_m2` of x, then the maximum of y and Σ exp(y − maximum) [R], by two reductions of both tiles."""
    x = tl.where(mask, x, 0.0)
    y = tl.where(mask, y, float("-inf"))
    total, maximum = tl.reduce((x, y), 1, add_and_maximum)
    mean = total / tl.maximum(count, 1.0)
    # Finite even when every column is masked, so that no −∞ − (−∞) arises.
    maximum = tl.maximum(maximum, -3.0e38)
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    m2, sumexp = tl.reduce((deviation * deviation, tl.exp(y - maximum[:, None])), 1, add_pairs)
    return mean, m2, maximum, sumexp


@triton.jit
def merge_mean_and_m2(mean, m2, count, total):
    """Merge means and M2s [R, S] of parts of `count` [S] columns into those of all `total` columns (Chan et al. 1983).

    Unlike Σx² − mean², nothing cancels when the values sit close together.
    """
    merged = tl.sum(mean * count[None, :], 1) / total
    deviation = mean - merged[:, None]
    return merged, tl.sum(m2 + deviation * deviation * count[None, :], 1)


@triton.jit
def merge_logsumexp(maximum, sumexp):
    """Merge maxima [R, S] of parts and their Σ exp(· − maximum) into log Σ exp over all columns."""
    merged = tl.max(maximum, 1)
    return merged + tl.log(tl.sum(sumexp * tl.exp(maximum - merged[:, None]), 1))
