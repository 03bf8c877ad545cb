"""Causal language modelling: the labelled tokens of a sequence, each given those before it."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from pyrolora.errors import DataError
from pyrolora.likelihoods.base import IGNORED, Likelihood
from pyrolora.types import Batch

_CLASSES = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


class CausalLM(Likelihood):
    """log p(y) of an example is the **sum** over its labelled tokens, t = 1..T-1, of
    log softmax(f_{t-1})[y_t], with f (..., b, T, vocabulary). Tokens labelled -100 do not count.
    """

    name = "causal_lm"

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        return type(network).__name__ in _CLASSES

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        tokens = dist.Categorical(logits=output[..., :-1, :], validate_args=False)
        return tokens.mask(self.token_mask(batch)).to_event(1)

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else labels[..., 1:].clamp(min=0)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        vocabulary = getattr(getattr(network, "config", None), "vocab_size", None)
        if labels.dim() != 2 or labels.is_floating_point():
            raise DataError(
                "a causal language model needs one token id a position as 'labels', got labels of "
                f"dtype {labels.dtype} and shape {tuple(labels.shape)}; leave 'labels' out to "
                "learn from all tokens of the text"
            )
        counted = labels[labels.ne(IGNORED)]
        if counted.numel() == 0:
            raise DataError(
                "every token is labelled -100 (ignored); there is nothing to learn from"
            )
        if counted.min() < 0 or (vocabulary is not None and counted.max() >= vocabulary):
            raise DataError(
                f"token labels must be in 0..{(vocabulary or 0) - 1} or -100, got "
                f"{int(counted.min())}..{int(counted.max())}; was another tokenizer used?"
            )

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 3:
            raise DataError(
                "a causal language model gives logits (n, T, vocabulary); this network gave shape "
                f"{tuple(output.shape)}"
            )

    def count(self, labels: Tensor) -> int:
        return int(labels[..., 1:].ne(IGNORED).sum())

    def token_mask(self, batch: Batch) -> Tensor:
        """(b, T-1) booleans: which next-token predictions count."""
        labels = batch.get("labels")
        if labels is not None:
            return labels[..., 1:].ne(IGNORED)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return mask[..., 1:].bool()
