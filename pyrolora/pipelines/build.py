"""The pipeline of a posterior, made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import FeatureExtractionMixin, ImageProcessingMixin, Pipeline
from transformers.pipelines import TASK_ALIASES

from pyrolora import defaults
from pyrolora.checks import text_or_none
from pyrolora.data.media.media import tokenizer_of
from pyrolora.errors import ConfigError
from pyrolora.pipelines.answering import QuestionAnswering
from pyrolora.pipelines.base import Source, drawn
from pyrolora.pipelines.classifying import (
    AudioClassification,
    ImageClassification,
    TextClassification,
)
from pyrolora.pipelines.names import pipeline_name
from pyrolora.pipelines.tagging import FillMask, TokenClassification
from pyrolora.pipelines.writing import TextGeneration, TextToText

PIPELINES: dict[str, type[Any]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "fill-mask": FillMask,
    "text-generation": TextGeneration,
    "text2text-generation": TextToText,
    "image-classification": ImageClassification,
    "audio-classification": AudioClassification,
}
WRITING = ("text-generation", "text2text-generation")


def pipeline(
    posterior: Source,
    task: str | None = None,
    *,
    num_samples: int | None = None,
    draws: Iterable[int] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Pipeline:
    """Make the pipeline that `Posterior.pipeline` describes."""
    text_or_none("task", task)
    name = pipeline_name(posterior.task, posterior.base)
    if name is None:
        raise ConfigError(
            f"transformers has no pipeline with the outputs of the task {posterior.task.name!r} on "
            f"a {type(posterior.base).__name__}; use posterior.predict"
        )
    if task is not None and TASK_ALIASES.get(task, task) != name:
        raise ConfigError(f"this posterior's pipeline is {name!r}, got {task!r}; leave task= out")
    usual = defaults.GENERATE_SAMPLES if name in WRITING else defaults.NUM_SAMPLES
    factors = drawn(posterior, num_samples, draws, seed, usual)
    made: Pipeline = PIPELINES[name](
        posterior, factors, task=name, **{**_parts(posterior.tokenizer, name), **options}
    )
    return made


def _parts(processor: Any, name: str) -> dict[str, Any]:
    """Return the tokenizer or processor of a posterior, under the name of its kind."""
    if processor is None:
        raise ConfigError(
            f"a pipeline of {name} needs the posterior's tokenizer or processor, and it has none; "
            "set posterior.tokenizer"
        )
    if isinstance(processor, ImageProcessingMixin):
        return {"image_processor": processor}
    if isinstance(processor, FeatureExtractionMixin):
        return {"feature_extractor": processor}
    if tokenizer_of(processor) is processor:
        return {"tokenizer": processor}
    parts = ("tokenizer", "image_processor", "feature_extractor")
    found = {part: getattr(processor, part, None) for part in parts}
    return {part: value for part, value in found.items() if value is not None}
