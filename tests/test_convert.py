"""From PyTorch's layers to this library's and back, alone and in models."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import novolstm_triton
from novolstm_triton import GRU, LSTM, RNN, LSTMCell, NovoLSTM, RecurrentLayer, TorchLSTM, cells, convert_model
from novolstm_triton.app.bytemodel import ByteModel

from .support.hugging_face import transformers
from .support.twins import NO_ONEDNN

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)

T, B, I, H = 5, 3, 4, 6

SIZES = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(num_layers=2, bidirectional=True, dropout=0.5), id="stacked-bidirectional"),
    pytest.param(dict(bias=False, batch_first=True), id="no-bias-B-first"),
    pytest.param(dict(proj_size=2, num_layers=2), id="projected"),
    pytest.param(dict(dtype=torch.float64), id="fp64"),
]
WITHOUT_PROJECTION = [case for case in SIZES if case.id != "projected"]
PAIRS = [pytest.param(nn.LSTM, LSTM, *case.values, id=f"lstm-{case.id}") for case in SIZES]
PAIRS += [pytest.param(nn.GRU, GRU, *case.values, id=f"gru-{case.id}") for case in WITHOUT_PROJECTION]
PAIRS += [pytest.param(nn.RNN, RNN, *case.values, id=f"rnn-{case.id}") for case in WITHOUT_PROJECTION]
PAIRS += [pytest.param(nn.RNN, RNN, dict(nonlinearity="relu", num_layers=2), id="rnn-relu")]
TWINS = [
    pytest.param(nn.LSTM, LSTM, id="lstm"),
    pytest.param(nn.GRU, GRU, id="gru"),
    pytest.param(nn.RNN, RNN, id="rnn"),
]
COPIED = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


def frozen_in_part(layer: nn.Module) -> nn.Module:
    """Return the layer in evaluation mode with one parameter that is not trained."""
    layer.weight_hh_l0.requires_grad_(False)
    return layer.eval()


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(T, B, I, dtype=theirs.weight_ih_l0.dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


def assert_copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Require equal options, and the same parameters in memory of their own."""
    own = "nonlinearity" if hasattr(theirs, "nonlinearity") else "mode"
    assert [getattr(ours, name) for name in (*COPIED, own)] == [getattr(theirs, name) for name in (*COPIED, own)]
    assert ours.training == theirs.training
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        own = ours.get_parameter(name)
        assert torch.equal(own, parameter)
        assert (own.dtype, own.requires_grad) == (parameter.dtype, parameter.requires_grad)
        assert own.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize(("pytorchs", "kind", "options"), PAIRS)
def test_from_torch_and_back(pytorchs, kind, options):
    theirs = frozen_in_part(pytorchs(I, H, **options))
    ours = kind.from_torch(theirs)
    assert type(ours) is kind
    assert_copied(ours, theirs)
    assert_same_function(ours, theirs)
    back = ours.to_torch()
    assert type(back) is pytorchs
    assert_copied(back, ours)
    assert_same_function(back, theirs)


def test_dropout_after_a_single_layer_warns_only_once():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        theirs = nn.LSTM(I, H, dropout=0.5)
    assert LSTM.from_torch(theirs).to_torch().dropout == NovoLSTM.from_lstm(theirs).dropout == 0.5


@pytest.mark.parametrize(("pytorchs", "kind"), TWINS)
@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout_h"])
def test_to_torch_refuses_what_pytorch_has_not(pytorchs, kind, name):
    with pytest.raises(ValueError, match=rf"{name}: expected 0, because nn\.{pytorchs.__name__} has none, got 0\.25"):
        kind(I, H, **{name: 0.25}).to_torch()
    ours = kind.from_torch(pytorchs(I, H), backend="reference", **{name: 0.25})
    assert (getattr(ours, name), ours.backend) == (0.25, "reference")


def test_to_torch_refuses_zoneout_of_c():
    with pytest.raises(ValueError, match=r"zoneout_c: expected 0, because nn\.LSTM has none, got 0\.25"):
        LSTM(I, H, zoneout_c=0.25).to_torch()


@pytest.mark.parametrize("variant", ["formula", "notebook"])
@pytest.mark.parametrize("options", SIZES)
def test_from_lstm_starts_warm(options, variant):
    theirs = frozen_in_part(nn.LSTM(I, H, **options))
    ours = NovoLSTM.from_lstm(theirs, variant=variant, layer_norm="all", gate_gain="hidden")
    assert [getattr(ours, name) for name in COPIED] == [getattr(theirs, name) for name in COPIED]
    assert (ours.variant, ours.layer_norm, ours.gate_gain, ours.training) == (variant, "all", "hidden", False)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == theirs.weight_ih_l0.dtype
        if name.startswith("ln_"):
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name)))
            assert parameter.requires_grad
            continue
        source = theirs.get_parameter(name)
        assert torch.equal(parameter[: source.shape[0]], source)
        assert parameter.requires_grad == source.requires_grad
        drawn = parameter[source.shape[0] :]
        assert len(drawn) == (0 if "hr" in name or (variant == "notebook" and "hh" in name) else H)
        assert (drawn.abs() <= H**-0.5).all()
        assert len(drawn.unique()) == drawn.numel()


def test_from_lstm_takes_the_options_of_our_own():
    source = LSTM(I, H, recurrent_dropout=0.1, zoneout_c=0.2, backend="reference")
    ours = NovoLSTM.from_lstm(source, zoneout_c=0.3)
    assert (ours.recurrent_dropout, ours.zoneout_h, ours.zoneout_c, ours.backend) == (0.1, 0.0, 0.3, "reference")


def test_subclasses_convert_to_themselves():
    class Own(NovoLSTM):
        pass

    assert type(Own.from_lstm(nn.LSTM(I, H))) is Own


def test_pytorchs_classes_are_known_by_whatever_name(monkeypatch):
    torchs, cell = nn.LSTM, nn.LSTMCell
    theirs, others = torchs(I, H), [nn.GRU(I, H), nn.RNN(I, H)]
    # What a program may do before its other imports, so that these build their models of ours.
    for name in ("LSTM", "LSTMCell", "GRU", "RNN", "RNNBase", "RNNCellBase"):
        monkeypatch.setattr(torch.nn, name, getattr(novolstm_triton, name, nn.Module))
    ours = LSTM.from_torch(theirs)
    assert type(ours.to_torch()) is torchs
    assert type(NovoLSTM.from_lstm(theirs)) is NovoLSTM
    assert type(ByteModel("lstm", 4, 1).rnn) is torchs
    converted, report = convert_model(nn.ModuleList([theirs, cell(I, H), nn.Linear(I, H)]), verbose=False)
    assert type(converted[0]) is LSTM
    assert [entry.path for entry in report.entries] == ["0", "1"]
    ours = [GRU.from_torch(others[0]), RNN.from_torch(others[1])]
    assert [type(layer.to_torch()) for layer in ours] == [type(layer) for layer in others]


class Doubled(nn.LSTM):
    """Computes something else."""

    def forward(self, input, hx=None):
        y, state = super().forward(input, hx)
        return 2 * y, state


class Orthogonal(nn.LSTM):
    """Only starts from other values."""

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.orthogonal_(self.weight_hh_l0)


class Silent(nn.GRU):
    """Computes something else."""

    def forward(self, input, hx=None):
        y, state = super().forward(input, hx)
        return 0 * y, state


def pruned(kind: Any = nn.LSTM) -> nn.Module:
    return prune.l1_unstructured(kind(I, H), "weight_hh_l0", 0.5)


def weight_normed(kind: Any = nn.LSTM) -> nn.Module:
    return parametrizations.weight_norm(kind(I, H), "weight_hh_l0")


def hooked(kind: Any = nn.LSTM) -> nn.Module:
    layer = kind(I, H)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched(kind: Any = nn.LSTM) -> nn.Module:
    layer = kind(I, H)
    layer.forward = layer.forward
    return layer


def extended(kind: Any = nn.LSTM) -> nn.Module:
    layer = kind(I, H)
    layer.register_buffer("scale", torch.ones(1))
    return layer


def resized(kind: Any = nn.LSTM) -> nn.Module:
    layer = kind(I, H)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, 1))
    return layer


def compiled(kind: Any = nn.LSTM) -> Any:
    return torch.compile(kind(I, H), backend="eager")


def tied() -> nn.LSTM:
    layer = nn.LSTM(H, H, num_layers=2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    return layer


@pytest.mark.parametrize("make", [pruned, weight_normed, extended], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("pytorchs", "convert"),
    [
        pytest.param(nn.LSTM, LSTM.from_torch, id="from_torch"),
        pytest.param(nn.LSTM, NovoLSTM.from_lstm, id="from_lstm"),
        pytest.param(nn.GRU, GRU.from_torch, id="gru-from_torch"),
        pytest.param(nn.RNN, RNN.from_torch, id="rnn-from_torch"),
    ],
)
def test_parameters_that_are_not_a_layers(pytorchs, convert, make):
    name = pytorchs.__name__
    with pytest.raises(ValueError, match=f"{name.lower()}: expected the parameters of a plain {name}"):
        convert(make(pytorchs))


@pytest.mark.parametrize(
    ("name", "value"), [("nonlinearity", "relu"), ("mode", "RNN_RELU")], ids=["nonlinearity", "mode"]
)
def test_what_nn_rnn_computes_is_taken_over(name, value):
    """Its two attributes may disagree: its results go by `mode`."""
    theirs = nn.RNN(I, H)
    setattr(theirs, name, value)
    assert_same_function(RNN.from_torch(theirs), theirs)
    assert_same_function(convert_model(theirs, verbose=False)[0], theirs)


def test_wrong_sources_and_options():
    with pytest.raises(TypeError, match=r"lstm: expected an nn\.LSTM, got GRU"):
        LSTM.from_torch(nn.GRU(I, H))
    with pytest.raises(TypeError, match=r"gru: expected an nn\.GRU, got LSTM"):
        GRU.from_torch(nn.LSTM(I, H))
    with pytest.raises(TypeError, match=r"rnn: expected an nn\.RNN, got RNNBase"):
        RNN.from_torch(nn.RNNBase("RNN_TANH", I, H))
    with pytest.raises(ValueError, match=r"gru: expected an nn\.GRU, got Silent, which has forward of its own"):
        GRU.from_torch(Silent(I, H))
    with pytest.raises(TypeError, match="nonlinearity: expected no such option"):
        RNN.from_torch(nn.RNN(I, H), nonlinearity="relu")
    with pytest.raises(TypeError, match="zoneout_c"):
        GRU.from_torch(nn.GRU(I, H), zoneout_c=0.1)
    with pytest.raises(TypeError, match=r"lstm: expected an nn\.LSTM or LSTM, got GRU"):
        NovoLSTM.from_lstm(GRU(I, H))
    with pytest.raises(TypeError, match=r"lstm: expected an nn\.LSTM or LSTM, got NovoLSTM"):
        NovoLSTM.from_lstm(NovoLSTM(I, H))
    with pytest.raises(ValueError, match="got Doubled, which has forward of its own"):
        LSTM.from_torch(Doubled(I, H))
    with pytest.raises(TypeError, match="num_layers: expected no such option"):
        NovoLSTM.from_lstm(nn.LSTM(I, H), num_layers=2)
    with pytest.raises(TypeError, match="variant"):
        LSTM.from_torch(nn.LSTM(I, H), variant="formula")


class Tagger(nn.Module):
    """Holds LSTMs in every way in which models hold them, a GRU and an RNN, and a cell."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(I, I), nn.LSTM(I, H, batch_first=True))
        self.shared = nn.LSTM(H, H, batch_first=True)
        self.again = self.shared
        self.nested = nn.ModuleDict({"first": nn.ModuleList([nn.LSTM(H, H, num_layers=2, batch_first=True)])})
        self.orthogonal = Orthogonal(H, H, batch_first=True)
        self.gru = nn.GRU(H, H, batch_first=True)
        self.rnn = nn.RNN(H, H, nonlinearity="relu", bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(2 * H, H)
        self.absent = None

    def forward(self, x):
        y, _ = self.encoder(x)
        for layer in (
            self.shared,
            self.again,
            self.get_submodule("nested.first.0"),
            self.orthogonal,
            self.gru,
            self.rnn,
        ):
            y, _ = layer(y)
        return self.cell(y[:, -1])[0]


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


PLACES = ["encoder.1", "shared", "again", "nested.first.0", "orthogonal"]
"""Where it has LSTMs."""
CLASSES = {**dict.fromkeys(PLACES, (nn.LSTM, LSTM)), "gru": (nn.GRU, GRU), "rnn": (nn.RNN, RNN)}
"""The classes of all its layers, before and after."""


def classes_in(model: nn.Module) -> list[type]:
    return [type(model.get_submodule(path)) for path in CLASSES]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_converted_model_computes_the_same(inplace):
    model, x = tagger(), torch.randn(B, T, I)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    converted, report = convert_model(model, inplace=inplace)
    assert (converted is model) == inplace
    assert type(model.shared) is (LSTM if inplace else nn.LSTM)
    assert [entry.path for entry in report.converted] == [*CLASSES]
    assert classes_in(converted) == [ours for _, ours in CLASSES.values()]
    assert converted.again is converted.shared
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-5)
    assert list(converted.state_dict()) == list(state)
    # In place, an optimizer that was made before goes on working.
    assert all((p is q) == inplace for p, q in zip(converted.parameters(), parameters, strict=True))


def test_converted_model_trains_from_a_warm_start():
    model, x = tagger(), torch.randn(B, T, I)
    converted, report = convert_model(model, "novolstm", gate_gain="hidden", verbose=False)
    assert [entry.path for entry in report.converted] == PLACES
    assert converted.again is converted.shared
    assert type(model.shared) is nn.LSTM
    for path in PLACES:
        layer = converted.get_submodule(path)
        assert isinstance(layer, NovoLSTM)
        assert layer.gate_gain == "hidden"
        weight, warm = (m.get_submodule(path).get_parameter("weight_hh_l0") for m in (model, converted))
        assert torch.equal(warm[: 4 * H], weight)
    converted(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


def test_table_says_what_happened(capsys):
    _, report = convert_model(tagger(), to="novolstm", variant="notebook")
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    header, *rows, total = printed.splitlines()
    assert header.split() == ["module", "was", "is", "note"]
    assert total == "converted 5, left alone 3"
    layer = f"LSTM({H}, {H}, num_layers=2, batch_first=True)"
    assert f"nested.first.0  nn.{layer}" in printed
    assert f"Novo{layer[:-1]}, variant='notebook')" in printed
    assert [row.split()[0] for row in rows] == [*PLACES, "gru", "rnn", "cell"]
    assert rows[2].endswith("the same layer as shared")
    assert [row.split("left alone")[1].strip() for row in rows[-3:-1]] == ["no LSTM"] * 2
    assert rows[-1].split("left alone")[1].strip() == "a cell, which takes single steps"
    convert_model(tagger(), verbose=False)
    assert capsys.readouterr().out == ""
    assert str(convert_model(nn.Linear(1, 1), verbose=False)[1]) == "The model has no recurrent layer."


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_model_that_is_itself_an_lstm(inplace, capsys):
    theirs = nn.LSTM(I, H)
    ours, report = convert_model(theirs, inplace=inplace)
    assert type(ours) is LSTM
    assert [entry.path for entry in report.entries] == [""]
    assert "(the model)" in capsys.readouterr().out
    assert (ours.weight_ih_l0 is theirs.weight_ih_l0) == inplace
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("subclass", [False, True], ids=["lstm", "torch-lstm"])
def test_there_and_back(subclass, inplace):
    model, x = tagger(), torch.randn(B, T, I)
    expected, state, parameters = model(x), copy.deepcopy(model.state_dict()), list(model.parameters())
    there, report = convert_model(model, inplace=inplace, subclass=subclass, verbose=False)
    assert {type(there.get_submodule(path)) for path in PLACES} == {TorchLSTM if subclass else LSTM}
    assert all(isinstance(there.get_submodule(path), nn.LSTM) == subclass for path in PLACES)
    # There is no subclass of the others.
    converted = PLACES if subclass else [*CLASSES]
    assert [entry.path for entry in report.converted] == converted
    assert [(entry.path, entry.note) for entry in report.left][:-1] == [
        ("gru", "no LSTM"),
        ("rnn", "no LSTM"),
    ] * subclass
    back, report = convert_model(there, to="torch", inplace=inplace, verbose=False)
    assert classes_in(back) == [theirs for theirs, _ in CLASSES.values()]
    assert [entry.path for entry in report.converted] == converted
    assert {entry.note for entry in report.converted} == {"same function", "the same layer as shared"}
    assert back.again is back.shared
    assert torch.equal(back(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), state.values(), strict=True))
    assert all((p is q) == inplace for p, q in zip(back.parameters(), parameters, strict=True))


def test_back_from_what_nn_lstm_has_not():
    model = nn.ModuleList([LSTM(I, H, zoneout_c=0.1), NovoLSTM(I, H), TorchLSTM(I, H, recurrent_dropout=0.1)])
    model += [nn.LSTM(I, H), nn.GRU(I, H), LSTMCell(I, H), GRU(I, H, zoneout_h=0.1), RNN(I, H, recurrent_dropout=0.1)]
    model += [RecurrentLayer(cells.CELLS["coupled"], I, H), nn.RNNBase("GRU", I, H)]
    model += [TorchLSTM(I, H, backend="reference")]
    back, report = convert_model(model, to="torch", verbose=False)
    assert [entry.note for entry in report.entries] == [
        "has zoneout_c, which nn.LSTM lacks",
        "computes something else than an LSTM",
        "has recurrent_dropout, which nn.LSTM lacks",
        "is one already",
        "is one already",
        "a cell, which takes single steps",
        "has zoneout_h, which nn.GRU lacks",
        "has recurrent_dropout, which nn.RNN lacks",
        "no LSTM, GRU or RNN",
        "no LSTM, GRU or RNN",
        "same function",
    ]
    assert type(back[-1]) is nn.LSTM
    assert str(report).splitlines()[-1] == "converted 1, left alone 10"


def test_options_of_ours_are_kept_by_the_subclass():
    model = nn.ModuleList([LSTM(I, H, zoneout_c=0.1, backend="reference"), TorchLSTM(I, H)])
    converted, report = convert_model(model, subclass=True, verbose=False)
    assert repr(converted[0]) == f"TorchLSTM({I}, {H}, zoneout_c=0.1, backend='reference')"
    assert [entry.note for entry in report.entries] == ["same function", "is one already"]
    assert convert_model(converted, verbose=False)[1].left[0].note == "is one already"
    named, _ = convert_model(model, subclass=True, backend="torch", verbose=False)
    assert named[0].backend == "torch"


def attributed() -> Any:
    """Return a layer with what programs give to layers."""
    layer: Any = nn.LSTM(I, H)
    layer.weight_ih_l0.requires_grad_(False)
    layer.weight_hh_l0.no_decay = True
    layer.name, layer._is_hf_initialized, layer.scales = "encoder", True, [torch.ones(2)]
    # The usual way to keep it from warnings in a replica or a trace.
    layer.flatten_parameters = lambda: None
    layer.dropout = 0.25
    return layer.eval()


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize(
    "options", [dict(to="lstm"), dict(subclass=True), dict(to="novolstm")], ids=["lstm", "torch-lstm", "novolstm"]
)
def test_attributes_go_along(options, inplace):
    theirs = attributed()
    model, report = convert_model(nn.Sequential(theirs), inplace=inplace, verbose=False, **options)
    assert len(report.converted) == 1
    ours = model[0]
    assert (ours.name, ours._is_hf_initialized, ours.training, ours.dropout) == ("encoder", True, False, 0.25)
    assert (ours.scales is theirs.scales) == inplace
    assert torch.equal(ours.scales[0], theirs.scales[0])
    assert "flatten_parameters" in vars(ours)
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["weight_ih_l0"]
    assert ours.weight_hh_l0.no_decay
    assert not hasattr(ours.bias_ih_l0, "no_decay")
    if options.get("to") != "novolstm":
        back = convert_model(model, to="torch", inplace=inplace, verbose=False)[0][0]
        added = {"name", "_is_hf_initialized", "scales", "flatten_parameters"}
        assert vars(back).keys() - vars(nn.LSTM(I, H)).keys() == added
        assert back.weight_hh_l0.no_decay


def renamed() -> nn.LSTM:
    layer = nn.LSTM(I, H)
    layer.step = 3
    return layer


def instance_patched() -> nn.LSTM:
    layer: Any = nn.LSTM(I, H)
    layer.check_input = lambda *args: None
    return layer


def test_attributes_that_mean_something_else():
    for make, words in (
        (renamed, "has an attribute step, which means something else to LSTM"),
        (instance_patched, "a subclass with check_input of its own"),
    ):
        model, report = convert_model(nn.Sequential(make()), inplace=True, verbose=False)
        assert type(model[0]) is nn.LSTM
        assert [entry.note for entry in report.entries] == [words]


def test_parameters_that_something_else_holds_are_not_left():
    def listed(model):
        model.no_decay = [model[0].bias_ih_l0]

    def hooked(model):
        model[0].bias_ih_l0.register_hook(lambda gradient: gradient)

    for change, words in ((listed, "bias_ih_l0 is also at no_decay[0]"), (hooked, "bias_ih_l0 has hooks")):
        model = nn.Sequential(nn.LSTM(I, H))
        change(model)
        assert convert_model(model, "novolstm", inplace=True, verbose=False)[1].left[0].note.startswith(words)
        assert convert_model(model, inplace=True, verbose=False)[1].converted


class Stateful(nn.Module):
    """Keeps the state of its last call, and another layer with a weight that is computed before every call."""

    def __init__(self, change):
        super().__init__()
        self.lstm, self.head = nn.LSTM(I, H), change(nn.LSTM(H, H))
        self.state: Any = None

    def forward(self, x):
        y, self.state = self.lstm(x, self.state)
        return self.head(y)[0]


CHANGES = {
    "none": lambda layer: layer,
    "weight-norm": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral-norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0").eval(),
    "parametrized": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_with_a_history_are_copied(change):
    model, x = Stateful(CHANGES[change]), torch.randn(T, B, I)
    model(x)
    state = model.state
    expected = model(x)
    model.state = state
    converted, report = convert_model(model, verbose=False)
    assert [entry.path for entry in report.converted] == ["lstm", "head"][: 1 + (change == "none")]
    assert model.state is state
    assert not converted.state[0].requires_grad
    torch.testing.assert_close(converted(x), expected)
    converted(x).sum().backward()
    # The copy has its own parameters, whose gradients these are.
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in converted.parameters())


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.LSTM(I, H), nn.Linear(H, H))
    model[1].lock = threading.Lock()
    words = r"model: 1\.lock cannot be copied \(TypeError: cannot pickle '_thread.lock' object\); with inplace=True it"
    with pytest.raises(ValueError, match=words):
        convert_model(model)
    assert convert_model(model, inplace=True, verbose=False)[1].converted

    class Single(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is one")

    with pytest.raises(
        ValueError, match=r"model: it cannot be copied \(RuntimeError: there is one\); with inplace=True"
    ):
        convert_model(Single())


def test_our_own_layers_are_left_or_go_on_to_novolstm():
    model = nn.ModuleList([LSTM(I, H), NovoLSTM(I, H), GRU(I, H), RNN(I, H)])
    same, report = convert_model(model, "lstm", verbose=False)
    assert [type(layer) for layer in same] == [LSTM, NovoLSTM, GRU, RNN]
    already = "is one already"
    assert [entry.note for entry in report.left] == [already, "computes something else than an LSTM", already, already]
    further, report = convert_model(model, "novolstm", verbose=False)
    assert [type(layer) for layer in further] == [NovoLSTM, NovoLSTM, GRU, RNN]
    assert [entry.note for entry in report.left] == ["is one already", "no LSTM", "no LSTM"]


@pytest.mark.parametrize(
    ("to", "kind"), [("lstm", nn.LSTM), ("novolstm", nn.LSTM), ("lstm", nn.GRU)], ids=["lstm", "novolstm", "gru"]
)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(pruned, "weight_hh_l0 is parametrized, normalised or pruned, which would be lost", id="pruned"),
        pytest.param(weight_normed, "weight_hh_l0 is parametrized, normalised or pruned", id="weight-norm"),
        pytest.param(hooked, "has hooks, which would be lost", id="hook"),
        pytest.param(patched, "a subclass with forward of its own", id="patched"),
        pytest.param(resized, "weight_hh_l0 is a Tensor [24, 1]", id="size"),
        pytest.param(extended, "has scale beside a", id="buffer"),
        pytest.param(
            lambda kind: (Silent if kind is nn.GRU else Doubled)(I, H),
            "a subclass with forward of its own",
            id="subclass",
        ),
        pytest.param(compiled, "is compiled: convert before torch.compile", id="compiled"),
    ],
)
def test_layers_that_would_lose_something_are_left_alone(to, kind, make, words):
    model = nn.Sequential(make(kind))
    layer = model[0]
    converted, report = convert_model(model, to, inplace=True, verbose=False)
    assert converted[0] is layer
    (entry,) = report.left
    assert words in entry.note
    assert not report.converted


def test_tied_parameters_stay_tied():
    ours, _ = convert_model(tied(), "lstm", verbose=False)
    assert ours.weight_hh_l1 is ours.weight_hh_l0
    _, report = convert_model(tied(), "novolstm", verbose=False)
    assert report.left[0].note == "has a parameter under two names"
    model = nn.ModuleList([nn.LSTM(I, H), nn.Linear(H, 4 * H)])
    model[1].weight = model[0].weight_hh_l0
    _, report = convert_model(model, "novolstm", verbose=False)
    assert report.left[0].note == "has a parameter under two names"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        pytest.param(
            (), dict(to="gru"), ValueError, r"to: expected one of \['lstm', 'novolstm', 'torch'\], got 'gru'", id="to"
        ),
        pytest.param((), dict(variant="formula"), TypeError, "variant", id="option-of-the-other"),
        pytest.param((), dict(to="torch", backend="torch"), TypeError, "backend", id="option-of-ours"),
        pytest.param(
            (), dict(to="torch", subclass=True), ValueError, "subclass: expected False with to='torch'", id="subclass"
        ),
        pytest.param((), dict(subclass=1), TypeError, "subclass: expected a bool, got 1", id="flag"),
        pytest.param((), dict(num_layers=1), TypeError, "num_layers: expected no such option", id="size"),
        pytest.param((), dict(to="novolstm", variant="paper"), ValueError, "variant: expected one of", id="value"),
        pytest.param((), dict(zoneout_h=0.1), ValueError, "projected layer has no", id="of-one-layer"),
        pytest.param((), dict(zoneout_c=0.1), TypeError, "GRU.*zoneout_c", id="of-one-kind"),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments, options, error, words):
    model = nn.Sequential(nn.LSTM(I, H), nn.GRU(I, H), nn.LSTM(I, H, proj_size=2))
    before = list(model)
    with pytest.raises(error, match=words):
        convert_model(model, *arguments, inplace=True, verbose=False, **options)
    assert all(now is then for now, then in zip(model, before, strict=True))


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        convert_model({}, "lstm")


@pytest.fixture(scope="module")
def encodec() -> Any:
    """Return a small audio codec with random weights, whose encoder and decoder each have two layers of LSTM."""
    library = transformers()
    torch.manual_seed(0)
    sizes = dict(num_filters=4, hidden_size=16, upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=16)
    return library.EncodecModel(library.EncodecConfig(**sizes, sampling_rate=1600, target_bandwidths=[0.8, 1.6]))


def test_encodec_computes_the_same(encodec):
    model, audio = encodec, torch.randn(2, 1, 160)
    converted, report = convert_model(model, "lstm", verbose=False)
    assert [entry.path for entry in report.converted] == ["encoder.layers.7.lstm", "decoder.layers.1.lstm"]
    assert not any(isinstance(module, nn.LSTM) for module in converted.modules())
    with torch.no_grad():
        code = model.encoder(audio)
        torch.testing.assert_close(converted.encoder(audio), code, rtol=0, atol=1e-5)
        torch.testing.assert_close(converted.decoder(code), model.decoder(code), rtol=0, atol=1e-5)


def test_encodec_trains_from_a_warm_start(encodec):
    model, report = convert_model(encodec, "novolstm", gate_gain="hidden", verbose=False)
    audio = torch.randn(2, 1, 160)
    layers = [model.get_submodule(entry.path) for entry in report.converted]
    assert [type(layer) for layer in layers] == [NovoLSTM, NovoLSTM]
    parameters = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Around the quantiser, which has no gradient.
    loss = nn.functional.mse_loss(model.decoder(model.encoder(audio)), audio)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
        assert not torch.equal(parameter, old)
