"""The pipelines of transformers' that a posterior has: which name, by task and network."""

from __future__ import annotations

from torch import nn

from pyrolora.data.media.media import tokenizer_of
from pyrolora.tasks import Task
from pyrolora.tasks.classification import Classification
from pyrolora.tasks.masked_lm import MaskedLM
from pyrolora.tasks.multi_label import MultiLabel
from pyrolora.tasks.multiple_choice import MultipleChoice
from pyrolora.tasks.question_answering import QuestionAnswering
from pyrolora.tasks.regression import Regression
from pyrolora.tasks.reward import RewardModelling
from pyrolora.tasks.token_classification import TokenClassification

BY_TASK: dict[type[Task], str] = {
    TokenClassification: "token-classification",
    QuestionAnswering: "question-answering",
    MaskedLM: "fill-mask",
}
CLASSIFYING: tuple[type[Task], ...] = (Classification, MultiLabel, Regression)
OF_PAIRS: tuple[type[Task], ...] = (MultipleChoice, RewardModelling)
"""Tasks whose examples are several texts, which no pipeline reads."""
BY_INPUT = {
    "input_ids": "text-classification",
    "pixel_values": "image-classification",
    "input_values": "audio-classification",
    "input_features": "audio-classification",
}
"""Main input of a network that classifies -> its pipeline."""
BY_WRITING = {"on": "text-generation", "apart": "text2text-generation"}


def pipeline_name(task: Task, network: nn.Module) -> str | None:
    """Return the name of the pipeline that has this task's outputs; None where there is none.

    A language model that chooses between answers has that of the texts it writes.
    """
    for kind, name in BY_TASK.items():
        if isinstance(task, kind):
            return name
    text = task.as_text()
    if text is not None and text.writes is not None:
        return BY_WRITING[text.writes]
    if not isinstance(task, CLASSIFYING) or isinstance(task, OF_PAIRS):
        return None
    return BY_INPUT.get(getattr(network, "main_input_name", ""))


def reads_plain_texts(network: nn.Module, tokenizer: object) -> bool:
    """Return whether a network takes texts from a tokenizer, and nothing beside them."""
    main = getattr(network, "main_input_name", None)
    return main == "input_ids" and tokenizer is not None and tokenizer_of(tokenizer) is tokenizer
