"""Pipelines that classify texts, pictures and sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pipelines.audio_classification import AudioClassificationPipeline
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.text_classification import TextClassificationPipeline

from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError
from pyrolora.pipelines.base import MASS, Drawn
from pyrolora.tasks import (
    ClassPrediction,
    MultiLabelPrediction,
    Prediction,
    RegressionPrediction,
)

FUNCTIONS = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}


class Classifying(Drawn):
    """The mixin of pipelines that classify.

    ``label`` and ``score`` are as usual, of the predictive mean p̄. Beside them every label has
    ``low`` and ``high``, the central 90 % interval of its probability over draws, and ``entropy``,
    ``aleatoric`` and ``epistemic`` in nats: those of the example, or of the label where an example
    has several. The score of a regression is its mean, with ``std``, ``aleatoric`` and
    ``epistemic`` as standard deviations, and ``low`` and ``high`` of the predictive law. With a
    ``function_to_apply`` the score is the mean over draws of that function of their logits.
    """

    model: Any

    def _forward(self, model_inputs: Any) -> dict[str, Tensor]:
        batch = {name: value for name, value in model_inputs.items() if isinstance(value, Tensor)}
        with self.predicting() as task:
            kind, outputs = task.prediction, [*self.outputs(batch)]
            prediction = kind.collect([kind.reduce(task, outputs, batch)], task)
            raw = torch.cat(outputs)
        means = isinstance(prediction, RegressionPrediction)  # which no temperature moves
        raw = raw[..., None] if means else task.tempered(raw)
        return {**_columns(prediction), "raw": raw.transpose(0, 1).cpu()}

    def labelled(self, model_outputs: Any, function_to_apply: Any) -> list[dict[str, Any]]:
        """Return every label with its numbers, the likeliest first."""
        columns = {name: values[0].tolist() for name, values in model_outputs.items()}
        scores, raw = columns.pop("scores"), columns.pop("raw")
        if function_to_apply is not None:
            name = str(getattr(function_to_apply, "value", function_to_apply)).lower()
            if name not in FUNCTIONS:
                raise ConfigError(
                    f"function_to_apply must be one of {sorted(FUNCTIONS)}, got {name!r}"
                )
            scores = FUNCTIONS[name](torch.tensor(raw)).mean(0).tolist()
        labels = [
            {
                "label": self.model.config.id2label[k],
                "score": score,
                **{name: values[k] for name, values in columns.items()},
            }
            for k, score in enumerate(scores)
        ]
        return sorted(labels, key=lambda label: label["score"], reverse=True)

    def best(self, labels: list[dict[str, Any]], top_k: int | None) -> list[dict[str, Any]]:
        """Return the first ``top_k`` labels; None: all."""
        if top_k is not None:
            whole_number("top_k", top_k, at_least=1)
        return labels[:top_k]


def _columns(prediction: Prediction) -> dict[str, Tensor]:
    """Return (b, C) for every number of a label."""
    if isinstance(prediction, RegressionPrediction):
        low, high = prediction.interval(MASS)
        columns = {
            "scores": prediction.mean,
            "low": low,
            "high": high,
            "std": prediction.std,
            "aleatoric": prediction.aleatoric,
            "epistemic": prediction.epistemic,
        }
        return {name: values[:, None] for name, values in columns.items()}
    assert isinstance(prediction, ClassPrediction | MultiLabelPrediction)
    probs = prediction.probs
    low, high = prediction.interval(MASS)
    several = isinstance(prediction, MultiLabelPrediction)
    about = {
        name: getattr(prediction, f"label_{name}")
        if several
        else getattr(prediction, name)[:, None].expand_as(probs)
        for name in ("entropy", "aleatoric", "epistemic")
    }
    return {"scores": probs, "low": low, "high": high, **about}


class TextClassification(Classifying, TextClassificationPipeline):
    """transformers' ``text-classification`` with a posterior; `Classifying` says what it adds."""

    def postprocess(
        self,
        model_outputs: Any,
        function_to_apply: Any = None,
        top_k: int | None = 1,
        _legacy: bool = True,
    ) -> Any:
        labels = self.best(self.labelled(model_outputs, function_to_apply), top_k)
        return labels[0] if top_k == 1 and _legacy else labels


class ImageClassification(Classifying, ImageClassificationPipeline):
    """transformers' ``image-classification`` with a posterior; `Classifying` says what it adds."""

    def postprocess(
        self, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = 5
    ) -> Any:
        return self.best(self.labelled(model_outputs, function_to_apply), top_k)


class AudioClassification(Classifying, AudioClassificationPipeline):
    """transformers' ``audio-classification`` with a posterior; `Classifying` says what it adds."""

    def postprocess(
        self, model_outputs: Any, top_k: int | None = 5, function_to_apply: Any = None
    ) -> Any:
        return self.best(self.labelled(model_outputs, function_to_apply), top_k)
