"""NovoLSTM as modules: `NovoLSTM` and `NovoLSTMCell`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.checks import check_finite
from novolstm_triton.layers.layer import RecurrentLayer
from novolstm_triton.layers.recurrent import Recurrent
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.weights.torch import novolstm_from_lstm

if TYPE_CHECKING:
    import numpy as np

    from novolstm_triton.layers.lstm import LSTM


class _Options(Recurrent):
    """The options of NovoLSTM's cell."""

    def _set_options(self, variant: str, layer_norm: str, ln_eps: float | None, gate_gain: float | str) -> None:
        """Keep the options of the cell.

        Raises:
            TypeError: an option of the wrong type.
            ValueError: an option out of range.
        """
        expected = 'a finite number or "hidden"'
        if isinstance(gate_gain, str):
            if gate_gain != "hidden":
                raise ValueError(f"gate_gain: expected {expected}, got {gate_gain!r}")
        else:
            check_finite(gate_gain, "gate_gain", expected)
        self.variant = variant
        self.layer_norm = layer_norm
        self.ln_eps = (
            self._cell.eps if ln_eps is None else check_finite(ln_eps, "ln_eps", "a positive finite number", above=0)
        )
        self.gate_gain = gate_gain

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        yield from super()._defaults()
        yield from {"variant": "formula", "layer_norm": "input_gate"}.items()
        yield "ln_eps", self._cell.eps
        yield "gate_gain", 1.0

    def _numbers(self) -> dict[str, float]:
        gain = self.hidden_size if self.gate_gain == "hidden" else self.gate_gain
        return dict(eps=self.ln_eps, gate_gain=float(gain))


class NovoLSTM(_Options, RecurrentLayer):
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
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(
            *(CELLS[novolstm_cell(variant, layer_norm)], *sizes, device, dtype),
            recurrent_dropout=recurrent_dropout,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            backend=backend,
        )
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


class NovoLSTMCell(_Options, RecurrentCell):
    r"""A single step of NovoLSTM, called like `torch.nn.LSTMCell`.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        device: where the parameters live.
        dtype: dtype of the parameters.
        variant: "formula" (default) or "notebook", the function of the published code.
        layer_norm: "input_gate" (default), or "all": z_f, z_g and z_o are normalised, too, over the units.
        ln_eps: ε of the layer normalisations; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, or "hidden" for H, which makes the gate O(1).
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, rows in blocks i|f|g|o|p, drawn like those of `NovoLSTM`:
        weight_ih [5H, I], weight_hh [5H, H] (notebook: [4H, H]), bias_ih [5H], bias_hh [5H] (notebook: [4H]),
        ln_weight and ln_bias [H] (layer_norm="all": [4H], blocks i|f|g|o).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str = "formula",
        layer_norm: str = "input_gate",
        ln_eps: float | None = None,
        gate_gain: float | str = 1.0,
        backend: str = "auto",
    ) -> None:
        cell = CELLS[novolstm_cell(variant, layer_norm)]
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, backend=backend)
        self._set_options(variant, layer_norm, ln_eps, gate_gain)
