"""The LSTM and NovoLSTM with a hand-written backward in PyTorch: backend "torch" for these (equations: `cells`).

Between forward and backward only x, y and c at every chunk border are kept. Backward takes the chunks in reverse order.
It computes a chunk's gates again by two matrix products, because every h is known, and its c by an elementwise scan
from the border; it turns them into slopes, the factors between dh or dc and the gates' gradients. So the loop over the
steps does only what depends on the step after.

Shapes: T steps, B rows, I inputs, H units; n steps in a chunk; G gate blocks, R of them recurrent, N layer
normalisations. Gates are in the order i|f|g|o|p. They lie block by block, [G, n, B, H], so that each is contiguous;
their gradients lie row by row, [n, B, G·H], to meet the weights as they are. Everything is computed in fp32, or fp64
for fp64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from novolstm_triton.call import Call, Result, Saved, multiply_by_gain, state_dtype, vectors_with_gain
from novolstm_triton.engines.chunks import chunk_spans, h_before, valid_steps

CELLS = ("lstm", "formula", "formula_all", "notebook", "notebook_all")
"""The names of the cells that this module runs."""

_ALIGNMENT = 64
"""Bytes on whose multiples PyTorch begins its own tensors on a CPU."""

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_softmax_backward = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]


def forward(call: Call, chunk: int) -> Result:
    """Run the layer over a sequence, in one direction, `chunk` steps at a time; the last chunk may be shorter."""
    prepared = _Cell.prepare(call)
    (steps, batch, _), hidden = call.x.shape, call.h_0.shape[1]
    valid, zoneout = valid_steps(call.lengths, steps), _Zoneout.of(call, prepared.dtype)
    x, reverse = call.x, call.reverse
    y = x.new_empty(steps, batch, hidden)
    walk = _ForwardWalk(prepared, min(chunk, steps), call.h_0, call.c_0, reverse)
    borders = [walk.c.clone()]
    for low, high in chunk_spans(steps, chunk, reverse):
        chunk_valid = None if valid is None else valid[low:high]
        y[low:high] = walk.run(x[low:high], chunk_valid, None if zoneout is None else zoneout.span(low, high))
        borders.append(walk.c.clone())
    if valid is not None:
        y.masked_fill_(~valid, 0)
    return Result(y, walk.h.to(x.dtype, copy=True), walk.c.to(x.dtype, copy=True), torch.stack(borders))


def backward(saved: Saved, grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Differentiate `forward`.

    Args:
        saved: the call, its results y and c_border, and its chunk.
        grads: dy [T, B, H], dh_n [B, H] and dc_n [B, H].
        needs: which gradients to compute, in the order of `Call.tensors`.

    Returns:
        The gradients of `Call.tensors` in their shapes and dtypes; None for each that `needs` rules out.
    """
    call, y, c_border, chunk = saved
    dy, dh_n, dc_n = grads
    x, h_0, weight_hh, reverse = call.x, call.h_0, call.weight_hh, call.reverse
    prepared = _Cell.prepare(call)
    dtype, steps = prepared.dtype, x.shape[0]
    spans, valid = chunk_spans(steps, chunk, reverse), valid_steps(call.lengths, steps)
    zoneout = _Zoneout.of(call, dtype)
    walk = _BackwardWalk(prepared, weight_hh, min(chunk, steps), dh_n, dc_n, reverse, zoneout is not None)
    sums = _ParameterSums(prepared, needs[3:])
    weight_ih = _aligned(call.weight_ih, dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    for (low, high), border in zip(reversed(spans), reversed(c_border[:-1].unbind(0)), strict=True):
        frozen = None if valid is None else ~valid[low:high]
        x_chunk = _aligned(x[low:high], dtype)
        if frozen is not None:
            # Padding may hold anything, even NaN, and must not reach a product, where 0 · NaN is NaN.
            x_chunk = x_chunk.masked_fill(frozen, 0)
        h_seen = h_before(low, high, y, h_0, valid, reverse).to(dtype)
        h_seen = h_seen if prepared.h_mask is None else h_seen * prepared.h_mask
        walk.recompute(x_chunk, h_seen, border, frozen, None if zoneout is None else zoneout.span(low, high))
        dz = walk.run(dy[low:high])
        dvectors = walk.finish_norms(high - low, needs[6])
        sums.add(x_chunk.flatten(0, 1), h_seen.flatten(0, 1), dz.flatten(0, 1), dvectors)
        if dx is not None:
            dx[low:high] = (dz.flatten(0, 1) @ weight_ih).view_as(x_chunk)
    gradients = (dx, walk.dh if needs[1] else None, walk.dc if needs[2] else None, *sums.results(call))
    return [None if g is None else g.to(x.dtype) for g in gradients]


@dataclass(frozen=True)
class _Cell:
    """The parameters as the walks need them, in the dtype of computation."""

    weight_ih: Tensor
    """[G, H, I]."""
    weight_hh: Tensor
    """[R, H, H]."""
    bias: Tensor
    """[G, 1, H]."""
    gamma: Tensor
    """[N, H], the gain folded into the first."""
    beta: Tensor
    """[N, H], likewise."""
    h_mask: Tensor | None
    """[B, H]."""
    eps: float
    kind: str
    """"lstm", "formula" or "notebook"."""
    gate_norms: bool
    """Whether z_f, z_g and z_o are normalised."""

    @classmethod
    def prepare(cls, call: Call) -> _Cell:
        """Cast the parameters of a call and cut them into blocks."""
        dtype = state_dtype(call.x.dtype)
        hidden = call.weight_hh.shape[1]

        def blocks(rows: Tensor) -> Tensor:
            return _aligned(rows, dtype).unflatten(0, (-1, hidden))

        gamma, beta = vectors_with_gain(call, dtype).view(2, call.cell.vector_blocks // 2, hidden)
        return cls(
            weight_ih=blocks(call.weight_ih),
            weight_hh=blocks(call.weight_hh),
            bias=blocks(call.bias).unsqueeze(1),
            gamma=gamma,
            beta=beta,
            h_mask=None if call.h_mask is None else call.h_mask.to(dtype),
            eps=call.options.eps,
            kind=call.cell.name.partition("_")[0],
            gate_norms=call.cell.vector_blocks > 2,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        return self.weight_ih.dtype

    @property
    def units(self) -> list[int]:
        """The shape over which normalisations run."""
        return [self.weight_hh.shape[1]]

    def project(self, x: Tensor, z: Tensor) -> None:
        """Write x W + b into z [G, n, B, H]; x is [n, B, I]."""
        rows = _aligned(x, self.dtype).flatten(0, 1)
        torch.baddbmm(self.bias, rows.expand(len(z), -1, -1), self.weight_ih.mT, out=z.flatten(1, 2))
        if self.kind == "notebook":
            z[4] = z[4].softmax(-1)

    def norm(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain · LayerNorm(a) of the input gate over the units, the mean and 1/σ; a is [..., H]."""
        return torch.native_layer_norm(a, self.units, self.gamma[0], self.beta[0], self.eps)

    def input_gate(self, s: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """Return i from s = σ(z_i), perhaps written over it; p is z_p, or for the notebook its softmax."""
        if self.kind == "lstm":
            return s
        if self.kind == "formula":
            return self.norm(s)[0].mul_(torch.softmax(p, -1, out=out))
        return self.norm(s.mul_(p))[0]

    def other_affine(self) -> tuple[Tensor, Tensor]:
        """Return γ and β [3, 1, H] of f|g|o."""
        return self.gamma[1:].unsqueeze(1), self.beta[1:].unsqueeze(1)


class _Zoneout(NamedTuple):
    """Shares of h and of c that steps keep, [n, B, H] or [1, 1, 1] in the dtype of computation."""

    h: Tensor
    c: Tensor

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> _Zoneout | None:
        """Return those of a call, or None if nothing is kept."""
        mask, shares = call.zoneout_mask, (call.options.zoneout_h, call.options.zoneout_c)
        if mask is not None:
            return cls((mask & 1).to(dtype), (mask & 2).ne(0).to(dtype))
        if any(shares):
            return cls(*(torch.full((1, 1, 1), share, dtype=dtype) for share in shares))
        return None

    def span(self, low: int, high: int) -> _Zoneout:
        """Return those of the steps from low to high, with n steps each."""
        n = high - low
        return _Zoneout(*(a.expand(n, -1, -1) if len(a) == 1 else a[low:high] for a in self))


class _ForwardWalk:
    """Steps of the recurrence, chunk after chunk: holds the state and the buffers and views that a chunk uses."""

    def __init__(self, cell: _Cell, longest: int, h_0: Tensor, c_0: Tensor, reverse: bool) -> None:
        self.cell, self.reverse = cell, reverse
        self.h, self.c = h_0.to(cell.dtype), c_0.to(cell.dtype, copy=True)
        """[B, H] state between chunks."""
        recurrent = len(cell.weight_hh)
        self._weight_hh = _transpose_each(cell.weight_hh)
        self._projected = self.c.new_empty(len(cell.weight_ih), longest, *self.c.shape)
        self._h_all = self.c.new_empty(longest + 1, *self.c.shape)
        h_before = _before(self._h_all, reverse)
        buffers = (
            *(self._projected[:recurrent].transpose(0, 1), self._projected[-1]),
            *(h_before.unsqueeze(1).expand(-1, recurrent, -1, -1), h_before, _after(self._h_all, reverse)),
        )
        self._views = list(zip(*(buffer.unbind(0) for buffer in buffers), strict=True))

    def run(self, x: Tensor, valid: Tensor | None, zoneout: _Zoneout | None) -> Tensor:
        """Walk over a chunk, x [n, B, I], valid [n, B, 1]; return h after each step [n, B, H], in a buffer."""
        cell, n = self.cell, len(x)
        cell.project(x, self._projected[:, :n])
        first, last = (n, 0) if self.reverse else (0, n)
        self._h_all[first] = self.h
        valid_steps = None if valid is None else valid.unbind(0)
        shares = None if zoneout is None else (zoneout.h.unbind(0), zoneout.c.unbind(0))
        z = self.c.new_empty(len(cell.weight_hh), *self.c.shape)
        (s, f, g, o), z_if, z_fgo, z_p = z[:4], z[:2], z[1:4], z[-1]
        gamma, beta = cell.other_affine() if cell.gate_norms else (None, None)
        c, c_next, tanh_c, softmax = self.c, *self.c.new_empty(3, *self.c.shape)
        h_seen = torch.empty_like(c)
        masked = h_seen.expand(len(z), -1, -1)
        for t in _order(n, self.reverse):
            projected, p, h_factor, h, h_next = self._views[t]
            if cell.h_mask is not None:
                torch.mul(h, cell.h_mask, out=h_seen)
                h_factor = masked
            torch.baddbmm(projected, h_factor, self._weight_hh, out=z)
            if gamma is not None and beta is not None:
                normalised = torch.native_layer_norm(z_fgo, cell.units, None, None, cell.eps)[0]
                torch.addcmul(beta, normalised, gamma, out=z_fgo)
            z_if.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            i = cell.input_gate(s, z_p if cell.kind == "formula" else p, softmax)
            torch.mul(i, g, out=c_next).addcmul_(f, c)
            torch.tanh(c_next, out=tanh_c)
            torch.mul(o, tanh_c, out=h_next)
            if shares is not None:
                h_next.lerp_(h, shares[0][t])
                c_next.lerp_(c, shares[1][t])
            if valid_steps is not None:
                torch.where(valid_steps[t], c_next, c, out=c_next)
                torch.where(valid_steps[t], h_next, h, out=h_next)
            c, c_next = c_next, c
        self.h, self.c = self._h_all[last].clone(), c
        return _after(self._h_all[: n + 1], self.reverse)


class _PlainGate:
    """Gradient of i = σ(z_i), chunk by chunk; `gates` is the walk's buffer [G, longest, B, H]."""

    def __init__(self, cell: _Cell, gates: Tensor) -> None:
        self._gates, self._slopes = gates, torch.empty_like(gates[0])
        self._steps = self._slopes.unbind(0)

    def recompute(self, n: int, frozen: Tensor | None) -> Tensor:
        """Make the slopes from the chunk's gates; return i [n, B, H], which may lie in their buffer."""
        s, _, g, _ = self._gates[:4, :n]
        slopes = torch.sub(1, s, out=self._slopes[:n]).mul_(s).mul_(g)
        if frozen is not None:
            slopes.masked_fill_(frozen, 0)
        return s

    def step(self, t: int, dc: Tensor, dz_i: Tensor, dz_p: Tensor) -> None:
        """Write dz_i [B, H], and dz_p if the cell has a p that sees h, of a step whose dc is known."""
        torch.mul(dc, self._steps[t], out=dz_i)

    def finish(self, dc: Tensor, dz_p: Tensor, needed: bool) -> tuple[Tensor, Tensor] | None:
        """Return the chunk's share of dγ and dβ [H], if needed; write the dz_p [n, B, H] of a p that does not see h.

        Nothing here feeds the recurrence, so it takes the whole chunk at once; dc is [n, B, H].
        """
        return None


class _FormulaGate(_PlainGate):
    """Gradient of i = gain·LN(σ(z_i))·softmax(z_p)."""

    def __init__(self, cell: _Cell, gates: Tensor) -> None:
        self._cell, self._gates = cell, gates
        # What takes dc to dn and dp, and the gradient of the norm's input to dz_i. That input, less its mean, is left
        # in the gates' buffer.
        self._slopes, self._softmax = torch.empty_like(gates[:3]), torch.empty_like(gates[0])
        self._into_norm, self._dz_p = torch.empty_like(gates[:2, 0]), torch.empty_like(gates[0, 0])
        parts = (self._slopes[:2].transpose(0, 1), self._slopes[2], gates[0], self._softmax)
        self._steps = list(zip(*(part.unbind(0) for part in parts), strict=True))

    def recompute(self, n: int, frozen: Tensor | None) -> Tensor:
        s, _, g, _, z_p = self._gates[:, :n]
        slopes, p = self._slopes[:, :n], torch.softmax(z_p, -1, out=self._softmax[:n])
        i, mean, self._rstd = self._cell.norm(s)
        slope_n, slope_p, slope_i = slopes
        torch.mul(g, p, out=slope_n)
        torch.mul(g, i, out=slope_p)
        torch.sub(1, s, out=slope_i).mul_(s)
        if frozen is not None:
            slopes.masked_fill_(frozen, 0)
        self._mean = _centre(s, mean)
        return i.mul_(p)

    def step(self, t: int, dc: Tensor, dz_i: Tensor, dz_p: Tensor) -> None:
        cell, (slope_norm, slope_i, deviation, p) = self._cell, self._steps[t]
        dn, dp = torch.mul(dc, slope_norm, out=self._into_norm)
        torch.mul(_norm_input(cell, dn, deviation, self._mean[t], self._rstd[t]), slope_i, out=dz_i)
        # Written to a row of its own first: this operator takes the output for contiguous.
        dz_p.copy_(_softmax_backward(dp, p, -1, cell.dtype, grad_input=self._dz_p))

    def finish(self, dc: Tensor, dz_p: Tensor, needed: bool) -> tuple[Tensor, Tensor] | None:
        if not needed:
            return None
        n, cell = len(dc), self._cell
        arguments = (dc * self._slopes[0, :n], self._gates[0, :n], cell.units, self._mean, self._rstd)
        return _layer_norm_backward(*arguments, cell.gamma[0], cell.beta[0], (False, True, True))[1:]


class _NotebookGate(_PlainGate):
    """Gradient of i = gain·LN(σ(z_i)·p), where p does not see h."""

    def __init__(self, cell: _Cell, gates: Tensor) -> None:
        self._cell, self._gates = cell, gates
        # What takes dc to dn, and the gradient of the norm's input to dz_i.
        self._slopes, self._product = torch.empty_like(gates[:2]), torch.empty_like(gates[0])
        self._dn = torch.empty_like(gates[0, 0])
        self._steps = list(zip(*(part.unbind(0) for part in (*self._slopes, self._product)), strict=True))

    def recompute(self, n: int, frozen: Tensor | None) -> Tensor:
        s, _, g, _, p = self._gates[:, :n]
        slope_n, slope_i = self._slopes[:, :n]
        product = torch.mul(s, p, out=self._product[:n])
        i, mean, self._rstd = self._cell.norm(product)
        self._mean = _centre(product, mean)
        slope_n.copy_(g)
        torch.sub(1, s, out=slope_i).mul_(s).mul_(p)
        if frozen is not None:
            self._slopes[:, :n].masked_fill_(frozen, 0)
        return i

    def step(self, t: int, dc: Tensor, dz_i: Tensor, dz_p: Tensor) -> None:
        slope_n, slope_i, deviation = self._steps[t]
        dn = torch.mul(dc, slope_n, out=self._dn)
        torch.mul(_norm_input(self._cell, dn, deviation, self._mean[t], self._rstd[t]), slope_i, out=dz_i)

    def finish(self, dc: Tensor, dz_p: Tensor, needed: bool) -> tuple[Tensor, Tensor] | None:
        n, cell = len(dc), self._cell
        arguments = (dc * self._slopes[0, :n], self._product[:n], cell.units, self._mean, self._rstd)
        mask = (True, needed, needed)
        da, dgamma, dbeta = _layer_norm_backward(*arguments, cell.gamma[0], cell.beta[0], mask)
        s, _, _, _, p = self._gates[:, :n]
        dz_p.copy_(_softmax_backward(da.mul_(s), p, -1, cell.dtype))
        return (dgamma, dbeta) if needed else None


_INPUT_GATES = {"lstm": _PlainGate, "formula": _FormulaGate, "notebook": _NotebookGate}


def _centre(a: Tensor, mean: Tensor) -> Tensor:
    """Subtract the mean over the units from `a` [..., H] in place; return the mean [..., 1] that rounding leaves.

    On a CPU PyTorch's gradient of a layer normalisation sums dn·a and takes away Σ dn·mean after that: where the mean
    is much larger than the deviations, little is left of them. Given the deviations and their mean, it loses nothing.
    """
    return a.sub_(mean).mean(-1, keepdim=True)


def _norm_input(cell: _Cell, dn: Tensor, a: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of what the input gate's layer normalisation is taken of."""
    mask = (True, False, False)
    return _layer_norm_backward(dn, a, cell.units, mean, rstd, cell.gamma[0], cell.beta[0], mask)[0]


class _GateNorms:
    """Gradient of the layer normalisations of z_f, z_g and z_o, chunk by chunk."""

    def __init__(self, cell: _Cell, gates: Tensor) -> None:
        self._cell, self._gates = cell, gates
        self._gamma, self._beta = cell.other_affine()
        # z less its mean, block by block in a step.
        self._z = torch.empty_like(gates[1:4].transpose(0, 1), memory_format=torch.contiguous_format)
        self.after = torch.empty_like(self._z)
        """[n, 3, B, H]: where the walk writes the gradients of what the normalisations return."""

    def recompute(self, n: int) -> None:
        """Normalise z_f, z_g and z_o in the chunk's gates."""
        z, gates = self._z[:n], self._gates[1:4, :n].transpose(0, 1)
        z.copy_(gates)
        self._xhat, mean, self._rstd = torch.native_layer_norm(z, self._cell.units, None, None, self._cell.eps)
        self._mean = _centre(z, mean)
        torch.addcmul(self._beta, self._xhat, self._gamma, out=gates)

    def step(self, t: int) -> Tensor:
        """Return dz [3, B, H] of a step from what was written to `after`."""
        dxhat = self.after[t] * self._gamma
        arguments = (dxhat, self._z[t], self._cell.units, self._mean[t], self._rstd[t], None, None)
        return _layer_norm_backward(*arguments, (True, False, False))[0]

    def finish(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the chunk's share of dγ and dβ [3·H]."""
        after = self.after[:n]
        return (after * self._xhat).sum((0, 2)).flatten(), after.sum((0, 2)).flatten()


class _BackwardWalk:
    """Steps of the recurrence's gradient, last chunk first: holds dh, dc and a chunk's buffers and views."""

    def __init__(
        self,
        cell: _Cell,
        weight_hh: Tensor,
        longest: int,
        dh_n: Tensor,
        dc_n: Tensor,
        reverse: bool,
        zoneout: bool,
    ) -> None:
        self.cell, self.reverse = cell, reverse
        self.dh, self.dc = dh_n.to(cell.dtype), dc_n.to(cell.dtype, copy=True)
        """[B, H] gradients of the state between chunks."""
        self._weight_hh = _aligned(weight_hh, cell.dtype)
        batch, hidden = self.dc.shape

        def buffer(*shape: int) -> Tensor:
            return self.dc.new_empty(*shape, batch, hidden)

        self._gates, self._tanh_c = buffer(len(cell.weight_ih), longest), buffer(longest)
        self._input_gate = _INPUT_GATES[cell.kind](cell, self._gates)
        self._gate_norms = _GateNorms(cell, self._gates) if cell.gate_norms else None
        self._c_all = buffer(longest + 1)
        # The c that a step makes, all of which it takes over unless there is zoneout.
        self._c_made = buffer(longest) if zoneout else _after(self._c_all, reverse)
        self._dh_all, self._dc_all = buffer(longest + 1), buffer(longest)
        # What takes dh to dz_o and to dc; dc to dz_f and dz_g.
        self._slopes = buffer(4, longest)
        self._dz = self.dc.new_empty(longest, batch, len(cell.weight_ih) * hidden)
        scan = (self._c_made, self._gates[1], _before(self._c_all, reverse), _after(self._c_all, reverse))
        self._scan = list(zip(*(part.unbind(0) for part in scan), strict=True))
        self._views = self._cut()

    def _cut(self) -> list[tuple[Tensor, ...]]:
        """Cut the buffers into what `run` uses at each step."""
        cell, hidden, slopes = self.cell, self.dc.shape[1], self._slopes
        dz = self._dz.unflatten(2, (len(cell.weight_ih), hidden)).transpose(1, 2)
        dz_fgo = dz[:, 1:4]
        after_norms = dz_fgo if self._gate_norms is None else self._gate_norms.after
        buffers = (
            *(_after(self._dh_all, self.reverse), _before(self._dh_all, self.reverse)),
            *(self._dc_all, self._gates[1]),
            *(slopes[0], slopes[1], slopes[2:].transpose(0, 1)),
            *(self._dz[..., : len(cell.weight_hh) * hidden], dz[:, 0], after_norms[:, :2], after_norms[:, 2]),
            *(dz_fgo, dz[:, -1]),
        )
        return list(zip(*(part.unbind(0) for part in buffers), strict=True))

    def recompute(
        self, x: Tensor, h_seen: Tensor, c_border: Tensor, frozen: Tensor | None, zoneout: _Zoneout | None
    ) -> None:
        """Bring back the gates and c of a chunk, and make the slopes from them.

        Args:
            x: [n, B, I] input.
            h_seen: [n, B, H] hidden state before each step, times its mask.
            c_border: [B, H] cell state before the chunk.
            frozen: [n, B, 1] true where a row keeps its state, or None.
            zoneout: shares of h and c that the steps keep, or None.
        """
        cell, n, recurrent = self.cell, len(x), len(self.cell.weight_hh)
        gates, slopes = self._gates[:, :n], self._slopes[:, :n]
        cell.project(x, gates)
        h_rows = h_seen.flatten(0, 1).expand(recurrent, -1, -1)
        gates[:recurrent].flatten(1, 2).baddbmm_(h_rows, cell.weight_hh.mT)
        if self._gate_norms is not None:
            self._gate_norms.recompute(n)
        gates[:2].sigmoid_()
        gates[2].tanh_()
        gates[3].sigmoid_()
        i = self._input_gate.recompute(n, frozen)
        _, f, g, o = gates[:4]
        if frozen is not None:
            i.masked_fill_(frozen, 0)
            f.masked_fill_(frozen, 1)
        c_before, c_made = _before(self._c_all[: n + 1], self.reverse), self._c_made[:n]
        self._c_all[n if self.reverse else 0] = c_border
        if zoneout is None:
            c_made = _after(self._c_all[: n + 1], self.reverse)
        torch.mul(i, g, out=c_made)
        for t in _order(n, self.reverse):
            made, f_t, before, after = self._scan[t]
            made.addcmul_(f_t, before)
            if zoneout is not None:
                torch.lerp(made, before, zoneout.c[t], out=after)
        tanh_c = torch.tanh(c_made, out=self._tanh_c[:n])
        slope_o, slope_c, slope_f, slope_g = slopes
        _sigmoid_backward(tanh_c, o, grad_input=slope_o)
        _tanh_backward(o, tanh_c, grad_input=slope_c)
        _sigmoid_backward(c_before, f, grad_input=slope_f)
        _tanh_backward(i, g, grad_input=slope_g)
        if frozen is not None:
            slopes.masked_fill_(frozen, 0)
        self._frozen = frozen
        # What of dh goes to the step before as it is: all of a frozen row's.
        self._h_kept = None if frozen is None else frozen.to(cell.dtype)
        self._c_kept = None
        if zoneout is not None:
            self._h_kept = zoneout.h if frozen is None else zoneout.h.masked_fill(frozen, 1)
            self._c_kept = zoneout.c
            slopes[:2] *= 1 - zoneout.h

    def run(self, dy: Tensor) -> Tensor:
        """Walk back over the chunk; dy is [n, B, H]. Return dz [n, B, G·H] in a buffer; notebook: dz_p not final."""
        cell, n, dc = self.cell, len(dy), self.dc
        first, last = (n, 0) if self.reverse else (0, n)
        dh_after = _after(self._dh_all[: n + 1], self.reverse)
        dh_after.copy_(dy)
        if self._frozen is not None:
            dh_after.masked_fill_(self._frozen, 0)
        self._dh_all[last] += self.dh
        self._dh_all[first] = 0
        h_kept, c_kept = (None if a is None else a.unbind(0) for a in (self._h_kept, self._c_kept))
        c_moved = None if self._c_kept is None else (1 - self._c_kept).unbind(0)
        dc_in, dh_seen = torch.empty_like(dc), torch.empty_like(dc)
        for t in _order(n, not self.reverse):
            dh, dh_before, dc_t, f, slope_o, slope_c, slope_fg, *dz = self._views[t]
            dz_recurrent, dz_i, dz_fg, dz_o, dz_fgo, dz_p = dz
            torch.addcmul(dc if c_moved is None else torch.mul(dc, c_moved[t], out=dc_in), dh, slope_c, out=dc_t)
            torch.mul(dh, slope_o, out=dz_o)
            torch.mul(dc_t, slope_fg, out=dz_fg)
            if self._gate_norms is not None:
                dz_fgo.copy_(self._gate_norms.step(t))
            self._input_gate.step(t, dc_t, dz_i, dz_p)
            if c_kept is None:
                torch.mul(dc_t, f, out=dc)
            else:
                dc.mul_(c_kept[t]).addcmul_(dc_t, f)
            if cell.h_mask is None:
                dh_before.addmm_(dz_recurrent, self._weight_hh)
            else:
                dh_before.addcmul_(torch.mm(dz_recurrent, self._weight_hh, out=dh_seen), cell.h_mask)
            if h_kept is not None:
                dh_before.addcmul_(dh, h_kept[t])
        self.dh = self._dh_all[first].clone()
        return self._dz[:n]

    def finish_norms(self, n: int, needed: bool) -> Tensor | None:
        """Return what the chunk just walked adds to dγ and dβ [2·N·H], if needed; for the notebook fill in its dz_p."""
        hidden = self.dc.shape[1]
        own = self._input_gate.finish(self._dc_all[:n], self._dz[:n, :, -hidden:], needed)
        if own is None:
            return None
        others = () if self._gate_norms is None else self._gate_norms.finish(n)
        return torch.cat((own[0], *others[:1], own[1], *others[1:]))


class _ParameterSums:
    """Gradients of the parameters, summed over chunks in the order of the walk."""

    def __init__(self, cell: _Cell, needs: Sequence[bool]) -> None:
        (gates, hidden, inputs), recurrent = cell.weight_ih.shape, len(cell.weight_hh)
        shapes = ((gates * hidden, inputs), (recurrent * hidden, hidden), (gates * hidden,), (2 * cell.gamma.numel(),))
        self._sums = [
            cell.bias.new_zeros(shape) if needed else None for shape, needed in zip(shapes, needs, strict=True)
        ]

    def add(self, x: Tensor, h_seen: Tensor, dz: Tensor, dvectors: Tensor | None) -> None:
        """Add a chunk of m = n·B rows: x [m, I], h_seen [m, H], dz [m, G·H], and its dγ and dβ [2·N·H] if needed."""
        weight_ih, weight_hh, bias, vectors = self._sums
        if weight_ih is not None:
            weight_ih.addmm_(dz.t(), x)
        if weight_hh is not None:
            weight_hh.addmm_(dz[:, : len(weight_hh)].t(), h_seen)
        if bias is not None:
            bias.add_(dz.sum(0))
        if vectors is not None and dvectors is not None:
            vectors.add_(dvectors)

    def results(self, call: Call) -> list[Tensor | None]:
        """Return the gradients of weight_ih, weight_hh, bias and the vectors."""
        if (vectors := self._sums[3]) is not None:
            multiply_by_gain(vectors, call)
        return self._sums


def _aligned(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a` in a dtype, contiguous, and copied if its memory does not begin where PyTorch's own does.

    A CPU's matrix product may add up in another order where memory is aligned otherwise: results would depend on where
    a caller's tensor happens to lie.
    """
    a = a.to(dtype).contiguous()
    return a.clone() if a.device.type == "cpu" and a.data_ptr() % _ALIGNMENT else a


def _order(n: int, backwards: bool) -> range:
    return range(n - 1, -1, -1) if backwards else range(n)


def _before(states: Tensor, reverse: bool) -> Tensor:
    """Of n + 1 states in the order of time, return the n that a walk finds before its steps, at the steps' times."""
    return states[1:] if reverse else states[:-1]


def _after(states: Tensor, reverse: bool) -> Tensor:
    """Of n + 1 states in the order of time, return the n that a walk leaves after its steps, at the steps' times."""
    return states[:-1] if reverse else states[1:]


def _transpose_each(matrices: Tensor) -> Tensor:
    """Return the transposes of a stack of matrices, contiguous; one by one, which PyTorch copies faster."""
    result = matrices.new_empty(matrices.mT.shape)
    for transposed, matrix in zip(result, matrices, strict=True):
        transposed.copy_(matrix.t())
    return result
