"""Layers and cells for tools that compute one gradient for each sample of a batch: `per_sample`."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton.layers.gru import GRU, GRUCell
from novolstm_triton.layers.layer import RecurrentLayer
from novolstm_triton.layers.lstm import LSTM, LSTMCell
from novolstm_triton.layers.novolstm import NovoLSTM, NovoLSTMCell
from novolstm_triton.layers.recurrent import Recurrent, States, layer_weights
from novolstm_triton.layers.rnn import RNN, RNNCell
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.validation import check_lengths


def per_sample(model: nn.Module) -> nn.Module:
    """Prepare the layers and cells of a model for a tool that computes gradients per sample, like Opacus.

    Such a tool hooks a module, keeps its input and the gradient of its output, and runs the module again for each
    sample. It can do so with one tensor each, batch first, and not with lengths or states, whose part in the gradient
    would be lost. So the modules are changed: the hooks see one tensor with all that belongs to a sample, and one
    result with y and the states. Calls, results, parameters, their names and the optimizer's view of them stay as they
    were.

    Args:
        model: changed in place; it may hold other modules besides this library's.

    Returns:
        The model.

    Raises:
        TypeError: it has a layer or cell of a class of its own, `TorchLSTM` included: take `LSTM`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"per_sample: expected an nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if isinstance(m, Recurrent) and not isinstance(m, _PerSample)]
    for module in found:
        if type(module) not in _COUNTERPARTS:
            raise TypeError(f"per_sample: expected one of {[c.__name__ for c in _COUNTERPARTS]}, got {type(module)}")
    for module in found:
        module.__class__ = _COUNTERPARTS[type(module)]
    return model


class _PerSample(Recurrent):
    """What the counterparts have in common: a call outside the hooks, around `forward` inside them."""

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the module as usual; or run a sample again, given as `forward` takes it.

        Raises:
            ValueError: an option or argument with which gradients per sample would be wrong or impossible.
        """
        if isinstance(input, Tensor) and input.dim() > 3 and input.shape[:3] == (1, 1, 1):
            return nn.Module.__call__(self, input)
        return self._call_with_rows(input, *args, **kwargs)

    def _call_with_rows(self, input: Any, hx: Any = None) -> Any:
        """Make one tensor of the arguments, call the module with its hooks, and undo the result."""
        raise NotImplementedError

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {why}, for gradients per sample")


class _PerSampleLayer(_PerSample, RecurrentLayer):
    def _call_with_rows(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        if isinstance(input, PackedSequence):
            self._refuse("expected padded input and lengths=, got a PackedSequence")
        if not isinstance(input, Tensor) or input.dim() != 3:
            self._refuse("expected a batched input Tensor, [B, T, I] or [T, B, I]")
        if self.training and ((self.num_layers > 1 and self.dropout) or self.recurrent_dropout):
            self._refuse("expected no dropout and no recurrent_dropout, whose masks would be drawn again")
        if self.training and (self.zoneout_h or self.zoneout_c):
            self._refuse("expected no zoneout, whose choices would be drawn again")
        x = input.transpose(0, 1) if self.batch_first else input
        (steps, batch, _), (number, units) = x.shape, self._state_sizes()
        self._check_input(x, self._read_weights()[0][0]["weight_ih"])
        if hx is None:
            states = tuple(x.new_zeros(number, batch, n) for n in units)
        else:
            states = self._check_state(hx, x, batch, True)
        parts = [x.transpose(0, 1), *(s.transpose(0, 1) for s in states)]
        if lengths is not None:
            ends = check_lengths(lengths, x)
            assert ends is not None
            # Which steps are valid, rather than how many: 16 bits hold no long length exactly.
            parts.append((torch.arange(steps, device=x.device) < ends.unsqueeze(1)).to(x.dtype))
        rows = torch.cat([part.flatten(1) for part in parts], 1)
        # More dimensions than any input has; one more says that the valid steps are among the numbers.
        more = (1,) * (2 if lengths is None else 3)
        result = nn.Module.__call__(self, rows.reshape(batch, *more, rows.shape[1]))
        features = units[0] * (2 if self.bidirectional else 1)
        y, *after = result.split([steps * features, *(number * n for n in units)], 1)
        y = y.reshape(batch, steps, features)
        return (y if self.batch_first else y.transpose(0, 1)), self._shown(self._states_of(after))

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Any:
        """Run the layer on rows that hold all of a sample: x, its states, and which steps are valid, with lengths.

        Args:
            input: [B, 1, 1, ·], or [B, 1, 1, 1, ·] with the valid steps.
            *_: nothing; as there is for other layers.
            **__: likewise.

        Returns:
            [B, ·], y and the last states of each sample.
        """
        has_lengths, rows = input.dim() == 5, input.flatten(1)
        batch, (number, units) = rows.shape[0], self._state_sizes()
        steps = (rows.shape[1] - number * sum(units)) // (self.input_size + has_lengths)
        sizes = [steps * self.input_size, *(number * n for n in units), steps * has_lengths]
        x, *states, valid = rows.split(sizes, 1)
        x = x.reshape(batch, steps, self.input_size)
        lengths = (valid > 0.5).sum(1) if has_lengths else None
        hx = self._shown(self._states_of(states))
        y, hx = super().forward(x if self.batch_first else x.transpose(0, 1), hx, lengths=lengths)
        y = y if self.batch_first else y.transpose(0, 1)
        return torch.cat([part.flatten(1) for part in (y, *(s.transpose(0, 1) for s in self._tuple_of(hx)))], 1)

    def _state_sizes(self) -> tuple[int, tuple[int, ...]]:
        """Return the number of layers and directions, and the units of each of the cell's states."""
        units = (self.proj_size or self.hidden_size, self.hidden_size)[: len(self._cell.states)]
        return self.num_layers * (2 if self.bidirectional else 1), units

    def _states_of(self, parts: list[Tensor]) -> States:
        """Return the states [layers and directions, B, ·] of parts of rows [B, ·]."""
        number, _ = self._state_sizes()
        return tuple(part.reshape(len(part), number, -1).transpose(0, 1) for part in parts)


class _PerSampleCell(_PerSample, RecurrentCell):
    def _call_with_rows(self, input: Any, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.dim() != 2:
            self._refuse("expected a batched input Tensor, [B, I]")
        number = len(self._cell.states)
        zeros = (input.new_zeros(len(input), self.hidden_size),) * number
        states = zeros if hx is None else self._check_state(hx, True)
        self._check(input, states, layer_weights(self, "")["weight_ih"])
        rows = torch.cat((input, *states), 1)
        return self._shown(nn.Module.__call__(self, rows.reshape(len(rows), 1, 1, -1)).chunk(number, 1))

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Any:
        """Take a step for rows [B, 1, 1, ·], x and the states of a sample; return [B, ·], the new states."""
        x, *states = input.flatten(1).split([self.input_size, *[self.hidden_size] * len(self._cell.states)], 1)
        return torch.cat(self._tuple_of(super().forward(x, self._shown(tuple(states)))), 1)


class PerSampleLSTM(_PerSampleLayer, LSTM):
    """An `LSTM` after `per_sample`."""


class PerSampleNovoLSTM(_PerSampleLayer, NovoLSTM):
    """A `NovoLSTM` after `per_sample`."""


class PerSampleGRU(_PerSampleLayer, GRU):
    """A `GRU` after `per_sample`."""


class PerSampleRNN(_PerSampleLayer, RNN):
    """An `RNN` after `per_sample`."""


class PerSampleRecurrentLayer(_PerSampleLayer):
    """A `RecurrentLayer` after `per_sample`."""


class PerSampleLSTMCell(_PerSampleCell, LSTMCell):
    """An `LSTMCell` after `per_sample`."""


class PerSampleNovoLSTMCell(_PerSampleCell, NovoLSTMCell):
    """A `NovoLSTMCell` after `per_sample`."""


class PerSampleGRUCell(_PerSampleCell, GRUCell):
    """A `GRUCell` after `per_sample`."""


class PerSampleRNNCell(_PerSampleCell, RNNCell):
    """An `RNNCell` after `per_sample`."""


class PerSampleRecurrentCell(_PerSampleCell):
    """A `RecurrentCell` after `per_sample`."""


_COUNTERPARTS: dict[type, Any] = {
    LSTM: PerSampleLSTM,
    NovoLSTM: PerSampleNovoLSTM,
    GRU: PerSampleGRU,
    RNN: PerSampleRNN,
    RecurrentLayer: PerSampleRecurrentLayer,
    LSTMCell: PerSampleLSTMCell,
    NovoLSTMCell: PerSampleNovoLSTMCell,
    GRUCell: PerSampleGRUCell,
    RNNCell: PerSampleRNNCell,
    RecurrentCell: PerSampleRecurrentCell,
}
