"""Pictures of a report, embedded in the page as data."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyrolora.plots.posterior import (
    adapter_norms,
    elbo_curve,
    kl_curves,
    mixture_weights,
    signal_to_noise_map,
)
from pyrolora.plots.predictions import entropy_histogram, reliability_diagram, risk_coverage_curve
from pyrolora.tasks import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 3.7, 2.8
"""Inches, of 96 pixels each in a browser: a picture fits a narrow screen without shrinking."""
MOST_COMPONENTS = 8
"""The most labels of a legend."""


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with a heading and a caption."""

    title: str
    caption: str
    source: str


def prediction_pictures(prediction: Prediction, outside: Prediction | None) -> Iterator[Picture]:
    """Yield the pictures that a prediction allows, with those of other data beside it."""
    decisions = prediction.decisions()
    probs, targets = (None, None) if decisions is None else (decisions.probs, decisions.targets)
    if probs is not None and targets is not None:
        yield picture(
            "Reliability",
            "Accuracy against confidence, in ten bins; the larger a point, the more predictions. "
            "Below the dotted line the predictions are overconfident.",
            lambda ax: reliability_diagram(probs, targets, ax=ax),
        )
    if prediction.loss is not None:
        yield picture(
            "Risk and coverage",
            "The risk when only the most certain share is answered. It should fall to the left.",
            lambda ax: risk_coverage_curve(prediction, ax=ax),
        )
    name = prediction.uncertainty_name

    def uncertainty(ax: Axes) -> None:
        inside, other = (
            None if p is None else p.uncertainty[p.uncertainty.isfinite()]
            for p in (prediction, outside)
        )
        assert inside is not None
        if not len(inside):  # nothing predicts the token of texts that have only one
            return
        other = None if other is not None and not len(other) else other
        entropy_histogram(inside, other, ax=ax)
        ax.set_xlabel(name)
        if other is not None:
            ax.legend()

    which = "these examples" if outside is None else "these examples and of the outside data"
    yield picture("Uncertainty", f"The {name} of {which}.", uncertainty)


def fit_pictures(history: Any) -> Iterator[Picture]:
    """Yield the pictures of the training, where it was logged."""
    logged = [entry for entry in history if "elbo" in entry]
    members = any("member" in entry for entry in logged)
    if not logged:
        return
    yield picture(
        "Objective",
        "The ELBO over the training steps. It should have stopped rising.",
        lambda ax: _with_legend(elbo_curve(history, ax=ax), members),
    )
    if any(entry[key] for entry in logged for key in entry if key.startswith("kl/")):
        yield picture(
            "KL by site",
            "The KL divergence of the posterior from the prior, for every latent site.",
            lambda ax: _with_legend(kl_curves(history, ax=ax), True),
        )


def posterior_pictures(idata: Any, unit: str | None) -> Iterator[Picture]:
    """Yield the pictures of the posterior's draws; ``unit`` is that of its noise."""
    group = idata["posterior"]
    sizes = dict(group.sizes)
    if not sizes["layer"]:
        return
    yield picture(
        "Adapter norms",
        "The size of each layer's update, mean and 90 % interval over draws.",
        lambda ax: adapter_norms(idata, ax=ax),
        rows=sizes["layer"],
    )
    if "signal_to_noise" in group.data_vars:
        reading = "Ranks far below 1 could be left out."
        if unit == "row":
            reading = (
                "The noise is in units of this mean, so that the ratio does not tell the worth of "
                "a rank: it is higher where the data narrow the noise."
            )
        yield picture(
            "Signal to noise",
            "The mean of every rank over its posterior spread. " + reading,
            lambda ax: signal_to_noise_map(idata, ax=ax),
            rows=sizes["block"],
        )
    if "mixture_weights" in group.data_vars:
        yield picture(
            "Mixture weights",
            "The mean weight of each component, one bar per layer.",
            lambda ax: _legend_above(mixture_weights(idata, ax=ax), sizes["component"]),
            rows=sizes["block"],
        )


def picture(title: str, caption: str, draw: Callable[[Axes], Any], rows: int = 0) -> Picture:
    """Draw a figure as wide as a narrow screen; it is higher where it has ``rows`` to name."""
    from matplotlib import rc_context, style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = max(HEIGHT, min(1.2 + 0.17 * rows, 8.0))
    stream = io.BytesIO()
    with (
        style.context("default"),  # the user's style may need LaTeX or a dark page
        rc_context({"font.size": 9, "svg.hashsalt": "pyrolora", "legend.fontsize": "small"}),
        warnings.catch_warnings(),
    ):
        # Names in scripts that the font lacks are boxes in the picture; the tables show them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(stream, format="svg", metadata={"Date": None})
    content = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(title, caption, f"data:image/svg+xml;base64,{content}")


def _with_legend(ax: Axes, wanted: bool) -> None:
    """Add a legend if it is wanted and short enough; names are never read as mathematics."""
    if wanted and len(ax.lines) <= 2 * MOST_COMPONENTS:
        for text in ax.legend().get_texts():
            text.set_parse_math(False)


def _legend_above(ax: Axes, components: int) -> None:
    """Add a legend of few components above the axes."""
    if components <= MOST_COMPONENTS:
        ax.legend(ncols=components, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
