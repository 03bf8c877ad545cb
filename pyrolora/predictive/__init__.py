"""From draws of the posterior to predictions and their scores."""

from pyrolora.predictive.metrics import auroc, evaluate
from pyrolora.predictive.predict import draw_factors, predict, seeded
from pyrolora.predictive.prediction import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    TokenPrediction,
)

__all__ = [
    "ClassPrediction",
    "Prediction",
    "RegressionPrediction",
    "TokenPrediction",
    "auroc",
    "draw_factors",
    "evaluate",
    "predict",
    "seeded",
]
