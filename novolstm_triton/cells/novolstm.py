"""NovoLSTM: an LSTM whose input gate is a layer normalisation times a softmax over the units. Two variants.

    formula:   i = LN(σ(z_i)) · softmax(z_p)
    notebook:  i = LN(σ(z_i) · softmax(z_p)), where p does not see h

With every gate normalised z_f, z_g and z_o are LN(z_f), LN(z_g) and LN(z_o), each with γ and β of its own. A gain on
the input gate is one on the γ and the β of its normalisation.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from novolstm_triton.cells.cell import Block, Cell, Step, Vector
from novolstm_triton.cells.lstm import state

VARIANTS = ("formula", "notebook")
"""NovoLSTM's variants."""

LAYER_NORMS = ("input_gate", "all")
"""Which gates of NovoLSTM are normalised."""


def _step(notebook: bool, every: bool) -> Step:
    def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        z_i, z_f, z_g, z_o, z_p = z
        gamma, beta = vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]
        units = (c.shape[1],)
        if every:
            triples = zip((z_f, z_g, z_o), gamma[1:], beta[1:], strict=True)
            z_f, z_g, z_o = (layer_norm(z_k, units, own_gamma, own_beta, eps) for z_k, own_gamma, own_beta in triples)
        s, p = torch.sigmoid(z_i), torch.softmax(z_p, dim=1)
        if notebook:
            i = layer_norm(s * p, units, gamma[0], beta[0], eps)
        else:
            i = layer_norm(s, units, gamma[0], beta[0], eps) * p
        return state(i, z_f, z_g, z_o, c)

    return step


def _cell(variant: str, layer_norm: str, eps: float) -> Cell:
    notebook, every = variant == "notebook", layer_norm == "all"
    name = novolstm_cell(variant, layer_norm)
    normalised = ("i", "f", "g", "o") if every else ("i",)
    return Cell(
        name=name,
        blocks=(*map(Block, "ifgo"), Block("p", recurrent=not notebook)),
        step=_step(notebook, every),
        vectors=(Vector("ln_weight", normalised, 1.0), Vector("ln_bias", normalised, 0.0)),
        gained=(0, len(normalised)),
        eps=eps,
        kernels=f"novolstm_triton.kernels.novolstm:{name.upper()}",
    )


def novolstm_cell(variant: str, layer_norm: str) -> str:
    """Return the name of NovoLSTM's cell with these options.

    Raises:
        ValueError: an unknown variant, or an unknown choice of normalised gates.
    """
    for name, value, known in (("variant", variant, VARIANTS), ("layer_norm", layer_norm, LAYER_NORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {sorted(known)}, got {value!r}")
    return variant if layer_norm == "input_gate" else f"{variant}_all"


FORMULA = _cell("formula", "input_gate", 1e-5)
FORMULA_ALL = _cell("formula", "all", 1e-5)
NOTEBOOK = _cell("notebook", "input_gate", 1e-3)
NOTEBOOK_ALL = _cell("notebook", "all", 1e-3)
