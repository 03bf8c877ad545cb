"""Tasks, one per file: the law of the targets, their data, their predictions."""

from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_lm import CausalLM
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.classification import Classification, ClassPrediction
from pyrolora.tasks.heads import load_head, outputs_like
from pyrolora.tasks.label_prediction import MultiLabelPrediction
from pyrolora.tasks.masked_lm import MaskedLM
from pyrolora.tasks.multi_label import MultiLabel
from pyrolora.tasks.multiple_choice import MultipleChoice
from pyrolora.tasks.network import load_language_model, load_network
from pyrolora.tasks.prediction import Prediction
from pyrolora.tasks.question_answering import QuestionAnswering
from pyrolora.tasks.registry import available, register, task_class, task_for
from pyrolora.tasks.regression import Regression, RegressionPrediction
from pyrolora.tasks.span_prediction import SpanPrediction
from pyrolora.tasks.tag_prediction import TagPrediction
from pyrolora.tasks.token_classification import TokenClassification
from pyrolora.tasks.tokens import LanguageModel, TokenPrediction, TokenScores, TokenTask

__all__ = [
    "CausalLM",
    "Checkpoint",
    "ClassPrediction",
    "Classification",
    "LanguageModel",
    "MaskedLM",
    "MultiLabel",
    "MultiLabelPrediction",
    "MultipleChoice",
    "Prediction",
    "QuestionAnswering",
    "Regression",
    "RegressionPrediction",
    "SpanPrediction",
    "TagPrediction",
    "Task",
    "TokenClassification",
    "TokenPrediction",
    "TokenScores",
    "TokenTask",
    "available",
    "load_head",
    "load_language_model",
    "load_network",
    "outputs_like",
    "register",
    "task_class",
    "task_for",
]
