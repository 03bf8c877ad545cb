"""Pipelines that write texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Pipeline
from transformers.pipelines.text_generation import TextGenerationPipeline

from pyrolora.pipelines.base import Drawn, refuse_drawn
from pyrolora.predictive import Generation, generate
from pyrolora.predictive.ranking import chosen

MEANS = ("entropy", "aleatoric", "epistemic")


class Writing(Drawn):
    """The mixin of pipelines that write.

    Every draw writes its continuations; the answers are, of greedy ones, those that the mixture
    over draws finds likeliest per token, and of sampled ones the first of every draw, then the
    second. Beside the usual keys they have ``num_tokens``; ``nll`` of the mixture, ``entropy``,
    ``aleatoric`` and ``epistemic`` in nats per token; and the ``agreement`` of the draws' texts.
    """

    tokenizer: Any
    _prepare_generate_kwargs: Any

    def written(
        self, batch: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
        """Return the answers' tokens, b lists of K, and (b, K) for every number about them."""
        options = dict(self._prepare_generate_kwargs(dict(options)))
        options.pop("tokenizer", None)  # the posterior's own reads stop strings
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        joint, task = self.posterior.model, self.posterior.task
        generation = generate(
            joint,
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            self.factors,
            self.tokenizer,
            options=options,
            temperature=self.posterior.temperature if task.as_text() is task else 1.0,
        )
        several = generation.sequences.shape[1] // (self.factors.draws or 1)
        sampled = bool(self._setting(options, "do_sample"))
        order = torch.tensor(
            [
                chosen(generation, several, sampled=sampled, prompt=i)
                for i in range(len(generation.sequences))
            ]
        )
        tokens = [
            [generation.sequences[i, k][generation.mask[i, k]] for k in row]
            for i, row in enumerate(order.tolist())
        ]
        return tokens, _about(generation, order)

    def _setting(self, options: Mapping[str, Any], name: str) -> Any:
        given: GenerationConfig | None = options.get("generation_config")
        network: Any = self.posterior.base
        places = (options.get(name), getattr(given, name, None))
        value = next((value for value in places if value is not None), None)
        return getattr(network.generation_config, name, None) if value is None else value


def _about(generation: Generation, order: Tensor) -> dict[str, Tensor]:
    """Return the numbers of the chosen continuations, each (b, K)."""
    counts = generation.num_tokens
    numbers = {
        "num_tokens": counts,
        "nll": -generation.log_predictive / counts,
        **{name: getattr(generation, name).nanmean(-1) for name in MEANS},
        "agreement": generation.agreement[:, None].expand(counts.shape),
    }
    return {name: values.gather(1, order) for name, values in numbers.items()}


class TextGeneration(Writing, TextGenerationPipeline):
    """transformers' ``text-generation`` with a posterior; `Writing` says what it adds."""

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> dict[str, Any]:
        prompt_text = model_inputs.pop("prompt_text")
        prefix = generate_kwargs.pop("prefix_length", 0)
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if prefix and total in generate_kwargs and new not in generate_kwargs:
                generate_kwargs[total] += prefix
        tokens, about = self.written(model_inputs, generate_kwargs)
        ids = model_inputs["input_ids"].cpu()
        padding = self.tokenizer.pad_token_id or 0
        flat = [row for rows in tokens for row in rows]
        padded = pad_sequence(flat, batch_first=True, padding_value=padding)
        written = padded.reshape(len(tokens), len(tokens[0]), -1)
        before = ids[:, None].expand(-1, len(tokens[0]), -1)
        return {
            "generated_sequence": torch.cat([before, written.to(ids)], -1),
            "input_ids": ids,
            "prompt_text": prompt_text,
            **about,
        }


class TextToText(Writing, Pipeline):
    """Texts written apart from their prompts, by an encoder and a decoder.

    It is called as transformers' ``text2text-generation`` was before its version 5, which has none:
    for a text the answer is a list of dicts with ``generated_text``, and what `Writing` adds.
    """

    _pipeline_calls_generate = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(self, truncation: Any = None, **generate_kwargs: Any) -> Any:
        refuse_drawn(generate_kwargs)
        reading = {} if truncation is None else {"truncation": truncation}
        return reading, generate_kwargs, {}

    def preprocess(self, inputs: str, **options: Any) -> Any:
        return self.tokenizer(inputs, return_tensors="pt", **options)

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> dict[str, Any]:
        tokens, about = self.written(model_inputs, generate_kwargs)
        texts = [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in tokens]
        return {"texts": texts, **about}

    def postprocess(self, model_outputs: Any) -> list[dict[str, Any]]:
        texts = model_outputs.pop("texts")
        texts = texts[0] if isinstance(texts[0], list) else texts  # batched ones come row by row
        numbers = {name: values[0].tolist() for name, values in model_outputs.items()}
        return [
            {"generated_text": text, **{name: values[k] for name, values in numbers.items()}}
            for k, text in enumerate(texts)
        ]
