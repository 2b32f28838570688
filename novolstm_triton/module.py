"""The layers as modules with nn.LSTM's constructor, call and parameters: `NovoLSTM` and `LSTM`. No math."""

import functools
import numbers
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.checks import check_dense, is_share
from novolstm_triton.functional import resolve_backend, takes_plain_steps
from novolstm_triton.ragged import Rows
from novolstm_triton.recurrent import (
    LSTMFunction,
    NovoLSTMFunction,
    Recurrent,
    State,
    check_bool,
    check_device,
    check_pair,
    check_positive,
    check_sizes,
    check_state_ranks,
    layer_weights,
    same_dtype,
    scalar_type,
)
from novolstm_triton.regularisers import draw_dropout_mask, draw_zoneout_mask
from novolstm_triton.validation import check_lengths, is_readable
from novolstm_triton.weights.torch import lstm_from_torch, lstm_to_torch, novolstm_from_lstm

if TYPE_CHECKING:
    import numpy as np


class RecurrentLayer(Recurrent):
    """What `NovoLSTM` and `LSTM` have in common: nn.LSTM's surface around a cell. Not to be used itself."""

    _built: tuple[int, bool, bool]
    """num_layers, bidirectional and bias of the parameters; the attributes may be changed later."""

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        recurrent_dropout: float,
        zoneout_h: float,
        zoneout_c: float,
        backend: str,
    ) -> None:
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
        super().__init__(input_size, hidden_size, bias, backend)
        check_positive(num_layers=num_layers)
        if not isinstance(proj_size, int) or isinstance(proj_size, bool):
            raise TypeError(f"proj_size should be of type int, got: {type(proj_size).__name__}")
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if proj_size >= hidden_size:
            raise ValueError("proj_size has to be smaller than hidden_size")
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
            shapes = CELLS[cell].shapes(features, hidden_size, bias, proj_size)
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
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Run the layers over a batch of sequences, or over one unbatched sequence.

        D is 2 if bidirectional, else 1; L is num_layers; P is proj_size, or H without a projection.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I]; or a PackedSequence.
            hx: (h_0 [L·D, B, P], c_0 [L·D, B, H]), without the B if unbatched; zeros if None.
            lengths: [B] integers from 0 to T, the valid steps of each row; y is zero after them, h_n and c_n are each
                row's last. Does the same as packing, and works under torch.compile. Needs batched input.

        Returns:
            y [T, B, D·P] (or batch first, or unbatched, or packed, like the input), and (h_n, c_n) with the shapes of
            the states.

        Raises:
            ValueError, RuntimeError: shapes, dtypes or devices that do not fit, in nn.LSTM's words.
            TypeError: a state that is not a pair of tensors, or lengths that are not integers.
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
        if hx is not None:
            hx = self._check_state(hx, x, x.shape[1], batched)
        y, (h_n, c_n) = self._run_rows(x, hx, lengths, weights)
        if not batched:
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return (y.transpose(0, 1) if self.batch_first else y), (h_n, c_n)

    def step(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take one time step: what `forward` does with a sequence of length one.

        Feeding a sequence step by step, with the state handed on, gives what `forward` gives for the whole, except for
        masks of dropout and zoneout in training, which every call draws anew.

        Args:
            input: [B, I], or [I] unbatched.
            state: (h [L, B, P], c [L, B, H]), without the B if unbatched, as returned by the step before; zeros if
                None.

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
        if self.proj_size and (recurrent_dropout or zoneout_h or zoneout_c):
            raise ValueError("proj_size: a projected layer has no recurrent_dropout and no zoneout")
        self.recurrent_dropout = float(recurrent_dropout)
        self.zoneout_h = float(zoneout_h)
        self.zoneout_c = float(zoneout_c)

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        yield from {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False}.items()
        yield from {"dropout": 0.0, "bidirectional": False, "recurrent_dropout": 0.0}.items()
        yield from {"zoneout_h": 0.0, "zoneout_c": 0.0, "backend": "auto"}.items()

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None, lengths: Tensor | None
    ) -> tuple[PackedSequence, State]:
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
        if hx is not None:
            hx = self._check_state(hx, data, len(rows.lengths), True)
            hx = hx if sorted_indices is None else (hx[0][:, sorted_indices], hx[1][:, sorted_indices])
        y, (h_n, c_n) = rows.run(functools.partial(self._run, weights=weights), data, hx)
        if unsorted_indices is not None:
            h_n, c_n = h_n[:, unsorted_indices], c_n[:, unsorted_indices]
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), (h_n, c_n)

    def _run_rows(
        self, x: Tensor, hx: State | None, lengths: Tensor | None, weights: list[list[dict[str, Tensor]]]
    ) -> tuple[Tensor, State]:
        """Run all layers over x [T, B, I], without most of the padding if lengths tell that it is mostly padding."""
        rows = None
        draws = self.training and (self.dropout or self.recurrent_dropout or self.zoneout_h or self.zoneout_c)
        # Masks are those of the whole batch, whatever the lengths. What else may be wrong with lengths, the function
        # that takes them says.
        if isinstance(lengths, Tensor) and lengths.device.type == "cpu" and is_readable(lengths) and not draws:
            rows = Rows.padded(check_lengths(lengths, x), x.shape[0])
        if rows is None:
            return self._run(x, hx, lengths, weights)
        order = rows.order.to(x.device)
        hx = None if hx is None else (hx[0][:, order], hx[1][:, order])
        y, (h_n, c_n) = rows.run(functools.partial(self._run, weights=weights), x.flatten(0, 1), hx)
        restored = order.argsort()
        return y.unflatten(0, x.shape[:2]), (h_n[:, restored], c_n[:, restored])

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
        self, x: Tensor, hx: State | None, lengths: Tensor | None, weights: list[list[dict[str, Tensor]]]
    ) -> tuple[Tensor, State]:
        """Run all layers over x [T, B, I], with everything checked."""
        h_n, c_n, directions = [], [], 2 if self.bidirectional else 1
        for layer, own in enumerate(weights):
            if layer > 0 and self.dropout > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            states = slice(layer * directions, (layer + 1) * directions)
            h, c = (None, None) if hx is None else (hx[0][states], hx[1][states])
            x, h, c = self._run_layer(x, h, c, lengths, own)
            h_n.append(h)
            c_n.append(c)
        return x, (torch.cat(h_n), torch.cat(c_n))

    def _run_layer(
        self,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        lengths: Tensor | None,
        weights: list[dict[str, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return one layer's y [T, B, D·P], h_n [D, B, P] and c_n [D, B, H]; the states [D, B, ·] may be None."""
        (steps, batch, _), directions = x.shape, len(weights)
        # The number of steps last: looked at in a graph, it would be no longer free.
        if lengths is None and not self._is_more_than_a_cell() and takes_plain_steps(x, self.backend) and steps == 1:
            pairs = ((None, None) if h_0 is None or c_0 is None else (h_0[d], c_0[d]) for d in range(directions))
            after = [self._step(x[0], h, c, own) for (h, c), own in zip(pairs, weights, strict=True)]
            h_n, c_n = (torch.stack(states) for states in zip(*after, strict=True))
            return torch.cat([h for h, _ in after], dim=-1).unsqueeze(0), h_n, c_n
        h_mask, zoneout_mask = None, None
        options: dict[str, Any] = dict(lengths=lengths, backend=self.backend)
        if self.training and self.recurrent_dropout:
            h_mask = draw_dropout_mask((directions, batch, self.hidden_size), self.recurrent_dropout, x)
        if self.zoneout_h or self.zoneout_c:
            options["zoneout"] = (self.zoneout_h, self.zoneout_c)
            if self.training:
                shape = (steps, batch, directions * self.hidden_size)
                zoneout_mask = draw_zoneout_mask(shape, self.zoneout_h, self.zoneout_c, x.device)
        # One call for both directions where one launch takes both; elsewhere nothing is gained by stacking the weights.
        if directions == 2 and not self.proj_size and resolve_backend(self.backend, x.device) == "triton":
            stacked = {name: torch.stack([w[name] for w in weights]) for name in weights[0]}
            return self._call(x, h_0, c_0, stacked, h_mask=h_mask, zoneout_mask=zoneout_mask, **options)
        results = []
        for d, own in enumerate(weights):
            h, c, mask = (None if a is None else a[d] for a in (h_0, c_0, h_mask))
            own_zoneout_mask = None if zoneout_mask is None else zoneout_mask.chunk(directions, dim=2)[d]
            results.append(
                self._call(x, h, c, own, h_mask=mask, zoneout_mask=own_zoneout_mask, reverse=d == 1, **options)
            )
        y, h_n, c_n = zip(*results, strict=True)
        return (torch.cat(y, dim=-1) if directions == 2 else y[0]), torch.stack(h_n), torch.stack(c_n)

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

    def _check_state(self, hx: Any, x: Tensor, batch: int, batched: bool) -> State:
        """Check the states for so many rows of x; return them with their dimension of rows."""
        check_pair(self, hx)
        check_state_ranks(hx, 3 if batched else 2, batched)
        h_0, c_0 = (s if batched else s.unsqueeze(1) for s in hx)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        for position, (s, units) in enumerate(((h_0, self.proj_size or self.hidden_size), (c_0, self.hidden_size))):
            expected = (layers, batch, units)
            if tuple(s.shape) != expected:
                raise RuntimeError(f"Expected hidden[{position}] size {expected}, got {list(s.shape)}")
            check_device(x, "hidden", s)
            if not same_dtype(x, s):
                raise RuntimeError(
                    "Input and hidden tensors are not the same dtype, found input tensor with "
                    f"{scalar_type(x)} and hidden tensor with {scalar_type(s)}"
                )
        return h_0, c_0


class NovoLSTM(NovoLSTMFunction, RecurrentLayer):
    r"""A stacked, optionally bidirectional NovoLSTM, called like `torch.nn.LSTM`.

    An LSTM whose input gate is i = gain · LayerNorm(σ(z_i)) · softmax(z_p), both over the hidden units (equations:
    `novolstm_triton.cells.novolstm`). Two facts to know before use: the gate is signed, because the normalisation
    centres it, and it is O(1/H), so that at large H a layer with gate_gain=1 starts nearly silent.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        proj_size: if above 0, h is projected to so many units P by weight_hr.
        device: where the parameters live.
        dtype: dtype of the parameters.
        variant: "formula" (default) or "notebook", the function of the published code.
        layer_norm: "input_gate" (default), or "all": z_f, z_g and z_o are normalised, too, over the units.
        ln_eps: ε of the layer normalisations; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, or "hidden" for H, which makes the gate O(1).
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence (Gal and Ghahramani 2016), in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; otherwise h moves by the
            expectation (Krueger et al. 2017).
        zoneout_c: likewise, of c.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters of layer k, `_reverse` appended for the second direction, rows in blocks i|f|g|o|p:
        weight_ih_l{k} [5H, I or D·P], weight_hh_l{k} [5H, P] (notebook: [4H, P]), bias_ih_l{k} [5H],
        bias_hh_l{k} [5H] (notebook: [4H]), weight_hr_l{k} [P, H] if projected, ln_weight_l{k} and ln_bias_l{k} [H]
        (layer_norm="all": [4H], blocks i|f|g|o). Weights and biases start as U(−1/√H, 1/√H), like nn.LSTM's;
        ln_weight as one, ln_bias as zero.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    mode = "NovoLSTM"
    """What nn.RNNBase calls its cell, for code that asks which states there are."""

    def __init__(
        self,
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
        variant: str = "formula",
        layer_norm: str = "input_gate",
        ln_eps: float | None = None,
        gate_gain: float | str = 1.0,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        backend: str = "auto",
    ) -> None:
        cell = novolstm_cell(variant, layer_norm)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(cell, *sizes, device, dtype, recurrent_dropout, zoneout_h, zoneout_c, backend)
        self._set_options(variant, layer_norm, ln_eps, gate_gain)

    @classmethod
    def from_lstm(cls, lstm: "nn.LSTM | LSTM", **options: Any) -> "NovoLSTM":
        """Return a layer that starts from a trained LSTM. It does not compute what the LSTM computes.

        The rows i|f|g|o of weights and biases, and weight_hr, are copies of the LSTM's; the rows p and the layer
        normalisations are freshly initialised. The input gate is another function of them, so the layer has to be
        trained. Sizes, bias, batch_first, dropout, device, dtype, training mode and each parameter's requires_grad
        are the LSTM's; so are recurrent_dropout, zoneout and backend of an `LSTM` where no options say otherwise.

        Args:
            lstm: nn.LSTM or `LSTM`.
            **options: NovoLSTM's keyword options: variant, layer_norm, gate_gain and so on.

        Raises:
            TypeError: `lstm` is not an LSTM, or an option is unknown.
            ValueError: its parameters are not those of an LSTM (it is pruned, for example), or an option's value.
        """
        return novolstm_from_lstm(cls, lstm, options)

    @classmethod
    def from_keras(
        cls,
        weights: "Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]",
        variant: str = "formula",
        *,
        layer: str | None = None,
        **options: Any,
    ) -> "NovoLSTM":
        """Return a layer that computes what the Keras layer with these weights computes.

        The names are those of the published layer: w_k [I, H], u_k [H, H] and b_k [H] of each
        gate k, where c is our g and i_prime our p; gamma and beta [H]. The order of a list is the one in which that
        layer makes them, which its `get_weights()` has, too: w, u and b of i; w and b of i_prime; w, u and b of f, of
        c, of o; gamma; beta. The formula, which has no published code, also has u_i_prime [H, H], after b_o.
        The weights of a `keras.layers.Bidirectional` are twice as many, forward first.

        Args:
            weights: a list of arrays in that order; or a dict of arrays by those names; or the path of a
                `.weights.h5` or `.keras` file, which needs h5py.
            variant: "formula" or "notebook", the function of the published code.
            layer: name in Keras, or path in the file, of the layer to take from a file that has several.
            **options: gate_gain, device, backend and so on. Where none are given, gate_gain is 1; ln_eps is 1e-3,
                Keras's own, for both variants; batch_first is True, as in Keras; dtype is the arrays'.

        Raises:
            TypeError: `weights` or an option of the wrong type.
            ValueError: a shape, name or number of arrays that does not fit; a damaged file; no such layer in it.
            FileNotFoundError: there is no such file.
            ImportError: a file is given and h5py is missing.
        """
        from novolstm_triton.weights.keras import novolstm_from_keras

        return novolstm_from_keras(cls, weights, variant, layer, options)

    def to_keras(self) -> "list[np.ndarray]":
        """Return the weights as arrays, in the order of `from_keras`, for the Keras layer's `set_weights`.

        The sum of the two biases is b, and gate_gain is a factor in gamma and beta. ε is not a weight: the Keras layer
        has to have this one's `ln_eps`, and a warning says so where that is not Keras's 1e-3. bfloat16 becomes fp32.

        Raises:
            ValueError: there is no such Keras layer: of several layers, with a projection, zoneout or
                layer_norm="all".
        """
        from novolstm_triton.weights.keras import novolstm_to_keras

        return novolstm_to_keras(self)


class LSTM(LSTMFunction, RecurrentLayer):
    r"""A drop-in for `torch.nn.LSTM`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        proj_size: if above 0, h is projected to so many units P by weight_hr.
        device: where the parameters live.
        dtype: dtype of the parameters.
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence, in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; else the expectation.
        zoneout_c: likewise, of c.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.lstm`.

    Parameters, names and shapes are nn.LSTM's, so that `load_state_dict` takes those of an nn.LSTM.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    mode = "LSTM"
    """What nn.LSTM calls its cell, for code that asks which states there are."""

    def __init__(
        self,
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
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("lstm", *sizes, device, dtype, recurrent_dropout, zoneout_h, zoneout_c, backend)

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, **options: Any) -> "LSTM":
        """Return a layer that computes what this nn.LSTM computes, with copies of its parameters.

        Sizes, bias, batch_first, dropout, device, dtype, training mode and each parameter's requires_grad are those
        of the nn.LSTM. Its hooks are not taken along.

        Args:
            lstm: nn.LSTM.
            **options: LSTM's keyword options: backend; and recurrent_dropout, zoneout_h and zoneout_c, with which the
                layer no longer computes the same.

        Raises:
            TypeError: `lstm` is not an nn.LSTM, or an option is unknown.
            ValueError: it is of a subclass with code of its own, or its parameters are not those of an LSTM (it is
                pruned, for example), or an option's value.
        """
        return lstm_from_torch(cls, lstm, options)

    def to_torch(self) -> nn.LSTM:
        """Return the nn.LSTM that computes what this layer computes, with copies of its parameters.

        Raises:
            ValueError: the layer has recurrent_dropout or zoneout, which nn.LSTM lacks, or its parameters are not
                those of an LSTM (it is pruned, for example).
        """
        return lstm_to_torch(self)

    @classmethod
    def from_keras(
        cls,
        weights: "Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]",
        *,
        layer: str | None = None,
        **options: Any,
    ) -> "LSTM":
        """Return a layer that computes what the `keras.layers.LSTM` with these weights computes.

        The Keras layer has to have its default activations, tanh and sigmoid, which its weights do not tell; a
        `.keras` file does, and is checked.

        Args:
            weights: [kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]], blocks i|f|c|o, or the first two, as
                `get_weights()` returns them, or twice as many for a `keras.layers.Bidirectional`, forward first; or a
                dict of arrays by those names; or the path of a `.weights.h5` or `.keras` file, which needs h5py.
            layer: name in Keras, or path in the file, of the layer to take from a file that has several.
            **options: device, backend and so on. Where none are given, batch_first is True, as in Keras, and dtype is
                the arrays'.

        Raises:
            TypeError: `weights` or an option of the wrong type.
            ValueError: a shape, name or number of arrays that does not fit; a damaged file; no such layer in it.
            FileNotFoundError: there is no such file.
            ImportError: a file is given and h5py is missing.
        """
        from novolstm_triton.weights.keras import lstm_from_keras

        return lstm_from_keras(cls, weights, layer, options)

    def to_keras(self) -> "list[np.ndarray]":
        """Return [kernel, recurrent_kernel, bias] for the Keras layer's `set_weights`, without bias if there is none.

        A bidirectional layer returns those of the forward, then those of the backward direction. The sum of the two
        biases is Keras's; bfloat16 becomes fp32.

        Raises:
            ValueError: there is no such Keras layer: of several layers, with a projection or zoneout.
        """
        from novolstm_triton.weights.keras import lstm_to_keras

        return lstm_to_keras(self)


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
