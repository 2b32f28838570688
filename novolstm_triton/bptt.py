"""NovoLSTM with a hand-written backward in PyTorch: backend "torch", the CPU's path (equations: `reference.novolstm`).

Between forward and backward only x, y and c at every chunk border are kept. Backward takes the chunks in reverse order.
It brings a chunk's gates back by two matrix products, for every h is known by then, and its c by an elementwise scan
from the border; it turns them into slopes, the factors between dh or dc and the gates' gradients; and so leaves to the
walk over the steps only what depends on the step after.

Shapes: T steps, B rows, I inputs, H units; n steps in a chunk; R recurrent gate blocks (formula 5, notebook 4). Gates
lie block by block, [5, n, B, H], in the private order i|f|o|g|p: each block is contiguous and one call takes all
sigmoids. Their gradients lie row by row, [n, B, 5H], in the public order i|f|g|o|p, to meet the weights as they are.
Everything is computed in fp32, or fp64 for fp64 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PRIVATE_ORDER = (0, 1, 3, 2, 4)
"""The public positions (i|f|g|o|p) of the private gate blocks i|f|o|g|p."""

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_softmax_backward = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]


def forward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    *,
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the layer over a sequence.

    Args:
        x: [T, B, I] input.
        h_0: [B, H] initial hidden state.
        c_0: [B, H] initial cell state.
        weight_ih: [5H, I] input weights, blocks i|f|g|o|p.
        weight_hh: [5H, H] recurrent weights, blocks i|f|g|o|p; notebook: [4H, H], blocks i|f|g|o.
        bias: [5H], blocks i|f|g|o|p.
        ln_weight: [H] γ.
        ln_bias: [H] β.
        lengths: [B] int32 number of valid steps of each row, or None.
        eps: ε of the layer normalisation.
        gate_gain: constant factor on the input gate.
        variant: "formula" or "notebook".
        reverse: walk from the last step to the first.
        chunk: steps of a chunk; the one walked last may be shorter.

    Returns:
        y [T, B, H], h_n [B, H], c_n [B, H] in the dtype of x, and c_border [⌈T/chunk⌉ + 1, B, H], c before each chunk
        in walking order and after the last, in fp32 (fp64 for fp64 tensors).
    """
    cell = _Cell.prepare(weight_ih, weight_hh, bias, ln_weight, ln_bias, eps, gate_gain, variant)
    (steps, batch, _), hidden = x.shape, h_0.shape[1]
    valid = _valid(lengths, steps)
    y = x.new_empty(steps, batch, hidden)
    walk = _ForwardWalk(cell, min(chunk, steps), h_0, c_0, reverse)
    borders = [walk.c.clone()]
    for low, high in _spans(steps, chunk, reverse):
        y[low:high] = walk.run(x[low:high], None if valid is None else valid[low:high])
        borders.append(walk.c.clone())
    if valid is not None:
        y.masked_fill_(~valid, 0)
    return y, walk.h.to(x.dtype, copy=True), walk.c.to(x.dtype, copy=True), torch.stack(borders)


def backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    y: Tensor,
    c_border: Tensor,
    *,
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Differentiate `forward`.

    Takes the gradients dy [T, B, H], dh_n [B, H] and dc_n [B, H] of its results, then its tensors, its results y and
    c_border, its options, and `needs`, which tells the eight gradients to compute.

    Returns:
        The gradients of x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias in their shapes and dtypes; None
        for each that `needs` rules out.
    """
    cell = _Cell.prepare(weight_ih, weight_hh, bias, ln_weight, ln_bias, eps, gate_gain, variant)
    steps = x.shape[0]
    spans, valid = _spans(steps, chunk, reverse), _valid(lengths, steps)
    walk = _BackwardWalk(cell, weight_hh, min(chunk, steps), dh_n, dc_n, reverse)
    sums = _ParameterSums(cell, needs)
    weight_ih = weight_ih.to(cell.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    for (low, high), border in zip(reversed(spans), reversed(c_border[:-1].unbind(0)), strict=True):
        frozen = None if valid is None else ~valid[low:high]
        x_chunk = x[low:high].to(cell.dtype)
        if frozen is not None:
            # Padding may hold anything, even NaN, and must not reach a product, where 0 · NaN is NaN.
            x_chunk = x_chunk.masked_fill(frozen, 0)
        h_before = _h_before(low, high, y, h_0, valid, reverse).to(cell.dtype)
        walk.recompute(x_chunk, h_before, border, frozen)
        dz = walk.run(dy[low:high], frozen)
        dgamma, dbeta = walk.finish_norm(high - low, needs[6], needs[7])
        sums.add(x_chunk.flatten(0, 1), h_before.flatten(0, 1), dz.flatten(0, 1), dgamma, dbeta)
        if dx is not None:
            dx[low:high] = (dz.flatten(0, 1) @ weight_ih).view_as(x_chunk)
    gradients = (dx, walk.dh if needs[1] else None, walk.dc if needs[2] else None, *sums.results(gate_gain))
    return tuple(None if g is None else g.to(x.dtype) for g in gradients)


@dataclass(frozen=True)
class _Cell:
    """The parameters as the walks want them, in the dtype of computation."""

    weight_ih: Tensor
    """[5, H, I], private order."""
    weight_hh: Tensor
    """[R, H, H], private order."""
    bias: Tensor
    """[5, 1, H], private order."""
    gamma: Tensor
    """[H] gain · γ."""
    beta: Tensor
    """[H] gain · β."""
    eps: float
    formula: bool

    @classmethod
    def prepare(cls, weight_ih, weight_hh, bias, ln_weight, ln_bias, eps, gate_gain, variant) -> _Cell:
        """Cast the parameters of `forward` and permute their blocks."""
        dtype = torch.float64 if weight_ih.dtype == torch.float64 else torch.float32

        def blocks(rows: Tensor) -> Tensor:
            public = rows.to(dtype).unflatten(0, (-1, ln_weight.shape[0]))
            return torch.stack([public[k] for k in _PRIVATE_ORDER[: len(public)]])

        return cls(
            weight_ih=blocks(weight_ih),
            weight_hh=blocks(weight_hh),
            bias=blocks(bias).unsqueeze(1),
            gamma=ln_weight.to(dtype) * gate_gain,
            beta=ln_bias.to(dtype) * gate_gain,
            eps=eps,
            formula=variant == "formula",
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        return self.gamma.dtype

    def project(self, x: Tensor, z: Tensor) -> None:
        """Write x W + b into z [5, n, B, H]; x is [n, B, I]."""
        rows = x.to(self.dtype).flatten(0, 1)
        torch.baddbmm(self.bias, rows.expand(5, -1, -1), self.weight_ih.mT, out=z.flatten(1, 2))

    def norm(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain · LayerNorm(a) over the units, the mean and 1/σ; a is [..., H]."""
        return torch.native_layer_norm(a, self.gamma.shape, self.gamma, self.beta, self.eps)


class _ForwardWalk:
    """Steps of the recurrence, chunk after chunk: holds the state and the buffers and views that a chunk uses."""

    def __init__(self, cell: _Cell, longest: int, h_0: Tensor, c_0: Tensor, reverse: bool) -> None:
        self.cell, self.reverse = cell, reverse
        self.h, self.c = h_0.to(cell.dtype), c_0.to(cell.dtype, copy=True)
        """[B, H] state between chunks."""
        recurrent = len(cell.weight_hh)
        self._weight_hh = _transpose_each(cell.weight_hh)
        self._projected = self.c.new_empty(5, longest, *self.c.shape)
        self._h_all = self.c.new_empty(longest + 1, *self.c.shape)
        h_before = _before(self._h_all, reverse)
        buffers = (
            *(self._projected[:recurrent].transpose(0, 1), self._projected[4]),
            *(h_before.unsqueeze(1).expand(-1, recurrent, -1, -1), h_before, _after(self._h_all, reverse)),
        )
        self._views = list(zip(*(buffer.unbind(0) for buffer in buffers), strict=True))

    def run(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Walk over a chunk, x [n, B, I], valid [n, B, 1]; return h after each step [n, B, H], in a buffer."""
        cell, n = self.cell, len(x)
        cell.project(x, self._projected[:, :n])
        if not cell.formula:
            self._projected[4, :n] = self._projected[4, :n].softmax(-1)
        first, last = (n, 0) if self.reverse else (0, n)
        self._h_all[first] = self.h
        valid_steps = None if valid is None else valid.unbind(0)
        z = self.c.new_empty(len(cell.weight_hh), *self.c.shape)
        sigmoids, (s, f, o, g), z_p = z[:3], z[:4], z[-1]
        c, c_next, tanh_c, softmax = self.c, *self.c.new_empty(3, *self.c.shape)
        for t in _order(n, self.reverse):
            projected, p, h_factor, h, h_next = self._views[t]
            torch.baddbmm(projected, h_factor, self._weight_hh, out=z)
            sigmoids.sigmoid_()
            g.tanh_()
            if cell.formula:
                torch.softmax(z_p, -1, out=softmax)
                i = cell.norm(s)[0].mul_(softmax)
            else:
                i = cell.norm(s.mul_(p))[0]
            torch.mul(f, c, out=c_next).addcmul_(i, g)
            torch.tanh(c_next, out=tanh_c)
            torch.mul(o, tanh_c, out=h_next)
            if valid_steps is not None:
                torch.where(valid_steps[t], c_next, c, out=c_next)
                torch.where(valid_steps[t], h_next, h, out=h_next)
            c, c_next = c_next, c
        self.h, self.c = self._h_all[last].clone(), c
        return _after(self._h_all[: n + 1], self.reverse)


class _BackwardWalk:
    """Steps of the recurrence's gradient, last chunk first: holds dh, dc and a chunk's buffers and views."""

    def __init__(self, cell: _Cell, weight_hh: Tensor, longest: int, dh_n: Tensor, dc_n: Tensor, reverse: bool) -> None:
        self.cell, self.reverse = cell, reverse
        self.dh, self.dc = dh_n.to(cell.dtype), dc_n.to(cell.dtype, copy=True)
        """[B, H] gradients of the state between chunks."""
        self._weight_hh = weight_hh.to(cell.dtype)
        batch, hidden = self.dc.shape

        def buffer(*shape: int) -> Tensor:
            return self.dc.new_empty(*shape, batch, hidden)

        self._gates, self._softmax, self._product = buffer(5, longest), buffer(longest), buffer(longest)
        self._c_all, self._tanh_c = buffer(longest + 1), buffer(longest)
        self._dh_all, self._dc_all = buffer(longest + 1), buffer(longest)
        # What takes dh to dz_o and to dc; dc to dz_f, dz_g, dn and dp; the gradient of the norm's input to dz_i.
        self._slopes = buffer(7, longest)
        self._dz = self.dc.new_empty(longest, batch, 5 * hidden)
        scan = (_after(self._c_all, reverse), self._gates[1], _before(self._c_all, reverse))
        self._scan = list(zip(*(buffer.unbind(0) for buffer in scan), strict=True))
        self._views = self._cut()

    def _cut(self) -> list[tuple[Tensor, ...]]:
        """Cut the buffers into what `run` uses at each step."""
        cell, hidden, slopes = self.cell, self.dc.shape[1], self._slopes
        dz = self._dz.unflatten(2, (5, hidden)).transpose(1, 2)
        buffers = (
            *(_after(self._dh_all, self.reverse), _before(self._dh_all, self.reverse)),
            *(self._dc_all, self._gates[1]),
            *(slopes[0], slopes[1], slopes[2:4].transpose(0, 1)),
            *(slopes[4:6].transpose(0, 1) if cell.formula else slopes[4], slopes[6]),
            *(self._gates[0] if cell.formula else self._product, self._softmax),
            *(self._dz[..., : len(cell.weight_hh) * hidden], dz[:, 0], dz[:, 1:3], dz[:, 3], dz[:, 4]),
        )
        return list(zip(*(buffer.unbind(0) for buffer in buffers), strict=True))

    def recompute(self, x: Tensor, h_before: Tensor, c_border: Tensor, frozen: Tensor | None) -> None:
        """Bring back the gates and c of a chunk, and make the slopes from them.

        Args:
            x: [n, B, I] input.
            h_before: [n, B, H] hidden state before each step.
            c_border: [B, H] cell state before the chunk.
            frozen: [n, B, 1] true where a row keeps its state, or None.
        """
        cell, n, recurrent = self.cell, len(x), len(self.cell.weight_hh)
        gates, slopes = self._gates[:, :n], self._slopes[:, :n]
        cell.project(x, gates)
        h_rows = h_before.flatten(0, 1).expand(recurrent, -1, -1)
        gates[:recurrent].flatten(1, 2).baddbmm_(h_rows, cell.weight_hh.mT)
        gates[:3].sigmoid_()
        gates[3].tanh_()
        s, f, o, g, z_p = gates
        p = torch.softmax(z_p, -1, out=self._softmax[:n])
        slope_o, slope_c, slope_f, slope_g, slope_n, slope_p, slope_i = slopes

        torch.sub(1, s, out=slope_i).mul_(s)
        if cell.formula:
            i, self._mean, self._rstd = cell.norm(s)
            torch.mul(g, p, out=slope_n)
            torch.mul(g, i, out=slope_p)
            i.mul_(p)
        else:
            i, self._mean, self._rstd = cell.norm(torch.mul(s, p, out=self._product[:n]))
            slope_n.copy_(g)
            slope_p.zero_()
            slope_i.mul_(p)
        if frozen is not None:
            i.masked_fill_(frozen, 0)
            f.masked_fill_(frozen, 1)
        c_before, c = _before(self._c_all[: n + 1], self.reverse), _after(self._c_all[: n + 1], self.reverse)
        self._c_all[n if self.reverse else 0] = c_border
        torch.mul(i, g, out=c)
        for t in _order(n, self.reverse):
            c_t, f_t, c_before_t = self._scan[t]
            c_t.addcmul_(f_t, c_before_t)
        tanh_c = torch.tanh(c, out=self._tanh_c[:n])
        _sigmoid_backward(tanh_c, o, grad_input=slope_o)
        _tanh_backward(o, tanh_c, grad_input=slope_c)
        _sigmoid_backward(c_before, f, grad_input=slope_f)
        _tanh_backward(i, g, grad_input=slope_g)
        if frozen is not None:
            slopes.masked_fill_(frozen, 0)

    def run(self, dy: Tensor, frozen: Tensor | None) -> Tensor:
        """Walk back over a chunk; dy is [n, B, H]. Return dz [n, B, 5H] in a buffer, for the notebook without dz_p."""
        cell, n, dc, units = self.cell, len(dy), self.dc, self.cell.gamma.shape
        first, last = (n, 0) if self.reverse else (0, n)
        dh_after = _after(self._dh_all[: n + 1], self.reverse)
        dh_after.copy_(dy)
        frozen_steps = None
        if frozen is not None:
            dh_after.masked_fill_(frozen, 0)
            frozen_steps = frozen.to(cell.dtype).unbind(0)
        self._dh_all[last] += self.dh
        self._dh_all[first] = 0

        mean, rstd = self._mean.unbind(0), self._rstd.unbind(0)
        into_norm = dc.new_empty(2, *dc.shape) if cell.formula else torch.empty_like(dc)
        dn, dp = into_norm if cell.formula else (into_norm, into_norm)
        dz_p_row = torch.empty_like(dc)
        for t in _order(n, not self.reverse):
            dh, dh_before, dc_t, f, slope_o, slope_c, slope_fg, slope_norm, slope_i, a, p, *dz = self._views[t]
            dz_recurrent, dz_i, dz_fg, dz_o, dz_p = dz
            torch.addcmul(dc, dh, slope_c, out=dc_t)
            torch.mul(dh, slope_o, out=dz_o)
            torch.mul(dc_t, slope_fg, out=dz_fg)
            torch.mul(dc_t, slope_norm, out=into_norm)
            da = _layer_norm_backward(dn, a, units, mean[t], rstd[t], cell.gamma, cell.beta, (True, False, False))[0]
            torch.mul(da, slope_i, out=dz_i)
            if cell.formula:
                # Written to a row of its own first: this operator takes the output for contiguous.
                dz_p.copy_(_softmax_backward(dp, p, -1, cell.dtype, grad_input=dz_p_row))
            torch.mul(dc_t, f, out=dc)
            dh_before.addmm_(dz_recurrent, self._weight_hh)
            if frozen_steps is not None:
                dh_before.addcmul_(dh, frozen_steps[t])
        self.dh = self._dh_all[first].clone()
        return self._dz[:n]

    def finish_norm(self, n: int, needs_gamma: bool, needs_beta: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return what the chunk that was just walked adds to dγ and dβ [H]; for the notebook also fill in its dz_p.

        Nothing here feeds the recurrence, so it takes the whole chunk at once.
        """
        cell = self.cell
        mask = (not cell.formula, needs_gamma, needs_beta)
        if not any(mask):
            return None, None
        s, p, dn = self._gates[0, :n], self._softmax[:n], self._dc_all[:n] * self._slopes[4, :n]
        a = s if cell.formula else self._product[:n]
        statistics = (self._mean, self._rstd)
        da, dgamma, dbeta = _layer_norm_backward(dn, a, cell.gamma.shape, *statistics, cell.gamma, cell.beta, mask)
        if not cell.formula:
            self._dz[:n, :, -cell.gamma.shape[0] :] = _softmax_backward(da.mul_(s), p, -1, cell.dtype)
        return dgamma, dbeta


class _ParameterSums:
    """Gradients of the parameters, summed over chunks in the order of the walk."""

    def __init__(self, cell: _Cell, needs: list[bool]) -> None:
        (gates, hidden, inputs), recurrent = cell.weight_ih.shape, len(cell.weight_hh)
        shapes = ((gates * hidden, inputs), (recurrent * hidden, hidden), (gates * hidden,), (hidden,), (hidden,))
        self._sums = [
            cell.gamma.new_zeros(shape) if needed else None for shape, needed in zip(shapes, needs[3:], strict=True)
        ]

    def add(self, x: Tensor, h_before: Tensor, dz: Tensor, dgamma: Tensor | None, dbeta: Tensor | None) -> None:
        """Add a chunk of m = n·B rows: x [m, I], h_before [m, H], dz [m, 5H], and its dγ, dβ [H] where needed."""
        weight_ih, weight_hh, bias, gamma, beta = self._sums
        if weight_ih is not None:
            weight_ih.addmm_(dz.t(), x)
        if weight_hh is not None:
            weight_hh.addmm_(dz[:, : len(weight_hh)].t(), h_before)
        if bias is not None:
            bias.add_(dz.sum(0))
        if gamma is not None and dgamma is not None:
            gamma.add_(dgamma)
        if beta is not None and dbeta is not None:
            beta.add_(dbeta)

    def results(self, gate_gain: float) -> list[Tensor | None]:
        """Return the gradients of weight_ih, weight_hh, bias, ln_weight, ln_bias."""
        *others, gamma, beta = self._sums
        return [*others, *(None if g is None else g * gate_gain for g in (gamma, beta))]


def _spans(steps: int, chunk: int, reverse: bool) -> list[tuple[int, int]]:
    """Return the first time and the time after the last of every chunk, in walking order."""
    if reverse:
        return [(max(0, high - chunk), high) for high in range(steps, 0, -chunk)]
    return [(low, min(low + chunk, steps)) for low in range(0, steps, chunk)]


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


def _valid(lengths: Tensor | None, steps: int) -> Tensor | None:
    """Return [T, B, 1], true where a row has a step, or None if all have all."""
    if lengths is None:
        return None
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(2)


def _h_before(low: int, high: int, y: Tensor, h_0: Tensor, valid: Tensor | None, reverse: bool) -> Tensor:
    """Return [n, B, H], the hidden state before each valid step of the times low to high, from y [T, B, H].

    In reverse a row with a length starts at its own last step: the y after it is padding, the state h_0.
    """
    if not reverse:
        return y[low - 1 : high - 1] if low else torch.cat((h_0.unsqueeze(0), y[: high - 1]))
    if high < len(y):
        h, is_start = y[low + 1 : high + 1], None if valid is None else ~valid[low + 1 : high + 1]
    else:
        h = torch.cat((y[low + 1 :], h_0.unsqueeze(0)))
        is_start = None if valid is None else ~torch.cat((valid[low + 1 :], torch.zeros_like(valid[:1])))
    return h if is_start is None else torch.where(is_start, h_0, h)
