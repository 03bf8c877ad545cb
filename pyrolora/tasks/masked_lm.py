"""Masked language modelling: the hidden tokens of a text, predicted by all that is left of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from pyrolora.columns import IGNORED, LABELS
from pyrolora.data import Collator
from pyrolora.errors import DataError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.tokens import LanguageModel, check_own_tokens
from pyrolora.tasks.unsupported import classes_of

# Devlin et al. (2019): 15 % of the tokens, of which transformers replaces 80 % by the mask and 10 %
# by random tokens.
HIDDEN_SHARE = 0.15
# Combined with the tokens of a text, so that it always hides the same ones and scores compare.
HIDDEN_SEED = 0


class MaskedCollator(Collator):
    """Texts to a batch in which some tokens are hidden, and labelled with what they were."""

    per_token = True

    def check_data(self, examples: Any) -> None:
        """Take all data; `encode` says what is missing."""

    def complete(self, examples: Any, *, need_labels: bool) -> Any:
        """Hide tokens of texts without labels, unless they have mask tokens to be predicted."""
        first = self.example(examples[0])
        if LABELS in first or "input_ids" not in first:
            return examples
        if not need_labels and self._has_masks(examples):
            return examples
        return hidden(examples, self.example, self.tokenizer)

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        if labels is not None and LABELS in explicit:
            check_own_tokens(examples, self, causal=False)

    def _has_masks(self, examples: Any) -> bool:
        """Return whether texts say themselves, by the mask token, what is to be predicted."""
        mask = getattr(self.tokenizer, "mask_token_id", None)
        rows = (self.example(examples[i])["input_ids"] for i in range(len(examples)))
        return mask is not None and any(mask in torch.as_tensor(row) for row in rows)


class MaskedLM(LanguageModel):
    """Masked language modelling: the hidden tokens of a text, predicted by the others.

    log p(y) of an example is the **sum** over its hidden tokens, t = 0..T-1, of
    log softmax(f_t)[y_t]. Texts without labels get some tokens hidden when they are prepared. The
    hidden tokens of one text are predicted independently: a pseudo-likelihood of the text.
    Reference: Devlin et al. (2019), NAACL, section 3.1.
    """

    name = "fill-mask"
    reads = "tokens that are hidden in the text"
    collator = MaskedCollator
    classes = classes_of("MASKED_LM")
    auto = "AutoModelForMaskedLM"
    shift = 0
    title = "a masked language model"

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        encoder = checkpoint.is_a("MASKED_LM") and not checkpoint.decodes
        return encoder and checkpoint.layout in (None, "tokens")


def hidden(
    examples: Any, as_row: Callable[[Any], Mapping[str, Any]], tokenizer: Any
) -> datasets.Dataset:
    """Return texts with some tokens hidden, at least one in each, and the hidden ones as labels.

    The same tokens are hidden at every call.
    """
    if getattr(tokenizer, "mask_token", None) is None:
        raise DataError(
            "to hide tokens of texts without labels a masked language model needs a tokenizer with "
            f"a mask token, got {'none' if tokenizer is None else type(tokenizer).__name__}; pass "
            "tokenizer=, or 'labels' with -100 at the tokens that are not to be predicted"
        )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=HIDDEN_SHARE)
    rows = []
    for i in range(len(examples)):
        row = as_row(examples[i])
        ids = torch.as_tensor(row["input_ids"])
        fixed = torch.as_tensor(
            tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)
        ).bool()
        if "attention_mask" in row:
            fixed |= torch.as_tensor(row["attention_mask"]) == 0
        if fixed.all():
            raise DataError(f"example {i} has no token that could be hidden; leave it out")
        seed = zlib.crc32(ids.numpy().tobytes(), HIDDEN_SEED)
        collator.generator = torch.Generator().manual_seed(seed)
        inputs, labels = ids, torch.full_like(ids, IGNORED)
        while labels.eq(IGNORED).all():
            inputs, labels = collator.torch_mask_tokens(ids.clone(), fixed)
        rows.append({**row, "input_ids": inputs.tolist(), LABELS: labels.tolist()})
    return datasets.Dataset.from_list(rows)
