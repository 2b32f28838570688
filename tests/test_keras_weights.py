"""Weights of Keras's layers, as arrays and in files, against what Keras computes with them: see data/README.md."""

import io
import pathlib
import random
import re
import sys
import zipfile
from collections.abc import Callable

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from novolstm_triton import GRU, LSTM, RNN, NovoLSTM

DATA = pathlib.Path(__file__).parent / "data"
WEIGHTS, MODEL = DATA / "keras" / "layers.weights.h5", DATA / "keras" / "lstm.keras"
OTHERS = DATA / "keras" / "others.keras"
T, B, I, H = 6, 3, 3, 4

GATES = ("i", "i_prime", "f", "c", "o")
NOTEBOOK = [f"{kind}_{gate}" for gate in GATES for kind in "wub" if (kind, gate) != ("u", "i_prime")]
# The order of a list, for each variant.
ORDERS = {"notebook": [*NOTEBOOK, "gamma", "beta"], "formula": [*NOTEBOOK, "u_i_prime", "gamma", "beta"]}


def recorded(name: str, recording: str = "layers.npz") -> tuple[Tensor, Tensor]:
    """Return the input and Keras's output of a layer of the files."""
    with np.load(DATA / "keras" / recording) as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file[name])


def novolstm_arrays(variant: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (I, H), "u": (H, H)}
    return [rng.normal(size=shapes.get(n.partition("_")[0], (H,))).astype(np.float32) for n in ORDERS[variant]]


def lstm_arrays(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((I, 4 * H), (H, 4 * H), (4 * H,))]


@pytest.mark.parametrize("given", ["list", "dict"])
@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_novolstm_computes_what_tensorflow_computes(variant, given):
    with np.load(DATA / f"{variant}_T6_B3_I5_H8.npz") as file:
        arrays = {key: file[key] for key in file}
    named = {name: arrays[f"w.{name}"] for name in ORDERS[variant]}
    layer = NovoLSTM.from_keras(named if given == "dict" else list(named.values()), variant)
    x, h_0, c_0 = (torch.from_numpy(arrays[name]) for name in ("x", "h0", "c0"))
    y, (h_n, c_n) = layer(x, (h_0[None], c_0[None]))
    for got, name in ((y, "y"), (h_n[0], "hn"), (c_n[0], "cn")):
        torch.testing.assert_close(got, torch.from_numpy(arrays[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "plain", "decoder", "notebook"])
def test_layer_of_a_weights_file_computes_what_keras_computes(name):
    x, expected = recorded(name)
    if name == "notebook":
        layer = NovoLSTM.from_keras(WEIGHTS, "notebook")
    else:
        layer = LSTM.from_keras(str(WEIGHTS), layer=name)
    assert (layer.bidirectional, layer.bias) == (name == "encoder", name != "plain")
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["lstm", "layers/lstm"], ids=["name", "path"])
def test_layer_of_a_model_file_computes_what_keras_computes(layer):
    x, expected = recorded("lstm")
    torch.testing.assert_close(LSTM.from_keras(MODEL, layer=layer)(x)[0], expected, rtol=0, atol=1e-6)


RECORDED: dict[str, tuple] = {
    "gru": (GRU, {}, False, True),
    "gru_both": (GRU, {}, True, False),
    "tanh": (RNN, {}, True, True),
    "relu": (RNN, dict(nonlinearity="relu"), False, True),
}


@pytest.mark.parametrize("name", RECORDED)
def test_other_layers_of_a_model_file_compute_what_keras_computes(name):
    kind, options, bidirectional, bias = RECORDED[name]
    x, expected = recorded(name, "others.npz")
    layer = kind.from_keras(OTHERS, layer=name, **options)
    assert (type(layer), layer.bidirectional, layer.bias) == (kind, bidirectional, bias)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)
    again = kind.from_keras(layer.to_keras(), **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))


def test_other_layers_that_compute_something_else_are_refused():
    words = r"expected before with reset_after=True, got False: .* RecurrentLayer\(cells.CELLS\[\"gru_reset_before\"\]"
    with pytest.raises(ValueError, match=words):
        GRU.from_keras(OTHERS, layer="before")
    with pytest.raises(ValueError, match="expected relu with activation='tanh', got 'relu'"):
        RNN.from_keras(OTHERS, layer="relu")
    with pytest.raises(ValueError, match="expected tanh with activation='relu', got 'tanh'"):
        RNN.from_keras(OTHERS, layer="tanh", nonlinearity="relu")
    with pytest.raises(ValueError, match=r"that fit: gru_both \(layers/bidirectional\), gru \(layers/gru\); got None"):
        GRU.from_keras(OTHERS)
    with pytest.raises(ValueError, match="expected a layer that fits"):
        LSTM.from_keras(OTHERS)


def other_arrays(kind: type, seed: int = 0) -> list[np.ndarray]:
    rng, blocks = np.random.default_rng(seed), 3 if kind is GRU else 1
    shapes = (I, blocks * H), (H, blocks * H), (2, blocks * H) if kind is GRU else (H,)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("directions", [1, 2], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("count", [2, 3], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", [GRU, RNN])
def test_arrays_of_other_layers_return_unchanged(kind, count, directions):
    arrays = [array for d in range(directions) for array in other_arrays(kind, d)[:count]]
    layer = kind.from_keras(arrays)
    assert (layer.bias, layer.bidirectional, layer.batch_first) == (count == 3, directions == 2, True)
    for got, array in zip(layer.to_keras(), arrays, strict=True):
        np.testing.assert_array_equal(got, array)
    names = ("kernel", "recurrent_kernel", "bias")[:count]
    named = kind.from_keras(dict(zip(names, arrays[:count], strict=True)))
    np.testing.assert_array_equal(named.to_keras()[0], arrays[0])


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_subclass_is_what_it_is_of_whatever_its_name(kind):
    arrays = lstm_arrays() if kind is LSTM else other_arrays(kind)
    for name in ("LSTM", "GRU", "RNN"):
        layer = type(name, (kind,), {}).from_keras(arrays)
        for got, array in zip(layer.to_keras(), arrays, strict=True):
            np.testing.assert_array_equal(got, array)


def test_to_keras_adds_the_biases_of_an_rnn_and_keeps_those_of_a_gru():
    rnn, gru = RNN(I, H), GRU(I, H)
    biases = [rnn.get_parameter(name) for name in ("bias_ih_l0", "bias_hh_l0")]
    np.testing.assert_array_equal(rnn.to_keras()[2], (biases[0] + biases[1]).detach().numpy())
    bias = torch.from_numpy(gru.to_keras()[2])
    order = [k * H + unit for k in (1, 0, 2) for unit in range(H)]
    assert torch.equal(bias, torch.stack([gru.get_parameter(name) for name in ("bias_ih_l0", "bias_hh_l0")])[:, order])


OTHER_ERRORS: dict[str, tuple] = {
    "reset-before": (
        GRU,
        [*other_arrays(GRU)[:2], np.zeros(3 * H)],
        r"expected bias of shape \(2, 12\), got \(12,\), that of a GRU with reset_after=False: .*gru_reset_before",
    ),
    "gru-count": (GRU, other_arrays(GRU)[:1], "the weights of a keras.layers.GRU, got 1"),
    "gru-blocks": (GRU, [np.zeros((I, 4)), np.zeros((4, 4))], r"kernel of shape \(I, 3H\)"),
    "gru-of-lstm": (GRU, lstm_arrays(), r"kernel of shape \(I, 3H\), got \(3, 16\)"),
    "lstm-of-gru": (LSTM, other_arrays(GRU), r"recurrent_kernel of shape \(3, 12\), got \(4, 12\)"),
    "rnn-count": (RNN, other_arrays(RNN)[:1], "the weights of a keras.layers.SimpleRNN, got 1"),
    "rnn-of-gru": (RNN, other_arrays(GRU), r"recurrent_kernel of shape \(12, 12\), got \(4, 12\)"),
}


@pytest.mark.parametrize(("kind", "weights", "words"), OTHER_ERRORS.values(), ids=OTHER_ERRORS)
def test_bad_arrays_of_other_layers(kind, weights, words):
    with pytest.raises(ValueError, match=words):
        kind.from_keras(weights)


@pytest.mark.parametrize("kind", [GRU, RNN])
@pytest.mark.parametrize(("option", "value"), [("num_layers", 2), ("zoneout_h", 0.1)])
def test_to_keras_of_other_layers_refuses_what_no_keras_layer_computes(kind, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .* for a Keras layer"):
        kind(I, H, **{option: value}).to_keras()


@pytest.mark.parametrize("directions", [1, 2], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_novolstm_arrays_return_unchanged(variant, directions):
    arrays = [array for d in range(directions) for array in novolstm_arrays(variant, seed=d)]
    layer = NovoLSTM.from_keras(arrays, variant)
    assert (layer.ln_eps, layer.gate_gain, layer.batch_first) == (1e-3, 1.0, True)
    for got, array in zip(layer.to_keras(), arrays, strict=True):
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("directions", [1, 2], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("count", [2, 3], ids=["no-bias", "bias"])
def test_lstm_arrays_return_unchanged(count, directions):
    arrays = [array for d in range(directions) for array in lstm_arrays(d)[:count]]
    layer = LSTM.from_keras(arrays)
    assert (layer.bias, layer.bidirectional) == (count == 3, directions == 2)
    for got, array in zip(layer.to_keras(), arrays, strict=True):
        np.testing.assert_array_equal(got, array)


def test_lstm_takes_a_dict_without_bias():
    kernel, recurrent_kernel, _ = lstm_arrays()
    layer = LSTM.from_keras({"recurrent_kernel": recurrent_kernel, "kernel": kernel})
    np.testing.assert_array_equal(layer.to_keras()[0], kernel)
    assert not layer.bias


@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_to_keras_keeps_the_function_of_a_layer_with_gain_and_two_biases(variant):
    torch.manual_seed(0)
    layer = NovoLSTM(I, H, variant=variant, gate_gain="hidden", ln_eps=1e-3, bidirectional=True)
    x = torch.randn(T, B, I)
    twin = NovoLSTM.from_keras(layer.to_keras(), variant, batch_first=False)
    assert twin.gate_gain == 1.0
    torch.testing.assert_close(twin(x)[0], layer(x)[0])


def test_to_keras_has_zeros_for_a_novolstm_without_bias():
    layer = NovoLSTM(I, H, bias=False, ln_eps=1e-3, batch_first=True)
    x = torch.randn(B, T, I)
    torch.testing.assert_close(NovoLSTM.from_keras(layer.to_keras())(x)[0], layer(x)[0])


def test_to_keras_returns_copies_also_of_16_bits():
    layer = LSTM(I, H, dtype=torch.bfloat16)
    kernel = layer.to_keras()[0]
    assert kernel.dtype == np.float32
    layer = LSTM(I, H)
    weight = layer.get_parameter("weight_ih_l0")
    before = weight.detach().clone()
    layer.to_keras()[0][:] = 0
    assert torch.equal(weight, before)


def test_to_keras_warns_of_another_eps():
    with pytest.warns(UserWarning, match=r"LayerNormalization\(epsilon=1e-05\)"):
        NovoLSTM(I, H).to_keras()


def test_options_and_dtypes():
    double = [array.astype(np.float64) for array in novolstm_arrays("formula")]
    layer = NovoLSTM.from_keras(double, gate_gain="hidden", ln_eps=1e-4, batch_first=False, backend="reference")
    assert layer.weight_ih_l0.dtype == torch.float64
    assert (layer.gate_gain, layer.ln_eps, layer.batch_first, layer.backend) == ("hidden", 1e-4, False, "reference")
    assert LSTM.from_keras(lstm_arrays(), dtype=torch.float64).weight_hh_l0.dtype == torch.float64


def test_arrays_of_any_layout_and_byte_order():
    arrays = lstm_arrays()
    readonly = arrays[2].copy()
    readonly.setflags(write=False)
    given = [np.asfortranarray(arrays[0]), arrays[1].astype(">f4"), readonly]
    for got, array in zip(LSTM.from_keras(given).to_keras(), arrays, strict=True):
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(dict(num_layers=2), "num_layers", id="layers"),
        pytest.param(dict(proj_size=2), "proj_size", id="projection"),
        pytest.param(dict(zoneout_h=0.1), "zoneout_h", id="zoneout"),
        pytest.param(dict(layer_norm="all"), "layer_norm", id="norms"),
    ],
)
def test_to_keras_refuses_what_no_keras_layer_computes(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected .* for a Keras layer"):
        NovoLSTM(I, H, **options).to_keras()


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        pytest.param(lstm_arrays()[:1], ValueError, r"expected 3 or 6 or 2 or 4 arrays, .* got 1", id="count"),
        pytest.param(lstm_arrays()[0], TypeError, "expected a list or dict of arrays or a path, got ndarray", id="one"),
        pytest.param(
            [np.zeros((I, 4 * H)), np.zeros((H + 1, 4 * H)), np.zeros(4 * H)],
            ValueError,
            r"expected recurrent_kernel of shape \(4, 16\), got \(5, 16\)",
            id="shape",
        ),
        pytest.param([np.zeros((I, 5)), np.zeros((H, 5))], ValueError, r"kernel of shape \(I, 4H\)", id="blocks"),
        pytest.param([np.zeros(4 * H), np.zeros((H, 4 * H))], ValueError, "kernel to be a matrix", id="rank"),
        pytest.param([np.zeros((I, 4), int), np.zeros((1, 4))], TypeError, "float64, got int64", id="dtype"),
        pytest.param(
            {"kernel": 0, "weights": 0}, ValueError, r"without .*recurrent_kernel.* with \['weights'\]", id="names"
        ),
    ],
)
def test_bad_lstm_arrays(weights, error, words):
    with pytest.raises(error, match=words):
        LSTM.from_keras(weights)


def test_bad_novolstm_arrays():
    arrays = novolstm_arrays("formula")
    with pytest.raises(ValueError, match=r"expected 17 or 34 arrays, .*'formula', got 16"):
        NovoLSTM.from_keras(novolstm_arrays("notebook"))
    with pytest.raises(ValueError, match=r"expected b_i_prime of shape \(4,\), got \(4, 4\)"):
        NovoLSTM.from_keras([*arrays[:4], arrays[14], *arrays[4:14], *arrays[15:]])
    with pytest.raises(ValueError, match="variant: expected one of"):
        NovoLSTM.from_keras(arrays, "paper")
    with pytest.raises(ValueError, match="layer: expected None beside arrays"):
        NovoLSTM.from_keras(arrays, layer="rnn")
    with pytest.raises(TypeError, match="num_layers: expected no such option"):
        NovoLSTM.from_keras(arrays, num_layers=2)


def test_file_with_several_layers_asks_which():
    with pytest.raises(ValueError, match=r"layers of .* that fit: encoder \(layers/bidirectional\), .*; got None"):
        LSTM.from_keras(WEIGHTS)
    with pytest.raises(ValueError, match=r"layer: expected one of the layers .*decoder.*; got 'lost'"):
        LSTM.from_keras(WEIGHTS, layer="lost")
    with pytest.raises(
        ValueError, match=r"expected a layer that fits, got .*lstm \(layers/lstm\): weights: expected 17"
    ):
        NovoLSTM.from_keras(MODEL)
    with pytest.raises(ValueError, match=r"expected 3 or 6 or 2 or 4 arrays, .* got 16"):
        LSTM.from_keras(WEIGHTS, layer="notebook")


def test_names_that_two_layers_have(tmp_path):
    path = tmp_path / "twice.weights.h5"
    with h5py.File(path, "w") as file:
        for group in ("one", "two"):
            for number, array in enumerate(lstm_arrays()):
                file[f"{group}/cell/vars/{number}"] = array
            file.create_group(f"{group}/vars").attrs["name"] = "lstm"
    with pytest.raises(ValueError, match=r"layer: expected a path, because \['one', 'two'\] are all named 'lstm'"):
        LSTM.from_keras(path, layer="lstm")
    assert LSTM.from_keras(path, layer="two").hidden_size == H


def test_model_file_says_what_its_weights_do_not():
    with pytest.raises(ValueError, match="expected relu with activation='tanh', got 'relu'"):
        LSTM.from_keras(MODEL, layer="relu")


@pytest.mark.parametrize("source", [WEIGHTS, MODEL], ids=["weights.h5", "keras"])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.9], ids=["empty", "start", "half", "most"])
def test_truncated_files(tmp_path, source, kept):
    whole = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"damaged, or not a \.weights\.h5 or \.keras file"):
        LSTM.from_keras(path, layer="lstm")


def test_archives_that_are_no_models(tmp_path):
    path = tmp_path / "other.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no model")
    with pytest.raises(ValueError, match=r"damaged, or not a .*model\.weights\.h5"):
        LSTM.from_keras(path)


def test_legacy_files_are_named_so(tmp_path):
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file.create_group("model_weights")
    with pytest.raises(ValueError, match="a legacy HDF5 file"):
        LSTM.from_keras(path)


def test_missing_file_and_missing_h5py(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="found none"):
        LSTM.from_keras(tmp_path / "none.keras")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'novolstm-triton\[keras\]'"):
        LSTM.from_keras(WEIGHTS)


def test_model_file_holds_the_optimizer_beside_the_layers():
    with zipfile.ZipFile(MODEL) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        assert len(file["optimizer/vars"]) > 6
    with pytest.raises(ValueError, match=r"that fit: lstm \(layers/lstm\), relu \(layers/lstm_1\); got None"):
        LSTM.from_keras(MODEL)


def put(path: pathlib.Path, change: Callable[[h5py.File, h5py.Group], object]) -> pathlib.Path:
    """Write a file with one LSTM that a function has changed, given the file and the group of its variables."""
    with h5py.File(path, "w") as file:
        own = file.create_group("layers/lstm/cell/vars")
        for number, array in enumerate(lstm_arrays()):
            own[str(number)] = array
        change(file, own)
    return path


def replaced(own: h5py.Group, make: Callable[[str], object]) -> None:
    """Put something else in the place of the kernel."""
    del own["0"]
    make("0")


HOSTILE: dict[str, tuple] = {
    # Without a byte in the file, and with 2 GB in memory.
    "huge": (
        lambda file, own: replaced(own, lambda name: own.create_dataset(name, (2**20, 512), "f4")),
        "/layers/lstm/cell/vars/0 would take 2147483648 bytes, more than 100 times",
    ),
    "compressed": (
        lambda file, own: replaced(
            own, lambda name: own.create_dataset(name, data=np.zeros((4000, 512), "f4"), compression="gzip")
        ),
        "/layers/lstm/cell/vars/0 would take 8192000 bytes, more than 100 times",
    ),
    "other-file": (
        lambda file, own: replaced(own, lambda name: own.__setitem__(name, h5py.ExternalLink("other.h5", "/kernel"))),
        "/layers/lstm/cell/vars/0 is a link",
    ),
    "other-file-raw": (
        lambda file, own: replaced(
            own, lambda name: own.create_dataset(name, (I, 4 * H), "f4", external=[("/etc/hostname", 0, 192)])
        ),
        "/layers/lstm/cell/vars/0 lies in another file",
    ),
    "link": (lambda file, own: own.__setitem__("3", h5py.SoftLink("/layers")), "/layers/lstm/cell/vars/3 is a link"),
    "cycle": (lambda file, own: file["layers/lstm"].__setitem__("again", file["layers"]), "has another name, too"),
    "no-array": (lambda file, own: replaced(own, own.create_group), "/layers/lstm/cell/vars/0 is not an array"),
    "texts": (
        lambda file, own: replaced(own, lambda name: own.create_dataset(name, data=["a"], dtype=h5py.string_dtype())),
        "expected kernel in float16, float32 or float64, got object",
    ),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_weights_files(tmp_path, change, words):
    path = put(tmp_path / "model.weights.h5", change)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        LSTM.from_keras(path)
    assert str(path) in str(refused.value)


def test_groups_that_multiply_are_walked_once(tmp_path):
    """Thirty groups, each twice in the one before it: a thousand million ways."""

    def multiply(file, own):
        group = file
        for _ in range(30):
            group = group.require_group("a")
        for _ in range(30):
            group = group.parent
            group["b"] = group["a"]

    with pytest.raises(ValueError, match="has another name, too"):
        LSTM.from_keras(put(tmp_path / "model.weights.h5", multiply))


CONFIG = b'{"config": {"layers": []}}'


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        pytest.param(bytes(2**22), CONFIG, r"model\.weights\.h5 would take 4194304 bytes, more than 100", id="weights"),
        pytest.param(WEIGHTS.read_bytes(), b" " * 2**25, r"config\.json would take 33554432 bytes", id="config"),
        pytest.param(WEIGHTS.read_bytes(), b"[" * 10**5, "nested too deeply", id="deep"),
        pytest.param(WEIGHTS.read_bytes(), b'{"a": NaN}', "NaN is not a JSON number", id="nan"),
        pytest.param(WEIGHTS.read_bytes(), b'{"a": 1, "a": 2}', "'a' appears twice in one object", id="twice"),
        pytest.param(WEIGHTS.read_bytes(), b'{"a": ' + b"9" * 5000 + b"}", "digits", id="long-number"),
    ],
)
def test_hostile_archives(tmp_path, weights, config, words):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights)
        archive.writestr("config.json", config)
    with pytest.raises(ValueError, match=words) as refused:
        LSTM.from_keras(path, layer="decoder")
    assert str(path) in str(refused.value)


def test_deepest_configuration_that_is_parsed_is_walked(tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", WEIGHTS.read_bytes())
        archive.writestr("config.json", "[" * 800 + "]" * 800)
    assert LSTM.from_keras(path, layer="decoder").hidden_size == H


def test_folder_and_link(tmp_path):
    with pytest.raises(ValueError, match="expected a file, got a folder or a device"):
        LSTM.from_keras(tmp_path)
    (tmp_path / "link.weights.h5").symlink_to(WEIGHTS)
    assert LSTM.from_keras(tmp_path / "link.weights.h5", layer="decoder").hidden_size == H
    (tmp_path / "loose.weights.h5").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="found none"):
        LSTM.from_keras(tmp_path / "loose.weights.h5")


@pytest.mark.parametrize("source", [WEIGHTS, MODEL], ids=["weights.h5", "keras"])
def test_changed_bytes_are_a_layer_or_an_error_that_names_the_file(tmp_path, source):
    rng, whole, path = random.Random(0), source.read_bytes(), tmp_path / source.name
    refused = 0
    for _ in range(120):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            # Most of what is said about the arrays comes before them.
            changed[rng.randrange(rng.choice((len(whole), 3000)))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            LSTM.from_keras(path, layer="lstm" if source == MODEL else "decoder")
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) or "weights: expected" in str(error)  # noqa: PT017
    assert refused > 10
