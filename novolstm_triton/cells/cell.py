"""What a cell is: `Cell`, one object that every backend reads, and the names by which operators find it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], float], tuple[Tensor, Tensor]]
"""`step(z, c, vectors, eps)`, which returns h and c; see `Cell.step`."""


class Block(NamedTuple):
    """A block of H pre-activations: z = x W + h U + b, or only one of the products."""

    name: str
    input: bool = True
    """Whether x feeds it: whether weight_ih and bias_ih have rows for it."""
    recurrent: bool = True
    """Whether h feeds it: whether weight_hh and bias_hh have rows for it."""


class Vector(NamedTuple):
    """A parameter with a number for every unit, or several blocks of such numbers, like a normalisation's γ."""

    name: str
    """The parameter's name in a module, without the suffix of layer and direction."""
    blocks: tuple[str, ...]
    """What its blocks of H numbers belong to, in their order: for the reader of a table or a message."""
    initial: float | None = None
    """Where every number starts, or None: drawn like the weights."""


class Second(NamedTuple):
    """A step's second product: of blocks whose U meets not h but what the others leave of it, like the GRU's r·h."""

    blocks: tuple[str, ...]
    """Their names: the last of those that h feeds, after at least one other."""
    gate: Callable[[tuple[Tensor, ...], Tensor], Tensor]
    """`gate(z, h)` returns what their U meets, [B, H].

    z is a tuple of pre-activations [B, H], one per block that h feeds and that is not among these; h [B, H] the state
    before the step, with the mask of recurrent dropout. It takes what `Cell.step` takes: any floating dtype, autograd,
    and any number of rows.
    """


_NO_SECOND = (
    "its second product in a step would take a second exchange among the slices, forward and backward, which costs "
    "more than the product"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The equations and the parameters of a cell.

    A step of the engine makes the pre-activations z_k of every block from x and h, those of `second` after the others;
    `step` makes the new state of them.
    On backend "triton" the tile functions of `kernels` take its place, on "torch" PyTorch's own operators.

    Raises:
        ValueError: blocks in another order than the engine's, names that occur twice, or kernels of a cell with a
            second product.
    """

    name: str
    """By which operators, plans and messages know it: letters, digits and underscores."""
    blocks: tuple[Block, ...]
    """First those that only h feeds, then those that x and h feed, then those that only x feeds."""
    step: Step
    """The definition: `step(z, c, vectors, eps)` returns h [B, H] and c [B, H].

    z is a tuple of pre-activations [B, H], one per block; c [B, H] the state that the cell carries, h itself if it has
    no other; vectors a tuple of rows [H], one per block of every `Vector`; eps the ε of normalisations. It takes any
    floating dtype, is differentiable by autograd, and changes nothing in place.
    """
    states: tuple[str, ...] = ("h", "c")
    """The states that a module shows: ("h", "c"), or ("h",) for a cell whose `step` returns h as c, too."""
    vectors: tuple[Vector, ...] = ()
    second: Second | None = None
    """Which blocks have U meet something else than h, if any do. Such a cell has no projection, and no kernels."""
    biases: bool = True
    """Whether a module has bias_ih and bias_hh; a cell without adds what it likes, from a vector."""
    recurrent_order: tuple[str, ...] | None = None
    """The blocks of weight_hh and bias_hh as a module has them, where that is not their order here."""
    gained: tuple[int, ...] = ()
    """Blocks of the vectors, counted through, that the call's `gate_gain` multiplies."""
    eps: float = 0.0
    """ε of the normalisations where a call gives none."""
    kernels: Any = None
    """The tile functions: a `kernels.cell.CellKernels`, or, so that Triton is imported only where it is needed,
    "module:NAME" of one. None: the cell does not run on backend "triton"."""
    no_kernels: str = ""
    """Why there are none, for the message."""

    recurrent: int = dataclasses.field(init=False, compare=False)
    """How many blocks, from the first, h feeds."""
    at_once: int = dataclasses.field(init=False, compare=False)
    """How many blocks, from the first, have U meet h itself; those of `second` follow."""
    first_input: int = dataclasses.field(init=False, compare=False)
    """The first block that x feeds; x feeds all after it."""
    inputs: int = dataclasses.field(init=False, compare=False)
    """How many blocks x feeds."""
    vector_blocks: int = dataclasses.field(init=False, compare=False)
    """How many blocks the vectors have in all."""
    module: str = dataclasses.field(init=False, compare=False)
    """The module that made it, from which a pickle gets it again."""

    def __post_init__(self) -> None:
        """Check what can be checked without running it."""
        # The caller of the constructor, as `collections.namedtuple` finds it.
        recurrent = sum(block.recurrent for block in self.blocks)
        known = dict(
            module=sys._getframe(2).f_globals.get("__name__", "__main__"),
            recurrent=recurrent,
            at_once=recurrent - (len(self.second.blocks) if self.second else 0),
            first_input=sum(not block.input for block in self.blocks),
            inputs=sum(block.input for block in self.blocks),
            vector_blocks=sum(len(vector.blocks) for vector in self.vectors),
        )
        for name, value in known.items():
            object.__setattr__(self, name, value)
        if not self.name.isidentifier():
            raise ValueError(f"name: expected letters, digits and underscores, got {self.name!r}")
        if self.states not in (("h", "c"), ("h",)):
            raise ValueError(f"states: expected ('h', 'c') or ('h',), got {self.states!r}")
        kinds = [0 if not block.input else 1 if block.recurrent else 2 for block in self.blocks]
        if not kinds or kinds != sorted(kinds) or any(not (b.input or b.recurrent) for b in self.blocks):
            raise ValueError(
                "blocks: expected first those that only h feeds, then those that x and h feed, then those that only x "
                f"feeds, got {list(self.blocks)}"
            )
        for what, names in (
            ("blocks", [block.name for block in self.blocks]),
            ("vectors", [vector.name for vector in self.vectors]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what}: expected different names, got {names}")
        if self.recurrent_order is not None and sorted(self.recurrent_order) != sorted(self._recurrent_names):
            raise ValueError(
                f"recurrent_order: expected the blocks {self._recurrent_names}, got {list(self.recurrent_order)}"
            )
        if self.second is not None:
            self._check_second(self.second)

    def _check_second(self, second: Second) -> None:
        """Check the second product, whose blocks are known to be different."""
        names = self._recurrent_names
        if not 0 < self.at_once < len(names) or list(second.blocks) != names[self.at_once :]:
            raise ValueError(
                f"second: expected the last of the blocks that h feeds, {names}, after at least one other, got "
                f"{list(second.blocks)}"
            )
        if self.kernels is not None:
            raise ValueError(f"kernels: expected None, for the kernels make no second product, got {self.kernels!r}")

    @property
    def _recurrent_names(self) -> list[str]:
        return [block.name for block in self.blocks if block.recurrent]

    @property
    def gates(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(block.name for block in self.blocks)

    def shapes(self, features: int, hidden: int, bias: bool = True, projected: int = 0) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a module's parameters by their names without suffix, in the order of registration.

        Args:
            features: I.
            hidden: H.
            bias: whether there are biases, if the cell has any.
            projected: P, or 0 without a projection.
        """
        inputs, recurrent = self.inputs * hidden, self.recurrent * hidden
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (inputs, features),
            "weight_hh": (recurrent, projected or hidden),
        }
        if bias and self.biases:
            shapes |= {"bias_ih": (inputs,), "bias_hh": (recurrent,)}
        if projected:
            shapes |= {"weight_hr": (projected, hidden)}
        return shapes | {vector.name: (len(vector.blocks) * hidden,) for vector in self.vectors}

    def in_order(self, weight_hh: Tensor, lead: int = 0) -> Tensor:
        """Return weight_hh or bias_hh as a module has it with its blocks in the engine's order.

        Args:
            weight_hh: [R·H, ·] or [R·H], perhaps after leading dimensions.
            lead: how many leading dimensions there are.
        """
        if self.recurrent_order is None:
            return weight_hh
        parts = dict(zip(self.recurrent_order, weight_hh.chunk(self.recurrent, lead), strict=True))
        return torch.cat([parts[name] for name in self._recurrent_names], lead)

    def check_projection(self, name: str) -> None:
        """Raise ValueError, of the argument `name`, if the cell cannot have its h projected."""
        if "c" not in self.states:
            raise ValueError(f"{name}: the cell {self.name!r} has one state, and no projection")
        if self.second:
            raise ValueError(f"{name}: the cell {self.name!r} has a second product in a step, and no projection")
        # The engine lets the h_0 of a projected layer in with x.
        if self.first_input:
            raise ValueError(f"{name}: the cell {self.name!r} has blocks that x does not feed, and no projection")

    def check_kernels(self) -> None:
        """Raise ValueError if the cell has no tile functions."""
        if self.kernels is None:
            reason = self.no_kernels or (_NO_SECOND if self.second else "")
            why = f" ({reason})" if reason else ""
            raise ValueError(f"backend 'triton' does not run the cell {self.name!r}{why}: use backend='torch'")

    def load_kernels(self) -> Any:
        """Return the tile functions, a `kernels.cell.CellKernels`.

        Raises:
            ValueError: the cell has none.
        """
        self.check_kernels()
        if not isinstance(self.kernels, str):
            return self.kernels
        module, _, name = self.kernels.partition(":")
        return getattr(importlib.import_module(module), name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the cell as the module that made it and its name: functions on tiles cannot be pickled."""
        return find, (self.module, self.name)

    def __deepcopy__(self, memo: Any) -> Cell:
        """Return the cell itself, which does not change."""
        return self


CELLS: dict[str, Cell] = {}
"""Every cell by its name: those of the package, and a user's own once a module or function has been given it."""


def with_kernels() -> list[str]:
    """Return the names of the cells that backend "triton" runs."""
    return [name for name, cell in CELLS.items() if cell.kernels is not None]


def register(cell: Cell) -> Cell:
    """Make operators find a cell by its name; return it.

    Raises:
        TypeError: it is not a Cell.
        ValueError: there is another cell of this name.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell: expected a Cell, got {type(cell).__name__}")
    if CELLS.setdefault(cell.name, cell) != cell:
        raise ValueError(f"cell: there is another cell of the name {cell.name!r}: choose a name of its own")
    return cell


def find(module: str, name: str) -> Cell:
    """Return the cell of a name that a module makes when it is imported.

    Raises:
        ModuleNotFoundError: there is no such module.
        ValueError: it has no such cell.
    """
    made = vars(importlib.import_module(module)).values()
    for cell in (*made, *CELLS.values()):
        if isinstance(cell, Cell) and cell.name == name:
            return cell
    raise ValueError(f"cell: {module} makes none of the name {name!r}")
