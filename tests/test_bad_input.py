"""Wrong arguments of everything public: one clear error that names the argument, before anything runs or is written.

What nn.LSTM and nn.LSTMCell refuse, too, is in test_module_errors.py; requests to the commands are in their own files.
"""

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from novolstm_triton import (
    LSTM,
    LSTMCell,
    NovoLSTM,
    NovoLSTMCell,
    cells,
    convert_model,
    detach_state,
    plan,
    use_backend,
)
from novolstm_triton.app import bytemodel
from novolstm_triton.call import TENSORS, Call, Options
from novolstm_triton.engines import bptt, launch, recompute, reference
from novolstm_triton.functional import lstm, novolstm
from novolstm_triton.plans import tuned
from novolstm_triton.testing import cooperative

from .support.layers import B, H, I, T, both
from .support.problems import Problem

NAN = math.nan
HUGE = 10**400


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail whatever computes."""

    def run(*arguments, **options):
        raise AssertionError("a backend was called")

    monkeypatch.setattr(reference, "layer", run)
    for module in (bptt, recompute, launch):
        monkeypatch.setattr(module, "forward", run)


def zeros(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(sizes, dtype=dtype, device=device)


def unusual(kind: str, *sizes: int) -> Tensor:
    """Return a tensor of a kind that PyTorch warns of, because it is new or about to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "quantised":
            return torch.quantize_per_tensor(zeros(*sizes), 1.0, 0, torch.qint8)
        if kind == "csr":
            return zeros(*sizes).to_sparse_csr()
        return torch.nested.nested_tensor([zeros(*sizes), zeros(*sizes)])


def arguments(cell: str = "formula", **sizes: int) -> dict[str, Any]:
    problem = Problem(steps=T, batch=B, hidden=H, inputs_size=I, cell=cell, **sizes)
    inputs, _, _ = problem.draw()
    return {name: a.float() for name, a in zip(problem.input_names, inputs, strict=True)}


def assert_refused(call, error: type[Exception], words: str, *tensors: Any) -> None:
    """Require one error with these words, and that no tensor has been written to."""
    dense = [a for a in tensors if isinstance(a, Tensor) and a.layout == torch.strided and not a.is_nested]
    before = [(a._version, a if a.is_meta else a.clone()) for a in dense]
    with pytest.raises(error, match=re.escape(words)) as refused:
        call()
    # Nothing failed before, and nobody's own error is hidden behind this one.
    assert refused.value.__context__ is None
    assert type(refused.value) is error
    assert "\n" not in str(refused.value)
    for a, (version, values) in zip(dense, before, strict=True):
        assert a._version == version
        if not a.is_meta:
            assert torch.equal(a, values)


# An ordinary call of `novolstm` with these arguments changed.
FUNCTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-none": (dict(x=None), TypeError, "x: expected a Tensor, got NoneType"),
    "x-text": (dict(x="x"), TypeError, "x: expected a Tensor, got str"),
    "x-numpy": (dict(x=np.zeros((T, B, I))), TypeError, "x: expected a Tensor, got ndarray"),
    "x-rank-0": (dict(x=zeros()), ValueError, "x: expected [T, B, I], got shape []"),
    "x-rank-4": (dict(x=zeros(1, T, B, I)), ValueError, "x: expected [T, B, I], got shape [1, 5, 3, 4]"),
    "x-no-features": (dict(x=zeros(T, B, 0)), ValueError, "x: expected at least one step and one feature"),
    "x-no-steps": (dict(x=zeros(0, B, I)), ValueError, "one feature, got shape [0, 3, 4]"),
    "x-bool": (dict(x=zeros(T, B, I) > 0), TypeError, "x: expected a floating dtype of at least 16 bits"),
    "x-complex": (dict(x=zeros(T, B, I, dtype=torch.complex64)), TypeError, "16 bits, got torch.complex64"),
    "x-8-bits": (dict(x=zeros(T, B, I).to(torch.float8_e4m3fn)), TypeError, "16 bits, got torch.float8_e4m3fn"),
    "x-quantised": (
        dict(x=unusual("quantised", T, B, I)),
        TypeError,
        "x: expected a dense Tensor, got a quantised one",
    ),
    "x-sparse": (dict(x=zeros(T, B, I).to_sparse()), TypeError, "x: expected a dense Tensor, got a sparse_coo one"),
    "x-onednn": (dict(x=zeros(T, B, I).to_mkldnn()), TypeError, "x: expected a dense Tensor, got a mkldnn one"),
    "x-nested": (dict(x=unusual("nested", B, I)), TypeError, "x: expected a dense Tensor, got a nested one"),
    "x-elsewhere": (dict(x=zeros(T, B, I, device="meta")), ValueError, "h_0: expected the device of x, meta, got cpu"),
    "h_0-text": (dict(h_0="h"), TypeError, "h_0: expected a Tensor, got str"),
    "h_0-rank": (dict(h_0=zeros(1, B, H)), ValueError, "h_0: expected [B, H], got shape [1, 3, 6]"),
    "h_0-rows": (dict(h_0=zeros(B + 1, H)), ValueError, "h_0: expected shape [3, 6], got [4, 6]"),
    "h_0-units": (dict(h_0=zeros(B, H + 1)), ValueError, "h_0: expected shape [3, 6], got [3, 7]"),
    "h_0-elsewhere": (dict(h_0=zeros(B, H, device="meta")), ValueError, "h_0: expected the device of x, cpu, got meta"),
    "h_0-integer": (dict(h_0=zeros(B, H, dtype=torch.int32)), TypeError, "h_0: expected a floating dtype"),
    "h_0-sparse": (dict(h_0=unusual("csr", B, H)), TypeError, "h_0: expected a dense Tensor, got a sparse_csr"),
    "c_0-units": (dict(c_0=zeros(B, H + 1)), ValueError, "c_0: expected shape [3, 6], got [3, 7]"),
    "c_0-rank": (dict(c_0=zeros(H)), ValueError, "c_0: expected shape [3, 6], got [6]"),
    "c_0-pair": (dict(c_0=(zeros(B, H),)), TypeError, "c_0: expected a Tensor, got tuple"),
    "weight_ih-none": (dict(weight_ih=None), TypeError, "weight_ih: expected a Tensor, got NoneType"),
    "weight_ih-rank-1": (dict(weight_ih=zeros(5 * H)), ValueError, "weight_ih: expected [G·H, I] or [2, G·H, I], got"),
    "weight_ih-three": (dict(weight_ih=zeros(3, 5 * H, I)), ValueError, "[2, G·H, I], got shape [3, 30, 4]"),
    "weight_ih-one": (dict(weight_ih=zeros(1, 5 * H, I)), ValueError, "[2, G·H, I], got shape [1, 30, 4]"),
    "weight_ih-rows": (dict(weight_ih=zeros(4 * H, I)), ValueError, "weight_ih: expected shape [30, 4], got [24, 4]"),
    "weight_ih-columns": (dict(weight_ih=zeros(5 * H, I + 1)), ValueError, "weight_ih: expected shape [30, 4]"),
    "weight_hh-none": (dict(weight_hh=None), TypeError, "weight_hh: expected a Tensor, got NoneType"),
    "weight_hh-rank": (dict(weight_hh=zeros(2, 5 * H, H)), ValueError, "weight_hh: expected [R·H, H], got shape [2, "),
    "weight_hh-columns": (dict(weight_hh=zeros(5 * H, H + 1)), ValueError, "weight_hh: expected shape [35, 7], got"),
    "weight_hh-no-units": (dict(weight_hh=zeros(0, 0)), ValueError, "weight_hh: expected at least one unit, got shape"),
    "weight_hh-sparse": (dict(weight_hh=zeros(5 * H, H).to_sparse()), TypeError, "weight_hh: expected a dense Tensor"),
    "bias-flag": (dict(bias=False), TypeError, "bias: expected a Tensor, got bool"),
    "bias-integer": (dict(bias=zeros(5 * H, dtype=torch.int64)), TypeError, "bias: expected a floating dtype"),
    "ln_weight-none": (dict(ln_weight=None), TypeError, "ln_weight: expected a Tensor, got NoneType"),
    "ln_weight-all": (dict(ln_weight=zeros(4 * H)), ValueError, "ln_weight: expected shape [6], got [24]"),
    "ln_bias-rank": (dict(ln_bias=zeros(1, H)), ValueError, "ln_bias: expected shape [6], got [1, 6]"),
    "weight_hr-text": (dict(weight_hr="2"), TypeError, "weight_hr: expected a Tensor, got str"),
    "weight_hr-rank-0": (dict(weight_hr=zeros()), ValueError, "weight_hr: expected [P, H], got shape []"),
    "weight_hr-rows": (dict(weight_hr=zeros(2, H)), ValueError, "weight_hr: expected shape [6, 6], got [2, 6]"),
    "weight_hr-no-units": (
        dict(weight_hr=zeros(2, 0), weight_hh=zeros(0, 2), h_0=None, c_0=None),
        ValueError,
        "weight_hr: expected at least one unit, got shape [2, 0]",
    ),
    "eps-zero": (dict(eps=0), ValueError, "eps: expected a positive finite number, got 0"),
    "eps-negative": (dict(eps=-1e-5), ValueError, "eps: expected a positive finite number, got -1e-05"),
    "eps-nan": (dict(eps=NAN), ValueError, "eps: expected a positive finite number, got nan"),
    "eps-infinite": (dict(eps=math.inf), ValueError, "eps: expected a positive finite number, got inf"),
    "eps-text": (dict(eps="1e-5"), TypeError, "eps: expected a positive finite number, got '1e-5'"),
    "eps-bool": (dict(eps=True), TypeError, "eps: expected a positive finite number, got True"),
    "eps-tensor": (dict(eps=zeros(2)), TypeError, "eps: expected a positive finite number, got tensor"),
    "gate_gain-nan": (dict(gate_gain=NAN), ValueError, "gate_gain: expected a finite number, got nan"),
    "gate_gain-infinite": (dict(gate_gain=-math.inf), ValueError, "gate_gain: expected a finite number, got -inf"),
    "gate_gain-huge": (dict(gate_gain=HUGE), ValueError, "gate_gain: expected a finite number, got 1000"),
    "gate_gain-none": (dict(gate_gain=None), TypeError, "gate_gain: expected a finite number, got None"),
    "gate_gain-complex": (dict(gate_gain=1j), TypeError, "gate_gain: expected a finite number, got 1j"),
    "variant-none": (dict(variant=None), ValueError, "variant: expected one of ['formula', 'notebook'], got None"),
    "variant-list": (dict(variant=["formula"]), ValueError, "variant: expected one of"),
    "layer_norm": (
        dict(layer_norm="none"),
        ValueError,
        "layer_norm: expected one of ['all', 'input_gate'], got 'none'",
    ),
    "lengths-bool": (dict(lengths=zeros(B) > 0), TypeError, "lengths: expected an integer Tensor, got torch.bool"),
    "lengths-complex": (dict(lengths=zeros(B, dtype=torch.complex64)), TypeError, "Tensor, got torch.complex64"),
    "lengths-quantised": (dict(lengths=unusual("quantised", B)), TypeError, "lengths: expected a dense Tensor"),
    "lengths-numpy": (dict(lengths=np.ones(B)), TypeError, "lengths: expected an integer Tensor, got ndarray"),
    "lengths-number": (dict(lengths=T), TypeError, "lengths: expected an integer Tensor, got int"),
    "lengths-rank": (dict(lengths=torch.ones(B, 1).long()), ValueError, "lengths: expected shape [3], got [3, 1]"),
    "lengths-sparse": (dict(lengths=torch.ones(B).long().to_sparse()), TypeError, "lengths: expected a dense Tensor"),
    "lengths-elsewhere": (
        dict(lengths=zeros(B, dtype=torch.int64, device="meta")),
        ValueError,
        "lengths: expected a Tensor with values, got one on meta",
    ),
    "lengths-beyond-32-bits": (
        dict(lengths=torch.tensor([1, 2**32 + 1, 1])),
        ValueError,
        "lengths: expected values from 0 to 5, got 1 to 4294967297",
    ),
    "lengths-unsigned": (
        dict(lengths=torch.tensor([1, 9, 1], dtype=torch.uint16)),
        ValueError,
        "lengths: expected values from 0 to 5, got 1 to 9",
    ),
    "reverse-none": (dict(reverse=None), TypeError, "reverse: expected a bool, got None"),
    "reverse-number": (dict(reverse=1), TypeError, "reverse: expected a bool, got 1"),
    "reverse-tensor": (dict(reverse=zeros(2)), TypeError, "reverse: expected a bool, got tensor([0., 0.])"),
    "h_mask-rank": (dict(h_mask=zeros(H)), ValueError, "h_mask: expected shape [3, 6] on cpu, got [6] on cpu"),
    "h_mask-dtype": (dict(h_mask=zeros(B, H).double()), TypeError, "h_mask: expected a Tensor of torch.float32, got"),
    "h_mask-list": (dict(h_mask=[1.0]), TypeError, "h_mask: expected a Tensor of the dtype of x, got list"),
    "h_mask-elsewhere": (dict(h_mask=zeros(B, H, device="meta")), ValueError, "on cpu, got [3, 6] on meta"),
    "h_mask-sparse": (dict(h_mask=zeros(B, H).to_sparse()), TypeError, "h_mask: expected a dense Tensor"),
    "zoneout-number": (dict(zoneout=0.5), TypeError, "zoneout: expected a pair of numbers"),
    "zoneout-none": (dict(zoneout=None), TypeError, "zoneout: expected a pair of numbers"),
    "zoneout-text": (dict(zoneout="ab"), TypeError, "zoneout: expected a pair of numbers"),
    "zoneout-three": (dict(zoneout=(0.1, 0.1, 0.1)), TypeError, "zoneout: expected a pair of numbers"),
    "zoneout-tensors": (dict(zoneout=(zeros(2), 0.0)), TypeError, "zoneout: expected a pair of numbers"),
    "zoneout-nan": (
        dict(zoneout=(NAN, 0)),
        ValueError,
        "zoneout: expected shares of h and c from 0 to 1, got nan of h",
    ),
    "zoneout-negative": (dict(zoneout=(0, -0.1)), ValueError, "from 0 to 1, got -0.1 of c"),
    "zoneout_mask-bool": (
        dict(zoneout_mask=zeros(T, B, H) > 0),
        TypeError,
        "zoneout_mask: expected a Tensor of torch.",
    ),
    "zoneout_mask-shape": (
        dict(zoneout_mask=zeros(B, H, dtype=torch.uint8)),
        ValueError,
        "zoneout_mask: expected shape [5, 3, 6] on cpu, got [3, 6] on cpu",
    ),
    "zoneout_mask-list": (
        dict(zoneout_mask=[1]),
        TypeError,
        "zoneout_mask: expected a Tensor of torch.uint8, got list",
    ),
}


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("changes", "error", "words"), FUNCTION.values(), ids=list(FUNCTION))
def test_novolstm(changes, error, words, backend):
    given = arguments() | changes
    assert_refused(lambda: novolstm(**given, backend=backend), error, words, *given.values())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (changes, _, words) in FUNCTION.items()
        if changes.keys() <= set(TENSORS[:-1]) | {"lengths", "reverse", "zoneout"}
        # The plain LSTM has other numbers of rows.
        and not re.search(r"\[\d{2}, ", words)
    ],
)
def test_lstm_has_the_same_errors(name):
    changes, error, words = FUNCTION[name]
    given = dict(list(arguments("lstm").items())[:6]) | changes
    assert_refused(lambda: lstm(**given), error, words, *given.values())


def test_weights_of_the_other_cell():
    given = list(arguments().values())[:6]
    assert_refused(lambda: lstm(*given), ValueError, "weight_hh: expected shape [24, 6], got [30, 6]", *given)
    given = [*arguments("lstm").values(), torch.ones(H), torch.zeros(H)]
    assert_refused(lambda: novolstm(*given), ValueError, "weight_hh: expected shape [30, 6], got [24, 6]", *given)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param(dict(h_0=zeros(B, H)), ValueError, "h_0: expected [2, B, H], got shape [3, 6]", id="h_0"),
        pytest.param(dict(c_0=zeros(1, B, H)), ValueError, "c_0: expected shape [2, 3, 6], got [1, 3, 6]", id="c_0"),
        pytest.param(dict(weight_hh=zeros(5 * H, H)), ValueError, "weight_hh: expected [2, R·H, H]", id="weight_hh"),
        pytest.param(dict(bias=zeros(5 * H)), ValueError, "bias: expected shape [2, 30], got [30]", id="bias"),
        pytest.param(dict(weight_hr=zeros(2, H)), ValueError, "weight_hr: expected [2, P, H], got shape", id="hr"),
        pytest.param(dict(reverse=True), ValueError, "reverse: both directions are given, so it must be", id="reverse"),
        pytest.param(dict(h_mask=zeros(B, H)), ValueError, "h_mask: expected shape [2, 3, 6] on cpu", id="h_mask"),
        pytest.param(
            dict(zoneout_mask=zeros(T, B, H, dtype=torch.uint8)),
            ValueError,
            "zoneout_mask: expected shape [5, 3, 12] on cpu",
            id="zoneout_mask",
        ),
    ],
)
def test_both_directions(changes, error, words):
    given = arguments(bidirectional=True) | changes
    assert_refused(lambda: novolstm(**given), error, words, *given.values())


@pytest.mark.parametrize("name", ["h_mask-list", "x-complex", "bias-integer", "weight_hh-sparse"])
def test_autocast_does_not_hide_them(name):
    changes, error, words = FUNCTION[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert_refused(lambda: novolstm(**(arguments() | changes)), error, words)


def test_projection_has_no_regularisers():
    given = arguments(projection=2)
    words = "weight_hr: a projected layer has no recurrent dropout and no zoneout"
    assert_refused(lambda: novolstm(**given, zoneout=(0.1, 0.0)), ValueError, words, *given.values())


@pytest.mark.parametrize("backend", ["cuda", None, ["torch"], 1], ids=repr)
def test_backend(backend):
    words = f"expected one of ['auto', 'reference', 'torch', 'triton'], got {backend!r}"
    assert_refused(lambda: novolstm(**arguments(), backend=backend), ValueError, f"backend: {words}")
    assert_refused(lambda: use_backend(backend).__enter__(), ValueError, f"use_backend: {words}")
    assert_refused(lambda: NovoLSTMCell(I, H, backend=backend), ValueError, f"backend: {words}")


X = zeros(T, B, I)
STATE = zeros(1, B, H)

LAYERS: dict[str, tuple] = {
    "recurrent_dropout-nan": (lambda c: c(I, H, recurrent_dropout=NAN), ValueError, "in range [0, 1), got nan"),
    "recurrent_dropout-text": (lambda c: c(I, H, recurrent_dropout="a"), ValueError, "in range [0, 1), got 'a'"),
    "recurrent_dropout-bool": (lambda c: c(I, H, recurrent_dropout=True), ValueError, "in range [0, 1), got True"),
    "zoneout_h-nan": (lambda c: c(I, H, zoneout_h=NAN), ValueError, "zoneout_h: expected a number in range [0, 1]"),
    "zoneout_c-none": (lambda c: c(I, H, zoneout_c=None), ValueError, "zoneout_c: expected a number in range [0, 1]"),
    "proj_size-text": (lambda c: c(I, H, proj_size="2"), TypeError, "proj_size should be of type int, got: str"),
    "proj_size-float": (lambda c: c(I, H, proj_size=2.0), TypeError, "proj_size should be of type int, got: float"),
    "proj_size-bool": (lambda c: c(I, H, proj_size=True), TypeError, "proj_size should be of type int, got: bool"),
    "unknown-option": (lambda c: c(I, H, nonlinearity="tanh"), TypeError, "nonlinearity"),
    "input-sparse": (lambda c: c(I, H)(X.to_sparse()), TypeError, "input: expected a dense Tensor, got a sparse_coo"),
    "input-nested": (
        lambda c: c(I, H)(unusual("nested", B, I)),
        TypeError,
        "input: expected a dense Tensor, got a nested one",
    ),
    "input-quantised": (
        lambda c: c(I, H)(unusual("quantised", T, B, I)),
        TypeError,
        "input: expected a dense Tensor, got a quantised one",
    ),
    "state-sparse": (
        lambda c: c(I, H)(X, (STATE, STATE.to_sparse())),
        TypeError,
        "hx[1]: expected a dense Tensor, got a sparse_coo one",
    ),
    "state-text": (lambda c: c(I, H)(X, "hc"), TypeError, "hx to be a tuple (h_0, c_0), got str"),
    "state-numpy": (lambda c: c(I, H)(X, (np.zeros(1),) * 2), TypeError, "got tuple of ndarray, ndarray"),
    "lengths-text": (lambda c: c(I, H)(X, lengths="ab"), TypeError, "lengths: expected an integer Tensor, got str"),
    "lengths-negative": (lambda c: c(I, H)(X, lengths=-torch.ones(B).int()), ValueError, "to 5, got -1 to -1"),
    "step-none": (lambda c: c(I, H).step(None), TypeError, "step: expected input to be a Tensor, got NoneType"),
    "step-numpy": (lambda c: c(I, H).step(np.zeros(I)), TypeError, "step: expected input to be a Tensor, got ndarray"),
    "step-sparse": (lambda c: c(I, H).step(X[0].to_sparse()), TypeError, "input: expected a dense Tensor"),
    "step-rank": (lambda c: c(I, H).step(X), ValueError, "step: expected input [B, I] or [I], got [5, 3, 4]"),
    "step-bidirectional": (
        lambda c: c(I, H, bidirectional=True).step(X[0]),
        ValueError,
        "step: a bidirectional layer needs the whole sequence",
    ),
    "step-features": (lambda c: c(I, H).step(zeros(B, I + 1)), RuntimeError, "input_size. Expected 4, got 5"),
    "step-state": (lambda c: c(I, H).step(X[0], STATE), TypeError, "(h_0, c_0), got a Tensor [1, 3, 6]"),
    "step-elsewhere": (lambda c: c(I, H).step(zeros(B, I, device="meta")), RuntimeError, "input tensor at meta"),
}


@pytest.mark.parametrize(("attempt", "error", "words"), LAYERS.values(), ids=list(LAYERS))
@both
def test_layers(kind, attempt, error, words):
    assert_refused(lambda: attempt(kind), error, words, X, STATE)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ln_eps-zero": (dict(ln_eps=0.0), ValueError, "ln_eps: expected a positive finite number, got 0.0"),
    "ln_eps-negative": (dict(ln_eps=-1), ValueError, "ln_eps: expected a positive finite number, got -1"),
    "ln_eps-nan": (dict(ln_eps=NAN), ValueError, "ln_eps: expected a positive finite number, got nan"),
    "ln_eps-text": (dict(ln_eps="1"), TypeError, "ln_eps: expected a positive finite number, got '1'"),
    "gate_gain-nan": (dict(gate_gain=NAN), ValueError, 'gate_gain: expected a finite number or "hidden", got nan'),
    "gate_gain-huge": (dict(gate_gain=HUGE), ValueError, 'gate_gain: expected a finite number or "hidden", got 1000'),
    "gate_gain-none": (dict(gate_gain=None), TypeError, 'gate_gain: expected a finite number or "hidden", got None'),
    "gate_gain-numpy": (dict(gate_gain=np.ones(2)), TypeError, "gate_gain: expected a finite number or"),
    "variant-none": (dict(variant=None), ValueError, "variant: expected one of ['formula', 'notebook'], got None"),
    "layer_norm-list": (dict(layer_norm=[]), ValueError, "layer_norm: expected one of ['all', 'input_gate'], got []"),
}


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", [NovoLSTM, NovoLSTMCell])
def test_options_of_novolstm(kind, options, error, words):
    assert_refused(lambda: kind(I, H, **options), error, words)


# nn.LSTMCell takes sizes of zero and sparse tensors; it leaves wrong dtypes to the product of matrices.
CELLS: dict[str, tuple] = {
    "input_size-zero": (lambda c: c(0, H), ValueError, "input_size must be greater than zero"),
    "hidden_size-zero": (lambda c: c(I, 0), ValueError, "hidden_size must be greater than zero"),
    "hidden_size-text": (lambda c: c(I, "6"), TypeError, "hidden_size should be of type int, got: str"),
    "bias-number": (lambda c: c(I, H, bias=1), TypeError, "bias should be of type bool, got: int"),
    "input-sparse": (lambda c: c(I, H)(X[0].to_sparse()), TypeError, "input: expected a dense Tensor"),
    "input-rank": (lambda c: c(I, H)(X), ValueError, "Cell: Expected input to be 1D or 2D, got 3D instead"),
    "input-dtype": (lambda c: c(I, H)(X[0].long()), RuntimeError, "Long and Float: the dtypes of the input and of the"),
    "input-complex": (
        lambda c: c(I, H, dtype=torch.complex64)(zeros(B, I, dtype=torch.complex64)),
        TypeError,
        "x: expected a floating dtype of at least 16 bits, got torch.complex64",
    ),
    "input-elsewhere": (lambda c: c(I, H)(X[0].to("meta")), RuntimeError, "found input tensor at meta"),
    "state-one": (lambda c: c(I, H)(X[0], STATE[0]), TypeError, "(h_0, c_0), got a Tensor [3, 6]"),
    "state-none": (lambda c: c(I, H)(X[0], (None, None)), TypeError, "got tuple of NoneType, NoneType"),
    "state-sparse": (
        lambda c: c(I, H)(X[0], (STATE[0].to_sparse(), STATE[0])),
        TypeError,
        "hx[0]: expected a dense Tensor",
    ),
    "state-units": (
        lambda c: c(I, H)(X[0], (STATE[0], zeros(B, H + 1))),
        RuntimeError,
        "hidden1 has inconsistent hidden_size: got 7, expected 6",
    ),
}


@pytest.mark.parametrize(("attempt", "error", "words"), CELLS.values(), ids=list(CELLS))
@pytest.mark.parametrize("kind", [NovoLSTMCell, LSTMCell])
def test_cells(kind, attempt, error, words):
    assert_refused(lambda: attempt(kind), error, words, X, STATE)


# Arguments of `plan.plan` in place of ordinary ones.
PLAN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden-zero": (dict(hidden=0), ValueError, "hidden: expected at least 1, got 0"),
    "hidden-float": (dict(hidden=64.0), TypeError, "hidden: expected an int, got 64.0"),
    "hidden-bool": (dict(hidden=True), TypeError, "hidden: expected an int, got True"),
    "hidden-huge": (dict(hidden=HUGE), ValueError, "hidden: expected at most 2147483647, got 1000"),
    "batch-zero": (dict(batch=0), ValueError, "batch: expected at least 1, got 0"),
    "batch-text": (dict(batch="16"), TypeError, "batch: expected an int, got '16'"),
    "batch-huge": (dict(batch=2**31), ValueError, "batch: expected at most 2147483647, got 2147483648"),
    "dtype-integer": (
        dict(dtype=torch.int64),
        TypeError,
        "dtype: expected float32, float16 or bfloat16, got torch.int",
    ),
    "dtype-double": (
        dict(dtype=torch.float64),
        TypeError,
        "dtype: expected float32, float16 or bfloat16, got torch.fl",
    ),
    "dtype-text": (dict(dtype="bf16"), TypeError, "dtype: expected float32, float16 or bfloat16, got 'bf16'"),
    "device-text": (dict(device="h100"), TypeError, "device: expected a plan.Device, got str"),
    "device-torch": (dict(device=torch.device("cpu")), TypeError, "device: expected a plan.Device, got device"),
    "cell": (dict(cell="no_cell"), ValueError, "cell: expected one of ['"),
    "cell-list": (dict(cell=["lstm"]), ValueError, "cell: expected one of"),
    "cell-without-kernels": (
        dict(cell="gru_reset_before", pins=plan.Pins(slices=65)),
        ValueError,
        "backend 'triton' does not run the cell 'gru_reset_before' (its second product",
    ),
    "directions-three": (dict(directions=3), ValueError, "directions: expected 1 or 2, got 3"),
    "pins-dict": (dict(pins={}), TypeError, "pins: expected a plan.Pins, got dict"),
}


@pytest.mark.parametrize("function", ["plan", "candidates"])
@pytest.mark.parametrize(("changes", "error", "words"), PLAN.values(), ids=list(PLAN))
def test_plan(function, changes, error, words):
    given = dict(hidden=64, batch=16, dtype=torch.bfloat16, device=plan.H100, pins=plan.Pins()) | changes
    backward = dict(backward=False) if function == "candidates" else {}
    assert_refused(lambda: getattr(plan, function)(**given, **backward), error, words)


def test_plans_to_look_up():
    plans: Any = []
    words = "plans: expected a tuned.TunedPlans, got list"
    assert_refused(lambda: plan.plan(64, 16, torch.bfloat16, plan.H100, plans=plans), TypeError, words)
    assert_refused(lambda: tuned.put_in_force(plans), TypeError, "plans: expected a TunedPlans or None, got list")


PINS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "slices-text": (dict(slices="4"), TypeError, "slices: expected an int, got '4'"),
    "slices-bool": (dict(slices=True), TypeError, "slices: expected an int, got True"),
    "block_b-float": (dict(block_b=16.0), TypeError, "block_b: expected an int, got 16.0"),
    "ctas-float": (dict(ctas=2.0), TypeError, "ctas: expected an int, got 2.0"),
    "exchanges-bool": (dict(exchanges=True), TypeError, "exchanges: expected an int, got True"),
    "num_warps-text": (dict(num_warps="4"), TypeError, "num_warps: expected an int, got '4'"),
    "resident-number": (dict(resident=1), TypeError, "resident: expected a bool, got 1"),
    "overlap-text": (dict(overlap="no"), TypeError, "overlap: expected a bool, got 'no'"),
    "exchange-list": (dict(exchange=["none"]), ValueError, "exchange: expected one of"),
    "chunk-float": (dict(chunk=1.5), TypeError, "chunk: expected an int, got 1.5"),
    "chunk-huge": (dict(chunk=2**31), ValueError, "chunk: expected at most 2147483647, got 2147483648"),
    "split_k-number": (dict(split_k=1), TypeError, "split_k: expected a bool, got 1"),
    "max_spins-zero": (dict(max_spins=0), ValueError, "max_spins: expected at least 1, got 0"),
    "device-text": (dict(device="h100"), TypeError, "device: expected a plan.Device, got str"),
}


@pytest.mark.parametrize(("pins", "error", "words"), PINS.values(), ids=list(PINS))
def test_pins(pins, error, words):
    assert_refused(lambda: plan.Pins(**pins), error, words)
    before = plan.pinned()
    assert_refused(lambda: plan.forced(**pins).__enter__(), error, words)
    assert plan.pinned() is before


@pytest.mark.parametrize(
    ("properties", "error", "words"),
    [
        pytest.param(("cuda", 90, 0, 1), ValueError, "multiprocessors: expected at least 1, got 0", id="none"),
        pytest.param(("cuda", 90, 1, 1.5), TypeError, "smem_bytes: expected an int, got 1.5", id="smem"),
        pytest.param(("cuda", 90, 1, 1, 0), ValueError, "warp_size: expected at least 1, got 0", id="warp"),
        pytest.param(("tpu", 90, 1, 1), ValueError, "backend: expected cuda, hip or interpreter, got 'tpu'", id="tpu"),
    ],
)
def test_devices(properties, error, words):
    assert_refused(lambda: plan.Device("some device", *properties), error, words)


OTHERS: dict[str, tuple] = {
    "detach_state-text": (lambda: detach_state("h"), TypeError, "detach_state: expected tensors in tuples or lists"),
    "detach_state-dict": (lambda: detach_state({"h": STATE}), TypeError, "tuples or lists, got dict"),
    "detach_state-number": (lambda: detach_state((STATE, 3)), TypeError, "tuples or lists, got int"),
    "convert_model-none": (lambda: convert_model(None), TypeError, "model: expected an nn.Module, got NoneType"),
    "convert_model-class": (lambda: convert_model(nn.LSTM), TypeError, "model: expected an nn.Module, got type"),
    "convert_model-to": (lambda: convert_model(nn.Linear(1, 1), ["lstm"]), ValueError, "to: expected one of ['lstm', "),
    "convert_model-flag": (lambda: convert_model(nn.Linear(1, 1), inplace=1), TypeError, "inplace: expected a bool"),
    "from_torch-none": (lambda: LSTM.from_torch(None), TypeError, "lstm: expected an nn.LSTM, got NoneType"),
    "from_torch-gru": (lambda: LSTM.from_torch(nn.GRU(1, 1)), TypeError, "lstm: expected an nn.LSTM, got GRU"),
    "from_torch-zoneout": (lambda: LSTM.from_torch(nn.LSTM(1, 1), zoneout_h=2), ValueError, "zoneout_h: expected a"),
    "from_lstm-text": (lambda: NovoLSTM.from_lstm("x"), TypeError, "lstm: expected an nn.LSTM or LSTM, got str"),
    "from_lstm-gain": (lambda: NovoLSTM.from_lstm(nn.LSTM(1, 1), gate_gain=NAN), ValueError, "gate_gain: expected a"),
    "from_keras-none": (lambda: LSTM.from_keras(None), TypeError, "weights: expected a list or dict of arrays or a"),
    "from_keras-bytes": (lambda: LSTM.from_keras(b"model.keras"), TypeError, "arrays or a path, got bytes"),
    "from_keras-objects": (lambda: LSTM.from_keras([object(), object()]), TypeError, "kernel in float16, float32 or"),
    "from_keras-complex": (lambda: LSTM.from_keras([np.zeros((1, 4), complex)] * 2), TypeError, "got complex128"),
    "load-none": (lambda: tuned.load(None), TypeError, "path: expected a str or os.PathLike, got NoneType"),
    "load-bytes": (lambda: tuned.load(b"plans.json"), TypeError, "path: expected a str or os.PathLike, got bytes"),
    "load-nul": (lambda: tuned.load("a\0b"), ValueError, "path: expected the name of a file, got 'a\\x00b'"),
    "cooperative-policy": (lambda: cooperative(policy="x").__enter__(), ValueError, "policy: expected one of ['round-"),
    "cooperative-seed": (lambda: cooperative(1.5).__enter__(), TypeError, "seed: expected an int or None, got 1.5"),
    "cooperative-names": (
        lambda: cooperative(self_validating="h_ring").__enter__(),
        TypeError,
        "self_validating: expected names or tensors in a list, got str",
    ),
    "ByteModel-cell": (lambda: bytemodel.ByteModel("gru", 4, 1), ValueError, "cell: expected one of ['novolstm', 'l"),
    "ByteModel-hidden": (
        lambda: bytemodel.ByteModel("lstm", "4", 1),
        TypeError,
        "hidden should be of type int, got: s",
    ),
    "ByteModel-layers": (lambda: bytemodel.ByteModel("lstm", 4, 0), ValueError, "layers must be greater than zero"),
    "ByteModel-option": (
        lambda: bytemodel.ByteModel("lstm", 4, 1, variant="formula"),
        TypeError,
        "options: expected none for nn.LSTM, got ['variant']",
    ),
    "load_model-none": (lambda: bytemodel.load_model(None), TypeError, "path: expected a str or os.PathLike, got None"),
    "save_model-linear": (lambda: bytemodel.save_model(nn.Linear(1, 1), "m"), TypeError, "model: expected a ByteModel"),
}


@pytest.mark.parametrize(("call", "error", "words"), OTHERS.values(), ids=list(OTHERS))
def test_others(call, error, words):
    assert_refused(call, error, words, STATE)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param(dict(prompt=[]), ValueError, "prompt: expected at least one byte, got none", id="no-prompt"),
        pytest.param(dict(prompt=[256]), ValueError, "prompt: expected at most 255, got 256", id="no-byte"),
        pytest.param(dict(prompt="text"), TypeError, "prompt: expected an int, got 't'", id="text"),
        pytest.param(dict(length=-1), ValueError, "length: expected at least 0, got -1", id="length"),
        pytest.param(dict(temperature=0.0), ValueError, "temperature: expected a positive finite number", id="zero"),
        pytest.param(dict(temperature=NAN), ValueError, "temperature: expected a positive finite number", id="nan"),
    ],
)
def test_sample(changes, error, words):
    given = dict(prompt=[1], length=2, temperature=0.7, seed=0) | changes
    model = bytemodel.ByteModel("novolstm", 4, 1)
    assert_refused(lambda: bytemodel.sample(model, **given), error, words)


# --- sizes that the kernels cannot address ---

# On the interpreter, which has one program at a time, and on a GPU that has many.
MANY = plan.Device("roomy", "cuda", 90, multiprocessors=64, smem_bytes=2**40)


# Sizes (T, B, H), cell, directions, pins, masks of zoneout; the largest that fits, then what is too much and why.
OFFSETS: dict[str, tuple] = {
    "weight": ((1, 1, 46340), (1, 1, 46341), {}, "H·H, a recurrent weight"),
    "rows": ((1, 2**31 - 65, 1), (1, 2**31 - 1, 1), {}, "D·B, the rows"),
    "rows-of-both-directions": ((1, 2**30 - 65, 1), (1, 2**30, 1), dict(directions=2), "D·B, the rows"),
    "steps": ((2**31 - 9, 1, 1), (2**31 - 8, 1, 1), {}, "D·T, the steps"),
    "masks": ((1, 2**26 - 1, 32), (1, 2**26, 32), dict(zoneout_masks=True), "D·B·H, a step's masks of zoneout"),
    "tile": ((1, 1, 409), (1, 1, 410), dict(cell="formula", block_b=2**20), "block_b·G·H, the gates of a batch tile"),
    "statistics": (
        (2**11, 2**30 - 2**19, 1),
        (2**11, 2**30, 1),
        dict(chunk=2**11),
        "programs for the statistics of a chunk",
    ),
    "row-sums": (
        (1, (2**31 - 1) // 160, 64),
        (1, (2**31 - 1) // 160 + 1, 64),
        dict(cell="formula_all", slices=8, device=MANY),
        "row sums of two steps in forward",
    ),
    "arrivals": (
        (2**28, 1, 64),
        (2**28, 1, 64),
        dict(slices=8, device=MANY, chunk=2**27),
        "arrivals in a chunk in forward",
    ),
}


def address(sizes: tuple[int, int, int], cell="lstm", directions=1, zoneout_masks=False, chunk=16, **pins) -> None:
    """Check that the kernels can address a layer of these sizes, on tensors without memory."""
    steps, batch, hidden = sizes
    x = zeros(steps, batch, 1, device="meta")
    with plan.forced(**pins):
        plans = launch.launch_plan(x, hidden, cell, directions)
        chunk = min(chunk, steps)
        launch.check_offsets(plans, hidden, batch, steps, chunk, cell, directions, zoneout_masks)


@pytest.mark.parametrize(("fits", "too_large", "options", "words"), OFFSETS.values(), ids=list(OFFSETS))
def test_sizes_that_kernels_cannot_address(fits, too_large, options, words):
    address(fits, **(options | (dict(chunk=2**27 - 1) if fits == too_large else {})))
    with pytest.raises(ValueError, match=re.escape(f"backend 'triton': expected {words}")) as refused:
        address(too_large, **options)
    assert "at most 2^31 - 1, got 21" in str(refused.value)


def test_call_with_such_sizes_ends_before_anything_is_allocated(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(launch, "_launch", None)
    hidden = 46341
    sizes = ((1, 1, 1), (1, hidden), (1, hidden), (4 * hidden, 1), (4 * hidden, hidden), (4 * hidden,))
    x, h_0, c_0, weight_ih, weight_hh, bias = (zeros(*size, device="meta") for size in sizes)
    call = Call(cells.CELLS["lstm"], x, h_0, c_0, weight_ih, weight_hh, bias, zeros(0, device="meta"), Options(eps=0.0))
    monkeypatch.setattr(torch, "empty", lambda *size, **_: pytest.fail(f"{size} are allocated"))
    with pytest.raises(ValueError, match="H·H, a recurrent weight"):
        launch.forward(call, 1)


def test_more_batch_tiles_than_a_grid_takes_run_in_successive_launches():
    """CUDA allows 65535 along a grid's second axis."""
    kernel_plan = plan.plan(32, 2**23, torch.bfloat16, plan.H100).forward
    grids = [grid for _, grid in launch._launches(kernel_plan)]
    assert len(grids) > 1
    assert max(max(grid) for grid in grids) <= 65535
    assert sum(rows for _, rows in grids) == kernel_plan.tiles
