"""Tasks, one per file: the law of the targets, their data, their predictions."""

from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_choice import LetterChoice, TextChoice, TokenMeanChoice
from pyrolora.tasks.causal_lm import CausalLM
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.choosing import BY_CAUSAL_LM, choice_task
from pyrolora.tasks.classification import Classification, ClassPrediction
from pyrolora.tasks.heads import load_head, outputs_like
from pyrolora.tasks.label_prediction import MultiLabelPrediction
from pyrolora.tasks.masked_lm import MaskedLM
from pyrolora.tasks.multi_label import MultiLabel
from pyrolora.tasks.multiple_choice import MultipleChoice
from pyrolora.tasks.network import load_for_task, load_language_model, load_network
from pyrolora.tasks.prediction import Prediction
from pyrolora.tasks.question_answering import QuestionAnswering
from pyrolora.tasks.registry import available, register, task_class, task_for
from pyrolora.tasks.regression import Regression, RegressionPrediction
from pyrolora.tasks.reward import RewardModelling, RewardPrediction, Rewards
from pyrolora.tasks.seq2seq import Seq2Seq
from pyrolora.tasks.span_prediction import SpanPrediction
from pyrolora.tasks.tag_prediction import TagPrediction
from pyrolora.tasks.token_classification import TokenClassification
from pyrolora.tasks.token_prediction import TokenPrediction
from pyrolora.tasks.tokens import LanguageModel, TokenTask

__all__ = [
    "BY_CAUSAL_LM",
    "CausalLM",
    "Checkpoint",
    "ClassPrediction",
    "Classification",
    "LanguageModel",
    "LetterChoice",
    "MaskedLM",
    "MultiLabel",
    "MultiLabelPrediction",
    "MultipleChoice",
    "Prediction",
    "QuestionAnswering",
    "Regression",
    "RegressionPrediction",
    "RewardModelling",
    "RewardPrediction",
    "Rewards",
    "Seq2Seq",
    "SpanPrediction",
    "TagPrediction",
    "Task",
    "TextChoice",
    "TokenClassification",
    "TokenMeanChoice",
    "TokenPrediction",
    "TokenTask",
    "available",
    "choice_task",
    "load_for_task",
    "load_head",
    "load_language_model",
    "load_network",
    "outputs_like",
    "register",
    "task_class",
    "task_for",
]
