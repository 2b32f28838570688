"""Any cell as a layer with nn.LSTM's constructor, call and parameters: `RecurrentLayer`. No math."""

import functools
import numbers
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton.cells import Cell, register
from novolstm_triton.checks import check_dense, is_share
from novolstm_triton.functional import resolve_backend, takes_plain_steps
from novolstm_triton.layers.ragged import Rows
from novolstm_triton.layers.recurrent import (
    Recurrent,
    States,
    check_bool,
    check_device,
    check_positive,
    check_sizes,
    check_state_ranks,
    layer_weights,
    same_dtype,
    scalar_type,
)
from novolstm_triton.layers.regularisers import draw_dropout_mask, draw_zoneout_mask
from novolstm_triton.validation import check_lengths, is_readable


class RecurrentLayer(Recurrent):
    r"""Any cell as a stacked, optionally bidirectional layer, called like `torch.nn.LSTM`: a user's own, too.

    Args:
        cell: the equations and parameters, a `novolstm_triton.cells.Cell`.
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        proj_size: if above 0, h is projected to so many units P by weight_hr; for cells with two states,
            no `second` and no block that h alone feeds.
        device: where the parameters live.
        dtype: dtype of the parameters.
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence, in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; else the expectation.
        zoneout_c: likewise, of c.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters of layer k, `_reverse` appended for the second direction, for N blocks that x feeds and R that h feeds:
        weight_ih_l{k} [N·H, I or D·P], weight_hh_l{k} [R·H, P], bias_ih_l{k} [N·H], bias_hh_l{k} [R·H], weight_hr_l{k}
        [P, H] if projected, and the cell's vectors by their names.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or an option that the cell lacks.
    """

    _twin: ClassVar[type[nn.RNNBase] | None] = None
    """PyTorch's class that computes the same, if there is one."""

    _built: tuple[int, bool, bool]
    """num_layers, bidirectional and bias of the parameters; the attributes may be changed later."""

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        backend: str = "auto",
    ) -> None:
        register(cell)
        # In nn.LSTM's order, so that of several mistakes both name the same. It takes numpy's integers here, too.
        num_layers, proj_size = _plain_int(num_layers), _plain_int(proj_size)
        if not is_share(dropout):
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        check_bool(batch_first=batch_first, bidirectional=bidirectional)
        super().__init__(cell, input_size, hidden_size, bias, backend)
        check_positive(num_layers=num_layers)
        if not isinstance(proj_size, int) or isinstance(proj_size, bool):
            raise TypeError(f"proj_size should be of type int, got: {type(proj_size).__name__}")
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if proj_size >= hidden_size:
            raise ValueError("proj_size has to be smaller than hidden_size")
        if proj_size:
            cell.check_projection("proj_size")
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._built = (num_layers, bidirectional, bias)
        self._set_regularisers(recurrent_dropout, zoneout_h, zoneout_c)

        output_size, directions = proj_size or hidden_size, 2 if bidirectional else 1
        for layer in range(num_layers):
            features = input_size if layer == 0 else directions * output_size
            shapes = cell.shapes(features, hidden_size, bias, proj_size)
            self._parameter_names = tuple(shapes)
            for suffix in self._suffixes(layer):
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing: the weights need no common memory. For code that calls it on an nn.LSTM."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the order in which they are registered."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _all_weights(self) -> list[list[str]]:
        """Their names."""
        suffixes = (suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer))
        return [[name + suffix for name in self._parameter_names] for suffix in suffixes]

    @property
    def _flat_weights_names(self) -> list[str]:
        """The names in one list."""
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Any]:
        """The parameters in the order of `_flat_weights_names`; a new list, read from their names, at every look."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """Refuse a list, which the layer would not read."""
        raise AttributeError(
            f"_flat_weights: {type(self).__name__} reads its parameters by name at every call: set those instead"
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers over a batch of sequences, or over one unbatched sequence.

        D is 2 if bidirectional, else 1; L is num_layers; P is proj_size, or H without a projection.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I]; or a PackedSequence.
            hx: (h_0 [L·D, B, P], c_0 [L·D, B, H]), or h_0 of a cell with one state, without the B if unbatched; zeros
                if None.
            lengths: [B] integers from 0 to T, the valid steps of each row; y is zero after them, h_n and c_n are each
                row's last. Does the same as packing, and works under torch.compile. Needs batched input.

        Returns:
            y [T, B, D·P] (or batch first, or unbatched, or packed, like the input), and (h_n, c_n), or h_n, with the
            shapes of the states.

        Raises:
            ValueError, RuntimeError: shapes, dtypes or devices that do not fit, in nn.LSTM's words.
            TypeError: a state that is not what the cell has, or lengths that are not integers.
        """
        if isinstance(input, PackedSequence):
            if torch.compiler.is_dynamo_compiling():
                # Sizes depend on what it holds. The graph ends here, without a warning for each.
                outside: Any = torch.compiler.disable(self._forward_packed)
                return outside(input, hx, lengths)
            return self._forward_packed(input, hx, lengths)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        check_dense(input, "input")
        batched = input.dim() == 3
        if not batched and lengths is not None:
            raise ValueError("lengths: expected batched input beside it, got an unbatched sequence: slice it instead")
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        weights = self._read_weights()
        self._check_input(x, weights[0][0]["weight_ih"])
        states = None if hx is None else self._check_state(hx, x, x.shape[1], batched)
        y, states = self._run_rows(x, states, lengths, weights)
        if not batched:
            return y.squeeze(1), self._shown(tuple(s.squeeze(1) for s in states))
        return (y.transpose(0, 1) if self.batch_first else y), self._shown(states)

    def step(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Take one time step: what `forward` does with a sequence of length one.

        Feeding a sequence step by step, with the state handed on, gives what `forward` gives for the whole, except for
        masks of dropout and zoneout in training, which every call draws anew.

        Args:
            input: [B, I], or [I] unbatched.
            state: (h [L, B, P], c [L, B, H]), or h of a cell with one state, without the B if unbatched, as returned by
                the step before; zeros if None.

        Returns:
            y [B, P] or [P], and the new state.

        Raises:
            ValueError: the layer is bidirectional: its second direction begins with the last step.
            ValueError, RuntimeError, TypeError: as `forward`.
        """
        if self.bidirectional:
            raise ValueError("step: a bidirectional layer needs the whole sequence")
        if not isinstance(input, Tensor):
            raise TypeError(f"step: expected input to be a Tensor, got {type(input).__name__}")
        check_dense(input, "input")
        if input.dim() not in (1, 2):
            raise ValueError(f"step: expected input [B, I] or [I], got {list(input.shape)}")
        # Unbatched input has its time first, whatever batch_first says.
        time = 1 if self.batch_first and input.dim() == 2 else 0
        y, new_state = self(input.unsqueeze(time), state)
        return y.squeeze(time), new_state

    def _set_regularisers(self, recurrent_dropout: float, zoneout_h: float, zoneout_c: float) -> None:
        """Set the options that nn.LSTM lacks.

        Raises:
            ValueError: an option out of range, or one that a projected layer lacks.
        """
        if not is_share(recurrent_dropout) or recurrent_dropout == 1:
            raise ValueError(f"recurrent_dropout: expected a number in range [0, 1), got {recurrent_dropout!r}")
        for name, share in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)):
            if not is_share(share):
                raise ValueError(f"{name}: expected a number in range [0, 1], got {share!r}")
        if zoneout_c and "c" not in self._cell.states:
            raise ValueError(f"zoneout_c: expected 0, because the cell {self._cell.name!r} has no c, got {zoneout_c!r}")
        if self.proj_size and (recurrent_dropout or zoneout_h or zoneout_c):
            raise ValueError("proj_size: a projected layer has no recurrent_dropout and no zoneout")
        self.recurrent_dropout = float(recurrent_dropout)
        self.zoneout_h = float(zoneout_h)
        self.zoneout_c = float(zoneout_c)

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        yield from {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False}.items()
        yield from {"dropout": 0.0, "bidirectional": False, "recurrent_dropout": 0.0}.items()
        yield from {"zoneout_h": 0.0, "zoneout_c": 0.0, "backend": "auto"}.items()

    def _forward_packed(self, packed: PackedSequence, hx: Any, lengths: Tensor | None) -> tuple[PackedSequence, Any]:
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence has its own, expected None")
        if torch.compiler.is_exporting():
            raise ValueError("torch.export: a PackedSequence has sizes of its own: give padded input and lengths=")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        check_dense(data, "input")
        weights = self._read_weights()
        self._check_input(data.unsqueeze(0), weights[0][0]["weight_ih"])
        rows = Rows.packed(batch_sizes)
        states = None if hx is None else self._check_state(hx, data, len(rows.lengths), True)
        states = _reordered(states, sorted_indices)
        y, states = rows.run(functools.partial(self._run, weights=weights), data, states)
        states = _reordered(states, unsorted_indices)
        assert states is not None
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), self._shown(states)

    def _run_rows(
        self, x: Tensor, states: States | None, lengths: Tensor | None, weights: list[list[dict[str, Tensor]]]
    ) -> tuple[Tensor, States]:
        """Run all layers over x [T, B, I], without most of the padding if lengths tell that it is mostly padding."""
        rows = None
        draws = self.training and (self.dropout or self.recurrent_dropout or self.zoneout_h or self.zoneout_c)
        # Masks are those of the whole batch, whatever the lengths. What else may be wrong with lengths, the function
        # that takes them says.
        if isinstance(lengths, Tensor) and lengths.device.type == "cpu" and is_readable(lengths) and not draws:
            rows = Rows.padded(check_lengths(lengths, x), x.shape[0])
        if rows is None:
            return self._run(x, states, lengths, weights)
        order = rows.order.to(x.device)
        states = _reordered(states, order)
        y, states = rows.run(functools.partial(self._run, weights=weights), x.flatten(0, 1), states)
        states = _reordered(states, order.argsort())
        assert states is not None
        return y.unflatten(0, x.shape[:2]), states

    def _read_weights(self) -> list[list[dict[str, Tensor]]]:
        """Return the weights of each layer and, in it, direction.

        Raises:
            ValueError: attributes were changed so that the parameters do not fit.
        """
        if self._built != (self.num_layers, self.bidirectional, self.bias):
            self._check_as_built()
        weights = [[layer_weights(self, suffix) for suffix in self._suffixes(k)] for k in range(self.num_layers)]
        check_sizes(weights[0][0], self.hidden_size, self.proj_size)
        return weights

    def _check_as_built(self) -> None:
        """Raise ValueError if an attribute asks for parameters that the layer has not, or leaves some out.

        A lower num_layers is taken, as nn.LSTM takes it: the lower layers run.
        """
        layers, bidirectional, bias = self._built
        for name, built in (("bidirectional", bidirectional), ("bias", bias)):
            if (now := getattr(self, name)) != built:
                raise ValueError(
                    f"{name}: expected {built}, with which the layer was built, got {now}: build a new one"
                )
        if not 1 <= self.num_layers <= layers:
            raise ValueError(
                f"num_layers: expected 1 to {layers}, with which the layer was built, got {self.num_layers}: "
                "build a new one"
            )

    def _run(
        self, x: Tensor, states: States | None, lengths: Tensor | None, weights: list[list[dict[str, Tensor]]]
    ) -> tuple[Tensor, States]:
        """Run all layers over x [T, B, I], with everything checked."""
        last, directions = [], 2 if self.bidirectional else 1
        for layer, own in enumerate(weights):
            if layer > 0 and self.dropout > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            rows = slice(layer * directions, (layer + 1) * directions)
            x, after = self._run_layer(x, None if states is None else tuple(s[rows] for s in states), lengths, own)
            last.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))

    def _run_layer(
        self, x: Tensor, states: States | None, lengths: Tensor | None, weights: list[dict[str, Tensor]]
    ) -> tuple[Tensor, States]:
        """Return one layer's y [T, B, D·P] and states [D, B, ·]; those given may be None."""
        (steps, batch, _), directions = x.shape, len(weights)
        pairs = [None if states is None else tuple(s[d] for s in states) for d in range(directions)]
        # The number of steps last: looked at in a graph, it would be no longer free.
        if lengths is None and not self._is_more_than_a_cell() and takes_plain_steps(x, self.backend) and steps == 1:
            after = [self._step(x[0], own, weight) for own, weight in zip(pairs, weights, strict=True)]
            stacked = tuple(torch.stack(parts) for parts in zip(*after, strict=True))
            return torch.cat([own[0] for own in after], dim=-1).unsqueeze(0), stacked
        h_mask, zoneout_mask = None, None
        options: dict[str, Any] = dict(lengths=lengths, backend=self.backend)
        if self.training and self.recurrent_dropout:
            h_mask = draw_dropout_mask((directions, batch, self.hidden_size), self.recurrent_dropout, x)
        if self.zoneout_h or self.zoneout_c:
            options["zoneout"] = (self.zoneout_h, self.zoneout_c)[: len(self._cell.states)]
            if self.training:
                shape = (steps, batch, directions * self.hidden_size)
                zoneout_mask = draw_zoneout_mask(shape, self.zoneout_h, self.zoneout_c, x.device)
        # One call for both directions where one launch takes both; elsewhere nothing is gained by stacking the weights.
        if directions == 2 and not self.proj_size and resolve_backend(self.backend, x.device) == "triton":
            both = {name: torch.stack([w[name] for w in weights]) for name in weights[0]}
            return self._call(x, states, both, h_mask=h_mask, zoneout_mask=zoneout_mask, **options)
        outputs, last = [], []
        for d, (own, weight) in enumerate(zip(pairs, weights, strict=True)):
            masks = dict(
                h_mask=None if h_mask is None else h_mask[d],
                zoneout_mask=None if zoneout_mask is None else zoneout_mask.chunk(directions, dim=2)[d],
            )
            y, after = self._call(x, own, weight, reverse=d == 1, **masks, **options)
            outputs.append(y)
            last.append(after)
        y = torch.cat(outputs, dim=-1) if directions == 2 else outputs[0]
        return y, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _is_more_than_a_cell(self) -> bool:
        """Return whether a step of the layer does more than its cell's equations."""
        return bool(self.proj_size or self.recurrent_dropout or self.zoneout_h or self.zoneout_c)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        """Check x [T, B, I] for the first layer's weight_ih."""
        if not same_dtype(x, weight):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        check_device(x, "parameter", weight)
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _check_state(self, hx: Any, x: Tensor, batch: int, batched: bool) -> States:
        """Check the states for so many rows of x; return them with their dimension of rows."""
        states = self._tuple_of(hx)
        check_state_ranks(states, 3 if batched else 2, batched)
        states = tuple(s if batched else s.unsqueeze(1) for s in states)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        units = (self.proj_size or self.hidden_size, self.hidden_size)
        for position, s in enumerate(states):
            expected = (layers, batch, units[position])
            if tuple(s.shape) != expected:
                which = f"hidden[{position}] size {expected}" if len(states) > 1 else f"hidden size {expected}"
                raise RuntimeError(f"Expected {which}, got {list(s.shape)}")
            check_device(x, "hidden", s)
            if not same_dtype(x, s):
                raise RuntimeError(
                    "Input and hidden tensors are not the same dtype, found input tensor with "
                    f"{scalar_type(x)} and hidden tensor with {scalar_type(s)}"
                )
        return states


def _reordered(states: States | None, order: Tensor | None) -> States | None:
    """Return states [L, B, ·] with their rows in another order, if there are both."""
    return states if states is None or order is None else tuple(s[:, order] for s in states)


def detach_state(state: Any) -> Any:
    """Return a state without its history, for training on parts of a sequence (truncated backpropagation).

    Args:
        state: None, a tensor, or any nesting of tuples, named or not, and lists of these, like the (h, c) that layers
            return.

    Raises:
        TypeError: it holds something else.
    """
    if state is None:
        return state
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        parts = [detach_state(s) for s in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"detach_state: expected tensors in tuples or lists, got {type(state).__name__}")


def _plain_int(value: Any) -> Any:
    """Return an integer of any type, like numpy's, as an int, and any other value unchanged."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
