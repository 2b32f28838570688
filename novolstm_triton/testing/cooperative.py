"""Runs the programs of an interpreted Triton grid side by side, so that kernels whose programs wait can be tested.

Triton's interpreter runs the programs of a grid one after another: one that waits for a later one never returns.
Inside `cooperative` each program is a coroutine that hands over before every load, store and atomic:

    with cooperative(seed=3) as report:
        kernel[(4,)](x, counter, ...)

A wrong kernel raises one of the errors of this package; each names the kernel's lines, the programs, the element and
the step. Whether accesses are ordered is found without unlucky timing, but along the order in which the atomics
happened to come: where that may differ between runs, run several seeds.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import random
import sys
import textwrap
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import greenlet
import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter

from .allocations import Allocations, poisoned_allocations
from .happens_before import ATOMIC_READ, ATOMIC_WRITE, READ, TAG_SHIFT, WRITE, GridError, Memory, Sites
from .interpreter_repairs import REPAIRS, generic_reduce
from .interpreter_speed import faster
from .schedules import POLICIES, Program

# How many volatile loads or atomics, all repeated with no store by anyone in between, show that a program is stuck.
_MAX_POLLS = 100
# The same for plain loads, which a loop that waits for nothing may well repeat.
_MAX_REREADS = 10_000


class Deadlock(GridError):
    """Every remaining program repeats the same reads, and none stores."""


class ProgramError(GridError):
    """A program raised; the cause is its exception."""


@dataclasses.dataclass
class Report:
    """What happened inside one `cooperative` block, over all its grids.

    Attributes:
        policy: name of the schedule.
        programs: programs run.
        switches: memory operations, each one a chance for another program to run.
        atomics: how many of them were atomic.
        checked: words whose order with the other programs was checked.
        max_spins: most volatile loads or atomics that one program repeated before it went on.
        trace: number of the program that ran, switch by switch.
    """

    policy: str
    programs: int = 0
    switches: int = 0
    atomics: int = 0
    checked: int = 0
    max_spins: int = 0
    trace: array = dataclasses.field(default_factory=lambda: array("i"), repr=False)


class _Grid:
    """One launch. It stands in for the kernel: collects the interpreter's one call per program, then runs them all."""

    def __init__(self, executor: interpreter.GridExecutor, session: "_Session") -> None:
        self.kernel, self.session, self.report = executor.fn, session, session.report
        # The interpreter looks at these of what it calls.
        self.__name__, self.__globals__ = self.kernel.__name__, self.kernel.__globals__
        self.__signature__ = inspect.signature(self.kernel)
        self.sites, self.tensors = Sites(), []
        self._loop = _loop_variable(self.kernel)
        self.live: list[Program] = []
        self.current: Program
        self.failure: GridError | None = None
        self.version = 0
        self._calls: list[tuple] = []
        self._patched: set[int] = set()
        self._helper_patches: list = []

    def __call__(self, **arguments) -> None:
        builder = interpreter.interpreter_builder
        self._calls.append((builder.grid_idx, arguments))
        if len(self._calls) == np.prod(builder.grid_dim):
            indices = [index for index, _ in self._calls]
            self.memory = self.session.memory(self.tensors, indices, self.sites)
            with contextlib.ExitStack() as patches:
                patches.callback(self._undo_helper_patches)
                self._patch_interpreter(builder, patches)
                self._run(builder)

    def waits(self, program: Program) -> bool:
        """Whether the program only polls and nothing has changed that could help it."""
        return program.version == self.version and program.polls > 2

    def _stuck(self, program: Program) -> bool:
        repeats = program.polls > _MAX_POLLS or program.rereads > _MAX_REREADS
        return repeats and program.version == self.version

    def _run(self, builder) -> None:
        self._scheduler = greenlet.getcurrent()
        self.live = [Program(number, index, self._body) for number, (index, _) in enumerate(self._calls)]
        self.report.programs += len(self.live)
        schedule = POLICIES[self.report.policy](self, self.session.rng)
        try:
            while self.live:
                self.current = program = next(schedule)
                builder.grid_idx = program.index
                self.report.trace.append(program.number)
                program.coroutine.switch()
                if self.failure is not None:
                    raise self.failure
                if program.coroutine.dead:
                    self.live.remove(program)
                    self.version += 1
                elif self._stuck(program) and all(map(self._stuck, self.live)):
                    self.failure = Deadlock(self._deadlock())
                    raise self.failure
        finally:
            self.report.checked += self.memory.checked
            for program in self.live:
                program.coroutine.throw(greenlet.GreenletExit)

    def _body(self, program: Program) -> None:
        try:
            # A GPU does not warn of overflow or invalid values.
            with np.errstate(all="ignore"):
                self.kernel(**self._calls[program.number][1])
        except Exception as error:
            # The interpreter wraps an exception once for each helper function that it passes through.
            place = _place(error)
            while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
                error = error.__cause__
                place = _place(error) + place
            self.failure = error if isinstance(error, GridError) else None
            if self.failure is None:
                where = self.sites.describe(self.sites.number(place))
                self.failure = ProgramError(f"program {program.index} at {where}: {type(error).__name__}: {error}")
                self.failure.__cause__ = error

    def _deadlock(self) -> str:
        waiting: dict[tuple, list[Program]] = {}
        for program in self.live:
            waiting.setdefault((program.site, self.memory.describe(program.address)), []).append(program)
        lines = [f"{len(self.live)} of {len(self._calls)} programs wait, the others have ended ({self.report.policy})"]
        for (site, what), programs in waiting.items():
            names = ", ".join(str(program.index) for program in programs)
            lines.append(f"  {names}: for {what} at {self.sites.describe(site)}")
        return "\n".join(lines)

    def _patch_interpreter(self, builder, patches: contextlib.ExitStack) -> None:
        wrappers = {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._atomic_rmw,
            "create_atomic_cas": self._atomic_cas,
            "create_barrier": self._barrier,
            # Triton 3.9 builds these from a load or a store.
            "create_atomic_load": self._atomic_load_or_store,
            "create_atomic_poll": self._atomic_load_or_store,
            "create_atomic_store": self._atomic_load_or_store,
            **REPAIRS,
        }
        for name, wrapper in wrappers.items():
            if hasattr(builder, name):
                wrapped = functools.partial(wrapper, getattr(builder, name))
                patches.enter_context(mock.patch.object(builder, name, wrapped))
        reduce = interpreter.ReduceOps.generic_reduce

        def repaired(reduction, inputs):
            return generic_reduce(reduce, reduction, inputs)

        patches.enter_context(mock.patch.object(interpreter.ReduceOps, "generic_reduce", repaired))

    def patch_lang(self, patch: Callable, function: Callable):
        """Patches triton.language, once: the interpreter does it at every call of a helper, at many times its cost."""
        if id(function.__globals__) in self._patched:
            return None
        scope = patch(function)
        # Triton 3.6 converts an array of one element to an integer, which numpy no longer does.
        scope.set_attr(tl.tensor, "__index__", lambda tensor: tensor.handle.data.item())
        if self._patched:
            self._helper_patches.append(scope)
        self._patched.add(id(function.__globals__))
        return scope

    def _undo_helper_patches(self) -> None:
        while self._helper_patches:
            self._helper_patches.pop().restore()

    def _hand_over(self, pointers, mask) -> tuple[Program, np.ndarray, int]:
        """Lets others run; returns the program, the addresses of the lanes in use and their item size in bytes."""
        program = self.current
        mask = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        addresses = pointers.data[mask]
        program.site, program.address = self.sites.here(), int(addresses[0]) if len(addresses) else 0
        self._note_step(program)
        self.report.switches += 1
        self._scheduler.switch()
        return program, addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def _note_step(self, program: Program) -> None:
        """Look up the loop variable in the kernel's frame."""
        if self._loop is None:
            return
        names, filename = self._loop
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == names[0] and frame.f_code.co_filename == filename:
                step = frame.f_locals.get(names[1])
                if isinstance(step, int):
                    self.memory.step(program.number, step)
                return
            frame = frame.f_back

    def _note(self, program: Program, addresses: np.ndarray, wrote: bool, polling: bool) -> None:
        if wrote:
            self.version += 1
            program.note_change()
        else:
            key = (program.site, program.address, len(addresses))
            program.note_read(key, polling, self.version)
            self.report.max_spins = max(self.report.max_spins, program.spins)

    def _load(self, operation, pointers, mask, other, *policy, **keywords):
        program, addresses, item_bytes = self._hand_over(pointers, mask)
        volatile = bool(keywords.get("is_volatile", policy[-1] if policy else False))
        if program.atomic is None:
            self.memory.access(program.number, READ, addresses, item_bytes, program.site, volatile)
        else:
            self._order(program, addresses, item_bytes, *program.atomic, wrote=False)
        self._note(program, addresses, wrote=False, polling=volatile)
        return operation(_untagged(pointers), mask, other, *policy, **keywords)

    def _store(self, operation, pointers, value, mask, *policy, **keywords):
        program, addresses, item_bytes = self._hand_over(pointers, mask)
        if program.atomic is None:
            self.memory.access(program.number, WRITE, addresses, item_bytes, program.site)
        else:
            self._order(program, addresses, item_bytes, *program.atomic, wrote=True, replace=True)
        self._note(program, addresses, wrote=True, polling=False)
        return operation(_untagged(pointers), value, mask, *policy, **keywords)

    def _atomic_rmw(self, operation, kind, pointers, value, mask, sem, scope):
        program, addresses, item_bytes = self._hand_over(pointers, mask)
        self._order(program, addresses, item_bytes, sem, scope, wrote=True)
        old = operation(kind, _untagged(pointers), value, mask, sem, scope)
        # Adding zero is how older versions of Triton read atomically: it must not count as progress.
        changed = _in_memory(pointers, mask, old).tobytes() != old.data.tobytes()
        self._note(program, addresses, wrote=changed, polling=True)
        return old

    def _atomic_cas(self, operation, pointers, expected, value, sem, scope):
        everywhere = interpreter.TensorHandle(np.ones(pointers.data.shape, bool), tl.int1)
        program, addresses, item_bytes = self._hand_over(pointers, everywhere)
        matches = bool((_in_memory(pointers, everywhere, expected) == expected.data).any())
        self._order(program, addresses, item_bytes, sem, scope, wrote=matches)
        self._note(program, addresses, wrote=matches, polling=True)
        return operation(_untagged(pointers), expected, value, sem, scope)

    def _atomic_load_or_store(self, operation, *arguments):
        program = self.current
        program.atomic = arguments[-2:]
        # A poll without a timeout gets an empty value, which the interpreter takes for a time.
        result = operation(*(None if isinstance(argument, ir.value) else argument for argument in arguments))
        program.atomic = None
        self.report.atomics += 1
        return result

    def _barrier(self, operation):
        self.memory.barrier(self.current.number)
        return operation()

    def _order(self, program, addresses, item_bytes, sem, scope, wrote, replace=False) -> None:
        """Checks an atomic and passes on what its semantics order."""
        self.report.atomics += 0 if program.atomic else 1
        if scope == ir.MEM_SYNC_SCOPE.CTA:
            # To other programs it is not an atomic at all.
            for kind in (READ, WRITE) if wrote else (READ,):
                self.memory.access(program.number, kind, addresses, item_bytes, program.site)
            return
        kind = ATOMIC_WRITE if wrote else ATOMIC_READ
        self.memory.access(program.number, kind, addresses, item_bytes, program.site)
        if sem in (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE) and not replace:
            self.memory.acquire(program.number, addresses)
        if sem in (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE) and wrote:
            self.memory.release(program.number, addresses, replace)


def _untagged(pointers: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """Return pointers as addresses, without the numbers of their arguments."""
    return interpreter.TensorHandle(pointers.data & np.uint64((1 << TAG_SHIFT) - 1), pointers.dtype)


@functools.lru_cache(maxsize=64)
def _loop_variable(kernel) -> tuple[tuple[str, str], str] | None:
    """Return the names of a kernel's function and of its first loop's variable, and the function's file."""
    try:
        function = getattr(kernel, "fn", kernel)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        filename = inspect.getsourcefile(function)
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if not isinstance(node, ast.For) or not isinstance(node.target, ast.Name):
            continue
        # Loops that are unrolled are no steps.
        if "static_range" not in ast.unparse(node.iter):
            return (function.__name__, node.target.id), str(filename)
    return None


def _in_memory(pointers, mask, like) -> np.ndarray:
    """What lies at the pointers now; the value of `like` where the mask is off."""
    filler = np.broadcast_to(like.data, pointers.data.shape)
    return interpreter._interpreter.load(_untagged(pointers).data, mask.data, filler, like.data.dtype)


def _place(error: BaseException) -> list[tuple]:
    place, step = [], error.__traceback__
    while step is not None:
        place.append((step.tb_frame.f_code, step.tb_lineno))
        step = step.tb_next
    return place[::-1]


def _tensors(name: str, value) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in one kernel argument, with their names."""
    value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


@dataclasses.dataclass
class _Session:
    report: Report
    rng: random.Random
    check_races: bool
    self_validating: tuple
    one_writer: bool
    allocations: Allocations | None

    def memory(self, tensors: list[tuple[str, torch.Tensor]], indices: list[tuple], sites: Sites) -> Memory:
        """Return the memory of a grid that is given these tensors."""
        empty = {}
        if self.allocations is not None:
            for _, tensor in tensors:
                found = self.allocations.empty_bytes(tensor)
                if found is not None:
                    empty[tensor.untyped_storage().data_ptr()] = found
        options = (self.check_races, self.self_validating, self.one_writer, empty)
        return Memory(tensors, indices, sites, *options)

    def launch(self, call: Callable, executor: interpreter.GridExecutor, *args, **kwargs) -> None:
        """Does what `GridExecutor.__call__` does, with the programs side by side."""
        grid = _Grid(executor, self)
        to_host = executor._init_args_hst

        def remember(args_dev, kwargs):
            args_hst, kwargs_hst = to_host(args_dev, kwargs)
            named = [*zip(executor.arg_names, args_hst, strict=False), *kwargs_hst.items()]
            grid.tensors = [pair for name, value in named for pair in _tensors(name, value)]
            return args_hst, kwargs_hst

        convert = interpreter._implicit_cvt

        def tagged(argument: Any) -> Any:
            result: Any = convert(argument)
            for number, (_, tensor) in enumerate(grid.tensors, 1):
                if tensor is argument:
                    data = result.handle.data | np.uint64(number << TAG_SHIFT)
                    result = tl.tensor(interpreter.TensorHandle(data, result.handle.dtype), result.type)
            return result

        # The executor lives for this launch only.
        executor.fn, executor._init_args_hst = grid, remember
        patch_lang = functools.partial(grid.patch_lang, interpreter._patch_lang)
        try:
            with (
                mock.patch.object(interpreter, "_patch_lang", patch_lang),
                mock.patch.object(interpreter, "_implicit_cvt", tagged),
            ):
                return call(executor, *args, **kwargs)
        except Exception:
            if grid.failure is None:
                raise
        raise grid.failure


@contextlib.contextmanager
def cooperative(
    seed: int | None = None,
    *,
    policy: str | None = None,
    check_races: bool = True,
    self_validating: Iterable[str | torch.Tensor] = (),
    one_writer: bool = False,
    poison: bool = False,
    check_overflow: bool = False,
) -> Iterator[Report]:
    """Runs the programs of every grid launched inside side by side.

    Args:
        seed: None for round-robin; else the seed of a random schedule, which repeats exactly.
        policy: a key of `POLICIES`; by default the seed picks one of the three random ones.
        check_races: whether to check that accesses of different programs are ordered.
        self_validating: tensors, or names of kernel arguments, whose words say by their bits whether they have
            arrived: a volatile load may take them unordered (see `happens_before.Memory`).
        one_writer: whether every word is to have one writer in a grid.
        poison: whether uninitialised memory that is allocated inside is filled with NaN (see
            `poisoned_allocations`), and reading it before it is written is an error.
        check_overflow: whether sums and products of 32-bit integers that overflow raise; costs half as much time again.

    Yields:
        The counts, complete once the block ends.

    Raises:
        Deadlock: all remaining programs wait.
        DataRace: two accesses to the same bytes are not ordered.
        OutOfBounds: an address lies outside the tensor that the pointer was made from.
        ReadBeforeWrite: with `poison`, a program read uninitialised memory.
        TwoWriters: with `one_writer`, two programs wrote the same word.
        ProgramError: a program raised.
        TypeError, ValueError: an argument of the wrong type, or an unknown policy.
        RuntimeError: Triton is not in interpreter mode, or the block is inside another.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("cooperative needs the interpreter: set TRITON_INTERPRET=1 before triton is imported")
    if not isinstance(seed, (int, type(None))):
        raise TypeError(f"seed: expected an int or None, got {seed!r}")
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy: expected one of {list(POLICIES)}, got {policy!r}")
    if isinstance(self_validating, (str, torch.Tensor)) or not isinstance(self_validating, Iterable):
        raise TypeError(f"self_validating: expected names or tensors in a list, got {type(self_validating).__name__}")
    if policy is None:
        policy = "round-robin" if seed is None else ("uniform", "bursts", "priorities")[seed % 3]
    call = interpreter.GridExecutor.__call__
    if call.__module__ != interpreter.__name__:
        raise RuntimeError("cooperative blocks do not nest")
    with contextlib.ExitStack() as stack:
        allocations = stack.enter_context(poisoned_allocations()) if poison else None
        options = (check_races, tuple(self_validating), one_writer, allocations)
        session = _Session(Report(policy), random.Random(seed), *options)
        stack.enter_context(faster(check_overflow))
        # From Triton before 3.9, where the maximum of NaNs alone is NaN, as it should be.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)

        def launch(executor, *args, **kwargs):
            return session.launch(call, executor, *args, **kwargs)

        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        yield session.report
