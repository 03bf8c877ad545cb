"""The pipeline that answers questions by spans of a context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Pipeline

from pyrolora import defaults
from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError, DataError
from pyrolora.pipelines.base import MASS, Drawn, refuse_drawn
from pyrolora.predictive import SpanPrediction, predict


class QuestionAnswering(Drawn, Pipeline):
    """Answers to questions, as transformers' ``question-answering`` gave them before version 5.

    It takes ``{"question": ..., "context": ...}``, several of these (a list, a generator, a data
    set), or both by name. An answer is a dict with ``score`` (its probability, over all windows of
    a long context), ``start`` and ``end`` in characters, and ``answer``; ``low`` and ``high``, the
    central 90 % interval of the score over draws; and ``entropy``, ``aleatoric`` and ``epistemic``
    of its first and last token, in nats. A question without an answer has ``""``, from 0 to 0.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(
        self,
        inputs: Any = None,
        *,
        question: Any = None,
        context: Any = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        refuse_drawn(options)
        if options.pop("top_k", 1) != 1 or options:
            raise ConfigError(
                "the pipeline gives the likeliest answer of each question, by question=, context= "
                f"and batch_size=, got {sorted(options) or 'another top_k than 1'}; leave it out"
            )
        rows, alone = _questions(inputs, question, context)
        if batch_size is not None:
            whole_number("batch_size", batch_size, at_least=1)
        answers = self.postprocess(self._forward(rows, batch_size=batch_size)) if rows else []
        return answers[0] if alone else answers

    def _sanitize_parameters(self, **options: Any) -> Any:
        return {}, {}, {}

    def preprocess(self, inputs: Any, **options: Any) -> Any:
        return inputs

    def _forward(self, model_inputs: Any, batch_size: int | None = None) -> SpanPrediction:
        posterior: Any = self.posterior
        prepared = posterior.predictor.prepare(model_inputs, need_labels=False)
        prediction = predict(
            posterior.model,
            prepared,
            self.factors,
            batch_size=batch_size or self._batch_size or defaults.BATCH_SIZE,
            temperature=posterior.temperature,
        )
        assert isinstance(prediction, SpanPrediction)
        return prediction

    def postprocess(self, model_outputs: SpanPrediction) -> list[dict[str, Any]]:
        low, high = model_outputs.interval(MASS)
        columns = {
            "score": model_outputs.probability,
            "start": model_outputs.span[:, 0].clamp(min=0),
            "end": model_outputs.span[:, 1].clamp(min=0),
            "low": low,
            "high": high,
            "entropy": model_outputs.entropy,
            "aleatoric": model_outputs.aleatoric,
            "epistemic": model_outputs.epistemic,
        }
        values = {name: column.tolist() for name, column in columns.items()}
        texts = model_outputs.texts or ()
        return [
            {**{name: column[i] for name, column in values.items()}, "answer": text}
            for i, text in enumerate(texts)
        ]


def _questions(inputs: Any, question: Any, context: Any) -> tuple[list[dict[str, str]], bool]:
    """Return questions with their contexts, and whether it was one alone."""
    if (inputs is None) is (question is None) or (question is None) is not (context is None):
        raise ConfigError(
            "pass one of {'question': ..., 'context': ...}, a list of these, or question= and "
            "context= together"
        )
    if inputs is None:
        asked, alone = _listed(question)
        contexts = _listed(context)[0]
        contexts = contexts * len(asked) if len(contexts) == 1 else contexts
        if len(contexts) != len(asked):
            raise DataError(
                f"there are {len(asked)} questions and {len(contexts)} contexts; pass one context, "
                "or as many as there are questions"
            )
        rows: list[Any] = [
            {"question": q, "context": c} for q, c in zip(asked, contexts, strict=True)
        ]
    else:
        rows, alone = _listed(inputs)
    for i, row in enumerate(rows):
        texts = [row.get(n) for n in ("question", "context")] if isinstance(row, Mapping) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"input {i} must have a 'question' and a 'context', both texts, got {row!r:.200}"
            )
    return [{n: row[n] for n in ("question", "context")} for row in rows], alone


def _listed(inputs: Any) -> tuple[list[Any], bool]:
    """Return inputs as a list, and whether they were one input alone."""
    many = isinstance(inputs, Iterable) and not isinstance(inputs, str | Mapping)
    return (list(inputs), False) if many else ([inputs], True)
