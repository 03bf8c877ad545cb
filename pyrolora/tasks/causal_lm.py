"""Causal language modelling: the labelled tokens of a sequence, each given those before it."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

from pyrolora.tasks.tokens import TokenTask


class CausalLM(TokenTask):
    """log p(y) of an example is the **sum** over its labelled tokens, t = 1..T-1, of
    log softmax(f_{t-1})[y_t]. Without labels every token of the text is one.
    """

    name = "causal_lm"
    classes = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    shift = 1
    title = "a causal language model"
