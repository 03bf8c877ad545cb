"""Predictions, generated texts and their scores, from draws of the posterior."""

from pyrolora.predictive.acquisition import acquire
from pyrolora.predictive.answers import GenerationScores, scored_answers
from pyrolora.predictive.asks import Ask
from pyrolora.predictive.calibration import (
    Calibration,
    calibrate,
    check_temperature,
    warn_untempered,
)
from pyrolora.predictive.choices import choice_rows, choose
from pyrolora.predictive.conformal import Conformal
from pyrolora.predictive.following import Follower, NewToken
from pyrolora.predictive.generate import generate
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.meanings import Entailment, SemanticEntropy, Similarity
from pyrolora.predictive.metrics import auroc, evaluate
from pyrolora.predictive.mixed import Question, predict_mixed
from pyrolora.predictive.mixed_writing import generate_mixed
from pyrolora.predictive.numbered import NumberedDraws, alone
from pyrolora.predictive.predict import draw_factors, predict
from pyrolora.predictive.predictor import Predictor
from pyrolora.predictive.reliability import reliability_table
from pyrolora.predictive.selective import aurc, risk_coverage
from pyrolora.predictive.standard_errors import standard_errors
from pyrolora.tasks import (
    ClassPrediction,
    MultiLabelPrediction,
    Prediction,
    RegressionPrediction,
    SpanPrediction,
    TagPrediction,
    TokenPrediction,
)

__all__ = [
    "Ask",
    "Calibration",
    "ClassPrediction",
    "Conformal",
    "Entailment",
    "Follower",
    "Generation",
    "GenerationScores",
    "MultiLabelPrediction",
    "NewToken",
    "NumberedDraws",
    "Prediction",
    "Predictor",
    "Question",
    "RegressionPrediction",
    "SemanticEntropy",
    "Similarity",
    "SpanPrediction",
    "TagPrediction",
    "TokenPrediction",
    "acquire",
    "alone",
    "aurc",
    "auroc",
    "calibrate",
    "check_temperature",
    "choice_rows",
    "choose",
    "draw_factors",
    "evaluate",
    "generate",
    "generate_mixed",
    "predict",
    "predict_mixed",
    "reliability_table",
    "risk_coverage",
    "scored_answers",
    "standard_errors",
    "warn_untempered",
]
