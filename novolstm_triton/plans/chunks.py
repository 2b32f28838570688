"""How many time steps run as one chunk."""

from collections.abc import Callable

import torch

from novolstm_triton.plans.pins import pinned

CHUNK_BYTES = 2**26
"""Budget for the pre-activations of one chunk on a GPU: a few hundred steps at usual sizes."""


def constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call a function once, when it traces, and keep what it returns.

    What torch.compiler.assume_constant_result does, without its import of the compiler, which costs seconds.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@constant_in_graphs
def _pinned_chunk() -> int | None:
    return pinned().chunk


def chunk_steps(batch: int, hidden: int, gates: int, itemsize: int, backend: str) -> int:
    """Return how many time steps run as one chunk, at most: a shorter sequence is a single one.

    The length takes no part, so that torch.compile does not compile again when it changes.

    On a GPU ("triton") a chunk fills a budget, for its pre-activations [chunk, B, G·H] are the largest buffer of a
    call. On a CPU ("torch") its buffers should stay in the caches: about 2^16 units, yet enough rows for the products
    that make the weights' gradients, and few enough steps that preparing them costs little.
    """
    if (chunk := _pinned_chunk()) is not None:
        return chunk
    if backend == "torch":
        least, most, wanted = 8, 64, _largest(256 // batch, 2**16 // (batch * hidden))
        return -_largest(-most, -_largest(least, wanted))
    return _largest(16, CHUNK_BYTES // (batch * hidden * gates * itemsize))


def _largest(a: int, b: int) -> int:
    """Return the larger one; traced with a batch of any size, an expression of that size."""
    # PyTorch 2.11's compiler does not trace sym_max of plain numbers; max becomes sym_max where it has to.
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)  # pyright: ignore[reportReturnType]
