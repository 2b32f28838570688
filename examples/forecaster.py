"""Forecast a year of weekly CO2 at Mauna Loa, with a recurrent layer that is named on the command line.

    pip install 'novolstm-triton[examples]'
    python examples/forecaster.py --layer NovoLSTM
    python examples/forecaster.py --help

The series comes with statsmodels: 2,284 weeks from 1958 to 2001, gaps filled by straight lines. After every week the
model forecasts the next 52. It is trained on windows of four years from the first 80 % of the weeks. At the end it
reads the whole series in one call, and its forecasts from the remaining weeks are compared with two that need no
training. All this takes ten seconds on one CPU core.
"""

import dataclasses
import enum
import functools
from typing import Annotated, Any

import torch
import typer
from statsmodels.datasets import co2
from torch import Tensor, nn
from tqdm import tqdm

from novolstm_triton import LSTM, NovoLSTM

YEAR = HORIZON = 52
WINDOW = 4 * YEAR
TRAINED = 0.8
SHOWN = (1, 13, 26, 52)


class Layer(str, enum.Enum):
    """Names of the layers."""

    TORCH = "nn.LSTM"
    LSTM = "LSTM"
    NOVOLSTM = "NovoLSTM"


# All that differs between the layers.
LAYERS = {
    Layer.TORCH: nn.LSTM,
    Layer.LSTM: LSTM,
    Layer.NOVOLSTM: functools.partial(NovoLSTM, gate_gain="hidden"),
}


class Forecaster(nn.Module):
    """Reads a series step by step, and after every step forecasts the next ones.

    Args:
        layer: which recurrent layer.
        features: numbers that describe a step.
        hidden: units of the layer.
    """

    def __init__(self, layer: Layer, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = LAYERS[layer](features, hidden)
        self.head = nn.Linear(hidden, HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, B, HORIZON] for x [T, B, features]."""
        y, _ = self.rnn(x)
        return self.head(y)


@dataclasses.dataclass(frozen=True)
class Series:
    """A series of weeks as inputs and targets, in the units of the training part.

    Week n here is the series' week n + 52, the first whose change over a year is known.
    """

    x: Tensor
    """[N, 2] changes since the week and the year before."""
    target: Tensor
    """[N − HORIZON, HORIZON] changes from a week to each of the next."""
    scale: float
    """ppm to a unit of the targets."""
    mean: Tensor
    """[HORIZON] ppm at the zero of the targets."""
    trained: int
    """Weeks of the training part."""

    @classmethod
    def of(cls, ppm: Tensor) -> "Series":
        """Return the series of weekly values [N + 52]."""
        week = torch.arange(YEAR, len(ppm))
        trained = int(TRAINED * len(ppm)) - YEAR
        x = torch.stack((ppm[week] - ppm[week - 1], ppm[week] - ppm[week - YEAR]), dim=1)
        x = (x - x[:trained].mean(0)) / x[:trained].std(0)
        change = ppm[YEAR:].unfold(0, HORIZON + 1, 1)
        change = change[:, 1:] - change[:, :1]
        # The last targets of the training part end with it.
        known = change[: trained - HORIZON]
        mean, scale = known.mean(0), float(known.std())
        return cls(x, (change - mean) / scale, scale, mean, trained)

    def windows(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs [WINDOW, batch, 2] and targets [WINDOW, batch, HORIZON] of random windows to train on."""
        start = torch.randint(self.trained - HORIZON - WINDOW, (batch,), generator=generator)
        weeks = start + torch.arange(WINDOW).unsqueeze(1)
        return self.x[weeks], self.target[weeks]

    def errors(self, change: Tensor) -> Tensor:
        """Return mean absolute errors in ppm, after each of the next weeks, of changes forecast from the test weeks.

        Args:
            change: [N − HORIZON, HORIZON] forecasts in ppm from every week, of which those to test on are taken.
        """
        truth = self.target * self.scale + self.mean
        return (change - truth)[self.trained :].abs().mean(0)


def model_errors(model: Forecaster, series: Series) -> Tensor:
    """Return a model's `Series.errors`: it reads the whole series once, as it would in use."""
    with torch.no_grad():
        forecast = model(series.x.unsqueeze(1)).squeeze(1)[: len(series.target)]
    return series.errors(forecast * series.scale + series.mean)


def baseline_errors(ppm: Tensor, series: Series) -> dict[str, Tensor]:
    """Return the errors of forecasts that need no training."""
    week = torch.arange(YEAR, len(ppm) - HORIZON).unsqueeze(1)
    last_year = ppm[week + torch.arange(1, HORIZON + 1) - YEAR] - ppm[week - YEAR]
    return {"persistence": series.errors(torch.zeros_like(last_year)), "change of last year": series.errors(last_year)}


def train(model: Forecaster, series: Series, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train with Adam on random windows; the learning rate falls along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        x, target = series.windows(batch, generator)
        loss = nn.functional.smooth_l1_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")


def main(
    layer: Annotated[Layer, typer.Option(help="Recurrent layer.")] = Layer.NOVOLSTM,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 300,
    hidden: Annotated[int, typer.Option(min=1, help="Units of the layer.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows in an update.")] = 16,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate at the start.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the weights and windows.")] = 0,
) -> None:
    """Train a forecaster of weekly CO2 and print its error beside those of baselines."""
    dataset: Any = co2.load_pandas()
    weeks = dataset.data["co2"].interpolate()
    ppm = torch.tensor(weeks.to_numpy(), dtype=torch.float32)
    series = Series.of(ppm)
    torch.manual_seed(seed)
    model = Forecaster(layer, series.x.shape[1], hidden)
    rows = baseline_errors(ppm, series) | {f"{layer.value}, untrained": model_errors(model, series)}
    train(model, series, steps, batch, lr, seed)
    rows[f"{layer.value}, {steps} steps"] = model_errors(model, series)

    tested = weeks.index[YEAR + series.trained : YEAR + len(series.target)]
    print(f"Mean absolute error in ppm of forecasts from {len(tested)} weeks, {tested[0]:%Y-%m} to {tested[-1]:%Y-%m}:")
    print(f"{'weeks ahead':24}" + "".join(f"{week:>8}" for week in SHOWN) + f"{'all':>8}")
    for name, errors in rows.items():
        print(f"{name:24}" + "".join(f"{errors[week - 1]:8.2f}" for week in SHOWN) + f"{errors.mean():8.2f}")


if __name__ == "__main__":
    typer.run(main)
