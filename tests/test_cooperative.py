"""The concurrent interpreter itself: what it must find in wrong kernels, and what right ones may do."""

# A type checker takes kernels for plain Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import linecache
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from novolstm_triton.testing import (
    POLICIES,
    DataRace,
    Deadlock,
    OutOfBounds,
    ProgramError,
    ReadBeforeWrite,
    TwoWriters,
    cooperative,
    poisoned,
    poisoned_allocations,
)

PROGRAMS = 4
WIDTH = 8
SEEDS = [None, 0, 1, 2, 3, 4, 5]


@triton.jit
def arrive(counter_ptr, BARRIER: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr):
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem=SEM, scope=SCOPE)


@triton.jit
def wait(counter_ptr, arrivals, SEM: tl.constexpr, SCOPE: tl.constexpr):
    while tl.atomic_add(counter_ptr, 0, sem=SEM, scope=SCOPE) < arrivals:  # the waiting line
        pass


@triton.jit
def rotate(
    x_ptr,
    y_ptr,
    counter_ptr,
    steps,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr = 2,
    ARRIVE: tl.constexpr = True,
    WAIT: tl.constexpr = True,
    ABSENT: tl.constexpr = -1,
    BARRIER: tl.constexpr = True,
    RELEASE: tl.constexpr = "release",
    ACQUIRE: tl.constexpr = "acquire",
    SCOPE: tl.constexpr = "gpu",
    VOLATILE: tl.constexpr = False,
):
    """Each program stores a row, waits for all, takes its neighbour's row, and so on, in a ring of SLOTS rows each."""
    me = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, WIDTH)
    row = me * 1.0 + lane
    for step in range(steps):
        slot = x_ptr + step % SLOTS * programs * WIDTH
        tl.store(slot + me * WIDTH + lane, row)  # the storing line
        if ARRIVE and me != ABSENT:
            arrive(counter_ptr, BARRIER, RELEASE, SCOPE)
        if WAIT:
            wait(counter_ptr, (step + 1) * programs, ACQUIRE, SCOPE)
        row = tl.load(slot + (me + 1) % programs * WIDTH + lane, volatile=VOLATILE)  # the loading line
    tl.store(y_ptr + me * WIDTH + lane, row)


def run_rotate(seed=None, steps=3, self_validating=(), check_races=True, **options):
    x, y = poisoned(2, PROGRAMS, WIDTH), poisoned(PROGRAMS, WIDTH)
    with cooperative(seed, self_validating=self_validating, check_races=check_races) as report:
        rotate[(PROGRAMS,)](x, y, torch.zeros(1, dtype=torch.int32), steps, WIDTH=WIDTH, **options)
    rows = (torch.arange(PROGRAMS) + steps) % PROGRAMS
    torch.testing.assert_close(y, rows[:, None] + torch.arange(WIDTH, dtype=torch.float32))
    return report


def line_of(text):
    """Where a kernel line of this file is, as error messages name it."""
    lines = linecache.getlines(__file__)
    number = next(number for number, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {text}"))
    return f"test_cooperative.py:{number} in "


def assert_nothing_left():
    builder = interpreter.interpreter_builder
    assert not [name for name in vars(builder) if name.startswith("create_")]
    assert interpreter.GridExecutor.__call__.__module__ == interpreter.__name__
    assert interpreter._patch_lang.__module__ == interpreter.__name__
    assert tl.core.is_builtin(tl.load)
    assert "__index__" not in vars(tl.tensor)


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_is_right_under_every_schedule(seed):
    report = run_rotate(seed)
    assert report.programs == PROGRAMS
    assert report.atomics >= 2 * 3 * PROGRAMS
    assert report.switches >= (3 * 4 + 1) * PROGRAMS
    assert report.checked > 0
    assert len(report.trace) == report.switches + PROGRAMS


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier_is_a_race(seed):
    with pytest.raises(DataRace, match="read-write race on x_ptr") as error:
        run_rotate(seed, ARRIVE=False, WAIT=False)
    assert line_of("the storing line") + "rotate" in str(error.value)
    assert line_of("the loading line") + "rotate" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"RELEASE": "relaxed"}, id="relaxed-release"),
        pytest.param({"ACQUIRE": "relaxed"}, id="relaxed-acquire"),
        pytest.param({"SCOPE": "cta"}, id="scope-cta"),
        pytest.param({"BARRIER": False}, id="release-before-the-threads-have-stored"),
        pytest.param({"VOLATILE": True, "WAIT": False}, id="volatile-but-not-self-validating"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_weak_synchronisation_is_a_race(seed, options):
    with pytest.raises(DataRace):
        run_rotate(seed, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_overwriting_too_early_is_a_race_or_gives_wrong_values(seed):
    # Where the reader happens to wait until the overwriting has been released, it is ordered, and wrong.
    with pytest.raises((DataRace, AssertionError)):
        run_rotate(seed, SLOTS=1)


def test_race_names_both_accesses_and_the_element():
    with pytest.raises(DataRace) as error:
        run_rotate(RELEASE="relaxed")
    first, earlier, later, _ = str(error.value).splitlines()
    assert re.match(r"read-write race on x_ptr\[0, \d, 0\] \(element \d+ of float32 \[2, 4, 8\]\)", first)
    assert re.match(r"  program \(\d, 0, 0\) writes it in step 0 at \S*test_cooperative.py:\d+ in rotate$", earlier)
    assert re.match(r"  program \(\d, 0, 0\) reads it in step 0 at \S*test_cooperative.py:\d+ in rotate$", later)


@triton.jit
def all_store(x_ptr):
    tl.store(x_ptr + tl.arange(0, 4), tl.program_id(0))


def test_two_stores_are_a_write_write_race():
    with pytest.raises(DataRace, match=r"write-write race on x_ptr\[0\]"), cooperative():
        all_store[(2,)](torch.zeros(4, dtype=torch.int32))
    with cooperative(check_races=False):
        all_store[(2,)](torch.zeros(4, dtype=torch.int32))


@triton.jit
def store_halves(x_ptr):
    halves = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(halves + 2 * tl.arange(0, 4) + tl.program_id(0), tl.program_id(0) + 1)


def test_accesses_narrower_than_the_tensor_keep_apart():
    x = torch.zeros(4, dtype=torch.int64)
    with cooperative():
        store_halves[(2,)](x)
    assert x.tolist() == [2 << 32 | 1] * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_arrival_is_a_deadlock(seed):
    with pytest.raises(Deadlock) as error:
        run_rotate(seed, ABSENT=1)
    first, waiting = str(error.value).splitlines()
    assert first.startswith("4 of 4 programs wait")
    assert waiting.startswith("  (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0): for counter_ptr[0]")
    assert line_of("the waiting line") + "wait, called at " in waiting
    assert waiting.endswith(" in rotate")
    assert_nothing_left()


@triton.jit
def read_often(x_ptr, y_ptr, counter_ptr, steps):
    """Program 1 catches up on what program 0 has long done, and stores only once."""
    if tl.program_id(0) == 0:
        tl.store(x_ptr, 1.0)
        arrive(counter_ptr, True, "release", "gpu")
    else:
        total = 0.0
        for _ in range(steps):
            wait(counter_ptr, 1, "acquire", "gpu")
            total += tl.load(x_ptr)
        tl.store(y_ptr, total)


@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_reads_are_no_deadlock(seed):
    x, y = poisoned(1), poisoned(1)
    with cooperative(seed):
        read_often[(2,)](x, y, torch.zeros(1, dtype=torch.int32), 300)
    assert y.item() == 300


@triton.jit
def spin_on_plain_load(x_ptr):
    while tl.load(x_ptr) == 0:
        pass


def test_waiting_with_plain_loads_is_a_deadlock():
    with pytest.raises(Deadlock, match="spin_on_plain_load"), cooperative(check_races=False):
        spin_on_plain_load[(1,)](torch.zeros(1))


@triton.jit
def lane_beyond(x_ptr, y_ptr, SHIFT: tl.constexpr, STORE: tl.constexpr):
    lane = tl.arange(0, 8)
    if STORE:
        tl.store(y_ptr + lane + SHIFT, lane)  # the store beyond
    else:
        tl.store(y_ptr + lane, tl.load(x_ptr + lane + SHIFT, mask=lane >= 0))


@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
@pytest.mark.parametrize("shift", [1, -1, 1 << 20])
def test_out_of_bounds(shift, store):
    x, y = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    message = r"program \(0, 0, 0\).*_ptr\[-?\d+\].*outside the tensor"
    with pytest.raises(OutOfBounds, match=message) as error, cooperative(check_races=False):
        lane_beyond[(1,)](x, y, SHIFT=shift, STORE=store)
    assert not store or line_of("the store beyond") in str(error.value)
    assert_nothing_left()


@triton.jit
def masked_beyond(x_ptr, y_ptr, n):
    lane = tl.arange(0, 8)
    tl.store(y_ptr + lane, tl.load(x_ptr + lane, mask=lane < n, other=7), mask=lane < n)


def test_masked_lanes_may_point_anywhere():
    y = torch.zeros(3, dtype=torch.int32)
    with cooperative():
        masked_beyond[(1,)](torch.arange(3, dtype=torch.int32), y, 3)
    assert y.tolist() == [0, 1, 2]


@triton.jit
def pass_on(x_ptr, y_ptr, LANES: tl.constexpr):
    """Program 0 stores words that are never −1; the others take them as soon as no −1 is left."""
    lane = tl.arange(0, LANES)
    if tl.program_id(0) == 0:
        tl.store(x_ptr + lane, lane)
    else:
        words = tl.load(x_ptr + lane, volatile=True)
        while tl.max((words == -1).to(tl.int32)) != 0:
            words = tl.load(x_ptr + lane, volatile=True)
        tl.store(y_ptr + tl.program_id(0) * LANES + lane, words)


@pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "by-tensor"])
@pytest.mark.parametrize("seed", SEEDS)
def test_words_that_validate_themselves_need_no_order(seed, by_name):
    x, y = torch.full((8,), -1, dtype=torch.int32), torch.zeros(3, 8, dtype=torch.int32)
    with cooperative(seed, self_validating=["x_ptr" if by_name else x]):
        pass_on[(3,)](x, y, LANES=8)
    assert y[1:].tolist() == [list(range(8))] * 2


def test_stores_of_self_validating_words_are_checked():
    x = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(DataRace, match="write-write"), cooperative(self_validating=[x]):
        all_store[(2,)](x)


@triton.jit
def hand_over_words(x_ptr, answer_ptr, plain_ptr, y_ptr, steps, ANSWER: tl.constexpr, TRUST: tl.constexpr):
    """Program 0 stores 1, 2, ... in one word; program 1 takes each and, if ANSWER, says so with a word of its own."""
    if tl.program_id(0) == 0:
        tl.store(plain_ptr, 7)
    for step in range(steps):
        if tl.program_id(0) == 0:
            tl.store(x_ptr, step + 1)  # the word
            if ANSWER:
                while tl.load(answer_ptr, volatile=True) != step + 1:
                    pass
        else:
            while tl.load(x_ptr, volatile=True) < step + 1:
                pass
            if TRUST:
                tl.store(y_ptr, tl.load(plain_ptr))
            tl.store(answer_ptr, step + 1)


def run_words(seed, **options):
    x, answer, plain, y = (torch.zeros(1, dtype=torch.int32) for _ in range(4))
    with cooperative(seed, self_validating=["x_ptr", "answer_ptr"]):
        hand_over_words[(2,)](x, answer, plain, y, 3, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_word_may_be_replaced_once_its_taking_is_known(seed):
    run_words(seed, ANSWER=True, TRUST=False)


def test_word_replaced_too_early_is_a_race():
    message = r"its old value had been taken(?s:.)*took it in step 0\n(?s:.)*writes it in step [12]"
    with pytest.raises(DataRace, match=message):
        # In turns: the reader takes some value before the writer has ended.
        run_words(None, ANSWER=False, TRUST=False)


@pytest.mark.parametrize("seed", range(4))
def test_word_orders_nothing_but_itself(seed):
    with pytest.raises(DataRace, match="plain_ptr"):
        run_words(seed, ANSWER=True, TRUST=True)


@triton.jit
def copy_some(x_ptr, y_ptr, FIRST: tl.constexpr):
    lane = tl.arange(0, 8)
    tl.store(x_ptr + lane, lane, mask=lane >= FIRST)
    tl.store(y_ptr + lane, tl.load(x_ptr + lane))  # the reading line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_reading_what_nobody_has_written(dtype):
    with cooperative(poison=True):
        copy_some[(1,)](torch.empty(8, dtype=dtype), torch.empty(8, dtype=dtype), FIRST=0)
    with (
        pytest.raises(ReadBeforeWrite, match=r"x_ptr\[0\].*which nobody has written") as error,
        cooperative(poison=True),
    ):
        copy_some[(1,)](torch.empty(8, dtype=dtype), torch.empty(8, dtype=dtype), FIRST=1)
    assert line_of("the reading line") in str(error.value)


def test_what_pytorch_or_an_earlier_grid_wrote_may_be_read():
    with cooperative(poison=True):
        x, y, z = torch.empty(8), torch.empty(8), torch.empty(8)
        x[:3] = 1
        copy_some[(1,)](x, y, FIRST=3)
        copy_some[(1,)](y, z, FIRST=4)
    assert z.tolist() == [1, 1, 1, 3, 4, 5, 6, 7]


@triton.jit
def write_in_turn(x_ptr, counter_ptr):
    """All programs write one word, one after the other."""
    me = tl.program_id(0)
    wait(counter_ptr, me, "acquire", "gpu")
    tl.store(x_ptr, me)
    arrive(counter_ptr, True, "release", "gpu")


def test_two_writers_in_turn_are_an_error_if_asked_for():
    x, counter = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with cooperative():
        write_in_turn[(3,)](x, counter)
    assert x.item() == 2
    message = r"two programs write x_ptr\[0\](?s:.)*\(0, 0, 0\) writes it at(?s:.)*\(1, 0, 0\) writes it at"
    with pytest.raises(TwoWriters, match=message), cooperative(one_writer=True):
        write_in_turn[(3,)](x, counter.zero_())


@triton.jit
def copy_rows(x_ptr, y_ptr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.arange(0, 4)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]
    tl.store(y_ptr + place, tl.load(x_ptr + place))


def test_pointers_are_held_to_their_own_tensor():
    """Though the memory beyond belongs to another one, or to the one that it is a part of."""
    both = torch.arange(32.0).view(4, 8)
    left, right = both[:, :4], both[:, 4:]
    with cooperative():
        copy_rows[(1,)](left, right, STRIDE=8, COLUMNS=4)
    assert torch.equal(left, right)
    with pytest.raises(OutOfBounds, match=r"x_ptr.*outside the tensor"), cooperative():
        copy_rows[(1,)](left, torch.zeros(4, 8), STRIDE=8, COLUMNS=8)
    first, second = torch.zeros(2, 32)
    # The memory goes on in both directions: the one is followed, the other preceded by its neighbour.
    with pytest.raises(OutOfBounds, match=r"x_ptr\[32\]"), cooperative():
        copy_rows[(1,)](first, second, STRIDE=10, COLUMNS=4)


@triton.jit
def square(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, x * x)


def test_overflow_of_integers_is_an_error_if_asked_for():
    with cooperative():
        square[(1,)](torch.full((1,), 2**16, dtype=torch.int32))
    with pytest.raises(ProgramError, match="overflow"), cooperative(check_overflow=True):
        square[(1,)](torch.full((1,), 2**16, dtype=torch.int32))


@triton.jit
def fail_in(x):
    tl.static_assert(x.dtype == tl.int32, "no integer")  # the failing line
    return x


@triton.jit
def failing(x_ptr, counter_ptr):
    if tl.program_id(0) == 1:
        fail_in(tl.load(x_ptr))
    else:
        wait(counter_ptr, 1, "acquire", "gpu")


@pytest.mark.parametrize("seed", SEEDS)
def test_exception_names_program_and_lines(seed):
    message = r"program \(1, 0, 0\) .*AssertionError: no integer"
    with pytest.raises(ProgramError, match=message) as error, cooperative(seed):
        failing[(3,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert line_of("the failing line") + "fail_in, called at " in str(error.value)
    assert isinstance(error.value.__cause__, AssertionError)
    assert_nothing_left()


@triton.jit
def copy_by_descriptor(source, y_ptr, FIRST: tl.constexpr):
    target = tl.make_tensor_descriptor(y_ptr, [4, 8], [8, 1], [2, 8])
    for row in tl.static_range(0, 4, 2):
        target.store([row, 0], source.load([row + FIRST, 0]))


def test_descriptors():
    x, y = torch.randn(4, 8), poisoned(4, 8)
    with cooperative() as report:
        copy_by_descriptor[(1,)](TensorDescriptor.from_tensor(x, [2, 8]), y, FIRST=2)
    torch.testing.assert_close(y, torch.cat([x[2:], torch.zeros(2, 8)]))
    assert report.switches == 4
    with pytest.raises(DataRace, match="write-write race on y_ptr"), cooperative():
        copy_by_descriptor[(2,)](TensorDescriptor.from_tensor(x, [2, 8]), y, FIRST=0)


@triton.jit
def take_turns(lock_ptr, x_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") != 0:
        pass
    tl.store(x_ptr, tl.load(x_ptr) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0, sem="release")


@pytest.mark.parametrize("seed", SEEDS)
def test_lock(seed):
    x = torch.zeros(1)
    with cooperative(seed):
        take_turns[(5,)](torch.zeros(1, dtype=torch.int32), x)
    assert x.item() == 5


def test_blocks_do_not_nest():
    with cooperative(), pytest.raises(RuntimeError, match="do not nest"), cooperative():
        pass


def test_schedules_repeat_with_their_seed():
    first, again, other = run_rotate(7), run_rotate(7), run_rotate(10)
    assert first.policy == again.policy == other.policy
    assert first.trace == again.trace
    assert first.trace != other.trace


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_asked_for(policy):
    with cooperative(5, policy=policy) as report:
        all_store[(1,)](torch.zeros(4, dtype=torch.int32))
    assert report.policy == policy


def test_nothing_is_left_after_success():
    run_rotate()
    assert_nothing_left()


@triton.jit
def square_and_cube(x):
    square = x * x
    return square, square * x


@triton.jit
def add_all(x):
    total = x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i]
    return total


@triton.jit
def language_kernel(pointers, sizes, steps, CELL: tl.constexpr, SUM: tl.constexpr, BLOCKS: tl.constexpr):
    """What the kernels of this package use of the language, beyond loads and arithmetic."""
    lane = tl.arange(0, 4)
    tiles = ()
    for block in tl.static_range(BLOCKS):
        tiles += (tl.load(pointers[0] + block * 4 + lane),)
    carried = (tiles[0], tiles[1])
    for step in range(steps):
        square, cube = CELL(carried[0])
        carried = (carried[1] + tl.cast(step, tl.int64), square - cube)
    tl.store(pointers[1] + lane, carried[0] + SUM(tiles) + sizes[1], mask=lane < sizes[0])


def test_tuples_and_functions_as_arguments():
    x, y = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 8, poisoned(4)
    with cooperative():
        language_kernel[(1,)]((x, y), (3, 10), 3, CELL=square_and_cube, SUM=add_all, BLOCKS=3)
    a, b = x[0], x[1]
    for step in range(3):
        a, b = b + step, a * a - a * a * a
    torch.testing.assert_close(y, torch.where(torch.arange(4) < 3, a + x.sum(0) + 10, torch.nan), equal_nan=True)


@triton.jit
def overflow(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, tl.exp(x) - tl.exp(x))


def test_floating_point_warns_of_nothing():
    x = torch.full((1,), 1e6)
    with cooperative(), np.errstate(all="raise"):
        overflow[(1,)](x)
    assert x.isnan().all()


@triton.jit
def round_and_compare(x_ptr, y_ptr, same_ptr, n, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    x = tl.load(x_ptr + lane)
    y = x.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + lane, y)
    tl.store(same_ptr + lane, (y + y == 2 * y.to(tl.float32)).to(tl.int32), mask=(lane < LANES) & (n > 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest(dtype):
    x = torch.cat([torch.randn(1017), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, -1.9962, 3.4e38, 1e-40])])
    y, same = torch.empty(1024, dtype=dtype), torch.zeros(1024, dtype=torch.int32)
    with cooperative():
        round_and_compare[(1,)](x, y, same, 1, LANES=1024)
    assert torch.equal(y, x.to(dtype))
    assert torch.equal(same == 1, y + y == 2 * y.float())


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(x_ptr + place), tl.load(y_ptr + place), input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot(dtype):
    x, y, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), poisoned(16, 16)
    with cooperative():
        multiply[(1,)](x, y, out, N=16)
    torch.testing.assert_close(out, x.float() @ y.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_poisoned_floats_are_nan(dtype):
    with poisoned_allocations():
        x = torch.empty(2, 3, dtype=dtype)
        buffers = [x, x.new_empty(4), torch.empty_like(x), torch.empty_strided((2,), (3,), dtype=dtype)]
    assert all(buffer.isnan().all() for buffer in (*buffers, poisoned(3, dtype=dtype)))
    assert not torch.are_deterministic_algorithms_enabled()


def test_poisoned_integers_are_garbage():
    with cooperative(poison=True):
        assert (torch.empty(3, dtype=torch.int32) > 10**9).all()


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no atomic loads")
class TestAtomicLoads:
    @staticmethod
    def run(seed, **options):
        x = poisoned(1)
        with cooperative(seed):
            hand_over[(2,)](x, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), **options)
        assert x.item() == 6

    @pytest.mark.parametrize("poll", [True, False], ids=["poll", "load"])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_order(self, seed, poll):
        self.run(seed, POLL=poll, STORE="release", LOAD="acquire")

    @pytest.mark.parametrize("poll", [True, False], ids=["poll", "load"])
    @pytest.mark.parametrize("sems", [("relaxed", "acquire"), ("release", "relaxed")], ids="-".join)
    def test_relaxed_is_a_race(self, sems, poll):
        with pytest.raises(DataRace):
            self.run(None, POLL=poll, STORE=sems[0], LOAD=sems[1])


@triton.jit
def hand_over(x_ptr, flag_ptr, done_ptr, POLL: tl.constexpr, STORE: tl.constexpr, LOAD: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(x_ptr, 5.0)
        tl.debug_barrier()
        tl.atomic_store(flag_ptr, 1, sem=STORE)
    else:
        if POLL:
            tl.atomic_poll(flag_ptr, 1, sem=LOAD)
        else:
            while tl.atomic_load(flag_ptr, sem=LOAD) == 0:
                pass
        tl.store(x_ptr, tl.load(x_ptr) + 1)
