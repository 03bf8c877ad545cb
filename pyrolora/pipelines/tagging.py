"""Pipelines that predict at tokens: tags of words, and words that are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pipelines.fill_mask import FillMaskPipeline
from transformers.pipelines.token_classification import TokenClassificationPipeline

from pyrolora.pipelines.base import Drawn
from pyrolora.tasks import TokenTask
from pyrolora.tasks.prediction import entropy_of

ABOUT = ("entropy", "aleatoric", "epistemic")


class AtTokens(Drawn):
    """The mixin of pipelines that predict at tokens: p̄ of each, and its uncertainty in nats."""

    def at_tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``logits`` (b, T, C), log p̄, and (b, T) for each of `ABOUT`."""
        total: Any = 0.0
        aleatoric: Any = 0.0
        count = 0
        with self.predicting() as task:
            assert isinstance(task, TokenTask)
            for output in self.outputs(batch):
                probs = task.token_logits(output, batch).float().softmax(-1)
                total, count = total + probs.sum(0), count + len(probs)
                aleatoric = aleatoric + entropy_of(probs).sum(0)
        mean = total / count
        entropy, aleatoric = entropy_of(mean), aleatoric / count
        epistemic = (entropy - aleatoric).clamp(min=0)
        return {
            "logits": mean.log(),
            "entropy": entropy,
            "aleatoric": aleatoric,
            "epistemic": epistemic,
        }


class TokenClassification(AtTokens, TokenClassificationPipeline):
    """transformers' ``token-classification`` with a posterior.

    Beside the usual keys every token has ``entropy``, ``aleatoric`` and ``epistemic`` in nats, and
    every group of an ``aggregation_strategy`` their means over its tokens.
    """

    BESIDE = (
        *("special_tokens_mask", "offset_mapping", "sentence", "is_last"),
        *("word_ids", "word_to_chars_map"),
    )

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        beside = {name: model_inputs.pop(name, None) for name in self.BESIDE}
        return {**self.at_tokens(model_inputs), **beside, **model_inputs}

    def postprocess(self, all_outputs: Any, **options: Any) -> list[dict[str, Any]]:
        spans = [*_token_spans(all_outputs)]  # first: transformers shifts the offsets in place
        entities = super().postprocess(all_outputs, **options)
        for entity in entities:
            chunk, tokens = _tokens_of(entity, spans)
            for name in ABOUT if tokens else ():
                entity[name] = float(all_outputs[chunk][name][0, tokens].mean())
        return entities


class FillMask(AtTokens, FillMaskPipeline):
    """transformers' ``fill-mask`` with a posterior.

    Every proposal also has the ``entropy``, ``aleatoric`` and ``epistemic`` of its mask, in nats.
    """

    def _forward(self, model_inputs: Any) -> dict[str, Tensor]:
        batch = {name: value for name, value in model_inputs.items() if isinstance(value, Tensor)}
        return {**self.at_tokens(batch), "input_ids": batch["input_ids"]}

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:
        answers = super().postprocess(model_outputs, **options)
        places = (model_outputs["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        rows = [answers] if len(places) == 1 else answers
        for place, row in zip(places.tolist(), rows, strict=True):
            about = {name: float(model_outputs[name][0, place]) for name in ABOUT}
            for proposal in row:
                proposal.update(about)
        return answers


Span = tuple[int, int, int | None, int | None]
"""Chunk and place of a token, and its first and past-the-last character."""


def _token_spans(outputs: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """Yield the tokens of a text that are none of the tokenizer's own."""
    starts: Any = outputs[0].get("word_to_chars_map")
    for chunk, output in enumerate(outputs):
        offsets: Any = output.get("offset_mapping")
        words: Any = output.get("word_ids")
        for place, special in enumerate(torch.as_tensor(output["special_tokens_mask"])[0].tolist()):
            if special:
                continue
            if offsets is None:
                yield chunk, place, None, None
                continue
            first, past = (int(bound) for bound in offsets[0][place])
            word = None if words is None or starts is None else words[place]
            shift = 0 if word is None else starts[word][0]
            yield chunk, place, first + shift, past + shift


def _tokens_of(entity: Mapping[str, Any], spans: Sequence[Span]) -> tuple[int, list[int]]:
    """Return the chunk of an entity, and the places of its tokens in it; none where unknown."""
    if entity["start"] is None:
        place = entity.get("index")
        return 0, [] if place is None else [place]
    low, high = entity["start"], entity["end"]
    inside = [
        (chunk, place)
        for chunk, place, first, past in spans
        if first is not None and past is not None and low <= first and past <= high and first < past
    ]
    if not inside:
        return 0, []
    chunks = [chunk for chunk, _ in inside]
    fullest = max(sorted({*chunks}), key=chunks.count)
    return fullest, [place for chunk, place in inside if chunk == fullest]
