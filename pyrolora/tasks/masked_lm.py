"""Masked language modelling: the hidden tokens of a sequence, given all that is left of it."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

from pyrolora.tasks.tokens import TokenTask


class MaskedLM(TokenTask):
    """log p(y) of an example is the **sum** over its labelled (hidden) tokens, t = 0..T-1, of
    log softmax(f_t)[y_t]. Of texts without labels some tokens are hidden when they are prepared.

    The hidden tokens of one text are predicted independently: a pseudo-likelihood of the text.
    Reference: Devlin et al. (2019), NAACL, section 3.1.
    """

    name = "masked_lm"
    classes = frozenset(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    shift = 0
    title = "a masked language model"
