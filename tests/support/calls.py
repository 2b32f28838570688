"""Calls of a layer drawn by hypothesis: sizes, options, dtypes, lengths, strides, chunks, plans, schedules."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from novolstm_triton import plan
from novolstm_triton.cells import CELLS, with_kernels
from novolstm_triton.engines import bptt
from novolstm_triton.testing import cooperative

from .interpreted import ROOMY, SELF_VALIDATING
from .problems import Problem

EXACT = (torch.float32, torch.float64)
ALL = (*EXACT, torch.bfloat16, torch.float16)
"""Dtypes that calls may have."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda a: a,
    "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda a: a.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda a: torch.cat((a.flatten()[:1], a.flatten()))[min(1, a.numel()) :].view(a.shape),
    "expanded": lambda a: a[:1].expand_as(a),
}
"""Ways to lay a tensor in memory; the last one changes its values, to those of its first part."""


@dataclasses.dataclass(frozen=True)
class Drawn(Problem):
    """A problem with lengths and layouts of choice."""

    rows: tuple[int, ...] | None = None
    """The rows' lengths, or None."""
    layouts: tuple[str, ...] = ()
    """Names of the layouts of the inputs, or none: all are dense."""

    def draw(self) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return what `Problem` draws, with these lengths and layouts."""
        inputs, _, grads = super().draw()
        return self.lay(inputs), None if self.rows is None else torch.tensor(self.rows), grads

    def lay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs in their layouts."""
        layouts = self.layouts or ("dense",) * len(inputs)
        return [LAYOUTS[layout](a) for layout, a in zip(layouts, inputs, strict=True)]


@dataclasses.dataclass
class Given:
    """What a call is given, and the gradients of its results."""

    inputs: dict[str, Tensor]
    lengths: Tensor | None
    masks: dict[str, Tensor]
    grads: list[Tensor]
    """Those of y, h_n and c_n."""

    def map(self, rows: Callable[[Tensor], Tensor], steps: Callable[[Tensor], Tensor], lengths: Any = None) -> "Given":
        """Return this with tensors changed.

        Args:
            rows: what becomes of the states, of their gradients and of h_mask, [..., B, H].
            steps: likewise, of x, the gradient of y and zoneout_mask, [T, B, ...].
            lengths: likewise, of the lengths [B]; None leaves them.
        """
        by_name = {"x": steps, "zoneout_mask": steps, "h_0": rows, "c_0": rows, "h_mask": rows}
        lengths = self.lengths if lengths is None or self.lengths is None else lengths(self.lengths)
        changed = [{name: by_name.get(name, _same)(a) for name, a in d.items()} for d in (self.inputs, self.masks)]
        return Given(changed[0], lengths, changed[1], [steps(self.grads[0]), *map(rows, self.grads[1:])])

    def take(self, index: Tensor) -> "Given":
        """Return this for some of the rows."""

        def rows(a: Tensor) -> Tensor:
            return a.index_select(-2, index)

        return self.map(rows, rows, lambda lengths: lengths[index])

    def over_steps(self, steps: Callable[[Tensor], Tensor], lengths: Any = None) -> "Given":
        """Return this with the tensors over the steps changed."""
        return self.map(_same, steps, lengths)


def _same(a: Tensor) -> Tensor:
    return a


@dataclasses.dataclass(frozen=True)
class Call:
    """A problem, and how it is computed."""

    problem: Drawn
    backend: str
    dtype: torch.dtype
    chunk: int
    schedule: int = 0
    pins: tuple[tuple[str, Any], ...] = ()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Pin the chunk and the plan; interpret kernels side by side, with every check on."""
        words = SELF_VALIDATING if dict(self.pins).get("exchange") == "words" else ()
        with contextlib.ExitStack() as stack:
            stack.enter_context(plan.forced(chunk=self.chunk, **dict(self.pins)))
            if self.backend == "triton":
                checks: dict[str, Any] = dict(poison=True, one_writer=True, self_validating=words)
                stack.enter_context(cooperative(self.schedule, **checks))
            yield

    def given(self) -> Given:
        """Return what the problem draws."""
        inputs, lengths, grads = self.problem.draw()
        options = self.problem.options()
        masks = {name: options[name] for name in ("h_mask", "zoneout_mask") if name in options}
        named = zip(self.problem.input_names, self.problem.lay([a.to(self.dtype) for a in inputs]), strict=True)
        return Given(dict(named), lengths, masks, [g.to(self.dtype) for g in grads])

    def outputs(self, given: Given, **changes: Any) -> tuple[Tensor, ...]:
        """Return y, h_n and c_n; `changes` are those of `Problem.call`. Must be called within `running`."""
        inputs = [given.inputs[name] for name in self.problem.input_names]
        return self.problem.call(inputs, given.lengths, self.backend, **(given.masks | changes))

    def results(self, given: Given, needs: Sequence[str] | None = None, **changes: Any) -> dict[str, Tensor]:
        """Return y, h_n, c_n and the gradients of the inputs in `needs`, or of all."""
        wanted = [name for name, a in given.inputs.items() if a.numel() and (needs is None or name in needs)]
        leaves = {name: a.detach().requires_grad_(name in wanted) for name, a in given.inputs.items()}
        with self.running():
            outputs = self.outputs(dataclasses.replace(given, inputs=leaves), **changes)
            gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], given.grads)
        results = dict(zip(self.problem.output_names, (o.detach() for o in outputs), strict=True))
        return results | {f"grad {name}": g for name, g in zip(wanted, gradients, strict=True)}


@st.composite
def problems(
    draw: Any,
    backend: str,
    *,
    least_steps: int = 1,
    two_tiles: bool = False,
    one_way: bool = False,
    projected: bool = True,
    zoneout: bool = True,
    ordered: bool = False,
) -> Drawn:
    """Draw a problem.

    Args:
        draw: hypothesis' function.
        backend: what it is for: to the interpreter every step is dear.
        least_steps: fewest steps.
        two_tiles: in the interpreter, perhaps with rows for two batch tiles.
        one_way: never in both directions.
        projected: perhaps with a projection.
        zoneout: perhaps with zoneout.
        ordered: only of cells whose products `ordered` reaches, which it does not where functorch differentiates them.
    """
    interpreted = backend == "triton"
    steps = draw(st.integers(least_steps, 3 if interpreted else 7))
    rows = st.integers(1, 3 if interpreted else 6)
    batch = draw(rows | st.just(17) if interpreted and two_tiles and steps < 3 else rows)
    known = with_kernels() if interpreted else bptt.CELLS if ordered and backend == "torch" else tuple(CELLS)
    cell = draw(st.sampled_from(known))
    # Over fewer units a normalisation makes of rounding errors hundreds of times as much.
    hidden = draw(st.integers(4 if CELLS[cell].vectors else 1, 9))
    direction = draw(st.sampled_from(("ahead", "reverse") if one_way else ("ahead", "reverse", "both")))
    projectable = "c" in CELLS[cell].states and not CELLS[cell].first_input
    projected = projected and projectable and draw(st.integers(0, 3)) == 0
    projection = draw(st.integers(0, hidden - 1)) if projected else 0
    regularised = not projection
    return Drawn(
        steps,
        batch,
        hidden,
        draw(st.integers(1, 5)),
        cell,
        reverse=direction == "reverse",
        bidirectional=direction == "both",
        h_mask=regularised and draw(st.booleans()),
        zoneout=draw(st.sampled_from(("none", "masks", "average"))) if regularised and zoneout else "none",
        projection=projection,
        seed=draw(st.integers(0, 999)),
        rows=draw(st.none() | st.tuples(*[st.integers(0, steps)] * batch)),
    )


@st.composite
def calls(draw: Any, backend: str, dtypes: Sequence[torch.dtype] = EXACT, **options: Any) -> Call:
    """Draw a call on a backend, in one of the dtypes that it takes; the options are those of `problems`."""
    problem = draw(problems(backend, **options))
    dtype = draw(st.sampled_from([d for d in dtypes if backend != "triton" or d != torch.float64]))
    chunk = draw(st.integers(1, problem.steps))
    if backend != "triton":
        return Call(problem, backend, dtype, chunk)
    slices = draw(st.integers(1, min(3, problem.hidden)))
    exchange = draw(st.sampled_from(("barrier", "words"))) if slices > 1 else "none"
    pins = dict(
        device=ROOMY,
        slices=slices,
        exchange=exchange,
        exchanges=draw(st.sampled_from((1, 2))),
        block_k=draw(st.sampled_from((None, 16))),
        resident=True if exchange == "words" else draw(st.booleans()),
    )
    return Call(problem, backend, dtype, chunk, draw(st.integers(0, 9)), tuple(pins.items()))


# The same examples always, so that a run that passed passes again.
_SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


def for_calls(*dtypes: torch.dtype, examples: dict[str, int], **options: Any) -> Callable:
    """Return a decorator that makes a test of a property, a function of a call and hypothesis' data.

    Args:
        *dtypes: those of the calls.
        examples: how many calls to draw, by backend; a quick run draws the first fifth of them.
        **options: those of `problems`.
    """
    cases = [pytest.param(backend, -(-count // 5), id=f"{backend}-few") for backend, count in examples.items()]
    cases += [pytest.param(*case, id=case[0], marks=pytest.mark.exhaustive) for case in examples.items()]

    def decorate(holds: Callable[[Call, st.DataObject], None]) -> Callable:
        def test(backend: str, most: int) -> None:
            chosen: dict[str, Any] = dict(max_examples=most)
            if backend == "triton":
                # Shrinking would take minutes.
                chosen["phases"] = [Phase.explicit, Phase.generate]
            drawn = given(calls(backend, dtypes or EXACT, **options), st.data())
            settings(_SETTINGS, **chosen)(drawn(holds))()

        test.__doc__ = holds.__doc__
        return pytest.mark.parametrize(("backend", "most"), cases)(test)

    return decorate
