"""Writes the files beside it: layers of Keras with random weights, and what Keras computes with them.

Run with Keras 3 and h5py installed, on its PyTorch backend:

    KERAS_BACKEND=torch python tests/data/keras/record.py
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import pathlib

import keras
import numpy as np
from keras import layers, ops

FOLDER = pathlib.Path(__file__).parent
T, B, I, H = 6, 3, 3, 4


class NotebookCell(keras.layers.Layer):
    """NovoLSTM's variant "notebook" as a cell for keras.layers.RNN, which makes its weights in the published order."""

    def __init__(self, units: int, **options):
        super().__init__(**options)
        self.units = units
        self.state_size = [units, units]

    def build(self, input_shape):
        """Make the weights."""
        shapes = {"w": (input_shape[-1], self.units), "u": (self.units, self.units), "b": (self.units,)}
        for gate, kinds in (("i", "wub"), ("i_prime", "wb"), ("f", "wub"), ("c", "wub"), ("o", "wub")):
            for kind in kinds:
                name = f"{kind}_{gate}"
                setattr(self, name, self.add_weight(shape=shapes[kind], name=name))
        self.ln = layers.LayerNormalization()
        self.ln.build((None, self.units))

    def call(self, x, states):
        """Take one step."""
        h, c = states
        z = {k: x @ getattr(self, f"w_{k}") + h @ getattr(self, f"u_{k}") + getattr(self, f"b_{k}") for k in "ifco"}
        i = self.ln(ops.sigmoid(z["i"]) * ops.softmax(x @ self.w_i_prime + self.b_i_prime))
        c = ops.sigmoid(z["f"]) * c + i * ops.tanh(z["c"])
        h = ops.sigmoid(z["o"]) * ops.tanh(c)
        return h, [h, c]


def randomise(layer: keras.layers.Layer, rng: np.random.Generator) -> None:
    """Give every weight, biases too, values that no two gates share."""
    layer.set_weights([rng.uniform(-0.6, 0.6, w.shape).astype(np.float32) for w in layer.get_weights()])


def main() -> None:
    """Write the three files of LSTMs."""
    keras.utils.set_random_seed(7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, I)).astype(np.float32)
    source = keras.Input((T, I))
    recurrent = {
        "encoder": layers.Bidirectional(layers.LSTM(H, return_sequences=True), name="encoder"),
        "plain": layers.LSTM(H, use_bias=False, return_sequences=True, name="plain"),
        "notebook": layers.RNN(NotebookCell(H), return_sequences=True, name="notebook"),
    }
    outputs = {name: layer(source) for name, layer in recurrent.items()}
    recurrent["decoder"] = layers.LSTM(H, return_sequences=True, name="decoder")
    outputs["decoder"] = keras.Sequential([keras.Input((T, I)), recurrent["decoder"]], name="inner")(source)
    head = layers.Dense(2, name="dense")(outputs["decoder"])
    model = keras.Model(source, [*outputs.values(), head])
    for layer in recurrent.values():
        randomise(layer, rng)
    arrays = dict(zip(outputs, model.predict(x, verbose=0), strict=False))
    model.save_weights(FOLDER / "layers.weights.h5")

    stack = [layers.LSTM(H, return_sequences=True, name="lstm")]
    stack.append(layers.LSTM(H, activation="relu", return_sequences=True, name="relu"))
    trained = keras.Sequential([keras.Input((T, I)), *stack])
    # A step of training gives the file an optimizer, with variables of the weights' shapes.
    trained.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    trained.fit(x, np.repeat(x[..., :1], H, axis=-1), verbose=0)
    trained.save(FOLDER / "lstm.keras")
    arrays["lstm"] = ops.convert_to_numpy(stack[0](x))
    np.savez_compressed(FOLDER / "layers.npz", x=x, **arrays)


def record_others() -> None:
    """Write the two files of GRUs and SimpleRNNs."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, I)).astype(np.float32)
    source = keras.Input((T, I))
    recurrent = {
        "gru": layers.GRU(H, return_sequences=True, name="gru"),
        "gru_both": layers.Bidirectional(layers.GRU(H, use_bias=False, return_sequences=True), name="gru_both"),
        "before": layers.GRU(H, reset_after=False, return_sequences=True, name="before"),
        "tanh": layers.Bidirectional(layers.SimpleRNN(H, return_sequences=True), name="tanh"),
        "relu": layers.SimpleRNN(H, activation="relu", return_sequences=True, name="relu"),
    }
    model = keras.Model(source, [layer(source) for layer in recurrent.values()])
    for layer in recurrent.values():
        randomise(layer, rng)
    model.save(FOLDER / "others.keras")
    arrays = dict(zip(recurrent, model.predict(x, verbose=0), strict=True))
    np.savez_compressed(FOLDER / "others.npz", x=x, **arrays)


if __name__ == "__main__":
    main()
    record_others()
