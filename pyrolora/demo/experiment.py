"""The demo's experiment: plain LoRA and MonteCLoRA on one task, at the same budget."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrolora import defaults, zoo
from pyrolora.fitting import fit
from pyrolora.guides import Guide
from pyrolora.plots import entropy_histogram, reliability_diagram
from pyrolora.predictive import ClassPrediction, Prediction, auroc, evaluate

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior

MODEL = "encoder"
GUIDES = ("map", "montec")


@dataclass(frozen=True)
class Contestant:
    """A fit of the demo: its posterior, predictions in and out of distribution, and its scores."""

    posterior: Posterior
    inside: ClassPrediction
    outside: ClassPrediction
    scores: dict[str, float]


def run_guide(
    guide: str | Guide,
    data: Any,
    *,
    model: str | Path | None = None,
    epochs: float = defaults.DEMO_EPOCHS,
    learning_rate: float = defaults.DEMO_LEARNING_RATE,
    num_samples: int = defaults.DEMO_SAMPLES,
    seed: int = 0,
) -> Contestant:
    """Fit ``guide`` on the ``train`` split, and score it on ``test`` and ``unseen``.

    The scores are the metrics of `Posterior.evaluate`; ``ood_entropy`` and ``ood_mi``, the AUROC
    of entropy and of mutual information for telling ``unseen`` from ``test`` (NaN for a point
    estimate, whose mutual information is zero everywhere); ``fit_seconds`` and
    ``predict_seconds``.
    """
    started = time.perf_counter()
    posterior = fit(
        zoo.folder(MODEL) if model is None else model,
        data["train"],
        guide=guide,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
    fitted = time.perf_counter()
    inside = _classes(posterior.predict(data["test"], num_samples, seed=seed))
    outside = _classes(posterior.predict(data["unseen"], num_samples, seed=seed))
    predicted = time.perf_counter()
    spread = bool((inside.draws != inside.draws[0]).any())
    scores = {
        **evaluate(inside),
        "ood_entropy": auroc(inside.entropy, outside.entropy),
        "ood_mi": auroc(inside.epistemic, outside.epistemic) if spread else float("nan"),
        "fit_seconds": fitted - started,
        "predict_seconds": predicted - fitted,
    }
    return Contestant(posterior, inside, outside, scores)


def machine() -> str:
    """Return where the fits run, in words: the accelerator, or the processor and its load."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    used, there = torch.get_num_threads(), os.cpu_count()
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"CPU, {used} of {there} threads{busy}"


def picture(contestants: Mapping[str, Contestant], path: Path) -> None:
    """Draw a reliability diagram of all, and the entropies of each in and out of distribution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * (1 + len(contestants)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # needs no screen, and leaves pyplot's state alone
    first, *others = figure.subplots(1, 1 + len(contestants))
    for (name, one), ax in zip(contestants.items(), others, strict=True):
        assert one.inside.targets is not None
        reliability_diagram(one.inside.probs, one.inside.targets, ax=first, label=name)
        entropy_histogram(one.inside.entropy, one.outside.entropy, ax=ax)
        ax.set_title(f"{name}: entropy")
    for ax in others:
        ax.set_ylim(0, max(other.get_ylim()[1] for other in others))
    first.set_title("reliability")
    first.legend()
    others[0].legend()
    figure.savefig(path, dpi=120, format="png")


def _classes(prediction: Prediction) -> ClassPrediction:
    assert isinstance(prediction, ClassPrediction)
    return prediction
