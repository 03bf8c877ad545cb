"""The pictures show the numbers: bins computed by hand, histograms of unit area."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyrolora.errors import ConfigError, DataError
from pyrolora.plots import entropy_histogram, reliability_diagram, risk_coverage_curve
from pyrolora.predictive import ClassPrediction, RegressionPrediction


@pytest.fixture
def ax() -> Iterator[Axes]:
    figure = Figure()
    FigureCanvasAgg(figure)
    yield figure.subplots()
    figure.canvas.draw()  # whatever was drawn can be shown


def binary(confidences: list[float]) -> torch.Tensor:
    return torch.tensor([[p, 1 - p] for p in confidences], dtype=torch.float64)


def test_the_points_are_the_bins_means(ax: Axes) -> None:
    """Three in 0.6 to 0.7, of which two are right; two in 0.9 to 1, of which one is."""
    probs = binary([0.62, 0.65, 0.68, 0.92, 1.0])
    targets = torch.tensor([0, 0, 1, 1, 0])
    assert reliability_diagram(probs, targets, ax=ax, label="map") is ax
    line = ax.lines[-1]
    np.testing.assert_allclose(line.get_xdata(), [0.65, 0.96])
    np.testing.assert_allclose(line.get_ydata(), [2 / 3, 1 / 2])
    assert line.get_label() == "map"
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), [[0.65, 2 / 3], [0.96, 1 / 2]])
    small, large = sorted(points.get_sizes())
    np.testing.assert_allclose(points.get_sizes(), [large, small])
    assert large > small


@pytest.mark.parametrize("bins", [1, 5, 10])
def test_the_points_of_many_predictions(bins: int, ax: Axes) -> None:
    probs = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((500,))
    targets = torch.randint(3, (500,))
    reliability_diagram(probs, targets, ax=ax, bins=bins)
    confidence, right = probs.max(-1).values.numpy(), (probs.argmax(-1) == targets).numpy()
    edges = np.linspace(0, 1, bins + 1)
    pairs = itertools.pairwise(edges)
    inside = [(confidence >= low) & (confidence < high) for low, high in pairs]
    expected = [(confidence[i].mean(), right[i].mean()) for i in inside if i.any()]
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), expected)


def test_the_diagonal_is_drawn_once(ax: Axes) -> None:
    for label in ("map", "montec"):
        reliability_diagram(binary([0.7, 0.9]), torch.tensor([0, 1]), ax=ax, label=label)
    diagonals = [line for line in ax.lines if np.array_equal(line.get_xydata(), [[0, 0], [1, 1]])]
    assert len(diagonals) == 1
    assert len(ax.lines) == 3
    assert [text.get_text() for text in ax.legend().get_texts()] == ["map", "montec"]
    assert ax.lines[1].get_color() != ax.lines[2].get_color()


def test_predictions_in_single_precision_are_drawn(ax: Axes) -> None:
    reliability_diagram(binary([0.7, 0.9]).float(), torch.tensor([0, 1]), ax=ax)
    np.testing.assert_allclose(ax.lines[-1].get_xdata(), [0.7, 0.9], rtol=1e-6)


def test_the_histograms_have_unit_area_and_one_axis(ax: Axes) -> None:
    inside, outside = torch.rand(300), 1 + torch.rand(200)
    assert entropy_histogram(inside, outside, ax=ax, bins=20) is ax
    labels = [text.get_text() for text in ax.legend().get_texts()]
    assert labels == ["in distribution", "out of distribution"]
    for bars, values in zip(ax.containers, (inside, outside), strict=True):
        edges = np.array([*(bar.get_x() for bar in bars), bars[-1].get_x() + bars[-1].get_width()])
        heights = np.array([bar.get_height() for bar in bars])
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
        assert len(bars) == 20
        assert edges[0] == pytest.approx(0, abs=1e-12)
        assert edges[-1] == pytest.approx(float(outside.max()))
        expected, _ = np.histogram(values.numpy(), bins=edges, density=True)
        np.testing.assert_allclose(heights, expected, rtol=1e-6)


def test_certain_predictions_can_be_drawn(ax: Axes) -> None:
    """All entropies are zero."""
    entropy_histogram(torch.zeros(5), torch.zeros(3), ax=ax)
    for bars in ax.containers:
        area = sum(bar.get_height() * bar.get_width() for bar in bars)
        assert area == pytest.approx(1)


def test_entropies_without_other_data_are_one_histogram(ax: Axes) -> None:
    entropy_histogram(torch.tensor([-1.0, 0.0, 1.0, 1.0]), ax=ax, bins=2)
    (bars,) = ax.containers
    assert [bar.get_height() for bar in bars] == [0.25, 0.75]
    assert [bar.get_x() for bar in bars] == [-1, 0]
    assert ax.get_legend_handles_labels() == ([], [])


def test_the_risk_falls_with_the_coverage(ax: Axes) -> None:
    """The surest two are right, the third is wrong, the last is right: 0, 0, 1/3, 1/4."""
    draws = binary([0.6, 0.9, 0.8, 0.7]).unsqueeze(0)
    prediction = ClassPrediction(torch.tensor([0, 0, 0, 1]), draws[..., 0].log(), draws)
    assert risk_coverage_curve(prediction, ax=ax, label="montec") is ax
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(line.get_ydata(), [0, 0, 1 / 3, 1 / 4])
    assert line.get_label() == "montec"
    assert ax.get_ylabel() == "risk: error rate"
    assert ax.get_ylim()[0] == 0


def test_the_risk_of_a_regression_is_named(ax: Axes) -> None:
    draws, targets = torch.zeros(2, 3), torch.tensor([1.0, 2.0, 3.0])
    prediction = RegressionPrediction(targets, torch.zeros(2, 3), draws, noise_scale=1.0)
    risk_coverage_curve(prediction, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata()[-1], 14 / 3)
    assert ax.get_ylabel() == "risk: mean squared error"


def test_there_is_no_risk_without_labels(ax: Axes) -> None:
    prediction = ClassPrediction(None, None, binary([0.7, 0.9]).unsqueeze(0))
    with pytest.raises(DataError, match="labels"):
        risk_coverage_curve(prediction, ax=ax)


def test_entropies_far_from_zero_fill_their_picture(ax: Axes) -> None:
    entropy_histogram(torch.tensor([2.0, 2.5]), torch.tensor([3.0]), ax=ax, bins=4)
    assert [bar.get_x() for bar in ax.containers[0]] == [2, 2.25, 2.5, 2.75]
    entropy_histogram(torch.tensor([0.0, 0.0]), ax=ax, bins=1)
    assert ax.containers[-1][0].get_width() == 1


def test_numbers_that_would_be_left_out_are_refused(ax: Axes) -> None:
    probs, targets = binary([0.9, 0.6]), [0, 0]
    with pytest.raises(DataError, match=r"probs must be finite, .* in 2 of 4 numbers"):
        reliability_diagram(probs * torch.tensor([[1.0], [torch.nan]]), targets, ax=ax)
    with pytest.raises(DataError, match="targets must be finite"):
        reliability_diagram(probs, [0, torch.nan], ax=ax)
    with pytest.raises(DataError, match=r"probabilities, got numbers from -.* softmax"):
        reliability_diagram(probs.log(), targets, ax=ax)
    with pytest.raises(DataError, match="inside must be finite"):
        entropy_histogram([0.1, torch.inf], ax=ax)
    reliability_diagram(probs.bfloat16(), targets, ax=ax)
    entropy_histogram(torch.rand(5).bfloat16(), ax=ax)


def test_what_cannot_be_drawn_is_refused(ax: Axes) -> None:
    with pytest.raises(ConfigError, match="bins must be a whole number >= 1, got 0"):
        reliability_diagram(binary([0.9]), [0], ax=ax, bins=0)
    with pytest.raises(DataError, match="at least one entropy"):
        entropy_histogram([], ax=ax)
