"""A kernel whose programs wait for each other, with a mistake that few GPUs would show, and what the checker says.

Run it without a GPU: `TRITON_INTERPRET=1 python examples/find_a_race.py`. Needs triton and the extra `testing`.
"""

# A type checker takes kernels for plain Python.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl

from novolstm_triton.testing import DataRace, cooperative


@triton.jit
def sum_of_all(x_ptr, parts_ptr, counter_ptr, y_ptr, SLICES: tl.constexpr, WIDTH: tl.constexpr, BARRIER: tl.constexpr):
    """Each program sums its part of x; then every one adds up all the sums."""
    me = tl.program_id(0)
    tl.store(parts_ptr + me, tl.sum(tl.load(x_ptr + me * WIDTH + tl.arange(0, WIDTH))))
    if BARRIER:
        # The release below comes from one thread; the store may have been another one's.
        tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < SLICES:
        pass
    tl.store(y_ptr + me, tl.sum(tl.load(parts_ptr + tl.arange(0, SLICES))))


def run(barrier: bool) -> torch.Tensor:
    """Run the kernel on four programs under a random schedule, with every access checked."""
    x, counter = torch.arange(64.0), torch.zeros(1, dtype=torch.int32)
    with cooperative(seed=1, poison=True, one_writer=True):
        parts, y = torch.empty(4), torch.empty(4)
        sum_of_all[(4,)](x, parts, counter, y, SLICES=4, WIDTH=16, BARRIER=barrier)
    return y


def main() -> None:
    """Run the kernel with and without its block barrier."""
    print("with the barrier:", run(True).tolist())
    try:
        run(False)
    except DataRace as race:
        print("without it:", race)


if __name__ == "__main__":
    main()
