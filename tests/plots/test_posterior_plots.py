"""The pictures of a fit and of its draws show the numbers, computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyrolora.errors import ConfigError
from pyrolora.plots import (
    adapter_norms,
    elbo_curve,
    kl_curves,
    mixture_weights,
    signal_to_noise_map,
)
from pyrolora.plots.posterior import MOST_NAMES, short_names

HISTORY = [
    {"step": 5, "elbo": -20.0, "kl/noise": 3.0, "kl/weights": 0.0, "loss": 2.0},
    {"step": 5, "eval_nll": 0.7},
    {"step": 10, "elbo": -10.0, "kl/noise": 4.0, "kl/weights": 0.5, "loss": 1.0},
    {"train_loss": 1.5, "step": 10},
]


@pytest.fixture
def ax() -> Iterator[Axes]:
    figure = Figure()
    FigureCanvasAgg(figure)
    yield figure.subplots()
    figure.canvas.draw()


def names_of(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def idata(**variables: Any) -> dict[str, xarray.Dataset]:
    """Two chains of two draws, of the same values up to ±0.5 around ``values`` a variable."""
    offsets = np.array([[-0.5, 0.5], [0.5, -0.5]])
    group = xarray.Dataset(
        {
            name: (("chain", "draw", *dims), np.add.outer(offsets * noise, values))
            for name, (dims, values, noise) in variables.items()
        },
        attrs={"guide": "meanfield"},
    )
    names = [f"encoder.{i}.query" for i in range(50)]
    sizes = {dim: names[: group.sizes[dim]] for dim in ("layer", "block") if dim in group.sizes}
    return {"posterior": group.assign_coords(sizes)}


# The fit ------------------------------------------------------------------------------------------


def test_the_elbo_stands_over_the_steps_that_logged_it(ax: Axes) -> None:
    assert elbo_curve(HISTORY, ax=ax, label="montec") is ax
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), [[5, -20], [10, -10]])
    assert line.get_label() == "montec"


def test_every_member_has_a_curve_of_its_own(ax: Axes) -> None:
    second = [{**e, "member": 1, "elbo": -1.0} for e in HISTORY if "elbo" in e]
    elbo_curve([{**e, "member": 0} for e in HISTORY] + second, ax=ax)
    assert [line.get_label() for line in ax.lines] == ["member 0", "member 1"]
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[5, -1], [10, -1]])


def test_every_site_has_a_curve_on_an_axis_that_has_a_zero(ax: Axes) -> None:
    assert kl_curves(HISTORY, ax=ax) is ax
    assert [line.get_label() for line in ax.lines] == ["noise", "weights"]
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[5, 3], [10, 4]])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[5, 0], [10, 0.5]])
    assert ax.get_yscale() == "symlog"


@pytest.mark.parametrize("picture", [elbo_curve, kl_curves])
def test_a_history_without_training_is_refused(picture: Any, ax: Axes) -> None:
    with pytest.raises(ConfigError, match=r"no entry with 'elbo'.*logging_steps"):
        picture([{"r_hat": 1.0}], ax=ax)


# The draws ----------------------------------------------------------------------------------------


def test_the_heat_map_has_a_row_a_block_and_a_column_a_rank(ax: Axes) -> None:
    values = np.array([[1.0, 2, 4], [8, 16, 0]])  # the second block has two ranks
    data = idata(signal_to_noise=(("block", "rank"), values, 0.0))
    assert signal_to_noise_map(data, ax=ax) is ax
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.filled(-1), [[1, 2, 4], [8, 16, -1]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert names_of(ax) == ["0", "1"]
    assert ax.figure.axes[1].get_ylabel() == "signal to noise"


def test_the_heat_map_is_of_the_mean_over_draws(ax: Axes) -> None:
    data = idata(signal_to_noise=(("rank", "block"), np.array([[3.0, 5.0]]), 1.0))
    data["posterior"]["signal_to_noise"][0, 0] += 4.0  # one of four draws
    signal_to_noise_map(data, ax=ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[4.0], [6.0]])


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[2.0, 2.0]]], ids=["nothing", "one value"])
def test_a_heat_map_without_differences_can_be_drawn(values: Any, ax: Axes) -> None:
    signal_to_noise_map(idata(signal_to_noise=(("block", "rank"), np.array(values), 0.0)), ax=ax)


@pytest.mark.parametrize("picture", [signal_to_noise_map, mixture_weights])
def test_guides_without_the_variable_are_named(picture: Any, ax: Axes) -> None:
    data = idata(adapter_norm=(("layer",), np.ones(2), 0.0))
    with pytest.raises(ConfigError, match=r"'meanfield' have no .* they have \['adapter_norm'\]"):
        picture(data, ax=ax)


def test_the_weights_of_a_block_make_one_bar(ax: Axes) -> None:
    weights = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    data = idata(mixture_weights=(("block", "component"), weights, 0.1))
    assert mixture_weights(data, ax=ax) is ax
    for k, bars in enumerate(ax.containers):
        assert bars.get_label() == str(k + 1)
        np.testing.assert_allclose([bar.get_width() for bar in bars], weights[:, k])
        np.testing.assert_allclose([bar.get_x() for bar in bars], weights[:, :k].sum(1))
        np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in bars], [0, 1])
    assert ax.get_ylim() == (1.5, -0.5), "the first block is at the top"


def test_norms_have_means_and_central_intervals(ax: Axes) -> None:
    """The draws of a layer are its value − 0.5 and + 0.5, each twice."""
    data = idata(adapter_norm=(("layer",), np.array([2.0, 4.0]), 1.0))
    assert adapter_norms(data, ax=ax, mass=0.5) is ax
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[2, 0], [4, 1]])
    segments = ax.collections[0].get_segments()
    np.testing.assert_allclose(segments, [[[1.5, 0], [2.5, 0]], [[3.5, 1], [4.5, 1]]])
    assert "50% interval" in ax.get_xlabel()


@pytest.mark.parametrize("mass", [0, 1, 1.5])
def test_an_interval_without_mass_is_refused(mass: float, ax: Axes) -> None:
    with pytest.raises(ConfigError, match=rf"number in \(0, 1\), got {mass}"):
        adapter_norms(idata(adapter_norm=(("layer",), np.ones(1), 0.0)), ax=ax, mass=mass)


def test_of_many_layers_some_are_named(ax: Axes) -> None:
    adapter_norms(idata(adapter_norm=(("layer",), np.ones(50), 0.1)), ax=ax)
    assert MOST_NAMES < 50
    assert names_of(ax) == [str(i) for i in range(0, 50, 2)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["enc.0.att.q", "enc.0.att.v", "enc.1.att.q"], ["0.q", "0.v", "1.q"]),
        (["enc.0.q", "enc.head"], ["0.q", "head"]),
        (["enc.0.q"], ["q"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["$x", "$y"], ["$x", "$y"]),
    ],
)
def test_names_keep_what_tells_them_apart(names: list[str], expected: list[str]) -> None:
    assert short_names(names) == expected


def test_a_name_is_never_read_as_mathematics(ax: Axes) -> None:
    data = idata(adapter_norm=(("layer",), np.ones(2), 0.0))
    data["posterior"] = data["posterior"].assign_coords(layer=[r"$\nothing$", r"$\frac{$"])
    adapter_norms(data, ax=ax)
    assert names_of(ax) == [r"$\nothing$", r"$\frac{$"]
