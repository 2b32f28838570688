"""What the cells are made of: gate blocks, and which of them are recurrent or normalised. Data, no equations.

The equations are in `reference.py`; each backend has its own file or functions for them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """The blocks of a cell's parameters, each H rows, in the order of the gates."""

    gates: tuple[str, ...]
    """Gate blocks of weight_ih and bias."""
    recurrent: int
    """How many of them, from the first, have a block in weight_hh."""
    normalised: tuple[str, ...]
    """Gates with a layer normalisation, in the order of the blocks of ln_weight and ln_bias."""
    eps: float
    """Default ε of the layer normalisations."""

    @property
    def gate_norms(self) -> bool:
        """Whether the pre-activations of f, g and o are normalised."""
        return len(self.normalised) > 1


_NOVOLSTM = ("i", "f", "g", "o", "p")
_ALL = ("i", "f", "g", "o")

CELLS = {
    "lstm": Cell(gates=("i", "f", "g", "o"), recurrent=4, normalised=(), eps=0.0),
    "formula": Cell(gates=_NOVOLSTM, recurrent=5, normalised=("i",), eps=1e-5),
    "formula_all": Cell(gates=_NOVOLSTM, recurrent=5, normalised=_ALL, eps=1e-5),
    "notebook": Cell(gates=_NOVOLSTM, recurrent=4, normalised=("i",), eps=1e-3),
    "notebook_all": Cell(gates=_NOVOLSTM, recurrent=4, normalised=_ALL, eps=1e-3),
}
"""Every cell by its name: the plain LSTM; NovoLSTM's variants, and the same with every gate normalised."""

VARIANTS = ("formula", "notebook")
"""NovoLSTM's variants."""

LAYER_NORMS = ("input_gate", "all")
"""Which gates of NovoLSTM are normalised."""


def novolstm_cell(variant: str, layer_norm: str) -> str:
    """Return the name of NovoLSTM's cell with these options.

    Raises:
        ValueError: an unknown variant, or an unknown choice of normalised gates.
    """
    for name, value, known in (("variant", variant, VARIANTS), ("layer_norm", layer_norm, LAYER_NORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {sorted(known)}, got {value!r}")
    return variant if layer_norm == "input_gate" else f"{variant}_all"
