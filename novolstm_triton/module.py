"""NovoLSTM as a module with nn.LSTM's constructor and call: parameters, initialisation, layers, directions. No math."""

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton.functional import BACKENDS, novolstm, novolstm_bidirectional, resolve_backend
from novolstm_triton.reference import DEFAULT_EPS, RECURRENT_GATES


class NovoLSTM(nn.Module):
    r"""A stacked, optionally bidirectional NovoLSTM, called like `torch.nn.LSTM`.

    An LSTM whose input gate is i = gain · LayerNorm(σ(z_i)) · softmax(z_p), both over the hidden units (equations:
    `novolstm_triton.reference.novolstm`). Two facts to know before use: the gate is signed, because the
    normalisation centres it, and it is O(1/H), so that at large H a layer with gate_gain=1 starts nearly silent.

    Args:
        input_size: number of features of x.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: x and y are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        proj_size: not supported yet; anything but 0 raises NotImplementedError.
        device: where the parameters live.
        dtype: dtype of the parameters.
        variant: "formula" (default) or "notebook", the function its author published as code.
        ln_eps: ε of the layer normalisation; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, or "hidden" for H, which makes the gate O(1).
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters of layer k, `_reverse` appended for the second direction, rows in blocks i|f|g|o|p:
        weight_ih_l{k} [5H, I or D·H], weight_hh_l{k} [5H, H] (notebook: [4H, H]), bias_ih_l{k} [5H],
        bias_hh_l{k} [5H] (notebook: [4H]), ln_weight_l{k} [H], ln_bias_l{k} [H]. Weights and biases start as
        U(−1/√H, 1/√H), like nn.LSTM's; ln_weight as one, ln_bias as zero.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
        NotImplementedError: proj_size other than 0.
    """

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
        ln_eps: float | None = None,
        gate_gain: float | str = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name} must be greater than zero")
        for name, value in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        if proj_size != 0:
            raise NotImplementedError("NovoLSTM has no projection yet: leave proj_size at 0")
        if variant not in RECURRENT_GATES:
            raise ValueError(f"variant: expected one of {sorted(RECURRENT_GATES)}, got {variant!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {list(BACKENDS)}, got {backend!r}")
        if gate_gain != "hidden" and (not isinstance(gate_gain, numbers.Real) or isinstance(gate_gain, bool)):
            raise ValueError(f'gate_gain: expected a number or "hidden", got {gate_gain!r}')
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.variant = variant
        self.ln_eps = DEFAULT_EPS[variant] if ln_eps is None else float(ln_eps)
        self.gate_gain = gate_gain
        self.backend = backend

        directions = 2 if bidirectional else 1
        blocks = RECURRENT_GATES[variant]
        for layer in range(num_layers):
            features = input_size if layer == 0 else directions * hidden_size
            shapes = {"weight_ih": (5 * hidden_size, features), "weight_hh": (blocks * hidden_size, hidden_size)}
            if bias:
                shapes |= {"bias_ih": (5 * hidden_size,), "bias_hh": (blocks * hidden_size,)}
            shapes |= {"ln_weight": (hidden_size,), "ln_bias": (hidden_size,)}
            for suffix in self._suffixes(layer):
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights and biases from U(−1/√H, 1/√H); set the normalisation to the identity."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("ln_weight"):
                nn.init.ones_(parameter)
            elif name.startswith("ln_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layers over a batch of sequences, or over one unbatched sequence.

        D is 2 if bidirectional, else 1; L is num_layers.

        Args:
            x: [T, B, I], or [B, T, I] with batch_first, or unbatched [T, I].
            state: (h_0, c_0), each [L·D, B, H] ([L·D, H] if unbatched); zeros if None.
            lengths: [B] integers, the valid steps of each row; y is zero after them. Not with unbatched input.

        Returns:
            y [T, B, D·H] (or batch first, or unbatched, as x), and (h_n, c_n) with the shapes of the states.

        Raises:
            ValueError, RuntimeError: shapes that do not fit, in nn.LSTM's words.
            TypeError: a state that is no pair of tensors, or a wrong dtype.
            NotImplementedError: a PackedSequence.
        """
        if isinstance(x, PackedSequence):
            raise NotImplementedError("NovoLSTM takes no PackedSequence yet: pass the padded tensor and lengths=")
        batched = x.dim() == 3
        if x.dim() not in (2, 3):
            raise ValueError(f"NovoLSTM: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if not batched and lengths is not None:
            raise ValueError("lengths needs batched input, got an unbatched sequence: slice it instead")
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        h_0, c_0 = self._initial_state(x, state, batched)

        outputs, h_n, c_n = x, [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                outputs = nn.functional.dropout(outputs, self.dropout, self.training)
            outputs, h, c = self._run_layer(layer, outputs, h_0, c_0, lengths)
            h_n.extend(h)
            c_n.extend(c)

        h_n, c_n = torch.stack(h_n), torch.stack(c_n)
        if not batched:
            return outputs.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return (outputs.transpose(0, 1) if self.batch_first else outputs), (h_n, c_n)

    def extra_repr(self) -> str:
        """Return the constructor's arguments, leaving out defaults, like nn.LSTM."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        defaults |= {"variant": "formula", "gate_gain": 1.0, "backend": "auto"}
        shown = [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])

    def _run_layer(
        self, layer: int, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Return one layer's y [T, B, D·H] and, for each direction, h_n and c_n [B, H]; h_0 and c_0 are [L·D, B, H]."""
        weights = [self._weights(suffix) for suffix in self._suffixes(layer)]
        first, directions = layer * len(weights), range(len(weights))
        options: dict[str, Any] = dict(
            eps=self.ln_eps,
            gate_gain=float(self.hidden_size) if self.gate_gain == "hidden" else float(self.gate_gain),
            variant=self.variant,
            lengths=lengths,
            backend=self.backend,
        )
        # Elsewhere nothing is gained by stacking the weights.
        if self.bidirectional and resolve_backend(self.backend, x.device) == "triton":
            states = (s[first : first + 2] for s in (h_0, c_0))
            stacked = (torch.stack(pair) if pair[0] is not None else None for pair in zip(*weights, strict=True))
            y, h_n, c_n = novolstm_bidirectional(x, *states, *stacked, **options)
            return y, h_n.unbind(0), c_n.unbind(0)
        results = [
            novolstm(x, h_0[first + d], c_0[first + d], *weights[d], reverse=d == 1, **options) for d in directions
        ]
        outputs, h_n, c_n = zip(*results, strict=True)
        return (torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]), h_n, c_n

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def _weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        bias = None
        if self.bias:
            bias, recurrent = getattr(self, "bias_ih" + suffix), getattr(self, "bias_hh" + suffix)
            missing = bias.shape[0] - recurrent.shape[0]
            bias = bias + (nn.functional.pad(recurrent, (0, missing)) if missing else recurrent)
        weights = [getattr(self, name + suffix) for name in ("weight_ih", "weight_hh", "ln_weight", "ln_bias")]
        return weights[0], weights[1], bias, weights[2], weights[3]

    def _initial_state(self, x: Tensor, state: tuple[Tensor, Tensor] | None, batched: bool) -> tuple[Tensor, Tensor]:
        """Check the given states, or make zeros; [L·D, B, H] each. x is [T, B, I]."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        expected = (layers, x.shape[1], self.hidden_size)
        if state is None:
            dtype = self.get_parameter("weight_ih_l0").dtype
            zeros = torch.zeros(expected, dtype=dtype, device=x.device)
            return zeros, zeros
        if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(s, Tensor) for s in state):
            raise TypeError(f"NovoLSTM: Expected the state to be a tuple (h_0, c_0), got {type(state).__name__}")
        rank = 3 if batched else 2
        for s in state:
            if s.dim() != rank:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {rank}-D but got "
                    f"({state[0].dim()}-D, {state[1].dim()}-D) tensors"
                )
        h_0, c_0 = state if batched else (state[0].unsqueeze(1), state[1].unsqueeze(1))
        for position, s in ((0, h_0), (1, c_0)):
            if tuple(s.shape) != expected:
                raise RuntimeError(f"Expected hidden[{position}] size {expected}, got {list(s.shape)}")
        return h_0, c_0
